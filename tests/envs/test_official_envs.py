"""The official engine, on the real simulation: against the package's own environments, and when things break."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import metaworld
import numpy as np
import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP

from d2r_fast.envs import ALL_TASKS, MT10, Step, WorkerError, official_worker
from d2r_fast.envs.official import OfficialEnvs

TASKS = ("reach", "drawer-close", "push")
N = 2
LENGTH = 5


def random_actions(steps, n_tasks=3, n=N):
    return np.random.default_rng(0).uniform(-1, 1, (steps, n_tasks, n, 4)).astype(np.float32)


def make(**changes):
    return OfficialEnvs(**{"tasks": TASKS, "envs_per_task": N, "episode_length": LENGTH, "seed": 5} | changes)


def rollout(actions, **changes):
    """First obs, and each Step field over time."""
    with make(**changes) as e:
        first = e.reset()
        steps = [e.step(action) for action in actions]
    return first, Step(*(np.stack(field) for field in zip(*steps, strict=True)))


def bare_env(task, seed):
    """metaworld's class with goals from the continuous range, drawn from its own stream, and visible."""
    env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
    env._set_task_called = True
    env._partially_observable = False
    del env.sawyer_observation_space
    env.seeded_rand_vec = True
    env.seed(seed)
    reset = env.reset

    def reset_on_one_draw():
        """The package's reset places everything twice; drawn anew each time, goal and object would not fit."""
        env._freeze_rand_vec = False
        env.reset_model()
        env._freeze_rand_vec = True
        return reset()

    env.reset = reset_on_one_draw
    return env


