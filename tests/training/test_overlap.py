"""Collecting ahead of the learner: whose parameters act, who waits for whom, and how it ends."""

import dataclasses
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from d2r_fast.config import EvalConfig
from d2r_fast.config_json import config_from_json
from d2r_fast.ops.gumbel import gumbel
from d2r_fast.training.checkpoint import checkpoint_files, find_checkpoint, load_checkpoint
from d2r_fast.training.metrics import read_metrics
from d2r_fast.training.overlap import ChunkFeed
from d2r_fast.training.progress import Progress
from d2r_fast.training.trainer import UPDATES_AT_ONCE, Trainer

# 25 updates a chunk of 10 steps: three calls of the learner, so that there is a middle of it.
CFG = dataclasses.replace(
    tiny.RUN, total_steps=40, updates_per_step=2.5, eval=EvalConfig(every_chunks=1000, episodes=1, envs_per_task=1)
)
WARMUP, CHUNK, LAST = CFG.warmup_steps, CFG.chunk_steps, CFG.warmup_steps + CFG.total_steps
PER_CHUNK = 25
PATIENCE = 60  # seconds after which a test that would hang fails instead


@pytest.fixture(autouse=True)
def no_thread_left() -> Any:
    """Whatever happens to a run, its collector's thread ends with it."""
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("collector")]


def make_trainer(run_dir: Path, **changes: Any) -> Trainer:
    return Trainer(dataclasses.replace(CFG, **changes), run_dir, show_progress=False)


def resume(run_dir: Path, **changes: Any) -> Trainer:
    state = load_checkpoint(find_checkpoint(run_dir))
    cfg = dataclasses.replace(config_from_json(state["config"], "checkpoint"), **changes)
    return Trainer(cfg, run_dir, resume=state, show_progress=False)


def wrap(owner: Any, name: str, before: Callable[[], None], after: Callable[[], None] = lambda: None) -> None:
    """Call `before` and `after` around every call of a method."""
    method = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        before()
        result = method(*args, **kwargs)
        after()
        return result

    setattr(owner, name, wrapped)


def paid(steps: int) -> int:
    return max(0, steps - WARMUP) // CHUNK * PER_CHUNK


class Watch:
    """Notes of every action of a trainer: the chunk it is for, the acting parameters, and the updates made so far."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.collector = trainer, trainer._collector
        self.acted: list[tuple[int, bytes, int, int]] = []  # chunk, parameters, updates made, thread
        self.after_updates = {0: self.learned()}  # the agent's parameters by the updates made
        self.chunk = 0
        wrap(self.collector, "_act", self._note)
        wrap(self.collector, "collect", lambda: None, self._next_chunk)
        update = trainer.learner.run

        def one_by_one(n_updates: int) -> None:
            for _ in range(n_updates):
                update(1)
                self.after_updates[trainer.learner.updates] = self.learned()

        trainer.learner.run = one_by_one

    def learned(self) -> bytes:
        return _as_bytes(self.trainer.agent.actor, self.trainer.agent.route_temp)

    def _note(self) -> None:
        parameters = _as_bytes(self.collector._actor, self.collector._route_temp)
        self.acted.append((self.chunk, parameters, self.trainer.learner.updates, threading.get_ident()))

    def _next_chunk(self) -> None:
        self.chunk += 1


def _as_bytes(actor: torch.nn.Module, route_temp: torch.Tensor) -> bytes:
    values = [*actor.parameters(), route_temp]
    return b"".join(v.detach().numpy().tobytes() for v in values)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_collector_acts_with_parameters_of_a_chunks_boundary_at_most_one_chunk_old(tmp_path, overlap):
    trainer = make_trainer(tmp_path / "run", overlap=overlap)
    watch = Watch(trainer)
    assert trainer.run()
    assert len(watch.acted) == LAST // CFG.env.envs_per_task
    assert len(set(watch.after_updates.values())) == 1 + paid(LAST)  # every update shows in these bytes
    for chunk, parameters, _, _ in watch.acted:
        # Taking turns, a chunk sees the updates that all chunks before it paid for; overlapped, all but the last one's.
        expected = paid((chunk - overlap) * CHUNK)
        assert parameters == watch.after_updates[expected], f"chunk {chunk}"
    (main,) = {threading.get_ident()}
    threads = {thread for *_, thread in watch.acted}
    assert len(threads) == 1 and (threads == {main}) is not overlap


def test_a_whole_chunk_is_collected_in_the_middle_of_the_learners_updates(tmp_path):
    """... with one set of parameters throughout, although the agent's change meanwhile."""
    trainer = make_trainer(tmp_path / "run")
    watch = Watch(trainer)
    first_updates, collected = threading.Event(), threading.Event()
    learn = trainer.learner.run

    def learn_then_wait(n_updates: int) -> None:
        learn(n_updates)
        first_updates.set()
        if not collected.is_set():
            assert collected.wait(PATIENCE)  # 10 of 25 updates are made

    def wait_for_updates() -> None:
        # The warm-up's two chunks and the first that is paid for come before any update.
        if watch.chunk == 3:
            assert first_updates.wait(PATIENCE)

    wrap(trainer._collector, "_act", wait_for_updates)
    collect = trainer._collector.collect

    def collect_and_tell(*args: Any) -> Any:
        chunk = collect(*args)
        if watch.chunk == 4:
            collected.set()
        return chunk

    trainer._collector.collect = collect_and_tell
    trainer.learner.run = learn_then_wait
    assert trainer.run()
    fourth = [(parameters, updates) for chunk, parameters, updates, _ in watch.acted if chunk == 3]
    assert {updates for _, updates in fourth} <= set(range(1, UPDATES_AT_ONCE + 1))
    assert fourth[-1][1] == UPDATES_AT_ONCE
    assert {parameters for parameters, _ in fourth} == {watch.after_updates[0]}
    assert len(fourth) == CHUNK // CFG.env.envs_per_task


