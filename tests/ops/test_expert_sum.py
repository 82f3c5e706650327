"""Sums of experts, as they are and made orthonormal, against their equations in float64."""

import pytest
import torch
from conftest import cpp_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2r_fast.ops.backends import INTERPRETED
from d2r_fast.ops.expert_sum import expert_sum

pytestmark = pytest.mark.usefixtures("poisoned_memory")
triton = [pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="tests/gpu has the GPU's"))]
on_every_backend = pytest.mark.parametrize("backend", ["reference", *cpp_backends(), *triton], indirect=True)
both_ways = pytest.mark.parametrize("orthogonal", [False, True], ids=["plain", "orthogonal"])


def case(e, b, n, width, dtype=torch.float64):
    """v, weight as leaves."""
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in ((e, b, n, width), (e, b, n))]


def plain(v, weight, orthogonal, eps=0.0):
    """Row by row. A basis by QR has other signs, and eps makes its vectors shorter."""
    rows = []
    for vectors, w in zip(v.flatten(0, 1), weight.flatten(0, 1), strict=True):
        if orthogonal:
            basis = []
            for x in vectors:
                r = x - sum(((x @ b) * b for b in basis), torch.zeros_like(x))
                basis.append(r / (r.square().sum().sqrt() + eps))
            vectors = torch.stack(basis)
        rows.append(w @ vectors)
    return torch.stack(rows).view(*v.shape[:2], v.shape[3])


def results(op, leaves, dtype=None):
    leaves = [v.detach().to(dtype or v.dtype).requires_grad_() for v in leaves]
    y = op(*leaves)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


def assert_agrees(ours, expected, tolerance=1e-11):
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@on_every_backend
@both_ways
@pytest.mark.parametrize("eps", [0.0, 0.25])
@pytest.mark.parametrize(("e", "b", "n", "width"), [(1, 1, 1, 1), (2, 35, 4, 40), (1, 3, 6, 129), (2, 5, 3, 3)])
def test_it_is_its_equation(backend, orthogonal, eps, e, b, n, width):
    leaves = case(e, b, n, width)
    # A basis of all dimensions ends with what the others leave: rounding, times some hundred.
    tolerance = 1e-11 if width > n or eps else 1e-8
    ours = results(lambda *v: expert_sum(*v, orthogonal, eps, backend), leaves)
    assert_agrees(ours, results(lambda *v: plain(*v, orthogonal, eps), leaves), tolerance)


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend holds no state
@given(
    e=st.integers(1, 3),
    b=st.integers(1, 70),
    n=st.integers(1, 5),
    extra=st.integers(3, 30),
    orthogonal=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(backend, e, b, n, extra, orthogonal, seed):
    torch.manual_seed(seed)
    leaves = case(e, b, n, n + extra)
    ours = results(lambda *v: expert_sum(*v, orthogonal, 0.0, backend), leaves)
    assert_agrees(ours, results(lambda *v: plain(*v, orthogonal), leaves), 1e-8)


@on_every_backend
@given(n=st.integers(1, 5), rows=st.integers(1, 4), seed=st.integers(0, 2**16))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
def test_the_basis_is_orthonormal_and_spans_the_same(backend, n, rows, seed):
    torch.manual_seed(seed)
    v = torch.randn(2, rows, n, 6, dtype=torch.float64)
    one = torch.eye(n, dtype=torch.float64)
    b = torch.stack([expert_sum(v, w.expand(2, rows, n), True, 0.0, backend) for w in one], 2)
    dots = torch.einsum("ebid,ebjd->ebij", b, b)
    torch.testing.assert_close(dots, one.expand_as(dots), rtol=0, atol=1e-6)
    # v_i has no part beyond b_0..b_i, and a positive one along b_i.
    along = torch.einsum("ebid,ebjd->ebij", v, b)
    torch.testing.assert_close(torch.einsum("ebij,ebjd->ebid", along.tril(), b), v, rtol=0, atol=1e-6)
    assert (along.diagonal(dim1=-2, dim2=-1) > 0).all()


@pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)
@both_ways
def test_gradcheck(backend, orthogonal):
    assert torch.autograd.gradcheck(lambda *v: expert_sum(*v, orthogonal, 0.1, backend), case(2, 3, 3, 5))


