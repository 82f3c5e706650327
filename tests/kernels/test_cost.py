"""The cost model knows every launch, and its parts: traffic, residents, the cache. Needs no GPU."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from d2r_fast.kernels.cost import CARDS, Cache, Resources, predict, waves_of
from d2r_fast.kernels.launches import SUITES, Call, Memory
from d2r_fast.kernels.work import Work, route_shares, work_of
from d2r_fast.ops.layer_gradients import Product, Rows, Sum

EVERY_LAUNCH = """
import json
from d2r_fast.kernels.cost import CARDS, Resources, predicted_update
from d2r_fast.kernels.launches import SUITES, calls_on_gpu, suite_config

one = Resources(registers=128, shared=32768, once=2, a_pass=1, a_chunk=2, in_flight=1, product="HGMMA")
found = {}
for suite in SUITES:
    calls = calls_on_gpu(suite_config(suite, "tf32"))
    lines = predicted_update(calls, CARDS["h200"], lambda call: one)
    names = [call.name.removesuffix("_kernel (Triton)") for call in calls]
    found[suite] = {"same": names == [line.kernel for line in lines], "us": [line.us for line in lines]}
print(json.dumps(found))
"""


def memory(*shape, storage=0, begin=0, dtype=torch.float32):
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    return Memory(shape, dtype, storage, begin, begin + n_bytes, n_bytes)


def call(name, results=(), kernel=None, grid=(), kind="other", **arguments):
    return Call(kind, name, kernel, arguments, list(results), grid, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a GPU would do where there is none")
def test_every_launch_that_is_counted_has_a_cost():
    """In a process of its own: in this one Triton's kernels are interpreted."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", EVERY_LAUNCH], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(SUITES)
    for suite in found.values():
        assert suite["same"] and all(1 < us < 2000 for us in suite["us"])


def test_a_kernel_that_nothing_is_known_of_is_named():
    with pytest.raises(ValueError, match="got novel_kernel"):
        work_of(call("novel_kernel (Triton)", kernel=object()))
    with pytest.raises(ValueError, match="got svd"):
        work_of(call("svd", self=memory(4, 4)))


def test_a_product_of_torchs_counts_its_tiles():
    a, b, bias, out = memory(2, 1280, 400), memory(2, 400, 256), memory(2, 1, 256), memory(2, 1280, 256)
    work = work_of(call("baddbmm", [out], kind="product", self=bias, batch1=a, batch2=b))
    assert work.flop == 2 * 2 * 1280 * 400 * 256
    assert [access.traffic / access.n_bytes for access in work.accesses] == [2, 10, 2, 2]
    assert predict(call("bmm", [out], kind="product", self=a, mat2=b), CARDS["h200"], Cache(50e6), None).programs == 40


def test_a_linear_layer_reads_its_operands_once_a_tile():
    sizes = {"N_IN": 400, "N_OUT": 256, "BLOCK_ROWS": 64, "BLOCK_OUT": 64, "BLOCK_DEPTH": 32, "n_rows": 1280}
    tensors = {"x_ptr": memory(2, 1280, 400), "weight_ptr": memory(2, 256, 400), "y_ptr": memory(2, 1280, 256)}
    flags = {"SHARED": False, "PRECISION": "tf32", "num_warps": 4}
    arguments = {**sizes, **tensors, **flags}
    launched = call("ensemble_linear_fwd_kernel (Triton)", kernel=object(), grid=(20, 4, 2), **arguments)
    work = work_of(launched)
    x, weight, y = (tensor.n_bytes for tensor in tensors.values())
    assert sum(access.traffic for access in work.accesses) == 4 * x + 20 * weight + y
    assert (work.chunks, work.depth, work.flop) == (13, 416, 2 * 2 * 1280 * 256 * 416)
    line = predict(launched, CARDS["h200"], Cache(50e6), Resources(96, 40960, 1, 0, 2, 2, "HGMMA"))
    assert (line.programs, line.resident, line.waves) == (160, 5, 1)


