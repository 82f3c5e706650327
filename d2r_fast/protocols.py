"""Evaluation protocols: how a success that is reported was measured.

    fast       the run's own engine, goals and episode length: what training curves show
    published  200 steps, goals from the continuous range, 32 episodes a task: the setting of the D2R paper
    official   Meta-World's own `evaluation` on its own environments: 500 steps, 50 goals a task, 50 episodes

    python -m d2r_fast.protocols --experts MT10

puts the package's scripted experts through a protocol instead of a trained agent: a check of the whole chain.
"""

import copy
import dataclasses
import json
import math
import multiprocessing
import os
import pickle
import sys
import threading
import time
import warnings
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
import tyro
from tqdm import tqdm

from d2r_fast.envs import make_envs, parse_tasks
from d2r_fast.envs.fidelity_table import EngineChoice
from d2r_fast.envs.metaworld import ACTION_SIZE, OBS_SIZE, Goals
from d2r_fast.policy import Actor

ProtocolName = Literal["fast", "published", "official"]


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

    @torch.no_grad()
    def eval_action(self, observations: np.ndarray) -> np.ndarray:
        device = next(self._actor.parameters()).device
        obs = torch.from_numpy(observations[:, :OBS_SIZE].astype(np.float32)).to(device)
        task = torch.from_numpy(observations[:, OBS_SIZE:].argmax(1)).to(device)
        action, _ = self._actor.act_greedily(obs, task)
        return action.cpu().numpy()

    def reset(self, env_mask: np.ndarray) -> None:
        """Nothing is carried from step to step."""

    def __getstate__(self) -> dict[str, Any]:
        return {"_actor": copy.deepcopy(self._actor).cpu()}


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
                action[i] = self._experts[k].get_action(obs.astype(np.float64))
        return action.clip(-1, 1)

    def reset(self, env_mask: np.ndarray) -> None:
        """The experts look at nothing but the observation."""


def expert_agent(tasks: tuple[str, ...]) -> ExpertPolicy:
    """The scripted experts of `tasks` as a policy, in that order. Needs metaworld."""
    return ExpertPolicy(tasks)


class ProtocolSpec(NamedTuple):
    """One way of measuring; `engine` and `goals` as in `make_envs` (the official protocol has its own)."""

    name: ProtocolName
    episodes: int  # a task
    episode_length: int
    engine: EngineChoice
    goals: Goals

    @property
    def text(self) -> str:
        goals = {"random": "random goals", "official": "50 goals a task", "fixed": "one goal a task"}[self.goals]
        where = "metaworld.evaluation on the official environments" if self.name == "official" else self.engine
        return f"{self.name} protocol: {self.episode_length} steps, {goals}, {self.episodes} episodes a task ({where})"


PUBLISHED = ProtocolSpec("published", episodes=32, episode_length=200, engine="auto", goals="random")
OFFICIAL = ProtocolSpec("official", episodes=50, episode_length=500, engine="official", goals="official")


