"""Memory of a learner over thousands of updates: does it grow?

    python benches/update_memory.py --suite mt10 --updates 2000 --json benches/results/update_memory_mt10_cpu.json

The learner of update_step.py, sampled every 20 updates: the process's resident memory and, on a GPU, what torch has
allocated there. Slopes are of least squares over the second half, when caches and the C library's pools have filled.
"flat": by its slope a memory grew by less than 1% of itself over that half. A slow leak can hide below that, so what
the slope would add over the preset's whole run is printed too; it is worth something where the slope is well above its
standard error.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from timing import print_table, synchronise, write_report
from update_step import make_learner, variant_of

from d2r_fast.learning.learner import Learner
from d2r_fast.ops.backends import PRECISIONS, availability
from d2r_fast.presets import PRESETS

EVERY = 20  # updates between samples


def sample(device: str) -> dict[str, int]:
    """Bytes held now."""
    held = {"rss": psutil.Process().memory_info().rss}
    return held | ({"allocated": torch.cuda.memory_allocated()} if device == "cuda" else {})


def record(learner: Learner, updates: int, device: str) -> dict[str, list[int]]:
    """Bytes before the first update and after every 20th."""
    samples = [sample(device)]
    for _ in range(updates // EVERY):
        learner.run(EVERY)
        synchronise(device)
        samples.append(sample(device))
    return {memory: [s[memory] for s in samples] for memory in samples[0]}


def growth(held: list[int], run_updates: int) -> dict[str, Any]:
    """What a memory's samples say; `run_updates`: of the run that the slope is extended to."""
    half = held[len(held) // 2 :]
    (slope, _), covariance = np.polyfit(EVERY * np.arange(len(half)), half, 1, cov=True)
    error = float(covariance[0, 0]) ** 0.5
    slope = float(slope)  # bytes an update
    grown = slope * EVERY * (len(half) - 1)
    return {
        "start_mib": round(held[0] / 2**20, 1),
        "end_mib": round(held[-1] / 2**20, 1),
        "slope_kib_per_update": round(slope / 2**10, 3),
        "slope_error": round(error / 2**10, 3),
        "grown_in_second_half_mib": round(grown / 2**20, 2),
        "gib_over_the_run": round(slope * run_updates / 2**30, 2),
        "verdict": "flat" if grown < 0.01 * held[-1] else "grows",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("mt10", "mt50", "quick"), default="mt10")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backend", help="default: the fast one of the device", choices=tuple(availability()))
    parser.add_argument("--precision", default="float32", choices=PRECISIONS)
    parser.add_argument("--updates", type=int, default=2000)
    parser.add_argument("--json", type=Path, help="write the rows and every sample here")
    args = parser.parse_args()
    if args.updates < 4 * EVERY:
        parser.error(f"--updates: expected at least {4 * EVERY}, got {args.updates}: a slope needs a few samples")
    backend = args.backend or ("triton" if args.device == "cuda" else "cpp")
    if not availability()[backend].startswith("ready"):
        parser.error(f"backend {backend}: {availability()[backend]}")
    _, preset = PRESETS["quick" if args.suite == "quick" else f"{args.suite}-rand"]
    learner = make_learner(variant_of(preset, backend, args.precision), args.device)
    held = record(learner, args.updates, args.device)
    learner.require_finite()

    run_updates = round(preset.total_steps * preset.updates_per_step)
    variant = {"variant": backend, "suite": args.suite, "device": args.device, "precision": args.precision}
    rows = [variant | {"memory": memory} | growth(values, run_updates) for memory, values in held.items()]
    print(f"{learner.updates} updates, the run of {preset.name}: {run_updates:,}")
    print_table(rows, [name for name in rows[0] if name not in ("suite", "device")])
    peak = {"peak_allocated_mib": round(torch.cuda.max_memory_allocated() / 2**20)} if args.device == "cuda" else {}
    if peak:
        print(f"peak allocated {peak['peak_allocated_mib']} MiB")
    samples = {"every": EVERY, "held_mib": {m: [round(b / 2**20, 2) for b in v] for m, v in held.items()}}
    command = " ".join(["python benches/update_memory.py", *sys.argv[1:]])
    write_report(args.json, command, args.device, rows, updates=learner.updates, **peak, samples=samples)


if __name__ == "__main__":
    main()
