"""All runs of a sweep on a terminal: a table that is drawn over itself, or lines where there is no terminal."""

import shutil
import time
from collections import Counter
from typing import Literal, NamedTuple, TextIO

State = Literal["running", "waiting", "stopped", "failed", "finished"]
# Where a terminal is too low for all, those of the first states here stay.
_FIRST: dict[State, int] = {"running": 0, "failed": 1, "stopped": 2, "waiting": 3, "finished": 4}
# Without a terminal, seconds from one line on all runs to the next.
_SUMMARY_EVERY = 60.0


class Row(NamedTuple):
    """A run as the table shows it: steps a task, updates, mean success at its last evaluation, minutes it will take."""

    name: str
    state: State
    steps: int
    total_steps: int
    updates: int
    success: float | None
    minutes_left: float | None


def table(rows: list[Row]) -> list[str]:
    """A line of headings and one a run, columns aligned."""
    cells = [("run", "state", "steps a task", "updates", "success", "minutes left")]
    for row in rows:
        left = f"{row.minutes_left:,.1f}" if row.state == "running" and row.minutes_left is not None else ""
        success = "" if row.success is None else f"{row.success:.2f}"
        steps = f"{row.steps:,} of {row.total_steps:,}"
        cells.append((row.name, row.state, steps, f"{row.updates:,}", success, left))
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    words = 2  # columns, from the left; numbers stand to the right
    return [
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]


def summary(rows: list[Row]) -> str:
    """`3 finished, 2 running, 1 waiting`, as far as there are such."""
    counts = Counter(row.state for row in rows)
    return ", ".join(f"{counts[state]} {state}" for state in sorted(counts, key=_FIRST.__getitem__, reverse=True))


def fitting(rows: list[Row], width: int, height: int) -> list[str]:
    """The table and the summary within `height` lines of `width` characters; of more runs, those at work."""
    most = max(1, height - 3)  # headings, summary, and the line that the cursor stands on
    if len(rows) > most:
        kept = sorted(range(len(rows)), key=lambda i: (_FIRST[rows[i].state], i))[:most]
        shown = [rows[i] for i in sorted(kept)]
    else:
        shown = rows
    hidden = len(rows) - len(shown)
    return [line[: width - 1] for line in [*table(shown), summary(rows) + (f" ({hidden} not shown)" if hidden else "")]]


class LiveTable:
    """Draws the table over the one before."""

    def __init__(self, out: TextIO):
        self._out, self._drawn = out, 0

    def show(self, rows: list[Row]) -> None:
        width, height = shutil.get_terminal_size()
        lines = fitting(rows, width, height)
        up = f"\x1b[{self._drawn}F" if self._drawn else ""
        self._out.write(up + "\x1b[J" + "".join(f"{line}\n" for line in lines))
        self._out.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        """Take the table away."""
        self._out.write(f"\x1b[{self._drawn}F\x1b[J" if self._drawn else "")
        self._out.flush()
        self._drawn = 0


class Lines:
    """Tells of a run when its state changes, and of all now and then."""

    def __init__(self, out: TextIO):
        self._out, self._states, self._told = out, dict[str, State](), time.monotonic()

    def show(self, rows: list[Row]) -> None:
        for row in rows:
            if self._states.get(row.name, "waiting") != row.state:
                success = "" if row.success is None else f", success {row.success:.2f}"
                self._out.write(f"{row.name}: {row.state}{success} ({summary(rows)})\n")
            self._states[row.name] = row.state
        if time.monotonic() - self._told >= _SUMMARY_EVERY:
            self._told = time.monotonic()
            at_work = (f"{row.name} {row.steps / row.total_steps:.0%}" for row in rows if row.state == "running")
            self._out.write("; ".join([summary(rows), *at_work]) + "\n")
        self._out.flush()

    def close(self) -> None:
        """Nothing is left to take away."""
