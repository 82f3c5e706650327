"""What a run writes down, and that it is still what was written."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2r_fast.training import progress
from d2r_fast.training.metrics import MetricsLog, check_metrics, read_metrics
from d2r_fast.training.trainer import Trainer

TASKS = ("reach", "push")
TRAIN = {"kind": "train", "steps": 10, "updates": 5, "loss/critic": [0.5, 0.25], "grad_norm/critic": [1.0, 2.0]}
EVAL = {"kind": "eval", "steps": 10, "updates": 5, "mean_success": 0.5, "success": [0.0, 1.0], "episodes": 4}
EVAL |= {"episode_return": [1.5, 2.5], "module_use": [[1.0, 0.5], [1.0, 0.0]], "time": {"wall": 1.5}}


def write(run_dir: Path, *records: dict, resume_at: int = 0) -> dict:
    """Log the records; returns the state of the log."""
    log = MetricsLog(run_dir, TASKS, resume_at)
    for record in records:
        log.write(record)
    state = log.state_dict()
    log.close()
    return state


def check(run_dir: Path, state: dict, with_sum: bool = True) -> None:
    check_metrics(run_dir, len(TASKS), state["metrics_length"], state["metrics_sha256"] if with_sum else None)


def tensorboard(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard reads: steps and values of every tag."""
    board = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=False).Reload()
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_records_come_back_and_tensorboard_has_their_numbers(tmp_path):
    write(tmp_path, TRAIN, EVAL)
    assert read_metrics(tmp_path, "train") == [TRAIN]
    assert read_metrics(tmp_path, "eval") == [EVAL]
    assert tensorboard(tmp_path) == {
        **{"train/updates": [(10, 5)], "train/loss/critic/reach": [(10, 0.5)], "train/loss/critic/push": [(10, 0.25)]},
        **{"train/grad_norm/critic/0": [(10, 1)], "train/grad_norm/critic/1": [(10, 2)]},
        **{"eval/updates": [(10, 5)], "eval/mean_success": [(10, 0.5)], "eval/episodes": [(10, 4)]},
        **{"eval/success/reach": [(10, 0)], "eval/success/push": [(10, 1)], "eval/time/wall": [(10, 1.5)]},
        **{"eval/episode_return/reach": [(10, 1.5)], "eval/episode_return/push": [(10, 2.5)]},
    }


def test_tensorboard_has_what_one_looks_at(tmp_path):
    trainer = Trainer(tiny.RUN, tmp_path, show_progress=False)
    chunks, take, temperatures = [], trainer._feed.take, []

    def taken(another, *more):
        temperatures.append(trainer.agent.route_temp.tolist())  # before a chunk: those after the chunk before it
        chunks.append(take(another, *more))
        return chunks[-1]

    trainer._feed.take = taken
    trainer.run()
    temperatures = [*temperatures[1:], trainer.agent.route_temp.tolist()]
    board, steps = tensorboard(tmp_path), list(range(10, 101, 10))
    train, evals = (read_metrics(tmp_path, kind) for kind in ("train", "eval"))
    for k, task in enumerate(trainer.tasks):
        collected = {
            "success": [np.mean(chunk.success[k]) for chunk in chunks],
            "scaled_return": [np.mean(chunk.episode_return[k]) for chunk in chunks],
            "active_modules": [chunk.active_modules[k] for chunk in chunks],
            "policy/route_temp": [temp[k] for temp in temperatures],
        }
        for name, values in collected.items():
            assert [step for step, _ in board[f"train/{name}/{task}"]] == steps
            np.testing.assert_allclose([v for _, v in board[f"train/{name}/{task}"]], values, rtol=1e-6)
        for name in ("policy/alpha", "policy/entropy", "loss/actor", "loss/critic", "loss/alpha"):
            expected = [(r["steps"], np.float32(r[name][k])) for r in train[2:]]  # the warm-up has no updates
            assert board[f"train/{name}/{task}"] == expected
        for name in ("success", "episode_return"):
            assert board[f"eval/{name}/{task}"] == [(r["steps"], np.float32(r[name][k])) for r in evals]
    for tag, name, i in (("actor", "actor", 0), ("critic/0", "critic", 0), ("critic/1", "critic", 1)):
        norms = [(r["steps"], np.float32(r[f"grad_norm/{name}"][i])) for r in train[2:]]
        assert board[f"train/grad_norm/{tag}"] == norms and min(v for _, v in norms) > 0
    for name in ("learner_idle", "collector_idle", "steps_per_s", "updates_per_s"):
        assert board[f"train/time/{name}"] == [(r["steps"], np.float32(r["time"][name])) for r in train]
    assert all(0 <= v <= 1 for _, v in board["train/time/learner_idle"] + board["train/time/collector_idle"])
    assert [v > 0 for _, v in board["train/time/updates_per_s"]] == [False] * 2 + [True] * 8


