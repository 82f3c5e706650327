"""The programs of examples/, run at a small size."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

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
