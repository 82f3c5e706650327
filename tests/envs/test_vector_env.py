"""The Gymnasium vector environment: Gymnasium's own checks, the official one's conventions, and `make_envs` beneath."""

import gymnasium
import metaworld  # noqa: F401 (registers the official environments)
import numpy as np
import pytest
from gymnasium.utils import env_checker
from gymnasium.vector import AutoresetMode

from d2r_fast.envs import MT10, make_envs, vector_env
from d2r_fast.envs.vector_env import MetaWorldVectorEnv

TASKS = ("reach", "drawer-close")
LENGTH = 4


def make(**changes) -> MetaWorldVectorEnv:
    kwargs = {"tasks": ",".join(TASKS), "num_envs": 4, "max_episode_steps": LENGTH} | changes
    return gymnasium.make_vec("d2r_fast/MetaWorld-v0", **kwargs)


@pytest.mark.parametrize("kwargs", [{}, {"use_one_hot": True}, {"tasks": "reach", "num_envs": 1}])
@pytest.mark.filterwarnings("error")
def test_gymnasiums_checks(kwargs):
    envs = make(**kwargs)
    env_checker.check_reset_seed_determinism(envs)
    env_checker.check_reset_options(envs)
    env_checker.check_reset_return_type(envs)
    env_checker.check_reset_return_info_deprecation(envs)
    env_checker.check_seed_deprecation(envs)
    env_checker.check_observation_space(envs.single_observation_space)
    env_checker.check_action_space(envs.single_action_space)
    if envs.num_envs == 1:  # made for single environments, it asks `if truncated`
        env_checker.check_returned_data_not_reused(envs)
    envs.close()
    assert envs.closed
    envs.close()


def test_spaces_and_metadata():
    envs = make(use_one_hot=True)
    assert envs.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    assert (envs.num_envs, envs.tasks) == (4, TASKS)
    assert (envs.single_observation_space.shape, envs.single_observation_space.dtype) == ((41,), np.float32)
    assert (envs.observation_space.shape, envs.action_space.shape) == ((4, 41), (4, 4))
    obs, info = envs.reset(seed=0)
    assert info == {}
    np.testing.assert_array_equal(obs[:, 39:], [[1, 0], [1, 0], [0, 1], [0, 1]])
    again = gymnasium.make_vec(envs.spec)
    np.testing.assert_array_equal(again.reset(seed=0)[0], obs)
    envs.close()
    again.close()


def test_registered_benchmarks():
    assert {"d2r_fast/MT10-v0", "d2r_fast/MT25-v0", "d2r_fast/MT50-v0"} <= set(gymnasium.registry)
    envs = gymnasium.make_vec("d2r_fast/MT10-v0")
    assert (envs.unwrapped.tasks, envs.num_envs, envs.spec.kwargs["max_episode_steps"]) == (MT10, 10, 500)
    assert gymnasium.make_vec("d2r_fast/MT10-v0", num_envs=30).observation_space.shape == (30, 39)
    assert gymnasium.make_vec("d2r_fast/MT25-v0").num_envs == 25
    assert gymnasium.make_vec("d2r_fast/MT50-v0", use_one_hot=True).observation_space.shape == (50, 89)


def test_rows_are_those_of_make_envs(monkeypatch):
    """Task-major, unscaled; the true last observation beside the first of the next episode; returns add up."""
    made = []
    monkeypatch.setattr(vector_env, "make_envs", lambda **kwargs: made.append(kwargs) or make_envs(**kwargs))
    envs = make()
    rng = np.random.default_rng(1)
    obs, _ = envs.reset(seed=3)
    totals = np.zeros(4)
    with make_envs(**made[0]) as reference:
        np.testing.assert_array_equal(obs, reference.reset().reshape(4, 39))
        for t in range(2 * LENGTH + 1):
            action = rng.uniform(-1, 1, (4, 4)).astype(np.float32)
            obs, reward, terminated, truncated, info = envs.step(action)
            step = reference.step(action.reshape(2, 2, 4))
            np.testing.assert_array_equal(obs, step.obs.reshape(4, 39))
            np.testing.assert_array_equal(reward, step.reward.reshape(4))
            assert not terminated.any() and (truncated == ((t + 1) % LENGTH == 0)).all()
            totals += reward
            if truncated.all():
                np.testing.assert_array_equal(np.stack(info["final_obs"]), step.next_obs.reshape(4, 39))
                np.testing.assert_array_equal(info["final_info"]["success"], step.success.reshape(4))
                np.testing.assert_array_equal(info["final_info"]["episode"]["r"], totals)
                np.testing.assert_array_equal(info["final_info"]["episode"]["l"], [LENGTH] * 4)
                totals[:] = 0
            else:
                assert "final_obs" not in info
                np.testing.assert_array_equal(info["success"], step.success.reshape(4))
                assert info["_success"].all()
    envs.close()


