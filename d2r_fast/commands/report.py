"""`d2r report`: one HTML file of one or more runs."""

import dataclasses
from pathlib import Path

import tyro

from d2r_fast.analysis.report import write_report
from d2r_fast.commands.output import check_output


@dataclasses.dataclass(frozen=True)
class ReportArgs:
    """Write one HTML file of one or more runs that opens without a network: success with intervals, curves over steps
    and time with smoothing and a choice of tasks, the update, routes, time and memory, settings, how to repeat it."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run directories; several are drawn over each other."""
    out: Path | None = None
    """The file; by default RUN/report.html of one run, report.html here of several."""
    routes: bool = True
    """Play a few episodes of a routed network for its routes, unless `d2r routes` has drawn its newest checkpoint."""


def run(args: list[str]) -> int:
    """Write the file and print where it is. ValueError, OSError: no directory of a run, or it cannot be written."""
    wanted = tyro.cli(ReportArgs, prog="d2r report", args=args)
    if not wanted.runs:
        raise ValueError("expected at least one run directory")
    out = wanted.out or (wanted.runs[0] / "report.html" if len(wanted.runs) == 1 else Path("report.html"))
    check_output(out)
    write_report(out, wanted.runs, play=wanted.routes)
    print(f"report     {out} ({out.stat().st_size / 2**20:.1f} MiB)")
    return 0
