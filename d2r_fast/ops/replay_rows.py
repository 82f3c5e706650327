"""The rows of a batch out of the replay's storage, laid out as the networks read them, in one call."""

from typing import NamedTuple

import torch
from torch import Tensor

from d2r_fast.ops.contract import define, launcher


class ReplayRows(NamedTuple):
    """B rows, B/T of every task, tasks in order.

    x         [3,B,O+A] float32: observation and action as stored; the observation, and the next one, each with room for
              the action that the actor will choose there
    reward    [B] float32
    terminal  [B] float32, 1 where no value follows
    route     [1,B,N,K] uint8
    """

    x: Tensor
    reward: Tensor
    terminal: Tensor
    route: Tensor


def reference(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminal: Tensor,
    next_obs: Tensor,
    route: Tensor,
    share: Tensor,
    size: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stored fields [T,S,...], and for each row how far into its task's stored rows it lies.

    share  [T,B/T] float64 in [0, 1)
    size   []      int64, the rows of each task that are filled
    """
    n_tasks, stored = reward.shape
    row = (share * size).long().minimum(size - 1)  # a product may round up to the size
    flat = (row + torch.arange(n_tasks, device=row.device)[:, None] * stored).flatten()  # [B]
    own, acted, rewards, ended, after, routes = (
        field.flatten(0, 1).index_select(0, flat) for field in (obs, action, reward, terminal, next_obs, route)
    )
    room = torch.zeros_like(acted)
    x = torch.stack([torch.cat([own, acted], 1), torch.cat([own, room], 1), torch.cat([after, room], 1)])
    return x, rewards, ended.to(rewards.dtype), routes[None]


def _shapes(obs: Tensor, action: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    route, share = rest[3], rest[4]
    n_rows = share.numel()
    x = obs.new_empty(3, n_rows, obs.shape[2] + action.shape[2])
    return x, obs.new_empty(n_rows), obs.new_empty(n_rows), route.new_empty(1, n_rows, *route.shape[2:])


replay_rows = define(
    "replay_rows(Tensor obs, Tensor action, Tensor reward, Tensor terminal, Tensor next_obs, Tensor route, "
    "Tensor share, Tensor size) -> (Tensor, Tensor, Tensor, Tensor)",
    reference,
    _shapes,
    launcher("replay_rows", "replay_rows", reference),
)
