"""The emulator's instructions against the PTX manual's definitions."""

import numpy as np
import pytest
from ptx.programs import kinds, run

RNG = np.random.default_rng(0)
A = RNG.integers(0, 2**32, 32, dtype=np.uint32)
B = RNG.integers(0, 2**32, 32, dtype=np.uint32)
A[:4], B[:4] = [0, 0xFFFFFFFF, 0x80000000, 1], [0xFFFFFFFF, 3, 33, 31]


HIGH_WORD = "\n\tshr.u64 %rd31, %rd30, 32;\n\tcvt.u32.u64 %r4, %rd31;"
BOTH = "mov.b64 %rd30, {%r2, %r3};\n\t"
LOW_HALVES = "cvt.u16.u32 %rs1, %r2;\n\tcvt.u16.u32 %rs2, %r3;\n\t"


def signed(x):
    return x - 2**32 if x >= 2**31 else x


def prmt(a, b, mode):
    data, total = [(a >> 8 * n) & 255 for n in range(4)] + [(b >> 8 * n) & 255 for n in range(4)], 0
    for n in range(4):
        selector = (mode >> 4 * n) & 15
        byte = data[selector & 7]
        total |= (255 * (byte >> 7) if selector & 8 else byte) << 8 * n
    return total


@pytest.mark.parametrize(
    ("code", "function"),
    [
        ("add.s32 %r4, %r2, %r3;", lambda a, b: a + b),
        ("mul.lo.s32 %r4, %r2, %r3;", lambda a, b: a * b),
        ("mul.hi.u32 %r4, %r2, %r3;", lambda a, b: (a * b) >> 32),
        ("mad.lo.s32 %r4, %r2, %r3, 7;", lambda a, b: a * b + 7),
        ("shl.b32 %r4, %r2, %r3;", lambda a, b: a << b if b < 32 else 0),
        ("shr.u32 %r4, %r2, %r3;", lambda a, b: a >> min(b, 32)),
        ("shr.s32 %r4, %r2, %r3;", lambda a, b: signed(a) >> min(b, 31)),
        ("bfe.u32 %r4, %r2, 5, 7;", lambda a, _: (a >> 5) & 127),
        ("bfe.s32 %r4, %r2, 5, 1;", lambda a, _: -((a >> 5) & 1)),
        ("prmt.b32 %r4, %r2, %r3, 0x5410U;", lambda a, b: prmt(a, b, 0x5410)),
        ("prmt.b32 %r4, %r2, 0, 0x7770U;", lambda a, b: prmt(a, 0, 0x7770)),
        ("prmt.b32 %r4, %r2, %r3, 0xF8A6U;", lambda a, b: prmt(a, b, 0xF8A6)),
        ("rem.s32 %r4, %r2, 7;", lambda a, _: signed(a) - 7 * int(signed(a) / 7)),
        ("neg.s32 %r4, %r2;", lambda a, _: -a),
        ("shf.l.wrap.b32 %r4, %r2, %r3, 9;", lambda a, b: ((b << 32 | a) << 9) >> 32),
        ("popc.b32 %r4, %r2;", lambda a, _: bin(a).count("1")),
        ("setp.lt.s32 %p1, %r2, %r3;\n\tselp.b32 %r4, 1, 0, %p1;", lambda a, b: signed(a) < signed(b)),
        ("setp.lt.u32 %p1, %r2, %r3;\n\tselp.b32 %r4, 1, 0, %p1;", lambda a, b: a < b),
        ("cvt.u16.u32 %rs1, %r2;\n\tcvt.u32.u16 %r4, %rs1;", lambda a, _: a & 0xFFFF),
        (f"cvt.s64.s32 %rd30, %r2;{HIGH_WORD}", lambda a, _: signed(a) >> 32),
        (f"mul.wide.s32 %rd30, %r2, %r3;{HIGH_WORD}", lambda a, b: signed(a) * signed(b) >> 32),
        (
            f"{BOTH}mul.hi.u64 %rd31, %rd30, 141898031336227321;\n\tcvt.u32.u64 %r4, %rd31;",
            lambda a, b: (a | b << 32) * 141898031336227321 >> 64,
        ),
        (f"{BOTH}{{ .reg .b32 tmp; mov.b64 {{tmp, %r4}}, %rd30; }}", lambda _, b: b),
        (f"{LOW_HALVES}mov.b32 %r4, {{%rs1, %rs2}};", lambda a, b: (a & 0xFFFF) | (b & 0xFFFF) << 16),
    ],
)  # fmt: skip
def test_integers(code, function):
    body = f"\tld.global.b32 %r2, [%rd11];\n\tld.global.b32 %r3, [%rd12];\n\t{code}\n\tst.global.b32 [%rd13], %r4;"
    (_, _, out), launch = run(body, A, B, np.zeros(32, np.uint32))
    assert out.tolist() == [int(function(int(a), int(b))) & 0xFFFFFFFF for a, b in zip(A, B, strict=True)]
    assert not kinds(launch)


