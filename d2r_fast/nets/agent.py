"""Actor and critics around any of the networks, and the agent that holds everything an update changes."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from d2r_fast.nets.d2r import GREEDY, RouteChoice, RoutedNetwork
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.nets.settings import NetConfigBase
from d2r_fast.ops import Routes
from d2r_fast.ops.squashed_normal import LOG_STD_RANGE

N_CRITICS = 2  # E of the critic ensemble: SAC's pair


def run(
    net: RoutedNetwork | UnroutedNetwork,
    x: Tensor,
    task: Tensor,
    choice: RouteChoice = GREEDY,
    in_task_order: bool = False,
    parameters: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Routes | None]:
    """Any network on x [B,n_in], task [B]: its output [E,B,n_out], and the routes that it chose if it is one that does.

    choice         how it chooses them; a network without routes has no use for it
    in_task_order  as `UnroutedNetwork.forward`; a routed network has no layer of a task's own
    parameters     by name, in the place of its own
    """
    routed = isinstance(net, RoutedNetwork)
    takes = (x, task, choice if routed else in_task_order)
    result = net(*takes) if parameters is None else functional_call(net, dict(parameters), takes)
    return result if routed else (result, None)


class Sample(NamedTuple):
    """An action drawn from the policy: action [B,A] in (-1,1), its log probability [B], the routes it took (E=1); None:
    its network has none."""

    action: Tensor
    logp: Tensor
    routes: Routes | None


class Actor(nn.Module):
    """A tanh-squashed normal policy for T tasks."""

    def __init__(self, obs_size: int, action_size: int, n_tasks: int, cfg: NetConfigBase):
        super().__init__()
        self.action_size = action_size
        self.net: RoutedNetwork | UnroutedNetwork = cfg.make(obs_size, 2 * action_size, n_tasks, 1, "actor")

    def forward(self, obs: Tensor, task: Tensor, choice: RouteChoice = GREEDY) -> tuple[Tensor, Tensor, Routes | None]:
        """obs [B,O], task [B] integer -> mean [B,A] before the tanh, log std [B,A] within [-20, 2], routes (E=1) if the
        network has any."""
        out, routes = run(self.net, obs, task, choice)
        mean, log_std = out[0].chunk(2, dim=-1)
        return mean, log_std.clamp(*LOG_STD_RANGE), routes

    def sample(self, obs: Tensor, task: Tensor, noise: Tensor, choice: RouteChoice = GREEDY) -> Sample:
        """Draw with standard normal noise [B,A]; differentiable in the parameters (reparametrised)."""
        mean, log_std, routes = self(obs, task, choice)
        action = torch.tanh(mean + log_std.exp() * noise)
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        logp = (log_normal - torch.log(1 - action.square() + 1e-6)).sum(-1)
        return Sample(action, logp, routes)

    def act_greedily(self, obs: Tensor, task: Tensor) -> tuple[Tensor, Routes | None]:
        """The mean action [B,A] along greedy routes, as in evaluation."""
        mean, _, routes = self(obs, task)
        return mean.tanh(), routes


class Critics(nn.Module):
    """The E=2 critics as one ensemble."""

    def __init__(self, obs_size: int, action_size: int, n_tasks: int, cfg: NetConfigBase):
        super().__init__()
        self.net: RoutedNetwork | UnroutedNetwork = cfg.make(obs_size + action_size, 1, n_tasks, N_CRITICS, "critic")

    def forward(self, obs: Tensor, action: Tensor, task: Tensor, choice: RouteChoice = GREEDY) -> Tensor:
        """obs [B,O], action [B,A], task [B] integer -> q [E,B]."""
        out, _ = run(self.net, torch.cat([obs, action], -1), task, choice)
        return out[..., 0]


class Agent(nn.Module):
    """Everything an update changes, but for the optimiser's moments. `state_dict()` is a checkpoint of it.

    log_alpha  [T] parameter  log of each task's entropy coefficient, at most 0
    route_temp [T] buffer     each task's route temperature, T softmax(-log alpha) once an update has been made
    """

    log_alpha: nn.Parameter
    route_temp: Tensor

    def __init__(self, obs_size: int, action_size: int, n_tasks: int, cfg: NetConfigBase, init_alpha: float = 1.0):
        super().__init__()
        self.n_tasks = n_tasks
        self.actor = Actor(obs_size, action_size, n_tasks, cfg)
        self.critics = Critics(obs_size, action_size, n_tasks, cfg)
        self.target_critics = Critics(obs_size, action_size, n_tasks, cfg).requires_grad_(False)
        self.target_critics.load_state_dict(self.critics.state_dict())
        self.log_alpha = nn.Parameter(torch.full((n_tasks,), math.log(init_alpha)))
        self.register_buffer("route_temp", torch.ones(n_tasks))
