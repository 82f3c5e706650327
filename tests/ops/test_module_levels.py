"""Levels of modules and their gates, against the equations module by module, in float64."""

from functools import partial

import pytest
import torch
from conftest import cpp_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2r_fast.ops.backends import INTERPRETED
from d2r_fast.ops.cpp.library import instruction_sets, use_instruction_set
from d2r_fast.ops.module_levels import level_gates, module_levels

pytestmark = pytest.mark.usefixtures("poisoned_memory")
triton = [pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="tests/gpu has the GPU's"))]
on_every_backend = pytest.mark.parametrize("backend", ["reference", *cpp_backends(), *triton], indirect=True)
on_every_cpu_backend = pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)
SIZES = [(1, 1, 1, 1, 1, 1), (2, 70, 20, 12, 3, 4), (1, 130, 40, 128, 4, 4), (2, 67, 7, 33, 2, 2), (1, 65, 5, 6, 5, 3)]
"""E, B, H (and C), D, N, L."""
at_every_size = pytest.mark.parametrize(("e", "b", "n_in", "width", "n", "n_levels"), SIZES)


def n_gates(n, n_levels):
    return (n_levels - 1) * n * n + n


def layer(e, n_out, n_in, *count):
    weight = torch.randn(e, *count, n_out, n_in, dtype=torch.float64) / max(n_in, 1) ** 0.5
    return [weight, torch.randn(e, *count, n_out, dtype=torch.float64)]


def levels_case(e, b, n_in, width, n, n_levels):
    """u, gate and parameters as leaves."""
    u, gate = torch.randn(e, b, n_in).double(), torch.randn(e, b, n_gates(n, n_levels)).double()
    parameters = [v for i in range(n_levels) for v in layer(e, width, width if i else n_in, n)]
    return [v.requires_grad_() for v in (u, gate, *parameters)]


def gates_case(e, b, n_in, n, n_levels):
    """c and parameters as leaves."""
    targets = [n * n] * (n_levels - 1) + [n]
    parameters = layer(e, targets[0], n_in)
    for i in range(1, n_levels):
        parameters += layer(e, n_in, i * n * n) + layer(e, targets[i], n_in)
    return [v.requires_grad_() for v in (torch.randn(e, b, n_in).double(), *parameters)]


def plain_levels(u, gate, *parameters):
    """Network by network, module by module."""
    n = parameters[0].shape[1]
    outs = []
    for e in range(len(u)):
        p = list(gate[e].split(n, -1))  # N weights a target, in order
        m = [u[e] @ w.T + b for w, b in zip(parameters[0][e], parameters[1][e], strict=True)]
        for weight, bias in zip(parameters[2::2], parameters[3::2], strict=True):
            targets = [p.pop(0) for _ in range(n)]
            mixed = [sum(q[:, k, None] * m[k] for k in range(n)) for q in targets]
            m = [x.clamp(min=0) @ w.T + b for x, w, b in zip(mixed, weight[e], bias[e], strict=True)]
        outs.append(sum(p[0][:, k, None] * m[k] for k in range(n)).clamp(min=0))
    return torch.stack(outs)


def plain_gates(n, c, *parameters):
    outs = []
    for e in range(len(c)):
        layers = [(w[e], b[e]) for w, b in zip(parameters[::2], parameters[1::2], strict=True)]

        def softmax(logits):
            return torch.cat([part.exp() / part.exp().sum(-1, keepdim=True) for part in logits.split(n, -1)], -1)

        (w, b), *later = layers
        p = [softmax(c[e].clamp(min=0) @ w.T + b)]
        for (s, s_bias), (w, b) in zip(later[::2], later[1::2], strict=True):
            scale = torch.cat(p, -1) @ s.T + s_bias
            p.append(softmax((scale * c[e]).clamp(min=0) @ w.T + b))
        outs.append(torch.cat(p, -1))
    return torch.stack(outs)


