"""Starting and stopping environments a few times in every way, and that something left behind is found."""

import pytest
from campaigns import env_cycles


@pytest.mark.parametrize("engine, count", [("envpool", 5), ("mixed", 7)])
def test_environments_leave_nothing_behind_however_they_end(engine, count):
    tried, wrong = env_cycles.try_engine(engine, count, seed=0)
    assert wrong == []
    assert set(tried) == {way.__name__ for way in env_cycles.WAYS_WITH_WORKERS[:count]}


def test_environments_that_are_kept_are_found(monkeypatch):
    kept = []
    monkeypatch.setattr(env_cycles, "WAYS_WITH_WORKERS", [lambda envs, draw: kept.append(envs)])
    monkeypatch.setattr(env_cycles.left_behind, "__defaults__", (0.1,))  # patience
    _, (wrong,) = env_cycles.try_engine("official", 1, seed=0)
    kept[0].close()
    assert all(f"{what} " in wrong for what in ("children", "files", "shared"))
