"""Which engine runs a task, what is corrected on EnvPool, and engines mixed; on the real simulations."""

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from d2r_fast.envs import (
    ALL_TASKS,
    FIDELITY,
    MT10,
    MT25,
    MT50,
    EnvPoolEnvs,
    MixedEnvs,
    Step,
    choose_engines,
    describe_engines,
    make_envs,
    scenes,
)
from d2r_fast.envs.official import OfficialEnvs
from d2r_fast.envs.official_starts import OfficialStarts

ON_OFFICIAL = {
    *("shelf-place", "disassemble", "dial-turn"),
    *("door-lock", "sweep-into", "soccer", "push-back", "sweep"),
}
MIXED = ("dial-turn", "reach", "sweep", "drawer-close")
N = 2
LENGTH = 5


def random_actions(steps, tasks=MIXED, n=N):
    return np.random.default_rng(0).uniform(-1, 1, (steps, len(tasks), n, 4)).astype(np.float32)


def rollout(e, actions):
    """First obs, and each Step field over time; closes `e`."""
    with e:
        first = e.reset()
        steps = [e.step(action) for action in actions]
    return first, Step(*(np.stack(field) for field in zip(*steps, strict=True)))


def expert(task):
    from metaworld.policies import ENV_POLICY_MAP

    return ENV_POLICY_MAP[f"{task}-v3"]()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


# The table and the choice.


def test_the_table_covers_every_task():
    assert tuple(FIDELITY) == ALL_TASKS
    assert {task for task, row in FIDELITY.items() if row.engine == "official"} == ON_OFFICIAL
    corrected = {"hammer", "button-press-topdown-wall", "window-close"}
    assert {task for task, row in FIDELITY.items() if row.correction} == corrected
    for task, row in FIDELITY.items():
        assert (row.reason == "agrees") == (row.measured == ""), task
        assert row.correction is None or row.engine == "envpool", task


def test_choice_of_engines():
    tasks = ("sweep", "reach", "hammer")
    assert choose_engines(tasks, "auto", "random") == ("official", "envpool", "envpool")
    assert choose_engines(tasks, "auto", "fixed") == ("official", "envpool", "envpool")
    assert choose_engines(tasks, "auto", "official") == ("official",) * 3
    assert choose_engines(tasks, "official", "random") == ("official",) * 3
    assert choose_engines(tasks, "envpool", "random") == ("envpool",) * 3
    assert set(choose_engines(MT10, "auto", "random")) == {"envpool"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"engine": "mujoco"}, "engine: expected one of auto, envpool, official, got 'mujoco'"),
        ({"goals": "easy"}, "goals: expected one of random, official, fixed, got 'easy'"),
        ({"engine": "envpool", "goals": "official"}, 'goals: EnvPool offers .* got "official".*engine="official"'),
        ({"tasks": ("reach", "sweeep")}, 'unknown task "sweeep" at position 2, did you mean "sweep"'),
        ({"tasks": ("sweep", "reach"), "envs_per_task": 0}, "envs_per_task=0"),
        ({"tasks": ("sweep", "reach"), "n_workers": 0}, "n_workers=0"),
    ],
)
def test_refusals(changes, message):
    arguments = {"tasks": ("reach",), "envs_per_task": 1, "episode_length": LENGTH, "seed": 0} | changes
    with pytest.raises(ValueError, match=message):
        make_envs(**arguments)


def test_one_line_says_what_runs_where():
    assert describe_engines(MT10, "auto", "random") == (
        "10 tasks on EnvPool, corrected: window-close "
        "(first observation shows the window open, the official one shut); goals: random"
    )
    assert describe_engines(("reach", "hammer", "sweep", "soccer", "dial-turn"), "auto", "fixed") == (
        "2 tasks on EnvPool, corrected: hammer (goal drifts at every reset); "
        "3 tasks on the official package: sweep, soccer (reward shaped with another margin), "
        "dial-turn (dial far too stiff); goals: fixed"
    )
    assert describe_engines(("reach", "dial-turn"), "envpool", "random") == (
        "2 tasks on EnvPool, unlike the official: dial-turn (dial far too stiff); goals: random"
    )
    assert describe_engines(("reach",), "auto", "official") == "1 task on the official package; goals: official"
    for tasks in (MT25, MT50):
        line = describe_engines(tasks, "auto", "random")
        assert "\n" not in line
        assert len(line) < 500
        assert all(task in line for task in ON_OFFICIAL & set(tasks))


