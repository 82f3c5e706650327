"""The Triton kernels against the float64 reference: on the GPU if there is one, else in Triton's interpreter.

The interpreter multiplies "tf32" in float32 and runs a program's threads as one, so a missing barrier does not show
in it. `bash tools/gpu.sh` runs the same tests on a device.
"""

from functools import partial

import pytest
import torch
from route_cases import largest, make_case, random_index, random_logits, run

from d2r_fast import Routes, routed_modules, select_routes, unpack_active
from d2r_fast.ops.backends import INTERPRETED
from d2r_fast.ops.gumbel import gumbel

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from d2r_fast.kernels import routed_modules as triton_modules
from d2r_fast.kernels import row_order as triton_order
from d2r_fast.kernels import select_routes as triton_routes
from d2r_fast.kernels import weight_gradient as triton_gradient

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter takes float64, which tells a wrong term from rounding; a device takes float32.
DTYPE, TOLERANCE = (torch.float64, 1e-12) if INTERPRETED else (torch.float32, 1e-5)


def route_index(e, b, n, k, kind):
    """Sources [E,B,N,K]. random; lowest: every route keeps the first modules, so hardly any is active; highest: the
    last ones, so all are; alternating: every other row, so a tile disagrees on every module; single: only row 0."""
    route, slot = torch.arange(1, n + 1)[:, None], torch.arange(k)
    lowest = torch.where(slot < route, slot, 0).expand(e, b, n, k)
    highest = torch.where(slot < route, route - 1 - slot, 0).expand(e, b, n, k)
    row = torch.arange(b)[:, None, None]
    return {
        "random": random_index(e, b, n, k),
        "lowest": lowest,
        "highest": highest,
        "alternating": torch.where(row % 2 == 0, lowest, highest),
        "single": torch.where(row == 0, highest, lowest),
    }[kind]


def make_modules(e, b, n, k, d, kind="random", flow="random"):
    """h0, weight, bias, routes on the device, in values that float32 and bfloat16 hold.

    Far from every kink, for one ReLU on the other side would outweigh all rounding.
    """
    h0, weight, bias, mixed = make_case(e, b, n, k, d, flow)
    index = route_index(e, b, n, k, kind)
    active = select_routes(random_logits(e, b, n), k, "given", index=index).active
    index = torch.where(torch.arange(k) < torch.arange(1, n + 1)[:, None], index, 0).int()
    floats = [v.bfloat16().to(DTYPE).to(DEVICE) for v in (h0, weight * 0.1, torch.where(bias > 0, 8.0, -8.0))]
    gate = mixed.gate.bfloat16().to(DTYPE)
    routes = mixed._replace(index=index, gate=gate, active=active)
    return *floats, type(routes)(*(v.to(DEVICE) for v in routes))


def run_triton(case, cotangent, residual=True, precision="float32", sort_rows=False):
    """Output and gradients by name, as `run` of the reference."""
    h0, weight, bias, routes = case
    order = routes.active.argsort(dim=1, stable=True).int() if sort_rows else None
    mixed, h, opened = triton_modules.forward(h0, weight, bias, routes, residual, precision, True, order)
    grads = triton_modules.backward(cotangent.to(h0.dtype), weight, h, opened, routes, residual, precision, True, order)
    return dict(zip(("out", "h0", "weight", "bias", "gate"), (mixed, *grads), strict=True))


def truth_of(case, cotangent, residual=True):
    h0, weight, bias, routes = case
    exact = (*(v.double() for v in (h0, weight, bias)), routes._replace(gate=routes.gate.double()))
    return run(partial(routed_modules, backend="reference"), exact, cotangent.double(), residual)


def assert_same(ours, expected, names=None):
    for name in names or expected:
        assert torch.equal(ours[name], expected[name]), name


