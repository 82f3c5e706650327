"""What a reported success or return depends on: when success is counted, how long an episode is, which reward counts.

    python benches/ways_of_counting.py --tasks MT50 --episodes 20 --json benches/results/ways_of_counting.json

The official package's scripted experts on its own environments, goals drawn anew each episode, 500 steps. The same
actions on the same starts are rewarded twice, by the package's reward v2 (its default) and v1. Nothing is timed.
"""

import argparse
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from timing import print_table, write_report

from d2r_fast.envs import parse_tasks
from d2r_fast.envs.official_worker import Env
from d2r_fast.evaluation.policies import ExpertPolicy

STEPS, SHORT = 500, 200
COLUMNS = ["task", "any_200", "end_200", "any_500", "end_500", "held", "return_200", "return_500", "return_v1", "agree"]


def episode(expert: ExpertPolicy, number: int, n_tasks: int, envs: dict[str, Env]) -> dict[str, np.ndarray]:
    """One episode of `STEPS` steps in both environments, which must stay alike: success and both rewards, by step."""
    seen = {name: env.reset() for name, env in envs.items()}
    task_id = np.eye(n_tasks, dtype=np.float32)[number]
    told = {"success": np.zeros(STEPS, bool), **{name: np.zeros(STEPS) for name in envs}}
    for step in range(STEPS):
        assert np.array_equal(seen["v1"], seen["v2"]), "the two simulations came apart"
        action = expert.eval_action(np.append(seen["v2"], task_id)[None])[0]
        for name, env in envs.items():
            seen[name], told[name][step], _, _, info = env.env.step(action)
            if name == "v2":
                told["success"][step] = info["success"]
    return told


def row_of(task: str, episodes: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """What the episodes of a task come to, by each way of counting.

    held   of the episodes that succeeded at some step, how many still did at the last
    agree  correlation of the two rewards over all steps; NaN where one of them never changes
    """
    success = np.array([told["success"] for told in episodes])  # [episodes,STEPS]
    v1, v2 = (np.array([told[name] for told in episodes]) for name in ("v1", "v2"))
    any_500 = success.any(1)
    with np.errstate(invalid="ignore"):
        agree = np.corrcoef(v1.ravel(), v2.ravel())[0, 1] if v1.std() > 0 and v2.std() > 0 else np.nan
    return {
        "task": task,
        "any_200": success[:, :SHORT].any(1).mean(),
        "end_200": success[:, SHORT - 1].mean(),
        "any_500": any_500.mean(),
        "end_500": success[:, -1].mean(),
        "held": success[any_500, -1].mean() if any_500.any() else np.nan,
        "return_200": v2[:, :SHORT].sum(1).mean(),
        "return_500": v2.sum(1).mean(),
        "return_v1": v1.sum(1).mean(),
        "agree": agree,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default="MT10")
    parser.add_argument("--episodes", type=int, default=20, help="of each task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    a = parser.parse_args()
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    warnings.filterwarnings("ignore", category=UserWarning)
    tasks = parse_tasks(a.tasks)
    expert, rows = ExpertPolicy(tasks), []
    for number, task in enumerate(tasks):
        make = ALL_V3_ENVIRONMENTS[f"{task}-v3"]
        envs = {
            version: Env(partial(make, reward_function_version=version), a.seed + number, None, STEPS)  # type: ignore[arg-type]
            for version in ("v1", "v2")
        }
        rows.append(row_of(task, [episode(expert, number, len(tasks), envs) for _ in range(a.episodes)]))
        print(f"{number + 1} of {len(tasks)}: {task}", file=sys.stderr, flush=True)
    rows.append({"task": "mean"} | {name: float(np.nanmean([row[name] for row in rows])) for name in COLUMNS[1:]})
    rows = [
        {name: value if isinstance(value, str) else round(float(value), 4) for name, value in row.items()}
        for row in rows
    ]
    print_table(rows, COLUMNS)
    write_report(
        a.json,
        f"python benches/ways_of_counting.py --tasks {a.tasks} --episodes {a.episodes} --seed {a.seed}",
        "cpu",
        rows,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
