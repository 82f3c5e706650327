"""The operations as torch sees them: registration, torch.compile, autocast, threads, and a library that is missing."""

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from d2r_fast import make_routes, routed_modules, select_routes
from d2r_fast.ops import backends
from d2r_fast.ops.cpp import library

N, K, D, R = 5, 2, 16, 15
backend_names = pytest.mark.parametrize("backend", ["reference", "cpp"])


def inputs(e=2, b=30, dtype=torch.float32):
    """logits, h0, weight, bias, all leaves."""
    shapes = (e, b, R), (e, b, D), (e, N - 1, D, D), (e, N - 1, D)
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def both(logits, h0, weight, bias, backend="cpp"):
    """Routes chosen from the logits, and the modules along them."""
    return routed_modules(h0, weight, bias, select_routes(logits, K, backend=backend), backend=backend)


def test_opcheck():
    logits, h0, weight, bias = inputs(dtype=torch.float64)
    temperature, noise = torch.ones(30), torch.rand(2, 30, R)
    ops = torch.ops.d2r_fast
    for extra in ((None, None, None), (temperature, noise, None)):
        torch.library.opcheck(ops.select_routes.default, (logits, *extra, K, N, True))
    given = select_routes(logits.detach(), K)
    torch.library.opcheck(ops.select_routes.default, (logits, None, None, given.index, K, N, False))
    torch.library.opcheck(ops.select_routes_backward.default, (given.gate, given.index, given.gate))
    # Every module active: what h holds for the others is anything, and opcheck would compare it.
    dense = make_routes(torch.arange(N).expand(2, 30, N, N), torch.rand(2, 30, N, N, dtype=torch.float64))
    args = (dense.index, dense.gate.requires_grad_(), dense.flow, dense.active, True, "float32")
    torch.library.opcheck(ops.routed_modules.default, (h0, weight, bias, *args, True))
    mixed, h, opened = ops.routed_modules(h0, weight, bias, *args, True)
    torch.library.opcheck(
        ops.routed_modules_backward.default,
        (*(v.detach() for v in (mixed, weight, h, opened, dense.index, dense.gate)), *args[2:], True),
    )


