"""Runs of several ranks, tiny ones: shared out equally, stopped together, saved together, gone on with by others."""

import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from campaigns.commands import Outcome, d2r, metrics
from campaigns.rank_kills import be_rank, end_of, start_ranks

from d2r_fast.config_json import config_to_json
from d2r_fast.envs import WorkerError
from d2r_fast.learning.replay import Replay, Transitions
from d2r_fast.training import saved_shares, trainer
from d2r_fast.training.checkpoint import DamagedCheckpoint, checkpoint_files, load_checkpoint, share_files
from d2r_fast.training.collector import Collector
from d2r_fast.training.ranks import Alone, Share, join
from d2r_fast.training.saved_run import read_saved_run

CFG = dataclasses.replace(tiny.RUN, deterministic=True)
HERE = Path(__file__).parent


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(config_to_json(CFG))
    return path


def two_ranks(*args: object) -> list[Outcome]:
    return end_of(start_ranks(2, *args))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of two ranks, at its end."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "config.json").write_text(config_to_json(CFG))
    outcomes = two_ranks("train", folder / "config.json", "--run-dir", folder / "run")
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert outcomes[1].out == ""
    assert "ranks      2" in outcomes[0].out
    return folder / "run"


def test_shares_of_an_update_are_the_update():
    """Golden vectors, and every method's order of losses: see the command's own words."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "tests/check_ranks.py"]
    command += ["--updates", "5"]
    ended = subprocess.run(command, cwd=HERE.parents[1], capture_output=True, text=True, timeout=300)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("R=2 ")]
    assert ended.returncode == 0, ended.stderr
    assert len(lines) == 3 + 8
    assert all(line.endswith("the same bits") for line in lines)


def test_a_run_of_two_is_a_run(finished):
    """Every step, update and episode is counted once, whoever made it."""
    train = [record for record in metrics(finished) if record["kind"] == "train"]
    assert [record["steps"] for record in train] == list(range(10, 101, 10))
    assert train[-1]["updates"] == 40
    assert all(record["episodes"] == [2, 2] for record in train)
    state = load_checkpoint(checkpoint_files(finished)[-1])
    assert state["ranks"] == 2
    assert state["replay"]["size"] == CFG.replay_capacity // CFG.n_tasks // 2
    other = saved_shares.load_share(finished, state, 1)
    assert other["replay"]["size"] == state["replay"]["size"]
    assert not torch.equal(other["replay"]["rows"]["obs"], state["replay"]["rows"]["obs"])
    assert len(share_files(finished)) == len(checkpoint_files(finished)) == 3


def copy_of(run: Path, to: Path) -> Path:
    subprocess.run(["cp", "-r", run, to], check=True)
    return to


def test_what_two_saved_two_go_on_with_bit_by_bit(finished, tmp_path):
    run = copy_of(finished, tmp_path / "run")
    outcomes = two_ranks("train", "--resume", checkpoint_files(run)[0])
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert metrics(run) == metrics(finished)
    ours, theirs = (load_checkpoint(checkpoint_files(d)[-1]) for d in (run, finished))
    for name, value in theirs["agent"].items():
        assert torch.equal(ours["agent"][name], value), name
    shares = [saved_shares.load_share(d, s, 1)["replay"]["rows"]["obs"] for d, s in ((run, ours), (finished, theirs))]
    assert torch.equal(*shares)


def test_what_two_saved_one_goes_on_with_and_the_other_way_round(finished, tmp_path):
    run = copy_of(finished, tmp_path / "run")
    alone = d2r("train", "--resume", run, "--total-steps", 100)
    assert alone.code == 0, alone
    assert any("saved by 2 ranks, goes on with 1" in line for line in alone.err)
    state = load_checkpoint(checkpoint_files(run)[-1])
    assert (state["ranks"], state["steps"], state["replay"]["size"]) == (1, 120, 30)
    outcomes = two_ranks("train", "--resume", run, "--total-steps", 120)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert load_checkpoint(checkpoint_files(run)[-1])["ranks"] == 2
    assert [record["steps"] for record in metrics(run) if record["kind"] == "train"] == list(range(10, 141, 10))


def test_a_damaged_or_missing_share_makes_its_checkpoint_no_good(finished, tmp_path):
    run = copy_of(finished, tmp_path / "run")
    newest = share_files(run)[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    found = read_saved_run(run, with_shares=True)
    assert found.state["steps"] == 80
    assert newest.name in str(found.passed_over[checkpoint_files(run)[-1]])
    assert read_saved_run(run).state["steps"] == 100  # the agent is whole
    share_files(run)[-2].unlink()
    assert read_saved_run(run, with_shares=True).state["steps"] == 60
    for path in share_files(run):
        path.unlink()
    with pytest.raises(DamagedCheckpoint, match=r"missing; it is a part of .*; so are all 2 others"):
        read_saved_run(run, with_shares=True)


def test_a_signal_to_all_saves_once_and_all_leave(config, tmp_path):
    run = tmp_path / "run"
    ranks = start_ranks(2, "train", config, "--run-dir", run, "--total-steps", 100_000)
    while not (run / "metrics.jsonl").exists() or (run / "metrics.jsonl").stat().st_size < 3000:
        assert all(rank.running for rank in ranks)
        time.sleep(0.05)
    for _ in range(2):  # the launcher passes on what the terminal sent already
        for rank in ranks:
            os.kill(rank.pid, signal.SIGINT)
    outcomes = end_of(ranks)
    assert [outcome.code for outcome in outcomes] == [0, 0], outcomes
    assert "to go on   d2r train --resume" in outcomes[0].out
    saved = read_saved_run(run, with_shares=True)
    assert saved.passed_over == {}
    assert saved.state["steps"] > 0


def fail_on_rank_1(rank: int, count: int, port: int) -> None:
    """From its fourth chunk on, a worker of rank 1 is gone."""
    be_rank(rank, count, port)
    collect, calls = Collector.collect, []

    def failing(self, *args):
        calls.append(0)
        if rank == 1 and len(calls) >= 4:
            raise WorkerError("worker 0 ended")
        return collect(self, *args)

    Collector.collect = failing  # type: ignore[method-assign]


def test_a_worker_that_fails_on_one_rank_stops_all_with_one_line_and_all_is_saved(config, tmp_path):
    run = tmp_path / "run"
    outcomes = end_of(start_ranks(2, "train", config, "--run-dir", run, before=fail_on_rank_1))
    assert [outcome.code for outcome in outcomes] == [1, 1]
    told = [line for outcome in outcomes for line in outcome.err]
    assert len(told) == 1
    assert re.fullmatch(r"d2r train: rank \d of 2: worker 0 ended; saved, to go on: d2r train --resume .*run", told[0])
    assert read_saved_run(run, with_shares=True).state["steps"] == 30
    assert [outcome.code for outcome in two_ranks("train", "--resume", run)] == [0, 0]


def fail_in_evaluation(rank: int, count: int, port: int) -> None:
    """The first evaluation ends with a worker."""
    be_rank(rank, count, port)

    def failing(*args):
        raise WorkerError("worker 3 ended")

    trainer.evaluate = failing


def test_an_evaluation_that_fails_on_the_first_rank_stops_all(config, tmp_path):
    run = tmp_path / "run"
    outcomes = end_of(start_ranks(2, "train", config, "--run-dir", run, before=fail_in_evaluation))
    assert [outcome.code for outcome in outcomes] == [1, 1]
    (line,) = [line for outcome in outcomes for line in outcome.err]
    assert "worker 3 ended; saved, to go on: " in line
    assert read_saved_run(run, with_shares=True).state["evaluation_due"]
    assert [outcome.code for outcome in two_ranks("train", "--resume", run)] == [0, 0]
    assert [r["steps"] for r in metrics(run) if r["kind"] == "eval"] == [30, 60, 90, 100]


def test_what_does_not_divide_is_one_line_before_anything_starts(config, tmp_path):
    outcomes = end_of(start_ranks(3, "train", config, "--run-dir", tmp_path / "run"))
    assert [outcome.code for outcome in outcomes] == [1, 1, 1]
    (line,) = [line for outcome in outcomes for line in outcome.err]
    assert "env.envs_per_task: expected a multiple of the 3 ranks" in line
    assert not (tmp_path / "run").exists()


def test_the_launcher_starts_a_killed_run_anew_by_itself(config, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--max-restarts", "1", "--nproc-per-node", "2"]
    command += ["-m", "d2r_fast", "train", str(config), "--run-dir", str(run), "--total-steps", "300"]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    while not checkpoint_files(run):
        assert launcher.poll() is None
        time.sleep(0.05)
    ranks = {p.environ()["RANK"]: p for p in psutil.Process(launcher.pid).children()}
    ranks["1"].kill()
    out, _ = launcher.communicate(timeout=300)
    assert launcher.returncode == 0, out
    assert out.count("rank 1 of 2 (process") == 1
    assert [r["steps"] for r in metrics(run) if r["kind"] == "train"] == list(range(10, 321, 10))


@pytest.mark.parametrize(
    ("changes", "count", "message"),
    [
        ({}, 3, "env.envs_per_task: expected a multiple of the 3 ranks, .* got 2 .try --env.envs-per-task 3."),
        ({"batch_size": 6}, 2, "batch_size: expected a multiple of 4, 2 ranks times 2 tasks, got 6"),
    ],
)
def test_what_cannot_be_shared(changes, count, message):
    with pytest.raises(ValueError, match=message):
        Share(dataclasses.replace(CFG, **changes), count)


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert type(join()) is Alone
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert type(join()) is Alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="RANK: expected what torchrun sets beside WORLD_SIZE=2, got None"):
        join()


CAPACITY = 12


def replay_of(numbers: list[int]) -> Replay:
    """A replay of one task and `CAPACITY` rows, to which these rewards were added."""
    replay = Replay(1, CAPACITY, 3, 2, (0, 0), torch.device("cpu"))
    for number in numbers:
        reward = torch.full((1, 1), float(number))
        obs, action = torch.full((1, 1, 3), float(number)), torch.zeros(1, 1, 2)
        route = torch.zeros(1, 1, 0, 0, dtype=torch.uint8)
        replay.add(Transitions(obs, action, reward, torch.zeros(1, 1, dtype=torch.bool), obs, route))
    return replay


def in_order(replay: Replay) -> list[int]:
    """Its rewards, oldest first."""
    state = replay.state_dict()
    rewards = state["rows"]["reward"][0].tolist()
    head = state["head"] if state["size"] == CAPACITY else 0
    return [int(r) for r in rewards[head:] + rewards[:head]]


@pytest.mark.parametrize("n_rows", [0, 1, 5, 12, 17], ids=lambda n: f"{n}rows")
@pytest.mark.parametrize(("had", "n_ranks"), [(1, 2), (2, 1), (2, 4), (4, 2), (3, 2), (2, 3)])
def test_a_replay_is_dealt_anew(had, n_ranks, n_rows, tmp_path, monkeypatch):
    """Row by row in turn: nothing twice, nothing lost but the oldest that do not fit, in order on every rank."""
    states = [replay_of([i * had + r for i in range(n_rows)]).state_dict() for r in range(had)]
    main = {"ranks": had, "replay": states[0], "steps": 0, "learner": {"updates": 0}}
    monkeypatch.setattr(saved_shares, "load_share", lambda run_dir, state, rank: {"replay": states[rank]})
    dealt = []
    for rank in range(n_ranks):
        replay = replay_of([])
        saved_shares.load_replay(replay, tmp_path, main, rank, n_ranks)
        dealt.append(in_order(replay))
    kept = min(n_rows, CAPACITY)
    every = [(i + n_rows - kept) * had + r for i in range(kept) for r in range(had)]
    for rank, numbers in enumerate(dealt):
        assert numbers == every[rank::n_ranks][-CAPACITY:]
    if kept * had <= CAPACITY * n_ranks // 2:
        assert sorted(number for numbers in dealt for number in numbers) == every
