"""What a run was trained with stands in its directory, for every stretch of its steps."""

import dataclasses
import json
import platform
import shutil
from pathlib import Path

import tiny
import torch

from d2r_fast.cli import main
from d2r_fast.training import sessions
from d2r_fast.training.sessions import read_sessions, record_session
from d2r_fast.training.trainer import Trainer

CPU = torch.device("cpu")


def test_every_start_is_recorded_with_its_own_versions(tmp_path, monkeypatch):
    run = tmp_path / "run"
    assert Trainer(dataclasses.replace(tiny.RUN, total_steps=40), run, show_progress=False).run()
    (first,) = read_sessions(run)
    assert first["versions"]["torch"] == torch.__version__
    assert first["versions"]["python"] == platform.python_version()
    assert {"numpy", "metaworld", "envpool"} <= first["versions"].keys()
    assert (first["steps"], first["ranks"]) == (0, 1) and " core" in first["machine"]
    real = torch.__version__
    monkeypatch.setattr(sessions.torch, "__version__", "99.0")
    assert main(["train", "--resume", str(run), "--total-steps", "60"]) == 0
    assert [(s["steps"], s["versions"]["torch"]) for s in read_sessions(run)] == [(0, real), (60, "99.0")]


def test_a_session_that_was_undone_does_not_count(tmp_path):
    for steps, ranks in ((0, 1), (40, 2), (80, 3), (40, 4)):
        record_session(tmp_path, steps, CPU, ranks)
    assert [(s["steps"], s["ranks"]) for s in read_sessions(tmp_path)] == [(0, 1), (40, 4)]
    record_session(tmp_path, 0, CPU, 5)  # begun again
    assert [s["ranks"] for s in read_sessions(tmp_path)] == [5]


def test_lines_that_cannot_be_read_are_left_out(tmp_path):
    record_session(tmp_path, 0, CPU, 1)
    path = tmp_path / sessions.FILE
    good = json.loads(path.read_text())
    wrong = [good | {"steps": "9"}, good | {"versions": None}, good | {"versions": {"torch": 2}}, {}, [1], None]
    with path.open("ab") as file:
        file.write("".join(json.dumps(line) + "\n" for line in wrong).encode() + b'\xff\n{"at": "2026')
    record_session(tmp_path, 40, CPU, 2)
    assert [s["ranks"] for s in read_sessions(tmp_path)] == [1, 2]


def test_a_run_of_an_earlier_version_has_none_until_it_goes_on(tmp_path):
    run = shutil.copytree(Path(__file__).parents[1] / "data" / "format2", tmp_path / "run")
    assert read_sessions(run) == []
    assert main(["train", "--resume", str(run)]) == 0
    (session,) = read_sessions(run)
    assert session["steps"] > 0
