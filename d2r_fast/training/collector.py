"""Acting and stepping: gathers chunks of transitions of all tasks with a copy of the actor."""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from d2r_fast.envs import MultiTaskEnvs
from d2r_fast.learning.captured import Captured
from d2r_fast.learning.replay import Staging, Transitions
from d2r_fast.nets.agent import Agent, Sample
from d2r_fast.nets.d2r import RouteChoice
from d2r_fast.ops import Routes, count_active
from d2r_fast.ops.gumbel import gumbel


class Chunk(NamedTuple):
    """What one call of `Collector.collect` brought."""

    staging: Staging
    success: list[list[float]]  # per task: 1 or 0 for every episode that ended
    episode_return: list[list[float]]  # per task: its sum of scaled rewards
    active_modules: Tensor | None  # [T] mean number of modules the actor ran a row; None: it does not choose
    seconds: float  # that collecting took

    @property
    def transitions(self) -> Transitions:
        """[T,S*n,...] in host memory: the rows of a step stand together, steps in order."""
        return self.staging.rows


class Collector:
    """Acts in `envs` with sampled routes and noise drawn from `generator`, which lives on `device`.

    It acts with its own copy of the agent's actor and route temperatures, so that `collect` may run in another thread
    while updates change the agent: an actor between two of an optimiser's writes is never acted with. On a GPU acting
    for all environments is one graph on a stream of its own, captured unless `cuda_graph` is False.
    """

    def __init__(
        self,
        envs: MultiTaskEnvs,
        agent: Agent,
        device: torch.device,
        generator: torch.Generator,
        time_limit_is_terminal: bool,
        cuda_graph: bool = True,
    ):
        self._envs, self._agent, self._device, self._generator = envs, agent, device, generator
        self._time_limit_is_terminal = time_limit_is_terminal
        self._task = torch.arange(envs.n_tasks, device=device).repeat_interleave(envs.envs_per_task)
        self._actor = copy.deepcopy(agent.actor).requires_grad_(False).eval()
        self._route_temp = agent.route_temp.clone()
        # Acting must not queue behind the updates that the learner has launched.
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None
        # Present observations, here and where the captured policy reads them; on the CPU they are the same.
        self._obs_here = torch.empty(len(self._task), envs.obs_size, pin_memory=device.type == "cuda")
        self._obs_there = self._obs_here.to(device)
        self._policy = Captured(self._sample, generator, "acting", cuda_graph)
        self.take_parameters()
        self._begin()

    def _begin(self) -> None:
        self._obs = self._envs.reset()  # [T,n,O]
        shape = self._obs.shape[:2]
        self._succeeded = np.zeros(shape, dtype=bool)
        self._return = np.zeros(shape, dtype=np.float64)

    @torch.no_grad()
    def take_parameters(self) -> None:
        """From now on act with the agent as it is. For the thread that updates the agent, while no `collect` runs."""
        learned = self._agent.actor.state_dict()
        for name, mine in self._actor.state_dict().items():
            mine.copy_(learned[name])
        self._route_temp.copy_(self._agent.route_temp)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def generator_state(self) -> Tensor:
        """Where the stream of noise is. Not while `collect` runs."""
        return self._generator.get_state()

    def replace_envs(self, envs: MultiTaskEnvs) -> None:
        """Close the environments and go on in new ones, with new episodes."""
        self._envs.close()
        self._envs = envs
        self._begin()

    def close(self) -> None:
        self._envs.close()

    def _sample(self) -> Sample:
        """Actions at `_obs_there`."""
        obs, actor = self._obs_there, self._actor
        noise = torch.randn(len(obs), actor.action_size, generator=self._generator, device=self._device)
        gumbel_noise = gumbel((1, len(obs), actor.net.cfg.n_logits), obs, self._generator)
        choice = RouteChoice.sampled(self._route_temp[self._task], gumbel_noise)
        return actor.sample(obs, self._task, noise, choice)

    def _act(self) -> tuple[np.ndarray, Routes | None]:
        """Action [T,n,A] at the present observations, and the routes taken, rows T n; they stay what they are until the
        next call."""
        shape = self._obs.shape[:2]
        self._obs_here.numpy()[:] = self._obs.reshape(self._obs_here.shape)
        self._obs_there.copy_(self._obs_here, non_blocking=True)  # done before the actions are here
        sample = self._policy()
        return sample.action.cpu().numpy().reshape(*shape, -1), sample.routes

    def _require_finite(self, action: np.ndarray) -> None:
        if not np.isfinite(action).all():
            k, i, _ = np.argwhere(~np.isfinite(action))[0]
            raise FloatingPointError(
                f"task {self._envs.tasks[k]}, environment {i}: the policy gave the action {action[k, i]}; training has "
                "diverged (a lower learning rate or reward scale may help)"
            )

    def collect(self, n_steps: int, stopped: Callable[[], bool] = lambda: False) -> Chunk | None:
        """Take `n_steps` steps in every environment; episodes go on over chunks.

        stopped: asked before every step; once it says True, the rest is left out and None returned.
        FloatingPointError: a simulation, or the policy, gave a number that is not finite; the message has the task.
        """
        on_stream = nullcontext() if self._stream is None else torch.cuda.stream(self._stream)
        with torch.no_grad(), on_stream:
            return self._collect(n_steps, stopped)

    def _collect(self, n_steps: int, stopped: Callable[[], bool]) -> Chunk | None:
        begin = time.perf_counter()
        envs, net = self._envs, self._actor.net.cfg
        T, n = envs.n_tasks, envs.envs_per_task
        staging = Staging(
            T,
            n_steps * n,
            envs.obs_size,
            envs.action_size,
            net.route_shape,
            pinned=self._device.type == "cuda",
        )
        by_step = Transitions(*(rows.unflatten(1, (n_steps, n)) for rows in staging.rows))  # [T,S,n,...]
        into = [field.numpy() for field in by_step[:-1]]
        # Routes are made on the device and come over once a chunk.
        route = torch.empty(n_steps, T, n, *net.route_shape, dtype=torch.uint8, device=self._device)
        active = torch.empty(n_steps, T, n, dtype=torch.int32, device=self._device)
        success: list[list[float]] = [[] for _ in envs.tasks]
        returns: list[list[float]] = [[] for _ in envs.tasks]
        for s in range(n_steps):
            if stopped():
                return None
            action, routes = self._act()
            if routes is not None:
                route[s], active[s] = routes.index[0].view(route[s].shape), routes.active[0].view(T, n)
            self._require_finite(action)
            envs.send(action)
            step = envs.recv()
            terminal = step.terminated | step.truncated if self._time_limit_is_terminal else step.terminated
            row = (self._obs, action, step.reward, terminal, step.next_obs)
            for field, value in zip(into, row, strict=True):
                field[:, s] = value
            self._succeeded |= step.success
            self._return += step.reward
            for task, env in zip(*np.nonzero(step.terminated | step.truncated), strict=True):
                success[task].append(float(self._succeeded[task, env]))
                returns[task].append(float(self._return[task, env]))
                self._succeeded[task, env], self._return[task, env] = False, 0.0
            self._obs = step.obs
        by_step.route.copy_(route.cpu().transpose(0, 1))
        n_modules = net.route_shape[0]
        mean_active = count_active(active, n_modules).float().mean(dim=(0, 2)).cpu() if n_modules else None
        return Chunk(staging, success, returns, mean_active, time.perf_counter() - begin)
