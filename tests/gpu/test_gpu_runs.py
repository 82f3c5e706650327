"""Whole runs on a GPU: the same again, stopped and gone on with, and captures that fail on the way."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from test_gpu import make_learner
from test_gpu_acting import make_collector

from d2r_fast.training.checkpoint import find_checkpoint, load_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch finds none")
ON_GPU = dataclasses.replace(tiny.RUN, device="cuda")


@pytest.fixture
def trainer_class() -> type:
    """Training needs packages that the kernels do without."""
    for package in ("envpool", "cattrs", "tensorboard"):
        pytest.importorskip(package)
    from d2r_fast.training.trainer import Trainer

    return Trainer


def records(run_dir: Path) -> list[dict]:
    """The metrics of a run, without what the clock says."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [{**json.loads(line), "time": None} for line in lines]


@pytest.mark.usefixtures("restore_torch_switches")
@pytest.mark.parametrize("cuda_graph", [True, False], ids=["graph", "no_graph"])
def test_a_deterministic_run_is_the_same_again_and_after_a_resume(
    trainer_class: type, tmp_path: Path, cuda_graph: bool
) -> None:
    """With captures, evaluations and checkpoints on the way."""
    cfg = dataclasses.replace(ON_GPU, deterministic=True, cuda_graph=cuda_graph)
    for name in ("a", "b"):
        trainer = trainer_class(cfg, tmp_path / name, None, False)
        assert trainer.run() and trainer.learner._one_update.is_captured == cuda_graph
    assert records(tmp_path / "a") == records(tmp_path / "b")

    half = dataclasses.replace(cfg, total_steps=40)
    assert trainer_class(half, tmp_path / "c", None, False).run()
    state = load_checkpoint(find_checkpoint(tmp_path / "c"))
    assert trainer_class(cfg, tmp_path / "c", state, False).run()
    whole, resumed = ([r for r in records(tmp_path / name) if r["kind"] == "train"] for name in ("a", "c"))
    assert resumed == whole


def test_sigint_saves_and_the_run_goes_on(trainer_class: type, tmp_path: Path) -> None:
    trainer = trainer_class(ON_GPU, tmp_path / "run", None, False)
    learn = trainer.learner.run

    def learn_and_interrupt(n_updates: int) -> None:
        learn(n_updates)
        if trainer.learner.updates >= 15:  # captured by then
            trainer.learner.run = learn
            os.kill(os.getpid(), signal.SIGINT)

    trainer.learner.run = learn_and_interrupt
    assert not trainer.run()
    stopped_at = trainer.learner.updates
    assert 15 <= stopped_at < 40 and trainer.learner._one_update.is_captured
    state = load_checkpoint(find_checkpoint(tmp_path / "run"))
    for name, value in trainer.agent.state_dict().items():
        assert torch.equal(state["agent"][name].cpu(), value.cpu()), name
    again = trainer_class(ON_GPU, tmp_path / "run", state, False)
    assert again.learner.updates == stopped_at
    assert again.run() and again.learner.updates == 40
    again.learner.require_finite()


def test_the_learners_clock_is_the_devices(trainer_class: type, tmp_path: Path) -> None:
    """Replays are asynchronous: after a chunk's updates, and after a call but for the last, none is under way."""
    trainer = trainer_class(ON_GPU, tmp_path / "run", None, False)
    learn, learner = trainer.learner.run, trainer.learner
    earlier: list[torch.cuda.Event] = []

    def learn_and_look(n_updates: int) -> None:
        learn(n_updates)
        assert all(made.query() for made in earlier)
        assert learner._made is not None
        earlier.append(learner._made)

    learner.run = learn_and_look
    assert trainer.run() and earlier[-1].query()


def synchronisations(run: object) -> int:
    """How often a call waits for the device."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run()  # type: ignore[operator]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in told)


@pytest.mark.parametrize("cuda_graph", [True, False], ids=["graph", "no_graph"])
def test_an_update_with_its_sampling_never_waits_for_the_device(cuda_graph: bool) -> None:
    learner = make_learner(0, cuda_graph=cuda_graph)
    learner.run(6)
    assert synchronisations(lambda: learner.run(10)) == 0


def test_acting_waits_once_a_step_and_twice_a_chunk() -> None:
    """For its actions; then for the routes, and how many modules they reach."""
    collector = make_collector(cuda_graph=True)
    collector.collect(8)
    assert collector._policy.is_captured
    few, many = (synchronisations(lambda n=n: collector.collect(n)) for n in (5, 25))
    assert (many - few, few) == (20, 5 + 2)


# In a process of its own: torch's allocator keeps thinking that the failed capture goes on.
FAILING_CAPTURE = """
import sys, warnings
sys.path[:0] = sys.argv[1:]
import torch
from test_gpu import make_learner

learner, eager = make_learner(0, cuda_graph=True), make_learner(0, cuda_graph=False)
update = learner._one_update._run

def update_and_look():
    update()
    learner.agent.log_alpha.sum().item()

learner._one_update._run = update_and_look
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    learner.run(12)
told = [w for w in told if "not as a CUDA graph" in str(w.message)]
assert len(told) == 1 and str(told[0].message).startswith("updates: "), told
eager.run(12)
assert not learner._one_update.is_captured and learner.updates == 12
for name, value in learner.tensors().items():
    torch.testing.assert_close(value, eager.tensors()[name], rtol=1e-3, atol=1e-4, msg=name)
learner.require_finite()
"""


def test_training_goes_on_after_a_capture_that_failed() -> None:
    here = Path(__file__).parent
    command = [sys.executable, "-c", FAILING_CAPTURE, str(here), str(here.parent)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
