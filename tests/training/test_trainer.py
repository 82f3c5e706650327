"""Whole runs, tiny ones, on the real simulation: repeating, stopping, going on, and the ratio of updates to steps."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from d2r_fast.cli import main
from d2r_fast.config import EvalConfig, RunConfig
from d2r_fast.config_json import config_from_json, config_to_json
from d2r_fast.envs import WorkerError
from d2r_fast.ops import backends
from d2r_fast.training.agents import choose_device, make_agent
from d2r_fast.training.checkpoint import checkpoint_files, find_checkpoint, load_checkpoint, save_checkpoint
from d2r_fast.training.metrics import read_metrics
from d2r_fast.training.progress import Progress
from d2r_fast.training.seeds import stream_seed
from d2r_fast.training.trainer import Trainer

CFG = tiny.RUN
DETERMINISTIC = dataclasses.replace(CFG, deterministic=True)
# For tests that look at counters alone.
SMALL = dataclasses.replace(CFG, total_steps=40, eval=EvalConfig(every_chunks=1000, episodes=1, envs_per_task=1))

pytestmark = pytest.mark.usefixtures("restore_torch_switches")


def train(cfg: RunConfig, run_dir: Path) -> Trainer:
    trainer = Trainer(cfg, run_dir, show_progress=False)
    assert trainer.run()
    return trainer


def resume(run_dir: Path, **changes: Any) -> Trainer:
    """What `d2r train --resume` makes, with fields of the configuration changed."""
    state = load_checkpoint(find_checkpoint(run_dir))
    cfg = dataclasses.replace(config_from_json(state["config"], "checkpoint"), **changes)
    return Trainer(cfg, run_dir, resume=state, show_progress=False)


def d2r(*args: str) -> str:
    """Run a command that must succeed; returns what it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        assert main(list(args)) == 0
    return out.getvalue()


def metrics(run_dir: Path) -> list[dict]:
    """All records without their clock."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert all(record.pop("time")["wall"] > 0 for record in records)
    return records


def drop_clock(state: dict) -> None:
    """Take out of a checkpoint what depends on the times in metrics.jsonl, if only on how many digits they have."""
    assert state.pop("metrics_length") > 1000
    assert len(state.pop("metrics_sha256")) == 64


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    """Equal to the last bit, types and dtypes too."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deterministic run from start to end; tests copy it before they change it."""
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(DETERMINISTIC, run_dir)
    return run_dir


def test_what_a_run_writes(whole):
    records = metrics(whole)
    assert [(r["kind"], r["steps"]) for r in records] == [
        *[("train", 10), ("train", 20), ("train", 30), ("eval", 30), ("train", 40), ("train", 50), ("train", 60)],
        *[("eval", 60), ("train", 70), ("train", 80), ("train", 90), ("eval", 90), ("train", 100), ("eval", 100)],
    ]
    for record in read_metrics(whole, "train"):
        assert record["episodes"] == [2, 2]
        assert len(record["scaled_return"]) == len(record["success"]) == len(record["active_modules"]) == 2
        assert all(1 <= n <= 4 for n in record["active_modules"])
        learned = {"loss/alpha", "loss/actor", "loss/critic", "policy/entropy", "grad_norm/critic"} & record.keys()
        assert len(learned) == (5 if record["steps"] > CFG.warmup_steps else 0)
    for record in read_metrics(whole, "eval"):
        assert record["episodes"] == 1
        assert [len(use) for use in record["module_use"]] == [4, 4]
        assert record["mean_success"] == sum(record["success"]) / 2
    assert (whole / "config.json").read_text() == config_to_json(DETERMINISTIC)
    assert sum(file.stat().st_size for file in (whole / "tensorboard").iterdir()) > 1000


def test_the_last_three_checkpoints_are_kept(whole):
    assert names(whole) == ["step-0000000060.pt", "step-0000000080.pt", "step-0000000100.pt"]
    states = [load_checkpoint(path) for path in checkpoint_files(whole)]
    assert [(s["steps"], s["learner"]["updates"]) for s in states] == [(60, 20), (80, 30), (100, 40)]


def test_the_same_seed_gives_the_same_run(whole, tmp_path):
    torch.manual_seed(123)  # the global stream has no say
    train(DETERMINISTIC, tmp_path / "again")
    assert metrics(tmp_path / "again") == metrics(whole)
    a, b = (load_checkpoint(find_checkpoint(d)) for d in (whole, tmp_path / "again"))
    for state in (a, b):
        drop_clock(state)
        assert len(state.pop("run_id")) == 32
    assert_same(a, b)


