"""The fidelity check: is what `make_envs` hands out the same as the official package?

Scripted experts play consecutive episodes on ours. For each, an official environment is set to the start that our first
observation shows, and the same expert plays it there. So the pairs differ only by what the engines do differently.
"""

import dataclasses
import json
import math
import os
import pickle
import time
from collections.abc import Sequence
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from tqdm import tqdm

from d2r_fast.envs import ALL_TASKS, make_envs, parse_tasks
from d2r_fast.envs.fidelity_table import EngineChoice
from d2r_fast.envs.metaworld import OBS_SIZE
from d2r_fast.protocols import expert_agent, worker_pool

POSITIONS = np.r_[0:3, 4:7, 11:14, 36:39]
"""Hand, first object, second object and goal within an observation, in metres; the rest are angles or seen before."""
START_TOLERANCE = 0.01
RETURN_TOLERANCE = 0.1
FAMILY_ERROR = 0.05
RULE = f"""The start error is the largest distance, along an axis, of what an episode's first observation shows (hand,
objects, goal) from the nearest start that the official package can produce; the median over environments counts.
A task **drifts** if an episode after the first starts more than {100 * START_TOLERANCE:.0f} cm off and the first does
not. It **differs** if the first does, if success differs (exact McNemar test on the pairs, an error of
{FAMILY_ERROR:.0%} shared among the tasks), or if the mean difference of the returns exceeds both {RETURN_TOLERANCE:.0%}
of the official mean and four of its standard errors. Otherwise it is **ok**."""

TASKS_AT_ONCE = 10


class Played(NamedTuple):
    """Episodes of one task: arrays over E episodes and n environments."""

    start: np.ndarray  # [E,n,39] first observation
    success: np.ndarray  # [E,n] bool, at any step
    episode_return: np.ndarray  # [E,n]


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
    about 10 core seconds. ValueError: arguments out of range, as in `make_envs`.
    """
    if episodes < 2:
        raise ValueError(f"episodes: expected at least 2, since drift shows from the second on, got {episodes}")
    if not 1 <= episode_length <= 500:
        raise ValueError(f"episode_length: expected 1..500, got {episode_length}")
    begin = time.perf_counter()
    ours: list[Played] = []
    jobs: list[Future[tuple[Played, np.ndarray]]] = []
    with (
        worker_pool(min(len(os.sched_getaffinity(0)), len(tasks))) as pool,
        tqdm(total=2 * len(tasks), unit="task", desc="fidelity", disable=not show_progress) as bar,
    ):
        for at in range(0, len(tasks), TASKS_AT_ONCE):  # a few at once: 50 pools would need gigabytes
            some = tuple(tasks[at : at + TASKS_AT_ONCE])
            ours += play(some, episodes, engine, envs_per_task, episode_length, seed)
            bar.update(len(some))
            for task, played in zip(some, ours[at:], strict=True):
                jobs.append(pool.submit(play_official, task, played.start, episode_length, seed))
                jobs[-1].add_done_callback(lambda _: bar.update())
        rows = [judge(task, o, *job.result(), len(tasks)) for task, o, job in zip(tasks, ours, jobs, strict=True)]
    versions = {name: metadata.version(name) for name in ("envpool", "metaworld", "mujoco")}
    seconds = time.perf_counter() - begin
    return FidelityReport(engine, episodes, envs_per_task, episode_length, seed, versions, seconds, rows)


def play(
    tasks: tuple[str, ...], episodes: int, engine: EngineChoice, envs_per_task: int, episode_length: int, seed: int
) -> list[Played]:
    """The experts' consecutive episodes on what `make_envs` hands out, task by task."""
    shape = (len(tasks), envs_per_task)
    task_id = np.eye(len(tasks), dtype=np.float32).repeat(envs_per_task, 0)
    experts = expert_agent(tasks)
    start, success = np.empty((episodes, *shape, OBS_SIZE), np.float32), np.zeros((episodes, *shape), bool)
    episode_return = np.zeros((episodes, *shape))
    with make_envs(tasks, envs_per_task, episode_length, seed, engine=engine) as envs:
        obs = envs.reset()
        for e in range(episodes):
            start[e] = obs
            for _ in range(episode_length):
                action = experts.eval_action(np.concatenate([obs.reshape(len(task_id), -1), task_id], 1))
                step = envs.step(action.reshape(*shape, -1))
                success[e] |= step.success
                episode_return[e] += step.reward
                obs = step.obs
            if not step.truncated.all():
                raise RuntimeError(f"episodes of {episode_length} steps did not end together: {step.truncated}")
    return [Played(start[:, k], success[:, k], episode_return[:, k]) for k in range(len(tasks))]


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


