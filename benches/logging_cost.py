"""What logging costs training: a chunk's record written to metrics.jsonl alone, for TensorBoard too, for W&B too.

    python benches/logging_cost.py --json benches/results/logging_cost_cpu.json

A run of the preset, a few chunks long, gives the record and a chunk's time, without evaluations and saves. Then the
record is written in each of the three ways in turn. `wall_ms` is what training waits for. W&B, offline here, goes on
behind it, in a thread and a process of its own: `cpu_ms` is all the processor time that a record takes, of this process
and of W&B's, and what it could take from the learner where every core is busy.
"""

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from timing import print_table, write_report

from d2r_fast.config import LogConfig
from d2r_fast.config_json import load_config
from d2r_fast.presets import PRESETS
from d2r_fast.training.metrics import MetricsLog, read_metrics
from d2r_fast.training.trainer import Trainer
from d2r_fast.training.wandb_log import WandbLog

WAYS = ("metrics.jsonl", "and TensorBoard", "and W&B offline")


class NoBoard:
    """In TensorBoard's place, where it is left out."""

    def write(self, steps: int, numbers: dict[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record, chunk_ms = a_chunk(args.preset, args.chunks, Path(folder) / "run")
        rows = [row | {"preset": args.preset} for row in write(record, args.rounds, Path(folder))]
    for row in rows:
        row["wall_share"], row["cpu_share"] = (round(row[f"{of}_ms"] / chunk_ms, 6) for of in ("wall", "cpu"))
    print_table(rows, ["way", "wall_ms", "cpu_ms", "wall_share", "cpu_share"])
    print(f"shares are of a chunk's {chunk_ms:.0f} ms")
    command = f"python benches/logging_cost.py {' '.join(sys.argv[1:])}".strip()
    load = round(os.getloadavg()[0], 1)
    write_report(args.json, command, "cpu", rows, chunk_ms=round(chunk_ms, 1), rounds=args.rounds, load_average=load)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quick")
    parser.add_argument("--chunks", type=int, default=12, help="chunks to train, the warm-up's not counted")
    parser.add_argument("--rounds", type=int, default=300, help="records written each way")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def a_chunk(preset: str, n_chunks: int, run_dir: Path) -> tuple[dict[str, Any], float]:
    """The last record of a short run, and the median of its chunks' times in ms."""
    cfg = load_config(preset)
    steps = cfg.chunk_steps
    never = dataclasses.replace(cfg.eval, every_chunks=10**6, episodes=1, envs_per_task=1)
    cfg = dataclasses.replace(cfg, warmup_steps=steps, total_steps=n_chunks * steps, eval=never, device="cpu")
    Trainer(cfg, run_dir, show_progress=False).run()
    records = read_metrics(run_dir, "train")[2:]  # without the warm-up, and the first updates
    seconds = [steps * cfg.n_tasks / record["time"]["steps_per_s"] for record in records]
    return records[-1], 1e3 * statistics.median(seconds)


def write(record: dict[str, Any], rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A row for each way: the medians of `rounds` writes."""
    tasks = tuple(f"task-{i}" for i in range(len(record["episodes"])))
    dirs = [folder / str(i) for i in range(len(WAYS))]
    for run_dir in dirs:
        run_dir.mkdir()
    wandb = WandbLog(LogConfig(wandb="offline"), dirs[2], "0" * 32, {})
    logs = [MetricsLog(dirs[0], tasks), MetricsLog(dirs[1], tasks), MetricsLog(dirs[2], tasks, wandb=wandb)]
    logs[0]._board = NoBoard()  # type: ignore[assignment]
    wall: dict[str, list[float]] = {way: [] for way in WAYS}
    cpu = dict.fromkeys(WAYS, 0.0)
    for i in range(rounds):
        for way, log in zip(WAYS, logs, strict=True):
            before = processor_seconds()
            begin = time.perf_counter()
            log.write(record | {"steps": record["steps"] + i})
            wall[way].append(time.perf_counter() - begin)
            time.sleep(0.02)  # until W&B has it, so that it is counted here and nothing else
            cpu[way] += processor_seconds() - before
    for log in logs:
        log.close()
    return [
        {
            "way": way,
            "wall_ms": round(1e3 * statistics.median(wall[way]), 4),
            "p90_ms": round(1e3 * statistics.quantiles(wall[way], n=10)[-1], 4),
            "cpu_ms": round(1e3 * cpu[way] / rounds, 4),
        }
        for way in WAYS
    ]


def processor_seconds() -> float:
    """Of this process so far, and of W&B's."""
    children = sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children())
    return time.process_time() + children


if __name__ == "__main__":
    main()
