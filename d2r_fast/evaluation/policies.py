"""What is evaluated: a trained actor, or the official package's scripted experts, by one interface."""

import copy
import warnings
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from d2r_fast.envs.metaworld import ACTION_SIZE, OBS_SIZE
from d2r_fast.nets.agent import Actor
from d2r_fast.ops import Routes, unpack_active


class EvalPolicy(Protocol):
    """What every protocol evaluates: Meta-World's own `Agent`. It must pickle, for the official protocol's workers."""

    def eval_action(self, observations: np.ndarray) -> np.ndarray:
        """observations [rows,39+T], the task's one-hot id behind the 39 numbers -> actions [rows,4] float32."""

    def reset(self, env_mask: np.ndarray) -> None:
        """A new episode begins in the rows where env_mask [rows] is True."""


class GreedyPolicy:
    """A copy of a trained actor, acting by its mean along greedy routes. Pickles onto the CPU."""

    def __init__(self, actor: Actor):
        self._actor = copy.deepcopy(actor).eval()
        device, n_tasks = next(actor.parameters()).device, actor.net.n_tasks
        self._rows = torch.zeros(n_tasks, device=device, dtype=torch.float64)  # [T] rows acted for
        n_modules = actor.net.cfg.route_shape[0]
        self._ran = torch.zeros(n_tasks, n_modules, device=device, dtype=torch.float64)  # [T,N]

    @torch.no_grad()
    def eval_action(self, observations: np.ndarray) -> np.ndarray:
        device = self._rows.device
        obs = torch.from_numpy(observations[:, :OBS_SIZE].astype(np.float32)).to(device)
        task = torch.from_numpy(observations[:, OBS_SIZE:].argmax(1)).to(device)
        action, routes = self._actor.act_greedily(obs, task)
        if routes is not None:
            self.count(task, routes)
        return action.cpu().numpy()

    def count(self, task: Tensor, routes: Routes) -> None:
        """Add the routes (E=1) of rows that are of `task` [rows]."""
        ran = unpack_active(routes.active[0], self._ran.shape[1]).double()  # [rows,N]
        self._ran.index_add_(0, task, ran)
        self._rows.index_add_(0, task, torch.ones_like(ran[:, 0]))

    def reset(self, env_mask: np.ndarray) -> None:
        """Nothing is carried from step to step."""

    def module_use(self) -> list[list[float]]:
        """[T][N] share of the rows acted for so far in which the module ran; NaN for a task without any. N is 0 for a
        network that runs all of itself for every row.

        Copies that act in other processes count for themselves.
        """
        return (self._ran / self._rows[:, None]).tolist()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "_actor": copy.deepcopy(self._actor).cpu(),
            "_rows": torch.zeros_like(self._rows, device="cpu"),
            "_ran": torch.zeros_like(self._ran, device="cpu"),
        }


class ExpertPolicy:
    """The package's scripted expert of each task."""

    def __init__(self, tasks: tuple[str, ...]):
        from metaworld.policies import ENV_POLICY_MAP

        experts: dict[str, Any] = ENV_POLICY_MAP
        self._experts = [experts[f"{task}-v3"]() for task in tasks]

    def eval_action(self, observations: np.ndarray) -> np.ndarray:
        action = np.empty((len(observations), ACTION_SIZE), np.float32)
        with warnings.catch_warnings():
            # The experts aim past the bounds on purpose and warn of it.
            warnings.filterwarnings("ignore", message="Constant.* may be too high")
            for i, (obs, k) in enumerate(
                zip(observations[:, :OBS_SIZE], observations[:, OBS_SIZE:].argmax(1), strict=True)
            ):
                # A copy: some experts write into what they are shown.
                action[i] = self._experts[k].get_action(obs.astype(np.float64))
        return action.clip(-1, 1)

    def reset(self, env_mask: np.ndarray) -> None:
        """The experts look at nothing but the observation."""


def expert_agent(tasks: tuple[str, ...]) -> ExpertPolicy:
    """The scripted experts of `tasks` as a policy, in that order. Needs metaworld."""
    return ExpertPolicy(tasks)
