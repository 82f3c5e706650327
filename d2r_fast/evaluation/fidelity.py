"""The fidelity check: is what `make_envs` hands out the same as the official package?

Scripted experts play consecutive episodes on ours. For each, an official environment is set to the start that our first
observation shows, and the same expert plays it there. So the pairs differ only by what the engines do differently.
"""

import dataclasses
import math
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor, Future
from importlib import metadata
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from d2r_fast.envs import ALL_TASKS, WorkerError, make_envs
from d2r_fast.envs.fidelity_table import EngineChoice
from d2r_fast.envs.metaworld import usable_cores
from d2r_fast.envs.official_starts import START_TOLERANCE, OfficialStarts
from d2r_fast.evaluation.play import Played, play
from d2r_fast.evaluation.policies import expert_agent
from d2r_fast.evaluation.workers import worker_pool

RETURN_TOLERANCE = 0.1
FAMILY_ERROR = 0.05
RULE = f"""The start error is the largest distance, along an axis, of what an episode's first observation shows (hand,
objects, goal) from the nearest start that the official package can produce; the median over environments counts.
A task **drifts** if an episode after the first starts more than {100 * START_TOLERANCE:.0f} cm off and the first does
not. It **differs** if the first does, if success differs (exact McNemar test on the pairs, an error of
{FAMILY_ERROR:.0%} shared among the tasks), or if the mean difference of the returns exceeds both {RETURN_TOLERANCE:.0%}
of the official mean and four of its standard errors. Otherwise it is **ok**."""

TASKS_AT_ONCE = 10


@dataclasses.dataclass(frozen=True)
class TaskFidelity:
    """One row of the report."""

    task: str
    verdict: Literal["ok", "differs", "drifts"]
    reason: str
    pairs: int
    success: float
    official_success: float
    p_value: float
    """Of the observed or a more lopsided split of the pairs that disagree, were the two alike."""
    episode_return: float
    official_return: float
    start_error: list[float]
    """Metres, for each episode in turn, the median over the environments."""
    largest_start_error: float
    """Metres, over all episodes."""