def test_only_forced_departures_warn_and_once():
    with pytest.warns(UserWarning) as told:
        make_envs(("reach", "hammer", "sweep", "dial-turn"), 1, LENGTH, seed=0, engine="envpool").close()
    assert [str(warning.message) for warning in told] == [
        "EnvPool differs from the official package: "
        "sweep (reward shaped with another margin), dial-turn (dial far too stiff)"
    ]
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_envs(("reach", "hammer", "button-press-topdown-wall"), 1, LENGTH, seed=0, engine="envpool").close()
        make_envs(MIXED, 1, LENGTH, seed=0).close()


# Engines mixed.


def test_mixed_tasks_are_those_of_the_single_engines():
    actions = random_actions(2 * LENGTH + 1)
    mixed = make_envs(MIXED, N, LENGTH, 5, 0.5)
    assert isinstance(mixed, MixedEnvs)
    assert (mixed.tasks, mixed.n_tasks, mixed.envs_per_task, mixed.episode_length) == (MIXED, 4, N, LENGTH)
    first, ours = rollout(mixed, actions)
    assert mixed._parts[1][0].n_workers == min(len(os.sched_getaffinity(0)), 2 * N)
    for rows, part in [
        ([0, 2], OfficialEnvs(("dial-turn", "sweep"), N, LENGTH, 5, 0.5)),
        ([1, 3], EnvPoolEnvs(("reach", "drawer-close"), N, LENGTH, 5, 0.5, positions=[1, 3])),
    ]:
        part_first, part_steps = rollout(part, actions[:, rows])
        np.testing.assert_array_equal(first[rows], part_first)
        for name in Step._fields:
            got, wanted = getattr(ours, name)[:, rows], getattr(part_steps, name)
            assert got.dtype == wanted.dtype
            np.testing.assert_array_equal(got, wanted, err_msg=name)

    # Where its neighbours run is nothing to a task: here all of them run on EnvPool.
    same = make_envs(("push", "reach", "door-close", "drawer-close"), N, LENGTH, 5, 0.5)
    same_first, same_steps = rollout(same, actions)
    np.testing.assert_array_equal(first[[1, 3]], same_first[[1, 3]])
    np.testing.assert_array_equal(ours.reward[:, [1, 3]], same_steps.reward[:, [1, 3]])


def test_the_number_of_workers_reaches_the_official_engine():
    for tasks in (MIXED, ("dial-turn", "sweep")):
        with make_envs(tasks, N, LENGTH, 5, n_workers=1) as envs:
            official = envs if len(tasks) == 2 else envs._parts[1][0]
            assert (official.n_workers, len(official._processes)) == (1, 1)


def test_mixed_errors_and_close_reach_the_caller(monkeypatch):
    actions = random_actions(2)
    e = make_envs(MIXED, N, LENGTH, seed=5)
    envpool, official = (part for part, _ in e._parts)
    with pytest.raises(RuntimeError, match=r"send\(\): call reset\(\) first"):
        e.send(actions[0])
    e.reset()
    with pytest.raises(RuntimeError, match="nothing was sent"):
        e.recv()
    bad = actions[0].copy()
    bad[2, 1, 0] = np.inf
    with pytest.raises(ValueError, match="not finite for task sweep, environment 1"):
        e.send(bad)
    with pytest.raises(ValueError, match=r"got float32 \(3, 2, 4\)"):
        e.send(actions[0, :3])
    e.step(actions[0])  # nothing was stepped by then, or this would be refused

    def fail():
        raise RuntimeError("worker 0 of dial-turn was killed")

    monkeypatch.setattr(official, "recv", fail)
    e.send(actions[1])
    with pytest.raises(RuntimeError, match="worker 0 of dial-turn was killed"):
        e.recv()
    for call in (e.reset, e.recv, lambda: e.send(actions[1])):
        with pytest.raises(RuntimeError, match="an earlier call failed half way"):
            call()
    e.close()
    e.close()
    for part in (e, envpool, official):
        with pytest.raises(RuntimeError, match="closed"):
            part.reset()


def test_parts_that_do_not_fit_are_refused():
    parts = [EnvPoolEnvs(("reach",), 1, LENGTH, 0), EnvPoolEnvs(("push",), 2, LENGTH, 0)]
    with pytest.raises(ValueError, match=r"expected engines for the tasks \['push'\], got engines for \['reach'\]"):
        MixedEnvs(("push",), parts[:1])
    with pytest.raises(ValueError, match=r"must agree.*\[\(1, 5\), \(2, 5\)\]"):
        MixedEnvs(("push", "reach"), parts)


# Fixed goals on EnvPool.


