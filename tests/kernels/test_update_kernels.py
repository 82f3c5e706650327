"""The update's Triton kernels against their float64 references: on the GPU if there is one, else in the interpreter.

The interpreter runs a program's threads as one, so a missing barrier does not show in it.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2r_fast.ops import gumbel as gumbel_op
from d2r_fast.ops import optimiser_step as step_op
from d2r_fast.ops import replay_rows as rows_op
from d2r_fast.ops import sac_losses as losses_op
from d2r_fast.ops import squashed_normal as normal_op
from d2r_fast.ops.backends import STATE
from d2r_fast.ops.contract import launcher

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from d2r_fast.kernels import gumbel, optimiser_step, replay_rows, sac_losses, squashed_normal

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy's, of what the interpreter computes
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU; torch finds none")
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def exact(value):
    """As float64, in memory of its own."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(torch.float64, copy=True) if value.is_floating_point() else value.clone()


def assert_close(ours, truth, name=""):
    """Largest error by the largest value; where the truth is not finite, the same."""
    assert list(ours.shape) == list(truth.shape), name
    finite = truth.isfinite()
    torch.testing.assert_close(ours[~finite].double(), truth[~finite].double(), equal_nan=True, msg=name)
    if not finite.any():
        return
    error = (ours.double() - truth.double())[finite].abs().max().item()
    allowed = 1e-10 if ours.dtype == torch.float64 else 1e-5
    assert error <= allowed * max(1.0, truth[finite].abs().max().item()), (name, error)


def assert_matches(launcher, reference, arguments, changed=()):
    """Results and what is changed, against the reference on float64 copies; a second run gives the same bits."""

    def run():
        own = [value.clone() if i in changed else value for i, value in enumerate(arguments)]
        made = launcher(*own)
        made = [] if made is None else [made] if isinstance(made, torch.Tensor) else list(made)
        return made + [own[i] for i in changed]

    theirs = [exact(value) for value in arguments]
    expected = reference(*theirs)
    expected = [] if expected is None else [expected] if isinstance(expected, torch.Tensor) else list(expected)
    expected += [theirs[i] for i in changed]
    ours = run()
    for i, (a, b) in enumerate(zip(ours, expected, strict=True)):
        assert_close(a, b, f"result {i}")
    for a, b in zip(ours, run(), strict=True):
        assert torch.equal(a.nan_to_num(123.0), b.nan_to_num(123.0))
    return ours


