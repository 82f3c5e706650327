"""The linear layers against torch's own product, in float64."""

from functools import partial

import pytest
import torch
from conftest import cpp_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2r_fast.ops import ensemble_linear
from d2r_fast.ops.backends import INTERPRETED
from d2r_fast.ops.cpp.library import instruction_sets, use_instruction_set

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
@pytest.mark.parametrize(("e", "b"), [(7, 50), (1, 900), (3, 131)])
def test_every_call_reads_the_weights_as_they_are_now(backend, e, b):
    """Threads keep the memory in which they packed a weight, for the next weight."""
    leaves = [v.detach() for v in make_case(e, b, 20, 24)]
    before = results(partial(ensemble_linear, backend=backend), leaves, True)
    leaves[1].copy_(leaves[1].flip(0, 1))
    after = results(partial(ensemble_linear, backend=backend), leaves, True)
    assert not torch.equal(before[0], after[0])
    assert_agrees(after, results(plain, leaves, True))


@pytest.mark.parametrize("backend", cpp_backends(), indirect=True)
def test_float32_is_as_accurate_as_torch(backend):
    leaves = [v.detach().float().double().requires_grad_() for v in make_case(2, 300, 400, 256)]
    truth = results(plain, leaves, True)
    theirs = results(plain, leaves, True, torch.float32)
    ours = results(partial(ensemble_linear, backend=backend), leaves, True, torch.float32)
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        limit = 2 * (b.double() - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (a.double() - exact).abs().max() <= limit


def bf16_product(x, weight, bias):
    """Operands rounded, sums in float64."""
    return x.bfloat16().double() @ weight.bfloat16().double().mT + bias[:, None].double()


@pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
def test_bf16_products_are_of_rounded_operands(backend, relu):
    x, weight, _ = leaves = [v.detach().float().requires_grad_() for v in make_case(2, 300, 401, 255)]
    y = ensemble_linear(*leaves, relu, backend, "bf16")
    d_y = torch.randn_like(y)
    ours = [y, *torch.autograd.grad(y, leaves, d_y)]
    z = bf16_product(*leaves)
    d_z = d_y * (y > 0) if relu else d_y
    nothing = torch.zeros(2, 1)
    expected = [
        z.relu() if relu else z,
        bf16_product(d_z, weight.mT, nothing),
        bf16_product(d_z.mT, x.mT, nothing),
        d_z.double().sum(1),
    ]
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).abs().max() <= 64 * torch.finfo(torch.float32).eps * b.abs().max()
    assert (y - ensemble_linear(*leaves, relu, backend)).abs().max() > 1e-3 * y.abs().max()


def test_bf16_products_are_the_same_bits_on_every_instruction_set():
    leaves = [v.detach().float() for v in make_case(2, 300, 401, 255)]
    outs = []
    for name in instruction_sets():
        use_instruction_set(name)
        outs.append(ensemble_linear(*leaves, True, "cpp", "bf16"))
    use_instruction_set(instruction_sets()[0])
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_bf16_products_keep_nan_and_infinity():
    x, weight, bias = (v.detach().float() for v in make_case(1, 300, 40, 33))
    x[0, 3, 5], x[0, 4, 6] = torch.nan, torch.inf
    for name in instruction_sets():
        use_instruction_set(name)
        y = ensemble_linear(x, weight, bias, False, "cpp", "bf16")
        assert y[0, 3].isnan().all() and y[0, 4].isinf().all() and y[0, 5:].isfinite().all()
    use_instruction_set(instruction_sets()[0])


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


@pytest.mark.skipif(not INTERPRETED, reason="tests/gpu has the GPU's")
@pytest.mark.parametrize("needs", [(0,), (1, 2), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_triton_matches_torch(shared, needs):
    leaves = make_case(2, 20, 43, 33, shared)
    op = partial(ensemble_linear, backend="triton")
    assert "Eager" in type(op(*leaves).grad_fn).__name__  # our kernels, not torch's product
    assert_agrees(results(op, leaves, True, needs=needs), results(plain, leaves, True, needs=needs))


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
