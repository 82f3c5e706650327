"""Meta-World's own `metaworld.evaluation`, its tasks spread over worker processes."""

import multiprocessing
import pickle
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, wait
from functools import partial
from typing import Any

import numpy as np

from d2r_fast.envs import WorkerError
from d2r_fast.evaluation.policies import EvalPolicy
from d2r_fast.evaluation.workers import worker_pool


def run_official(
    policy: EvalPolicy,
    tasks: tuple[str, ...],
    episodes: int,
    episode_length: int,
    seed: int,
    n_workers: int,
    finished: Callable[[int], object],
) -> tuple[list[float], list[float]]:
    """Success [T] and mean return [T] up to the first success, over `episodes` of each task.

    finished: is told now and then how many more episodes have ended.
    WorkerError: a worker failed; the message names its tasks.
    """
    n_workers = min(n_workers, len(tasks))
    frozen = pickle.dumps(policy)
    counts = multiprocessing.get_context("spawn").SimpleQueue()
    success, returns = [0.0] * len(tasks), [0.0] * len(tasks)
    with worker_pool(n_workers, _count_into, (counts,)) as pool:
        shares = [list(range(w, len(tasks), n_workers)) for w in range(n_workers)]
        jobs = {
            pool.submit(_evaluate_share, frozen, tasks, share, episodes, episode_length, seed): share
            for share in shares
        }
        pending = set(jobs)
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            while not counts.empty():
                finished(counts.get())
            for job in done:
                error = job.exception()
                if error is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    names = ", ".join(tasks[k] for k in jobs[job])
                    raise WorkerError(f"official evaluation of {names} failed: {error!r}") from error
                for k, task_success, task_return in job.result():
                    success[k], returns[k] = task_success, task_return
    return success, returns


def _evaluate_share(
    frozen: bytes, tasks: tuple[str, ...], share: list[int], episodes: int, episode_length: int, seed: int
) -> list[tuple[int, float, float]]:
    """In a worker: `metaworld.evaluation` of the tasks at positions `share`; their position, success and mean return.

    The environments are those of "Meta-World/custom-mt-envs" for all `tasks` and this seed, but only some of them; so
    the split changes nothing, and their one-hot ids are positions in `tasks`, the ids that the policy knows. One
    environment a task: with several, `evaluation` would favour short episodes, which are the successful ones.
    """
    import gymnasium
    import metaworld
    from metaworld.evaluation import evaluation

    gymnasium.logger.min_level = gymnasium.logger.ERROR  # each environment would warn of its bounds' precision
    makers: list[Any] = [
        partial(
            metaworld.make_mt_envs,
            f"{tasks[k]}-v3",
            seed=seed + k,
            num_tasks=len(tasks),
            env_id=k,
            use_one_hot=True,
            max_episode_steps=episode_length,
        )
        for k in share
    ]
    envs = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    try:
        _, _, success, returns = evaluation(_Counting(pickle.loads(frozen), episodes), envs, episodes)
    finally:
        envs.close()
    return [(k, float(success[f"{tasks[k]}-v3"]), float(np.mean(returns[f"{tasks[k]}-v3"]))) for k in share]


class _Counting:
    """A policy whose finished episodes, up to `episodes` a row, are reported to the parent."""

    def __init__(self, policy: EvalPolicy, episodes: int):
        self._policy = policy
        self._episodes = episodes
        self._begun: np.ndarray | None = None
        self.eval_action = policy.eval_action

    def reset(self, env_mask: np.ndarray) -> None:
        self._policy.reset(env_mask)
        if self._begun is None:  # the first call begins the first episodes; every later one ends some as well
            self._begun = np.zeros(len(env_mask), int)
            return
        self._begun += env_mask
        n_finished = int((env_mask & (self._begun <= self._episodes)).sum())
        if n_finished:
            _counts.put(n_finished)


_counts: Any  # of this worker's finished episodes, to the parent


def _count_into(counts: Any) -> None:
    global _counts
    _counts = counts