CASES = [
    (1, 1, 1, 1, 16, "random", "all", True),
    (2, 17, 2, 2, 33, "random", "random", True),
    (1, 300, 2, 1, 16, "alternating", "random", False),
    (1, 130, 3, 2, 16, "single", "none", True),
    (3, 16, 5, 1, 64, "random", "random", True),
    (1, 31, 4, 4, 100, "random", "random", True),
    (2, 18, 16, 2, 128, "random", "random", True),
    (1, 20, 16, 2, 20, "alternating", "none", False),
    (1, 16, 16, 3, 16, "highest", "all", True),
    (1, 20, 16, 2, 16, "lowest", "random", True),
    (1, 18, 4, 2, 256, "random", "random", True),
    (1, 9, 32, 2, 16, "random", "random", False),
    (1, 5, 10, 10, 24, "random", "random", True),
]
IDS = [f"E{c[0]}-B{c[1]}-N{c[2]}-K{c[3]}-D{c[4]}-{c[5]}-flow_{c[6]}{'' if c[7] else '-nores'}" for c in CASES]


@pytest.mark.parametrize(("e", "b", "n", "k", "d", "kind", "flow", "residual"), CASES, ids=IDS)
def test_modules_match_the_reference(e, b, n, k, d, kind, flow, residual):
    case = make_modules(e, b, n, k, d, kind, flow)
    cotangent = torch.randn(e, b, d, device=DEVICE, dtype=DTYPE)
    ours, expected = run_triton(case, cotangent, residual), truth_of(case, cotangent, residual)
    for name, value in expected.items():
        assert ours[name].shape == value.shape and ours[name].dtype == DTYPE, name
        assert largest(ours[name] - value) <= TOLERANCE * max(1.0, largest(value)), name
    active = unpack_active(case[3].active, n)  # [E,B,N]
    untouched = ~active.any(1)[:, 1:]
    assert (ours["weight"][untouched] == 0).all() and (ours["bias"][untouched] == 0).all()
    assert (ours["gate"][:, :, :-1][~active[:, :, 1:]] == 0).all()
    used = torch.arange(k, device=DEVICE) < torch.arange(1, n + 1, device=DEVICE)[:, None]
    assert (ours["gate"].masked_select(~used) == 0).all()


@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_modules_are_as_accurate_as_torch_in_that_precision(precision, residual):
    h0, weight, bias, routes = make_modules(2, 40, 6, 2, 100)
    case = (h0.float(), weight.float(), bias.float(), routes._replace(gate=routes.gate.float()))
    cotangent = torch.randn(h0.shape, device=DEVICE).bfloat16().float()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    theirs = run(partial(routed_modules, backend="reference"), case, cotangent, residual, dtype)
    torch.backends.cuda.matmul.allow_tf32 = before
    ours, truth = run_triton(case, cotangent, residual, precision), truth_of(case, cotangent, residual)
    eps = 2.0**-11 if precision == "tf32" and not INTERPRETED else torch.finfo(dtype).eps
    for name, value in truth.items():
        error, allowed = largest(ours[name].double() - value), largest(theirs[name].double() - value)
        print(f"{name}: {error / max(allowed, 1e-300):.2f} of torch's error")
        assert error <= 2 * allowed + 8 * eps * largest(value), name
        assert precision != "bf16" or name == "bias" or error > 0, name  # it did multiply in bfloat16


@pytest.mark.parametrize("sort_rows", [False, True], ids=["as_they_come", "sorted"])
def test_no_row_depends_on_another_nor_on_the_grouping(sort_rows):
    case, other = make_modules(2, 21, 8, 2, 16), make_modules(2, 21, 8, 2, 16)
    cotangent = torch.randn(2, 21, 16, device=DEVICE, dtype=DTYPE)
    before = run_triton(case, cotangent, sort_rows=sort_rows)
    assert_same(run_triton(case, cotangent, sort_rows=sort_rows), before)  # a second run, bit for bit
    if sort_rows:
        assert_same(run_triton(case, cotangent, sort_rows=False), before)

    def with_row(value, new, row=17):
        value = value.clone()
        value[:, row] = new[:, row]
        return value

    routes = type(case[3])(*(with_row(a, b) for a, b in zip(case[3], other[3], strict=True)))
    changed = (with_row(case[0], other[0]), *case[1:3], routes)
    after = run_triton(changed, cotangent, sort_rows=sort_rows)
    rest = torch.arange(21, device=DEVICE) != 17
    for name in ("out", "h0", "gate"):
        assert torch.equal(before[name][:, rest], after[name][:, rest]), name
        assert not torch.equal(before[name][:, 17], after[name][:, 17]), name


