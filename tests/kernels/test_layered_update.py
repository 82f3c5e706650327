"""An update's gradient, layer by layer, against the equations in float64: on the GPU if there is one, else in Triton's
interpreter. Whole updates in float64: `tests/learning/test_update.py`."""

import copy

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
from d2r_fast import Agent, NetConfig, RouteChoice, SacConfig
from d2r_fast.learning import passes
from d2r_fast.learning.layered import LayeredPass
from d2r_fast.learning.update import Draws, Update
from d2r_fast.ops.replay_rows import ReplayRows

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # NumPy's, of what the interpreter computes
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N_OBS, A, T, N, K = 7, 3, 2, 3, 2
# Of the largest number of a gradient.
ERRORS = {"float32": 1e-4, "tf32": 2e-2, "bf16": 1e-1}


def legal_routes(*shape):
    """Index [...,N,K]: distinct sources of every route, below it."""
    rows = [[sorted(range(i), key=lambda _: torch.rand(()))[:K] + [0] * (K - i) for i in range(1, N + 1)]
            for _ in range(torch.Size(shape).numel())]  # fmt: skip
    return torch.tensor(rows, dtype=torch.int32).view(*shape, N, K)


@pytest.mark.parametrize(("precision", "per_task"), [("float32", 20), ("tf32", 9), ("bf16", 9)])
def test_gradients_of_an_update_layer_by_layer(precision, per_task, monkeypatch):
    # Whatever device they are on; the backend that asks for layers one by one may not be there.
    monkeypatch.setattr(passes, "_runs_layered", lambda net, x: x.dtype == torch.float32)
    n = T * per_task
    cfg = NetConfig(n_modules=N, top_k=K, module_width=17, base_width=33, route_widths=(18,), backend="reference")
    exact = Agent(N_OBS, A, T, cfg, init_alpha=0.3).double()
    ours = copy.deepcopy(exact).float().to(DEVICE)
    for net in (ours.actor.net, ours.critics.net, ours.target_critics.net):
        net.cfg = NetConfig(**{**vars(cfg), "precision": precision})
    rows = ReplayRows(
        x=torch.randn(3, n, N_OBS + A).double(),
        route=legal_routes(1, n),
        reward=torch.randn(n).double(),
        terminal=(torch.rand(n) < 0.3).double(),
    )
    task = torch.arange(T).repeat_interleave(per_task).repeat(2)
    draws = Draws(torch.randn(2 * n, A).double(), RouteChoice.given(legal_routes(2, n)))
    gradients, losses = [], []
    for agent, dtype, device in ((exact, torch.float64, "cpu"), (ours, torch.float32, DEVICE)):
        own = ReplayRows(*(v.to(dtype) if v.is_floating_point() else v for v in rows))
        own = ReplayRows(*(v.clone().to(device) for v in own))
        choice = RouteChoice.given(draws.critic_choice.index.to(device))
        step = Update(agent, SacConfig())
        assert (step._actor._kind_of(own.x[0]) is LayeredPass) == (agent is ours)
        own_draws = Draws(draws.noise.to(dtype).to(device), choice)
        with torch.no_grad():
            losses.append(step._fill_gradient(own, task.to(device), own_draws).cpu().double())
        gradients.append(step.flat.gradient.cpu().double())
    largest = gradients[0].abs().max()
    assert (gradients[0] - gradients[1]).abs().max() < ERRORS[precision] * largest
    torch.testing.assert_close(*losses, rtol=3 * ERRORS[precision], atol=3 * ERRORS[precision])