def results(op, leaves, dtype=None, needs=None):
    """Output and the gradients of the leaves in `needs`, by default of all."""
    needs = range(len(leaves)) if needs is None else needs
    leaves = [v.detach().to(dtype or v.dtype).requires_grad_(i in needs) for i, v in enumerate(leaves)]
    y = op(*leaves)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaves[i] for i in needs], cotangent)]


def levels(backend, precision="float32"):
    return lambda u, gate, *p: module_levels(u, gate, p, backend, precision)


def gates(n, backend, precision="float32"):
    return lambda c, *p: level_gates(c, n, p, backend, precision)


def assert_agrees(ours, expected, tolerance=1e-12):
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@on_every_backend
@at_every_size
def test_levels_are_their_equations(backend, e, b, n_in, width, n, n_levels):
    leaves = levels_case(e, b, n_in, width, n, n_levels)
    assert_agrees(results(levels(backend), leaves), results(plain_levels, leaves))


@on_every_cpu_backend
@at_every_size
def test_gates_are_their_equations(backend, e, b, n_in, width, n, n_levels):
    leaves = gates_case(e, b, n_in, n, n_levels)
    assert_agrees(results(gates(n, backend), leaves), results(partial(plain_gates, n), leaves))


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend holds no state
@given(
    e=st.integers(1, 3),
    b=st.integers(0, 80),
    n_in=st.integers(1, 40),
    width=st.integers(1, 40),
    n=st.integers(1, 5),
    n_levels=st.integers(1, 4),
    seed=st.integers(0, 2**20),
)
def test_any_shape(backend, e, b, n_in, width, n, n_levels, seed):
    torch.manual_seed(seed)
    leaves = levels_case(e, b, n_in, width, n, n_levels)
    assert_agrees(results(levels(backend), leaves), results(plain_levels, leaves))
    leaves = gates_case(e, b, n_in, n, n_levels)
    assert_agrees(results(gates(n, backend), leaves), results(partial(plain_gates, n), leaves))


@on_every_cpu_backend
def test_gradcheck(backend):
    u, gate, *parameters = levels_case(2, 3, 4, 3, 2, 3)
    # Once differentiable on cpp, and so are the numbers of gradcheck.
    assert torch.autograd.gradcheck(levels(backend), (u, gate, *parameters))
    assert torch.autograd.gradcheck(gates(2, backend), gates_case(2, 3, 4, 2, 3))


