"""The environments as a `gymnasium.vector.VectorEnv`, for other trainers. Importing this module registers them:

    import d2r_fast.envs.vector_env
    envs = gymnasium.make_vec("d2r_fast/MT10-v0", num_envs=40)

Ids: d2r_fast/MT10-v0, MT25-v0 and MT50-v0, and d2r_fast/MetaWorld-v0 with tasks="reach,push".
Gymnasium 1.x loads no plugins, so the import is needed; the id "d2r_fast.envs.vector_env:d2r_fast/MT10-v0" includes it.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from d2r_fast.envs import MultiTaskEnvs, make_envs, parse_tasks
from d2r_fast.envs.fidelity_table import EngineChoice
from d2r_fast.envs.metaworld import ACTION_SIZE, OBS_SIZE, Goals


class MetaWorldVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """N = T*n rows, task by task: row k*n + i is environment i of task k. Conventions as in "Meta-World/MT10":

    observation  [N,39] float32, or [N,39+T] with use_one_hot, the task id behind the numbers (off by default, as there)
    reward       [N] float64, unscaled; terminated never; truncated after max_episode_steps
    autoreset    same step: at an episode's end the observation is the next one's first, and `final_obs` the true last
    info         "success" (float64, this step) of the rows whose episode goes on, the mask of them in "_success";
                 of rows that ended "final_obs", and "final_info" with "success" and "episode" ("r" return, "l" length)

    num_envs: a multiple of T; 1, which `gymnasium.make_vec` passes when nothing is said, is one environment a task.
    tasks, engine, goals, n_workers as in `make_envs`. ValueError: one of them out of range.
    """

    metadata: dict[str, Any] = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 (Gymnasium's)

    def __init__(
        self,
        tasks: str,
        num_envs: int = 1,
        max_episode_steps: int = 500,
        use_one_hot: bool = False,
        engine: EngineChoice = "auto",
        goals: Goals = "random",
        n_workers: int | None = None,
    ):
        self.tasks = parse_tasks(tasks)
        n_tasks = len(self.tasks)
        self.num_envs = n_tasks if num_envs == 1 else num_envs
        if self.num_envs < 1 or self.num_envs % n_tasks != 0:
            raise ValueError(f"num_envs: expected a multiple of the {n_tasks} tasks, got {num_envs}")
        self._arguments: dict[str, Any] = {
            "tasks": self.tasks,
            "envs_per_task": self.num_envs // n_tasks,
            "episode_length": max_episode_steps,
            "engine": engine,
            "goals": goals,
            "n_workers": n_workers,
        }
        self._task_id = np.eye(n_tasks, dtype=np.float32).repeat(self.num_envs // n_tasks, 0)  # [N,T]
        if not use_one_hot:
            self._task_id = self._task_id[:, :0]
        low, high = np.full(OBS_SIZE, -np.inf), np.full(OBS_SIZE, np.inf)
        n_ids = self._task_id.shape[1]
        self.single_observation_space = gymnasium.spaces.Box(
            np.append(low, np.zeros(n_ids)).astype(np.float32), np.append(high, np.ones(n_ids)).astype(np.float32)
        )
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (ACTION_SIZE,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._envs: MultiTaskEnvs | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begin an episode in every row. A seed builds the simulations anew, so give one at the start only.

        ValueError: options, of which there are none (rows cannot be reset one by one).
        """
        if options:
            raise ValueError(f"reset: expected no options, got {options}")
        super().reset(seed=seed)
        if self._envs is None or seed is not None:
            self.close_extras()
            # Engines seed environment i with their seed + i: drawn, for neighbouring seeds not to overlap there.
            engine_seed = int(self.np_random.integers(2**31 - self.num_envs))
            self._envs = make_envs(**self._arguments, seed=engine_seed)
        self._return = np.zeros(self.num_envs)
        self._length = np.zeros(self.num_envs, np.int64)
        return self._rows(self._envs.reset()), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """actions [N,4] -> observation, reward, terminated, truncated, info.

        Errors as in `MultiTaskEnvs.send` and `recv`.
        """
        if self._envs is None:
            raise gymnasium.error.ResetNeeded("step(): call reset() first")
        actions = np.asarray(actions, np.float32)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions: expected shape {self.action_space.shape}, got {actions.shape}")
        step = self._envs.step(actions.reshape(len(self.tasks), -1, ACTION_SIZE))
        reward = step.reward.reshape(-1).astype(np.float64)
        success = step.success.reshape(-1).astype(np.float64)
        terminated, truncated = step.terminated.reshape(-1), step.truncated.reshape(-1)
        done = terminated | truncated
        self._return += reward
        self._length += 1

        info: dict[str, Any] = {}
        if done.any():
            final_obs = np.full(self.num_envs, None, dtype=object)
            last = self._rows(step.next_obs)
            for i in np.flatnonzero(done):
                final_obs[i] = last[i].copy()
            episode = _masked(done, r=self._return, l=self._length)
            final_info = _masked(done, success=success) | {"episode": episode, "_episode": done.copy()}
            info |= {"final_obs": final_obs, "_final_obs": done.copy()}
            info |= {"final_info": final_info, "_final_info": done.copy()}
            self._return[done], self._length[done] = 0, 0
        if not done.all():
            info |= _masked(~done, success=success)
        return self._rows(step.obs), reward, terminated, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """Free the simulations."""
        if self._envs is not None:
            self._envs.close()
            self._envs = None

    def _rows(self, obs: np.ndarray) -> np.ndarray:
        return np.concatenate([obs.reshape(self.num_envs, OBS_SIZE), self._task_id], axis=1)


def _masked(mask: np.ndarray, **values: np.ndarray) -> dict[str, np.ndarray]:
    """Gymnasium's pair of each value: zero outside the mask, and the mask under the name with an underscore."""
    info = {}
    for name, value in values.items():
        info[name], info[f"_{name}"] = np.where(mask, value, value.dtype.type(0)), mask.copy()
    return info


for _benchmark in ("MT10", "MT25", "MT50"):
    gymnasium.register(
        id=f"d2r_fast/{_benchmark}-v0",
        vector_entry_point="d2r_fast.envs.vector_env:MetaWorldVectorEnv",
        max_episode_steps=500,
        kwargs={"tasks": _benchmark},
    )
gymnasium.register(
    id="d2r_fast/MetaWorld-v0",
    vector_entry_point="d2r_fast.envs.vector_env:MetaWorldVectorEnv",
    max_episode_steps=500,
)
