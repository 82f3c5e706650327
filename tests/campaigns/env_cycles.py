"""Environments started and stopped over and over, in every way that they may end: is anything left behind?

    python tests/campaigns/env_cycles.py [--count 200] [--seed 0] [--engine envpool|official|mixed]

Each cycle makes environments and ends them, in turn: unused; after whole episodes; with a step under way; forgotten
instead of closed; by an error half way through a call; and, where there are workers, with one of them killed while idle
or while it steps, which must be an error that names a task. After each, this process must have no child, alive or
unwaited for, no more threads, open files and shared memory than before the first; and after all of an engine, which
warms up in its first cycles, no more resident memory but for a margin of 100 MiB (one leaked environment a cycle would
be over 2,000).

--count is for each engine. The last line counts; exit status 1 if anything was left, or a cycle failed or hung.
"""

import argparse
import faulthandler
import gc
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from d2r_fast.envs import MixedEnvs, MultiTaskEnvs, make_envs
from d2r_fast.host.memory import keep_freed_memory

ENGINES = {"envpool": "reach,drawer-close", "official": "dial-turn", "mixed": "reach,dial-turn"}
N, LENGTH = 2, 4
WARM_UP = 5
RESIDENT_MARGIN = 100  # MiB
HANG = 120  # seconds of one cycle, however slow the machine


class Held(NamedTuple):
    """What this process holds."""

    children: int
    threads: int
    files: int
    shared: int  # mappings without a file on a disk: memory shared with workers, and files in /dev/shm


def held() -> Held:
    mappings = Path("/proc/self/maps").read_text()
    shared = mappings.count("memfd:d2r_fast") + mappings.count("/dev/shm/")
    threads, files = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    return Held(len(psutil.Process().children(recursive=True)), threads, files, shared)


def resident_mib() -> float:
    return psutil.Process().memory_info().rss / 2**20


def actions(envs: MultiTaskEnvs) -> np.ndarray:
    return np.zeros((envs.n_tasks, N, 4), np.float32)


def workers(envs: MultiTaskEnvs) -> list[Any]:
    """The worker processes, if the engine has any."""
    parts = [part for part, _ in envs._parts] if isinstance(envs, MixedEnvs) else [envs]
    return [process for part in parts for process in getattr(part, "_processes", [])]


def unused(envs: MultiTaskEnvs, draw: random.Random) -> None:
    envs.close()


def used(envs: MultiTaskEnvs, draw: random.Random) -> None:
    envs.reset()
    for _ in range(2 * LENGTH + 1):
        envs.step(actions(envs))
    envs.close()
    envs.close()


def in_a_step(envs: MultiTaskEnvs, draw: random.Random) -> None:
    envs.reset()
    for _ in range(draw.randrange(LENGTH)):
        envs.step(actions(envs))
    envs.send(actions(envs))
    envs.close()


def forgotten(envs: MultiTaskEnvs, draw: random.Random) -> None:
    envs.reset()
    envs.send(actions(envs))


def by_an_error(envs: MultiTaskEnvs, draw: random.Random) -> None:
    with envs:
        envs.reset()
        try:
            envs.send(np.full((envs.n_tasks, N, 4), np.nan, np.float32))
        except ValueError as error:
            assert "not finite" in str(error)
            return
    raise AssertionError("an action of NaN was taken")


def _kill(envs: MultiTaskEnvs, draw: random.Random, stepping: bool) -> None:
    envs.reset()
    victim = draw.choice(workers(envs))
    if stepping:
        os.kill(victim.pid, signal.SIGSTOP)  # so that it dies before its answer
        envs.send(actions(envs))
    victim.kill()
    try:
        envs.recv() if stepping else envs.step(actions(envs))
    except RuntimeError as error:
        told = str(error)
        assert "at task dial-turn" in told and "exit status -9" in told, told
    else:
        raise AssertionError("a killed worker was not noticed")
    envs.close()


def idle_worker_killed(envs: MultiTaskEnvs, draw: random.Random) -> None:
    _kill(envs, draw, stepping=False)


def stepping_worker_killed(envs: MultiTaskEnvs, draw: random.Random) -> None:
    _kill(envs, draw, stepping=True)


WAYS: list[Callable[[MultiTaskEnvs, random.Random], None]] = [unused, used, in_a_step, forgotten, by_an_error]
WAYS_WITH_WORKERS = [*WAYS, idle_worker_killed, stepping_worker_killed]


def cycle(engine: str, i: int, draw: random.Random) -> str:
    """Make environments and end them in the i-th way; returns its name."""
    ways = WAYS if engine == "envpool" else WAYS_WITH_WORKERS
    way = ways[i % len(ways)]
    goals = "fixed" if draw.random() < 0.3 else "random"
    tasks = ENGINES[engine].split(",")
    way(make_envs(tasks, N, LENGTH, seed=draw.randrange(2**20), engine="auto", goals=goals), draw)
    return way.__name__


def left_behind(before: Held, patience: float = 5.0) -> str:
    """What is more than before, once threads and processes that are ending had their time; empty if nothing."""
    gc.collect()
    until = time.monotonic() + patience
    while True:
        now = held()
        more = [f"{name} {b} to {a}" for name, b, a in zip(Held._fields, before, now, strict=True) if a > b]
        if not more or time.monotonic() > until:
            return ", ".join(more)
        time.sleep(0.05)


def try_engine(engine: str, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """So many cycles; how many of each way, and what went wrong."""
    draw = random.Random(f"{seed} {engine}")
    faulthandler.dump_traceback_later(HANG, exit=True)  # with a thread of its own, from here on
    with make_envs(ENGINES[engine].split(","), N, LENGTH, seed=0) as envs:  # loads what loads once
        envs.reset()
    gc.collect()
    before = held()
    tried: Counter[str] = Counter()
    wrong = []
    resident = []
    for i in range(count):
        faulthandler.dump_traceback_later(HANG, exit=True)
        try:
            tried[cycle(engine, i, draw)] += 1
        except Exception as error:
            wrong.append(f"{engine}, cycle {i}: {type(error).__name__}: {error}")
        if left := left_behind(before):
            wrong.append(f"{engine}, cycle {i}: left behind: {left}")
            before = held()
        resident.append(resident_mib())
    faulthandler.cancel_dump_traceback_later()
    first, last = max(resident[:WARM_UP]), np.median(resident[-WARM_UP:])
    print(
        f"{engine}: resident {first:.0f} MiB after {min(WARM_UP, count)} cycles, {last:.0f} after {count}", flush=True
    )
    if last > first + RESIDENT_MARGIN:
        wrong.append(f"{engine}: resident from {first:.0f} to {last:.0f} MiB")
    return tried, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=tuple(ENGINES))
    args = parser.parse_args()
    keep_freed_memory()  # as training does
    total, n_wrong = 0, 0
    for engine in ENGINES if args.engine is None else [args.engine]:
        tried, wrong = try_engine(engine, args.count, args.seed)
        print(f"{engine}: " + ", ".join(f"{way} {n}" for way, n in tried.items()))
        for line in wrong:
            print(line)
        total, n_wrong = total + args.count, n_wrong + len(wrong)
    print(f"tried {total} starts and stops: {n_wrong} went wrong")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main())
