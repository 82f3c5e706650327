"""Meta-World through EnvPool: the simulations run in C++ threads, one pool of environments a task."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np

from d2r_fast.envs.corrections import first_handle, open_gripper_reward
from d2r_fast.envs.fidelity_table import FIDELITY
from d2r_fast.envs.metaworld import (
    ACTION_SIZE,
    ALL_TASKS,
    OBS_SIZE,
    CallOrder,
    Goals,
    MultiTaskEnvs,
    NumberCheck,
    Step,
    check_action,
    check_sizes,
    check_tasks,
    usable_cores,
)
from d2r_fast.envs.scenes import hammer_base_path
from d2r_fast.host.memory import giving_back_memory


class EnvPoolEnvs(MultiTaskEnvs):
    """`envs_per_task` environments of each task, episodes of `episode_length` steps, corrected as `FIDELITY` says.

    goals: "random" draws them anew at every reset, from the continuous range. Environment i of the task at position p
    is then seeded with seed + p*envs_per_task + i: within a pool EnvPool adds i itself, and equal seeds would give all
    tasks the same stream of random numbers. Runs with equal arguments and actions are bitwise equal; so let seeds of
    runs that must differ (training, evaluation) lie at least T*envs_per_task apart.
    "fixed" gives all environments of a task one goal and one first state, in every episode, which depend on the task
    and `seed` alone. EnvPool can neither set nor keep a goal: each pool is made anew, with the same seeds, as soon as
    its episode has ended, while those after it still step.

    positions: of the tasks in a longer list of which they are a part, so that it does not matter to a task where the
    others run; by default 0..T-1.
    num_threads: threads of each pool; by default enough for those of all pools together to keep every usable core busy.
    ImportError: EnvPool is missing. ValueError: tasks, counts or seed out of range, or goals that EnvPool cannot give.
    OSError, RuntimeError: of `hammer_base_path`.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        envs_per_task: int,
        episode_length: int,
        seed: int,
        reward_scale: float = 1.0,
        goals: Goals = "random",
        positions: Sequence[int] | None = None,
        num_threads: int | None = None,
    ):
        check_tasks(tasks)
        if goals not in ("random", "fixed"):
            raise ValueError(
                f'goals: EnvPool offers "random" and "fixed", got "{goals}"; '
                'the engine with the package\'s own goals is engine="official"'
            )
        if positions is None:
            positions = range(len(tasks))
        if num_threads is None:
            num_threads = min(envs_per_task, math.ceil(usable_cores() / len(tasks)))
        n_seeds = len(ALL_TASKS) if goals == "fixed" else (max(positions) + 1) * envs_per_task
        check_sizes(seed, n_seeds, envs_per_task=envs_per_task, episode_length=episode_length, num_threads=num_threads)

        self.tasks = tuple(tasks)
        self.envs_per_task = envs_per_task
        self.episode_length = episode_length
        self.reward_scale = reward_scale
        self._order = CallOrder()
        self._numbers = NumberCheck(tasks)
        self._fixed_goals = goals == "fixed"
        self._envpool = _import_envpool()
        self._pool_settings: list[dict[str, Any]] = [
            {
                "env_type": "gymnasium",
                "num_envs": envs_per_task,
                "num_threads": num_threads,
                "seed": [seed + ALL_TASKS.index(task)] * envs_per_task
                if goals == "fixed"
                else seed + p * envs_per_task,
                "max_episode_steps": episode_length,
                "partially_observable": False,  # the default hides the goal
            }
            for task, p in zip(self.tasks, positions, strict=True)
        ]
        with giving_back_memory():
            self._pools: list[Any] = [self._make_pool(k) for k in range(self.n_tasks)]

    def reset(self) -> np.ndarray:
        self._order.expect("reset", "made", "ready")
        renew = self._fixed_goals and self._order.state != "made"
        self._order.state = "broken"
        with giving_back_memory() if renew else nullcontext():
            for k in range(self.n_tasks):
                if renew:
                    self._renew_pool(k)
                self._pools[k].async_reset()
        obs = self._empty(OBS_SIZE)  # [T,n,O]
        for k in range(self.n_tasks):
            obs[k] = self._recv_first_obs(k)
        self._numbers.first(obs)
        self._order.state = "ready"
        return obs

    def send(self, action: np.ndarray) -> None:
        self._order.expect("send", "ready")
        check_action(action, self.tasks, self.envs_per_task)
        self._order.state = "broken"
        for pool, pool_action in zip(self._pools, action, strict=True):
            pool.send(pool_action)
        self._order.state = "stepping"

    def recv(self) -> Step:
        self._order.expect("recv", "stepping")
        self._order.state = "broken"
        step = Step(
            obs=self._empty(OBS_SIZE),
            next_obs=self._empty(OBS_SIZE),
            reward=self._empty(),
            terminated=np.zeros((self.n_tasks, self.envs_per_task), bool),
            truncated=np.zeros((self.n_tasks, self.envs_per_task), bool),
            success=np.zeros((self.n_tasks, self.envs_per_task), bool),
        )
        renew = self._fixed_goals and self._numbers.at_step + 1 == self.episode_length
        with giving_back_memory() if renew else nullcontext():
            for k in range(self.n_tasks):
                self._recv_pool(k, step)
        step.reward[:] *= self.reward_scale
        step.obs[:] = step.next_obs
        for k in range(self.n_tasks):
            if step.truncated[k].all():
                step.obs[k] = self._recv_first_obs(k)
        self._numbers.step(step)
        self._order.state = "ready"
        return step

    def _recv_pool(self, k: int, step: Step) -> None:
        """Write one pool's share of a step, all but `obs`, and begin its next episode where this one ended."""
        next_obs, reward, terminated, truncated, info = self._pools[k].recv()
        correction = FIDELITY[self.tasks[k]].correction
        if correction == "open_gripper_reward":
            reward = open_gripper_reward(reward, next_obs, info["grasp_reward"])
        elif correction == "first_handle":
            next_obs = first_handle(next_obs, info["elapsed_step"])
        step.next_obs[k], step.reward[k] = next_obs, reward
        step.success[k] = info["success"]
        step.truncated[k] = truncated
        if terminated.any() or truncated.any() != truncated.all():
            raise RuntimeError(
                f"EnvPool's environments of {self.tasks[k]} must end together and by time alone, "
                f"got terminated={terminated}, truncated={truncated}, elapsed_step={info['elapsed_step']}"
            )
        if truncated.all() and self._fixed_goals:
            self._renew_pool(k)
            self._pools[k].async_reset()
        elif truncated.all():
            # EnvPool begins the next episode at the following call, whatever its action. Making that call here,
            # before the other pools are waited for, lets the resets of all pools overlap.
            self._pools[k].send(np.zeros((self.envs_per_task, ACTION_SIZE), np.float32))

    def close(self) -> None:
        # EnvPool has no call that ends its threads: they go with the last reference to the pool.
        with giving_back_memory():
            self._pools = []
        self._order.state = "closed"

    def _make_pool(self, k: int) -> Any:
        settings = self._pool_settings[k]
        if FIDELITY[self.tasks[k]].correction == "goal_in_world":
            settings = settings | {"base_path": hammer_base_path()}
        return self._envpool.make(envpool_name(self.tasks[k]), **settings)

    def _renew_pool(self, k: int) -> None:
        self._pools[k] = None  # frees its 16 MiB an environment before as much is taken again
        self._pools[k] = self._make_pool(k)

    def _recv_first_obs(self, k: int) -> np.ndarray:
        # The row's reward is not zero but belongs to no action, so it is left behind here.
        obs, info = self._pools[k].recv(reset=True)
        if info["elapsed_step"].any():
            raise RuntimeError(f"EnvPool did not reset {self.tasks[k]}: elapsed_step={info['elapsed_step']}")
        if FIDELITY[self.tasks[k]].correction == "first_handle":
            obs = first_handle(obs, info["elapsed_step"])
        return obs

    def _empty(self, *width: int) -> np.ndarray:
        return np.empty((self.n_tasks, self.envs_per_task, *width), np.float32)


def envpool_name(task: str) -> str:
    """EnvPool's id of a task: "button-press-topdown" is "MetaWorld/ButtonPressTopdown-v3"."""
    return f"MetaWorld/{task.title().replace('-', '')}-v3"


def _import_envpool() -> ModuleType:
    try:
        import envpool
    except (ImportError, OSError) as error:  # OSError: a library that EnvPool links to is missing
        raise ImportError(f"Meta-World needs EnvPool: pip install envpool==1.2.5 (import failed: {error})") from error
    return envpool
