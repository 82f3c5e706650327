"""A sweep's folder: what is written there, and what a sweep that goes on has left to do."""

import json
import shutil

import pytest
import tiny

from d2r_fast.config_json import config_to_json, read_config
from d2r_fast.sweeps.folder import create_sweep, read_sweep
from d2r_fast.sweeps.plan import PlannedRun
from d2r_fast.training.checkpoint import checkpoint_path

PLANNED = [PlannedRun(name, tiny.RUN) for name in ("seed0", "seed1", "seed2")]


@pytest.fixture
def sweep(tmp_path):
    return create_sweep(tmp_path / "sweep", ["quick", "--seeds", "0-2"], 2, 0.5, PLANNED)


def end(sweep, name):
    """Make the files that tell that a run has ended."""
    path = checkpoint_path(sweep.run_dir(name), tiny.RUN.warmup_steps + tiny.RUN.total_steps)
    path.parent.mkdir(parents=True)
    path.touch()


def test_a_sweep_is_read_as_it_was_written(sweep):
    sweep.runs[1].failure = "ended with status 1"
    sweep.save()
    again = read_sweep(sweep.folder)
    assert again == sweep
    assert {path.name for path in sweep.folder.iterdir()} == {"sweep.json", "configs", "logs"}
    assert read_config(sweep.config("seed1")) == tiny.RUN
    assert json.loads((sweep.folder / "sweep.json").read_text())["command"] == ["quick", "--seeds", "0-2"]


def test_a_moved_sweep_goes_on_where_it_is(sweep, tmp_path):
    shutil.move(sweep.folder, tmp_path / "elsewhere")
    moved = read_sweep(tmp_path / "elsewhere")
    assert moved.train_args("seed0") == [
        *("train", str(tmp_path / "elsewhere/configs/seed0.json")),
        *("--run-dir", str(tmp_path / "elsewhere/seed0")),
    ]


def test_a_folder_in_use_is_refused(sweep, tmp_path):
    with pytest.raises(FileExistsError, match=r"^--out: .* exists and is not empty; .*: --resume .*sweep$"):
        create_sweep(sweep.folder, [], 1, 0, PLANNED)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match=r"^--out: "):
        create_sweep(tmp_path / "file", [], 1, 0, PLANNED)
    (tmp_path / "empty").mkdir()
    create_sweep(tmp_path / "empty", [], 1, 0, PLANNED)


def test_what_there_is_to_do(sweep):
    assert [run.name for run in sweep.to_do(False)] == ["seed0", "seed1", "seed2"]
    end(sweep, "seed0")
    sweep.runs[1].failure = "ended with status 1"
    sweep.note_finished()
    assert [run.finished for run in sweep.runs] == [True, False, False]
    assert [run.name for run in sweep.to_do(False)] == ["seed2"]
    assert [run.name for run in sweep.to_do(True)] == ["seed1", "seed2"]


def test_what_fails_behind_its_last_step_has_failed(sweep):
    end(sweep, "seed1")
    sweep.runs[1].failure = "exit status 1: d2r train: [Errno 28] No space left on device: 'report.html'"
    sweep.note_finished()
    assert not sweep.runs[1].finished


def test_finished_runs_stay_so_without_their_checkpoints(sweep):
    end(sweep, "seed0")
    sweep.note_finished()
    sweep.save()
    shutil.rmtree(sweep.run_dir("seed0"))
    again = read_sweep(sweep.folder)
    again.note_finished()
    assert [run.name for run in again.to_do(True)] == ["seed1", "seed2"]


def test_a_run_begins_or_goes_on(sweep):
    run_dir = sweep.run_dir("seed0")
    begin = ["train", str(sweep.config("seed0")), "--run-dir", str(run_dir)]
    go_on = ["train", "--resume", str(run_dir)]
    assert sweep.train_args("seed0") == begin
    run_dir.mkdir()
    (run_dir / "run_id").touch()  # killed while it began
    assert sweep.train_args("seed0") == begin
    (run_dir / "config.json").write_text(config_to_json(tiny.RUN))
    assert sweep.train_args("seed0") == go_on
    (run_dir / "config.json").unlink()
    checkpoint_path(run_dir, 10).parent.mkdir()
    checkpoint_path(run_dir, 10).touch()
    assert sweep.train_args("seed0") == go_on


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"id": "a", "command": [], "cpus": 1, "gpus": 0, "runs": []}',
        '{"id": "a", "command": [], "cpus": 1, "gpus": 0, "runs": [{"name": "../x"}]}',
        '{"id": "a", "command": [], "cpus": 1, "gpus": 0, "runs": [{"name": "x", "colour": 1}]}',
        '{"id": "a", "command": [], "cpus": 1, "gpus": 0, "runs": [{"name": "x", "finished": 1}]}',
        '{"id": "a", "command": [], "cpus": "1", "gpus": 0, "runs": [{"name": "x"}]}',
        "[" * 100_000,
    ],
    ids=lambda content: content[:40],
)
def test_a_damaged_file_is_told(sweep, content):
    (sweep.folder / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.json: expected what d2r sweep writes, got ") as caught:
        read_sweep(sweep.folder)
    assert "\n" not in str(caught.value)


def test_no_sweep_is_told(tmp_path, sweep):
    with pytest.raises(ValueError, match=r"^--resume: expected the folder of a sweep, got .* no sweep\.json$"):
        read_sweep(tmp_path)
    sweep.config("seed2").unlink()
    with pytest.raises(FileNotFoundError, match=r"seed2\.json"):
        read_sweep(sweep.folder)