def test_rates_leave_evaluations_and_saves_out(monkeypatch):
    clock = iter((0.0, 4.0, 10.0, 20.0, 50.0, 60.0, 61.0, 70.0))
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    bar = progress.Progress(TASKS, 100, updates=7, show=False)  # at 0
    bar.steps_taken(40)  # looks at the clock at 4
    assert bar.rates(27) == {"steps_per_s": 4, "updates_per_s": 2}  # at 10
    with bar.phase("evaluate"):  # from 20 to 50
        pass
    with bar.phase("save"):  # from 60 to 61
        pass
    assert bar.rates(85) == {"steps_per_s": 0, "updates_per_s": 2}  # at 70


def test_going_on_keeps_the_sum_of_the_whole(tmp_path):
    first = write(tmp_path, TRAIN)
    write(tmp_path, EVAL, resume_at=first["metrics_length"])
    both = write(tmp_path, resume_at=first["metrics_length"] + len(json.dumps(EVAL)) + 1)
    check(tmp_path, both)
    check(tmp_path, first)
    assert len(read_metrics(tmp_path, "eval")) == 1


def test_what_was_logged_later_is_kept_beside(tmp_path):
    first = write(tmp_path, TRAIN)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')  # torn by a crash
    check(tmp_path, first)
    assert write(tmp_path, resume_at=first["metrics_length"]) == first
    assert (tmp_path / "metrics.discarded.jsonl").read_text() == '{"kind": "tr'


DAMAGE = {
    "not JSON": (b'"kind": "eval"', b'"kind": !eval"', r", line 2: not JSON: Expecting value: line 1 column"),
    "not UTF-8": (b'"eval"', b'"ev\xffl"', r", line 2: not JSON: 'utf-8' codec can't decode byte 0xff"),
    "no record": (b'"kind": "eval"', b'"kind": "eyal"', r', line 2: expected a record of kind "train" or "eval"'),
    "counter": (b'"steps": 10', b'"steps": 1.', r", line 1: "),
    "shape": (b'"success": [0.0, 1.0]', b'"success": [0.0  1.0]', r", line 2: not JSON"),
    "name": (b'"module_use"', b'"module_usf"', r", line 2: module_use: expected 2 values, one a task, got None"),
    "join": (b"\n", b" ", r", line 1: not JSON: Extra data"),
}


@pytest.mark.parametrize("with_sum", [True, False])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_line_is_named(tmp_path, damage, with_sum):
    state, path = write(tmp_path, TRAIN, EVAL), tmp_path / "metrics.jsonl"
    check(tmp_path, state, with_sum)
    old, new, message = DAMAGE[damage]
    assert path.read_bytes().count(old) in (1, 2)
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    aside = path.with_name("metrics.damaged.jsonl")
    with pytest.raises(ValueError, match=rf"^{path}{message}.*; to go on .*: mv {path} {aside}$"):
        check(tmp_path, state, with_sum)
    path.rename(aside)
    check(tmp_path, state, with_sum)


def test_a_changed_digit_is_found(tmp_path):
    state, path = write(tmp_path, TRAIN, EVAL), tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.24"))
    with pytest.raises(
        ValueError, match=r"metrics\.jsonl, lines 1 to 2: their checksum is not the checkpoint's; to go on"
    ):
        check(tmp_path, state)


def test_a_file_cut_off_is_told(tmp_path):
    state = write(tmp_path, TRAIN, EVAL)
    os.truncate(tmp_path / "metrics.jsonl", 30)
    with pytest.raises(
        ValueError, match=r"expected at least the \d+ bytes that the checkpoint knows of, got 30; to go on"
    ):
        check(tmp_path, state)


def test_reading_names_the_line_too(tmp_path):
    write(tmp_path, TRAIN)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not JSON"):
        read_metrics(tmp_path, "train")
