"""`d2r compare`: finished runs, grouped by setting, held against each other."""

import dataclasses
import json
import platform
from pathlib import Path

import torch
import tyro

from d2r_fast.analysis.comparison import compare, group_runs, markdown
from d2r_fast.analysis.comparison_pictures import draw_curves, draw_tasks
from d2r_fast.analysis.finished_runs import find_runs, read_run
from d2r_fast.analysis.pictures import save_pictures
from d2r_fast.commands.output import check_output, write_output


@dataclasses.dataclass(frozen=True)
class CompareArgs:
    """Hold finished runs against each other, grouped by what they were set to: success with 95% intervals over seeds,
    interquartile mean, area under the curve, chance that one group beats another, steps and minutes to a success, every
    task."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories, or directories of them, such as a sweep's."""
    by: tuple[str, ...] = ()
    """Settings that tell groups apart though they decide nothing that is learnt, such as name or net.backend."""
    until: int | None = None
    """Look at the first so many steps a task of each run: for runs of different length."""
    thresholds: tuple[float, ...] = (0.5, 0.8)
    """Mean success whose first crossing is timed."""
    steps_only: bool = False
    """Draw curves over steps alone: of runs whose minutes do not compare, on several machines or beside other work."""
    out: Path | None = None
    """A directory for compare.json, compare.md, compare.png (curves) and compare_tasks.png."""


def run(args: list[str]) -> int:
    """Print the tables, and leave them where asked. ValueError, OSError: no finished runs that can be compared."""
    wanted = tyro.cli(CompareArgs, prog="d2r compare", args=args)
    if not wanted.runs:
        raise ValueError("expected at least one run directory")
    if any(not 0 < threshold <= 1 for threshold in wanted.thresholds):
        raise ValueError(f"--thresholds: expected rates within (0, 1], got {wanted.thresholds}")
    if wanted.out is not None:
        wanted.out.mkdir(parents=True, exist_ok=True)
        check_output(wanted.out / "compare.json")
    runs = [read_run(path, wanted.until) for path in find_runs(wanted.runs)]
    groups = group_runs(runs, wanted.by, wanted.until)
    result = compare(groups, wanted.thresholds)
    print(markdown(result), end="")
    if wanted.out is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        report = {"command": " ".join(["d2r compare", *args]), "versions": versions, **result}
        write_output(wanted.out / "compare.json", json.dumps(report, indent=1) + "\n")
        write_output(wanted.out / "compare.md", markdown(result))
        pictures = {"compare.png": draw_curves(groups, not wanted.steps_only), "compare_tasks.png": draw_tasks(result)}
        for path in (wanted.out / "compare.json", wanted.out / "compare.md", *save_pictures(wanted.out, pictures)):
            print(f"written    {path}")
    return 0