def test_more_programs_than_one_axis_of_a_grid_has_room_for(monkeypatch):
    case, cotangent = make_modules(2, 70, 4, 2, 16), torch.randn(2, 70, 16, device=DEVICE, dtype=DTYPE)
    before = run_triton(case, cotangent)
    monkeypatch.setattr(triton_modules, "MOST_PROGRAMS", 2)
    assert triton_modules._grid(70, {"BLOCK_ROWS": 16}, 2) == (2, 2, 3)
    assert_same(run_triton(case, cotangent), before)


def test_weights_that_lie_in_bfloat16_are_those_that_a_product_rounds():
    h0, weight, bias, routes = make_modules(2, 20, 6, 2, 24)
    h0, weight, bias, routes = h0.float(), weight.float(), bias.float(), routes._replace(gate=routes.gate.float())
    place = torch.tensor([[i * weight[0].numel(), i * bias[0].numel(), 0] for i in range(2)], device=DEVICE)
    low, found = weight.bfloat16(), []
    for given in (low.float(), low):
        mixed, h, opened = triton_modules.forward(h0, given, bias, routes, True, "bf16", True, None, place)
        d_h0, d_gate = torch.empty_like(h0), torch.zeros_like(routes.gate)
        triton_modules.backward_at(mixed, given, place, h, opened, routes, True, "bf16", None, d_h0, d_gate, True)
        found.append((mixed, d_h0, d_gate))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_is_not_active_is_not_written():
    h0, weight, bias, routes = make_modules(2, 20, 8, 2, 16)
    _, h, opened = triton_modules.forward(h0, weight, bias, routes, True, "float32", True)
    active = unpack_active(routes.active, 8).transpose(1, 2)  # [E,N,B]
    assert 0 < active.sum() < active.numel()
    assert h[active].isfinite().all() and h[~active].isnan().all()  # fresh memory was NaN
    assert torch.equal(h[:, 0], h0)
    assert opened.dtype == torch.bool and opened.shape == h.shape


@pytest.mark.parametrize("bits", [(1 << 8) - 1, -1], ids=["all", "and_more_than_there_are"])
@pytest.mark.parametrize("residual", [True, False], ids=["res", "nores"])
def test_a_module_that_runs_though_nothing_reads_it(residual, bits):
    *layers, routes = make_modules(2, 20, 8, 2, 16)
    assert (routes.active != (1 << 8) - 1).any()
    cotangent = torch.randn(2, 20, 16, device=DEVICE)
    truth = truth_of((*layers, routes), cotangent, residual)
    ours = run_triton((*layers, routes._replace(active=torch.full_like(routes.active, bits))), cotangent, residual)
    for name, value in ours.items():
        assert largest(value.double() - truth[name]) <= TOLERANCE * largest(truth[name]), name


def test_only_what_is_asked_for():
    h0, weight, bias, routes = make_modules(1, 20, 4, 2, 16)
    mixed, h, opened = triton_modules.forward(h0, weight, bias, routes, True, "float32", True)
    again, *nothing = triton_modules.forward(h0, weight, bias, routes, True, "float32", False)
    assert torch.equal(mixed, again) and [v.numel() for v in nothing] == [0, 0]
    saved = (mixed, weight, h, opened, routes, True, "float32")
    d_h0, _, _, d_gate = triton_modules.backward(*saved)
    only_h0, *nothing, only_gate = triton_modules.backward(*saved, to_weight=False)
    assert torch.equal(d_h0, only_h0) and torch.equal(d_gate, only_gate) and [v.numel() for v in nothing] == [0, 0]


@pytest.mark.parametrize("n", [1, 4])
def test_no_rows(n):
    case = make_modules(2, 0, n, 1, 16)
    ours = run_triton(case, torch.zeros(2, 0, 16, device=DEVICE))
    assert [list(v.shape) for v in ours.values()] == [
        [2, 0, 16],
        [2, 0, 16],
        [2, n - 1, 16, 16],
        [2, n - 1, 16],
        [2, 0, n, 1],
    ]
    assert (ours["weight"] == 0).all() and (ours["bias"] == 0).all()


def test_modules_take_any_strides():
    case = make_modules(2, 20, 4, 2, 16)
    h0, weight, bias, routes = case
    strided = (
        h0.transpose(0, 1).contiguous().transpose(0, 1),
        weight.mT.contiguous().mT,
        bias.repeat_interleave(2, -1)[..., ::2],
        type(routes)(*(v.transpose(0, 1).contiguous().transpose(0, 1) for v in routes)),
    )
    cotangent = torch.randn(20, 16, 2, device=DEVICE, dtype=DTYPE).permute(2, 0, 1)
    assert_same(run_triton(strided, cotangent), run_triton(case, cotangent.contiguous()))


