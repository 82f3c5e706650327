"""`d2r sweep` as a command: what it refuses before anything starts, and one sweep that is killed and goes on."""

import json
import os
import subprocess
import sys
import time

import pytest
import tiny

from d2r_fast import cli
from d2r_fast.config_json import config_to_json
from d2r_fast.sweeps.folder import create_sweep
from d2r_fast.sweeps.plan import PlannedRun
from d2r_fast.training.claim import Claim, holder


@pytest.fixture
def preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.json").write_text(config_to_json(tiny.RUN))
    return "tiny.json"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--seeds", "0-3"], "expected a preset (mt10-rand, "),
        (["quik"], "'quik': expected a preset (mt10-rand, "),
        (["tiny.json", "--seeds", "3-1"], "--seeds: expected seeds such as 0-7"),
        (["tiny.json", "--seeds"], "--seeds: expected a value behind it"),
        (["tiny.json", "--set", "net.top_k"], "--set: expected FIELD=VALUE,VALUE,..."),
        (["tiny.json", "--set", "net.top_k=1", "--set=net.top_k=2"], "--set: expected each value once, got net.top_k"),
        (["tiny.json", "--nets", "d2r,resnet"], "--net: expected one of d2r, "),
        (["tiny.json", "--retry-failed"], "Unrecognized options: --retry-failed"),
        (["tiny.json", "--cpus", "0"], "--cpus: expected a whole number of cores from 1, got '0'"),
        (["tiny.json", "--cpus", "0.5"], "--cpus: expected a whole number of cores from 1, got '0.5'"),
        (["tiny.json", "--gpus", "-1"], "--gpus: expected a share such as 0.25, or a whole number, got '-1'"),
        (["tiny.json", "--gpus", "1.5"], "--gpus: expected a share such as 0.25, or a whole number, got '1.5'"),
        (["tiny.json", "--gpus", "nan"], "--gpus: expected a share such as 0.25, or a whole number, got 'nan'"),
        (["tiny.json", "--device", "cuda"], "--gpus: expected a share of a GPU for runs with --device cuda"),
        (["tiny.json", "--address", "here"], "--address: expected auto or HOST:PORT of a Ray cluster's head"),
        (["tiny.json", "--out", "."], "--out: . exists and is not empty; to go on with a sweep: --resume ."),
        (["--resume", "."], "--resume: expected the folder of a sweep, got ., which has no sweep.json"),
        (["--resume", ".", "--seeds", "1"], "expected no further argument, got --seeds 1"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_before_anything_starts(preset, tmp_path, args, said, capsys):
    assert cli.main(["sweep", *args]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"d2r sweep: {said}")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_without_ray_the_extra_is_named(preset, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("os.environ", dict(os.environ))
    assert cli.main(["sweep", preset]) == 1
    assert capsys.readouterr().err == "d2r sweep: needs Ray, which is not installed: pip install 'd2r_fast[sweep]'\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_help(capsys):
    assert cli.main(["sweep", "quick", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: d2r sweep PRESET ")
    assert cli.main(["sweep"]) == 2


def test_a_run_that_is_still_alive_is_told(tmp_path, capsys):
    sweep = create_sweep(tmp_path / "sweep", [], 1, 0, [PlannedRun("seed0", tiny.RUN)])
    sweep.run_dir("seed0").mkdir()
    claim = Claim(sweep.run_dir("seed0"))
    assert cli.main(["sweep", "--resume", str(sweep.folder)]) == 1
    claim.release()
    err = capsys.readouterr().err
    assert err.startswith(f"d2r sweep: {sweep.folder}/seed0: process {os.getpid()} on ")
    assert err.endswith(" trains here; end it, or wait until it has left\n")


def test_two_sweeps_in_one_folder_are_refused(tmp_path, capsys):
    sweep = create_sweep(tmp_path / "sweep", [], 1, 0, [PlannedRun("seed0", tiny.RUN)])
    claim = Claim(sweep.folder)
    assert cli.main(["sweep", "--resume", str(sweep.folder)]) == 1
    claim.release()
    assert f"process {os.getpid()} on " in capsys.readouterr().err


def test_a_sweep_with_nothing_to_do_tells_how_it_stands(tmp_path, capsys):
    sweep = create_sweep(tmp_path / "sweep", [], 1, 0, [PlannedRun(f"seed{i}", tiny.RUN) for i in range(2)])
    sweep.runs[0].finished, sweep.runs[1].failure = True, "exit status 1: d2r train: disk full"
    sweep.save()
    assert cli.main(["sweep", "--resume", str(sweep.folder)]) == 1
    out = capsys.readouterr().out
    assert f"failed     seed1: exit status 1: d2r train: disk full\n  log      {sweep.log('seed1')}\n" in out
    assert f"  again    d2r train {sweep.config('seed1')} --run-dir {sweep.run_dir('seed1')}\n" in out
    assert f"d2r sweep --resume {sweep.folder} --retry-failed\n" in out
    assert f"d2r compare {sweep.folder}\n" in out
    sweep.runs[1].finished, sweep.runs[1].failure = True, None
    sweep.save()
    assert cli.main(["sweep", "--resume", str(sweep.folder)]) == 0
    assert "failed" not in capsys.readouterr().out


def until(done, seconds=300.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="a run learns of its worker's end by a call of Linux")
def test_a_killed_sweep_goes_on(preset, tmp_path):
    """Of three runs, the first ends, the second fails because we hold its folder, and then the sweep is killed."""
    pytest.importorskip("ray")
    folder = tmp_path / "sweep"
    command = [sys.executable, "-m", "d2r_fast", "sweep"]

    def runs():
        return json.loads((folder / "sweep.json").read_text())["runs"]

    begin = [*command, preset, "--seeds", "0-2", "--total-steps", "20", "--out", str(folder)]
    with subprocess.Popen(begin, stdout=subprocess.PIPE) as sweep:
        until((folder / "sweep.json").exists)
        (folder / "seed1").mkdir()
        claim = Claim(folder / "seed1")
        until(lambda: runs()[0]["finished"] and runs()[1]["failure"])
        # The third has begun: its claim, made after the kill, would be in the way of the next sweep.
        until(lambda: holder(folder / "seed2") is not None or runs()[2]["finished"])
        sweep.kill()
    assert "trains here" in runs()[1]["failure"]
    until(lambda: holder(folder / "seed2") is None)  # it is asked to stop when its worker is gone
    claim.release()
    first = (folder / "logs" / "seed0.log").read_bytes()

    go_on = subprocess.run([*command, "--resume", str(folder), "--retry-failed"], capture_output=True, text=True)
    assert (go_on.returncode, go_on.stderr) == (0, "")
    assert [run["finished"] for run in runs()] == [True] * 3
    assert [line.split()[1] for line in go_on.stdout.splitlines() if line.startswith("seed")][-3:] == ["finished"] * 3
    assert (folder / "logs" / "seed0.log").read_bytes() == first
    assert "trains here" in (folder / "logs" / "seed1.log").read_text()
