"""Where an update's time goes on a GPU: every kernel of a captured update, in the order in which they start.

    python benches/update_kernels.py --suites mt10,mt50 --precisions tf32,bf16 --json benches/results/CARD/kernels.json

`us` is the median of single replays between two events, `us_in_a_row` the mean of many replays one after another, as
training makes them. A kernel's time is the median over the replays in a trace; `idle_us` is how long nothing ran before
it began. Kernels overlap, for an update has a branch beside its main line: their sum `kernels_us` may be more than an
update takes.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from timing import measure, print_table, write_report
from update_step import make_learner, variant_of

from d2r_fast.kernels.launches import SUITES
from d2r_fast.learning.learner import Learner
from d2r_fast.ops.backends import PRECISIONS
from d2r_fast.presets import PRESETS

TRACED = 10
"""Updates in a trace."""


def captured_learner(suite: str, precision: str) -> Learner:
    """A learner whose update is a graph."""
    learner = make_learner(variant_of(PRESETS[SUITES[suite]][1], "triton", precision), "cuda")
    learner.run(10)
    learner.wait()
    return learner


def trace_of(learner: Learner) -> list[dict[str, Any]]:
    """The kernels of one update, in their order. ValueError: updates did not run the same kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(TRACED):
            learner.run(1)
        torch.cuda.synchronize()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        trace.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    events = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events.sort(key=lambda event: event["ts"])
    n, rest = divmod(len(events), TRACED)
    if rest or n == 0:
        raise ValueError(f"expected as many kernels in each of {TRACED} updates, got {len(events)} in all")
    updates = [_by_occurrence(events[i * n : (i + 1) * n]) for i in range(TRACED)]
    if any(update.keys() != updates[0].keys() for update in updates):
        raise ValueError(f"expected the same kernels in each of {TRACED} updates")
    kernels = [_kernel([update[of] for update in updates]) for of in updates[0]]
    return sorted(kernels, key=lambda kernel: kernel["start_us"])


Occurrence = tuple[str, tuple[int, ...], int]
"""A kernel's name, its grid, and how many such an update started before."""


def _by_occurrence(events: list[dict[str, Any]]) -> dict[Occurrence, dict[str, Any]]:
    """The kernels of an update, which start in about one order, not in one: those of a branch beside others. To each
    its start after the update's, and for how long nothing ran before."""
    found: dict[Occurrence, dict[str, Any]] = {}
    begin = end = events[0]["ts"]
    for event in events:
        of = event["name"], tuple(event.get("args", {}).get("grid", ()))
        number = sum(other[:2] == of for other in found)
        found[(*of, number)] = event | {"start": event["ts"] - begin, "idle": max(0.0, event["ts"] - end)}
        end = max(end, event["ts"] + event["dur"])
    return found


def _kernel(events: list[dict[str, Any]]) -> dict[str, Any]:
    """One kernel of all updates."""
    facts = events[0].get("args", {})
    return {
        "kernel": _short(events[0]["name"]),
        "grid": "x".join(map(str, facts.get("grid", []))),
        "start_us": round(median(event["start"] for event in events), 2),
        "us": round(median(event["dur"] for event in events), 2),
        "idle_us": round(median(event["idle"] for event in events), 2),
        "registers": facts.get("registers per thread"),
        "shared": facts.get("shared memory"),
    }


def _short(name: str) -> str:
    """Of one of ours without its ending; of torch's templates, where they begin."""
    return name.removesuffix("_kernel") if name.endswith("_kernel") else name[:60]


def by_kernel(kernels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Sums over an update's launches, longest first."""
    groups = defaultdict(list)
    for kernel in kernels:
        groups[kernel["kernel"]].append(kernel)
    for name, group in sorted(groups.items(), key=lambda pair: -sum(k["us"] for k in pair[1])):
        yield {"kernel": name, "launches": len(group), "us": round(sum(k["us"] for k in group), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", default="mt10,mt50", help=f"comma separated, of {', '.join(SUITES)}")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="comma separated")
    parser.add_argument("--rounds", type=int, default=200, help="replays measured")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    rows = []
    for of in product(args.suites.split(","), args.precisions.split(",")):
        learner = captured_learner(*of)
        times = measure({"one": lambda learner=learner: learner.run(1)}, "cuda", args.rounds)["one"]
        in_a_row = measure({"many": lambda learner=learner: learner.run(args.rounds)}, "cuda", 3)["many"].median
        try:
            kernels = trace_of(learner)
        except ValueError as error:
            print(f"{', '.join(of)}: {error}")
            kernels = []
        learner.require_finite()
        row = dict(zip(("suite", "precision"), of, strict=True))
        row |= {"captured": learner._one_update.is_captured, "us": round(1e3 * times.median, 1)}
        row |= {"p10_us": round(1e3 * times.quantile(0.1), 1), "p90_us": round(1e3 * times.quantile(0.9), 1)}
        row |= {"us_in_a_row": round(1e3 * in_a_row / args.rounds, 1), "launches": len(kernels)}
        row |= {"kernels_us": round(sum(k["us"] for k in kernels), 1)}
        rows.append(row | {"kernels": kernels})
        print(f"\n{', '.join(of)}: {row['us_in_a_row']} us an update")
        sums = list(by_kernel(kernels))
        print_table(sums, list(sums[0]) if sums else [])
    print()
    print_table(rows, [name for name in rows[0] if name != "kernels"])
    write_report(args.json, "python " + " ".join(["benches/update_kernels.py", *sys.argv[1:]]), "cuda", rows)


if __name__ == "__main__":
    main()