def test_a_diverged_network_shows():
    h0, weight, bias, routes = make_modules(1, 20, 4, 2, 16, "highest")
    bias[0, 1, 3] = torch.nan
    mixed, *_ = triton_modules.forward(h0, weight, bias, routes, True, "float32", False)
    assert mixed.isnan().any(-1).all()


@pytest.mark.parametrize(
    ("dtype", "d", "precision", "message"),
    [
        (torch.float16, 16, "float32", "triton: expected float32 for h0, got torch.float16"),
        (torch.float32, 16, "fp8", "precision: expected one of float32, tf32, bf16, got 'fp8'"),
        (torch.float32, 257, "bf16", r"triton: expected a module width D of 1\.\.256, got 257"),
    ],
)
def test_value_errors(dtype, d, precision, message):
    h0, weight, bias, routes = make_modules(1, 2, 2, 1, d)
    with pytest.raises(ValueError, match=message):
        triton_modules.forward(h0.to(dtype), weight, bias, routes, True, precision, True)


def choose(*args):
    """`Routes` out of what the launcher returns, which begins with what has a gradient."""
    gate, index, flow, active = triton_routes.forward(*args)
    return Routes(index, gate, flow, active)


ROUTE_SHAPES = [(1, 1, 1, 1), (2, 63, 2, 1), (2, 7, 5, 2), (1, 63, 5, 5), (2, 15, 16, 2), (3, 5, 16, 3), (1, 9, 32, 2)]
ROUTE_SHAPES += [(1, 300, 3, 2), (1, 4, 31, 7), (1, 3, 32, 32)]


@pytest.mark.parametrize(
    ("mode", "resrouting"), [("greedy", True), ("greedy", False), ("sampled", True), ("given", True)]
)
@pytest.mark.parametrize(("e", "b", "n", "k"), ROUTE_SHAPES, ids=["E{}-B{}-N{}-K{}".format(*s) for s in ROUTE_SHAPES])
def test_routes_match_the_reference(e, b, n, k, mode, resrouting):
    logits = random_logits(e, b, n).to(DEVICE, DTYPE).requires_grad_()
    extra = {"temperature": None, "noise": None, "index": None}
    if mode == "sampled":
        extra["temperature"] = (torch.rand(b) * 3 + 0.1).to(DEVICE, DTYPE)
        extra["noise"] = gumbel(tuple(logits.shape), logits.detach())
    if mode == "given":  # 99 in unused slots, which nobody may read
        extra["index"] = random_index(e, b, n, k).to(DEVICE, torch.uint8)
    expected = select_routes(logits, k, mode, resrouting=resrouting, **extra)
    ours = choose(logits.detach(), *extra.values(), k, n, resrouting)
    tolerance = 2e-6 if torch.float32 == DTYPE else 1e-14
    for name, a, b in zip(expected._fields, ours, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        assert torch.equal(a, b) if name != "gate" else largest(a - b) <= tolerance, name

    cotangent = torch.randn_like(expected.gate)
    (d_logits,) = torch.autograd.grad((expected.gate * cotangent).sum(), logits)
    poisoned = torch.where(expected.gate != 0, cotangent, torch.nan)  # unused slots may hold anything
    d_ours = triton_routes.backward(poisoned, ours.index, ours.gate)
    assert d_ours.shape == d_logits.shape and d_ours.dtype == d_logits.dtype
    assert largest(d_ours - d_logits) <= 4 * tolerance
    assert ((d_ours != 0) <= (d_logits != 0)).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0])
def test_every_pick_exists_whatever_the_logits_hold(value):
    n, k = 7, 3
    logits = random_logits(1, 30, n).to(DEVICE, DTYPE)
    logits[:, 10:][torch.rand(1, 20, logits.shape[2]) < 0.5] = value
    logits[:, 20:] = value
    index, _, _, active = choose(logits, None, None, None, k, n, True)
    for i in range(1, n + 1):
        picked = index[0, :, i - 1, : min(k, i)]
        assert (picked >= 0).all() and (picked < i).all()
        assert all(len(set(row)) == len(row) for row in picked.tolist())
    again = select_routes(logits.nan_to_num(0, 0, 0), k, "given", index=index)
    assert torch.equal(active, again.active)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, in the interpreter