def test_seeds():
    envs = make()
    first, _ = envs.reset(seed=1)
    goes_on, _ = envs.reset()
    same, _ = envs.reset(seed=1)
    np.testing.assert_array_equal(first, same)
    np.testing.assert_array_equal(goes_on, envs.reset()[0])
    neighbour, _ = envs.reset(seed=2)
    goals = np.concatenate([first, goes_on, neighbour])[:, 36:]
    assert len(np.unique(goals, axis=0)) == 12
    envs.close()
    unseeded = [make().reset()[0] for _ in range(2)]
    assert (unseeded[0] != unseeded[1]).any()


def shapes(info):
    """The structure of an info, values left out; times are the official wrapper's own."""
    return {
        key: shapes(value) if isinstance(value, dict) else (value.shape, value.dtype)
        for key, value in info.items()
        if key.removeprefix("_") not in OFFICIAL_ONLY
    }


# What the official environments tell beside it: figures out of the reward, and the seconds an episode took.
OFFICIAL_ONLY = {
    "near_object",
    "grasp_success",
    "grasp_reward",
    "in_place_reward",
    "obj_to_target",
    "unscaled_reward",
    "t",
}


@pytest.mark.parametrize("one_hot", [False, True])
def test_conventions_are_those_of_the_official_vector_environment(one_hot):
    kwargs = {"max_episode_steps": LENGTH, "use_one_hot": one_hot}
    official = gymnasium.make_vec(
        "Meta-World/custom-mt-envs", vector_strategy="sync", envs_list=[f"{task}-v3" for task in TASKS], **kwargs
    )
    ours = make(num_envs=2, **kwargs)
    assert ours.metadata["autoreset_mode"] == official.metadata["autoreset_mode"]
    assert ours.observation_space.shape == official.observation_space.shape
    assert ours.action_space == official.action_space
    both = (official.reset(seed=1)[0], ours.reset(seed=1)[0])
    np.testing.assert_array_equal(both[0][:, 39:], both[1][:, 39:])
    for t in range(LENGTH):
        action = np.full((2, 4), 0.5, np.float32)
        a, b = official.step(action), ours.step(action)
        for theirs, mine in zip(a[1:4], b[1:4], strict=True):
            assert (theirs.shape, theirs.dtype) == (mine.shape, mine.dtype)
        assert a[3].all() == b[3].all() == (t == LENGTH - 1)
        assert shapes(a[4]) == shapes(b[4])
    for theirs, mine in zip(a[4]["final_obs"], b[4]["final_obs"], strict=True):
        assert theirs.shape == mine.shape == (41 if one_hot else 39,)
    official.close()
    ours.close()


def test_vector_wrappers_take_it():
    envs = gymnasium.wrappers.vector.RecordEpisodeStatistics(make(use_one_hot=True))
    envs = gymnasium.wrappers.vector.NormalizeReward(envs)
    envs.reset(seed=0)
    for _ in range(LENGTH):
        envs.action_space.seed(0)
        *_, info = envs.step(envs.action_space.sample())
    assert (info["episode"]["l"] == LENGTH).all()
    envs.close()


def test_bad_input():
    with pytest.raises(ValueError, match="num_envs: expected a multiple of the 2 tasks, got 3"):
        make(num_envs=3)
    with pytest.raises(ValueError, match="unknown task"):
        make(tasks="raech")
    envs = make()
    with pytest.raises(gymnasium.error.ResetNeeded, match="reset"):
        envs.step(np.zeros((4, 4), np.float32))
    with pytest.raises(ValueError, match="no options"):
        envs.reset(options={"reset_mask": np.ones(4, bool)})
    envs.reset(seed=0)
    with pytest.raises(ValueError, match=r"expected shape \(4, 4\), got \(2, 4\)"):
        envs.step(np.zeros((2, 4), np.float32))
    with pytest.raises(ValueError, match="not finite"):
        envs.step(np.full((4, 4), np.nan, np.float32))
    envs.close()