NAN = float("nan")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("max.f32 %r4, %r2, %r3;", [2.0, 1.0, 2.0, NAN]),
        ("max.NaN.f32 %r4, %r2, %r3;", [2.0, NAN, NAN, NAN]),
        ("min.f32 %r4, %r2, %r3;", [1.0, 1.0, 2.0, NAN]),
        ("setp.ne.f32 %p1, %r2, %r3;\n\tselp.f32 %r4, 0f3F800000, 0f00000000, %p1;", [1.0, 0.0, 0.0, 0.0]),
        ("setp.neu.f32 %p1, %r2, %r3;\n\tselp.f32 %r4, 0f3F800000, 0f00000000, %p1;", [1.0, 1.0, 1.0, 1.0]),
        ("setp.num.f32 %p1, %r2, %r3;\n\tselp.f32 %r4, 0f3F800000, 0f00000000, %p1;", [1.0, 0.0, 0.0, 0.0]),
        ("fma.rn.f32 %r4, %r2, %r3, 0fBF800000;", [1.0, NAN, NAN, NAN]),
        ("cvt.rn.bf16.f32 %rs1, %r2;\n\tcvt.u32.u16 %r5, %rs1;\n\tshl.b32 %r4, %r5, 16;", [1.0, 1.0, NAN, NAN]),
    ],
)
def test_floats(code, expected):
    a, b = np.array([[1, 1, NAN, NAN], [2, NAN, 2, NAN]], np.float32).repeat(8, 1)
    body = f"\tld.global.b32 %r2, [%rd11];\n\tld.global.b32 %r3, [%rd12];\n\t{code}\n\tst.global.b32 [%rd13], %r4;"
    (_, _, out), _ = run(body, a, b, np.zeros(32, np.float32))
    np.testing.assert_array_equal(out, np.repeat(np.float32(expected), 8))


def test_halves_of_two_registers_compare_each_for_itself():
    """The lower one's predicate comes first."""
    one, two = 0x3F80, 0x4000  # 1 and 2 in bfloat16
    a = np.array([one << 16 | two, two << 16 | one, 0x7FC0 << 16 | two, two << 16 | two], np.uint32).repeat(8)
    b = np.full(32, one << 16 | one, np.uint32)
    code = """setp.gt.bf16x2 %p1|%p2, %r2, %r3;
\tselp.b32 %r4, 1, 0, %p1;
\tselp.b32 %r5, 2, 0, %p2;
\tadd.u32 %r4, %r4, %r5;"""
    body = f"\tld.global.b32 %r2, [%rd11];\n\tld.global.b32 %r3, [%rd12];\n\t{code}\n\tst.global.b32 [%rd13], %r4;"
    (_, _, out), launch = run(body, a, b, np.zeros(32, np.uint32))
    assert out.tolist() == np.repeat([1, 2, 1, 3], 8).tolist()
    assert not kinds(launch)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("fma.rn.ftz.f32 %r4, %r2, 0f3F800000, 0f00000000;", [0.0, 2.25]),
        ("fma.rn.f32 %r4, %r2, 0f3F800000, 0f00000000;", [1e-40, 2.25]),
        ("sqrt.approx.ftz.f32 %r4, %r2;", [0.0, 1.5]),
    ],
)
def test_denormals_are_flushed_where_it_is_said(code, expected):
    a = np.array([1e-40, 2.25], np.float32).repeat(16)
    (_, out), _ = run(
        f"\tld.global.b32 %r2, [%rd11];\n\t{code}\n\tst.global.b32 [%rd12], %r4;", a, np.zeros(32, np.float32)
    )
    np.testing.assert_array_equal(out, np.float32(expected).repeat(16))


