"""The routes that an agent's greedy episodes took: which modules ran, what they read and with which weights."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2r_fast.envs import make_envs
from d2r_fast.envs.fidelity_table import EngineChoice
from d2r_fast.envs.metaworld import Goals
from d2r_fast.evaluation.play import play
from d2r_fast.evaluation.policies import GreedyPolicy
from d2r_fast.nets.agent import Actor, Agent
from d2r_fast.nets.d2r import RoutedNetwork
from d2r_fast.ops import Routes, unpack_active


class RouteUse(NamedTuple):
    """Means over the steps of T tasks' episodes, of a network of N modules.

    A route is what a module reads; route i (slot i-1) leads into module i, route N into the head. It runs in a step if
    its module does, and counts nothing in the others.
    """

    module_use: np.ndarray  # [T,N] share of steps in which the module ran
    weight: np.ndarray  # [T,N,N] weight with which a route reads a source; a route's sum is the share of steps it ran
    entropy: np.ndarray  # [T] bits, of the weights of a route that ran in a step
    depth: np.ndarray  # [T] modules on the longest path to the head
    success: np.ndarray  # [T] share of episodes
    episodes: int  # a task


class RecordingPolicy(GreedyPolicy):
    """A greedy policy that keeps count of its routes. ValueError: its network has none."""

    def __init__(self, actor: Actor):
        if not isinstance(actor.net, RoutedNetwork):
            raise ValueError(
                f"expected a network with routes (d2r), got {actor.net.cfg.kind}, which runs all of itself"
            )
        super().__init__(actor)
        n = self._ran.shape[1]
        self._weight = self._ran.new_zeros(len(self._rows), n, n)
        self._entropy, self._depth = self._rows.clone(), self._rows.clone()

    def count(self, task: Tensor, routes: Routes) -> None:
        super().count(task, routes)
        n = self._ran.shape[1]
        index, gate = routes.index[0].long(), routes.gate[0].double()  # [rows,N,K]
        runs = unpack_active(routes.active[0], n).roll(-1, 1)  # [rows,N] route i is bit i, but for the head's, N
        runs[:, -1] = True
        dense = gate.new_zeros(len(task), n, n).scatter_add_(2, index, gate)  # [rows,N,N], unused slots add 0
        self._weight.index_add_(0, task, dense * runs[..., None])
        bits = -torch.special.xlogy(gate, gate).sum(2) / np.log(2)  # [rows,N]
        self._entropy.index_add_(0, task, (bits * runs).sum(1))
        self._depth.index_add_(0, task, longest_path(index).double())

    def weight(self) -> np.ndarray:
        """[T,N,N], as in `RouteUse`."""
        return (self._weight / self._rows[:, None, None]).cpu().numpy()

    def entropy(self) -> np.ndarray:
        """[T], as in `RouteUse`."""
        return (self._entropy / self._weight.sum((1, 2))).cpu().numpy()  # the weights of a route that runs sum to 1

    def depth(self) -> np.ndarray:
        """[T], as in `RouteUse`."""
        return (self._depth / self._rows).cpu().numpy()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a recording policy counts in this process alone")


def longest_path(index: Tensor) -> Tensor:
    """Modules on the longest path to the head: sources [rows,N,K] -> [rows] int64, 1..N.

    The 0 in an unused slot does no harm, for every path begins at module 0.
    """
    rows, n, _ = index.shape
    length = index.new_ones(rows, n + 1)  # up to and with module i; the head counts as module N
    for i in range(1, n + 1):
        length[:, i] = 1 + length.gather(1, index[:, i - 1]).amax(1)
    return length[:, n] - 1


def record_routes(
    agent: Agent,
    tasks: tuple[str, ...],
    episode_length: int,
    episodes: int,
    envs_per_task: int,
    seed: int,
    engine: EngineChoice = "auto",
    goals: Goals = "random",
) -> RouteUse:
    """Play `episodes` greedy episodes of each task, `envs_per_task` at a time. Equal arguments, equal numbers.

    ValueError: the network has no routes, or `episodes` is no multiple of envs_per_task.
    """
    policy = RecordingPolicy(agent.actor)
    if episodes < 1 or envs_per_task < 1 or episodes % envs_per_task:
        raise ValueError(f"episodes: expected a positive multiple of envs_per_task={envs_per_task}, got {episodes}")
    with make_envs(tasks, envs_per_task, episode_length, seed, engine=engine, goals=goals) as envs:
        played = play(policy, envs, episodes // envs_per_task)
    return RouteUse(
        module_use=np.array(policy.module_use()),
        weight=policy.weight(),
        entropy=policy.entropy(),
        depth=policy.depth(),
        success=played.success.mean((0, 2)),
        episodes=episodes,
    )