def test_fixed_goals_are_the_same_in_every_episode_environment_and_run():
    tasks = ("reach", "hammer", "push")
    actions = np.tile(random_actions(LENGTH, tasks), (3, 1, 1, 1))
    first, rolled = rollout(make_envs(tasks, N, LENGTH, 0, goals="fixed"), actions)
    assert (first == first[:, :1]).all()
    ends = (np.arange(3 * LENGTH) + 1) % LENGTH == 0
    np.testing.assert_array_equal(rolled.truncated, np.broadcast_to(ends[:, None, None], rolled.truncated.shape))
    np.testing.assert_array_equal(rolled.obs[ends], np.broadcast_to(first, (3, *first.shape)))
    np.testing.assert_array_equal(rolled.obs[~ends], rolled.next_obs[~ends])
    for name in Step._fields:
        episodes = getattr(rolled, name).reshape(3, LENGTH, len(tasks), N, -1)
        np.testing.assert_array_equal(episodes, np.broadcast_to(episodes[:1], episodes.shape), err_msg=name)

    # Another seed, another place in the list, another number of environments: the same task to solve.
    with make_envs(("push", "reach"), 1, LENGTH, seed=77, goals="fixed") as e:
        np.testing.assert_array_equal(e.reset(), first[[2, 0], :1])
        e.step(random_actions(1, ("push", "reach"), 1)[0])
        np.testing.assert_array_equal(e.reset(), first[[2, 0], :1])


# Corrections on EnvPool.


def test_topdown_walls_reward_is_the_official_one():
    from metaworld.envs import SawyerButtonPressTopdownWallEnvV3 as Official
    from metaworld.utils import reward_utils

    task, n, length = "button-press-topdown-wall", 4, 90
    official = Official()
    official._freeze_rand_vec = False
    official._set_task_called = True
    official.seed(0)
    official.reset()
    policy, noise = expert(task), np.random.default_rng(0)

    def official_reward(obs, near, pressed):
        """The package's function on this state. EnvPool tells how near the gripper is only as a reward; inverted, it
        is a distance again, and at that distance above the button the gripper is put."""
        button = obs[4:7]
        margin = np.linalg.norm(button - official.init_tcp)
        distance = 0.01 + margin * np.sqrt((1 / near - 1) / 9) if near < 1 else 0
        state = SimpleNamespace(
            reward_function_version="v2",
            _target_pos=obs[36:39],
            tcp_center=button + np.array([0, 0, distance]),
            init_tcp=official.init_tcp,
            _obj_to_target_init=official._obj_to_target_init,
        )
        reward, *_, official_near, official_pressed = Official.compute_reward(state, None, obs)
        assert official_near == pytest.approx(near, abs=1e-9)
        assert official_pressed == pytest.approx(pressed, abs=1e-6)
        for_pressing = reward - 5 * reward_utils.hamacher_product(max(obs[3], 0), near)
        return reward, for_pressing + 5 * reward_utils.hamacher_product(1 - obs[3], near), for_pressing

    infos = []
    with make_envs((task,), n, length, seed=3) as e:
        obs = e.reset()
        pool = e._pools[0]

        def recv(*args, **kwargs):
            infos.append(type(pool).recv(pool, *args, **kwargs))
            return infos[-1]

        e._pools[0] = SimpleNamespace(send=pool.send, recv=recv)
        errors, corrections, pressing = [], [], []
        for t in range(length):
            action = np.array([policy.get_action(row) for row in obs[0]])
            # The gripper opens and closes, which the correction is about. The expert presses from too far off for the
            # reward for pressing, so the last two leave it for a point just under the button.
            action[1:, 3] = np.sin(t / 5)
            if t > 35:
                tcp = obs[0, 2:, :3] + official.init_tcp - official.hand_init_pos
                action[2:, :3] = 10 * (obs[0, 2:, 4:7] - [0, 0, 0.02] - tcp)
            action[1:] += 0.1 * noise.standard_normal((n - 1, 4))
            step = e.step(np.clip(action, -1, 1).astype(np.float32)[None])
            raw_obs, raw_reward, _, _, info = infos[t]
            for i in range(n):
                wanted, old, pressed = official_reward(raw_obs[i], info["grasp_reward"][i], info["in_place_reward"][i])
                assert old == pytest.approx(raw_reward[i], abs=1e-6)  # so the state was understood
                errors.append(abs(step.reward[0, i] - wanted))
                corrections.append(abs(wanted - raw_reward[i]))
                pressing.append(pressed)
            obs = step.obs
    print(
        f"largest error {max(errors):.1e}, correction {max(corrections):.2f}, reward for pressing {max(pressing):.2f}"
    )
    assert max(errors) <= 1e-6
    assert max(corrections) > 1
    assert max(pressing) > 0.5


