"""Every network trains, acts, is evaluated, saved and gone on with: tiny runs on the real simulation."""

import dataclasses
import pickle
import shutil

import numpy as np
import pytest
import torch
from tiny import NET, NETS, RUN

from d2r_fast.config import RunConfig, SacConfig
from d2r_fast.config_json import config_from_json, config_to_json
from d2r_fast.evaluation.policies import GreedyPolicy
from d2r_fast.presets import PRESETS
from d2r_fast.training.agents import make_agent
from d2r_fast.training.checkpoint import checkpoint_files, find_checkpoint, load_checkpoint
from d2r_fast.training.metrics import read_metrics
from d2r_fast.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("restore_torch_switches")


def train(run_dir, cfg, resume=None):
    trainer = Trainer(cfg, run_dir, resume=resume, show_progress=False)
    assert trainer.run()
    return trainer


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.kind)
def test_a_network_without_routes_trains(tmp_path, net):
    cfg = dataclasses.replace(RUN, net=net, total_steps=40)
    before = make_agent(cfg, torch.device("cpu")).state_dict()
    trainer = train(tmp_path, cfg)
    after = trainer.agent.state_dict()
    assert all(value.isfinite().all() and not torch.equal(value, before[name]) for name, value in after.items())
    assert config_from_json((tmp_path / "config.json").read_text(), "here") == cfg
    records = read_metrics(tmp_path, "train")
    assert records[-1]["updates"] == trainer.learner.updates == 20
    assert all("active_modules" not in record for record in records)
    assert all(record["module_use"] == [[], []] for record in read_metrics(tmp_path, "eval"))
    assert trainer.replay.state_dict()["rows"]["route"].shape == (2, 30, 0, 0)


NO_LIMITS = SacConfig(max_task_loss=None, max_grad_norm=None, max_alpha=None)
ABLATED = dataclasses.replace(NET, dynamic_depth=False), SacConfig(route_balancing=False, actor_routes="sampled")


@pytest.mark.parametrize(
    ("net", "sac"),
    [
        (NETS[2], dataclasses.replace(NO_LIMITS, order="alpha_first", clip_alpha=False)),
        (NETS[3], SacConfig(max_task_loss=1e-3, reset_extreme=True)),
        (NETS[4], dataclasses.replace(NO_LIMITS, order="actor_first")),
        ABLATED,
    ],
    ids=["soft-modules", "paco", "moore", "d2r-ablated"],
)
def test_a_resumed_run_is_the_run_that_never_stopped(tmp_path, net, sac):
    cfg = dataclasses.replace(RUN, net=net, sac=sac, deterministic=True, total_steps=40)
    train(tmp_path / "whole", cfg)
    run_dir = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    checkpoint_files(run_dir)[-1].unlink()
    state = load_checkpoint(find_checkpoint(run_dir))
    assert state["steps"] == 40
    train(run_dir, config_from_json(state["config"], "here"), resume=state)
    for kind in ("train", "eval"):
        ours, theirs = ([r | {"time": None} for r in read_metrics(d, kind)] for d in (run_dir, tmp_path / "whole"))
        assert ours == theirs
    ours, theirs = (load_checkpoint(find_checkpoint(d))["agent"] for d in (run_dir, tmp_path / "whole"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.parametrize("net", [NET, *NETS], ids=lambda net: net.kind)
def test_a_policy_acts_elsewhere_as_here(net):
    agent = make_agent(dataclasses.replace(RUN, net=net), torch.device("cpu"))
    here = GreedyPolicy(agent.actor)
    there = pickle.loads(pickle.dumps(here))
    rows = np.concatenate([np.random.default_rng(0).normal(size=(6, 39)), np.eye(2)[[0, 1, 1, 0, 1, 1]]], 1)
    action = here.eval_action(rows.astype(np.float32))
    assert action.shape == (6, 4) and np.array_equal(action, there.eval_action(rows.astype(np.float32)))
    assert [len(use) for use in here.module_use()] == [net.route_shape[0]] * 2


@pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name][1].n_tasks == 10])
def test_a_presets_network_can_be_made(name):
    cfg: RunConfig = PRESETS[name][1]
    agent = make_agent(cfg, torch.device("cpu"))
    obs, task = torch.randn(10, 39), torch.arange(10)
    with torch.no_grad():
        action, routes = agent.actor.act_greedily(obs, task)
    assert action.shape == (10, 4) and (routes is None) == (cfg.net.route_shape == (0, 0))
    assert config_from_json(config_to_json(cfg), "here") == cfg