class OfficialStarts:
    """One official environment that can be reset to the start that an observation shows.

    A reset places things by a random vector. Where they end up is linear in it (nearly so in a few tasks), so that the
    vector follows from positions by least squares, within the official range.
    """

    def __init__(self, task: str, seed: int):
        from metaworld import ALL_V3_ENVIRONMENTS, Task

        env_class: Any = ALL_V3_ENVIRONMENTS[f"{task}-v3"]
        self.task = task
        self.env = env_class()
        space = self.env._random_reset_space
        self._low, self._high = space.low, space.high
        data = {"rand_vec": self._low, "env_cls": env_class, "partially_observable": False}
        self.env.set_task(Task(env_name=f"{task}-v3", data=pickle.dumps(data)))
        self.env._get_state_rand_vec = self._next_vector
        self._rng = np.random.default_rng(seed)
        # Which parts of the vector move something; none does until it is known.
        self._visible = np.zeros(len(self._low), bool)
        varied = self._high > self._low
        drawn, shown = [], []
        for _ in range(int(varied.sum()) + 5):
            shown.append(self.reset_at(self._draw())[POSITIONS])
            drawn.append(self._vector)
        vectors, positions = np.array(drawn), np.array(shown)
        self._centre, self._origin = vectors.mean(0), positions.mean(0)
        # positions - origin = (vector - centre) @ slope
        self._slope = np.zeros((len(self._low), len(POSITIONS)))
        self._slope[varied] = np.linalg.lstsq((vectors - self._centre)[:, varied], positions - self._origin)[0]
        self._visible = np.abs(self._slope).max(1) > 0.01
        residual = positions - self._origin - (vectors - self._centre) @ self._slope
        # What the simulation pushes about during the reset (disassemble's nut) says little about the vector.
        self._weight = 1 / (1e-7 + np.linalg.norm(residual, axis=0))

    def reset_at(self, vector: np.ndarray) -> np.ndarray:
        """Reset by `vector`, or by one close to it if the task refuses it; returns the first observation [39]."""
        # A reset places things twice, before and after it clears the simulation, and some observations show where they
        # were before. The official benchmarks place them by the same vector both times, so it is settled first.
        self._vector, self._calls, self._settled = vector, 0, False
        self.env.reset_model()
        self._settled = True
        obs, _ = self.env.reset()
        return obs

    def reset_near(self, obs: np.ndarray) -> tuple[np.ndarray, float]:
        """Reset to the possible start nearest to obs [39]; returns the first observation there, and the start error.

        Where a reset makes things collide (disassemble), a hair in the vector can move an object by centimetres, and a
        float32 observation does not tell it. What such a hair does to the official start is taken off the error.
        """
        wanted = obs[POSITIONS].astype(np.float64)
        vector, found, best = self._centre, self._origin, (np.inf, self._centre)
        for _ in range(2):  # the second round corrects the tasks that are not quite linear
            shift = np.linalg.lstsq((self._slope * self._weight).T, (wanted - found) * self._weight, rcond=1e-9)[0]
            first = self.reset_at(np.clip(vector + shift, self._low, self._high))
            vector, found = self._vector, first[POSITIONS]
            error = float(np.abs(found - wanted).max())
            if error < 1e-6:
                return first, error
            if error < best[0]:
                best = error, vector
        error, vector = best
        first = self.reset_at(vector)
        if error <= START_TOLERANCE:
            return first, error
        hairs = self._rng.normal(0, 1e-7, (4, len(vector)))
        moved = [np.abs(self.reset_at(vector + hair)[POSITIONS] - first[POSITIONS]).max() for hair in hairs]
        return self.reset_at(vector), max(0.0, error - float(max(moved)))

    def _next_vector(self) -> np.ndarray:
        # Asked more than once, the task refuses the vector, as putting things too close together, and would go on so.
        # So parts that move nothing are drawn anew; if that does not help for long, the others follow by and by.
        if not self._settled:
            self._calls += 1
            if self._calls > 1000:
                raise RuntimeError(f"{self.task}: found no start that the official environment accepts")
            if self._calls > 1:
                follow = 0.0 if self._calls < 100 else min(1.0, 0.001 * 1.02 ** (self._calls - 100))
                share = np.where(self._visible, follow, 1.0)
                self._vector = (1 - share) * self._vector + share * self._draw()
        return self._vector

    def _draw(self) -> np.ndarray:
        return self._rng.uniform(self._low, self._high)


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


def main_fidelity(
    tasks: str = "MT50",
    episodes: int = 3,
    engine: EngineChoice = "auto",
    envs_per_task: int = 6,
    seed: int = 0,
    json_file: Path | None = None,
    markdown_file: Path | None = None,
) -> int:
    """What `d2r fidelity` does: print the table, write it where asked; returns 0 if every task is ok, else 1."""
    report = run_fidelity(parse_tasks(tasks), episodes, engine, envs_per_task, seed=seed, show_progress=True)
    print(report.markdown())
    if json_file is not None:
        json_file.write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    if markdown_file is not None:
        markdown_file.write_text(report.markdown(), encoding="utf-8")
    return 0 if report.ok else 1