@dataclasses.dataclass(frozen=True)
class ProtocolResult:
    """Per task over `spec.episodes` episodes each; success is success at any step of an episode.

    Intervals hold 95%: Wilson's of each task; of the mean, the tasks' Wilson distances added by squares (MOVER), which
    treats the tasks as given and the episodes as drawn. It does not cover the spread between training seeds.
    """

    spec: ProtocolSpec
    tasks: tuple[str, ...]
    seed: int
    success: list[float]  # [T]
    episode_return: list[float]  # [T] mean sum of unscaled rewards; under the official protocol up to the first success
    seconds: float

    @property
    def mean_success(self) -> float:
        return float(np.mean(self.success))

    @property
    def intervals(self) -> list[tuple[float, float]]:
        return [wilson_interval(share, self.spec.episodes) for share in self.success]

    @property
    def mean_interval(self) -> tuple[float, float]:
        low, high = np.array(self.intervals).T
        success, n_tasks = np.array(self.success), len(self.success)
        return (
            self.mean_success - float(np.linalg.norm(success - low)) / n_tasks,
            self.mean_success + float(np.linalg.norm(high - success)) / n_tasks,
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "protocol": self.spec._asdict() | {"text": self.spec.text},
            "seed": self.seed,
            "tasks": list(self.tasks),
            "success": self.success,
            "success_interval": [list(interval) for interval in self.intervals],
            "episode_return": self.episode_return,
            "mean_success": self.mean_success,
            "mean_success_interval": list(self.mean_interval),
            "interval": "95%: Wilson a task; of the mean, Wilson distances added by squares",
            "seconds": self.seconds,
        }

    def table(self) -> str:
        """One line a task and the mean."""
        width = max(len(task) for task in (*self.tasks, "mean"))
        rows = [*zip(self.tasks, self.success, self.intervals, self.episode_return, strict=True)]
        rows.append(("mean", self.mean_success, self.mean_interval, float(np.mean(self.episode_return))))
        lines = [self.spec.text, f"{'task':<{width}}  success  95% interval  return"]
        lines += [f"{name:<{width}}  {s:7.2f}  {low:.2f} to {high:.2f}  {r:6.0f}" for name, s, (low, high), r in rows]
        return "\n".join(lines)


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95% interval of a probability, from a share of n trials."""
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # At 0 and 1 the bound is the share itself; rounding must not put it a hair inside.
    return (0.0 if share == 0 else max(0.0, centre - half), 1.0 if share == 1 else min(1.0, centre + half))


def evaluate_protocol(
    policy: EvalPolicy,
    tasks: tuple[str, ...],
    spec: ProtocolSpec,
    seed: int,
    n_workers: int | None = None,
    show_progress: bool = False,
) -> ProtocolResult:
    """Measure `policy` on `tasks`, whose positions are the ids that it was trained with. Equal seeds, equal results.

    n_workers: processes of the official protocol, by default one a core; the others run on the engines' threads.
    RuntimeError: a worker failed; the message names its tasks.
    """
    begin = time.perf_counter()
    with tqdm(
        total=len(tasks) * spec.episodes,
        unit="episode",
        desc=spec.name,
        disable=not show_progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        if spec.name == "official":
            success, returns = _run_official(policy, tasks, spec, seed, n_workers or len(os.sched_getaffinity(0)), bar)
        else:
            success, returns = _run_engines(policy, tasks, spec, seed, bar)
    return ProtocolResult(spec, tasks, seed, success, returns, seconds=time.perf_counter() - begin)


def _run_engines(
    policy: EvalPolicy, tasks: tuple[str, ...], spec: ProtocolSpec, seed: int, bar: tqdm
) -> tuple[list[float], list[float]]:
    # About 80 environments in all: enough for wide batches, 1.3 GiB at 16 MiB each.
    at_most = max(1, 80 // len(tasks))
    n = max(d for d in range(1, min(at_most, spec.episodes) + 1) if spec.episodes % d == 0)
    shape = (len(tasks), n)
    task_id = np.eye(len(tasks), dtype=np.float32).repeat(n, 0)  # [T*n,T]
    everywhere = np.ones(len(task_id), bool)
    succeeded, total = np.zeros(len(tasks)), np.zeros(len(tasks))
    with make_envs(tasks, n, spec.episode_length, seed, engine=spec.engine, goals=spec.goals) as envs:
        obs = envs.reset()  # [T,n,O]
        for _ in range(spec.episodes // n):
            policy.reset(everywhere)
            success = np.zeros(shape, bool)
            for _ in range(spec.episode_length):
                rows = np.concatenate([obs.reshape(len(task_id), OBS_SIZE), task_id], 1)
                step = envs.step(policy.eval_action(rows).reshape(*shape, ACTION_SIZE))
                success |= step.success
                total += step.reward.sum(1)
                obs = step.obs
            succeeded += success.sum(1)
            bar.update(len(task_id))
    return (succeeded / spec.episodes).tolist(), (total / spec.episodes).tolist()


def _run_official(
    policy: EvalPolicy, tasks: tuple[str, ...], spec: ProtocolSpec, seed: int, n_workers: int, bar: tqdm
) -> tuple[list[float], list[float]]:
    n_workers = min(n_workers, len(tasks))
    frozen = pickle.dumps(policy)
    finished = multiprocessing.get_context("spawn").SimpleQueue()
    success, returns = [0.0] * len(tasks), [0.0] * len(tasks)
    with worker_pool(n_workers, finished) as pool:
        shares = [list(range(w, len(tasks), n_workers)) for w in range(n_workers)]
        jobs = {pool.submit(_official_share, frozen, tasks, share, spec, seed): share for share in shares}
        pending = set(jobs)
        while pending:
            done, pending = wait(pending, timeout=0.5, return_when=FIRST_COMPLETED)
            while not finished.empty():
                bar.update(finished.get())
            for job in done:
                error = job.exception()
                if error is not None:
                    pool.shutdown(wait=False, cancel_futures=True)
                    names = ", ".join(tasks[k] for k in jobs[job])
                    raise RuntimeError(f"official evaluation of {names} failed: {error!r}") from error
                for k, task_success, task_return in job.result():
                    success[k], returns[k] = task_success, task_return
    return success, returns


def _official_share(
    frozen: bytes, tasks: tuple[str, ...], share: list[int], spec: ProtocolSpec, seed: int
) -> list[tuple[int, float, float]]:
    """In a worker: `metaworld.evaluation` of the tasks at positions `share`; their position, success and mean return.

    The environments are those of "Meta-World/custom-mt-envs" for all `tasks` and this seed, but only some of them; so
    the split changes nothing, and their one-hot ids are positions in `tasks`, the ids that the policy knows. One
    environment a task: with several, `evaluation` would favour short episodes, which are the successful ones.
    """
    import gymnasium
    import metaworld
    from metaworld.evaluation import evaluation

    makers: list[Any] = [
        partial(
            metaworld.make_mt_envs,
            f"{tasks[k]}-v3",
            seed=seed + k,
            num_tasks=len(tasks),
            env_id=k,
            use_one_hot=True,
            max_episode_steps=spec.episode_length,
        )
        for k in share
    ]
    envs = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    try:
        _, _, success, returns = evaluation(_Counting(pickle.loads(frozen), spec.episodes), envs, spec.episodes)
    finally:
        envs.close()
    return [(k, float(success[f"{tasks[k]}-v3"]), float(np.mean(returns[f"{tasks[k]}-v3"]))) for k in share]


class _Counting:
    """A policy whose finished episodes, up to `episodes` a row, are reported to the parent's progress bar."""

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
        if n_finished and _finished is not None:
            _finished.put(n_finished)


