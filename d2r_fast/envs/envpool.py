"""Meta-World through EnvPool: the simulations run in C++ threads, one pool of environments a task."""

import math
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from d2r_fast.envs.metaworld import ACTION_SIZE, ENVPOOL_DEPARTURES, OBS_SIZE, MultiTaskEnvs, Step, check_tasks


class EnvPoolEnvs(MultiTaskEnvs):
    """`envs_per_task` environments of each task, episodes of `episode_length` steps, goals from the continuous range.

    Environment i of task k is seeded with seed + k*envs_per_task + i: within a pool EnvPool adds i itself, and equal
    seeds would give all tasks the same stream of random numbers. Runs with equal arguments and actions are bitwise
    equal; so let seeds of runs that must differ (training, evaluation) lie at least T*envs_per_task apart.

    num_threads: threads of each pool; by default enough for those of all pools together to keep every usable core busy.
    ImportError: EnvPool is missing. ValueError: tasks, counts or seed out of range.
    Warns of each task in ENVPOOL_DEPARTURES.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        envs_per_task: int,
        episode_length: int,
        seed: int,
        reward_scale: float = 1.0,
        num_threads: int | None = None,
    ):
        check_tasks(tasks)
        if num_threads is None:
            num_threads = min(envs_per_task, math.ceil(len(os.sched_getaffinity(0)) / len(tasks)))
        for name, value in [
            ("envs_per_task", envs_per_task),
            ("episode_length", episode_length),
            ("num_threads", num_threads),
        ]:
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        n_seeds = len(tasks) * envs_per_task
        if not 0 <= seed <= 2**31 - n_seeds:
            raise ValueError(f"seed={seed} must lie in 0..{2**31 - n_seeds}: EnvPool's {n_seeds} seeds are 32-bit")
        for task in tasks:
            if task in ENVPOOL_DEPARTURES:
                # Level 3 is the caller of make_envs.
                warnings.warn(f"{task} differs in EnvPool from the official: {ENVPOOL_DEPARTURES[task]}", stacklevel=3)

        self.tasks = tuple(tasks)
        self.envs_per_task = envs_per_task
        self.episode_length = episode_length
        self.reward_scale = reward_scale
        # Then "ready" <-> "stepping", at last "closed"; "broken" while a call is at work, and so ever after if it fails
        # half way, when another recv would wait for rows that never come.
        self._state = "made"
        envpool = _import_envpool()
        self._pools: list[Any] = [
            envpool.make(
                envpool_name(task),
                env_type="gymnasium",
                num_envs=envs_per_task,
                num_threads=num_threads,
                seed=seed + k * envs_per_task,
                max_episode_steps=episode_length,
                partially_observable=False,  # the default hides the goal
            )
            for k, task in enumerate(self.tasks)
        ]

    def reset(self) -> np.ndarray:
        self._expect("reset", "made", "ready")
        self._state = "broken"
        for pool in self._pools:
            pool.async_reset()
        obs = self._empty(OBS_SIZE)  # [T,n,O]
        for k, pool in enumerate(self._pools):
            obs[k] = self._recv_first_obs(k, pool)
        self._state = "ready"
        return obs

    def send(self, action: np.ndarray) -> None:
        self._expect("send", "ready")
        shape = (self.n_tasks, self.envs_per_task, ACTION_SIZE)
        if not isinstance(action, np.ndarray) or action.shape != shape or action.dtype != np.float32:
            got = f"{action.dtype} {action.shape}" if isinstance(action, np.ndarray) else type(action).__name__
            raise ValueError(f"action: expected a numpy array, float32 {shape}, got {got}")
        if not np.isfinite(action).all():
            k, i, _ = np.argwhere(~np.isfinite(action))[0]
            raise ValueError(f"action: not finite for task {self.tasks[k]}, environment {i}: {action[k, i]}")
        self._state = "broken"
        for pool, pool_action in zip(self._pools, action, strict=True):
            pool.send(pool_action)
        self._state = "stepping"

    def recv(self) -> Step:
        self._expect("recv", "stepping")
        self._state = "broken"
        step = Step(
            obs=self._empty(OBS_SIZE),
            next_obs=self._empty(OBS_SIZE),
            reward=self._empty(),
            terminated=np.zeros((self.n_tasks, self.envs_per_task), bool),
            truncated=np.zeros((self.n_tasks, self.envs_per_task), bool),
            success=np.zeros((self.n_tasks, self.envs_per_task), bool),
        )
        for k, pool in enumerate(self._pools):
            step.next_obs[k], step.reward[k], terminated, truncated, info = pool.recv()
            step.success[k] = info["success"]
            step.truncated[k] = truncated
            if terminated.any() or truncated.any() != truncated.all():
                raise RuntimeError(
                    f"EnvPool's environments of {self.tasks[k]} must end together and by time alone, "
                    f"got terminated={terminated}, truncated={truncated}, elapsed_step={info['elapsed_step']}"
                )
            if truncated.all():
                # EnvPool begins the next episode at the following call, whatever its action. Making that call here,
                # before the other pools are waited for, lets the resets of all pools overlap.
                pool.send(np.zeros((self.envs_per_task, ACTION_SIZE), np.float32))
        step.reward[:] *= self.reward_scale
        step.obs[:] = step.next_obs
        for k, pool in enumerate(self._pools):
            if step.truncated[k].all():
                step.obs[k] = self._recv_first_obs(k, pool)
        self._state = "ready"
        return step

    def close(self) -> None:
        # EnvPool has no call that ends its threads: they go with the last reference to the pool.
        self._pools = []
        self._state = "closed"

    def _recv_first_obs(self, k: int, pool: Any) -> np.ndarray:
        # The row's reward is not zero but belongs to no action, so it is left behind here.
        obs, info = pool.recv(reset=True)
        if info["elapsed_step"].any():
            raise RuntimeError(f"EnvPool did not reset {self.tasks[k]}: elapsed_step={info['elapsed_step']}")
        return obs

    def _empty(self, *width: int) -> np.ndarray:
        return np.empty((self.n_tasks, self.envs_per_task, *width), np.float32)

    def _expect(self, call: str, *states: str) -> None:
        if self._state not in states:
            why = {
                "made": "call reset() first",
                "ready": "nothing was sent: call send() first",
                "stepping": "a step is under way: call recv() first",
                "broken": "an earlier call failed half way: make the environments anew",
                "closed": "the environments are closed",
            }
            raise RuntimeError(f"{call}(): {why[self._state]}")


def envpool_name(task: str) -> str:
    """EnvPool's id of a task: "button-press-topdown" is "MetaWorld/ButtonPressTopdown-v3"."""
    return f"MetaWorld/{task.title().replace('-', '')}-v3"


def _import_envpool() -> ModuleType:
    try:
        import envpool
    except (ImportError, OSError) as error:  # OSError: a library that EnvPool links to is missing
        raise ImportError(f"Meta-World needs EnvPool: pip install envpool==1.2.5 (import failed: {error})") from error
    return envpool