@pytest.mark.parametrize("backend", cpp_backends(), indirect=True)
def test_float32_is_as_accurate_as_the_equations(backend):
    for ours, theirs, leaves in (
        (levels(backend), plain_levels, levels_case(2, 300, 100, 64, 4, 3)),
        (gates(4, backend), partial(plain_gates, 4), gates_case(2, 300, 100, 4, 3)),
    ):
        leaves = [v.detach().float().double() for v in leaves]
        truth = results(theirs, leaves)
        for a, b, exact in zip(
            results(ours, leaves, torch.float32), results(theirs, leaves, torch.float32), truth, strict=True
        ):
            limit = 2 * (b.double() - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
            assert (a.double() - exact).abs().max() <= limit


@pytest.mark.parametrize("backend", [*cpp_backends(), *triton], indirect=True)
def test_bf16_rounds_the_products_operands(backend):
    leaves = levels_case(2, 70, 33, 17, 3, 3)
    ours, exact = (results(levels(backend, p), leaves, torch.float32) for p in ("bf16", "float32"))
    theirs = results(levels("reference", "bf16"), leaves, torch.float32)
    assert (ours[0] - exact[0]).abs().max() > 1e-3 * exact[0].abs().max()
    # A number on the edge of two bf16 numbers may go either way, so a few rows differ by one such step.
    assert_agrees(ours, theirs, 1e-2)
    assert (ours[0] - theirs[0]).abs().median() <= 1e-6


def test_bf16_is_the_same_on_every_instruction_set_but_for_sums():
    u, gate, *parameters = (v.detach().float() for v in levels_case(2, 70, 33, 17, 1, 1))
    outs = []
    for name in instruction_sets():
        use_instruction_set(name)
        outs.append(module_levels(u, torch.ones_like(gate), parameters, "cpp", "bf16"))
    use_instruction_set(instruction_sets()[0])
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.parametrize("needs", [(0,), (1,), (2, 5), (0, 3)], ids=str)
def test_gradients_of_some_inputs_only(needs):
    leaves = levels_case(2, 70, 9, 8, 2, 2)
    assert_agrees(results(levels("cpp"), leaves, needs=needs), results(plain_levels, leaves, needs=needs))
    leaves = gates_case(2, 70, 9, 2, 2)
    assert_agrees(results(gates(2, "cpp"), leaves, needs=needs), results(partial(plain_gates, 2), leaves, needs=needs))


def test_no_graph_gives_the_same():
    for op, leaves in ((levels("cpp"), levels_case(2, 70, 9, 8, 2, 3)), (gates(2, "cpp"), gates_case(2, 70, 9, 2, 3))):
        with torch.no_grad():
            y = op(*leaves)
        assert torch.equal(y, results(op, leaves)[0])


@on_every_backend
def test_a_nan_stays_in_its_row(backend):
    leaves = [v.detach() for v in levels_case(1, 40, 9, 8, 2, 3)]
    leaves[0][0, 17, 3] = torch.nan
    y = levels(backend)(*leaves)
    assert y[0, 17].isnan().all() and not y[0, :17].isnan().any() and not y[0, 18:].isnan().any()
    leaves = [v.detach() for v in gates_case(1, 40, 9, 2, 3)]
    leaves[0][0, 17, 3] = torch.nan
    p = gates(2, backend if backend != "triton" else "reference")(*leaves)
    assert p[0, 17].isnan().all() and not p[0, :17].isnan().any()


def test_threads_change_no_output_and_sum_weights_in_a_fixed_order():
    leaves = levels_case(2, 400, 9, 16, 2, 3)

    def run(threads):
        torch.set_num_threads(threads)
        try:
            return results(levels("cpp"), leaves, torch.float32)
        finally:
            torch.set_num_threads(1)

    one, three, again = run(1), run(3), run(3)
    assert all(torch.equal(a, b) for a, b in zip(three, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one[:3], three[:3], strict=True))  # output, d_u, d_gate
    for a, b in zip(one[3:], three[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_opcheck_and_compile():
    ops = torch.ops.d2r_fast
    u, gate, *parameters = levels_case(2, 30, 5, 4, 2, 3)
    torch.library.opcheck(ops.module_levels.default, (u, gate, "float32", True, parameters))
    y, m = (v.detach() for v in ops.module_levels(u, gate, "float32", True, parameters))
    plain = [v.detach() for v in (u, gate, y, m)]
    d_parameters = [torch.empty_like(p) for p in parameters]
    torch.library.opcheck(
        ops.module_levels_backward.default,
        (torch.randn_like(y), *plain, "float32", [p.detach() for p in parameters], d_parameters),
    )
    c, *layers = gates_case(2, 30, 5, 2, 3)
    torch.library.opcheck(ops.level_gates.default, (c, 2, "float32", True, layers))
    p, scale = (v.detach() for v in ops.level_gates(c, 2, "float32", True, layers))
    torch.library.opcheck(
        ops.level_gates_backward.default,
        (torch.randn_like(p), c.detach(), p, scale, 2, "float32", [v.detach() for v in layers],
         [torch.empty_like(v) for v in layers]),
    )  # fmt: skip

    def both(c, u, layers, parameters):
        return module_levels(u, level_gates(c, 2, layers, "cpp"), parameters, "cpp")

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    leaves = [c, u, *layers, *parameters]
    n = 2 + len(layers)
    expected, ours = (results(lambda *v, op=op: op(v[0], v[1], v[2:n], v[n:]), leaves) for op in (both, compiled))
    assert_agrees(ours, expected)


def test_autocast_runs_torchs_products():
    u, gate, *parameters = (v.detach().float() for v in levels_case(2, 300, 9, 8, 2, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module_levels(u.bfloat16(), gate, parameters)
    plain = module_levels(u, gate, parameters)
    assert (y - plain).abs().max() <= 0.1 * plain.abs().max()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(3, 4)}, r"u: expected \[E,B,H\], got \[3, 4\]"),
        ({"gate": torch.zeros(2, 3, 5)}, r"gate: expected shape \[2, 3, 6\], got \[2, 3, 5\]"),
        ({"gate": torch.zeros(2, 3, 6).double()}, "gate: expected torch.float32, got torch.float64"),
        ({"parameters": [torch.zeros(2, 2, 5, 4)]}, "parameters: expected weight and bias of every layer"),
        ({"precision": "half"}, "precision: expected one of float32, tf32, bf16, got 'half'"),
        ({"backend": "blas"}, "backend: expected one of auto, reference, cpp, triton, got 'blas'"),
        ({"at": (2, torch.zeros(2, 2, 5, 6))}, r"parameters\[2\]: expected shape \[2, 2, 5, 5\], got \[2, 2, 5, 6\]"),
        ({"at": (1, torch.zeros(2, 2, 4))}, r"parameters\[1\]: expected shape \[2, 2, 5\], got \[2, 2, 4\]"),
    ],
)
def test_value_errors_of_levels(change, message):
    parameters = [torch.zeros(s) for s in ((2, 2, 5, 4), (2, 2, 5), (2, 2, 5, 5), (2, 2, 5))]
    if "at" in change:
        at, value = change.pop("at")
        parameters[at] = value
    arguments = {"u": torch.zeros(2, 3, 4), "gate": torch.zeros(2, 3, 6), "parameters": parameters} | change
    with pytest.raises(ValueError, match=message):
        module_levels(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"c": torch.zeros(3, 4)}, ValueError, r"c: expected \[E,B,C\], got \[3, 4\]"),
        ({"n_modules": 0}, ValueError, r"n_modules: expected 1\.\.32, got 0"),
        ({"n_modules": 2.0}, TypeError, "n_modules: expected an int, got float"),
        ({"n_modules": 3}, ValueError, r"parameters\[0\]: expected shape \[2, 9, 4\], got \[2, 4, 4\]"),
        ({"parameters": torch.zeros(2, 4, 4)}, TypeError, "parameters: expected a sequence of tensors, got Tensor"),
        ({"parameters": [torch.zeros(2, 4, 4), torch.zeros(2, 4)] * 2}, ValueError, "expected an odd number of layers"),
    ],
)
def test_errors_of_gates(change, error, message):
    shapes = (2, 4, 4), (2, 4), (2, 4, 4), (2, 4), (2, 2, 4), (2, 2)
    arguments = {"c": torch.zeros(2, 3, 4), "n_modules": 2, "parameters": [torch.zeros(s) for s in shapes]} | change
    with pytest.raises(error, match=message):
        level_gates(**arguments)


def test_few_rows_take_the_reference_unless_told():
    u, gate, *parameters = levels_case(1, 10, 5, 4, 2, 2)
    assert "Eager" not in type(module_levels(u, gate, parameters).grad_fn).__name__
    assert "Eager" in type(module_levels(u, gate, parameters, "cpp").grad_fn).__name__


@pytest.mark.parametrize("backend", ["reference", *cpp_backends(), *triton], indirect=True)
@pytest.mark.parametrize(("n_nets", "rows"), [(0, 3), (2, 0)], ids=["no_networks", "no_rows"])
def test_nothing_to_do_is_done(backend, n_nets, rows):
    leaves = levels_case(n_nets, rows, 4, 3, 2, 3)
    y, *gradients = results(levels(backend), leaves)
    assert y.shape == (n_nets, rows, 3) and [g.shape for g in gradients] == [v.shape for v in leaves]
    assert all(not g.any() for g in gradients)
