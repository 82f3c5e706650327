"""Published sizes on a GPU, where tiles share multiprocessors: races, wide offsets, precisions, launches."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from d2r_fast import Agent, Routes
from d2r_fast.config import RunConfig
from d2r_fast.envs import MultiTaskEnvs
from d2r_fast.learning.learner import Learner
from d2r_fast.learning.replay import Replay, Transitions
from d2r_fast.learning.update import draw
from d2r_fast.ops.select_routes import select_routes
from d2r_fast.presets import PRESETS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch finds none")
PRECISIONS = ("float32", "tf32", "bf16")
RESULTS = Path(__file__).parents[2] / "benches" / "results"
PER_TASK = 500  # rows in the replay


def preset(name: str, precision: str, **changes: object) -> RunConfig:
    cfg = replace(PRESETS[name][1], **changes)
    return replace(cfg, net=replace(cfg.net, precision=precision))


def make_learner(cfg: RunConfig) -> Learner:
    """The same for the same settings."""
    torch.manual_seed(0)
    sizes, n, net = (MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size), cfg.n_tasks, cfg.net
    agent = Agent(*sizes, n, net).cuda()
    replay = Replay(n, n * PER_TASK, *sizes, net.route_shape, torch.device("cuda"))
    obs, next_obs = torch.randn(2, n, PER_TASK, sizes[0])
    index = select_routes(torch.randn(1, n * PER_TASK, net.n_logits), net.top_k).index
    route = index.to(torch.uint8).view(n, PER_TASK, *net.route_shape)
    action, reward = torch.rand(n, PER_TASK, sizes[1]) * 2 - 1, torch.rand(n, PER_TASK)
    replay.add(Transitions(obs, action, reward, torch.zeros(n, PER_TASK, dtype=torch.bool), next_obs, route))
    return Learner(agent, replay, cfg, seed=1)


def assert_same_learners(ours: Learner, theirs: Learner) -> None:
    """Bit for bit: every sum is taken in one order, whatever the device does meanwhile."""
    for name, value in theirs.tensors().items():
        assert torch.equal(ours.tensors()[name], value), name
    ours.require_finite()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_captured_updates_of_mt10_are_the_eager_ones(precision: str) -> None:
    eager, graphed = (make_learner(preset("mt10-rand", precision, cuda_graph=on)) for on in (False, True))
    for learner in (eager, graphed):
        learner.run(40)
    assert graphed._one_update.is_captured and not eager._one_update.is_captured
    assert_same_learners(graphed, eager)


def test_captured_updates_that_sort_their_rows_are_the_eager_ones() -> None:
    """At MT50's 6,400 rows every pass sorts: tiles that agree on what to skip."""
    from d2r_fast.kernels.routed_modules import SORT_FROM_ROWS

    cfg = preset("mt50-rand", "tf32")
    assert 2 * cfg.batch_size > SORT_FROM_ROWS
    eager, graphed = (make_learner(replace(cfg, cuda_graph=on)) for on in (False, True))
    for learner in (eager, graphed):
        learner.run(12)
    assert graphed._one_update.is_captured
    assert_same_learners(graphed, eager)