def test_float64():
    """2 / sqrt(n + 1/4), from a whole number and back to float32."""
    n = np.arange(32, dtype=np.uint32)
    body = """
\tld.global.b32 %r2, [%rd11];
\tcvt.u64.u32 %rd30, %r2;
\tcvt.rn.f64.s64 %rd31, %rd30;
\tfma.rn.f64 %rd31, %rd31, 0d3FF0000000000000, 0d3FD0000000000000;
\tsqrt.rn.f64 %rd31, %rd31;
\tdiv.rn.f64 %rd31, 0d4000000000000000, %rd31;
\tcvt.rn.f32.f64 %r4, %rd31;
\tst.global.b32 [%rd12], %r4;"""
    (_, out), _ = run(body, n, np.zeros(32, np.float32))
    np.testing.assert_array_equal(out, (2 / np.sqrt(n + 0.25)).astype(np.float32))


def test_a_parameter_may_be_chosen():
    body = """
\tmov.b32 %r2, k_param_0;
\tmov.b32 %r3, k_param_1;
\tsetp.lt.u32 %p1, %r1, 8;
\tselp.b32 %r4, %r2, %r3, %p1;
\tld.param.b64 %rd30, [%r4];
\tld.global.b32 %r5, [%rd30];
\tst.global.b32 [%rd13], %r5;"""
    (*_, out), _ = run(body, np.uint32([5]), np.uint32([7]), np.zeros(32, np.uint32))
    assert out.tolist() == [5] * 8 + [7] * 24


def test_a_fused_product_is_rounded_once():
    a = np.full(32, 1 + 2.0**-12, np.float32)
    body = "\tld.global.b32 %r2, [%rd11];\n\tfma.rn.f32 %r4, %r2, %r2, 0fBF800000;\n\tst.global.b32 [%rd12], %r4;"
    (_, out), _ = run(body, a, np.zeros(32, np.float32))
    assert (out == np.float32(2.0**-11 + 2.0**-24)).all()


@pytest.mark.parametrize(
    ("mode", "by", "clamp", "source"),
    [
        ("bfly", 4, 31, lambda i: i ^ 4),
        ("up", 3, 0, lambda i: i - 3 if i >= 3 else i),
        ("down", 5, 31, lambda i: i + 5 if i + 5 < 32 else i),
        ("idx", 9, 31, lambda _: 9),
        ("bfly", 8, 0x181F, lambda i: i ^ 8 if (i ^ 8) <= ((i & 24) | 7) else i),  # segments of 8 lanes
    ],
)
def test_shuffles(mode, by, clamp, source):
    body = f"\tshfl.sync.{mode}.b32 %r2, %r1, {by}, {clamp}, -1;\n\tst.global.b32 [%rd11], %r2;"
    (out,), _ = run(body, np.zeros(32, np.uint32))
    assert out.tolist() == [source(i) for i in range(32)]


def fragment(lane, kind):
    """(row, column) of the elements of A, B and C that a lane holds, as the PTX manual numbers them."""
    group, pair = lane // 4, lane % 4
    c = [(group + 8 * (i >= 2), pair * 2 + (i & 1)) for i in range(4)]
    if kind == "tf32":
        a = [(group + 8 * (i in (1, 3)), pair + 4 * (i >= 2)) for i in range(4)]
        return a, [(pair + 4 * i, group) for i in range(2)], c
    a = [(group + 8 * ((2 <= i < 4) or i >= 6), pair * 2 + (i & 1) + 8 * (i >= 4)) for i in range(8)]
    return a, [(pair * 2 + (i & 1) + 8 * (i >= 2), group) for i in range(4)], c


