"""What is seen of a sweep while it runs: progress out of growing records, and all runs on a terminal or in a log."""

import io
import json

import pytest
import tiny

from d2r_fast.sweeps.progress import RunProgress
from d2r_fast.sweeps.table import Lines, LiveTable, Row, fitting, summary, table


def record(kind, steps, updates, wall, **more):
    return json.dumps({"kind": kind, "steps": steps, "updates": updates, **more, "time": {"wall": wall}}) + "\n"


def append(path, text):
    with path.open("a") as file:
        file.write(text)


def test_progress_follows_a_growing_file(tmp_path):
    progress, path = RunProgress(tmp_path, tiny.RUN), tmp_path / "metrics.jsonl"
    progress.read()
    assert (progress.steps, progress.total_steps, progress.success, progress.minutes_left) == (0, 100, None, None)
    append(path, record("train", 20, 0, 5.0) + record("train", 30, 5, 10.0))
    progress.read()
    assert (progress.steps, progress.updates, progress.minutes_left) == (30, 5, None)
    append(path, record("eval", 40, 10, 70.0, mean_success=0.25)[:-7])
    progress.read()
    assert (progress.steps, progress.success) == (30, None)  # half a line is none yet
    append(path, record("eval", 40, 10, 70.0, mean_success=0.25)[-7:])
    progress.read()
    assert (progress.steps, progress.updates, progress.success) == (40, 10, 0.25)
    assert progress.minutes_left == pytest.approx(6.0)  # 30 of 40 updates, 5 a minute
    append(path, "no record\n" + record("train", 50, 15, 130.0))
    progress.read()
    assert (progress.steps, progress.success) == (50, 0.25)


def test_progress_of_a_resumed_run(tmp_path):
    progress, path = RunProgress(tmp_path, tiny.RUN), tmp_path / "metrics.jsonl"
    append(path, record("train", 50, 15, 600.0) + record("train", 60, 20, 700.0))
    progress.read()
    path.write_text(record("train", 50, 15, 600.0))  # cut back to its checkpoint
    progress.read()
    assert (progress.steps, progress.minutes_left) == (50, None)
    append(path, record("train", 60, 20, 6.0) + record("train", 70, 25, 12.0))
    progress.read()
    assert progress.minutes_left == pytest.approx(15 * 6 / 5 / 60)  # by the clock of this session


ROWS = [
    Row("net.top_k=1-seed0", "finished", 76_200, 76_200, 36_000, 0.917, 0.0),
    Row("net.top_k=2-seed0", "running", 40_200, 76_200, 18_000, 0.5, 3.14),
    Row("net.top_k=1-seed1", "failed", 4_200, 76_200, 0, None, None),
    Row("net.top_k=2-seed1", "waiting", 0, 76_200, 0, None, None),
]


def test_the_table():
    assert table(ROWS) == [
        "run                state         steps a task  updates  success  minutes left",
        "net.top_k=1-seed0  finished  76,200 of 76,200   36,000     0.92",
        "net.top_k=2-seed0  running   40,200 of 76,200   18,000     0.50           3.1",
        "net.top_k=1-seed1  failed     4,200 of 76,200        0",
        "net.top_k=2-seed1  waiting        0 of 76,200        0",
    ]
    assert summary(ROWS) == "1 finished, 1 waiting, 1 failed, 1 running"


def test_a_low_and_narrow_terminal_shows_those_at_work():
    lines = fitting(ROWS, 30, 5)
    assert [line.split()[0] for line in lines] == ["run", "net.top_k=2-seed0", "net.top_k=1-seed1", "1"]
    assert max(map(len, lines)) == 29
    assert fitting(ROWS, 120, 5)[-1].endswith("(2 not shown)")
    assert len(fitting(ROWS, 120, 7)) == 6


def test_the_live_table_is_drawn_over_itself(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "20")
    out = io.StringIO()
    live = LiveTable(out)
    live.show(ROWS)
    assert out.getvalue() == "\x1b[J" + "\n".join([*table(ROWS), summary(ROWS)]) + "\n"
    live.show(ROWS[:1])
    assert "\x1b[6F\x1b[Jrun " in out.getvalue()
    live.close()
    live.close()
    assert out.getvalue().endswith("(\x1b[3F\x1b[J"[1:])


def test_without_a_terminal_changes_are_lines(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    out = io.StringIO()
    lines = Lines(out)
    lines.show([row._replace(state="waiting") for row in ROWS])
    assert out.getvalue() == ""
    lines.show(ROWS)
    assert out.getvalue().splitlines() == [
        "net.top_k=1-seed0: finished, success 0.92 (1 finished, 1 waiting, 1 failed, 1 running)",
        "net.top_k=2-seed0: running, success 0.50 (1 finished, 1 waiting, 1 failed, 1 running)",
        "net.top_k=1-seed1: failed (1 finished, 1 waiting, 1 failed, 1 running)",
    ]
    lines.show(ROWS)
    assert len(out.getvalue().splitlines()) == 3
    now = 61.0
    lines.show(ROWS)
    assert out.getvalue().splitlines()[3:] == [
        "1 finished, 1 waiting, 1 failed, 1 running; net.top_k=2-seed0 53%",
    ]
