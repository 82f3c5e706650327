"""The report: one HTML file of one or more runs, which holds all it needs and asks no network."""

import html
import json
import re
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from d2r_fast.analysis.run_data import run_data
from d2r_fast.host.files import whole_file

_PAGE = resources.files("d2r_fast.analysis") / "page"


def write_report(path: Path, run_dirs: Sequence[Path], play: bool = True) -> None:
    """Write the report of `run_dirs` to `path`, whole or not at all.

    play: whether routed networks may play a few episodes each for the picture of their routes, where `d2r routes` has
    not drawn their newest checkpoint yet
    ValueError, FileNotFoundError: a directory is none of a run that has trained. OSError: `path` cannot be written.
    """
    runs = [run_data(run_dir, play) for run_dir in run_dirs]
    data = {"runs": runs, "written": time.strftime("%Y-%m-%d %H:%M")}
    names = [run["name"] for run in runs]
    parts = {
        "title": html.escape(names[0] if len(names) == 1 else f"{len(names)} runs"),
        "style": _text("report.css"),
        # Within a script element only this character can end it.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "plotly": (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8"),
        "script": _text("report.js"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda name: parts[name[1]], _text("report.html"))
    with whole_file(path) as file:
        file.write(page.encode())


def _text(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")