def test_another_seed_gives_another_run(whole, tmp_path):
    train(dataclasses.replace(DETERMINISTIC, seed=1, total_steps=10), tmp_path / "other")
    for mine, theirs in zip(metrics(whole), metrics(tmp_path / "other"), strict=False):
        if mine["kind"] == "train":
            assert mine["scaled_return"] != theirs["scaled_return"]
    a, b = (load_checkpoint(find_checkpoint(d)) for d in (whole, tmp_path / "other"))
    assert not torch.equal(a["agent"]["actor.net.base.0.weight"], b["agent"]["actor.net.base.0.weight"])


def test_streams_of_a_seed_are_all_different():
    seeds = [stream_seed(seed, stream, epoch) for seed in range(5) for stream in range(6) for epoch in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**30 for seed in seeds)


@pytest.mark.parametrize("n_deleted", [1, 2])
def test_a_resumed_run_is_the_run_that_never_stopped(whole, tmp_path, n_deleted):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    for path in checkpoint_files(run_dir)[-n_deleted:]:
        path.unlink()
    kept = load_checkpoint(find_checkpoint(run_dir))["metrics_length"]
    before = (whole / "metrics.jsonl").read_bytes()

    assert "finished after" in d2r("train", "--resume", str(run_dir))
    assert metrics(run_dir) == metrics(whole)
    assert (run_dir / "metrics.jsonl").read_bytes()[:kept] == before[:kept]
    assert (run_dir / "metrics.discarded.jsonl").read_bytes() == before[kept:]
    assert len(before[kept:].splitlines()) == {1: 4, 2: 6}[n_deleted]
    assert names(run_dir) == names(whole)
    for a, b in zip(checkpoint_files(whole), checkpoint_files(run_dir), strict=True):
        one, other = load_checkpoint(a), load_checkpoint(b)
        for state in (one, other):
            drop_clock(state)
        assert_same(one, other)