# To compile the reference, a thousand operations, takes inductor a minute: benches/routed_modules.py does.
@pytest.mark.parametrize(
    ("backend", "compiler"), [("reference", "aot_eager"), ("cpp", "aot_eager"), ("cpp", "inductor")]
)
def test_compiles_without_graph_breaks(backend, compiler):
    leaves = inputs()
    cotangent = torch.randn(2, 30, D)
    eager = both(*leaves, backend)
    expected = torch.autograd.grad(eager, leaves, cotangent)
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend=compiler)(*leaves, backend)
    torch.testing.assert_close(compiled, eager)
    for ours, theirs in zip(torch.autograd.grad(compiled, leaves, cotangent), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@backend_names
def test_autocast_runs_in_the_weights_dtype(backend):
    logits, h0, weight, bias = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = logits @ torch.eye(R)  # bf16, as a layer before the operation gives
        assert scores.dtype == torch.bfloat16
        out = both(scores, h0 @ torch.eye(D), weight, bias, backend)
    assert out.dtype == torch.float32
    grads = torch.autograd.grad(out, [logits, h0, weight, bias], torch.ones_like(out))
    assert all(g.isfinite().all() and g.dtype == torch.float32 for g in grads)
    plain = both(logits.bfloat16().float(), h0.bfloat16().float(), weight, bias, backend)
    torch.testing.assert_close(out, plain)


def test_threads_change_no_output_and_sum_weights_in_a_fixed_order():
    leaves = inputs(b=700)
    cotangent = torch.randn(2, 700, D)

    def run(threads):
        torch.set_num_threads(threads)
        try:
            out = both(*leaves)
            return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]
        finally:
            torch.set_num_threads(1)

    one, three, again = run(1), run(3), run(3)
    for a, b in zip(three, again, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one[:3], three[:3], strict=True):  # output, d_logits, d_h0
        assert torch.equal(a, b)
    for a, b in zip(one[3:], three[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_nan_is_handed_on():
    logits, h0, weight, bias = inputs()
    with torch.no_grad():
        h0[1, 17, 3] = torch.nan
        out = both(logits, h0, weight, bias)
    assert out[1, 17].isnan().any()
    assert not out[:, :17].isnan().any() and not out[0].isnan().any()


def test_a_missing_library_is_named_and_the_reference_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_cpu.so")
    library._load.cache_clear()
    try:
        monkeypatch.setitem(backends.STATE, "cpp", library.state())
        assert "not built" in backends.availability()["cpp"]
        logits, *_ = inputs()
        assert backends.choose_backend("auto", logits) == "reference"
        with pytest.raises(ValueError, match=r"backend cpp: not built: install a C\+\+20 compiler"):
            select_routes(logits, K, backend="cpp")
        monkeypatch.setattr(library, "SOURCES", tmp_path)  # of an installed package there are none
        (tmp_path / "_cpu.so").write_text("not a library")
        library._load.cache_clear()
        monkeypatch.setitem(backends.STATE, "cpp", library.state())
        assert "built for another torch or machine" in backends.availability()["cpp"]
    finally:
        library._load.cache_clear()


@pytest.mark.skipif(not library.LIBRARY.is_file(), reason="the C++ kernels are not built")
def test_a_library_from_before_an_update_is_not_loaded(monkeypatch, tmp_path):
    """Its operations might take other arguments than are given here."""
    sources = tmp_path / "csrc"
    shutil.copytree(Path(__file__).parents[2] / "csrc", sources)
    monkeypatch.setattr(library, "SOURCES", sources)
    assert library._is_of_these_sources()  # this checkout's
    with (sources / "library.cpp").open("a") as file:
        file.write("// changed\n")
    library._load.cache_clear()
    try:
        assert library.state().startswith(f"built from other sources than those in {sources}: install a C++20 compiler")
        assert not library.is_ready()
    finally:
        library._load.cache_clear()


def test_the_slow_path_is_warned_of_once_and_not_where_it_was_asked_for(monkeypatch):
    monkeypatch.setitem(backends.STATE, "cpp", "not built: do this")
    backends._warn_of_the_slow_path.cache_clear()
    leaves = inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both(*leaves, "reference")
    with pytest.warns(RuntimeWarning, match=r"slow reference runs on this CPU, .* not built: do this") as told:
        both(*leaves, "auto")
        both(*leaves, "auto")
        torch.compile(both, fullgraph=True, backend="eager")(*leaves, "auto")
    assert len([w for w in told if "slow reference" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "cuda"}, "backend: expected one of auto, reference, cpp, triton, got 'cuda'"),
        ({"precision": "float16"}, "precision: expected one of float32, tf32, bf16, got 'float16'"),
    ],
)
def test_value_errors(arguments, message):
    logits, h0, weight, bias = inputs()
    with pytest.raises(ValueError, match=message):
        routed_modules(h0, weight, bias, select_routes(logits, K), **arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs it")
def test_triton_without_a_gpu_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(backends, "INTERPRETED", False)
    assert backends.availability()["triton"].startswith("needs")
    logits, *_ = inputs()
    with pytest.raises(ValueError, match="backend triton: expected tensors on cuda, got cpu"):
        select_routes(logits, K, backend="triton")


def test_importing_the_package_imports_no_compiler():
    """torch._dynamo and triton take longer to import than torch itself."""
    code = "import sys, d2r_fast; sys.exit('triton' in sys.modules or 'torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_library_refuses_what_would_leave_its_buffers():
    h0 = torch.zeros(1, 2, 2000)
    routes = make_routes(torch.zeros(1, 2, 1, 1, dtype=torch.int32), torch.ones(1, 2, 1, 1))
    with pytest.raises(ValueError, match="expected a width of at most 1024, got 2000"):
        routed_modules(h0, torch.zeros(1, 0, 2000, 2000), torch.zeros(1, 0, 2000), routes, backend="cpp")
    with pytest.raises(ValueError, match=r"logits: expected shape \[2, 3, 15\], got \[2, 3, 14\]"):
        torch.ops.d2r_fast.select_routes(torch.zeros(2, 3, 14), None, None, None, K, N, True)
