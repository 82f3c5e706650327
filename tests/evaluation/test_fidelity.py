"""The fidelity check on the real simulations: a dozen tasks pass, and engines that are known to be wrong do not."""

import json

import numpy as np
import pytest

from d2r_fast.envs import FIDELITY
from d2r_fast.envs.official_starts import POSITIONS, OfficialStarts
from d2r_fast.evaluation.fidelity import judge, mcnemar, run_fidelity
from d2r_fast.evaluation.play import Played

# The corrected ones, those of the official engine that EnvPool gets wrong, and some of each kind beside them.
REPRESENTATIVE = (
    "hammer",
    "button-press-topdown-wall",
    "window-close",
    "shelf-place",
    "disassemble",
    "dial-turn",
    "door-lock",
    "reach",
    "push",
    "drawer-close",
    "coffee-push",
    "handle-press",
)
PAIRS = {"episodes": 3, "envs_per_task": 3, "episode_length": 150}


def test_what_users_get_agrees_with_the_official_package():
    report = run_fidelity(REPRESENTATIVE, **PAIRS)
    assert [(row.task, row.verdict, row.reason) for row in report.tasks] == [
        (task, "ok", "") for task in REPRESENTATIVE
    ]
    assert report.ok
    assert all(row.pairs == 9 for row in report.tasks)
    # The experts do solve things, so equal success means something.
    assert sum(row.official_success > 0.8 for row in report.tasks) >= 8


def test_wrong_engines_are_caught(monkeypatch):
    """EnvPool where it is known to depart, and its corrections switched off."""
    for task in ("hammer", "button-press-topdown-wall", "window-close"):
        monkeypatch.setitem(FIDELITY, task, FIDELITY[task]._replace(correction=None))
    wrong = {
        "hammer": ("drifts", "cm off"),
        "shelf-place": ("drifts", "cm off"),
        "disassemble": ("differs", "cm off"),
        "dial-turn": ("differs", "success"),
        "button-press-topdown-wall": ("differs", "return"),
        "window-close": ("differs", "starts 20.0 cm off"),
    }
    with pytest.warns(UserWarning, match="EnvPool differs"):
        report = run_fidelity(tuple(wrong), engine="envpool", **PAIRS)
    assert not report.ok
    for row in report.tasks:
        verdict, reason = wrong[row.task]
        assert row.verdict == verdict and reason in row.reason, row
        assert f"| {row.task} | **{verdict}**: {row.reason} |" in report.markdown()
    assert json.loads(json.dumps(report.as_dict()))["ok"] is False


@pytest.mark.parametrize("task", ["reach", "coffee-pull", "dial-turn", "sweep"])
def test_official_starts_are_found_again(task):
    """From what an observation shows alone, another environment is put into the same start."""
    one, other = OfficialStarts(task, seed=1), OfficialStarts(task, seed=2)
    goals = []
    for _ in range(3):
        wanted = one.reset_at(one._draw())
        found, error = other.reset_near(wanted.astype(np.float32))
        np.testing.assert_allclose(found[POSITIONS], wanted[POSITIONS], atol=1e-5)
        assert error < 1e-5
        goals.append(wanted[POSITIONS])
    assert np.ptp(goals, axis=0).max() > 0.01


def test_a_start_out_of_reach_is_told_by_its_distance():
    env = OfficialStarts("drawer-close", seed=1)
    wanted = env.reset_at(env._draw())
    wanted[4:7] += [0.0, 0.3, 0.0]
    wanted[36:39] += [0.0, 0.3, 0.0]
    found, error = env.reset_near(wanted)
    assert error == pytest.approx(np.abs(found[POSITIONS] - wanted[POSITIONS]).max(), abs=1e-4)
    assert error > 0.1


def played(success, episode_return=None):
    success = np.array(success, bool)
    returns = np.zeros(success.shape) if episode_return is None else np.broadcast_to(episode_return, success.shape)
    return Played(np.zeros((*success.shape, 39), np.float32), success, np.array(returns, float))


def test_judge():
    yes, no, near = np.ones((3, 6)), np.zeros((3, 6)), np.zeros((3, 6))
    far = near.copy()
    far[0] = 0.02

    def verdict(ours, official, distance=near):
        row = judge("reach", ours, official, distance, n_tasks=50)
        return row.verdict, row.reason

    assert verdict(played(yes), played(yes)) == ("ok", "")
    assert verdict(played(yes), played(no)) == ("differs", "success differs")
    one_off = yes.copy()
    one_off[1, 2] = 0
    assert verdict(played(one_off), played(yes)) == ("ok", "")
    assert verdict(played(yes, 100), played(yes, 109)) == ("ok", "")
    assert verdict(played(yes, 100), played(yes, 120)) == ("differs", "return differs")
    noise = np.random.default_rng(0).normal(0, 100, (3, 6))
    assert verdict(played(yes, 100), played(yes, 120 + noise)) == ("ok", "")
    assert verdict(played(yes), played(yes), far) == ("differs", "starts 2.0 cm off")
    assert verdict(played(yes), played(yes), far[::-1])[0] == "drifts"
    one_far = near.copy()
    one_far[2, 0] = 0.05
    row = judge("reach", played(yes), played(yes), one_far, n_tasks=1)
    assert (row.verdict, row.largest_start_error) == ("ok", 0.05)


def test_mcnemar():
    yes, no = np.ones(10, bool), np.zeros(10, bool)
    assert mcnemar(yes, yes) == mcnemar(no, no) == 1
    assert mcnemar(yes, no) == mcnemar(no, yes) == 2 / 2**10
    mixed = np.arange(10) < 8  # 8 of 10 disagreeing pairs one way: 2 (1 + 10 + 45) / 1024
    assert mcnemar(mixed, ~mixed) == pytest.approx(2 * 56 / 1024)
    assert mcnemar(mixed, yes) == 0.5


def test_bad_input():
    with pytest.raises(ValueError, match=r"episodes: expected at least 2.*got 1"):
        run_fidelity(("reach",), episodes=1)
    with pytest.raises(ValueError, match=r"episode_length: expected 1\.\.500, got 501"):
        run_fidelity(("reach",), episode_length=501)
