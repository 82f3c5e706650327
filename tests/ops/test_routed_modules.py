"""The routed modules against a formulation in plain autograd that shares nothing with the operation.

It keeps every module's output twice, equal in value: `full`, which every gradient may enter, and `masked`, whose ReLU
layer is detached so that only the residual takes a gradient. A route's layer reads full or masked as the flow says;
its residual reads full.
"""

from functools import partial

import pytest
import torch
from conftest import cpp_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from route_cases import largest, make_case, run

import d2r_fast
from d2r_fast import Routes, make_routes, select_routes, unpack_active

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Instruction sets share their source, so what does not touch its arithmetic is tested on the fastest alone.
on_every_backend = pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
on_every_instruction_set = pytest.mark.parametrize("backend", cpp_backends(), indirect=True)


def autograd_modules(h0, weight, bias, routes, residual=True):
    """The specification, a network at a time, routes as dense [B,i] weights; differentiable by autograd alone."""
    mixed = []
    for e in range(h0.shape[0]):
        n = routes.index.shape[2]
        full, masked = [h0[e]], [h0[e].detach()]
        for i in range(1, n + 1):
            at = routes.index[e, :, i - 1, : min(i, routes.index.shape[3])].long()
            zeros = h0.new_zeros(len(at), i)
            gate = zeros.scatter(1, at, routes.gate[e, :, i - 1, : at.shape[1]])
            flow = zeros.scatter(1, at, routes.flow[e, :, i - 1, : at.shape[1]].to(h0.dtype))
            f, m = torch.stack(full, 1), torch.stack(masked, 1)  # [B,i,D]
            x_layer = torch.einsum("bs,bsd->bd", gate, flow[..., None] * f + (1 - flow[..., None]) * m)
            if i == n:
                mixed.append(x_layer)
                break
            relu = torch.nn.functional.linear(x_layer, weight[e, i - 1], bias[e, i - 1]).relu()
            x_residual = torch.einsum("bs,bsd->bd", gate, f) if residual else torch.zeros_like(relu)
            full.append(relu + x_residual)
            masked.append(relu.detach() + x_residual)
    return torch.stack(mixed)


def assert_close_to(ours, expected, tolerance=1e-11):
    """Relative to the largest expected magnitude of each quantity."""
    for name, value in expected.items():
        assert ours[name].shape == value.shape, name
        assert largest(ours[name] - value) <= tolerance * max(1.0, largest(value)), name


def assert_as_accurate(op, ref, case, dtype, residual=True, slack=2.0):
    """max|op - ref64| <= slack * max|ref(dtype) - ref64| + 8*eps*max|ref64|, for the output and every gradient."""
    cotangent = torch.randn(case[0].shape, dtype=torch.float64)
    truth = run(ref, case, cotangent, residual, torch.float64)
    theirs, ours = run(ref, case, cotangent, residual, dtype), run(op, case, cotangent, residual, dtype)
    for name, value in truth.items():
        assert ours[name].dtype == dtype
        error, allowed = largest(ours[name].double() - value), largest(theirs[name].double() - value)
        print(f"{name}: {error / max(allowed, 1e-300):.2f} of the oracle's error")
        assert error <= slack * allowed + 8 * torch.finfo(dtype).eps * largest(value), name