@on_every_backend
@pytest.mark.parametrize("orthogonal", [False, True], ids=["plain", "orthogonal"])
def test_a_vector_of_zeros_has_no_direction(backend, orthogonal):
    v, weight = case(1, 2, 2, 5)
    with torch.no_grad():
        v[0, 0, 1] = 0
    y, d_v, d_weight = results(lambda *a: expert_sum(*a, orthogonal, 1e-8, backend), [v, weight])
    assert all(value.isfinite().all() for value in (y, d_v, d_weight))
    assert_agrees([y], [plain(v, weight, orthogonal, 1e-8)])


@pytest.mark.parametrize("backend", [*cpp_backends(), *triton], indirect=True)
def test_float32_is_as_accurate_as_the_equation(backend):
    leaves = [v.detach().float().double() for v in case(2, 30, 4, 100)]
    truth = results(lambda *v: plain(*v, True), leaves)
    theirs = results(lambda *v: plain(*v, True), leaves, torch.float32)
    ours = results(lambda *v: expert_sum(*v, True, 0.0, backend), leaves, torch.float32)
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        limit = 2 * (b.double() - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (a.double() - exact).abs().max() <= limit


@on_every_backend
@both_ways
def test_a_nan_stays_in_its_row(backend, orthogonal):
    v, weight = (value.detach() for value in case(1, 9, 3, 8))
    v[0, 4, 1, 3] = torch.nan
    y = expert_sum(v, weight, orthogonal, 0.0, backend)
    assert y[0, 4].isnan().any() and not y[0, :4].isnan().any() and not y[0, 5:].isnan().any()


def test_no_rows():
    for backend in ("reference", "cpp"):
        v, weight = case(2, 0, 3, 4)
        y = expert_sum(v, weight, True, backend=backend)
        assert y.shape == (2, 0, 4)
        assert [g.shape for g in torch.autograd.grad(y.sum(), [v, weight])] == [v.shape, weight.shape]


def test_opcheck_and_compile():
    leaves = case(2, 7, 3, 5)
    for orthogonal in (False, True):
        torch.library.opcheck(torch.ops.d2r_fast.expert_sum.default, (*leaves, orthogonal, 0.1))
        plain_leaves = [v.detach() for v in leaves]
        d_y = torch.randn(2, 7, 5, dtype=torch.float64)
        torch.library.opcheck(torch.ops.d2r_fast.expert_sum_backward.default, (d_y, *plain_leaves, orthogonal, 0.1))
    compiled = torch.compile(expert_sum, fullgraph=True, backend="aot_eager")
    ours = results(lambda *v: compiled(*v, True, 0.0, "cpp"), leaves)
    assert_agrees(ours, results(lambda *v: expert_sum(*v, True), leaves))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"v": torch.zeros(2, 3, 4)}, ValueError, r"v: expected \[E,B,N,D\], got \[2, 3, 4\]"),
        ({"v": torch.zeros(2, 3, 4, 3), "orthogonal": True}, ValueError, r"v: expected \[E,B,N,D\] with N <= D, got"),
        ({"weight": torch.zeros(2, 3, 5)}, ValueError, r"weight: expected shape \[2, 3, 4\], got \[2, 3, 5\]"),
        ({"weight": torch.zeros(2, 3, 4).double()}, ValueError, "weight: expected torch.float32 like v"),
        ({"norm_epsilon": -1.0}, ValueError, "norm_epsilon: expected a finite number of at least 0, got -1.0"),
        ({"norm_epsilon": "no"}, TypeError, "norm_epsilon: expected a number, got str"),
        ({"orthogonal": 1}, TypeError, "orthogonal: expected True or False, got 1"),
        ({"backend": "blas"}, ValueError, "backend: expected one of auto, reference, cpp, triton, got 'blas'"),
    ],
)
def test_errors(change, error, message):
    arguments = {"v": torch.zeros(2, 3, 4, 5), "weight": torch.zeros(2, 3, 4)} | change
    with pytest.raises(error, match=message):
        expert_sum(**arguments)
