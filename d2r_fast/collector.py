"""Acting and stepping: gathers chunks of transitions of all tasks with the actor as it is."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2r_fast.envs import MultiTaskEnvs
from d2r_fast.network import RouteChoice, gumbel
from d2r_fast.ops import count_active
from d2r_fast.policy import Agent
from d2r_fast.replay import Transitions


class Chunk(NamedTuple):
    """What one call of `Collector.collect` brought."""

    transitions: Transitions
    success: list[list[float]]  # per task: 1 or 0 for every episode that ended
    episode_return: list[list[float]]  # per task: its sum of scaled rewards
    active_modules: Tensor  # [T] mean number of modules the actor ran a row


class Collector:
    """Acts in `envs` with sampled routes and noise drawn from `generator`, which lives on `device`."""

    def __init__(
        self,
        envs: MultiTaskEnvs,
        agent: Agent,
        device: torch.device,
        generator: torch.Generator,
        time_limit_is_terminal: bool,
    ):
        self._envs, self._agent, self._device, self._generator = envs, agent, device, generator
        self._time_limit_is_terminal = time_limit_is_terminal
        self._task = torch.arange(envs.n_tasks, device=device).repeat_interleave(envs.envs_per_task)
        self._begin()

    def _begin(self) -> None:
        self._obs = self._envs.reset()  # [T,n,O]
        shape = self._obs.shape[:2]
        self._succeeded = np.zeros(shape, dtype=bool)
        self._return = np.zeros(shape, dtype=np.float64)

    def replace_envs(self, envs: MultiTaskEnvs) -> None:
        """Close the environments and go on in new ones, with new episodes."""
        self._envs.close()
        self._envs = envs
        self._begin()

    def close(self) -> None:
        self._envs.close()

    @torch.no_grad()
    def _act(self) -> tuple[np.ndarray, Tensor, Tensor]:
        """Action [T,n,A], route index [T,n,N,K] and active modules [T,n] at the present observations."""
        actor, rows = self._agent.actor, len(self._task)
        obs = torch.from_numpy(self._obs.reshape(rows, -1)).to(self._device)
        noise = torch.randn(rows, actor.action_size, generator=self._generator, device=self._device)
        gumbel_noise = gumbel((1, rows, actor.net.cfg.n_logits), obs, self._generator)
        choice = RouteChoice.sampled(self._agent.route_temp[self._task], gumbel_noise)
        sample = actor.sample(obs, self._task, noise, choice)
        shape = self._obs.shape[:2]
        index = sample.routes.index[0].to(torch.uint8)
        return (
            sample.action.cpu().numpy().reshape(*shape, -1),
            index.view(*shape, *index.shape[1:]),
            sample.routes.active[0].view(shape),
        )

    def collect(self, n_steps: int) -> Chunk:
        """Take `n_steps` steps in every environment; episodes go on over chunks."""
        rows: list[tuple] = []
        success: list[list[float]] = [[] for _ in self._envs.tasks]
        returns: list[list[float]] = [[] for _ in self._envs.tasks]
        actives = []
        for _ in range(n_steps):
            action, index, active = self._act()
            self._envs.send(action)
            step = self._envs.recv()
            terminal = step.terminated | step.truncated if self._time_limit_is_terminal else step.terminated
            rows.append((self._obs, action, step.reward, terminal, step.next_obs, index))
            actives.append(active)
            self._succeeded |= step.success
            self._return += step.reward
            for task, env in zip(*np.nonzero(step.terminated | step.truncated), strict=True):
                success[task].append(float(self._succeeded[task, env]))
                returns[task].append(float(self._return[task, env]))
                self._succeeded[task, env], self._return[task, env] = False, 0.0
            self._obs = step.obs
        # [S][T,n,...] -> [T,S*n,...]
        *arrays, routes = zip(*rows, strict=True)
        stacked = [torch.from_numpy(np.stack(a, axis=1)).flatten(1, 2) for a in arrays]
        stacked.append(torch.stack(list(routes), dim=1).flatten(1, 2))
        n_modules = self._agent.actor.net.cfg.n_modules
        mean_active = count_active(torch.stack(actives), n_modules).float().mean(dim=(0, 2))
        return Chunk(Transitions(*stacked), success, returns, mean_active)