def assert_same(env, k, i, actions, first, ours, length):
    """Steps metaworld's own `env` by hand with the actions that environment i of task k got."""
    obs, _ = env.reset()
    np.testing.assert_array_equal(first[k, i], obs.astype(np.float32))
    for t, action in enumerate(actions):
        obs, reward, terminated, _, info = env.step(action[k, i])
        np.testing.assert_array_equal(ours.next_obs[t, k, i], obs.astype(np.float32))
        assert ours.reward[t, k, i] == np.float32(reward)
        assert ours.success[t, k, i] == (info["success"] == 1)
        assert not terminated
        if (t + 1) % length == 0:
            obs, _ = env.reset()
        np.testing.assert_array_equal(ours.obs[t, k, i], obs.astype(np.float32))


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pids, seconds):
    deadline = time.monotonic() + seconds
    while left := [pid for pid in pids if alive(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.05)


def test_all_tasks_are_the_official_simulation_to_the_last_bit():
    """Scripted experts, so that things are touched and grasped, over two episodes and into a third."""
    length, steps = 50, 105
    experts = [ENV_POLICY_MAP[f"{task}-v3"]() for task in ALL_TASKS]
    rng = np.random.default_rng(0)
    actions, rolled = [], []
    with make(tasks=ALL_TASKS, envs_per_task=1, episode_length=length) as e:
        first = obs = e.reset()
        for _ in range(steps):
            # A copy, for some experts write into what they see.
            wanted = np.array([[expert.get_action(obs[k, 0].copy())] for k, expert in enumerate(experts)])
            actions.append(np.clip(wanted + rng.normal(0, 0.05, wanted.shape), -1, 1).astype(np.float32))
            rolled.append(e.step(actions[-1]))
            obs = rolled[-1].obs
    ours = Step(*(np.stack(field) for field in zip(*rolled, strict=True)))
    for k, task in enumerate(ALL_TASKS):
        env = bare_env(task, 5 + k)
        assert_same(env, k, 0, actions, first, ours, length)
    assert ours.success.any((0, 2)).mean() > 0.2


def test_official_goals_are_those_of_the_official_benchmark():
    """Metaworld's own stack of wrappers, seeded as our environments are: same 50 goals, same picks of them."""
    benchmark = metaworld.MT10(seed=5)
    actions = random_actions(4 * LENGTH, len(MT10))
    first, ours = rollout(actions, tasks=MT10, goals="official")
    for k, (name, env_class) in enumerate(benchmark.train_classes.items()):
        goals = [task for task in benchmark.train_tasks if task.env_name == name]
        for i in range(N):
            env = metaworld._init_each_env(env_class, goals, seed=5 + k * N + i, max_episode_steps=LENGTH)
            assert_same(env, k, i, actions, first, ours, LENGTH)


def test_the_official_vector_environment_returns_the_same():
    """Its conventions too: the end of an episode and the start of the next come in one step."""
    actions = random_actions(3 * LENGTH + 2, 1, 1)
    first, ours = rollout(actions, tasks=("push",), envs_per_task=1, goals="official")
    official = gymnasium.make_vec(
        "Meta-World/custom-mt-envs",
        vector_strategy="sync",
        envs_list=["push-v3"],
        seed=5,
        max_episode_steps=LENGTH,
        terminate_on_success=False,
    )
    obs, _ = official.reset()
    np.testing.assert_array_equal(first[0], obs.astype(np.float32))
    for t, action in enumerate(actions):
        obs, reward, terminated, truncated, info = official.step(action[0])
        last = np.stack(info["final_obs"]) if truncated.any() else obs
        np.testing.assert_array_equal(ours.next_obs[t, 0], last.astype(np.float32))
        np.testing.assert_array_equal(ours.obs[t, 0], obs.astype(np.float32))
        np.testing.assert_array_equal(ours.reward[t, 0], reward.astype(np.float32))
        np.testing.assert_array_equal(ours.terminated[t, 0], terminated)
        np.testing.assert_array_equal(ours.truncated[t, 0], truncated)
    official.close()


def test_fixed_goals_are_one_a_task_whatever_else_is_asked():
    actions = random_actions(2 * LENGTH)
    first, ours = rollout(actions, goals="fixed")
    begun = np.concatenate([first[None], ours.obs[LENGTH - 1 :: LENGTH]])  # [3,T,n,39]
    np.testing.assert_array_equal(begun, np.broadcast_to(begun[:1, :, :1], begun.shape))

    with make(tasks=("push",), envs_per_task=1, goals="fixed") as alone:
        np.testing.assert_array_equal(alone.reset()[0, 0], first[2, 0])
    with make(tasks=("push",), envs_per_task=1, goals="fixed", seed=6) as other_seed:
        assert (other_seed.reset()[0, 0, 36:38] != first[2, 0, 36:38]).all()

    env = ALL_V3_ENVIRONMENTS["push-v3"]()
    env.set_task(metaworld.MT1("push-v3", seed=5).train_tasks[0])
    assert_same(env, 2, 1, actions, first, ours, LENGTH)


def test_random_goals_differ_between_tasks_environments_and_episodes_and_show():
    same = ("reach", "reach-wall")  # one range, so that a shared stream would give shared goals
    first, ours = rollout(random_actions(2 * LENGTH, 2), tasks=same)
    begun = np.concatenate([first[None], ours.obs[LENGTH - 1 :: LENGTH]])[..., 36:]  # [3,T,n,3]
    fractions = begun[..., :2].reshape(-1, 2)
    assert len(np.unique(fractions.round(4), axis=0)) == 3 * 2 * N
    assert (np.abs(begun) > 0).all()
    acted_on = np.concatenate([first[None], ours.obs[:-1]])
    np.testing.assert_array_equal(ours.next_obs[..., 36:], acted_on[..., 36:])


@pytest.mark.parametrize("goals", ["random", "official", "fixed"])
def test_the_number_of_workers_changes_nothing(goals):
    actions = random_actions(2 * LENGTH + 2)
    first, ours = rollout(actions, goals=goals, n_workers=1)
    again_first, again = rollout(actions, goals=goals, n_workers=4)
    np.testing.assert_array_equal(first, again_first)
    for name in Step._fields:
        np.testing.assert_array_equal(getattr(ours, name), getattr(again, name), err_msg=name)


def test_shapes_dtypes_and_the_seam_between_episodes():
    steps = 2 * LENGTH + 2
    first, ours = rollout(random_actions(steps))
    for name, wide, dtype in [
        ("obs", (39,), np.float32),
        ("next_obs", (39,), np.float32),
        ("reward", (), np.float32),
        ("terminated", (), bool),
        ("truncated", (), bool),
        ("success", (), bool),
    ]:
        array = getattr(ours, name)
        assert (array.shape, array.dtype) == ((steps, 3, N, *wide), dtype), name
    ends = (np.arange(steps) + 1) % LENGTH == 0
    assert (ours.truncated == ends[:, None, None]).all()
    assert not ours.terminated.any()
    np.testing.assert_array_equal(ours.obs[~ends], ours.next_obs[~ends])
    assert (ours.obs[ends] != ours.next_obs[ends]).any(-1).all()
    acted_on = np.concatenate([first[None], ours.obs[:-1]])
    np.testing.assert_array_equal(ours.next_obs[..., 18:36], acted_on[..., :18])


def test_actions_are_clipped_and_rewards_scaled():
    wild = 3 * random_actions(LENGTH)
    kept = wild.copy()
    _, plain = rollout(np.clip(wild, -1, 1))
    _, scaled = rollout(wild, reward_scale=0.25)
    np.testing.assert_array_equal(scaled.next_obs, plain.next_obs)
    np.testing.assert_array_equal(scaled.reward, plain.reward * np.float32(0.25))
    np.testing.assert_array_equal(wild, kept)


def test_reset_in_the_middle_of_an_episode_starts_a_whole_one():
    with make() as e:
        first = e.reset()
        for action in random_actions(2):
            e.step(action)
        again = e.reset()
        assert (again[..., 36:38] != first[..., 36:38]).any(-1).all()
        ends = [e.step(action).truncated.all() for action in random_actions(LENGTH)]
        assert ends == [False] * (LENGTH - 1) + [True]


def test_episodes_may_be_longer_than_metaworlds():
    _, ours = rollout(random_actions(510, 1, 1), tasks=("reach",), envs_per_task=1, episode_length=505)
    assert np.flatnonzero(ours.truncated).tolist() == [504]


def test_arrays_are_the_callers_to_keep():
    with make() as e:
        kept = [e.reset()]
        copies = [kept[0].copy()]
        for action in random_actions(2 * LENGTH):
            step = e.step(action)
            kept += step
            copies += [array.copy() for array in step]
            action[:] = 0
        for array, copy in zip(kept, copies, strict=True):
            np.testing.assert_array_equal(array, copy)


def test_action_errors_step_nothing():
    good = random_actions(1)
    with make() as e:
        e.reset()
        for bad, message in [
            (good[0].astype(np.float64), r"expected a numpy array, float32 \(3, 2, 4\), got float64 \(3, 2, 4\)"),
            (good[0, :2], r"got float32 \(2, 2, 4\)"),
            (good[0].tolist(), "got list"),
        ]:
            with pytest.raises(ValueError, match=message):
                e.step(bad)
        bad = good[0].copy()
        bad[1, 1, 3] = np.inf
        with pytest.raises(ValueError, match="not finite for task drawer-close, environment 1"):
            e.step(bad)
        after = e.step(good[0])
    np.testing.assert_array_equal(after.obs, rollout(good)[1].obs[0])


def test_calls_out_of_order():
    action = random_actions(1)[0]
    e = make()
    for call in (lambda: e.send(action), e.recv):
        with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
            call()
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
    for call in (e.reset, e.recv, lambda: e.send(action)):
        with pytest.raises(RuntimeError, match="the environments are closed"):
            call()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"tasks": ()}, "no list of tasks"),
        ({"tasks": ("reach-v3",)}, 'unknown task "reach-v3" at position 1, did you mean "reach"'),
        ({"envs_per_task": 0}, "envs_per_task=0"),
        ({"episode_length": 0}, "episode_length=0"),
        ({"n_workers": 0}, "n_workers=0"),
        ({"seed": -1}, r"seed=-1 must lie in 0\.\.2147483642"),
        ({"seed": 2**31 - 5}, "seed=2147483643"),
        ({"goals": "hidden"}, 'goals=\'hidden\': expected "random", "official" or "fixed"'),
    ],
)
def test_constructor_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


