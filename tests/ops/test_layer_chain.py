"""Chains of linear layers against one product a layer, in float64."""

from itertools import pairwise

import pytest
import torch
from conftest import cpp_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2r_fast.ops.backends import INTERPRETED
from d2r_fast.ops.layer_chain import layer_chain

pytestmark = pytest.mark.usefixtures("poisoned_memory")
triton = [pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="tests/gpu has the GPU's"))]
on_every_backend = pytest.mark.parametrize("backend", ["reference", *cpp_backends(), *triton], indirect=True)


def case(e, side, b, widths, shared=False):
    """x and parameters as leaves; side: numbers of chains in a network, or none: no axis for them."""
    x = torch.randn(*([] if shared else [e]), b, widths[0], dtype=torch.float64)
    parameters = []
    for n_in, n_out in pairwise(widths):
        parameters.append(torch.randn(e, *side, n_out, n_in, dtype=torch.float64) / n_in**0.5)
        parameters.append(torch.randn(e, *side, n_out, dtype=torch.float64))
    return [v.requires_grad_() for v in (x, *parameters)]


def plain(x, *parameters, relu=False):
    """Chain by chain."""
    e, *side = parameters[0].shape[:-2]
    outs = []
    for net in range(e):
        rows, chains = x if x.dim() == 2 else x[net], []
        for n in range(side[0] if side else 1):
            y = rows
            for i in range(0, len(parameters), 2):
                weight, bias = (p[net][n] if side else p[net] for p in parameters[i : i + 2])
                y = y @ weight.T + bias
                if relu or i < len(parameters) - 2:
                    y = y.clamp(min=0)
            chains.append(y)
        outs.append(torch.stack(chains, 1) if side else chains[0])
    return torch.stack(outs)


def results(op, leaves, dtype=None, needs=None):
    """Output and the gradients of the leaves in `needs`, by default of all."""
    needs = range(len(leaves)) if needs is None else needs
    leaves = [v.detach().to(dtype or v.dtype).requires_grad_(i in needs) for i, v in enumerate(leaves)]
    y = op(*leaves)
    cotangent = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, [leaves[i] for i in needs], cotangent)]


def chain(backend, relu=False, precision="float32"):
    return lambda x, *p: layer_chain(x, p, relu, backend, precision)


