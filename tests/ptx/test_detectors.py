"""What the emulator must find, in programs that are broken on purpose; and what it must not."""

import numpy as np
import pytest
from ptx.emulator import EmulationError
from ptx.programs import kinds, run

EXCHANGE = """
\tshl.b32 %r2, %r1, 2;
\tmov.b32 %r3, global_smem;
\tadd.s32 %r4, %r3, %r2;
\tst.shared.b32 [%r4], %r1;
\t{barrier}
\txor.b32 %r5, %r2, {flip};
\tadd.s32 %r6, %r3, %r5;
\tld.shared.b32 %r7, [%r6];
\tst.global.b32 [%rd11], %r7;"""


@pytest.mark.parametrize(
    ("barrier", "flip", "expected"),
    [
        ("bar.sync 0;", 128, set()),
        ("bar.sync 0;", 4, set()),
        ("bar.warp.sync -1;", 4, set()),
        ("bar.warp.sync -1;", 128, {"write-read race"}),
        ("", 4, {"write-read race"}),
        ("", 128, {"write-read race"}),
        ("", 0, set()),
    ],
)
def test_what_a_barrier_orders(barrier, flip, expected):
    body = EXCHANGE.format(barrier=barrier, flip=flip)
    (out,), launch = run(body, np.zeros(64, np.uint32), threads=64, shared=256)
    assert kinds(launch) - {"uninitialised read"} == expected
    if not expected:
        assert out.tolist() == [i ^ (flip // 4) for i in range(64)]


def test_a_missing_barrier_gives_a_wrong_result_under_some_schedule():
    body = EXCHANGE.format(barrier="", flip=128)
    wrong = 0
    for seed in range(8):
        (out,), _ = run(body, np.zeros(64, np.uint32), threads=64, shared=256, seed=seed)
        wrong += out.tolist() != [i ^ 32 for i in range(64)]
    assert wrong > 0


def test_reading_before_overwriting_needs_a_barrier():
    body = """
\tshl.b32 %r2, %r1, 2;
\tmov.b32 %r3, global_smem;
\tadd.s32 %r4, %r3, %r2;
\tst.shared.b32 [%r4], %r1;
\tbar.sync 0;
\txor.b32 %r5, %r2, 128;
\tadd.s32 %r6, %r3, %r5;
\tld.shared.b32 %r7, [%r6];
\t{barrier}
\tst.shared.b32 [%r4], %r7;"""
    for barrier, expected in (("bar.sync 0;", set()), ("", {"read-write race"})):
        _, launch = run(body.format(barrier=barrier), np.zeros(64, np.uint32), threads=64, shared=256)
        assert kinds(launch) == expected


def test_ctas_are_never_ordered():
    store = "\tmov.u32 %r2, %ctaid.x;\n\tst.global.b32 [%rd11], %r2;"
    assert kinds(run(store, np.zeros(32, np.uint32), grid=(2, 1, 1))[1]) == {"race between CTAs", "lanes disagree"}
    own = "\tmov.u32 %r2, %ctaid.x;\n\tmad.wide.u32 %rd20, %r2, 128, %rd11;\n\tst.global.b32 [%rd20], %r2;"
    (out,), launch = run(own, np.zeros((2, 32), np.uint32), grid=(2, 1, 1))
    assert not kinds(launch) and out[1].tolist() == [1] * 32
    one_at_a_time = run(store, np.zeros(32, np.uint32), grid=(2, 1, 1), batch_threads=32)[1]
    assert kinds(one_at_a_time) == {"race between CTAs"}


COPY = """
\tmov.b32 %r3, global_smem;
\tshl.b32 %r2, %r1, 2;
\tadd.s32 %r4, %r3, %r2;
\tcp.async.ca.shared.global [%r4], [%rd11], 0x4;
\tcp.async.commit_group;
\tcp.async.ca.shared.global [%r4+128], [%rd11], 0x4;
\tcp.async.commit_group;
\t{wait}
\tld.shared.b32 %r5, [%r4];
\tst.global.b32 [%rd12], %r5;"""


@pytest.mark.parametrize(
    ("wait", "good"),
    [
        ("cp.async.wait_group 1;", True),
        ("cp.async.wait_group 0;", True),
        ("cp.async.wait_group 2;", False),
        ("", False),
    ],
)
def test_copies_land_when_waited_for(wait, good):
    data = np.arange(32, dtype=np.uint32)
    (_, out), launch = run(COPY.format(wait=wait), data, np.zeros(32, np.uint32), shared=256)
    assert (kinds(launch) == set()) == good and ((out == data).all()) == good
    assert good or "copy in flight" in kinds(launch)


def test_addresses():
    with pytest.raises(
        EmulationError, match=r"out of bounds: line \d+ `ld.global.b32 %r2, \[%rd11\+4\]`.*a0\+128.*thread 31"
    ):
        run("\tld.global.b32 %r2, [%rd11+4];", np.zeros(32, np.uint32))
    with pytest.raises(EmulationError, match="misaligned"):
        run("\tld.global.b32 %r2, [%rd1+2];", np.zeros(32, np.uint32))
    with pytest.raises(EmulationError, match=r"out of bounds.*shared"):
        run("\tmov.b32 %r3, global_smem;\n\tst.shared.b32 [%r3+64], %r1;", np.zeros(32, np.uint32), shared=64)


def test_unwritten_memory_and_unused_bytes():
    body = "\t{pragma}\n\tld.global.v2.b32 {{%r2, %r3}}, [%rd1];\n\tst.global.b32 [%rd12], %r2;"
    arrays = np.zeros(2, np.uint32), np.zeros(32, np.uint32)
    assert kinds(run(body.format(pragma=""), *arrays, written=(False, True))[1]) == {"uninitialised read"}
    assert not kinds(run(body.format(pragma=""), *arrays, written=(True, False))[1])
    first = "\tst.global.b32 [%rd1], 5;\n\tbar.sync 0;" + body.format(pragma='.pragma "used_bytes_mask 0xf";')
    assert not kinds(run(first, *arrays, written=(False, True))[1])


def test_what_is_not_known_is_refused():
    for code in (
        "frobnicate.b32 %r2, %r1;",
        "bar.sync 1, 32;",
        "shfl.sync.bfly.b32 %r2, %r1, 1, 31, 15;",
        "add.sat.s32 %r2, %r1, 1;",
    ):
        with pytest.raises(EmulationError, match="not supported"):
            run("\t" + code, np.zeros(32, np.uint32))
    with pytest.raises(EmulationError, match="unknown directive"):
        run("\t.local .b8 x[4];", np.zeros(32, np.uint32))


def test_a_barrier_that_some_threads_miss():
    body = "\tsetp.lt.u32 %p1, %r1, 32;\n\t@%p1 bra $L_end;\n\tbar.sync 0;\n$L_end:"
    with pytest.raises(EmulationError, match="deadlock: 32 threads"):
        run(body, np.zeros(64, np.uint32), threads=64)


def test_branches_meet_again():
    body = """
\tmov.b32 %r2, 0;
\tmov.b32 %r3, 0;
$L_loop:
\tsetp.ge.u32 %p1, %r2, %r1;
\t@%p1 bra $L_end;
\tadd.s32 %r3, %r3, %r2;
\tadd.s32 %r2, %r2, 1;
\tbra.uni $L_loop;
$L_end:
\tredux.sync.max.s32 %r4, %r3, -1;
\tadd.s32 %r5, %r4, %r3;
\tst.global.b32 [%rd11], %r5;"""
    (out,), _ = run(body, np.zeros(64, np.uint32), threads=64)
    sums = [i * (i - 1) // 2 for i in range(64)]
    assert out.tolist() == [s + (sums[31] if i < 32 else sums[63]) for i, s in enumerate(sums)]
