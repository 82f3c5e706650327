"""Finished training runs as benchmarks read them: settings, success over steps, what the run cost."""

import json
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2r_fast.config import RunConfig
from d2r_fast.config_json import load_config
from d2r_fast.training.metrics import read_metrics

# What two runs that learn the same thing may differ in: who they are, what computes, and what is saved.
FREE = {"name", "seed", "device", "deterministic", "cuda_graph", "overlap", "net.backend", "net.precision"}
FREE |= {"checkpoint_every_chunks", "checkpoint_replay"}


def area(steps: list[int], success: np.ndarray) -> np.ndarray:
    """Mean height of the curves from the first evaluation to the last one, by trapezoids: [evaluations,C] -> [C]."""
    width = np.diff(steps)
    return width @ (success[1:] + success[:-1]) / (2 * width.sum())


class Run(NamedTuple):
    """A finished run."""

    path: Path
    cfg: RunConfig
    written: dict[str, Any]  # config.json; a setting that the run's code did not know yet is missing, not a default
    evals: list[dict[str, Any]]
    resumed: bool  # then its clock began again, and no time of it means anything

    @property
    def steps(self) -> list[int]:
        """Environment steps of a task at each evaluation."""
        return [record["steps"] for record in self.evals]

    def success(self) -> np.ndarray:
        """[evaluations,1+T]: the mean over tasks, then every task."""
        return np.array([[record["mean_success"], *record["success"]] for record in self.evals])

    def final_success(self) -> np.ndarray:
        return self.success()[-1]  # [1+T]

    def area(self) -> np.ndarray:
        return area(self.steps, self.success())  # [1+T]


def read_run(path: Path, until: int | None = None) -> Run:
    """A run as it was after `until` steps a task; None: at its end.

    ValueError: not a run, one that is not finished, or without evaluations by then.
    """
    cfg = load_config(str(path / "config.json"))
    try:
        evals, train = read_metrics(path, "eval"), read_metrics(path, "train")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path}: metrics.jsonl cannot be read: {error}") from error
    if not evals:
        raise ValueError(f"{path}: no evaluation in metrics.jsonl yet")
    last_step = cfg.warmup_steps + cfg.total_steps
    if evals[-1]["steps"] != last_step:
        raise ValueError(f"{path}: not finished: last evaluation at step {evals[-1]['steps']:,} of {last_step:,}")
    if until is not None:
        evals = [record for record in evals if record["steps"] <= until]
        if not evals:
            raise ValueError(f"{path}: no evaluation within its first {until:,} steps a task")
    if len(evals) == 1:
        raise ValueError(f"{path}: one evaluation alone has no area; eval.every_chunks makes more")
    resumed = any(later["time"]["wall"] < earlier["time"]["wall"] for earlier, later in pairwise(train))
    written = json.loads((path / "config.json").read_text(encoding="utf-8"))
    return Run(path, cfg, written, evals, resumed)


def learning_settings(cfg: RunConfig, until: int | None = None) -> dict[str, Any]:
    """What decides what a run learns in its first `until` steps a task, by the names that the command line gives it."""
    flat: dict[str, Any] = {}
    for name, value in asdict(cfg).items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    if until is not None:  # nothing follows a schedule that ends with the run
        del flat["total_steps"]
    # A replay that never fills is as large as any other one that never fills.
    n_steps = cfg.warmup_steps + cfg.total_steps if until is None else until
    flat["replay_capacity"] = min(cfg.replay_capacity, n_steps * cfg.n_tasks)
    return {name: value for name, value in flat.items() if name not in FREE}


def check_alike(runs: list[Run], until: int | None = None) -> None:
    """ValueError: they do not learn the same task in the same way, or were not evaluated at the same steps."""
    first, settings = runs[0], learning_settings(runs[0].cfg, until)
    for run in runs[1:]:
        mine = learning_settings(run.cfg, until)
        others = [f"{name} {settings[name]} and {value}" for name, value in mine.items() if settings[name] != value]
        if others:
            more = f", and {len(others) - 4} more" if len(others) > 4 else ""
            raise ValueError(f"{first.path} and {run.path} are not comparable: {'; '.join(others[:4])}{more}")
        if run.steps != first.steps:
            raise ValueError(
                f"{first.path} and {run.path} were evaluated at other steps: {first.steps} and {run.steps}"
            )


def row(run: Run) -> dict[str, Any]:
    """The last evaluation of a run, the area under all of them, and what it cost."""
    last, cfg = run.evals[-1], run.cfg
    seconds = last["time"]
    times: dict[str, float | None] = {
        "wall_minutes": round(seconds["wall"] / 60, 2),
        "updates_per_s": round(last["updates"] / seconds["wall"], 1),
        "updates_per_s_while_learning": round(last["updates"] / seconds["learn"], 1),
        "steps_per_s_while_collecting": round(last["steps"] * cfg.n_tasks / seconds["collect"]),
        "wall_minutes_to_mean_success_0.8": next(
            (round(e["time"]["wall"] / 60, 2) for e in run.evals if e["mean_success"] >= 0.8), None
        ),
    }
    return {
        "variant": cfg.name,
        "run": str(run.path),
        "seed": cfg.seed,
        "backend": run.written["net"].get("backend"),
        "precision": run.written["net"].get("precision"),
        "overlap": run.written.get("overlap"),
        "steps_a_task": last["steps"],
        "updates": last["updates"],
        "success": dict(zip(cfg.task_names, last["success"], strict=True)),
        "mean_success": last["mean_success"],
        "area": dict(zip(("mean", *cfg.task_names), run.area().round(4).tolist(), strict=True)),
        "episodes_a_task": last["episodes"],
    } | ({name: None for name in times} if run.resumed else times)
