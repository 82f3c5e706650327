"""Final success, wall time and rates of training runs, one row a run.

python benches/summarise_runs.py RUN [RUN ...] [--json FILE]
"""

import argparse
import json
import os
import platform
from importlib import metadata
from pathlib import Path

from d2r_fast.config_json import load_config
from d2r_fast.metrics import read_metrics


def summarise(run_dir: Path) -> dict:
    """The last evaluation of a run that one process trained from start to end, and what it cost."""
    cfg = load_config(str(run_dir / "config.json"))
    evals = read_metrics(run_dir, "eval")
    if not evals:
        raise SystemExit(f"{run_dir}: no evaluation in metrics.jsonl yet")
    last = evals[-1]
    seconds = last["time"]
    return {
        "variant": cfg.name,
        "seed": cfg.seed,
        "steps_a_task": last["steps"],
        "updates": last["updates"],
        "success": dict(zip(cfg.task_names, last["success"], strict=True)),
        "mean_success": last["mean_success"],
        "episodes_a_task": last["episodes"],
        "wall_minutes": round(seconds["wall"] / 60, 2),
        "updates_per_s": round(last["updates"] / seconds["wall"], 1),
        "updates_per_s_while_learning": round(last["updates"] / seconds["learn"], 1),
        "steps_per_s_while_collecting": round(last["steps"] * cfg.n_tasks / seconds["collect"]),
        "wall_minutes_to_mean_success_0.8": next(
            (round(e["time"]["wall"] / 60, 2) for e in evals if e["mean_success"] >= 0.8), None
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [summarise(run) for run in args.runs]
    for row in rows:
        tasks = "  ".join(f"{task} {s:.2f}" for task, s in row["success"].items())
        print(
            f"{row['variant']} seed {row['seed']}: mean {row['mean_success']:.2f}  {tasks}  "
            f"{row['wall_minutes']:.1f} min, {row['updates_per_s']} updates/s"
        )
    if args.json:
        record = {
            "command": f"d2r train {rows[0]['variant']} --seed SEED; python benches/summarise_runs.py RUN ...",
            "versions": {p: metadata.version(p) for p in ("torch", "numpy", "envpool", "metaworld")},
            "machine": {"python": platform.python_version(), "arch": platform.machine(), "cores": os.cpu_count()},
            "rows": rows,
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
