"""Evaluation protocols: how a success that is reported was measured.

fast       the run's own engine, goals and episode length: what training curves show
published  200 steps, goals from the continuous range, 32 episodes a task: the setting of the D2R paper
official   Meta-World's own `evaluation` on its own environments: 500 steps, 50 goals a task, 50 episodes
"""

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from d2r_fast.envs import make_envs
from d2r_fast.envs.fidelity_table import EngineChoice
from d2r_fast.envs.metaworld import Goals, usable_cores
from d2r_fast.evaluation.official_protocol import run_official
from d2r_fast.evaluation.play import play
from d2r_fast.evaluation.policies import EvalPolicy

ProtocolName = Literal["fast", "published", "official"]


class ProtocolSpec(NamedTuple):
    """One way of measuring; `engine` and `goals` as in `make_envs` (the official protocol has its own)."""

    name: ProtocolName
    episodes: int  # a task
    episode_length: int
    engine: EngineChoice
    goals: Goals

    @property
    def text(self) -> str:
        usual = {spec.name: spec.episodes for spec in (PUBLISHED, OFFICIAL)}.get(self.name, self.episodes)
        episodes = f"{self.episodes} episodes a task" + (f" instead of {usual}" if self.episodes != usual else "")
        goals = {"random": "random goals", "official": "50 goals a task", "fixed": "one goal a task"}[self.goals]
        where = "metaworld.evaluation on the official environments" if self.name == "official" else self.engine
        return f"{self.name} protocol: {self.episode_length} steps, {goals}, {episodes} ({where})"


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
        return mean_interval(self.success, self.spec.episodes)

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


def mean_interval(success: Sequence[float], n: int) -> tuple[float, float]:
    """The 95% interval of the mean over tasks of shares of n trials each: Wilson distances added by squares (MOVER)."""
    shares = np.array(success)
    low, high = np.array([wilson_interval(share, n) for share in success]).T
    mean = float(shares.mean())
    return (
        mean - float(np.linalg.norm(shares - low)) / len(shares),
        mean + float(np.linalg.norm(high - shares)) / len(shares),
    )


def evaluate_protocol(
    policy: EvalPolicy,
    tasks: tuple[str, ...],
    spec: ProtocolSpec,
    seed: int,
    envs_per_task: int | None = None,
    n_workers: int | None = None,
    show_progress: bool = False,
) -> ProtocolResult:
    """Measure `policy` on `tasks`, whose positions are the ids it was trained with. Equal arguments, equal results.

    envs_per_task: that step together, a divisor of the episodes; by default up to 8 and about 80 of all tasks, for
    batches that are wide and simulations that take 1.3 GiB. The official protocol has one.
    n_workers: processes of the official protocol, by default one a core, which changes nothing but the time; the others
    run on the engines' threads.
    ValueError: an argument is out of range, or envs_per_task is given for the official protocol.
    WorkerError: a worker failed; the message names its tasks.
    """
    if spec.name == "official" and envs_per_task not in (None, 1):
        raise ValueError(f"envs_per_task: the official protocol has one environment a task, got {envs_per_task}")
    if spec.episodes < 1:
        raise ValueError(f"episodes: expected at least 1, got {spec.episodes}")
    n = most_that_divide(spec.episodes, min(8, 80 // len(tasks))) if envs_per_task is None else envs_per_task
    if n < 1 or spec.episodes % n:
        raise ValueError(f"episodes: expected a multiple of envs_per_task={n}, got {spec.episodes}")
    begin = time.perf_counter()
    with tqdm(
        total=len(tasks) * spec.episodes,
        unit="episode",
        desc=spec.name,
        disable=not show_progress,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    ) as bar:
        if spec.name == "official":
            n_workers = n_workers or usable_cores()
            success, returns = run_official(
                policy, tasks, spec.episodes, spec.episode_length, seed, n_workers, bar.update
            )
        else:
            with make_envs(tasks, n, spec.episode_length, seed, engine=spec.engine, goals=spec.goals) as envs:
                played = play(policy, envs, spec.episodes // n, lambda: bar.update(len(tasks) * n))
            success = played.success.mean((0, 2)).tolist()
            returns = played.episode_return.mean((0, 2)).tolist()
    return ProtocolResult(spec, tasks, seed, success, returns, seconds=time.perf_counter() - begin)


def most_that_divide(episodes: int, at_most: int) -> int:
    """The largest divisor of `episodes` up to `at_most`, or 1."""
    return max(d for d in range(1, max(1, min(at_most, episodes)) + 1) if episodes % d == 0)
