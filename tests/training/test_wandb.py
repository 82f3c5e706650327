"""Weights & Biases: what TensorBoard has, one run over a resume, and trouble there that is never training's."""

import dataclasses
import json
import os
import signal
import struct
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2r_fast.cli import main
from d2r_fast.config import LogConfig
from d2r_fast.config_json import config_from_json, config_to_json
from d2r_fast.training import wandb_log
from d2r_fast.training.claim import read_run_id
from d2r_fast.training.metrics import read_metrics
from d2r_fast.training.trainer import Trainer
from d2r_fast.training.wandb_log import WandbLog

wandb = pytest.importorskip("wandb", reason="the wandb extra is not installed")
OFFLINE = LogConfig(wandb="offline", project="trial", group="seeds")
CFG = dataclasses.replace(tiny.RUN, total_steps=40, log=OFFLINE)


@pytest.fixture(autouse=True)
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither the settings nor the login of whoever runs the tests; a process of wandb's for each test."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    wandb.teardown()
    yield
    wandb.teardown()


def saved(path: Path) -> Iterator[Any]:
    """The records in an offline run's file: blocks of 32 KiB of pieces, each with its CRC, length and kind."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = path.read_bytes(), 7, b""
    assert data.startswith(b":W&B")
    while at + 7 <= len(data):
        if (left := -at % 2**15) and left < 7:  # no piece begins so close to a block's end
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield Record.FromString(record)
            record = b""


def read_back(path: Path) -> tuple[Any, dict[int, dict[str, float]]]:
    """What an offline run's file says of the run, and its rows by step."""
    records = list(saved(path))
    rows = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
            rows[row["_step"]] = {name: value for name, value in row.items() if not name.startswith("_")}
    return next(record.run for record in records if record.HasField("run")), rows


def files(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))


def tensorboard_rows(run_dir: Path) -> dict[int, dict[str, float]]:
    rows: dict[int, dict[str, float]] = {}
    board = EventAccumulator(str(run_dir / "tensorboard"), purge_orphaned_data=False).Reload()
    for tag in board.Tags()["scalars"]:
        for event in board.Scalars(tag):
            rows.setdefault(event.step, {})[tag] = event.value
    return rows


def test_an_offline_run_has_tensorboards_numbers_and_goes_on_as_the_same_run(tmp_path, capsys):
    run = tmp_path / "mine"
    (tmp_path / "config.json").write_text(config_to_json(CFG))
    assert main(["train", str(tmp_path / "config.json"), "--run-dir", str(run)]) == 0
    (first,) = files(run)
    assert f"wandb      {first.parent}" in capsys.readouterr().out.splitlines()
    time.sleep(1.1)  # wandb names its directories by the second
    assert main(["train", "--resume", str(run), "--total-steps", "80"]) == 0
    steps = []
    for path in files(run):
        told, rows = read_back(path)
        named = told.run_id, told.project, told.run_group, told.display_name
        assert named == (read_run_id(run), "trial", "seeds", "mine")
        config = {item.key: json.loads(item.value_json) for item in told.config.update}
        assert config["net"]["module_width"] == CFG.net.module_width and config["log"]["wandb"] == "offline"
        board = tensorboard_rows(run)
        for step, row in rows.items():
            assert {name: np.float32(value) for name, value in row.items()} == board[step]
        steps += rows
    assert steps == list(range(10, 101, 10))
    assert "eval/success/reach" in board[30] and "train/policy/route_temp/reach" in board[30]


def test_it_can_be_switched_on_and_off_by_a_resume(tmp_path):
    run = tmp_path / "run"
    (tmp_path / "config.json").write_text(config_to_json(dataclasses.replace(CFG, log=LogConfig())))
    assert main(["train", str(tmp_path / "config.json"), "--run-dir", str(run)]) == 0
    assert not (run / "wandb").exists()
    assert main(["train", "--resume", str(run), "--total-steps", "50", "--log.wandb", "offline"]) == 0
    assert main(["train", "--resume", str(run), "--total-steps", "60", "--log.wandb", "off"]) == 0
    (only,) = files(run)
    assert list(read_back(only)[1]) == [70]


def test_an_old_configuration_has_it_off():
    old = json.loads(config_to_json(CFG))
    del old["log"]
    assert config_from_json(json.dumps(old), "config.json").log == LogConfig() == LogConfig(wandb="off")


def refused(tmp_path: Path, capsys: Any, *options: str) -> str:
    """The one line that a run ends with before it begins; a second try in its directory is refused for the same."""
    (tmp_path / "config.json").write_text(config_to_json(dataclasses.replace(CFG, log=LogConfig())))
    lines = []
    for _ in range(2):
        assert main(["train", str(tmp_path / "config.json"), "--run-dir", str(tmp_path / "run"), *options]) == 1
        out, err = capsys.readouterr()
        lines += err.splitlines()
        assert out == ""
        wandb.teardown()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert not (tmp_path / "run" / "config.json").exists()
    return lines[0]


def test_without_the_package_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = refused(tmp_path, capsys, "--log.wandb", "offline")
    assert line.startswith("d2r train: log.wandb: expected 'off' where the package wandb cannot be imported, got")
    assert line.endswith("; pip install 'd2r_fast[wandb]'")
    assert not (tmp_path / "run").exists()


def test_without_a_login_one_line_says_so(tmp_path, capsys):
    line = refused(tmp_path, capsys, "--log.wandb", "online")
    assert line.startswith("d2r train: log.wandb: expected a login for 'online', found none; `wandb login`")
    assert not (tmp_path / "run").exists()


def test_without_a_network_one_line_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    monkeypatch.setattr(wandb_log, "BEGIN_WITHIN", 1)
    line = refused(tmp_path, capsys, "--log.wandb", "online")
    assert line.startswith("d2r train: log.wandb: ") and "127.0.0.1:9" in line
    assert line.endswith("; `--log.wandb offline` needs no server")


def service() -> psutil.Process:
    """wandb's own process."""
    children = (child for child in psutil.Process().children() if child.name() == "wandb-core")
    (found,) = (child for child in children if child.status() != psutil.STATUS_ZOMBIE)  # as one that was killed is
    return found


def test_a_run_outlives_wandbs_process(tmp_path):
    trainer = Trainer(CFG, tmp_path / "run", show_progress=False)
    service().kill()
    with pytest.warns(UserWarning, match=r"^log\.wandb: .*; the run goes on without it, and metrics\.json") as told:
        assert trainer.run()
    assert len(told) == 1
    assert len(read_metrics(tmp_path / "run", "train")) == 6


def test_a_wandb_that_hangs_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(wandb_log, "MOST_WAITING", 50)
    log = WandbLog(OFFLINE, tmp_path, "0" * 32, {})
    hung = service()
    hung.send_signal(signal.SIGSTOP)
    try:
        numbers = {f"train/loss/{i}": 0.5 for i in range(2000)}  # soon more than a socket holds
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            while not told:
                log.write(0, numbers)  # returns, or this test never ends
            log.close()
        assert [str(w.message) for w in told if w.category is UserWarning] == [
            "log.wandb: it has not taken the last 50 records; the run goes on without it, and metrics.jsonl has every "
            "number"
        ]
    finally:
        hung.kill()


def test_a_failed_run_is_one_there_too(tmp_path):
    log = WandbLog(OFFLINE, tmp_path, "0" * 32, {})
    try:
        raise FloatingPointError
    except FloatingPointError:
        log.close()
    (path,) = files(tmp_path)
    assert [r.exit.exit_code for r in saved(path) if r.HasField("exit")] == [1]