def grid():
    """Every N, K, residual and flow; E, B and D rotate through theirs."""
    nets, rows, widths = (1, 2, 3), (1, 63, 300), (8, 16, 33)
    cases = []
    for n in (1, 2, 5, 16, 32):
        for k in sorted({k for k in (1, 2, 3, n) if k <= n}):
            for residual in (True, False):
                for flow in ("all", "none", "random"):
                    at = len(cases)
                    b = rows[at // 3 % 3] if n < 32 or k < 32 else rows[at // 3 % 2]
                    cases.append((nets[at % 3], b, n, k, widths[at // 2 % 3], residual, flow))
    return cases


@pytest.fixture
def routed_modules(backend):
    """The operation on the backend of the test's parameter."""
    return partial(d2r_fast.routed_modules, backend=backend)


def test_the_cpp_backend_is_built():
    assert cpp_backends()


@on_every_instruction_set
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
@pytest.mark.parametrize(
    ("e", "b", "n", "k", "d"),
    [(2, 130, 16, 2, 128), (1, 65, 5, 3, 33), (3, 63, 4, 4, 100), (1, 70, 32, 2, 16), (1, 13, 3, 2, 256)],
    ids=lambda v: str(v),
)
def test_every_instruction_set_matches_autograd(routed_modules, e, b, n, k, d, residual):
    case = make_case(e, b, n, k, d)
    cotangent = torch.randn(e, b, d, dtype=torch.float64)
    assert_close_to(run(routed_modules, case, cotangent, residual), run(autograd_modules, case, cotangent, residual))


@on_every_backend
@pytest.mark.parametrize(
    ("e", "b", "n", "k", "d", "residual", "flow"),
    grid(),
    ids=[f"E{c[0]}-B{c[1]}-N{c[2]}-K{c[3]}-D{c[4]}-{'res' if c[5] else 'nores'}-flow_{c[6]}" for c in grid()],
)
def test_matches_autograd(routed_modules, e, b, n, k, d, residual, flow):
    case = make_case(e, b, n, k, d, flow)
    cotangent = torch.randn(e, b, d, dtype=torch.float64)
    assert_close_to(run(routed_modules, case, cotangent, residual), run(autograd_modules, case, cotangent, residual))


@on_every_backend
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend holds no state
@given(
    e=st.integers(1, 3),
    b=st.integers(0, 20),
    n=st.integers(1, 12),
    k=st.integers(1, 12),
    d=st.integers(1, 12),
    residual=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_matches_autograd_at_any_shape(routed_modules, e, b, n, k, d, residual, seed):
    torch.manual_seed(seed)
    case = make_case(e, b, n, min(k, n), d)
    cotangent = torch.randn(e, b, d, dtype=torch.float64)
    assert_close_to(run(routed_modules, case, cotangent, residual), run(autograd_modules, case, cotangent, residual))


@on_every_backend
@pytest.mark.parametrize("mode", ["greedy", "sampled"])
def test_matches_autograd_on_selected_routes(routed_modules, mode):
    logits = 2 * torch.randn(2, 63, 136, dtype=torch.float64)
    noise = torch.randn_like(logits) if mode == "sampled" else None
    routes = select_routes(logits, 2, mode, torch.ones(63, dtype=torch.float64) if noise is not None else None, noise)
    case = (*make_case(2, 63, 16, 2, 16)[:3], routes)
    cotangent = torch.randn(2, 63, 16, dtype=torch.float64)
    ours, expected = run(routed_modules, case, cotangent), run(autograd_modules, case, cotangent)
    assert_close_to(ours, expected)
    unmasked = (*case[:3], routes._replace(flow=torch.ones_like(routes.flow)))
    free = run(routed_modules, unmasked, cotangent)
    assert torch.equal(free["out"], ours["out"])  # values never change
    assert largest(free["weight"] - ours["weight"]) > 1e-3 * largest(ours["weight"])


@on_every_backend
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (4, 2), (4, 4)])
def test_gradcheck_where_every_gradient_flows(routed_modules, n, k, residual):
    h0, weight, bias, routes = make_case(2, 3, n, k, 3, "all")
    flow = torch.ones_like(routes.flow)
    used = routes.gate.detach() != 0
    leaves = [v.requires_grad_() for v in (h0, weight, bias, routes.gate)]

    def op(h0, weight, bias, gate):
        return routed_modules(
            h0, weight, bias, Routes(routes.index, torch.where(used, gate, 0), flow, routes.active), residual
        )

    assert torch.autograd.gradcheck(op, leaves)


@on_every_backend
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
def test_modules_that_no_row_reaches_get_exactly_no_gradient(routed_modules, residual):
    n, d = 16, 16
    seen = set()
    for _ in range(20):
        logits = 2 * torch.randn(1, 1, n * (n + 1) // 2, dtype=torch.float64)
        routes = select_routes(logits, 2, resrouting=False)
        case = (*make_case(1, 1, n, 2, d)[:3], routes)
        grads = run(routed_modules, case, torch.randn(1, 1, d, dtype=torch.float64), residual)
        active = unpack_active(routes.active, n)[0, 0]
        touched = (grads["weight"][0] != 0).flatten(1).any(1)
        assert torch.equal(touched, active[1:])
        assert torch.equal((grads["bias"][0] != 0).any(1), active[1:])
        assert (grads["gate"][0, 0, :-1][~active[1:]] == 0).all()
        seen.add(int(active.sum()))
    assert len(seen) > 3


def routes_of_depths(depths, n, flow):
    """K = 2, and a row of depth d >= 2 reaches modules 0..d-1: each route takes the nearest two below d."""
    b = len(depths)
    index = torch.zeros(1, b, n, 2, dtype=torch.int32)
    for row, depth in enumerate(depths):
        for i in range(1, n + 1):
            top = min(i, depth) - 1
            index[0, row, i - 1] = torch.tensor([top, max(top - 1, 0)])
    return make_routes(index, torch.rand(1, b, n, 2, dtype=torch.float64), flow)


@on_every_instruction_set
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
@pytest.mark.parametrize("flow", [True, False], ids=["flow", "no_flow"])
@pytest.mark.parametrize(
    "depths",
    [[2], [16], [2] * 65, [16] * 65, [2] * 64 + [16], [16] + [2] * 129, [2, 16] * 70, list(range(2, 17)) * 9],
    ids=["one_shallow", "one_deep", "shallow", "deep", "deep_last", "deep_first", "in_turn", "every_depth"],
)
def test_matches_autograd_where_a_block_has_rows_of_any_depth(routed_modules, depths, flow, residual):
    """Modules with no row in a block, with one, and with all of them."""
    b, n, d = len(depths), 16, 17
    routes = routes_of_depths(depths, n, torch.full((1, b, n, 2), flow))
    assert unpack_active(routes.active, n).sum(-1)[0].tolist() == depths
    case = (*make_case(1, b, n, 2, d)[:3], routes)
    cotangent = torch.randn(1, b, d, dtype=torch.float64)
    assert_close_to(run(routed_modules, case, cotangent, residual), run(autograd_modules, case, cotangent, residual))


@on_every_backend
def test_a_module_that_is_computed_without_need_changes_nothing(routed_modules):
    h0, weight, bias, routes = make_case(2, 70, 16, 2, 16)
    every = routes._replace(active=torch.full_like(routes.active, (1 << 16) - 1))
    assert not torch.equal(every.active, routes.active)
    cotangent = torch.randn(2, 70, 16, dtype=torch.float64)
    ours, expected = (run(routed_modules, (h0, weight, bias, r), cotangent) for r in (every, routes))
    assert_close_to(ours, expected)


@on_every_instruction_set
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
def test_only_active_modules_are_kept_and_no_memory_past_them_is_touched(backend, residual):
    """Fresh memory is poisoned here: NaN, and for a bool True."""
    h0, weight, bias, routes = make_case(2, 131, 16, 2, 17)
    _, h, opened = torch.ops.d2r_fast.routed_modules(h0, weight, bias, *routes, residual, "float32", True)
    n_lines = int(unpack_active(routes.active, 16).sum())
    assert 0 < n_lines < h.numel() // 17
    kept, rest = h.flatten()[: n_lines * 17], h.flatten()[n_lines * 17 :]
    assert kept.isfinite().all() and rest.isnan().all()
    assert opened.flatten()[n_lines * 17 :].all()
    begin = unpack_active(routes.active, 16).sum(-1).flatten().cumsum(0).roll(1)
    begin[0] = 0
    assert torch.equal(kept.view(-1, 17)[begin], h0.flatten(0, 1))  # a row's lines begin with module 0's
    if not residual:
        assert torch.equal(opened.flatten()[: n_lines * 17], kept > 0)


@on_every_backend
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
def test_no_row_depends_on_another(routed_modules, residual):
    case = make_case(2, 63, 16, 2, 33)
    h0, weight, bias, routes = case
    cotangent = torch.randn(2, 63, 33, dtype=torch.float64)
    before = run(routed_modules, case, cotangent, residual)
    changed = make_case(2, 63, 16, 2, 33)

    def with_row(value, other, row=17):
        value = value.clone()
        value[:, row] = other[:, row]
        return value

    other_routes = Routes(*(with_row(a, b) for a, b in zip(routes, changed[3], strict=True)))
    after = run(routed_modules, (with_row(h0, changed[0]), weight, bias, other_routes), cotangent, residual)
    rest = torch.arange(63) != 17
    for name in ("out", "h0", "gate"):
        assert torch.equal(before[name][:, rest], after[name][:, rest]), name
        assert not torch.equal(before[name][:, 17], after[name][:, 17]), name


@on_every_backend
def test_no_network_depends_on_another(routed_modules):
    case, other = make_case(2, 30, 5, 2, 16), make_case(2, 30, 5, 2, 16)
    cotangent = torch.randn(2, 30, 16, dtype=torch.float64)

    def second_from(a, b):
        return torch.stack([a[0], b[1]])

    mixed = (*(second_from(a, b) for a, b in zip(case[:3], other[:3], strict=True)),)
    routes = Routes(*(second_from(a, b) for a, b in zip(case[3], other[3], strict=True)))
    before, after = run(routed_modules, case, cotangent), run(routed_modules, (*mixed, routes), cotangent)
    for name, value in before.items():
        assert torch.equal(value[0], after[name][0]), name
        assert not torch.equal(value[1], after[name][1]), name


@on_every_backend
def test_second_backward_and_second_run_are_identical(routed_modules):
    h0, weight, bias, routes = make_case(2, 63, 16, 3, 33)
    leaves = [v.requires_grad_() for v in (h0, weight, bias, routes.gate)]
    cotangent = torch.randn(2, 63, 33, dtype=torch.float64)
    out = routed_modules(h0, weight, bias, routes)
    kept = out.detach().clone()
    first = torch.autograd.grad(out, leaves, cotangent, retain_graph=True)
    out.detach().zero_()  # the caller may do with the output what it likes: the backward must not read it
    second = torch.autograd.grad(out, leaves, cotangent)
    out = routed_modules(h0, weight, bias, routes)
    assert torch.equal(kept, out)
    third = torch.autograd.grad(out, leaves, cotangent)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@on_every_backend
def test_inputs_stay_as_they_are(routed_modules):
    h0, weight, bias, routes = make_case(2, 63, 5, 2, 16)
    inputs = [h0, weight, bias, *routes]
    before = [v.clone() for v in inputs]
    cotangent = torch.randn(2, 63, 16, dtype=torch.float64)
    kept = cotangent.clone()
    leaves = [v.requires_grad_() for v in (h0, weight, bias, routes.gate)]
    versions = [v._version for v in inputs]
    grads = torch.autograd.grad(routed_modules(h0, weight, bias, routes), leaves, cotangent)
    assert torch.equal(cotangent, kept)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert [v._version for v in inputs] == versions
    storages = {v.untyped_storage().data_ptr() for v in inputs}
    assert not storages & {v.untyped_storage().data_ptr() for v in grads}


@on_every_backend
@pytest.mark.parametrize(
    "needs", [("gate",), ("h0",), ("weight",), ("bias",), ("h0", "gate"), ("weight", "bias")], ids="+".join
)
def test_gradients_of_some_inputs_only(routed_modules, needs):
    case = make_case(2, 30, 5, 2, 16)
    cotangent = torch.randn(2, 30, 16, dtype=torch.float64)
    everything, some = run(routed_modules, case, cotangent), run(routed_modules, case, cotangent, needs=needs)
    assert set(some) == {"out", *needs}
    assert all(torch.equal(value, everything[name]) for name, value in some.items())


@on_every_backend
def test_without_gradients(routed_modules):
    h0, weight, bias, routes = make_case(2, 30, 5, 2, 16)
    plain = routed_modules(h0, weight, bias, routes)
    assert not plain.requires_grad
    weight.requires_grad_()
    with torch.no_grad():
        assert torch.equal(routed_modules(h0, weight, bias, routes), plain)
    assert routed_modules(h0, weight, bias, routes).requires_grad


@on_every_backend
def test_noncontiguous_inputs(routed_modules):
    case = make_case(2, 30, 5, 2, 16)
    h0, weight, bias, routes = case
    strided = (
        h0.transpose(0, 1).contiguous().transpose(0, 1),
        weight.mT.contiguous().mT,
        bias.repeat_interleave(2, -1)[..., ::2],
        Routes(*(v.transpose(0, 1).contiguous().transpose(0, 1) for v in routes)),
    )
    assert not any(v.is_contiguous() for v in (*strided[:3], *strided[3]))
    cotangent = torch.randn(30, 16, 2, dtype=torch.float64).permute(2, 0, 1)
    assert_close_to(run(routed_modules, strided, cotangent), run(autograd_modules, case, cotangent))


ACCURACY_SIZES = pytest.mark.parametrize(
    ("e", "b", "n", "k", "d"),
    [(1, 1, 5, 2, 8), (2, 63, 16, 2, 33), (1, 300, 5, 5, 100), (2, 130, 16, 2, 128), (1, 70, 4, 2, 256)],
    ids=lambda v: str(v),
)


def far_from_every_kink(case):
    """In bf16 one ReLU on the other side would outweigh all rounding."""
    h0, weight, bias, routes = case
    return h0, weight * 0.1, torch.where(bias > 0, 8.0, -8.0).double(), routes


def held_exactly_by(dtype, case):
    """Inputs without a rounding error of their own, so that what is measured is the arithmetic."""
    *tensors, routes = case
    return *(v.to(dtype).double() for v in tensors), routes._replace(gate=routes.gate.to(dtype).double())


@pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
@ACCURACY_SIZES
def test_float32_is_as_accurate_as_autograd(routed_modules, e, b, n, k, d, residual):
    case = held_exactly_by(torch.float32, make_case(e, b, n, k, d))
    assert_as_accurate(routed_modules, autograd_modules, case, torch.float32, residual)


@pytest.mark.parametrize("backend", ["reference"], indirect=True)
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
@ACCURACY_SIZES
def test_bf16_tensors_are_as_accurate_as_autograd(routed_modules, e, b, n, k, d, residual):
    case = held_exactly_by(torch.bfloat16, far_from_every_kink(make_case(e, b, n, k, d)))
    assert_as_accurate(routed_modules, autograd_modules, case, torch.bfloat16, residual)


@pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
@ACCURACY_SIZES
def test_bf16_products_lose_less_than_bf16_tensors(routed_modules, e, b, n, k, d, residual):
    case = held_exactly_by(torch.bfloat16, far_from_every_kink(make_case(e, b, n, k, d)))
    cotangent = torch.randn(e, b, d, dtype=torch.float64)
    truth = run(autograd_modules, case, cotangent, residual)
    theirs = run(autograd_modules, case, cotangent, residual, torch.bfloat16)
    ours = run(partial(routed_modules, precision="bf16"), case, cotangent, residual, torch.float32)
    exact = run(routed_modules, case, cotangent, residual, torch.float32)
    for name, value in truth.items():
        assert ours[name].dtype == torch.float32
        error, allowed = largest(ours[name].double() - value), largest(theirs[name].double() - value)
        assert error <= allowed + 2 * torch.finfo(torch.bfloat16).eps * largest(value), name
    # They really were bf16 products; of one row they may be exact.
    assert b == 1 or not torch.equal(ours["weight"], exact["weight"])


@on_every_instruction_set
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
@ACCURACY_SIZES
def test_bf16_products_are_of_the_operands_that_the_reference_rounds(routed_modules, e, b, n, k, d, residual):
    """The few values that float32 sums move over the edge between two bf16 numbers are off by a part of its error."""
    case = held_exactly_by(torch.float32, make_case(e, b, n, k, d))
    cotangent = torch.randn(e, b, d, dtype=torch.float64)
    ours = run(partial(routed_modules, precision="bf16"), case, cotangent, residual, torch.float32)
    by_reference = partial(d2r_fast.routed_modules, backend="reference", precision="bf16")
    expected = run(by_reference, case, cotangent, residual, torch.float32)
    for name, value in expected.items():
        error = ours[name] - value
        assert error.norm() <= 2e-3 * value.norm(), name
    assert (ours["out"] - expected["out"]).abs().median() <= 1e-6 * expected["out"].abs().median()


E, B, N, K, D = 2, 4, 5, 2, 8


@on_every_backend
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h0": torch.zeros(B, D)}, r"h0: expected \[E,B,D\], got \[4, 8\]"),
        ({"h0": torch.zeros(E, B, D, dtype=torch.int32)}, "h0: expected a float dtype, got torch.int32"),
        (
            {"index": torch.zeros(B, N, K, dtype=torch.int32)},
            r"routes.index: expected \[E=2,B=4,N,K\], got \[4, 5, 2\]",
        ),
        ({"index": torch.zeros(1, B, N, K, dtype=torch.int32)}, r"routes.index: .* got \[1, 4, 5, 2\]"),
        ({"index": torch.zeros(E, B, N, K)}, r"routes.index: expected an integer dtype, got torch.float32"),
        ({"weight": torch.zeros(E, N, D, D)}, r"weight: expected shape \[2, 4, 8, 8\], got \[2, 5, 8, 8\]"),
        ({"weight": torch.zeros(E, N - 1, D, D).double()}, r"weight: expected torch.float32, got torch.float64"),
        ({"weight": torch.zeros(E, N - 1, D, D, device="meta")}, r"weight: expected device cpu like h0, got meta"),
        ({"bias": torch.zeros(E, N - 1, D + 1)}, r"bias: expected shape \[2, 4, 8\], got \[2, 4, 9\]"),
        ({"bias": torch.zeros(E, N - 1, D).half()}, r"bias: expected torch.float32, got torch.float16"),
        ({"gate": torch.zeros(E, B, N, K + 1)}, r"routes.gate: expected shape \[2, 4, 5, 2\], got \[2, 4, 5, 3\]"),
        ({"gate": torch.zeros(E, B, N, K).double()}, r"routes.gate: expected torch.float32, got torch.float64"),
        ({"flow": torch.zeros(E, B, N, dtype=torch.bool)}, r"routes.flow: expected shape \[2, 4, 5, 2\], got"),
        ({"flow": torch.zeros(E, B, N, K, dtype=torch.uint8)}, r"routes.flow: expected torch.bool, got torch.uint8"),
        ({"flow": torch.zeros(E, B, N, K, dtype=torch.bool, device="meta")}, r"routes.flow: .* cpu .* got meta"),
        ({"index": torch.zeros(E, B, N, K, dtype=torch.int32, device="meta")}, r"routes.index: .* cpu .* got meta"),
        (
            {"active": torch.zeros(E, B, 1, dtype=torch.int32)},
            r"routes.active: expected shape \[2, 4\], got \[2, 4, 1\]",
        ),
        ({"active": torch.zeros(E, B, dtype=torch.int64)}, r"routes.active: expected torch.int32, got torch.int64"),
    ],
)
def test_value_errors(routed_modules, changes, message):
    h0, weight, bias, routes = make_case(E, B, N, K, D, dtype=torch.float32)
    inputs = {"h0": h0, "weight": weight, "bias": bias} | routes._asdict() | changes
    routes = Routes(*(inputs[name] for name in Routes._fields))
    with pytest.raises(ValueError, match=message):
        routed_modules(inputs["h0"], inputs["weight"], inputs["bias"], routes)
