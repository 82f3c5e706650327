"""How many calls that do work one update makes on the CPU, and would make on a GPU; counted without one.

    python benches/launches.py --json benches/results/launches.json

The update is the learner's own at the sizes of each preset. On the CPU it runs, and every call that torch dispatches is
counted; what would run on a GPU is noted (`d2r_fast.kernels.launches` says how, and what counts).
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from timing import print_table, write_report
from update_step import make_learner

from d2r_fast.config import RunConfig
from d2r_fast.kernels.launches import KINDS, SUITES, Call, RecordCalls, calls_on_gpu, suite_config
from d2r_fast.ops.backends import INTERPRETED, PRECISIONS


def calls_on_cpu(cfg: RunConfig) -> list[Call]:
    """The calls of one update that do work on the CPU."""
    learner = make_learner(replace(cfg, net=replace(cfg.net, backend="cpp")), "cpu")
    learner.run(1)  # makes tables that are kept
    with RecordCalls(pretends=False) as recorder:
        learner.run(1)
    return recorder.calls


def as_row(suite: str, path: str, precision: str, made: Iterable[Call]) -> dict[str, Any]:
    """One line of the report: calls by kind, their sum, and by name, the most frequent first."""
    calls = Counter((call.kind, call.name) for call in made)
    row: dict[str, Any] = {"suite": suite, "path": path, "precision": precision}
    row |= {kind: sum(n for (of, _), n in calls.items() if of == kind) for kind in KINDS}
    return row | {"total": calls.total(), "calls": {name: n for (_, name), n in calls.most_common()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, under which no kernel is launched")
    rows = []
    for suite in SUITES:
        rows.append(as_row(suite, "cpu", "float32", calls_on_cpu(suite_config(suite, "float32"))))
        for precision in PRECISIONS:
            rows.append(as_row(suite, "gpu", precision, calls_on_gpu(suite_config(suite, precision))))
    print_table(rows, [column for column in rows[0] if column != "calls"])
    write_report(args.json, "python " + " ".join(["benches/launches.py", *sys.argv[1:]]), "cpu", rows)


if __name__ == "__main__":
    main()