@pytest.mark.parametrize("resrouting", [True, False])
def test_an_illegal_given_source_shows_and_leads_nowhere(resrouting):
    n, k, route = 5, 3, 4
    logits = random_logits(1, 8, n).to(DEVICE, DTYPE)
    legal = random_index(1, 8, n, k).to(DEVICE)
    legal[0, :, route - 1] = torch.tensor([3, 1, 2], device=DEVICE)
    legal[0, :, n - 1] = torch.tensor([route, 0, 1], device=DEVICE)  # the head's route: route 4 is walked
    index = legal.clone()
    index[0, :6, route - 1, 1] = torch.tensor([-1, route, 2**31 - 1, 2**32, -(2**63), 3], device=DEVICE)
    index[0, 6, 0, 0] = 1  # route 1 has source 0 only
    picked, gate, flow, active = choose(logits, None, None, index, k, n, resrouting)

    illegal = (index != legal).any(-1)  # [1,B,N]
    used = torch.arange(k) < torch.arange(1, n + 1)[:, None]
    assert illegal.sum() == 7 and torch.equal(gate.isnan(), illegal[..., None] & used.to(DEVICE))
    expected = choose(logits, None, None, legal, k, n, resrouting)
    for ours, theirs in zip((picked, gate, flow), expected, strict=False):
        assert torch.equal(ours[~illegal], theirs[~illegal])
    for row in range(8):
        sources = [picked[0, row, i - 1, : min(k, i)].tolist() for i in range(1, n + 1)]
        assert all(0 <= source < i for i, route_sources in enumerate(sources, 1) for source in route_sources)
        reached = set(sources[n - 1])
        for i in range(n - 1, 0, -1):
            reached |= set(sources[i - 1]) if i in reached else set()
        assert active[0, row] == sum(1 << source for source in reached)


def test_routes_at_extreme_temperatures():
    logits, noise = random_logits(2, 40, 5).to(DEVICE, DTYPE), random_logits(2, 40, 5).to(DEVICE, DTYPE)
    temperature = torch.where(torch.arange(40) % 2 == 0, 1e-30, 1e30).to(DEVICE, DTYPE)
    index = choose(logits, temperature, noise, None, 2, 5, True).index
    cold, hot = select_routes(logits, 2).index, select_routes(noise, 2).index
    assert torch.equal(index[:, ::2], cold[:, ::2]) and torch.equal(index[:, 1::2], hot[:, 1::2])


def test_routes_of_no_rows_and_of_strided_logits():
    empty = choose(torch.zeros(2, 0, 15, device=DEVICE), None, None, None, 2, 5, True)
    assert [list(v.shape) for v in empty] == [[2, 0, 5, 2], [2, 0, 5, 2], [2, 0, 5, 2], [2, 0]]
    assert list(triton_routes.backward(empty.gate, empty.index, empty.gate).shape) == [2, 0, 15]
    logits = random_logits(2, 7, 6).to(DEVICE, DTYPE)[:, ::2, :15]
    packed = choose(logits.contiguous(), None, None, None, 2, 5, True)
    for a, b in zip(choose(logits, None, None, None, 2, 5, True), packed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["sampled", "given"])
def test_networks_and_rows_past_those_of_the_choice_are_greedy(mode):
    e, b, n, k, first = 3, 17, 6, 3, 10
    logits = random_logits(e, b, n).to(DEVICE, DTYPE)
    temperature = (torch.rand(first) + 0.1).to(DEVICE, DTYPE) if mode == "sampled" else None
    noise = gumbel((2, first, logits.shape[2]), logits) if mode == "sampled" else None
    given = random_index(2, first, n, k).to(DEVICE, torch.uint8) if mode == "given" else None
    both = choose(logits, temperature, noise, given, k, n, True)
    chosen = choose(logits[:2, :first], temperature, noise, given, k, n, True)
    greedy = choose(logits, None, None, None, k, n, True)
    for a, of_choice, rest in zip(both, chosen, greedy, strict=True):
        assert torch.equal(a[:2, :first], of_choice)
        assert torch.equal(a[:2, first:], rest[:2, first:]) and torch.equal(a[2], rest[2])


