"""What a call of each operation costs beside its arithmetic: CPU time where the tensors hold next to nothing.

    python benches/call_overhead.py --against ../other-checkout --json benches/results/call_overhead.json

Each checkout runs in a process of its own; batches of calls take turns between them, and the best batch counts: what
else the machine does only adds. With one checkout the times stand alone. Backend cpp, one thread.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from timing import print_table, write_report

from d2r_fast.ops import ensemble_linear, routed_modules, routed_network, select_routes

E, B, N, K, D, T = 1, 4, 4, 2, 8, 2
R = N * (N + 1) // 2
OPERATIONS = ("ensemble_linear", "select_routes", "routed_modules", "routed_network")
DIRECTIONS = ("fwd", "fwd+bwd")
HERE = Path(__file__).resolve()


def make_call(operation: str, direction: str) -> Callable[[], object]:
    """One call: without a gradient; or with the gradient of everything that can have one."""
    torch.manual_seed(0)
    shapes = [(D, D), (D, D), (D, T), (D, D), (N - 1, D, D), (D, D), (D, D), (R, D)]
    weights = [torch.randn(E, *shape) for shape in shapes]
    parameters = [v for w in weights for v in (w, torch.randn(w.shape[:-1]))]
    x, task, h0, logits = torch.randn(B, D), torch.randint(T, (B,)), torch.rand(E, B, D), torch.randn(E, B, R)
    routes = select_routes(logits, K, backend="cpp")
    leaves, run = {
        "ensemble_linear": (
            [h0, *parameters[:2]],
            lambda: ensemble_linear(h0, *parameters[:2], relu=True, backend="cpp"),
        ),
        "select_routes": ([logits], lambda: select_routes(logits, K, backend="cpp").gate),
        "routed_modules": (
            [h0, *parameters[8:10], routes.gate],
            lambda: routed_modules(h0, *parameters[8:10], routes, backend="cpp"),
        ),
        "routed_network": ([x, *parameters], lambda: routed_network(x, task, parameters, K)[0]),
    }[operation]
    if direction == "fwd":
        return run
    cotangent = torch.ones_like(run())
    for leaf in leaves:
        leaf.requires_grad_()
    return lambda: torch.autograd.grad(run(), leaves, cotangent)


def serve() -> None:
    """Answer lines "operation direction calls" with the microseconds of CPU time that a call took."""
    torch.set_num_threads(1)
    calls = {(o, d): make_call(o, d) for o in OPERATIONS for d in DIRECTIONS}
    for line in sys.stdin:
        operation, direction, n_calls = line.split()
        call = calls[operation, direction]
        begin = time.process_time()
        for _ in range(int(n_calls)):
            call()
        print(1e6 * (time.process_time() - begin) / int(n_calls), flush=True)


class Checkout:
    """A process that makes the calls with the package of one checkout."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._process = subprocess.Popen(
            [sys.executable, HERE, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(folder.resolve())},
            text=True,
        )

    def __enter__(self) -> "Checkout":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def us_per_call(self, operation: str, direction: str, n_calls: int) -> float:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # from a process that has ended
            print(operation, direction, n_calls, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._folder}: the process ended before it answered")
        return float(answer)


def measure_pairs(here: Path, against: Path | None, rounds: int, n_calls: int) -> list[dict[str, Any]]:
    """A row for each operation and direction: microseconds here, there, and here over there."""
    rows = []
    with ExitStack() as stack:
        checkouts = {"us": stack.enter_context(Checkout(here))}
        if against is not None:
            checkouts["against_us"] = stack.enter_context(Checkout(against))
        for operation in OPERATIONS:
            for direction in DIRECTIONS:
                best: dict[str, float] = {}
                for _ in range(rounds + 1):  # the first, which warms up, is the slowest
                    for name, checkout in checkouts.items():
                        us = checkout.us_per_call(operation, direction, n_calls)
                        best[name] = min(us, best.get(name, us))
                row: dict[str, Any] = {"operation": operation, "direction": direction}
                row |= {name: round(us, 2) for name, us in best.items()}
                if len(best) == 2:
                    row["ratio"] = round(best["us"] / best["against_us"], 3)
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout, with its library built")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=300, help="in a batch")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve()
        return
    rows = measure_pairs(HERE.parents[1], args.against, args.rounds, args.calls)
    print_table(rows, ["operation", "direction", "us", "against_us", "ratio"])
    sizes = {"E": E, "B": B, "N": N, "K": K, "D": D}
    write_report(args.json, "benches/call_overhead.py", "cpu", rows, sizes=sizes, rounds=args.rounds, calls=args.calls)


if __name__ == "__main__":
    main()
