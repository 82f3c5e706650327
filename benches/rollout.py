"""Environment steps a second: both engines against Meta-World's own vector environments, on the same cores, in one run.

    python benches/rollout.py --suite mt10 --json benches/results/rollout_mt10_cpu.json

Random actions, float32 observations in and out, episodes of 500 steps. Every variant lives in a process of its own, so
that start-up and memory are its own too. The official environments stay up for the whole run and take turns with each
of our variants, a slice of time each (sync, ours, async, sync, ours, ...): ratios are those of neighbouring slices, for
a busy moment of the machine to hit both. A rate is that of whole episodes: 500 steps and one reset, timed apart.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from d2r_fast.envs import ALL_TASKS, MT10, EnvPoolEnvs
from d2r_fast.envs.metaworld import usable_cores
from d2r_fast.envs.official import OfficialEnvs

SUITES = {"mt10": MT10, "mt50": ALL_TASKS}
# By suite, for each run to take less than six minutes on two cores.
ENVS_PER_TASK = {"mt10": [1, 2, 4, 8], "mt50": [1, 2]}
EPISODE = 500
SYNC = {"variant": "gymnasium sync", "engine": "gymnasium", "strategy": "sync", "envs_per_task": 1, "threads": 1}
MIB_PER_PROCESS, MIB_PER_ENV = 130, 25  # measured, to leave out what would not fit


def main() -> None:
    args = parse_args()
    if args.serve:
        serve(args.suite, json.loads(args.serve))
        return
    suite, cores = args.suite, usable_cores()
    begin = time.perf_counter()
    async_ = SYNC | {"variant": "gymnasium async", "strategy": "async", "threads": len(SUITES[suite])}
    envs_per_task = args.envs_per_task or ENVS_PER_TASK[suite]
    rows: list[dict[str, Any]] = []
    with Variant(suite, SYNC) as sync, Variant(suite, async_) as asynchronous:
        for settings in ours(envs_per_task, cores):
            print(f"{settings['variant']} ...", file=sys.stderr, flush=True)
            if why := too_large(suite, settings):
                rows.append(settings | {"skipped": why})
                continue
            with Variant(suite, settings) as variant:
                for _ in range(args.repeats):
                    for each in (sync, variant, asynchronous):
                        each.measure(args.seconds)
                rows.append(variant.row(sync, asynchronous))
        rows = [sync.row(sync, asynchronous), asynchronous.row(sync, asynchronous), *rows]
    report = {
        "command": f"python benches/rollout.py --suite {suite} --seconds {args.seconds:g} --repeats {args.repeats}"
        f" --envs-per-task {','.join(map(str, envs_per_task))}",
        "versions": {name: version(name) for name in ("envpool", "metaworld", "mujoco", "gymnasium", "numpy")}
        | {"python": platform.python_version()},
        "machine": {"cpu": cpu_name(), "usable_cores": cores},
        "seconds": round(time.perf_counter() - begin),
        "best": [best for engine in ("envpool", "official") if (best := choose(rows, engine))],
        "rows": [{"suite": suite, "device": "cpu", "precision": "float32"} | row for row in rows],
    }
    print_table(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="mt10")
    parser.add_argument("--seconds", type=float, default=1.0, help="stepping time of a slice")
    parser.add_argument("--repeats", type=int, default=4, help="slices of each of our variants")
    parser.add_argument("--envs-per-task", type=lambda text: [int(n) for n in text.split(",")], metavar="N,N,..")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--serve", help=argparse.SUPPRESS)  # what Variant asks of its process
    return parser.parse_args()


def ours(envs_per_task: list[int], cores: int) -> list[dict[str, Any]]:
    """Each engine by environments a task, on one thread (EnvPool: a pool) or worker and on one a core."""
    settings = []
    for engine, unit in [("official", "workers"), ("envpool", "threads a pool")]:
        for n in envs_per_task:
            for threads in sorted({1, cores if engine == "official" else min(cores, n)}):
                name = f"{engine}, {n} a task, {threads} {unit}"
                settings.append({"variant": name, "engine": engine, "envs_per_task": n, "threads": threads})
    return settings


class Variant:
    """Environments in a process of their own, asked for one slice at a time."""

    def __init__(self, suite: str, settings: dict[str, Any]):
        self.settings, self.slices = settings, []
        self.n_envs = len(SUITES[suite]) * settings["envs_per_task"]
        command = [sys.executable, __file__, "--suite", suite, "--serve", json.dumps(settings)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.made = self._answer()

    def measure(self, seconds: float) -> None:
        assert self._process.stdin is not None
        print(seconds, file=self._process.stdin, flush=True)
        self.slices.append(self._answer())

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.settings['variant']}: ended with exit status {self._process.wait()}")
        return json.loads(line)

    def row(self, sync: "Variant", asynchronous: "Variant") -> dict[str, Any]:
        """Medians over the slices; ratios to the slices taken just before and after."""
        row = {key: self.settings[key] for key in ("variant", "engine", "envs_per_task", "threads")}
        for key in ("median_ms", "steps_per_s", "reset_ms"):
            row[key] = round(statistics.median(s[key] for s in self.slices), 3)
        for key, other in [("ratio_to_reference", sync), ("ratio_to_async", asynchronous)]:
            pairs = zip(self.slices[::-1], other.slices[::-1], strict=False)  # the references' newest go with ours
            row[key] = round(statistics.median(a["steps_per_s"] / b["steps_per_s"] for a, b in pairs), 2)
        row |= {key: round(self.made[key], 2) for key in ("startup_s", "memory_mib")}
        return row | {"memory_mib_per_env": round(self.made["memory_mib"] / self.n_envs, 1)}

    def __enter__(self) -> "Variant":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.communicate()  # the end of its input ends it
        assert self._process.returncode == 0 or exc_info[0], self._process.returncode


def serve(suite: str, settings: dict[str, Any]) -> None:
    """In a variant's process: one line of seconds in, one line of JSON out; the first comes unasked."""
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print must not get among the answers
    before, began = memory_mib(), time.perf_counter()
    envs = make(suite, settings)
    envs.reset()
    startup = time.perf_counter() - began
    n_tasks, n = len(SUITES[suite]), settings["envs_per_task"]
    actions = np.random.default_rng(0).uniform(-1, 1, (64, n_tasks, n, 4)).astype(np.float32)
    if settings["engine"] == "gymnasium":
        actions = actions[:, :, 0]
    for action in actions[:10]:
        envs.step(action)
    print(json.dumps({"startup_s": startup, "memory_mib": memory_mib() - before}), file=answers, flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        envs.reset()
        reset_s = time.perf_counter() - began
        step_s: list[float] = []
        while sum(step_s) < float(line) and len(step_s) < EPISODE - 1:  # the last step of an episode holds a reset
            began = time.perf_counter()
            envs.step(actions[len(step_s) % len(actions)])
            step_s.append(time.perf_counter() - began)
        slice_ = {
            "steps_per_s": n_tasks * n * EPISODE / (EPISODE * statistics.mean(step_s) + reset_s),
            "median_ms": 1e3 * statistics.median(step_s),
            "reset_ms": 1e3 * reset_s,
        }
        print(json.dumps(slice_), file=answers, flush=True)
    envs.close()


def make(suite: str, settings: dict[str, Any]) -> Any:
    if settings["engine"] == "gymnasium":
        import gymnasium
        import metaworld  # noqa: F401  (registers the environments)

        return gymnasium.make_vec(f"Meta-World/{suite.upper()}", vector_strategy=settings["strategy"], seed=0)
    if settings["engine"] == "official":
        return OfficialEnvs(SUITES[suite], settings["envs_per_task"], EPISODE, seed=0, n_workers=settings["threads"])
    return EnvPoolEnvs(SUITES[suite], settings["envs_per_task"], EPISODE, seed=0, num_threads=settings["threads"])


def too_large(suite: str, settings: dict[str, Any]) -> str:
    processes = settings["threads"] if settings["engine"] == "official" else 1
    needed = len(SUITES[suite]) * settings["envs_per_task"] * MIB_PER_ENV + processes * MIB_PER_PROCESS
    free = available_mib()
    return f"skipped: needs about {needed} MiB, {free:.0f} MiB are free" if needed > 0.9 * free else ""


def choose(rows: list[dict], engine: str) -> dict[str, Any] | None:
    rows = [row for row in rows if row["engine"] == engine and "skipped" not in row]
    if not rows:
        return None
    fastest = max(row["ratio_to_reference"] for row in rows)
    near = [row for row in rows if row["ratio_to_reference"] >= 0.9 * fastest]
    best = min(near, key=lambda row: (row["envs_per_task"], row["threads"]))
    return {
        "engine": engine,
        "envs_per_task": best["envs_per_task"],
        "threads": best["threads"],
        "why": f"{best['ratio_to_reference']:.2f} x sync, within 10% of the engine's fastest ({fastest:.2f}), with the"
        " fewest environments and then threads: more of them cost memory, and age the policy that a step is taken with",
    }


def print_table(report: dict[str, Any]) -> None:
    cores = report["machine"]["usable_cores"]
    print(f"{report['machine']['cpu']}, {cores} usable cores, {report['seconds']} s in all")
    print(f"{'variant':36} {'steps/s':>8} {'x sync':>7} {'x async':>8} {'start s':>8} {'MiB':>7} {'MiB/env':>8}")
    for row in report["rows"]:
        if "skipped" in row:
            print(f"{row['variant']:36} {row['skipped']}")
            continue
        print(
            f"{row['variant']:36} {row['steps_per_s']:8.0f} {row['ratio_to_reference']:7.2f}"
            f" {row['ratio_to_async']:8.2f} {row['startup_s']:8.1f} {row['memory_mib']:7.0f}"
            f" {row['memory_mib_per_env']:8.1f}"
        )
    for best in report["best"]:
        print(f"best for {best['engine']}: {best['envs_per_task']} a task, {best['threads']} threads. {best['why']}")


def memory_mib() -> float:
    """Of this process and its children; pages that several share count once."""
    here = psutil.Process()
    return sum(process.memory_full_info().pss for process in [here, *here.children(recursive=True)]) / 2**20


def available_mib() -> float:
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    free = psutil.virtual_memory().available
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free / 2**20


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


if __name__ == "__main__":
    main()
