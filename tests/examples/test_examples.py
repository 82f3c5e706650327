"""The programs of examples/, run at a small size."""

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch

from d2r_fast.commands.export import run as export
from d2r_fast.nets.agent import Agent
from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.nets.settings import NetConfigBase
from d2r_fast.training.imported import begin_run

EXAMPLES = Path(__file__).parents[2] / "examples"


def program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("levels", "modules"), [(2, 2), (4, 3)])
def test_soft_modules_are_equal_plain_and_on_the_operations(capsys, levels, modules):
    soft = program("soft_modules")
    soft.main(soft.Args(rows=60, tasks=3, levels=levels, modules=modules, width=8, hidden=12, gating=10, repeats=1))
    out = capsys.readouterr().out
    apart = re.search(r"output and gradients of (\d+) parameters differ by (\S+) of", out)
    assert apart and int(apart[1]) == 2 * (2 + 1 + 2 + (levels - 1) + 1 + (levels - 1) + levels * modules + 1)
    assert float(apart[2]) < 1e-12
    assert re.search(r"plain PyTorch \d+\.\d+ ms, d2r_fast \d+\.\d+ ms", out)


def test_the_comparison_sees_another_network(monkeypatch):
    soft = program("soft_modules")

    def scaled(self, u, gates):
        return soft.SoftModules.run_modules(self, 1.001 * u, gates)

    monkeypatch.setattr(soft.FastSoftModules, "run_modules", scaled)
    monkeypatch.setattr(soft.FastSoftModules, "all_gates", soft.SoftModules.all_gates)
    with pytest.raises(AssertionError, match="the two compute something else"):
        soft.main(soft.Args(rows=60, tasks=3, levels=2, modules=2, width=8, hidden=12, gating=10, repeats=1))


def test_sac_trains_an_actor_of_routed_modules(capsys, monkeypatch):
    sac = program("sac_routed")
    actors = []

    class Recorded(sac.RoutedActor):
        def __init__(self, *args):
            super().__init__(*args)
            actors.append((self, {name: value.clone() for name, value in self.state_dict().items()}))

    monkeypatch.setattr(sac, "RoutedActor", Recorded)
    share = sac.main(
        sac.Args(
            num_envs=2, episode_steps=5, total_timesteps=60, learning_starts=20, batch_size=8, report_every=20, seed=3
        )
    )
    assert 0 <= share <= 1
    (actor, before), lines = actors[0], capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 20", "step 40", "step 60"]
    assert "of the last 12 episodes" in lines[-1] and "nan" not in lines[-1]
    assert all(value.isfinite().all() for value in actor.state_dict().values())
    unmoved = [name for name, value in actor.state_dict().items() if (value == before[name]).all()]
    assert unmoved == []


def exported(tmp_path: Path, net: NetConfigBase) -> tuple[Agent, str]:
    """A fresh agent, and where its policy was exported to."""
    cfg, agent = dataclasses.replace(tiny.RUN, net=net), Agent(39, 4, 2, net)
    begin_run(tmp_path / "run", cfg, agent)
    assert export([str(tmp_path / "run")]) == 0
    return agent, str(tmp_path / "run" / "policy")


@pytest.mark.parametrize("switches", [{}, {"residual": False}, {"dynamic_depth": False}], ids=str)
def test_an_exported_policy_acts_alike_in_plain_pytorch(tmp_path, switches):
    net = dataclasses.replace(tiny.NET, **{"route_widths": (8, 7), "top_k": 2} | switches)
    agent, prefix = exported(tmp_path, net)
    policy = program("run_policy").Policy(prefix)
    obs, task = 3 * torch.randn(40, 39), torch.arange(40) % 2
    with torch.no_grad():
        torch.testing.assert_close(policy(obs, task), agent.actor.act_greedily(obs, task)[0])


def test_it_plays_on_the_packages_environments_without_d2r_fast(tmp_path):
    _, prefix = exported(tmp_path, tiny.NET)
    alone = (
        "import runpy, sys; sys.modules['d2r_fast'] = None; "
        f"sys.argv = ['run_policy', {prefix!r}, '--episodes', '1', '--steps', '3']; "
        f"runpy.run_path({str(EXAMPLES / 'run_policy.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", alone], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[:2] for line in done.stdout.splitlines()] == [["reach", "0.00"], ["drawer-close", "0.00"]]


def test_it_refuses_another_network(tmp_path):
    _, prefix = exported(tmp_path, MlpConfig(widths=(4,)))
    with pytest.raises(ValueError, match=r"policy\.json: expected what d2r export writes for network d2r"):
        program("run_policy").Policy(prefix)
