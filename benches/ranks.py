"""One run by several ranks against the same run by one process with as many threads, on one machine, in one run.

    python benches/ranks.py [--preset quick] [--ranks 1,2] [--seconds 120] [--slices 4] [--json FILE]

Every variant is `d2r train` in processes of its own, which are stopped (SIGSTOP) but for the variant whose turn it is,
so that a busy moment of the machine hits all. A variant's updates/s of a slice are those between two records of its
metrics.jsonl, timed when they appear; evaluations and checkpoints are left out, warm-up and replay cut short. Ranks
times threads are the cores of the machine in each variant.
"""

import argparse
import dataclasses
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import print_table, write_report

from d2r_fast.config import RunConfig
from d2r_fast.config_json import config_to_json
from d2r_fast.envs.metaworld import usable_cores
from d2r_fast.presets import PRESETS
from d2r_fast.training.metrics import read_metrics

NEVER = 10**6


def config(preset: str, most_ranks: int, chunk_steps: int | None) -> RunConfig:
    """A run without end, whose environments `most_ranks` ranks can share."""
    cfg = PRESETS[preset][1]
    envs = -(-cfg.env.envs_per_task // most_ranks) * most_ranks
    chunk = -(-(chunk_steps or cfg.chunk_steps) // envs) * envs
    return dataclasses.replace(
        cfg,
        env=dataclasses.replace(cfg.env, envs_per_task=envs),
        eval=dataclasses.replace(cfg.eval, every_chunks=NEVER),
        checkpoint_every_chunks=NEVER,
        chunk_steps=chunk,
        warmup_steps=chunk,
        total_steps=NEVER * chunk,
        replay_capacity=10_000 * cfg.n_tasks,
    )


class Variant:
    """The processes of one run."""

    def __init__(self, config_file: Path, ranks: int, threads: int, run_dir: Path):
        self.name, self.ranks, self.threads = f"{ranks} rank{'s' * (ranks > 1)}, {threads} threads each", ranks, threads
        self._run_dir, self.rates = run_dir, list[float]()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "d2r_fast", "train", str(config_file), "--run-dir", str(run_dir)]
        self._processes = []
        for rank in range(ranks):
            own = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | {name: str(value) for name, value in own.items()}
            environment["OMP_NUM_THREADS"] = str(threads)
            self._processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )

    def send(self, number: int) -> None:
        for process in self._processes:
            os.killpg(process.pid, number)

    def updates(self) -> int:
        """Those that the last record tells of; 0 before there is one."""
        if any(process.poll() is not None for process in self._processes):
            raise RuntimeError(f"{self.name}: a process has ended; try its command by hand")
        if not (self._run_dir / "metrics.jsonl").exists():
            return 0
        return max((record["updates"] for record in read_metrics(self._run_dir, "train")), default=0)

    def next_record(self) -> tuple[int, float]:
        """Updates at the next record, and when it appeared."""
        before = self.updates()
        while (now := self.updates()) == before:
            time.sleep(0.005)
        return now, time.perf_counter()

    def measure(self, seconds: float) -> None:
        """A slice; the variant runs while it is measured, and not else."""
        self.send(signal.SIGCONT)
        first, begin = self.next_record()
        last, end = first, begin
        while end - begin < seconds:
            last, end = self.next_record()
        self.send(signal.SIGSTOP)
        self.rates.append((last - first) / (end - begin))
        print(f"{self.name}: {self.rates[-1]:.1f} updates/s", file=sys.stderr, flush=True)

    def end(self) -> None:
        for process in self._processes:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def row(self, reference: "Variant") -> dict[str, Any]:
        return {
            "variant": self.name,
            "ranks": self.ranks,
            "threads": self.threads,
            "updates_per_s": round(statistics.median(self.rates), 2),
            "updates_per_s_by_slice": [round(rate, 2) for rate in self.rates],
            "ratio_to_reference": round(
                statistics.median(a / b for a, b in zip(self.rates, reference.rates, strict=True)), 3
            ),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2])
    parser.add_argument("--seconds", type=float, default=120, help="time measured, over all variants")
    parser.add_argument("--slices", type=int, default=4, help="of each variant")
    parser.add_argument("--chunk-steps", type=int, help="shorter chunks, for several to fit a slice of a slow machine")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    cfg = config(args.preset, max(args.ranks), args.chunk_steps)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "config.json").write_text(config_to_json(cfg))
        variants = []
        try:
            for ranks in args.ranks:  # one after the other: the warm-up of one must not be in another's way
                variant = Variant(folder / "config.json", ranks, max(1, usable_cores() // ranks), folder / f"{ranks}")
                variants.append(variant)
                while variant.updates() == 0:
                    time.sleep(0.1)
                variant.send(signal.SIGSTOP)
            for _ in range(args.slices):
                for variant in variants:
                    variant.measure(args.seconds / args.slices / len(variants))
        finally:
            for variant in variants:
                variant.end()
    rows = [variant.row(variants[0]) for variant in variants]
    print_table(rows, ["variant", "updates_per_s", "ratio_to_reference"])
    settings = {
        "preset": cfg.name,
        "tasks": cfg.n_tasks,
        "envs_per_task": cfg.env.envs_per_task,
        "rows_an_update": cfg.batch_size,
        "updates_per_step": cfg.updates_per_step,
    }
    command = " ".join(["python benches/ranks.py", *sys.argv[1:]])
    write_report(args.json, command, "cpu", rows, usable_cores=usable_cores(), settings=settings)


if __name__ == "__main__":
    main()
