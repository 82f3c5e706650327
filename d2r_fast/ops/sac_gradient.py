"""Passes, actions and losses of one update as one call, for networks that run as one each."""

from typing import Any

from torch import Tensor

from d2r_fast.ops.contract import define, without_autograd


def _shapes(x: Tensor, *rest: Any) -> Tensor:
    log_alpha: Tensor = rest[8]
    return x.new_empty(6, len(log_alpha))


# x, reward, terminal and route as in `ReplayRows`; the actor's actions are written to x. task [2B]: of the rows, twice
# over. noise [2B,A] as in `Draws`; temperature [B], route_noise [E,B,R] and critic_route [E,B,N,K] as in `RouteChoice`:
# how the critics choose in their loss. k to precision: of every network, as `routed_network` takes them; gamma to
# d_log_alpha, and what is returned: as in `sac_losses`. Then each network's parameters in the order of
# `routed_network`, and where their gradients are written. The equations, and the single calls that this is made of, are
# those of `d2r_fast.learning.update`.
_sac_gradient = define(
    "sac_gradient(Tensor(a!) x, Tensor reward, Tensor terminal, Tensor route, Tensor task, Tensor noise, "
    "Tensor? temperature, Tensor? route_noise, Tensor? critic_route, Tensor log_alpha, int k, bool residual, "
    "bool resrouting, str precision, float gamma, float target_entropy, float max_task_loss, bool weighted, "
    "Tensor(b!) d_log_alpha, Tensor[] actor, Tensor[] critics, Tensor[] targets, Tensor(c!)[] d_actor, "
    "Tensor(d!)[] d_critics) -> Tensor",
    None,
    _shapes,
)
sac_gradient = without_autograd(_sac_gradient)
