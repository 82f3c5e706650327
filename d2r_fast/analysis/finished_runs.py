"""Finished training runs as a comparison reads them: settings, success over steps, what the run cost."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2r_fast.analysis.session_clock import training_seconds
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
    """A finished run.

    evals    records of its evaluations, two at least
    seconds  of training up to each of them, over all sessions
    """

    path: Path
    cfg: RunConfig
    evals: list[dict[str, Any]]
    seconds: list[float]

    @property
    def minutes(self) -> list[float]:
        """Wall time at each evaluation."""
        return [seconds / 60 for seconds in self.seconds]

    @property
    def updates_per_s(self) -> float:
        return float(self.evals[-1]["updates"] / self.seconds[-1])

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

    ValueError: not a run, one that has not come so far, or without evaluations by then.
    """
    cfg = load_config(str(path / "config.json"))
    try:
        evals, train = read_metrics(path, "eval"), read_metrics(path, "train")
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f"{path}: metrics.jsonl cannot be read: {error}") from error
    if not evals:
        raise ValueError(f"{path}: no evaluation in metrics.jsonl yet")
    seconds = training_seconds([*train, *evals])[len(train) :]
    last_step = cfg.warmup_steps + cfg.total_steps
    if evals[-1]["steps"] < (last_step if until is None else min(until, last_step)):
        raise ValueError(
            f"{path}: not finished: last evaluation at step {evals[-1]['steps']:,} of {last_step:,}; --until looks at "
            "what runs have in common"
        )
    if until is not None:
        evals = [record for record in evals if record["steps"] <= until]
        if not evals:
            raise ValueError(f"{path}: no evaluation within its first {until:,} steps a task")
    if len(evals) == 1:
        raise ValueError(f"{path}: one evaluation alone has no area; eval.every_chunks makes more")
    return Run(path, cfg, evals, seconds[: len(evals)])


def flat_settings(cfg: RunConfig) -> dict[str, Any]:
    """Every setting by the name that the command line gives it, and `net.kind`."""
    flat: dict[str, Any] = {}
    for name, value in asdict(cfg).items():
        flat |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return flat | {"net.kind": cfg.net.kind}


def learning_settings(cfg: RunConfig, until: int | None = None) -> dict[str, Any]:
    """What decides what a run learns in its first `until` steps a task."""
    flat = flat_settings(cfg)
    if until is not None:  # nothing follows a schedule that ends with the run
        del flat["total_steps"]
    # A replay that never fills is as large as any other one that never fills.
    n_steps = cfg.warmup_steps + cfg.total_steps if until is None else until
    flat["replay_capacity"] = min(cfg.replay_capacity, n_steps * cfg.n_tasks)
    return {name: value for name, value in flat.items() if name not in FREE}


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among `paths`, and those within the others, by name. ValueError: one is and holds none, or a
    run is named twice."""
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ValueError(f"{path}: expected a run directory, or a directory of them")
        is_run = (path / "config.json").exists()
        inside = [path] if is_run else sorted(d for d in path.iterdir() if (d / "config.json").exists())
        if not inside:
            raise ValueError(f"{path}: expected a run directory (with config.json), or a directory of them")
        found += inside
    real = [path.resolve() for path in found]
    twice = next((path for path, name in zip(found, real, strict=True) if real.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice}: named twice, where it would count as two seeds")
    return found