@pytest.mark.parametrize("sort_rows", [False, True], ids=["as_they_come", "sorted"])
def test_parameters_that_lie_elsewhere(sort_rows):
    """Five networks, whose parameters lie within one buffer, back to front; back through the first four, of which every
    second gives its weights a gradient."""
    h0, weight, bias, routes = make_modules(5, 33, 6, 2, 20)
    cotangent = torch.randn(4, 33, 20, device=DEVICE, dtype=DTYPE)
    parts = [part for net in (4, 3, 2, 1, 0) for part in (weight[net].reshape(-1), bias[net].reshape(-1))]
    buffer, w, b = torch.cat(parts), weight[0].numel(), bias[0].numel()
    place = torch.tensor([[net * (w + b), net * (w + b) + w, 0] for net in (4, 3, 2, 1, 0)], device=DEVICE)
    order = routes.active.argsort(dim=1, stable=True).int() if sort_rows else None
    mixed, h, opened = triton_modules.forward(h0, buffer, buffer, routes, True, "float32", True, order, place)
    whole = run_triton((h0, weight, bias, routes), torch.zeros_like(h0))
    assert torch.equal(mixed, whole["out"])

    d_h0, d_gate = torch.empty_like(cotangent), routes.gate[:4].clone()
    adjoint = triton_modules.backward_at(
        *(cotangent, buffer, place, h, opened, routes, True, "float32", order, d_h0, d_gate, False)
    )
    in_front = torch.empty_like(d_h0)
    triton_modules.backward_at(
        *(cotangent, buffer, place, h, opened, routes, True, "float32", order, in_front, d_gate.clone(), True)
    )
    assert torch.equal(in_front, torch.where(h0[:4] > 0, d_h0, 0.0))
    d_weight, d_bias = torch.empty_like(weight[:2]), torch.empty_like(bias[:2])
    triton_gradient.weight_gradient(
        *(adjoint, opened, h, routes.index, routes.gate, routes.active, "float32", d_weight, d_bias)
    )
    first = h0[:4], weight[:4], bias[:4], type(routes)(*(v[:4] for v in routes))
    truth = truth_of(first, cotangent)
    ours = {"h0": d_h0, "weight": d_weight, "bias": d_bias}
    for name, value in ours.items():
        expected = truth[name] if name == "h0" else truth[name][::2]
        assert largest(value - expected) <= TOLERANCE * max(1.0, largest(expected)), name

    # Gates of modules that are not active were not written, and count for nothing.
    d_logits = cotangent.new_empty(4, 33, 21)
    triton_routes.backward_at(d_gate, routes.index, routes.gate, routes.active, d_logits)
    expected = triton_routes.backward(truth["gate"].to(DTYPE), routes.index[:4], routes.gate[:4])
    assert largest(d_logits - expected) <= TOLERANCE * max(1.0, largest(expected))


@pytest.mark.parametrize(("e", "b"), [(1, 1), (2, 31), (3, 300), (1, 513)])
@pytest.mark.parametrize("unit", [1, 2**28])  # of many modules that all rows agree on; of the last, which is the sign
def test_the_order_of_rows_is_a_stable_sort(e, b, unit):
    active = torch.randint(-8, 8, (e, b), device=DEVICE).int() * unit
    expected = (active.long() >> 1 & 0x7FFFFFFF).argsort(dim=1, descending=True, stable=True).int()
    assert torch.equal(triton_order.row_order(active), expected)


def test_many_rows_are_sorted_and_few_are_not(monkeypatch):
    monkeypatch.setattr(triton_modules, "SORT_FROM_ROWS", 60)
    active = torch.randint(0, 99, (2, 31), device=DEVICE).int() * 2 + 1
    expected = active.argsort(dim=1, descending=True, stable=True).int()
    assert torch.equal(triton_modules.order_if_many(active), expected)
    assert triton_modules.order_if_many(active[:, :30].contiguous()) is None


def test_routes_refuse_half_precision():
    with pytest.raises(ValueError, match=r"triton: expected float32 for noise, got torch.float16"):
        choose(torch.zeros(1, 2, 1, device=DEVICE), torch.ones(2), torch.zeros(1, 2, 1).half(), None, 1, 1, True)
