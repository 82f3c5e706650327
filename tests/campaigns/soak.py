"""An hour of training: does its memory grow?

    python tests/campaigns/soak.py [--minutes 60] [--preset quick] [--bound 1.0] [--json FILE]

Trains in this process, one torch thread beside the collector's, and takes a sample after a chunk every 10 seconds. The
first half is left to fill what fills up. Over the second half a line is fitted to the means of 12 equal spans of time,
because samples next to each other are alike; its slope comes with a 95% interval.

in_use    what the C library holds for the program: a leak shows here
resident  the process's own pages (those of files come and go as the system likes): what is free in one of the C
          library's heaps and of no use to another shows here, too
peak      the most that was ever resident, files included
threads, files, mappings: open at the time

The last line counts what grows: a slope whose interval reaches over --bound MiB a minute (so a run too short or too
noisy to tell fails as well), a peak that rose by over 5%, more threads, files or mappings than at the half. Exit status
1 if anything does.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats

from d2r_fast.config import RunConfig
from d2r_fast.presets import PRESETS
from d2r_fast.training.trainer import Trainer

SPANS = 12


class Sample(NamedTuple):
    """What the process holds at one moment; memory in MiB."""

    minutes: float
    updates: int
    in_use: float
    resident: float
    peak: float
    threads: int
    files: int
    mappings: int


class _Mallinfo2(ctypes.Structure):
    """Of mallinfo2(3)."""

    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


def in_use_mib() -> float:
    """What glibc has handed out, over all of its heaps; NaN where the C library is another or older than 2.33."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        return float("nan")
    libc.mallinfo2.restype = _Mallinfo2
    info = libc.mallinfo2()
    return (info.uordblks + info.hblkhd) / 2**20


def sample(begin: float, updates: int) -> Sample:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident, peak = (int(status[name].split()[0]) / 2**10 for name in ("RssAnon", "VmHWM"))
    mappings = Path("/proc/self/maps").read_text().count("\n")
    threads, files = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    minutes = (time.perf_counter() - begin) / 60
    return Sample(minutes, updates, in_use_mib(), resident, peak, threads, files, mappings)


def soak(cfg: RunConfig, run_dir: Path, minutes: float, every: float = 10.0) -> list[Sample]:
    """Train for so long, or to the run's end; samples behind chunks, `every` seconds apart at least."""
    trainer = Trainer(cfg, run_dir, show_progress=False)
    begin = time.perf_counter()
    samples: list[Sample] = []
    ended = 0
    try:
        while not trainer.finished and (time.perf_counter() - begin) / 60 < minutes:
            trainer.advance()
            due = not samples or time.perf_counter() - begin - samples[-1].minutes * 60 >= every
            if due and trainer._chunks_ended > ended:
                samples.append(sample(begin, trainer.learner.updates))
            ended = trainer._chunks_ended
    finally:
        trainer.close()
    return samples


class Slope(NamedTuple):
    """MiB a minute, with its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f}) MiB a minute"


def slope(minutes: list[float], held: list[float]) -> Slope:
    """Of least squares through the means of `SPANS` equal spans of time. ValueError: fewer than 3 have a sample."""
    at, value = np.array(minutes), np.array(held)
    span = np.minimum((SPANS * (at - at[0]) / (at[-1] - at[0])).astype(int), SPANS - 1)
    spans = np.unique(span)
    if len(spans) < 3:
        raise ValueError(f"expected samples in at least 3 spans of time, got {len(at)} in {len(spans)}")
    fit = stats.linregress(*([of[span == s].mean() for s in spans] for of in (at, value)))
    margin = stats.t.ppf(0.975, len(spans) - 2) * fit.stderr
    return Slope(float(fit.slope), float(fit.slope - margin), float(fit.slope + margin))


def verdict(samples: list[Sample], bound: float) -> tuple[list[str], list[str]]:
    """Lines that say how each memory moved over the second half of the time, and those of them that grow."""
    last = samples[-1].minutes
    half = [s for s in samples if s.minutes >= last / 2]
    said, grown = [], []
    for name in ("in_use", "resident"):
        held = [getattr(s, name) for s in half]
        if np.isnan(held).any():
            said.append(f"{name:<9} not told by this C library")
            continue
        fit = slope([s.minutes for s in half], held)
        said.append(f"{name:<9} {min(held):,.1f} to {max(held):,.1f} MiB, slope {fit}")
        if fit.high > bound:
            grown.append(f"{name}: {fit}, bound {bound}")
    first, end = half[0], half[-1]
    said.append(
        f"peak      {samples[0].peak:,.0f} at the first sample, {first.peak:,.0f} at the half, {end.peak:,.0f} MiB"
    )
    if end.peak > 1.05 * first.peak:
        grown.append(f"peak: from {first.peak:,.0f} to {end.peak:,.0f} MiB in the second half")
    for name, allowed in (("threads", 0), ("files", 0), ("mappings", 100)):
        before, after = getattr(first, name), getattr(end, name)
        said.append(f"{name:<9} {before} at the half, {after} at the end")
        if after > before + allowed:
            grown.append(f"{name}: from {before} to {after}")
    return said, grown


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--preset", choices=tuple(PRESETS), default="quick")
    parser.add_argument("--bound", type=float, default=1.0, help="MiB a minute that the slope's interval may reach")
    parser.add_argument("--json", type=Path, help="write every sample here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    preset = PRESETS[args.preset][1]
    cfg = dataclasses.replace(preset, total_steps=preset.chunk_steps * 10**6)  # ends by the clock
    with tempfile.TemporaryDirectory(prefix="d2r-soak-") as folder:
        samples = soak(cfg, Path(folder) / "run", args.minutes)
    said, grown = verdict(samples, args.bound)
    print("\n".join(said))
    for line in grown:
        print(f"grows: {line}")
    if args.json is not None:
        record: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "said": said, "grown": grown}
        args.json.write_text(json.dumps(record | {"samples": [s._asdict() for s in samples]}) + "\n", encoding="utf-8")
    last = samples[-1]
    print(f"tried {last.minutes:.1f} minutes, {last.updates:,} updates, {len(samples)} samples: {len(grown)} grow")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