@dtypes
@pytest.mark.parametrize("n", [0, 1, 5, 1023, 1025, 5000])
def test_gumbel_noise(dtype, n):
    uniform = torch.rand(n, dtype=dtype)
    edges = torch.tensor([0.0, torch.finfo(dtype).tiny, 1e-30, 0.5, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    uniform[: min(n, 5)] = edges[:n]
    uniform = uniform.clamp(min=torch.finfo(dtype).tiny).to(DEVICE)
    assert_matches(gumbel.gumbel_, gumbel_op.reference, [uniform], changed=[0])
    zeros = torch.zeros(n, dtype=dtype, device=DEVICE)
    gumbel.gumbel_(zeros)
    assert_close(zeros, torch.full_like(zeros, -math.log(-math.log(torch.finfo(dtype).tiny))).double())


def policy_case(b, a, dtype):
    """out, noise, and columns of a wider matrix for the action; log stds that are clamped on both sides and at an edge,
    actions up to the saturated tanh."""
    out, noise = torch.randn(b, 2 * a, dtype=dtype) * 3, torch.randn(b, a, dtype=dtype)
    out[::3, :a] *= 10.0 ** -torch.randint(0, 12, (len(out[::3]), 1))  # small means, whose tanh has as many digits
    noise[::3] = 0
    edges = torch.tensor([-25.0, -20.0, 2.0, 1.9, 3.0], dtype=dtype)
    if a > 0:
        out[b // 2 :, a:] = edges.repeat(a * b)[: (b - b // 2) * a].view(-1, a)
        noise[b // 2 :] *= 0.1
    wide = torch.full((b, a + 3), 7.0, dtype=dtype)
    return out.to(DEVICE), noise.to(DEVICE), wide.to(DEVICE)


@dtypes
@pytest.mark.parametrize("a", [0, 1, 3, 4, 7])
@pytest.mark.parametrize("b", [0, 1, 31, 33, 300])
def test_squashed_normal(dtype, b, a):
    out, noise, wide = policy_case(b, a, dtype)
    for action in (torch.zeros_like(noise), wide[:, 3:]):
        logp = squashed_normal.forward(out, noise, action)
        expected = torch.zeros_like(noise).double()
        assert_close(logp, normal_op.reference(exact(out), exact(noise), expected), "logp")
        assert_close(action, expected, "action")
        digits = ((action.double() - expected) / expected)[::3].abs()
        assert (digits < (1e-6 if dtype == torch.float32 else 1e-14)).all()
    assert (wide[:, :3] == 7).all()
    d_action, d_logp = torch.randn_like(wide), torch.randn_like(logp)
    arguments = [d_action[:, 3:], d_logp, out, noise, wide[:, 3:]]
    assert_matches(squashed_normal.backward, normal_op.reference_backward, arguments)


def test_a_policy_that_is_not_finite_shows_in_its_row_alone():
    out, noise, _ = policy_case(40, 4, torch.float32)
    clean, action = torch.zeros_like(noise), torch.zeros_like(noise)
    before = squashed_normal.forward(out, noise, clean)
    out[5, 1], out[9, 6], out[11, 0] = math.nan, math.nan, math.inf
    logp = squashed_normal.forward(out, noise, action)
    assert logp[[5, 9]].isnan().all() and action[5, 1].isnan() and action[9, 2].isnan() and action[11, 0] == 1
    rest = [i for i in range(40) if i not in (5, 9, 11)]
    assert torch.equal(logp[rest], before[rest]) and torch.equal(action[rest], clean[rest])
    d_out = squashed_normal.backward(torch.ones_like(noise), torch.ones_like(logp), out, noise, action)
    assert d_out[5].isnan().any() and d_out[9].isnan().any() and d_out[rest].isfinite().all()


def losses_case(n_tasks, per_task, e, dtype, limit=3000.0, weighted=True):
    b = n_tasks * per_task
    q, target_q = torch.randn(e, 2 * b, dtype=dtype), torch.randn(e, b, dtype=dtype)
    frozen_q = q[:, b:]
    frozen_q[:, : b // 3] = 0.25  # equal ones share the gradient
    frozen_q[: e // 2 + 1, b // 2 :] = -9.0
    logp, reward = torch.randn(2 * b, dtype=dtype), torch.randn(b, dtype=dtype)
    terminal, log_alpha = (torch.rand(b) < 0.3).to(dtype), -torch.rand(n_tasks, dtype=dtype) * 3
    tensors = (q, target_q, logp, reward, terminal, log_alpha)
    settings = (0.99, -3.0, limit, weighted)
    return [*(v.to(DEVICE) for v in tensors), *settings, torch.empty(n_tasks, dtype=dtype, device=DEVICE)]


LOSS_SIZES = [(1, 1, 1), (1, 7, 2), (3, 0, 2), (10, 128, 2), (50, 3, 3), (4, 33, 2), (7, 65, 5), (2, 2500, 2)]


@dtypes
@pytest.mark.parametrize(("n_tasks", "per_task", "e"), LOSS_SIZES, ids=["T{}-n{}-E{}".format(*s) for s in LOSS_SIZES])
def test_losses(dtype, n_tasks, per_task, e):
    arguments = losses_case(n_tasks, per_task, e, dtype)
    assert_matches(sac_losses.sac_losses, losses_op.reference, arguments, changed=[10])


@dtypes
def test_losses_without_task_weights_and_without_a_limit(dtype):
    arguments = losses_case(10, 33, 2, dtype, limit=math.inf, weighted=False)
    arguments[0][:, 40] = 1e6
    ours = assert_matches(sac_losses.sac_losses, losses_op.reference, arguments, changed=[10])
    assert not ours[0][3].any()


@dtypes
def test_losses_of_tasks_that_are_left_out(dtype):
    arguments = losses_case(10, 33, 2, dtype)
    losses = losses_op.reference(*map(exact, arguments))[0]
    arguments[8] = losses[:3].sum(0).sort().values[4:6].mean().item()
    ours = assert_matches(sac_losses.sac_losses, losses_op.reference, arguments, changed=[10])
    assert ours[0][3].sum() == 5
    for gradient in ours[1:3]:
        shares = gradient.reshape(-1, 10, 33).abs().sum((0, 2))
        assert torch.equal(shares == 0, ours[0][3] == 1)


@pytest.mark.parametrize(
    ("which", "row"), [(0, 40), (0, 4 * 33 + 40), (1, 40), (2, 40), (2, 4 * 33 + 40), (3, 40), (4, 40)]
)
def test_a_task_whose_losses_are_not_finite_is_left_out_and_shows(which, row):
    arguments = losses_case(4, 33, 2, torch.float64)
    clean = sac_losses.sac_losses(*arguments)
    arguments[which] = arguments[which].clone()
    arguments[which][..., row] = math.nan  # a row of task 1
    losses, *gradients = sac_losses.sac_losses(*arguments)
    assert losses[:3, 1].isnan().any() and losses[3].tolist() == [0, 1, 0, 0]
    assert arguments[-1][1] == 0 and arguments[-1].isfinite().all()
    for ours, before in zip(gradients, clean[1:], strict=True):
        ours, before = ours.reshape(-1, 4, 33), before.reshape(-1, 4, 33)
        assert (ours[:, 1] == 0).all() and torch.equal(ours[:, [0, 2, 3]], before[:, [0, 2, 3]])


def step_case(sizes, dtype, n_tasks=4, aligned=True, step=6, max_norm=1.0, max_log_alpha=0.0):
    """Networks of segments of these sizes [[...], ...], then log alpha; followed: all but the first and the last."""
    runs, at, begins = [], 0, []
    for network, own in enumerate([*sizes, [n_tasks]]):
        begins.append(at)
        for size in own:
            runs.append((at, at + size, network))
            at = -(-(at + size) // 16) * 16 if aligned else at + size
    n, n_networks = at + 16, len(sizes) + 1
    owned = torch.zeros(n, dtype=torch.bool)
    for begin, end, _ in runs:
        owned[begin:end] = True

    def buffer(value):
        return torch.where(owned, value, 0).to(DEVICE)

    log_alpha = begins[-1]
    values = torch.randn(n, dtype=dtype)
    values[log_alpha : log_alpha + n_tasks] = -torch.rand(n_tasks, dtype=dtype) * 0.02  # some rise above 0
    values, gradient = buffer(values), torch.randn(n, dtype=dtype) * 1e-3
    gradient[: begins[1]] *= 1000  # one network is clipped, the others are not
    targets_begin = begins[min(1, len(sizes) - 1)]
    targets = values[targets_begin:log_alpha] + 0.1 * owned[targets_begin:log_alpha].to(DEVICE)
    buffers = [values, buffer(gradient), buffer(torch.randn(n, dtype=dtype)), buffer(torch.rand(n, dtype=dtype))]
    own = values[log_alpha : log_alpha + n_tasks]
    counted = torch.tensor(step, device=DEVICE)
    state = [targets, counted, own, torch.ones(n_tasks, dtype=dtype, device=DEVICE), torch.tensor(runs)]
    rates = [3e-4, *[1e-3] * (n_networks - 2), 1e-2]
    return [*buffers, *state, targets_begin, rates, 0.9, 0.999, 1e-8, max_norm, 0.005, max_log_alpha]


CHANGED = {"values": 0, "first": 2, "second": 3, "targets": 4, "step": 5, "log_alpha": 6, "route_temp": 7}


def copied(arguments, dtype=None):
    """Own memory for every tensor, in `dtype`, with log alpha a view of the values again."""
    dtype = dtype or arguments[0].dtype
    own = [v.to(dtype, copy=True) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in arguments]
    begin = arguments[6].storage_offset()
    own[5], own[6] = own[5].clone(), own[0][begin : begin + len(own[6])]
    return own


def assert_steps_match(arguments, steps=3):
    ours, theirs = copied(arguments), copied(arguments, torch.float64)
    again = copied(arguments)
    for i in range(steps):
        norms, expected = optimiser_step.optimiser_step(*ours), step_op.reference(*theirs)
        assert_close(norms, expected, f"norms of step {i}")
        assert torch.equal(norms, optimiser_step.optimiser_step(*again))
        for name, at in CHANGED.items():
            assert_close(ours[at], theirs[at], f"{name} after step {i}")
            assert torch.equal(ours[at], again[at]), name
    assert (ours[6] <= arguments[-1]).all() and ours[5] == arguments[5] + steps


STEP_CASES = {
    "as_flat_parameters": ([[40_001, 37], [9_984, 30, 1], [9_984, 30, 1]], 10, True),
    "not_aligned": ([[5, 3000], [2047, 2, 4097], [1, 1]], 3, False),
    "one_task": ([[1], [1]], 1, True),
    "fifty_tasks": ([[2048], [2048], [2049]], 50, True),
    "an_empty_network": ([[100], [0], [7]], 4, True),
    "many_runs": ([[1] * 70, [5]], 2, True),
}


@dtypes
@pytest.mark.parametrize("case", STEP_CASES)
def test_the_step(dtype, case, monkeypatch):
    if case == "many_runs":  # pieces are summed in several rounds, as those of large networks are
        monkeypatch.setattr(optimiser_step, "ADAM_LAUNCH", optimiser_step.ADAM_LAUNCH | {"BLOCK_PIECES": 32})
    sizes, n_tasks, aligned = STEP_CASES[case]
    assert_steps_match(step_case(sizes, dtype, n_tasks, aligned))


@dtypes
@pytest.mark.parametrize(("max_norm", "max_log_alpha"), [(math.inf, math.inf), (0.5, -0.01)])
def test_the_step_with_other_limits_or_none(dtype, max_norm, max_log_alpha):
    arguments = step_case([[300], [50]], dtype, max_norm=max_norm, max_log_alpha=max_log_alpha)
    assert_steps_match(arguments)


@dtypes
@pytest.mark.parametrize("step", [0, 1, 100_000, 10**9])
def test_adams_corrections_hold_from_the_first_step_to_the_last(dtype, step):
    arguments = step_case([[300], [50]], dtype, step=step)
    arguments[2].zero_()
    arguments[3].zero_()
    assert_steps_match(arguments)


@given(
    st.lists(st.lists(st.integers(0, 5000), min_size=1, max_size=5), min_size=1, max_size=4),
    st.integers(1, 20),
    st.booleans(),
)
def test_the_step_of_any_segments(sizes, n_tasks, aligned):
    assert_steps_match(step_case(sizes, torch.float64, n_tasks, aligned), steps=1)


def test_a_gradient_that_is_not_finite_shows_in_its_network_alone():
    arguments = copied(step_case([[3000], [50]], torch.float32))
    clean = copied(arguments)
    arguments[1][7] = math.nan
    norms, before = optimiser_step.optimiser_step(*arguments), optimiser_step.optimiser_step(*clean)
    assert norms[0].isnan() and torch.equal(norms[1:], before[1:])
    assert arguments[0][:3000].isnan().all() and torch.equal(arguments[0][3008:], clean[0][3008:])
    arguments = copied(clean)
    arguments[6][1] = math.nan  # log alpha
    optimiser_step.optimiser_step(*arguments)
    assert arguments[6].isnan().tolist() == [False, True, False, False] and arguments[7].isnan().all()


def rows_case(n_tasks, stored, per_task, n_obs=7, n_actions=3, n_modules=6, k=2):
    fields = (
        torch.randn(n_tasks, stored, n_obs),
        torch.randn(n_tasks, stored, n_actions),
        torch.randn(n_tasks, stored),
        torch.rand(n_tasks, stored) < 0.5,
        torch.randn(n_tasks, stored, n_obs),
        torch.randint(0, max(1, n_modules), (n_tasks, stored, n_modules, k), dtype=torch.uint8),
    )
    share = torch.rand(n_tasks, per_task, dtype=torch.float64)
    share.view(-1)[:3] = torch.tensor([0.0, 1 - 2**-53, 0.5])[: share.numel()]
    return [v.to(DEVICE) for v in (*fields, share)]


ROW_CASES = [
    {"n_tasks": 1, "stored": 1, "per_task": 1},
    {"n_tasks": 4, "stored": 50, "per_task": 90},
    {"n_tasks": 50, "stored": 9, "per_task": 3, "n_obs": 39, "n_actions": 4, "n_modules": 16},
    {"n_tasks": 3, "stored": 20, "per_task": 0},
    {"n_tasks": 3, "stored": 20, "per_task": 40, "n_modules": 0, "k": 0},
    {"n_tasks": 2, "stored": 20, "per_task": 33, "n_obs": 1, "n_actions": 1, "n_modules": 1, "k": 1},
    {"n_tasks": 2, "stored": 20, "per_task": 7, "n_obs": 700, "n_actions": 30, "n_modules": 10, "k": 10},
]


@pytest.mark.parametrize("case", ROW_CASES, ids=lambda case: f"T{case['n_tasks']}-n{case['per_task']}")
def test_rows_are_those_of_the_reference(case):
    arguments = rows_case(**case)
    for filled in sorted({1, (case["stored"] + 1) // 2, case["stored"]}):
        size = torch.tensor(filled, device=DEVICE)
        ours, theirs = replay_rows.replay_rows(*arguments, size), rows_op.reference(*arguments, size)
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


def test_a_replay_may_hold_more_numbers_than_int32_counts():
    stored, n_modules, k = 2**21 + 3, 32, 32  # 2^31 bytes of routes and more, of which hardly any is touched
    fields = rows_case(1, 1, 4)[:5]
    fields = [v.expand(1, stored, *v.shape[2:]).contiguous() for v in fields]
    if DEVICE == "cpu":
        route = torch.from_numpy(np.zeros((1, stored, n_modules, k), np.uint8))
    else:
        route = torch.zeros(1, stored, n_modules, k, dtype=torch.uint8, device=DEVICE)
    route[0, -1], route[0, -2] = 7, 5
    share = torch.tensor([[1 - 2**-53, 1 - 1.5 / stored]], dtype=torch.float64, device=DEVICE)
    *_, given_routes = replay_rows.replay_rows(*fields, route, share, torch.tensor(stored, device=DEVICE))
    assert (given_routes[0, 0] == 7).all() and (given_routes[0, 1] == 5).all()


@pytest.mark.parametrize("size", [0, -5, 21, 2**40])
def test_rows_lie_within_the_storage_whatever_the_size_says(size):
    arguments = rows_case(2, 20, 33)
    ours = replay_rows.replay_rows(*arguments, torch.tensor(size, device=DEVICE))
    clamped = torch.tensor(min(max(size, 1), 20), device=DEVICE)
    if size <= 0:
        for a, b in zip(ours, rows_op.reference(*arguments, clamped), strict=True):
            assert torch.equal(a, b)
    reward = ours[1].view(2, 33)
    assert all(torch.isin(reward[t], arguments[2][t]).all() for t in range(2))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"uniform: expected torch.float32 or torch.float64, got torch.float16"):
        gumbel.gumbel_(torch.rand(3, device=DEVICE).half())
    with pytest.raises(ValueError, match=r"uniform: expected a contiguous tensor"):
        gumbel.gumbel_(torch.rand(3, 4, device=DEVICE).T)
    out, noise, _ = policy_case(5, 4, torch.float32)
    with pytest.raises(ValueError, match=r"out: expected shape \[5, 8\], got \[5, 7\]"):
        squashed_normal.forward(out[:, 1:], noise, torch.zeros_like(noise))
    with pytest.raises(ValueError, match=r"action: expected rows of adjacent numbers"):
        squashed_normal.forward(out, noise, torch.zeros(4, 5, device=DEVICE).T)
    q, *others = losses_case(4, 8, 2, torch.float32)
    with pytest.raises(ValueError, match=r"target_q: expected \[E,B\] with B a multiple of 4 tasks, got \[2, 31\]"):
        sac_losses.sac_losses(q, others[0][:, 1:], *others[1:])
    with pytest.raises(ValueError, match=r"q: expected a tensor of torch.float32, got torch.float64"):
        sac_losses.sac_losses(q.double(), *others)
    values, gradient, first, *rest = step_case([[3000], [50]], torch.float32)
    with pytest.raises(ValueError, match=r"first: expected shape \[3104\], got \[3\]"):
        optimiser_step.optimiser_step(values, gradient, first[:3], *rest)
    beyond = torch.tensor([[0, 80_000, 0]])
    with pytest.raises(ValueError, match=r"segments\[0\]: expected begin, end within 0\.\.3104 and a network below 3"):
        optimiser_step.optimiser_step(values, gradient, first, *rest[:5], beyond, *rest[6:])
    obs, *fields = rows_case(2, 20, 3)
    with pytest.raises(ValueError, match=r"action: expected shape \[2, 20, 3\], got \[2, 19, 3\]"):
        replay_rows.replay_rows(obs, fields[0][:, 1:], *fields[1:], torch.tensor(20, device=DEVICE))


@pytest.mark.parametrize("installed", [True, False])
def test_without_triton_the_reference_runs(monkeypatch, installed):
    if not installed:
        monkeypatch.setitem(STATE, "triton", "needs the package triton, which is not installed")
    ran = []
    monkeypatch.setattr(gumbel, "gumbel_", lambda uniform: ran.append("triton"))
    launcher("gumbel", "gumbel_", lambda uniform: ran.append("reference"))(torch.rand(3, device=DEVICE))
    assert ran == ["triton" if installed else "reference"]


@on_a_gpu
def test_the_operations_run_these_kernels_and_can_be_captured(monkeypatch):
    """Through the operations' names; the graph is replayed on other numbers, and gives what eager calls give."""
    ran = set()

    def watch(module, name):
        launch = getattr(module, name)

        def seen(*args):
            ran.add((module, name))
            return launch(*args)

        monkeypatch.setattr(module, name, seen)

    for module in (gumbel, squashed_normal, sac_losses, replay_rows, optimiser_step):
        for name in ("gumbel_", "forward", "backward", "sac_losses", "replay_rows", "optimiser_step"):
            if hasattr(module, name):
                watch(module, name)
    n_tasks, per_task = 4, 33
    rows = rows_case(n_tasks, 50, per_task)
    size = torch.tensor(50, device="cuda")
    b = n_tasks * per_task
    out, noise, _ = policy_case(2 * b, 3, torch.float32)  # at obs, then at next_obs
    losses = losses_case(n_tasks, per_task, 2, torch.float32)
    step = step_case([[40_001, 37], [9_984, 30, 1]], torch.float32)
    uniform = torch.rand(10_000, device="cuda")

    def run():
        noised = uniform.clone()
        torch.ops.d2r_fast.gumbel_(noised)
        x, reward, terminal, _ = rows_op.replay_rows(*rows, size)
        action = x[1:].flatten(0, 1)[:, 7:]
        logp = normal_op.squash(out, noise, action)
        made = losses_op.sac_losses(*losses[:2], logp, reward, terminal, *losses[5:])
        d_out = normal_op.squash_backward(action[:b], made[2], out[:b], noise[:b], action[:b])
        norms = step_op.optimiser_step(*step)
        return [noised, x, d_out, *made, norms]

    state = [step[at] for at in CHANGED.values()]
    run()  # compiles the kernels, and takes the table of segments to the GPU
    assert len(ran) == 6
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    inputs = [uniform, rows[6], size, out, noise, *losses[:6], step[1], *state]
    for _ in range(3):
        for value in (uniform, rows[6], out, noise, step[1]):
            value.copy_(torch.rand_like(value))
        size.sub_(7)
        before = [value.clone() for value in inputs]
        graph.replay()
        replayed = [value.clone() for value in (*results, *state)]
        for value, old in zip(inputs, before, strict=True):
            value.copy_(old)
        for ours, eager in zip(replayed, [*run(), *state], strict=True):
            assert torch.equal(ours, eager)