def test_resuming_a_finished_run_changes_nothing(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    assert resume(run_dir).run()
    assert (run_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert not (run_dir / "metrics.discarded.jsonl").exists()
    assert names(run_dir) == names(whole)
    a, b = (load_checkpoint(find_checkpoint(d))["agent"] for d in (whole, run_dir))
    assert_same(a, b)


def test_more_steps_go_on_where_the_run_ended(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    trainer = resume(run_dir, total_steps=100)
    assert not trainer.finished
    assert trainer.run()
    assert (trainer.steps, trainer.learner.updates) == (120, 50)
    before = (whole / "metrics.jsonl").read_bytes()
    assert (run_dir / "metrics.jsonl").read_bytes()[: len(before)] == before
    added = metrics(run_dir)[len(metrics(whole)) :]
    assert [(r["kind"], r["steps"]) for r in added] == [("train", 110), ("train", 120), ("eval", 120)]
    assert config_from_json((run_dir / "config.json").read_text(), "here").total_steps == 100


def test_metrics_shorter_than_the_checkpoint_remembers_are_refused(whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: expected at least the \d+ bytes .* got 0"):
        resume(run_dir)
    assert (run_dir / "metrics.jsonl").read_text() == ""


# 25 * 1.16 is 28.999... in floats.
@pytest.mark.parametrize("ratio", [1.0, 0.5, 0.3, 1.16])
def test_every_chunk_ends_with_the_updates_its_steps_paid_for(tmp_path, ratio):
    cfg = dataclasses.replace(
        SMALL, env=dataclasses.replace(CFG.env, envs_per_task=1), chunk_steps=5, updates_per_step=ratio
    )
    trainer = train(cfg, tmp_path / "run")
    records = read_metrics(tmp_path / "run", "train")
    assert [r["steps"] for r in records] == list(range(5, 61, 5))
    for record in records:
        assert record["updates"] == math.floor(max(0, record["steps"] - 20) * Fraction(str(ratio)))
    assert trainer.learner.updates == int(40 * Fraction(str(ratio)))
    # The optimiser's own count: that many updates were really made.
    assert trainer.learner.update.step_count.item() == trainer.learner.updates


def test_a_run_without_a_saved_replay_fills_it_again(tmp_path):
    cfg = dataclasses.replace(SMALL, checkpoint_replay=False, replay_capacity=1000)
    train(cfg, tmp_path / "run")
    state = load_checkpoint(find_checkpoint(tmp_path / "run"))
    assert state["replay"] is None
    trainer = resume(tmp_path / "run", total_steps=60)
    assert trainer.replay.size == 0
    assert trainer.run()
    assert trainer.replay.size == cfg.warmup_steps + 20
    assert (trainer.steps, trainer.learner.updates) == (80, 30)
    records = read_metrics(tmp_path / "run", "train")
    assert [(r["steps"], r["updates"]) for r in records[-3:]] == [(60, 20), (70, 25), (80, 30)]
    assert "loss/critic" in records[-1]


def test_the_replay_goes_into_the_checkpoint_by_default(whole):
    replay = load_checkpoint(find_checkpoint(whole))["replay"]
    assert (replay["size"], replay["head"]) == (30, 100 % 30)
    assert replay["rows"]["obs"].shape == (2, 30, 39)
    assert replay["rows"]["route"].dtype == torch.uint8
    assert not replay["rows"]["terminal"].any()


def test_the_published_time_limit_is_one_switch_away(tmp_path):
    cfg = dataclasses.replace(SMALL, total_steps=10, bootstrap_at_time_limit=False)
    trainer = train(cfg, tmp_path / "run")
    # Two environments of five-step episodes: the last two rows of every ten.
    assert trainer.replay.state_dict()["rows"]["terminal"].tolist() == [([False] * 8 + [True] * 2) * 3] * 2


def test_a_diverged_update_is_an_error_and_leaves_the_checkpoints(tmp_path):
    run_dir = tmp_path / "run"
    train(SMALL, run_dir)
    before = {path.name: path.read_bytes() for path in checkpoint_files(run_dir)}
    trainer = resume(run_dir, total_steps=80)
    with torch.no_grad():
        trainer.agent.critics.net.head.bias[0] = math.nan
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(FloatingPointError, match=r"^updates 21\.\.25: loss/\w+\[\d\] is nan; training has diverged"):
        trainer.run()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert {path.name: path.read_bytes() for path in (run_dir / "checkpoints").iterdir()} == before
    assert all(record["steps"] <= 60 for record in metrics(run_dir))

    trainer = resume(run_dir, total_steps=60)
    assert trainer.run()
    assert all(torch.isfinite(p).all() for p in trainer.agent.parameters())


def test_a_stop_right_behind_a_checkpoint_still_looks_at_what_the_run_holds(tmp_path):
    run_dir = tmp_path / "run"
    trainer = Trainer(SMALL, run_dir, show_progress=False)
    while not checkpoint_files(run_dir):
        trainer.advance()
    trainer.agent.target_critics.net.head.bias.data[1] = -math.inf
    trainer._stop_requested = True
    saved = re.escape(str(run_dir / "checkpoints" / "step-0000000020.pt"))
    with pytest.raises(FloatingPointError, match=rf"target_critics.net.head.bias\[1, 0\] is -inf.*; {saved} was saved"):
        trainer.run()


@pytest.mark.parametrize("device", ["cuda", "auto"])
def test_device(tmp_path, device):
    if torch.cuda.is_available():
        assert choose_device(device).type == "cuda"
        trainer = train(dataclasses.replace(SMALL, device=device), tmp_path / "run")
        assert {p.device.type for p in trainer.agent.parameters()} == {trainer.replay.device.type} == {"cuda"}
    elif device == "auto":
        assert choose_device(device).type == "cpu"
    else:
        with pytest.raises(ValueError, match=r"device: expected a GPU for 'cuda', but torch .* finds none"):
            Trainer(dataclasses.replace(SMALL, device=device), tmp_path / "run", show_progress=False)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "net, message",
    [
        ({"backend": "triton"}, "net.backend triton: expected tensors on cuda, got cpu"),
        ({"backend": "triton", "module_width": 300}, "net.backend triton: expected tensors on cuda, got cpu"),
        ({"backend": "cpp", "module_width": 1025}, "net.backend cpp: expected a width of at most 1024, got 1025"),
        ({"backend": "cpp", "base_width": 1025}, "net.backend cpp: expected a width of at most 1024, got 1025"),
        ({"backend": "cpp", "route_widths": (8, 1025)}, "net.backend cpp: expected a width of at most 1024, got 1025"),
    ],
)
def test_a_network_that_cannot_run_is_refused_before_anything_is_written(tmp_path, monkeypatch, net, message):
    monkeypatch.setattr(backends, "INTERPRETED", False)
    cfg = dataclasses.replace(SMALL, net=dataclasses.replace(CFG.net, **net))
    with pytest.raises(ValueError, match=f"^{message}$"):
        Trainer(cfg, tmp_path / "run", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_saved_network_that_cannot_run_here_is_refused(tmp_path, monkeypatch, capsys):
    """... as when its run is taken from a GPU to a machine without one."""
    run_dir = tmp_path / "run"
    train(SMALL, run_dir)
    state = load_checkpoint(find_checkpoint(run_dir))
    elsewhere = dataclasses.replace(SMALL, net=dataclasses.replace(CFG.net, backend="triton"))
    save_checkpoint(run_dir, state["steps"], state | {"config": config_to_json(elsewhere)})
    monkeypatch.setattr(backends, "INTERPRETED", False)
    before = sorted((run_dir / "checkpoints").iterdir())
    for command, told in (["train", "--resume"], "d2r train"), (["eval"], "d2r eval"):
        assert main([*command, str(run_dir)]) == 1
        assert capsys.readouterr() == ("", f"{told}: net.backend triton: expected tensors on cuda, got cpu\n")
    assert sorted((run_dir / "checkpoints").iterdir()) == before


def test_a_replay_over_the_memory_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(MemoryError, match=r"replay_capacity: 1,000,000,000,000 transitions need [\d.]+ GiB"):
        Trainer(dataclasses.replace(SMALL, replay_capacity=10**12), tmp_path / "run", show_progress=False)
    assert list(tmp_path.iterdir()) == []


def test_initial_parameters_depend_on_the_seed_and_leave_the_global_stream_alone():
    before = torch.get_rng_state()
    first, again, other = (make_agent(dataclasses.replace(CFG, seed=s), torch.device("cpu")) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert_same(dict(first.state_dict()), dict(again.state_dict()))
    assert not torch.equal(first.actor.net.head.weight, other.actor.net.head.weight)
    assert_same(dict(first.critics.state_dict()), dict(first.target_critics.state_dict()))


def interrupt_learning(trainer: Trainer, n_signals: int) -> None:
    """Send SIGTERM to this process when the first updates of a chunk are made and others are still owed."""
    run = trainer.learner.run

    def run_and_signal(n_updates: int) -> None:
        run(n_updates)
        for _ in range(n_signals):
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.learner.run = run_and_signal


def test_a_signal_between_updates_saves_and_the_run_goes_on_from_there(tmp_path):
    run_dir = tmp_path / "run"
    trainer = Trainer(dataclasses.replace(SMALL, updates_per_step=2.5), run_dir, show_progress=False)
    interrupt_learning(trainer, n_signals=1)
    assert trainer.run() is False
    assert (trainer.steps, trainer.learner.updates) == (30, 10)  # of 25
    assert [r["steps"] for r in read_metrics(run_dir, "train")] == [10, 20]
    assert load_checkpoint(find_checkpoint(run_dir))["learner"]["updates"] == 10

    trainer = resume(run_dir)
    assert trainer.run()
    assert (trainer.steps, trainer.learner.updates) == (60, 100)
    records = read_metrics(run_dir, "train")
    assert [(r["steps"], r["updates"]) for r in records] == [(10, 0), (20, 0), (30, 25), (40, 50), (50, 75), (60, 100)]
    assert records[2]["episodes"] == [2, 2]  # of the chunk collected before the stop


def test_a_stop_in_a_diverged_chunk_saves_nothing(tmp_path):
    run_dir = tmp_path / "run"
    trainer = Trainer(dataclasses.replace(SMALL, updates_per_step=2.5), run_dir, show_progress=False)
    learn = trainer.learner.run

    def diverge(n_updates: int) -> None:
        trainer.agent.critics.net.head.bias.data[0] = math.nan
        learn(n_updates)

    trainer.learner.run = diverge
    interrupt_learning(trainer, n_signals=1)
    with pytest.raises(FloatingPointError, match=r"^updates 1\.\.10: "):
        trainer.run()
    assert names(run_dir) == ["step-0000000020.pt"]  # the regular one, before the first update


def test_a_second_signal_leaves_at_once(tmp_path):
    run_dir = tmp_path / "run"
    trainer = Trainer(SMALL, run_dir, show_progress=False)
    interrupt_learning(trainer, n_signals=2)
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert names(run_dir) == ["step-0000000020.pt"]  # the regular one, before the first update


def test_sigint_and_sigterm_stop_a_real_process(tmp_path):
    """`d2r train` in a process of its own exits with 0 in the middle of a run, and the run goes on and finishes."""
    endless = dataclasses.replace(SMALL, total_steps=10_000_000, checkpoint_every_chunks=1_000_000)
    (tmp_path / "config.json").write_text(config_to_json(endless))
    call = "import sys; from d2r_fast.cli import main; sys.exit(main())"
    runs = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        run_dir = tmp_path / number.name
        command = [sys.executable, "-c", call, "train", str(tmp_path / "config.json"), "--run-dir", str(run_dir)]
        with (tmp_path / f"{number.name}.txt").open("w") as output:
            runs[number] = run_dir, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        for number, (run_dir, process) in runs.items():
            log, output = run_dir / "metrics.jsonl", tmp_path / f"{number.name}.txt"
            while not log.exists() or log.read_text().count("\n") < 4:
                assert process.poll() is None, output.read_text()
                time.sleep(0.05)
            process.send_signal(number)
            assert process.wait() == 0, output.read_text()
            assert f"{number.name}: saving and leaving" in output.read_text()
            assert f"to go on   d2r train --resume {run_dir}" in output.read_text()
    finally:
        for _, process in runs.values():
            process.kill()
            process.wait()

    for run_dir, _ in runs.values():
        state = load_checkpoint(find_checkpoint(run_dir))
        steps = state["steps"]
        assert steps >= 40
        ended = read_metrics(run_dir, "train")[-1]["steps"]
        assert 10 * state["chunks_ended"] == ended
        assert ended in (steps, steps - 10)
        assert resume(run_dir, total_steps=steps).run()
        last = read_metrics(run_dir, "train")[-1]
        assert (last["steps"], last["updates"]) == (steps + 20, steps // 2)
        assert [r["steps"] for r in read_metrics(run_dir, "eval")] == [steps + 20]


def test_a_killed_worker_ends_training_with_one_line_and_the_run_goes_on(tmp_path, monkeypatch):
    env = dataclasses.replace(SMALL.env, engine="official", envs_per_task=1)
    (tmp_path / "config.json").write_text(config_to_json(dataclasses.replace(SMALL, env=env)))
    workers: list[subprocess.Popen[bytes]] = []

    class KillsAWorker(Trainer):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            workers[:] = self._collector._envs._processes
            learn = self.learner.run
            self.learner.run = lambda n: (learn(n), workers[-1].kill())

    monkeypatch.setattr("d2r_fast.commands.train.Trainer", KillsAWorker)
    err, run_dir = io.StringIO(), tmp_path / "run"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        assert main(["train", str(tmp_path / "config.json"), "--run-dir", str(run_dir)]) == 1
    lines = [line for line in err.getvalue().replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1
    assert re.fullmatch(
        r"d2r train: worker \d at task (reach|drawer-close), environment 0, ended with exit status -9 \(.*\); "
        rf"saved, to go on: d2r train --resume {run_dir}",
        lines[0],
    )
    assert all(worker.poll() is not None for worker in workers)
    state = load_checkpoint(find_checkpoint(run_dir))
    assert (state["steps"], state["learner"]["updates"]) in ((30, 5), (40, 10))  # one chunk may have been under way
    monkeypatch.undo()
    d2r("train", "--resume", str(run_dir))
    assert [r["steps"] for r in read_metrics(run_dir, "train")] == [10, 20, 30, 40, 50, 60]


def test_a_worker_that_fails_in_an_evaluation_costs_only_that_evaluation(whole, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"

    def fail(*args: Any) -> None:
        raise WorkerError("worker 0 ended")

    trainer = Trainer(DETERMINISTIC, run_dir, show_progress=False)
    while trainer.steps < 60:
        trainer.advance()
    monkeypatch.setattr("d2r_fast.training.trainer.evaluate", fail)
    with pytest.raises(WorkerError, match=r"^worker 0 ended; saved, to go on: "):
        trainer.run()
    assert [r["steps"] for r in read_metrics(run_dir, "train")] == [10, 20, 30, 40, 50, 60]
    assert [r["steps"] for r in read_metrics(run_dir, "eval")] == [30]
    monkeypatch.undo()
    trainer = resume(run_dir)
    assert trainer.run()
    assert [(r["kind"], r["steps"]) for r in metrics(run_dir)] == [(r["kind"], r["steps"]) for r in metrics(whole)]
    mine, theirs = (
        next(r["episode_return"] for r in read_metrics(d, "eval") if r["steps"] == 60) for d in (run_dir, whole)
    )
    assert mine == theirs  # of the agent as it was, in the environments of that evaluation


def test_the_memory_of_worker_processes_is_logged_beside_the_own():
    progress = Progress(("reach",), total_updates=1, updates=0, show=False)
    before = progress.times()
    assert before["rss_mib"] > 50
    with subprocess.Popen([sys.executable, "-c", "print(flush=True); input()"], stdin=-1, stdout=-1) as worker:
        worker.stdout.readline()
        assert progress.times()["workers_rss_mib"] > before["workers_rss_mib"]
        worker.communicate(b"\n")
