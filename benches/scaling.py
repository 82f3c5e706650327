"""What more GPUs should bring, on paper: the predicted update with a share of the rows, and the all-reduces on top.

    python benches/scaling.py [--suites mt10 mt50] [--precision tf32] [--card h200] [--json FILE]

An update on R ranks is the update of B/R rows (`python -m d2r_fast.kernels.cost` says how it is predicted), one all-
reduce of the flat gradient, and one of the tasks' losses before it. An all-reduce of n bytes takes latency(R) + 2
(R-1)/R n / bandwidth; the constants below are rounded from published tables of NCCL's own tests on machines of eight
H100 with NVSwitch, and between machines over one 400 Gb/s card a GPU. Nothing in here was measured by us.

What it takes of processor cores to keep up: every update asks for 1 / updates_per_step environment steps of each task;
a core steps as many as the best line of benches/results/rollout_*_cpu.json that uses one thread.
"""

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from timing import print_table, write_report

from d2r_fast.config import RunConfig
from d2r_fast.kernels.cost import CARDS, predicted_update
from d2r_fast.kernels.launches import calls_on_gpu, suite_config
from d2r_fast.learning.parameters import FlatParameters
from d2r_fast.nets.agent import Agent
from d2r_fast.ops.backends import PRECISIONS

RESULTS = Path(__file__).parent / "results"
RANKS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Link:
    """How GPUs are connected."""

    latency: dict[int, float]
    """Seconds of an all-reduce of next to nothing, by ranks."""
    bandwidth: float
    """Bytes a second of a message of some MB, as NCCL counts them ("busbw")."""

    def all_reduce(self, n_bytes: int, ranks: int) -> float:
        return self.latency[ranks] + 2 * (ranks - 1) / ranks * n_bytes / self.bandwidth if ranks > 1 else 0.0


LINKS = {
    "NVSwitch": Link({2: 12e-6, 4: 18e-6, 8: 28e-6}, 300e9),
    "one GPU a machine, 400 Gb/s": Link({2: 30e-6, 4: 45e-6, 8: 60e-6}, 40e9),
}


def gradient_bytes(cfg: RunConfig) -> int:
    """Of the flat gradient of actor, critics and log alpha."""
    return FlatParameters(Agent(39, 4, cfg.n_tasks, cfg.net)).gradient.numel() * 4


def steps_of_a_core(suite: str) -> float:
    """Environment steps a second of all tasks together that one core makes."""
    rows = json.loads((RESULTS / f"rollout_{suite}_cpu.json").read_text())["rows"]
    return max(row["steps_per_s"] for row in rows if row["engine"] == "envpool" and row["threads"] == 1)


def rows_of(suite: str, precision: str, card: str) -> list[dict[str, Any]]:
    cfg = suite_config(suite, precision)  # type: ignore[arg-type]
    n_bytes, rows = gradient_bytes(cfg), []
    for ranks in RANKS:
        if cfg.batch_size // cfg.n_tasks % ranks:
            continue
        calls = calls_on_gpu(replace(cfg, batch_size=cfg.batch_size // ranks))
        update = sum(line.us for line in predicted_update(calls, CARDS[card])) * 1e-6
        for name, link in LINKS.items():
            talk = link.all_reduce(n_bytes, ranks) + link.all_reduce(6 * cfg.n_tasks * 4, ranks)
            rate = 1 / (update + talk)
            rows.append(
                {
                    "suite": suite,
                    "precision": precision,
                    "card": card,
                    "link": name,
                    "ranks": ranks,
                    "rows_a_rank": cfg.batch_size // ranks,
                    "update_us": round(update * 1e6, 1),
                    "gradient_mb": round(n_bytes / 1e6, 2),
                    "all_reduce_us": round(talk * 1e6, 1),
                    "updates_per_s": round(rate),
                    "speed_up": 0.0,
                    "cores_a_gpu": round(rate / cfg.updates_per_step * cfg.n_tasks / steps_of_a_core(suite) / ranks, 1),
                }
            )
    for row in rows:
        alone = next(r for r in rows if r["link"] == row["link"] and r["ranks"] == 1)
        row["speed_up"] = round(row["updates_per_s"] / alone["updates_per_s"], 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=("mt10", "mt50"), default=["mt10", "mt50"])
    parser.add_argument("--precision", choices=PRECISIONS, default="tf32")
    parser.add_argument("--card", choices=tuple(CARDS), default="h200")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    rows = [row for suite in args.suites for row in rows_of(suite, args.precision, args.card)]
    print_table(rows, list(rows[0]))
    write_report(args.json, " ".join(["python benches/scaling.py", *sys.argv[1:]]), "cpu", rows)


if __name__ == "__main__":
    main()