_finished: Any = None


def worker_pool(n_workers: int, finished: Any = None) -> ProcessPoolExecutor:
    """Fresh processes of one thread each, that end with this one however it ends.

    finished: a queue that counts of finished episodes are put into.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(n_workers, mp_context=context, initializer=_begin_worker, initargs=(finished,))


def _begin_worker(finished: Any) -> None:
    global _finished
    _finished = finished
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@dataclasses.dataclass(frozen=True)
class ExpertArgs:
    """Put the scripted experts of the official package through a protocol."""

    experts: str
    """MT10, MT25, MT50, or task names separated by commas."""
    protocol: Literal["published", "official"] = "official"
    """As in `d2r eval`."""
    episodes: int | None = None
    """Episodes a task; by default the protocol's."""
    seed: int = 0
    """Seeds the goals."""
    json: Path | None = None
    """Write the result here too."""


def main(argv: list[str] | None = None) -> int:
    """The command `python -m d2r_fast.protocols`."""
    wanted = tyro.cli(ExpertArgs, prog="python -m d2r_fast.protocols", args=argv)
    tasks = parse_tasks(wanted.experts)
    spec = {"published": PUBLISHED, "official": OFFICIAL}[wanted.protocol]
    if wanted.episodes is not None:
        spec = spec._replace(episodes=wanted.episodes)
    result = evaluate_protocol(expert_agent(tasks), tasks, spec, wanted.seed, show_progress=True)
    print(f"scripted experts\n{result.table()}\n{result.seconds:.0f} s")
    if wanted.json is not None:
        wanted.json.write_text(json.dumps(result.as_dict(), indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
