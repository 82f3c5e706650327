"""Training end to end, collecting overlapped with learning against taking turns: rates and idle shares, in one run.

    python benches/training.py --suite mt10 --preset quick --seconds 60 --json benches/results/training_quick_cpu.json

Two whole trainers of one seed take turns, a slice of time each, so that a busy moment of the machine hits both; with
--threads, one pair for each number of learner threads. A slice consists of whole chunks, from one that was handed over
to another, without evaluations and checkpoints; the first of a slice is not timed. Ratios are those of neighbouring
slices. Warm-up and replay are cut short.
"""

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from timing import Samples, print_table, write_report

from d2r_fast.config import RunConfig
from d2r_fast.envs.metaworld import usable_cores
from d2r_fast.presets import PRESETS
from d2r_fast.training.progress import Waits
from d2r_fast.training.trainer import Trainer

PRESET_OF_SUITE = {"mt10": "mt10-rand", "mt25": "mt25-rand", "mt50": "mt50-rand"}
NEVER = 10**6
COLUMNS = ["variant", "steps_per_s", "updates_per_s", "learner_idle", "collector_idle", "median_ms", "p10_ms", "p90_ms"]


def main() -> None:
    args = parse_args()
    cfg = config(args)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        variants = [
            Variant(cfg, overlap, threads, Path(folder) / f"{overlap}-{threads}")
            for threads, overlap in itertools.product(args.threads, (False, True))
        ]
        try:
            for variant in variants:
                variant.warm_up()
            seconds = args.seconds / (args.slices * len(variants))
            for _ in range(args.slices):
                for variant in variants:
                    variant.measure(seconds)
                    print(variant.describe_last(), file=sys.stderr, flush=True)
        finally:
            for variant in variants:
                variant.trainer.close()
    rows = [variant.row(args.suite, variants[0]) for variant in variants]
    print_table(rows, [*COLUMNS, "ratio_to_reference"])
    print("median_ms, p10_ms, p90_ms: wall time an update; ratio_to_reference: steps/s over those of the first line")
    write_report(
        args.json,
        " ".join(["python benches/training.py", *sys.argv[1:]]),
        variants[0].trainer.device.type,
        rows,
        seconds=round(time.perf_counter() - begin),
        usable_cores=usable_cores(),
        settings={
            "preset": cfg.name,
            "tasks": cfg.n_tasks,
            "envs_per_task": cfg.env.envs_per_task,
            "rows_an_update": cfg.batch_size,
            "updates_per_step": cfg.updates_per_step,
            "chunk_steps": cfg.chunk_steps,
            "replay_capacity": cfg.replay_capacity,
        },
    )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=PRESET_OF_SUITE, default="mt10")
    parser.add_argument("--preset", choices=PRESETS, help="instead of the suite's published settings")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=float, default=60, help="time measured, over all variants")
    parser.add_argument("--slices", type=int, default=3, help="of each variant")
    parser.add_argument(
        "--chunk-steps", type=int, help="shorter chunks, for whole ones to fit a slice of a slow machine"
    )
    parser.add_argument(
        "--threads", type=lambda text: [int(n) for n in text.split(",")], default=[torch.get_num_threads()]
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser.parse_args()


def config(args: argparse.Namespace) -> RunConfig:
    preset = PRESETS[args.preset or PRESET_OF_SUITE[args.suite]][1]
    chunk = args.chunk_steps or preset.chunk_steps
    return dataclasses.replace(
        preset,
        device=args.device,
        eval=dataclasses.replace(preset.eval, every_chunks=NEVER),
        checkpoint_every_chunks=NEVER,
        chunk_steps=chunk,
        warmup_steps=chunk,
        total_steps=NEVER * chunk,
        replay_capacity=min(preset.replay_capacity, 10_000 * preset.n_tasks),
    )


class Variant:
    """One trainer and what was measured of it."""

    def __init__(self, cfg: RunConfig, overlap: bool, threads: int, run_dir: Path):
        self.cfg, self.threads, self.overlap = cfg, threads, overlap
        self.name = f"{'overlapped' if overlap else 'taking turns'}, {threads} learner threads"
        self.trainer = Trainer(dataclasses.replace(cfg, overlap=overlap), run_dir, show_progress=False)
        self.slices: list[Waits] = []
        self.chunks: list[int] = []
        self.others: list[float] = []  # cores that other processes kept busy meanwhile

    def _next_chunk(self) -> None:
        """Up to the moment at which the next chunk is in the replay."""
        before = self.trainer.steps
        while self.trainer.steps == before:
            self.trainer.advance()

    def warm_up(self) -> None:
        torch.set_num_threads(self.threads)
        for _ in range(3):
            self._next_chunk()
        self.trainer.settle()

    def measure(self, seconds: float) -> None:
        torch.set_num_threads(self.threads)
        self._next_chunk()
        before, begin, own, all_ = self._waits(), time.perf_counter(), time.process_time(), busy_seconds()
        chunks = 0
        while chunks == 0 or self._waits().wall - before.wall < seconds:
            self._next_chunk()
            chunks += 1
        foreign = (busy_seconds() - all_) - (time.process_time() - own)
        self.others.append(max(0.0, foreign) / (time.perf_counter() - begin))
        self.slices.append(Waits(*(a - b for a, b in zip(self._waits(), before, strict=True))))
        self.chunks.append(chunks)
        self.trainer.settle()  # nothing of this variant may run in the other one's slice

    def _waits(self) -> Waits:
        return self.trainer.idle or Waits()

    def steps_per_s(self) -> list[float]:
        """Of all tasks together, by slice."""
        per_chunk = self.cfg.chunk_steps * self.cfg.n_tasks
        return [n * per_chunk / s.wall for n, s in zip(self.chunks, self.slices, strict=True)]

    def describe_last(self) -> str:
        return (
            f"{self.name}: {self.steps_per_s()[-1]:.0f} steps/s, idle: {self.slices[-1]}, {self.chunks[-1]} chunks, "
            f"{self.others[-1]:.1f} cores busy with other processes"
        )

    def row(self, suite: str, reference: "Variant") -> dict[str, Any]:
        rates = self.steps_per_s()
        updates_a_step = self.cfg.updates_per_step / self.cfg.n_tasks
        shares = [s.shares() for s in self.slices]
        return {
            "variant": self.name,
            "suite": suite,
            "device": self.trainer.device.type,
            "precision": self.cfg.net.precision,
            "learner_threads": self.threads,
            "overlap": self.overlap,
            "steps_per_s": round(statistics.median(rates), 1),
            "updates_per_s": round(statistics.median(rates) * updates_a_step, 2),
            **{key: round(statistics.median(s[key] for s in shares), 3) for key in ("learner_idle", "collector_idle")},
            **Samples([1e3 / (rate * updates_a_step) for rate in rates]).as_dict(),
            "chunks": sum(self.chunks),
            "steps_per_s_by_slice": [round(rate, 1) for rate in rates],
            "cores_busy_elsewhere_by_slice": [round(n, 2) for n in self.others],
            "ratio_to_reference": round(
                statistics.median(a / b for a, b in zip(rates, reference.steps_per_s(), strict=True)), 3
            ),
        }


def busy_seconds() -> float:
    """Core seconds that all processes of the machine have used so far."""
    times = psutil.cpu_times()
    return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice  # guest is part of user


if __name__ == "__main__":
    main()