@pytest.mark.parametrize("goals", ["random", "fixed"])
def test_window_closes_first_observations_are_the_official_ones(goals):
    """Episode after episode, against an official environment put to the same start."""
    length, shut = 4, []
    official = OfficialStarts("window-close", seed=0)
    actions = np.random.default_rng(0).uniform(-1, 1, (3 * length, 4)).astype(np.float32)
    with make_envs(("window-close",), 1, length, seed=0, engine="envpool", goals=goals) as e:
        shown = [e.reset()[0, 0]]
        for action in actions:
            step = e.step(action[None, None])
            shown.append(step.next_obs[0, 0])
            if step.truncated.all():
                wanted = [official.reset_at(np.array([0, shown[0][37], 0.2]))]
                wanted += [official.env.step(past)[0] for past in actions[len(shut) * length :][:length]]
                np.testing.assert_allclose(shown, wanted, atol=1e-4)  # two versions of MuJoCo
                shut.append(shown[1][4] - shown[0][4])
                shown = [step.obs[0, 0]]
    np.testing.assert_allclose(shut, [0.2] * 3, atol=1e-3)


def test_hammers_goal_stays_and_its_expert_succeeds_episode_after_episode():
    n, length, policy = 2, 120, expert("hammer")
    with make_envs(("hammer",), n, length, seed=0) as e:
        obs = e.reset()
        for episode in range(3):
            np.testing.assert_allclose(obs[0, :, 36:], np.broadcast_to([0.24, 0.74, 0.11], (n, 3)), atol=1e-6)
            solved, total = np.zeros(n, bool), np.zeros(n)
            for _ in range(length):
                action = np.clip([policy.get_action(row) for row in obs[0]], -1, 1).astype(np.float32)
                step = e.step(action[None])
                solved |= step.success[0]
                total += step.reward[0]
                obs = step.obs
            print(f"episode {episode}: return {total}")
            assert solved.all(), episode


def test_the_scene_differs_in_the_goal_alone(cache):
    from envpool.registration import asset_base_path

    base = Path(scenes.hammer_base_path())
    assert base.is_relative_to(cache / "d2r_fast")
    installed = Path(asset_base_path("envpool_assets", "mujoco/metaworld/assets"))
    corrected = (base / scenes._SCENE).read_text()
    original = (installed / scenes._SCENE).read_text()
    ours, theirs = corrected.splitlines(), original.splitlines()
    assert [line.strip() for line in theirs if line not in ours] == [
        '<site name="goal" pos="0 -0.11 0.11" size="0.005" rgba="0 0.8 0 1"/>'
    ]
    assert [line.strip() for line in ours if line not in theirs] == [
        '<site name="goal" pos="0.24 0.74 0.11" size="0.005" rgba="0 0.8 0 1"/>'
    ]
    assert sum(path.lstat().st_size for path in base.rglob("*") if not path.is_dir()) < 4096  # links, not copies


@pytest.mark.parametrize("harm", ["changed", "cut", "removed", "link elsewhere", "link removed", "scene a link"])
def test_a_tampered_cache_is_mended(cache, harm):
    base = Path(scenes.hammer_base_path())
    scene, link = base / scenes._SCENE, base / scenes._ASSETS / "objects"
    good, target = scene.read_bytes(), os.readlink(link)
    if harm == "changed":
        scene.write_bytes(good.replace(b"0.74", b"0.75"))
    elif harm == "cut":
        scene.write_bytes(good[:100])
    elif harm == "removed":
        scene.unlink()
    elif harm == "link elsewhere":
        link.unlink()
        link.symlink_to(cache)
    elif harm == "link removed":
        link.unlink()
    else:
        (cache / "elsewhere.xml").write_bytes(good)
        scene.unlink()
        scene.symlink_to(cache / "elsewhere.xml")
    assert scenes.hammer_base_path() == str(base)
    assert scene.read_bytes() == good
    assert not scene.is_symlink()
    assert os.readlink(link) == target
    assert sorted(path.name for path in scene.parent.iterdir()) == [scene.name]


def test_the_scene_may_be_made_by_many_at_once(cache, monkeypatch):
    def make():
        barrier.wait()
        return (Path(scenes.hammer_base_path()) / scenes._SCENE).read_bytes()

    barrier = threading.Barrier(8)
    with ThreadPoolExecutor(8) as pool:
        for attempt in range(20):
            monkeypatch.setenv("XDG_CACHE_HOME", str(cache / str(attempt)))
            made = [job.result() for job in [pool.submit(make) for _ in range(8)]]
            assert len(set(made)) == 1


def test_what_keeps_the_scene_from_being_made_is_told(cache, monkeypatch):
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    with pytest.raises(OSError, match=r"cannot write .*hammer-.*set XDG_CACHE_HOME"):
        make_envs(("hammer",), 1, LENGTH, seed=0)
    monkeypatch.setattr(scenes, "_SCENE_SHA256", "0" * 64)
    with pytest.raises(RuntimeError, match=r'sawyer_hammer\.xml: expected the scene of .*use engine="official"'):
        make_envs(("hammer",), 1, LENGTH, seed=0)