def test_the_absence_of_metaworld_is_explained(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ImportError, match=r"pip install metaworld==3\.1\.1"):
        make()


def test_workers_are_no_more_than_the_cores_and_load_no_torch():
    with make() as e:
        e.reset()
        assert len(e._processes) == e.n_workers == min(len(os.sched_getaffinity(0)), len(TASKS) * N)
        for process in e._processes:
            assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
            assert len(os.listdir(f"/proc/{process.pid}/task")) == 2  # the loop and the watch for the parent


@pytest.mark.parametrize("while_stepping", [False, True])
def test_a_killed_worker_is_an_error_that_names_a_task(while_stepping):
    with make(n_workers=2) as e:
        e.reset()
        if while_stepping:
            os.kill(e._processes[1].pid, signal.SIGSTOP)  # so that it dies before its answer
            e.send(random_actions(1)[0])
        e._processes[1].kill()
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"worker 1 at task (reach|drawer-close|push), environment 1.*status -9"):
            e.recv() if while_stepping else e.step(random_actions(1)[0])
        assert time.monotonic() - began < 3
        wait_until_gone([process.pid for process in e._processes], 0)
        with pytest.raises(RuntimeError, match="an earlier call failed half way"):
            e.recv()


def test_an_exception_in_a_worker_carries_its_task_and_traceback(tmp_path, monkeypatch):
    broken = tmp_path / "broken_worker.py"
    source, line = Path(official_worker.__file__).read_text(), "shared.reward[row] = reward"
    assert line in source
    broken.write_text(source.replace(line, "shared.reward[row] = [reward][row == 3]"))
    monkeypatch.setattr(official_worker, "__file__", str(broken))
    with make(tasks=("reach", "pick-place"), n_workers=1) as e:
        e.reset()
        e.send(random_actions(1, 2)[0])
        message = "^worker 0 at task pick-place, environment 1, failed: IndexError: list index out of range$"
        with pytest.raises(WorkerError, match=message) as raised:
            e.recv()
        assert "Traceback" in str(raised.value.__cause__)


