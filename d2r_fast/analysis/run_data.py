"""What a finished or stopped run's files say, as plain values for the report: curves, numbers, routes, settings."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from d2r_fast.analysis.routes import play_routes
from d2r_fast.analysis.session_clock import training_seconds
from d2r_fast.config import RunConfig
from d2r_fast.config_json import read_config
from d2r_fast.evaluation.protocols import mean_interval, wilson_interval
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.training.checkpoint import checkpoint_files
from d2r_fast.training.metrics import read_metrics
from d2r_fast.training.saved_run import read_saved_run
from d2r_fast.training.sessions import read_sessions

# A curve has at most about this many points: of more records, a few neighbours each become their mean.
MOST_POINTS = 400


def run_data(run_dir: Path, play: bool) -> dict[str, Any]:
    """All that the report shows of a run; T tasks.

    play: whether a routed network may play episodes for its routes, where routes.json is not of its newest checkpoint
    FileNotFoundError: no config.json or metrics.jsonl. ValueError: a file holds something else, or no record yet.
    """
    cfg = read_config(run_dir / "config.json")
    train, evals = (read_metrics(run_dir, kind) for kind in ("train", "eval"))
    if not train:
        raise ValueError(f"{run_dir / 'metrics.jsonl'}: expected records of training, got none")
    clock = [round(seconds / 3600, 6) for seconds in training_seconds([*train, *evals])]  # hours
    return {
        "name": run_dir.resolve().name,
        "path": str(run_dir),
        "tasks": list(cfg.task_names),
        "network": cfg.net.kind,
        "seed": cfg.seed,
        "steps": train[-1]["steps"],
        "updates": train[-1]["updates"],
        "finished": train[-1]["steps"] >= cfg.warmup_steps + cfg.total_steps,
        "hours": max(clock),
        "evals": _evaluations(evals, clock[len(train) :]),
        "train": _training(train, clock[: len(train)], cfg),
        "routes": _routes(run_dir, cfg, play),
        "sessions": read_sessions(run_dir),
        "config": json.loads((run_dir / "config.json").read_text(encoding="utf-8")),
    }


def _evaluations(evals: list[dict[str, Any]], hours: list[float]) -> dict[str, Any]:
    """Lists over evaluations; success with 95% intervals."""
    intervals = [mean_interval(record["success"], record["episodes"]) for record in evals]
    last = evals[-1] if evals else None
    return {
        "steps": [record["steps"] for record in evals],
        "updates": [record["updates"] for record in evals],
        "hours": hours,
        "success": [record["success"] for record in evals],
        "mean": [record["mean_success"] for record in evals],
        "low": [low for low, _ in intervals],
        "high": [high for _, high in intervals],
        "return": [record["episode_return"] for record in evals],
        "active": [[sum(use) for use in record["module_use"]] for record in evals],
        "episodes": last["episodes"] if last else 0,
        "last_intervals": [wilson_interval(share, last["episodes"]) for share in last["success"]] if last else [],
        "module_use": last["module_use"] if last else [],
    }


def _training(train: list[dict[str, Any]], hours: list[float], cfg: RunConfig) -> dict[str, Any]:
    """Curves of what training logged: {"steps", "updates", "hours"} and by name [points][lines], None where a record
    lacks it; a line is a task, a network or the one there is."""
    clock = np.array(hours) * 3600
    names = sorted({name for record in train for name, value in record.items() if isinstance(value, list)})
    curves: dict[str, list[list[float] | None]] = {name: [record.get(name) for record in train] for name in names}
    if isinstance(cfg.net, NetConfig) and "policy/alpha" in curves:  # records of earlier versions lack it
        curves["policy/route_temp"] = [
            record.get("policy/route_temp") or _route_temp(record.get("policy/alpha"), cfg) for record in train
        ]
    times = [record.get("time", {}) for record in train]
    for name in ("learner_idle", "collector_idle", "rss_mib", "workers_rss_mib"):
        curves[f"time/{name}"] = [[time[name]] if name in time else None for time in times]
    apart = np.array([time.get("evaluate", 0.0) + time.get("save", 0.0) for time in times])
    for name, per_step in (("steps", cfg.n_tasks), ("updates", 1)):
        done = np.array([record[name] for record in train]) * per_step
        # Each session counts the time of its phases anew.
        seconds = np.diff(clock, prepend=0.0) - np.diff(apart, prepend=0.0).clip(0)
        rate = np.diff(done, prepend=0) / np.where(seconds > 0, seconds, np.nan)
        curves[f"rate/{name}"] = [[float(r)] if np.isfinite(r) and r > 0 else None for r in rate]
    group = -(-len(train) // MOST_POINTS)
    along = {"steps": [r["steps"] for r in train], "updates": [r["updates"] for r in train], "hours": hours}
    return {
        "records_a_point": group,
        **{name: values[group - 1 :: group] for name, values in along.items()},
        "curves": {name: _thinned(values, group) for name, values in curves.items()},
    }


def _route_temp(alpha: list[float] | None, cfg: RunConfig) -> list[float] | None:
    """T softmax(-log alpha), as the update sets it."""
    if alpha is None:
        return None
    if not cfg.sac.route_balancing:
        return [1.0] * len(alpha)
    inverse = 1 / np.array(alpha)
    return (len(alpha) * inverse / inverse.sum()).tolist()


def _thinned(values: list[list[float] | None], group: int) -> list[list[float] | None]:
    """The mean of every `group` neighbours, to five digits; a rest at the end is left out."""
    points: list[list[float] | None] = []
    for begin in range(0, len(values) - group + 1, group):
        there = [value for value in values[begin : begin + group] if value is not None]
        points.append([float(f"{mean:.5g}") for mean in np.mean(there, 0)] if there else None)
    return points


def _routes(run_dir: Path, cfg: RunConfig, play: bool) -> dict[str, Any] | None:
    """The numbers of routes.json if it is of the newest checkpoint, else of one round of episodes played here."""
    files = checkpoint_files(run_dir)
    if not isinstance(cfg.net, NetConfig):
        return None
    path = run_dir / "routes.json"
    if path.exists():
        try:
            numbers: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if not files or Path(numbers["checkpoint"]).name == files[-1].name:
                return numbers
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: expected what d2r routes writes, got something else: {error!r:.80}") from error
    if not play or not files:
        return None
    return play_routes(read_saved_run(run_dir), min(8, cfg.eval.envs_per_task))
