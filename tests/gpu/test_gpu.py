"""What only a GPU can show. Without one every test here is skipped, and says so."""

import copy
import dataclasses
import importlib
from pathlib import Path

import pytest
import tiny
import torch
from check_golden import LIMIT, as_one_step, check_directory

from d2r_fast import Agent, NetConfig, SacConfig
from d2r_fast.config import EnvConfig, RunConfig
from d2r_fast.learning.learner import Learner
from d2r_fast.learning.replay import Replay, Staging, Transitions
from d2r_fast.learning.sac import Batch, draw, make_optimiser, update
from d2r_fast.nets.settings import NetConfigBase
from d2r_fast.ops.select_routes import select_routes
from d2r_fast.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch finds none")

N_TASKS, ROWS, NET = 3, 24, NetConfig(n_modules=6, module_width=32, base_width=48, route_widths=(32,))


def make_batch(device: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    obs, next_obs = torch.randn(2, ROWS, 39, generator=generator)
    logits = torch.randn(1, ROWS, NET.n_logits, generator=generator)
    batch = Batch(
        obs=obs,
        action=torch.rand(ROWS, 4, generator=generator) * 2 - 1,
        reward=torch.rand(ROWS, generator=generator),
        terminal=torch.zeros(ROWS),
        next_obs=next_obs,
        task=torch.arange(N_TASKS).repeat_interleave(ROWS // N_TASKS),
        route=select_routes(logits, NET.top_k).index[0].to(torch.uint8),
    )
    return Batch(*(value.to(device) for value in batch))


@pytest.mark.parametrize(
    ("backend", "dtype"), [("reference", "float64"), ("reference", "float32"), ("triton", "float32")]
)
def test_golden_vectors(backend: str, dtype: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    for folder, n_files in (("golden", 11), ("golden_baselines", 16)):
        done = check_directory(Path(__file__).parents[1] / folder, dtype, device="cuda", backend=backend)
        assert done.n_files == n_files
        assert done.worst <= LIMIT[dtype]
        assert not done.beyond


def test_updates_agree_with_the_cpu() -> None:
    torch.manual_seed(0)
    on_cpu = Agent(39, 4, N_TASKS, NET).double()
    on_gpu = copy.deepcopy(on_cpu).cuda()
    optimisers = [make_optimiser(agent, SacConfig()) for agent in (on_cpu, on_gpu)]
    for seed in range(3):
        batch = make_batch("cpu")
        batch = Batch(*(v.double() if v.is_floating_point() else v for v in batch))
        draws = draw(on_cpu, batch, torch.Generator().manual_seed(seed), SacConfig())
        draws = draws._replace(noise=draws.noise.double(), next_noise=draws.next_noise.double())
        choice = draws.critic_choice
        cuda_choice = choice._replace(temperature=choice.temperature.cuda(), noise=choice.noise.cuda())
        cuda_draws = draws._replace(
            noise=draws.noise.cuda(), next_noise=draws.next_noise.cuda(), critic_choice=cuda_choice
        )
        update(on_cpu, optimisers[0], batch, draws, SacConfig())
        update(on_gpu, optimisers[1], Batch(*(v.cuda() for v in batch)), cuda_draws, SacConfig())
    for name, value in on_gpu.state_dict().items():
        torch.testing.assert_close(value.cpu(), on_cpu.state_dict()[name], rtol=1e-9, atol=1e-9, msg=name)


def test_an_update_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the look at the routes that it is given, which a captured update leaves to the device."""
    monkeypatch.setattr(
        importlib.import_module("d2r_fast.ops.select_routes"), "require_legal_index", lambda index: None
    )
    agent = Agent(39, 4, N_TASKS, NET).cuda()
    cfg = SacConfig()
    optimiser, generator, batch = make_optimiser(agent, cfg), torch.Generator("cuda"), make_batch("cuda")
    update(agent, optimiser, batch, draw(agent, batch, generator, cfg), cfg)  # caches tables, makes Adam's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(agent, optimiser, batch, draw(agent, batch, generator, cfg), cfg)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replay_on_the_device() -> None:
    replay = Replay(2, 40, 39, 4, (6, 2), torch.device("cuda"))
    rows = Transitions(
        torch.randn(2, 15, 39),
        torch.randn(2, 15, 4),
        torch.arange(30.0).view(2, 15),
        torch.zeros(2, 15, dtype=torch.bool),
        torch.randn(2, 15, 39),
        torch.zeros(2, 15, 6, 2, dtype=torch.uint8),
    )
    replay.add(rows)
    batch = replay.sample(64, torch.Generator("cuda").manual_seed(0))
    assert batch.obs.is_cuda
    first, second = batch.reward.view(2, 32).cpu()
    assert first.max() < 15 <= second.min()


TASKS = ("reach", "push", "door-open")


def make_learner(seed: int, cuda_graph: bool, device: str = "cuda") -> Learner:
    """A learner over a small replay; the same for the same seed."""
    torch.manual_seed(seed)
    cfg = RunConfig(
        net=NET, env=EnvConfig(tasks=",".join(TASKS)), batch_size=ROWS, replay_capacity=600, cuda_graph=cuda_graph
    )
    agent = Agent(39, 4, N_TASKS, NET).to(device)
    replay = Replay(N_TASKS, 600, 39, 4, (NET.n_modules, NET.top_k), torch.device(device))
    logits = torch.randn(1, N_TASKS * 50, NET.n_logits)
    route = select_routes(logits, NET.top_k).index.to(torch.uint8).view(N_TASKS, 50, NET.n_modules, NET.top_k)
    rows = torch.randn(N_TASKS, 50, 39), torch.rand(N_TASKS, 50, 4), torch.rand(N_TASKS, 50)
    replay.add(Transitions(*rows, torch.zeros(N_TASKS, 50, dtype=torch.bool), torch.randn(N_TASKS, 50, 39), route))
    return Learner(agent, replay, cfg, seed=1)


def test_a_captured_update_is_the_eager_one() -> None:
    eager, graphed = make_learner(0, cuda_graph=False), make_learner(0, cuda_graph=True)
    for _ in range(20):
        for learner in (eager, graphed):
            learner.run(10)
    assert graphed._one_update.is_captured and not eager._one_update.is_captured
    for name, value in graphed.agent.state_dict().items():
        torch.testing.assert_close(value, eager.agent.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)
    ours, theirs = graphed.take_metrics(), eager.take_metrics()
    for name, values in theirs.items():
        torch.testing.assert_close(torch.tensor(ours[name]), torch.tensor(values), rtol=1e-2, atol=1e-3, msg=name)


def test_a_captured_update_sees_rows_added_later_and_a_loaded_state() -> None:
    learner = make_learner(0, cuda_graph=True)
    learner.run(5)
    assert learner._one_update.is_captured
    saved = copy.deepcopy(learner.state_dict())
    replay = learner._replay
    rows = [torch.zeros(N_TASKS, 100, *store.shape[2:], dtype=store.dtype) for store in replay._store]
    replay.add(Transitions(*rows)._replace(reward=torch.full((N_TASKS, 100), torch.nan)))
    learner.run(1)
    with pytest.raises(FloatingPointError):
        learner.require_finite()
    learner = make_learner(0, cuda_graph=True)
    learner.load_state_dict(saved)
    learner.run(10)
    assert learner.updates == 15 and learner._one_update.is_captured
    learner.require_finite()


@pytest.mark.parametrize(("there", "here"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_learner_goes_on_on_the_other_device(tmp_path: Path, there: str, here: str) -> None:
    old, new = make_learner(0, cuda_graph=True, device=there), make_learner(1, cuda_graph=True, device=here)
    new.run(5)  # on the GPU: a graph that knows the moments which the saved ones replace
    old.run(5)
    state = {"agent": old.agent.state_dict(), "learner": old.state_dict(), "replay": old._replay.state_dict()}
    state = load_checkpoint(save_checkpoint(tmp_path, 5, state))
    new.agent.load_state_dict(state["agent"])
    new.load_state_dict(state["learner"])
    new._replay.load_state_dict(state["replay"])
    draws = draw(make_learner(0, True, "cpu").agent, make_batch("cpu"), torch.Generator().manual_seed(2), SacConfig())
    for learner in (old, new):  # the same update on both: moments and step counts came over too
        device = learner.agent.log_alpha.device.type
        noise, next_noise, choice, *_ = draws
        choice = choice._replace(temperature=choice.temperature.to(device), noise=choice.noise.to(device))
        at_device = draws._replace(noise=noise.to(device), next_noise=next_noise.to(device), critic_choice=choice)
        batch = make_batch(device)
        learner.update.step(*as_one_step(batch, at_device))
    for name, value in new.agent.state_dict().items():
        expected = old.agent.state_dict()[name].to(here)
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=name)  # a step is 3e-4
    new.run(10)
    new.require_finite()
    assert new.updates == 15 and new._one_update.is_captured == (here == "cuda")


def test_staged_rows_reach_the_device_as_they_are() -> None:
    staging = Staging(2, 7, 39, 4, (6, 2), pinned=True)
    assert all(field.is_pinned() for field in staging.rows)
    for i, field in enumerate(staging.rows):
        field.copy_(torch.arange(field.numel()).view_as(field) % (i + 2))
    for here, there in zip(staging.rows, staging.rows_on(torch.device("cuda")), strict=True):
        assert there.is_cuda and there.is_contiguous()
        assert torch.equal(here, there.cpu())


@pytest.fixture
def trainer_class() -> type:
    """Training needs packages that the kernels do without; where they are missing, its tests alone are skipped."""
    for package in ("envpool", "cattrs", "tensorboard"):
        pytest.importorskip(package)
    from d2r_fast.training.trainer import Trainer

    return Trainer


@pytest.mark.parametrize("overlap", [True, False])
def test_training_collects_on_the_gpu_beside_the_learner(trainer_class: type, tmp_path: Path, overlap: bool) -> None:
    cfg = dataclasses.replace(tiny.RUN, device="cuda", overlap=overlap)
    trainer = trainer_class(cfg, tmp_path / "run", None, False)
    assert trainer.run()
    assert (trainer.steps, trainer.learner.updates) == (100, 40)
    rows = trainer.replay.state_dict()["rows"]
    torch.testing.assert_close(rows["next_obs"][..., 18:36], rows["obs"][..., :18])
    assert rows["route"].max() < tiny.NET.n_modules


@pytest.mark.parametrize("net", tiny.NETS, ids=lambda net: net.kind)
def test_networks_without_routes_train_on_the_gpu(trainer_class: type, tmp_path: Path, net: NetConfigBase) -> None:
    trainer = trainer_class(dataclasses.replace(tiny.RUN, device="cuda", net=net), tmp_path / "run", None, False)
    assert trainer.run()
    assert trainer.learner.updates == 40 and trainer.learner._one_update.is_captured
    trainer.learner.require_finite()


@pytest.mark.parametrize(("there", "here"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_the_other_device(trainer_class: type, tmp_path: Path, there: str, here: str) -> None:
    half = dataclasses.replace(tiny.RUN, device=there, total_steps=40)
    assert trainer_class(half, tmp_path / "run", None, False).run()
    state = load_checkpoint(find_checkpoint(tmp_path / "run"))
    trainer = trainer_class(dataclasses.replace(tiny.RUN, device=here), tmp_path / "run", state, False)
    assert (trainer.steps, trainer.learner.updates) == (60, 20) and trainer.device.type == here
    assert trainer.run()
    assert (trainer.steps, trainer.learner.updates) == (100, 40)
