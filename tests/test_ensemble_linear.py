"""The linear layers against torch's own product, in float64."""

from functools import partial

import pytest
import torch
from conftest import cpp_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2r_fast.ops import ensemble_linear
from d2r_fast.ops.cpp.library import has_bf16_products

pytestmark = pytest.mark.usefixtures("poisoned_memory")
on_every_backend = pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)


def make_case(e, b, n_in, n_out, shared=False, dtype=torch.float64):
    """x, weight, bias as leaves."""
    x = torch.randn((b, n_in) if shared else (e, b, n_in), dtype=dtype)
    weight, bias = torch.randn(e, n_out, n_in, dtype=dtype) / n_in**0.5, torch.randn(e, n_out, dtype=dtype)
    return [v.requires_grad_() for v in (x, weight, bias)]


def plain(x, weight, bias, relu):
    """Network by network."""
    rows = x.expand(len(weight), *x.shape) if x.dim() == 2 else x
    y = torch.stack([r @ w.T + b for r, w, b in zip(rows, weight, bias, strict=True)])
    return y.clamp(min=0) if relu else y


def results(op, leaves, relu, dtype=None, needs=(0, 1, 2)):
    """Output and the gradients of the leaves in `needs`."""
    leaves = [v.detach().to(dtype or v.dtype).requires_grad_(i in needs) for i, v in enumerate(leaves)]
    y = op(*leaves, relu)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaves[i] for i in needs], cotangent)]


def assert_agrees(ours, expected, tolerance=1e-12):
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@on_every_backend
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize(
    ("e", "b", "n_in", "n_out"),
    [(1, 1, 1, 1), (2, 300, 43, 400), (2, 130, 400, 400), (1, 67, 256, 136), (3, 65, 128, 1), (1, 12, 10, 33)],
)
def test_matches_torch(backend, e, b, n_in, n_out, shared, relu):
    leaves = make_case(e, b, n_in, n_out, shared)
    assert_agrees(results(partial(ensemble_linear, backend=backend), leaves, relu), results(plain, leaves, relu))


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend holds no state
@given(
    e=st.integers(1, 3),
    b=st.integers(0, 80),
    n_in=st.integers(1, 70),
    n_out=st.integers(1, 70),
    relu=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_matches_torch_at_any_shape(backend, e, b, n_in, n_out, relu, shared, seed):
    torch.manual_seed(seed)
    leaves = make_case(e, b, n_in, n_out, shared)
    assert_agrees(results(partial(ensemble_linear, backend=backend), leaves, relu), results(plain, leaves, relu))


@pytest.mark.parametrize("backend", cpp_backends(), indirect=True)
def test_float32_is_as_accurate_as_torch(backend):
    leaves = [v.detach().float().double().requires_grad_() for v in make_case(2, 300, 400, 256)]
    truth = results(plain, leaves, True)
    theirs = results(plain, leaves, True, torch.float32)
    ours = results(partial(ensemble_linear, backend=backend), leaves, True, torch.float32)
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        limit = 2 * (b.double() - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (a.double() - exact).abs().max() <= limit


@pytest.mark.skipif(not has_bf16_products(), reason="this processor has no AVX512-BF16")
def test_bf16_products_lose_less_than_bf16_tensors():
    leaves = [v.detach().bfloat16().double().requires_grad_() for v in make_case(2, 300, 401, 255)]
    truth = results(plain, leaves, False)
    theirs = results(plain, leaves, False, torch.bfloat16)
    ours = results(partial(ensemble_linear, backend="cpp", precision="bf16"), leaves, False, torch.float32)
    exact = results(partial(ensemble_linear, backend="cpp"), leaves, False, torch.float32)
    for a, b, true in zip(ours, theirs, truth, strict=True):
        assert (a.double() - true).abs().max() <= (b.double() - true).abs().max()
    assert not torch.equal(ours[1], exact[1])  # they really were bf16 products


@pytest.mark.parametrize("needs", [(0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_gradients_of_some_inputs_only(needs, relu):
    leaves = make_case(2, 130, 43, 33)
    op = partial(ensemble_linear, backend="cpp")
    assert_agrees(results(op, leaves, relu, needs=needs), results(plain, leaves, relu, needs=needs))


def test_opcheck_and_compile():
    leaves = make_case(2, 30, 8, 5)
    torch.library.opcheck(torch.ops.d2r_fast.ensemble_linear.default, (*leaves, True, "float32"))
    shared = make_case(2, 30, 8, 5, shared=True)
    torch.library.opcheck(torch.ops.d2r_fast.ensemble_linear.default, (*shared, False, "float32"))
    compiled = torch.compile(ensemble_linear, fullgraph=True, backend="aot_eager")
    assert_agrees(results(partial(compiled, backend="cpp"), leaves, True), results(plain, leaves, True))


def test_few_rows_take_torchs_product_unless_told():
    x, weight, bias = make_case(1, 10, 43, 40)
    assert "Baddbmm" in type(ensemble_linear(x, weight, bias).grad_fn).__name__
    assert "Baddbmm" not in type(ensemble_linear(x, weight, bias, backend="cpp").grad_fn).__name__


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.zeros(4, 3)}, r"weight: expected \[E,out,in\], got \[4, 3\]"),
        ({"x": torch.zeros(2, 7, 4)}, r"x: expected \[E=2,B,3\] or \[B,3\], got \[2, 7, 4\]"),
        ({"x": torch.zeros(3, 7, 3)}, r"x: expected \[E=2,B,3\] or \[B,3\], got \[3, 7, 3\]"),
        ({"bias": torch.zeros(2, 3)}, r"bias: expected \[E=2,4\], got \[2, 3\]"),
        ({"precision": "half"}, "precision: expected one of float32, tf32, bf16, got 'half'"),
        ({"backend": "blas"}, "backend: expected one of auto, reference, cpp, triton, got 'blas'"),
    ],
)
def test_value_errors(changes, message):
    arguments = {"x": torch.zeros(2, 7, 3), "weight": torch.zeros(2, 4, 3), "bias": torch.zeros(2, 4)} | changes
    with pytest.raises(ValueError, match=message):
        ensemble_linear(**arguments)