def test_a_worker_that_cannot_start_says_why(tmp_path, monkeypatch):
    (tmp_path / "mujoco.py").write_text("raise ImportError('no simulation today')")
    monkeypatch.syspath_prepend(tmp_path)
    with make() as e, pytest.raises(RuntimeError, match=r"(?s)failed:.*no simulation today"):
        e.reset()


SCRIPT = """
import sys, time
from d2r_fast.envs.official import OfficialEnvs
e = OfficialEnvs(("reach", "push"), 2, 500, seed=0, n_workers=2)
at = sys.argv[1]
if at != "starting":
    e.reset()
print(*[process.pid for process in e._processes], flush=True)
if at == "stepping":
    import numpy as np
    while True:
        e.step(np.zeros((2, 2, 4), np.float32))
elif at != "exit":
    time.sleep(600)
"""


def shared_memory():
    """What lies in shared memory, but for the semaphores of other programs' multiprocessing: we use none."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


@pytest.mark.parametrize("at", ["starting", "idle", "stepping"])
def test_killing_the_parent_leaves_no_process_and_no_shared_memory(at):
    before = shared_memory()
    with subprocess.Popen([sys.executable, "-c", SCRIPT, at], stdout=subprocess.PIPE, text=True) as parent:
        workers = [int(pid) for pid in parent.stdout.readline().split()]
        time.sleep(0.2)
        assert len(workers) == 2 and all(map(alive, workers))
        parent.kill()
    wait_until_gone(workers, 20 if at == "starting" else 5)  # the watch begins once Python has started
    assert shared_memory() <= before


def test_the_interpreters_exit_ends_the_workers():
    ended = subprocess.run([sys.executable, "-c", SCRIPT, "exit"], capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    wait_until_gone([int(pid) for pid in ended.stdout.split()], 0)


def test_forgotten_and_closed_environments_end_their_workers():
    e = make()
    pids = [process.pid for process in e._processes]
    del e
    wait_until_gone(pids, 0)
    e = make()
    e.reset()
    e.send(random_actions(1)[0])
    e.close()  # with a step under way, as an interrupted run would
    wait_until_gone([process.pid for process in e._processes], 0)


def test_a_forks_end_leaves_the_workers_alone():
    with make() as e:
        e.reset()
        if (pid := os.fork()) == 0:
            e._stop()
            os._exit(0)
        os.waitpid(pid, 0)
        e.step(random_actions(1)[0])