def test_gradients_of_a_network_are_tiles_of_products_and_sums():
    rows = Rows(at=0, width=100)
    products = [Product(rows, False, 0, 70, 70, 0), Sum(rows, 0, 1280, 7000, 1)]
    tensors = {"d_z_ptr": memory(1280, 100), "act_ptr": memory(1280, 70), "gradient_ptr": memory(7100)}
    sizes = {"N_ROWS": 1280, "BLOCK_OUT": 64, "BLOCK_IN": 64, "BLOCK_DEPTH": 32, "of_table": products}
    work = work_of(call("network_gradient_kernel (Triton)", kernel=object(), grid=(6,), **sizes, **tensors))
    assert work.flop == 2 * 4 * 64 * 64 * 1280
    d_z, act, gradient = work.accesses
    assert (d_z.n_bytes, d_z.traffic) == (tensors["d_z_ptr"].n_bytes, 3 * tensors["d_z_ptr"].n_bytes)
    assert act.traffic == 2 * 1280 * 70 * 4 and gradient.n_bytes == 7100 * 4


@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "resident"),
    [(128, 0, 8, 2), (128, 120 * 1024, 8, 1), (129, 0, 8, 1), (32, 0, 1, 32), (255, 0, 8, 1), (32, 0, 4, 16)],
)
def test_registers_and_shared_memory_decide_how_many_programs_run(registers, shared, num_warps, resident):
    assert Resources(registers, shared, 0, 0, 0, 0, "-").resident(num_warps) == resident


def test_the_cache_forgets_what_was_not_used_for_longest():
    page = Cache.PAGE
    cache = Cache(4 * page)
    read, written, large = (memory(n * page // 4, storage=i) for i, n in enumerate((2, 2, 4)))
    assert cache.touch(read, read.n_bytes, False) == 2 * page
    assert cache.touch(read, read.n_bytes, False) == 0
    assert cache.touch(written, written.n_bytes, True) == 0
    assert cache.touch(large, large.n_bytes, False) == 4 * page + 2 * page  # and what was written goes to memory
    assert cache.touch(read, read.n_bytes, False) == 2 * page


def test_what_was_given_back_is_not_written_to_memory():
    page = Cache.PAGE
    cache = Cache(2 * page)
    cache.touch(memory(page // 2, storage=0), 2 * page, True)
    cache.free([0])
    assert cache.touch(memory(page // 2, storage=1), 2 * page, False) == 2 * page


def test_a_program_starts_where_one_before_it_has_ended():
    alike, unlike = Work([]), Work([], programs=(1.0, 0.5, 0.5, 1.0))
    assert waves_of(alike, 4, 2) == waves_of(alike, 3, 2) == 2
    assert waves_of(unlike, 4, 2) == 2  # the last one begins when three have ended, at 1.0
    assert waves_of(unlike._replace(programs=(1.0, 1.0, 0.5, 0.5)), 4, 2) == 1.5
    assert waves_of(unlike, 4, 4) == 1


def test_sorted_tiles_that_skip_least_start_first():
    shares = route_shares(16, 2, 1280, 32, True)
    programs = shares.of_programs(40, 4)
    assert len(programs) == 160 and max(programs) == 1.0
    first, last = programs[:40], programs[-40:]
    assert sum(first) > sum(last)
    # Of 132 at once; all at once would be 1, and as they come every tile takes as long as the longest: 2.
    assert waves_of(Work([], programs=programs), 160, 132) < 1.1


def test_random_routes_touch_nearly_every_module():
    alone, tile, sorted_tile = (
        route_shares(16, 2, 1280, n, in_order) for n, in_order in ((1, False), (16, False), (16, True))
    )
    assert alone.active == alone.touched == tile.active
    assert 6 < tile.active < 7.5 and 14.4 < tile.touched < 14.9
    assert tile.active < sorted_tile.touched < tile.touched - 2