def assert_agrees(ours, expected, tolerance=1e-12):
    for a, b in zip(ours, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert (a - b).abs().max() <= tolerance * max(1.0, b.abs().max().item())


@on_every_backend
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize(
    ("e", "side", "b", "widths"),
    [(1, [], 1, (1, 1)), (2, [], 130, (43, 100, 7)), (2, [3], 65, (9, 33, 17, 5)), (1, [1], 70, (4, 130, 130, 1))],
)
def test_it_is_one_product_a_layer(backend, e, side, b, widths, relu, shared):
    leaves = case(e, side, b, widths, shared)
    expected = results(lambda *v: plain(*v, relu=relu), leaves)
    assert_agrees(results(chain(backend, relu), leaves), expected)


@pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend holds no state
@given(
    e=st.integers(1, 3),
    side=st.sampled_from([[], [1], [2], [3]]),
    b=st.integers(0, 80),
    widths=st.lists(st.integers(1, 40), min_size=2, max_size=5),
    relu=st.booleans(),
    shared=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_any_shape(backend, e, side, b, widths, relu, shared, seed):
    torch.manual_seed(seed)
    leaves = case(e, side, b, widths, shared)
    assert_agrees(results(chain(backend, relu), leaves), results(lambda *v: plain(*v, relu=relu), leaves))


@pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)
def test_gradcheck(backend):
    assert torch.autograd.gradcheck(chain(backend), case(2, [2], 3, (4, 3, 2)))


@pytest.mark.parametrize("needs", [(0,), (1, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("side", [[], [2]], ids=["one", "two"])
def test_gradients_of_some_inputs_only(needs, side):
    leaves = case(2, side, 70, (9, 8, 7))
    assert_agrees(results(chain("cpp"), leaves, needs=needs), results(plain, leaves, needs=needs))


@pytest.mark.parametrize("backend", cpp_backends(), indirect=True)
def test_float32_is_as_accurate_as_torch(backend):
    leaves = [v.detach().float().double() for v in case(2, [2], 300, (100, 64, 64))]
    truth, theirs = results(plain, leaves), results(plain, leaves, torch.float32)
    for a, b, exact in zip(results(chain(backend), leaves, torch.float32), theirs, truth, strict=True):
        limit = 2 * (b.double() - exact).abs().max() + 8 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (a.double() - exact).abs().max() <= limit


@pytest.mark.parametrize("backend", cpp_backends(), indirect=True)
def test_bf16_rounds_the_products_operands(backend):
    leaves = case(2, [2], 70, (33, 17, 9))
    ours, exact = (results(chain(backend, precision=p), leaves, torch.float32) for p in ("bf16", "float32"))
    theirs = results(chain("reference", precision="bf16"), leaves, torch.float32)
    assert (ours[0] - exact[0]).abs().max() > 1e-3 * exact[0].abs().max()
    # A number on the edge of two bf16 numbers may go either way, so a few rows differ by one such step.
    assert_agrees(ours, theirs, 1e-2)
    assert (ours[0] - theirs[0]).abs().median() <= 1e-6


def test_columns_of_a_wider_matrix_are_read_in_place():
    leaves = case(2, [], 70, (9, 8, 7), shared=True)
    wide = torch.cat([leaves[0].detach(), torch.full((70, 4), torch.nan, dtype=torch.float64)], 1)
    y = layer_chain(wide[:, :9], leaves[1:], backend="cpp")
    d_weight = torch.autograd.grad(y.sum(), leaves[1])[0]
    again = layer_chain(leaves[0], leaves[1:], backend="cpp")
    assert torch.equal(y, again)
    assert torch.equal(d_weight, torch.autograd.grad(again.sum(), leaves[1])[0])


@on_every_backend
def test_a_nan_stays_in_its_row(backend):
    leaves = [v.detach() for v in case(1, [2], 40, (9, 8, 7))]
    leaves[0][0, 17, 3] = torch.nan
    y = chain(backend)(*leaves)
    assert y[0, 17].isnan().all() and not y[0, :17].isnan().any() and not y[0, 18:].isnan().any()


def test_threads_change_no_output_and_sum_weights_in_a_fixed_order():
    leaves = case(2, [2], 300, (9, 16, 5))

    def run(threads):
        torch.set_num_threads(threads)
        try:
            return results(chain("cpp"), leaves, torch.float32)
        finally:
            torch.set_num_threads(1)

    one, three, again = run(1), run(3), run(3)
    assert all(torch.equal(a, b) for a, b in zip(three, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one[:2], three[:2], strict=True))  # output, d_x
    for a, b in zip(one[2:], three[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_opcheck_and_compile():
    ops = torch.ops.d2r_fast
    for side, shared in (([], False), ([2], True)):
        x, *parameters = case(2, side, 30, (5, 4, 3), shared)
        torch.library.opcheck(ops.layer_chain.default, (x, True, "float32", True, parameters))
        y, kept = (v.detach() for v in ops.layer_chain(x, True, "float32", True, parameters))
        plain_parameters = [p.detach() for p in parameters]
        torch.library.opcheck(
            ops.layer_chain_backward.default,
            (torch.randn_like(y), x.detach(), y, kept, True, "float32", True, plain_parameters,
             [torch.empty_like(p) for p in plain_parameters]),
        )  # fmt: skip
        compiled = torch.compile(layer_chain, fullgraph=True, backend="aot_eager")
        leaves = [x, *parameters]
        ours = results(lambda x, *p, run=compiled: run(x, p, backend="cpp"), leaves)
        assert_agrees(ours, results(chain("cpp"), leaves))


def test_few_rows_take_torchs_product_unless_told():
    x, *parameters = case(1, [], 10, (5, 4))
    assert "Baddbmm" in type(layer_chain(x, parameters).grad_fn).__name__
    assert "Baddbmm" not in type(layer_chain(x, parameters, backend="cpp").grad_fn).__name__


def test_autocast_runs_torchs_products():
    x, *parameters = (v.detach().float() for v in case(1, [2], 300, (9, 8, 7)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer_chain(x.bfloat16(), parameters)
    plain_y = layer_chain(x, parameters)
    assert y.dtype == torch.bfloat16
    assert (y - plain_y).abs().max() <= 0.1 * plain_y.abs().max()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 7, 4)}, ValueError, r"x: expected \[E=2,B,3\] or \[B,3\], got \[2, 7, 4\]"),
        ({"parameters": [torch.zeros(2, 4, 3)]}, ValueError, "parameters: expected weight and bias of every layer"),
        ({"parameters": torch.zeros(2, 4, 3)}, TypeError, "parameters: expected a sequence of tensors, got Tensor"),
        ({"relu": None}, TypeError, "relu: expected True or False, got None"),
        ({"precision": "half"}, ValueError, "precision: expected one of float32, tf32, bf16, got 'half'"),
        ({"backend": "blas"}, ValueError, "backend: expected one of auto, reference, cpp, triton, got 'blas'"),
        (
            {"at": (2, torch.zeros(2, 5, 5))},
            ValueError,
            r"parameters\[2\]: expected shape \[2, 5, 4\], got \[2, 5, 5\]",
        ),
        ({"at": (2, torch.zeros(2, 1, 5, 4))}, ValueError, r"parameters\[2\]: expected shape"),
        ({"at": (3, torch.zeros(2, 4))}, ValueError, r"parameters\[3\]: expected shape \[2, 5\], got \[2, 4\]"),
    ],
)
def test_errors(change, error, message):
    parameters = [torch.zeros(s) for s in ((2, 4, 3), (2, 4), (2, 5, 4), (2, 5))]
    if "at" in change:
        at, value = change.pop("at")
        parameters[at] = value
    with pytest.raises(error, match=message):
        layer_chain(**({"x": torch.zeros(2, 7, 3), "parameters": parameters} | change))