@dataclasses.dataclass(frozen=True)
class FidelityReport:
    engine: str
    episodes: int
    envs_per_task: int
    episode_length: int
    seed: int
    versions: dict[str, str]
    seconds: float
    tasks: list[TaskFidelity]

    @property
    def ok(self) -> bool:
        return all(row.verdict == "ok" for row in self.tasks)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self) | {"rule": " ".join(RULE.split()), "ok": self.ok}

    def markdown(self) -> str:
        """The table, under the conditions and the rule."""
        good = sum(row.verdict == "ok" for row in self.tasks)
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        lines = [
            f"Fidelity of engine `{self.engine}` to the official package: {good} of {len(self.tasks)} tasks ok.",
            "",
            f"Scripted experts, {self.episodes} consecutive episodes of {self.episode_length} steps in each of "
            f"{self.envs_per_task} environments a task, seed {self.seed}; {versions}; {self.seconds:.0f} s.",
            "",
            RULE,
            "",
            "| task | verdict | success | official | p | return | official | start error, mm, by episode | largest |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.tasks:
            errors = ", ".join(f"{1000 * error:.1f}" for error in row.start_error)
            errors += f" | {1000 * row.largest_start_error:.1f}"
            verdict = row.verdict if row.verdict == "ok" else f"**{row.verdict}**: {row.reason}"
            lines.append(
                f"| {row.task} | {verdict} | {row.success:.2f} | {row.official_success:.2f} | {row.p_value:.2g} "
                f"| {row.episode_return:.0f} | {row.official_return:.0f} | {errors} |"
            )
        return "\n".join(lines) + "\n"


def run_fidelity(
    tasks: Sequence[str] = ALL_TASKS,
    episodes: int = 3,
    engine: EngineChoice = "auto",
    envs_per_task: int = 6,
    episode_length: int = 500,
    seed: int = 0,
    show_progress: bool = False,
) -> FidelityReport:
    """Compare `tasks` on `engine` with the official package; RULE says how a verdict is reached.

    `episodes` must be at least 2: drift shows from the second on. Uses every core; 18 pairs a task of 500 steps cost
    about 10 core seconds. ValueError: arguments out of range, as in `make_envs`. WorkerError: a process was killed.
    """
    if episodes < 2:
        raise ValueError(f"episodes: expected at least 2, since drift shows from the second on, got {episodes}")
    if not 1 <= episode_length <= 500:
        raise ValueError(f"episode_length: expected 1..500, got {episode_length}")
    begin = time.perf_counter()
    ours: list[Played] = []
    jobs: list[Future[tuple[Played, np.ndarray]]] = []
    with (
        worker_pool(min(usable_cores(), len(tasks))) as pool,
        tqdm(total=2 * len(tasks), unit="task", desc="fidelity", disable=not show_progress) as bar,
    ):
        for at in range(0, len(tasks), TASKS_AT_ONCE):  # a few at once: 50 pools would need gigabytes
            some = tuple(tasks[at : at + TASKS_AT_ONCE])
            with make_envs(some, envs_per_task, episode_length, seed, engine=engine) as envs:
                played = play(expert_agent(some), envs, episodes)
            ours += [Played(*(field[:, k] for field in played)) for k in range(len(some))]
            bar.update(len(some))
            for task, its in zip(some, ours[at:], strict=True):
                jobs.append(pool.submit(play_official, task, its.start, episode_length, seed))
                jobs[-1].add_done_callback(lambda _: bar.update())
        try:
            rows = [judge(task, o, *job.result(), len(tasks)) for task, o, job in zip(tasks, ours, jobs, strict=True)]
        except BrokenExecutor as error:
            raise WorkerError(f"a process with official environments ended: {error}") from error
    versions = {name: metadata.version(name) for name in ("envpool", "metaworld", "mujoco")}
    seconds = time.perf_counter() - begin
    return FidelityReport(engine, episodes, envs_per_task, episode_length, seed, versions, seconds, rows)


def play_official(task: str, start: np.ndarray, episode_length: int, seed: int) -> tuple[Played, np.ndarray]:
    """In a worker: the expert's episodes on one official environment, each from the start nearest to start [E,n,39].

    Returns them, and the distances [E,n] in metres between the starts.
    """
    env = OfficialStarts(task, seed)
    expert = expert_agent((task,))
    played = Played(np.empty_like(start), np.zeros(start.shape[:2], bool), np.zeros(start.shape[:2]))
    distance = np.empty(start.shape[:2])
    for i in range(start.shape[1]):
        for e in range(len(start)):
            # The official observation is float64; the expert sees what our learner would.
            first, distance[e, i] = env.reset_near(start[e, i])
            played.start[e, i] = obs = first.astype(np.float32)
            for _ in range(episode_length):
                action = expert.eval_action(np.append(obs, np.float32(1))[None])[0]
                obs64, reward, _, _, info = env.env.step(action)
                obs = obs64.astype(np.float32)
                played.success[e, i] |= info["success"] == 1
                played.episode_return[e, i] += reward
    return played, distance


def judge(task: str, ours: Played, official: Played, distance: np.ndarray, n_tasks: int) -> TaskFidelity:
    """The verdict of RULE on the pairs of one out of n_tasks tasks."""
    p_value = mcnemar(ours.success, official.success)
    difference = ours.episode_return - official.episode_return
    mean_return, official_return = float(ours.episode_return.mean()), float(official.episode_return.mean())
    standard_error = float(difference.std(ddof=1)) / math.sqrt(difference.size)
    off = abs(mean_return - official_return)
    start_error = np.median(distance, 1)
    verdict: Literal["ok", "differs", "drifts"] = "differs"
    if start_error[0] > START_TOLERANCE:
        reason = f"starts {100 * start_error[0]:.1f} cm off"
    elif start_error.max() > START_TOLERANCE:
        verdict, reason = "drifts", f"starts up to {100 * start_error.max():.1f} cm off after the first episode"
    elif p_value < FAMILY_ERROR / n_tasks:
        reason = "success differs"
    elif off > RETURN_TOLERANCE * abs(official_return) and off > 4 * standard_error:
        reason = "return differs"
    else:
        verdict, reason = "ok", ""
    return TaskFidelity(
        task=task,
        verdict=verdict,
        reason=reason,
        pairs=difference.size,
        success=float(ours.success.mean()),
        official_success=float(official.success.mean()),
        p_value=p_value,
        episode_return=mean_return,
        official_return=official_return,
        start_error=start_error.tolist(),
        largest_start_error=float(distance.max()),
    )


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Exact two-sided p-value that pairs of bools which disagree do so evenly; 1 if none disagrees."""
    n, k = int((a != b).sum()), int((a & ~b).sum())
    tail = sum(math.comb(n, j) for j in range(min(k, n - k) + 1)) / 2**n
    return min(1.0, 2 * tail)
