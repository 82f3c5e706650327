"""The environments, on the real simulation: what the caller gets against raw EnvPool pools stepped by hand."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest

from d2r_fast import envs
from d2r_fast.envs import ALL_TASKS, MT10, MT25, MT50, EnvPoolEnvs, make_envs, parse_tasks
from d2r_fast.envs.envpool import envpool_name

TASKS = ("reach", "drawer-close", "push")
N = 3
LENGTH = 6


def random_actions(steps, tasks=TASKS, n=N, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (steps, len(tasks), n, 4)).astype(np.float32)


def rollout(actions, **changes):
    """First obs, and each Step field over time; `changes` override the arguments."""
    kwargs = {"tasks": TASKS, "envs_per_task": N, "episode_length": LENGTH, "seed": 5} | changes
    with make_envs(**kwargs) as e:
        first = e.reset()
        steps = [e.step(action) for action in actions]
    return first, envs.Step(*(np.stack(field) for field in zip(*steps, strict=True)))


def test_task_lists_are_the_official_ones():
    from metaworld import env_dict

    assert [f"{task}-v3" for task in MT10] == list(env_dict.MT10_V3)
    assert [f"{task}-v3" for task in MT25] == list(env_dict.MT25_V3)
    assert [f"{task}-v3" for task in MT50] == list(env_dict.MT50_V3)
    assert sorted(f"{task}-v3" for task in ALL_TASKS) == sorted(env_dict.ALL_V3_ENVIRONMENTS)


def test_every_task_has_an_envpool_name():
    import envpool

    names = [name for name in envpool.list_all_envs() if name.startswith("MetaWorld/")]
    assert sorted(map(envpool_name, ALL_TASKS)) == sorted(names)


def test_parse_tasks():
    assert parse_tasks("MT10") == parse_tasks(" mt10 ") == MT10
    assert (parse_tasks("MT25"), parse_tasks("mt50")) == (MT25, MT50)
    assert parse_tasks("MT1-reach") == parse_tasks(" mt1-Reach-v3 ") == ("reach",)
    assert parse_tasks("reach") == ("reach",)
    assert parse_tasks(" window-open-v3 , Reach,door-close ") == ("window-open", "reach", "door-close")


@pytest.mark.parametrize(
    "spec, message",
    [
        ("", "no task named: expected"),
        ("  ", "no task named: expected"),
        ("reach,", 'unknown task "" at position 2'),
        ("reach,drawer-clsoe", 'unknown task "drawer-clsoe" at position 2, did you mean "drawer-close"'),
        ("qqq", r'unknown task "qqq" at position 1 \(expected'),
        ("MT11", 'unknown task "mt11"'),
        ("MT1-", 'unknown task "" at position 1'),
        ("MT1-reahc", 'unknown task "reahc" at position 1, did you mean "reach"'),
        ("MT1-reach,push", '"MT1-" takes one task, got "MT1-reach,push"'),
        ("push,MT1-reach", 'unknown task "mt1-reach" at position 2'),
        ("reach,push,reach-v3", '"reach" is named twice'),
    ],
)
def test_parse_tasks_names_the_culprit(spec, message):
    with pytest.raises(ValueError, match=message):
        parse_tasks(spec)


def test_shapes_and_dtypes():
    with make_envs(TASKS, N, LENGTH, seed=0) as e:
        assert (e.tasks, e.n_tasks, e.envs_per_task) == (TASKS, 3, N)
        assert (e.obs_size, e.action_size, e.episode_length) == (39, 4, LENGTH)
        obs = e.reset()
        assert (obs.shape, obs.dtype) == ((3, N, 39), np.float32)
        step = e.step(random_actions(1)[0])
        for name, wide, dtype in [
            ("obs", (39,), np.float32),
            ("next_obs", (39,), np.float32),
            ("reward", (), np.float32),
            ("terminated", (), bool),
            ("truncated", (), bool),
            ("success", (), bool),
        ]:
            array = getattr(step, name)
            assert (array.shape, array.dtype) == ((3, N, *wide), dtype), name


def test_transitions_are_envpools_without_its_reset_rows():
    """A raw pool a task, same seeds and actions: the rows with elapsed_step 0 become `obs`, all others a transition."""
    import envpool

    actions = random_actions(3 * LENGTH + 2)
    first, ours = rollout(actions)
    for k, task in enumerate(TASKS):
        pool = envpool.make(
            envpool_name(task),
            env_type="gymnasium",
            num_envs=N,
            num_threads=2,
            seed=5 + k * N,
            max_episode_steps=LENGTH,
            partially_observable=False,
        )
        raw_obs, _ = pool.reset()
        np.testing.assert_array_equal(first[k], raw_obs.astype(np.float32))
        for t, action in enumerate(actions):
            raw_obs, reward, terminated, truncated, info = pool.step(action[k])
            assert (info["elapsed_step"] == t % LENGTH + 1).all()
            np.testing.assert_array_equal(info["env_id"], np.arange(N))
            np.testing.assert_array_equal(ours.next_obs[t, k], raw_obs.astype(np.float32))
            np.testing.assert_array_equal(ours.reward[t, k], reward)
            np.testing.assert_array_equal(ours.terminated[t, k], terminated)
            np.testing.assert_array_equal(ours.truncated[t, k], truncated)
            np.testing.assert_array_equal(ours.success[t, k], info["success"] == 1)
            if truncated.all():
                raw_obs, reward, _, _, info = pool.step(np.ones((N, 4), np.float32))
                assert (info["elapsed_step"] == 0).all()
                if task == "reach":
                    assert (reward > 1).all()  # no action earned this, so the row would be dangerous to keep
            np.testing.assert_array_equal(ours.obs[t, k], raw_obs.astype(np.float32))


def test_episodes_follow_one_another_without_a_seam():
    steps = 3 * LENGTH + 2
    first, rolled = rollout(random_actions(steps))
    ends = (np.arange(steps) + 1) % LENGTH == 0
    assert (rolled.truncated == ends[:, None, None]).all()
    assert not rolled.terminated.any()
    np.testing.assert_array_equal(rolled.obs[~ends], rolled.next_obs[~ends])
    assert (rolled.obs[ends] != rolled.next_obs[ends]).any(-1).all()

    acted_on = np.concatenate([first[None], rolled.obs[:-1]])  # [steps,T,n,39]
    # Each next_obs remembers the obs before it and keeps the goal.
    np.testing.assert_array_equal(rolled.next_obs[..., 18:36], acted_on[..., :18])
    np.testing.assert_array_equal(rolled.next_obs[..., 36:], acted_on[..., 36:])


def test_goals_differ_between_tasks_environments_and_episodes():
    same = ("reach", "reach-wall")  # both draw from nearly one range, so that one stream would give one goal
    first, rolled = rollout(random_actions(2 * LENGTH, same), tasks=same)
    goals = np.concatenate([first[None], rolled.obs[LENGTH - 1 :: LENGTH]])[..., 36:]  # [3,T,n,3]
    assert len(np.unique(goals.reshape(-1, 3), axis=0)) == 3 * len(same) * N
    fractions = (goals - goals.min((0, 2), keepdims=True)) / np.ptp(goals, axis=(0, 2), keepdims=True)
    assert not np.allclose(fractions[:, 0], fractions[:, 1], atol=1e-3)


def test_seed_decides_everything():
    actions = random_actions(2 * LENGTH + 1)
    first, rolled = rollout(actions)
    again_first, again = rollout(actions)
    np.testing.assert_array_equal(first, again_first)
    for name in envs.Step._fields:
        np.testing.assert_array_equal(getattr(rolled, name), getattr(again, name), err_msg=name)

    other_first, other = rollout(actions, seed=5 + len(TASKS) * N)
    assert (first != other_first).any(-1).all()
    assert (rolled.reward != other.reward).any(0).all()


def test_threads_do_not_change_the_numbers():
    rolled = []
    for num_threads in (1, 3):
        with EnvPoolEnvs(TASKS, N, LENGTH, seed=5, num_threads=num_threads) as e:
            e.reset()
            rolled.append(np.stack([e.step(action).obs for action in random_actions(LENGTH + 2)]))
    np.testing.assert_array_equal(*rolled)


def test_reward_scale():
    actions = random_actions(LENGTH)
    _, plain = rollout(actions)
    _, scaled = rollout(actions, reward_scale=0.25)
    np.testing.assert_array_equal(scaled.reward, plain.reward * np.float32(0.25))
    np.testing.assert_array_equal(scaled.obs, plain.obs)


def test_reset_in_the_middle_of_an_episode_starts_a_whole_one():
    with make_envs(TASKS, N, LENGTH, seed=0) as e:
        first = e.reset()
        for action in random_actions(2):
            e.step(action)
        again = e.reset()
        assert (again[..., 36:] != first[..., 36:]).any(-1).all()
        ends = [e.step(action).truncated.all() for action in random_actions(LENGTH)]
        assert ends == [False] * (LENGTH - 1) + [True]


def test_arrays_are_the_callers_to_keep():
    with make_envs(TASKS, N, LENGTH, seed=0) as e:
        kept = [e.reset()]
        copies = [kept[0].copy()]
        for action in random_actions(2 * LENGTH):
            step = e.step(action)
            assert not np.shares_memory(step.obs, step.next_obs)
            kept += step
            copies += [array.copy() for array in step]
            action[:] = 0
        for array, copy in zip(kept, copies, strict=True):
            np.testing.assert_array_equal(array, copy)


def test_action_errors_step_nothing():
    good = random_actions(2)
    with make_envs(TASKS, N, LENGTH, seed=5) as e:
        e.reset()
        for bad, message in [
            (good[0].astype(np.float64), r"expected a numpy array, float32 \(3, 3, 4\), got float64 \(3, 3, 4\)"),
            (good[0, :2], r"got float32 \(2, 3, 4\)"),
            (good[0].tolist(), "got list"),
        ]:
            with pytest.raises(ValueError, match=message):
                e.step(bad)
        bad = good[0].copy()
        bad[1, 2, 3] = np.nan
        with pytest.raises(ValueError, match="not finite for task drawer-close, environment 2"):
            e.step(bad)
        after = e.step(good[0])
    np.testing.assert_array_equal(after.obs, rollout(good[:1])[1].obs[0])


def test_calls_out_of_order():
    action = random_actions(1)[0]
    e = make_envs(TASKS, N, LENGTH, seed=0)
    with pytest.raises(RuntimeError, match=r"send\(\): call reset\(\) first"):
        e.send(action)
    with pytest.raises(RuntimeError, match=r"recv\(\): call reset\(\) first"):
        e.recv()
    e.reset()
    with pytest.raises(RuntimeError, match="nothing was sent"):
        e.recv()
    e.send(action)
    for call in (e.reset, lambda: e.send(action)):
        with pytest.raises(RuntimeError, match="a step is under way"):
            call()
    e.recv()
    e.close()
    e.close()
    for call in (e.reset, e.recv, lambda: e.send(action), lambda: e.step(action)):
        with pytest.raises(RuntimeError, match="the environments are closed"):
            call()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ()}, "no list of tasks"),
        ({"tasks": "reach"}, "no list of tasks: 'reach'"),
        ({"tasks": ("reach-v3",)}, 'unknown task "reach-v3" at position 1, did you mean "reach"'),
        ({"envs_per_task": 0}, "envs_per_task=0"),
        ({"episode_length": 0}, "episode_length=0"),
        ({"seed": -1}, r"seed=-1 must lie in 0\.\.2147483639"),
        ({"seed": 2**31 - 8}, "seed=2147483640"),
    ],
)
def test_constructor_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make_envs(**{"tasks": TASKS, "envs_per_task": N, "episode_length": LENGTH, "seed": 0} | changes)


def test_the_largest_seed_works():
    rollout(random_actions(1), seed=2**31 - len(TASKS) * N)


def test_pools_out_of_step_are_refused():
    with make_envs(TASKS, N, LENGTH, seed=0) as e:
        e.reset()
        e.step(random_actions(1)[0])
        e._pools[1].reset(np.array([0], np.int32))  # behind the engine's back, one step into the episode
        with pytest.raises(RuntimeError, match=r"of drawer-close must end together.*truncated=\[False  True  True"):
            for action in random_actions(2 * LENGTH):
                e.step(action)
        with pytest.raises(RuntimeError, match="an earlier call failed half way"):
            e.recv()  # EnvPool itself would wait for ever


def test_scripted_experts_succeed_episode_after_episode():
    from metaworld.policies import ENV_POLICY_MAP

    tasks, n, length = ("drawer-close", "window-open"), 2, 130
    experts = [ENV_POLICY_MAP[f"{task}-v3"]() for task in tasks]
    with make_envs(tasks, n, length, seed=0) as e:
        obs = e.reset()
        for episode in range(3):
            solved = np.zeros((len(tasks), n), bool)
            for _ in range(length):
                wanted = [[expert.get_action(obs[k, i]) for i in range(n)] for k, expert in enumerate(experts)]
                step = e.step(np.clip(wanted, -1, 1).astype(np.float32))
                solved |= step.success
                obs = step.obs
            assert step.truncated.all()
            assert solved.all(), (episode, solved)


def test_making_and_closing_frees_memory_and_threads():
    def resident_mib():
        libc.malloc_trim(0)  # glibc keeps freed memory, up to some 300 MiB here, which is no leak
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    def use_once():
        e = make_envs(("reach", "drawer-close"), 2, LENGTH, seed=0)
        e.reset()
        e.send(random_actions(1, ("reach", "drawer-close"), 2)[0])
        e.close()  # with a step under way, as an interrupted run would
        closed.append(e)  # held, so that it is close() that frees them

    libc = ctypes.CDLL("libc.so.6")
    closed = []
    use_once()
    before, threads = resident_mib(), len(os.listdir("/proc/self/task"))
    for _ in range(20):
        use_once()
    assert resident_mib() - before < 100  # keeping them would take about 20 * 4 * 17 MiB
    assert len(os.listdir("/proc/self/task")) <= threads


def test_envpool_is_loaded_late_and_its_absence_explained():
    code = """
import sys
import d2r_fast.envs as envs
assert not {"envpool", "metaworld", "mujoco"} & set(sys.modules)
sys.modules["envpool"] = None
try:
    envs.make_envs(["reach"], 1, 5, seed=0)
except ImportError as error:
    assert "pip install envpool==1.2.5" in str(error), error
else:
    raise AssertionError("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