def test_the_collectors_parameters_are_its_own_memory(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    mine = {p.data_ptr() for p in trainer._collector._actor.parameters()} | {trainer._collector._route_temp.data_ptr()}
    learned = {p.data_ptr() for p in trainer.agent.state_dict().values()}
    trainer.close()
    assert not mine & learned


@pytest.mark.parametrize("ratio", [1.0, 0.3, 2.5])
def test_the_ratio_is_exact_and_only_the_main_thread_touches_the_replay(tmp_path, ratio):
    trainer = make_trainer(tmp_path / "run", updates_per_step=ratio)
    threads: set[int] = set()
    for name in ("add", "sample_rows"):
        wrap(trainer.replay, name, lambda: threads.add(threading.get_ident()))
    sizes: list[tuple[int, int]] = []
    wrap(trainer.replay, "sample_rows", lambda: sizes.append((trainer.learner.updates, trainer.steps)))
    assert trainer.run()
    assert threads == {threading.get_ident()}
    # Before every update, enough steps are in the replay to have paid for it, and none more than its chunk.
    assert len(sizes) == int(ratio * CFG.total_steps)
    for updates, steps in sizes:
        assert (steps - WARMUP) * ratio >= updates + 1 > (steps - CHUNK - WARMUP) * ratio
    records = read_metrics(tmp_path / "run", "train")
    assert [(r["steps"], r["updates"]) for r in records] == [
        (s, int(max(0, s - WARMUP) * ratio)) for s in range(CHUNK, LAST + 1, CHUNK)
    ]


def test_the_collector_is_never_more_than_one_chunk_ahead(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    begun: list[int] = []
    wrap(trainer._collector, "collect", lambda: begun.append(trainer.steps))
    assert trainer.run()
    # The n-th chunk is begun when all but the last of those before it are in the replay, or being added.
    assert len(begun) == LAST // CHUNK
    for n, steps in enumerate(begun):
        assert steps in ((n - 1) * CHUNK, n * CHUNK)


def test_idle_shares_are_logged_with_every_chunk_and_told_at_the_end(tmp_path):
    for overlap in (True, False):
        run_dir = tmp_path / str(overlap)
        trainer = make_trainer(run_dir, overlap=overlap)
        assert trainer.idle is None
        assert trainer.run()
        shares = [(r["time"]["learner_idle"], r["time"]["collector_idle"]) for r in read_metrics(run_dir, "train")]
        assert len(shares) == LAST // CHUNK
        assert all(0 <= share <= 1 for pair in shares for share in pair)
        assert trainer.idle is not None
        assert 0 <= trainer.idle.learner <= trainer.idle.wall and 0 <= trainer.idle.collector <= trainer.idle.wall
        if not overlap:  # one of them always waits
            assert all(sum(pair) >= 0.998 for pair in shares)  # both are rounded


def test_waits_are_counted_between_takes(monkeypatch):
    clock = iter([0.0, 2.0, 10.0, 20.0, 20.0])
    monkeypatch.setattr("d2r_fast.training.progress.time.perf_counter", lambda: next(clock))
    progress = Progress(("reach",), 1, 0, show=False)
    progress.chunk_taken(waited=1.5, collecting=1.5, counts=False)  # nothing before it: its own time is the whole
    assert progress.waits.wall == 0
    progress.chunk_taken(waited=2.0, collecting=6.0, counts=True)  # 8 s
    assert progress.waits.shares() == {"learner_idle": 0.25, "collector_idle": 0.25}
    progress.chunk_taken(waited=0.0, collecting=1.0, counts=True)  # 10 s
    assert progress.waits == (18.0, 2.0, 11.0)
    assert str(progress.waits) == "learner 11%, collector 61%"
    times = progress.times()
    assert (times["learner_idle"], times["collector_idle"]) == (0.0, 0.9)
    progress.close()


def fail_at(trainer: Trainer, chunk: int) -> None:
    """Let the environments fail in the middle of the n-th chunk (counted from 0)."""
    actions = iter(range(LAST))
    per_chunk = CHUNK // CFG.env.envs_per_task

    def fail() -> None:
        if next(actions) == chunk * per_chunk + 2:
            raise RuntimeError("the simulation of reach failed")

    wrap(trainer._collector._envs, "send", fail)


@pytest.mark.parametrize("chunk", [0, 1, 5])
def test_a_failure_of_the_collector_is_the_runs_and_leaves_what_is_saved(tmp_path, chunk):
    run_dir = tmp_path / "run"
    trainer = make_trainer(run_dir, checkpoint_every_chunks=1)
    fail_at(trainer, chunk)
    with pytest.raises(RuntimeError, match=r"^the simulation of reach failed$"):
        trainer.run()
    saved = [load_checkpoint(path)["steps"] for path in checkpoint_files(run_dir)]
    # The chunk before the failure ends, unless the failure interrupts its updates.
    last = chunk if paid(chunk * CHUNK) == 0 or saved[-1] == chunk * CHUNK else chunk - 1
    assert saved == [CHUNK * n for n in range(1, last + 1)][-3:]
    if chunk == 5:
        trainer = resume(run_dir)
        assert trainer.run()
        assert (trainer.steps, trainer.learner.updates) == (LAST, paid(LAST))


def test_a_failure_of_the_collector_interrupts_the_updates(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    fail_at(trainer, 3)
    learn = trainer.learner.run

    def learn_after_the_failure(n_updates: int) -> None:
        trainer._feed._under_way.exception(PATIENCE)
        learn(n_updates)

    trainer.learner.run = learn_after_the_failure
    with pytest.raises(RuntimeError, match=r"^the simulation of reach failed$"):
        trainer.run()
    assert trainer.learner.updates == UPDATES_AT_ONCE  # of 25


def test_a_stop_drops_the_chunk_under_way_after_its_present_step(tmp_path):
    """SIGINT while the learner waits for a chunk: the rest of it is not collected, and its steps do not count."""
    run_dir = tmp_path / "run"
    trainer = make_trainer(run_dir)
    actions = iter(range(1, LAST))
    sent: list[int] = []
    per_chunk = CHUNK // CFG.env.envs_per_task

    def interrupt_in_the_fifth_chunk() -> None:
        sent.append(next(actions))
        if sent[-1] == 4 * per_chunk + 2:
            os.kill(os.getpid(), signal.SIGINT)
            while not trainer._stop_requested:  # the main thread's handler sets it
                threading.Event().wait(0.001)

    wrap(trainer._collector._envs, "send", interrupt_in_the_fifth_chunk)
    noise: dict[int, torch.Tensor] = {}
    wrap(trainer._collector, "collect", lambda: noise.update({len(sent): trainer._acting_generator.get_state()}))
    assert trainer.run() is False
    assert sent[-1] == 4 * per_chunk + 2
    state = load_checkpoint(find_checkpoint(run_dir))
    # The signal came at the start of the updates that the fourth chunk paid for, or in the midst of them.
    assert state["steps"] == trainer.steps == 4 * CHUNK
    assert paid(3 * CHUNK) <= state["learner"]["updates"] <= paid(4 * CHUNK)
    assert torch.equal(state["acting_generator"], noise[4 * per_chunk])  # as if the dropped chunk had never begun

    trainer = resume(run_dir)
    assert trainer.run()
    assert (trainer.steps, trainer.learner.updates) == (LAST, paid(LAST))
    records = read_metrics(run_dir, "train")
    assert [(r["steps"], r["updates"]) for r in records] == [(s, paid(s)) for s in range(CHUNK, LAST + 1, CHUNK)]


def test_a_stop_waits_for_a_few_updates_not_for_the_chunk(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    wrap(trainer.learner, "run", lambda: None, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert trainer.run() is False
    assert trainer.learner.updates == UPDATES_AT_ONCE  # of 25


def test_checkpoints_and_evaluations_come_while_a_chunk_is_under_way(tmp_path):
    """... and hold the state of the chunk's boundary, whatever the collector does meanwhile."""
    run_dir = tmp_path / "run"
    eval_every = dataclasses.replace(CFG.eval, every_chunks=2)
    trainer = make_trainer(run_dir, eval=eval_every, checkpoint_every_chunks=1, replay_capacity=1000)
    assert trainer.run()
    assert [r["steps"] for r in read_metrics(run_dir, "eval")] == list(range(2 * CHUNK, LAST + 1, 2 * CHUNK))
    for path in checkpoint_files(run_dir):
        state = load_checkpoint(path)
        assert state["replay"]["size"] == state["steps"]
        assert state["learner"]["updates"] == paid(state["steps"])
    # The noise that a saved state goes on with is that of the chunk after it: going on repeats its first draws.
    states = [load_checkpoint(path)["acting_generator"] for path in checkpoint_files(run_dir)]
    assert not torch.equal(states[0], states[1])
    generator = torch.Generator()
    generator.set_state(states[0])
    for _ in range(CHUNK // CFG.env.envs_per_task):
        torch.randn(4, 4, generator=generator)
        gumbel((1, 4, CFG.net.n_logits), torch.zeros(1), generator)
    assert torch.equal(generator.get_state(), states[1])


def test_the_collectors_thread_acts_on_one_core_and_the_learner_keeps_its_own(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        trainer = make_trainer(tmp_path / "run", total_steps=10)
        threads: dict[str, set[int]] = {"collector": set(), "learner": set()}
        wrap(trainer._collector, "_act", lambda: threads["collector"].add(torch.get_num_threads()))
        wrap(trainer.learner, "run", lambda: threads["learner"].add(torch.get_num_threads()))
        assert trainer.run()
    finally:
        torch.set_num_threads(before)
    assert threads == {"collector": {1}, "learner": {3}}


def test_deterministic_runs_take_turns_whatever_overlap_says(tmp_path, restore_torch_switches):
    trainer = make_trainer(tmp_path / "run", deterministic=True, overlap=True, total_steps=20)
    watch = Watch(trainer)
    assert trainer.run()
    assert {thread for *_, thread in watch.acted} == {threading.get_ident()}


def test_a_feed_that_was_stopped_gives_nothing(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    for ahead in (True, False):
        feed = ChunkFeed(trainer._collector, 2, ahead)
        chunk = feed.take(another=True)
        assert chunk is not None and chunk.transitions.obs.shape == (2, 4, 39)
        feed.raise_if_failed()
        feed.stop()
        if ahead:
            feed._under_way.result()  # may be whole already
        else:
            assert feed.take(another=True) is None
        if ahead:
            feed._thread.shutdown()
    trainer.close()
    assert np.isfinite(chunk.seconds)


def test_a_second_signal_while_the_learner_waits_leaves_at_once(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    actions = iter(range(LAST))

    def interrupt_twice() -> None:
        if next(actions) == 2:  # of the first chunk, which the main thread can only wait for
            os.kill(os.getpid(), signal.SIGINT)
            while not trainer._stop_requested:
                threading.Event().wait(0.001)
            os.kill(os.getpid(), signal.SIGINT)

    wrap(trainer._collector._envs, "send", interrupt_twice)
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    assert trainer.steps == 0
    assert checkpoint_files(tmp_path / "run") == []