@pytest.mark.parametrize("kind", ["tf32", "bf16"])
def test_products_of_matrices(kind):
    depth = 8 if kind == "tf32" else 16
    a, b, c = (RNG.integers(-8, 8, s).astype(np.float32) for s in ((16, depth), (depth, 8), (16, 8)))
    registers = {name: np.zeros((32, count), np.uint32) for name, count in (("a", 4), ("b", 2), ("c", 4))}
    for lane in range(32):
        for name, matrix, places in zip("abc", (a, b, c), fragment(lane, kind), strict=True):
            bits = [int(matrix[p].view(np.uint32)) for p in places]
            if kind == "bf16" and name != "c":
                bits = [bits[i] >> 16 | (bits[i + 1] >> 16 << 16) for i in range(0, len(bits), 2)]
            registers[name][lane] = bits
    shape = "m16n8k8.row.col.f32.tf32.tf32.f32" if kind == "tf32" else "m16n8k16.row.col.f32.bf16.bf16.f32"
    body = f"""
\tmad.wide.u32 %rd21, %r1, 16, %rd1;
\tmad.wide.u32 %rd22, %r1, 8, %rd2;
\tmad.wide.u32 %rd23, %r1, 16, %rd3;
\tld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd21];
\tld.global.v2.b32 {{%r6, %r7}}, [%rd22];
\tld.global.v4.b32 {{%r8, %r9, %r10, %r11}}, [%rd23];
\tmma.sync.aligned.{shape} {{%r8, %r9, %r10, %r11}}, {{%r2, %r3, %r4, %r5}}, {{%r6, %r7}}, {{%r8, %r9, %r10, %r11}};
\tst.global.v4.b32 [%rd23], {{%r8, %r9, %r10, %r11}};"""
    (_, _, out), _ = run(body, registers["a"], registers["b"], registers["c"])
    for lane in range(32):
        for value, place in zip(out[lane].view(np.float32), fragment(lane, kind)[2], strict=True):
            assert value == (a @ b + c)[place]


def swizzled(at, span):
    return at ^ ((at >> 7 & (span // 16 - 1)) << 4)


@pytest.mark.parametrize(("kind", "span"), [("tf32", 32), ("tf32", 64), ("tf32", 128), ("bf16", 128), ("bf16", 32)])
def test_products_of_warpgroups(kind, span):
    """B is put into shared memory here, K-major and swizzled; A, in registers, is all ones."""
    depth, width, element = (8, 16, 4) if kind == "tf32" else (16, 16, 2)
    b = RNG.integers(-8, 8, (width, depth)).astype(np.float32)
    tile = np.zeros(4096, np.uint8)
    for n in range(width):
        for k in range(depth):
            at = swizzled(n % 8 * span + n // 8 * 8 * span + k * element, span)
            tile[at : at + element] = b[n : n + 1, k].view(np.uint8)[4 - element :]
    one = "1065353216" if kind == "tf32" else str(0x3F803F80)
    mode = {128: 1, 64: 2, 32: 3}[span]
    descriptor = mode << 62 | (8 * span // 16) << 32 | 0x400 // 16
    shape = f"m64n{width}k{depth}.f32.{kind}.{kind}"
    flags = "1, 1" if kind == "tf32" else "1, 1, 0"
    d = ",".join(f"%r{20 + i}" for i in range(width // 2))
    stores = "\n".join(f"\tst.global.b32 [%rd22+{512 * i}], %r{20 + i};" for i in range(width // 2))
    body = f"""
\tshl.b32 %r2, %r1, 5;
\tmov.b32 %r3, global_smem;
\tadd.s32 %r3, %r3, %r2;
\tmad.wide.u32 %rd21, %r1, 32, %rd1;
\tmad.wide.u32 %rd22, %r1, 4, %rd2;
\tld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd21];
\tst.shared.v4.b32 [%r3], {{%r4, %r5, %r6, %r7}};
\tld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd21+16];
\tst.shared.v4.b32 [%r3+16], {{%r4, %r5, %r6, %r7}};
\tfence.proxy.async.shared::cta;
\tbar.sync 0;
\tmov.b64 %rd23, {descriptor - 2**64 if descriptor >= 2**63 else descriptor};
\tmov.b32 %r8, {one};
\tmov.pred %p1, 0;
\twgmma.fence.sync.aligned;
\twgmma.mma_async.sync.aligned.{shape} {{{d}}}, {{%r8,%r8,%r8,%r8}}, %rd23, %p1, {flags};
\twgmma.commit_group.sync.aligned;
\twgmma.wait_group.sync.aligned 0;
{stores}"""
    (_, out), launch = run(body, tile, np.zeros((width // 2, 128), np.float32), threads=128, shared=4096)
    assert not kinds(launch)
    sums = b.sum(1)
    for register in range(width // 2):
        for lane in range(128):
            assert out[register, lane] == sums[register // 4 * 8 + lane % 4 * 2 + register % 2]