def make_modules(e: int, b: int, n: int, k: int, d: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Routes]:
    torch.manual_seed(0)
    routes = select_routes(torch.randn(e, b, n * (n + 1) // 2, device="cuda"), k, backend="triton")
    weight = torch.randn(e, n - 1, d, d, device="cuda") * d**-0.5
    return torch.randn(e, b, d, device="cuda"), weight, torch.randn(e, n - 1, d, device="cuda"), routes


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_thousand_runs_of_the_critics_modules_give_the_same_bits(precision: str) -> None:
    """A missing barrier, or two programs that meet, would show here in global memory, which racecheck does not see."""
    from d2r_fast.kernels import routed_modules

    h0, weight, bias, routes = make_modules(2, 1280, 16, 2, 128)
    d_mixed = torch.randn_like(h0)

    def run() -> tuple[torch.Tensor, ...]:
        mixed, h, opened = routed_modules.forward(h0, weight, bias, routes, True, precision, True)
        return mixed, *routed_modules.backward(d_mixed, weight, h, opened, routes, True, precision)

    expected = run()
    differs = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        for ours, first in zip(run(), expected, strict=True):
            differs += (ours != first).sum()
    assert all(value.isfinite().all() for value in expected)
    assert differs.item() == 0


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_thousand_gradients_of_an_update_give_the_same_bits(precision: str) -> None:
    """All that lies between a batch and the flat gradient, at MT10's size."""
    learner = make_learner(preset("mt10-rand", precision))
    rows = learner._replay.sample_rows(learner._cfg.batch_size, learner.generator)
    draws = draw(learner.agent, rows, learner._task, learner.generator, learner._cfg.sac)
    gradient, first = learner.update.flat.gradient, None
    differs = torch.zeros((), dtype=torch.int64, device="cuda")
    with torch.no_grad():
        for _ in range(1000):
            gradient.fill_(torch.nan)
            learner.update._fill_gradient(rows, learner._task, draws)
            first = gradient.clone() if first is None else first
            # Between the parameters nothing is written, and a NaN is no number's equal.
            differs += ((gradient != first) & ~(gradient.isnan() & first.isnan())).sum()
    assert differs.item() == 0
    assert all(g.isfinite().all() for net in (learner.update._actor, learner.update._critics) for g in net.gradients)


def test_modules_reach_past_two_billion_numbers() -> None:
    """h [1,16,B,128] passes 2^31 numbers: the last rows come out as by themselves."""
    from d2r_fast.kernels import routed_modules

    n_rows, n, d, last = 1_114_112, 16, 128, 64
    assert n_rows * n * d > 2**31
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    h0, weight, bias, routes = make_modules(1, n_rows, n, 2, d)
    d_mixed = torch.zeros_like(h0)
    d_mixed[:, -last:] = torch.randn(1, last, d, device="cuda")
    mixed, h, opened = routed_modules.forward(h0, weight, bias, routes, True, "float32", True)
    d_h0, d_weight, d_bias, d_gate = routed_modules.backward(d_mixed, weight, h, opened, routes, True, "float32")
    del h, opened
    few = h0[:, -last:].contiguous(), Routes(*(value[:, -last:].contiguous() for value in routes))
    ours, h, opened = routed_modules.forward(few[0], weight, bias, few[1], True, "float32", True)
    grads = routed_modules.backward(d_mixed[:, -last:].contiguous(), weight, h, opened, few[1], True, "float32")
    assert torch.equal(mixed[:, -last:], ours)
    assert torch.equal(d_h0[:, -last:], grads[0]) and torch.equal(d_gate[:, -last:], grads[3])
    # The same sums in another order: of splits, all but one of which add zeros.
    torch.testing.assert_close((d_weight, d_bias), grads[1:3], rtol=1e-4, atol=1e-4)


def test_linear_layers_reach_past_two_billion_numbers() -> None:
    from d2r_fast.kernels import ensemble_linear

    n_rows, n_in, n_out, last = 5_400_000, 400, 16, 64
    assert n_rows * n_in > 2**31
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free GPU memory")
    x = torch.randn(1, n_rows, n_in, device="cuda")
    weight, bias = torch.randn(1, n_out, n_in, device="cuda") / 20, torch.randn(1, n_out, device="cuda")
    d_y = torch.zeros(1, n_rows, n_out, device="cuda")
    d_y[:, -last:] = torch.randn(1, last, n_out, device="cuda")
    y = ensemble_linear.forward(x, weight, bias, True, "float32")
    d_x, d_weight, d_bias = ensemble_linear.backward(d_y, x, weight, y, True, "float32", True, True)
    few = x[:, -last:].contiguous()
    ours = ensemble_linear.forward(few, weight, bias, True, "float32")
    grads = ensemble_linear.backward(d_y[:, -last:].contiguous(), few, weight, ours, True, "float32", True, True)
    assert torch.equal(y[:, -last:], ours) and torch.equal(d_x[:, -last:], grads[0])
    torch.testing.assert_close((d_weight, d_bias), grads[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("suite", "name"), [("mt10", "mt10-rand"), ("mt50", "mt50-rand"), ("quick", "quick")])
def test_an_update_launches_what_was_counted_without_a_gpu(suite: str, name: str) -> None:
    from torch.profiler import ProfilerActivity, profile

    rows = json.loads((RESULTS / "launches.json").read_text())["rows"]
    (counted,) = (r for r in rows if (r["suite"], r["path"], r["precision"]) == (suite, "gpu", "float32"))
    ours = {name.removesuffix(" (Triton)"): n for name, n in counted["calls"].items() if name.endswith("(Triton)")}
    learner = make_learner(preset(name, "float32", cuda_graph=False))
    learner.run(3)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        learner.run(1)
        torch.cuda.synchronize()
    kernels = {e.key: e.count for e in trace.key_averages() if e.device_type.name == "CUDA"}
    assert {key: n for key, n in kernels.items() if key in ours} == ours
    others = sum(n for key, n in kernels.items() if key not in ours and not key.startswith("Memset"))
    assert others == counted["total"] - sum(ours.values())
