"""Acting for many environments in one batched call: from observations in host memory to actions in host memory.

    python benches/acting.py --device cpu --json benches/results/acting_cpu.json

The collector's own call with the published network: noise, sampled routes, action, routes kept. Environments stand
still; each call ends with its actions here, so the wall clock times it. Variants take turns in one run and are checked
against the reference first. On a GPU: kernel by kernel, and as the captured graph that training replays.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import Run, measure, print_table, write_report

from d2r_fast.envs import MT10, MT50, MultiTaskEnvs, Step
from d2r_fast.nets.agent import Agent
from d2r_fast.ops.backends import availability
from d2r_fast.presets import PRESETS
from d2r_fast.training.collector import Collector

SIZES = ((MT10, 1), (MT50, 1), (MT50, 16))  # tasks, environments a task
COLUMNS = ["variant", "environments", "median_ms", "p10_ms", "p90_ms", "us_per_environment", "ratio_to_reference"]


class StillEnvs(MultiTaskEnvs):
    """Environments that show the same observations for ever."""

    def __init__(self, tasks: tuple[str, ...], envs_per_task: int):
        super().__init__()
        self.tasks, self.envs_per_task, self.episode_length = tasks, envs_per_task, 500
        shape = (len(tasks), envs_per_task, self.obs_size)
        self._obs = np.random.default_rng(0).standard_normal(shape, np.float32)

    def reset(self) -> np.ndarray:
        return self._obs

    def send(self, action: np.ndarray) -> None:
        raise NotImplementedError("nothing is stepped here")

    def recv(self) -> Step:
        raise NotImplementedError("nothing is stepped here")

    def close(self) -> None:
        pass


def make_call(envs: MultiTaskEnvs, device: str, backend: str, cuda_graph: bool) -> Run:
    """One call of acting; it returns the actions [T,n,A]."""
    torch.manual_seed(0)
    net = replace(PRESETS["mt10-rand"][1].net, backend=backend)
    agent = Agent(envs.obs_size, envs.action_size, envs.n_tasks, net).to(device)
    generator = torch.Generator(device).manual_seed(0)
    collector = Collector(envs, agent, torch.device(device), generator, False, cuda_graph)

    def act() -> np.ndarray:
        with torch.no_grad(), torch.cuda.stream(collector._stream):  # None, on the CPU, changes nothing
            return collector._act()[0]

    return act


def check(variants: dict[str, Run]) -> None:
    """Six calls of each, the fourth of them captured; AssertionError where actions differ from the reference's."""
    for _ in range(6):
        first, *others = ((name, run()) for name, run in variants.items())
        for name, action in others:
            # A row whose logits are as good as equal may take another route.
            same = float(np.isclose(action, first[1], atol=1e-3).all(-1).mean())
            assert same > 0.98, f"{name}: {1 - same:.1%} of its actions differ from those of {first[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=200, help="calls measured of each variant")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    fast = "triton" if args.device == "cuda" else "cpp"
    if not availability()[fast].startswith("ready"):
        parser.error(f"backend {fast}: {availability()[fast]}")
    kinds = {"reference": ("reference", False), fast: ("auto", False)}
    if args.device == "cuda":
        kinds |= {"reference, captured": ("reference", True), f"{fast}, captured": ("auto", True)}
    rows: list[dict[str, Any]] = []
    for tasks, envs_per_task in SIZES:
        envs = StillEnvs(tasks, envs_per_task)
        variants = {name: make_call(envs, args.device, *how) for name, how in kinds.items()}
        check(variants)
        samples = measure(variants, "cpu", args.rounds)  # by the wall clock
        n = envs.n_tasks * envs_per_task
        for name, measured in samples.items():
            row = {"variant": name, "suite": f"mt{len(tasks)}", "device": args.device, "precision": "float32"}
            row |= {"environments": n, **measured.as_dict(), "us_per_environment": round(1e3 * measured.median / n, 2)}
            rows.append(row | {"ratio_to_reference": round(samples["reference"].median / measured.median, 2)})
    print_table(rows, COLUMNS)
    write_report(args.json, "python " + " ".join(["benches/acting.py", *sys.argv[1:]]), args.device, rows)


if __name__ == "__main__":
    main()
