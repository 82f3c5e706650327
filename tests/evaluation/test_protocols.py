"""The evaluation protocols, on the real environments: scripted experts, and a small agent of our own."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
import psutil
import pytest
import torch
from tiny import NET

from d2r_fast.envs import MT10, make_envs
from d2r_fast.evaluation.policies import ExpertPolicy, GreedyPolicy, expert_agent
from d2r_fast.evaluation.protocols import (
    OFFICIAL,
    PUBLISHED,
    ProtocolResult,
    ProtocolSpec,
    evaluate_protocol,
    wilson_interval,
)
from d2r_fast.nets.agent import Agent

TASKS = ("window-close", "reach", "drawer-close")
SHORT = OFFICIAL._replace(episodes=2, episode_length=150)


def test_settings_are_those_of_the_protocols():
    assert tuple(PUBLISHED) == ("published", 32, 200, "auto", "random")
    assert tuple(OFFICIAL) == ("official", 50, 500, "official", "official")
    assert "500 steps, 50 goals a task, 50 episodes a task" in OFFICIAL.text


def test_experts_solve_mt10_under_the_official_protocol():
    result = evaluate_protocol(expert_agent(MT10), MT10, OFFICIAL._replace(episodes=4), seed=1)
    assert result.tasks == MT10
    assert result.mean_success >= 0.95
    assert result.mean_interval[0] > 0.7 and result.mean_interval[1] <= 1


def test_official_is_metaworlds_own_evaluation_whatever_the_split():
    """Against `metaworld.evaluation` called directly on the registered environments."""
    import metaworld  # noqa: F401 (registers them)
    from metaworld.evaluation import evaluation

    results = [evaluate_protocol(expert_agent(TASKS), TASKS, SHORT, seed=3, n_workers=w) for w in (1, 2)]
    envs = gymnasium.make_vec(
        "Meta-World/custom-mt-envs",
        vector_strategy="sync",
        envs_list=[f"{task}-v3" for task in TASKS],
        seed=3,
        use_one_hot=True,
        max_episode_steps=SHORT.episode_length,
    )
    _, mean_return, success, _ = evaluation(expert_agent(TASKS), envs, SHORT.episodes)
    envs.close()
    for result in results:
        assert result.success == [success[f"{task}-v3"] for task in TASKS]
        assert np.mean(result.episode_return) == pytest.approx(mean_return, rel=1e-9)
    assert results[0].episode_return == results[1].episode_return


def test_tasks_keep_the_ids_they_were_trained_with():
    """Experts whose order disagrees with the task order act for the wrong tasks, and fail."""
    disordered = expert_agent(("window-open", "window-close"))
    tasks = ("window-close", "window-open")
    for spec in (SHORT, PUBLISHED._replace(episodes=4)):
        assert evaluate_protocol(expert_agent(tasks), tasks, spec, seed=0, n_workers=2).success == [1, 1]
        assert evaluate_protocol(disordered, tasks, spec, seed=0, n_workers=2).mean_success < 1


@pytest.fixture
def agent() -> Agent:
    """Pushes towards +y, which closes some drawers."""
    torch.manual_seed(7)
    agent = Agent(39, 4, 2, NET)
    with torch.no_grad():
        agent.actor.net.head.bias[0, 1] = 1.5
        agent.actor.net.task.weight.mul_(5)
    return agent


def test_engine_protocols_count_whole_episodes(agent):
    """Against episodes stepped by hand, with the greedy mean action."""
    tasks, n, rounds, length = ("reach", "drawer-close"), 40, 2, 30
    spec = ProtocolSpec("fast", episodes=n * rounds, episode_length=length, engine="envpool", goals="random")
    result = evaluate_protocol(GreedyPolicy(agent.actor), tasks, spec, seed=4, envs_per_task=n)
    solved, total = np.zeros((rounds, 2, n), bool), np.zeros(2)
    ids = torch.arange(2).repeat_interleave(n)
    with make_envs(tasks, n, length, 4, engine="envpool") as envs:
        obs = envs.reset()
        for episode in range(rounds):
            for _ in range(length):
                with torch.no_grad():
                    mean, _, _ = agent.actor(torch.from_numpy(obs.reshape(-1, 39)), ids)
                step = envs.step(mean.tanh().numpy().reshape(2, n, 4))
                solved[episode] |= step.success
                total += step.reward.sum(1)
                obs = step.obs
    assert result.success == solved.mean((0, 2)).tolist()
    np.testing.assert_allclose(result.episode_return, total / (n * rounds), rtol=1e-6)
    assert 0 < result.mean_success < 1


def test_greedy_policy_is_a_copy_that_pickles(agent):
    agent.train()
    policy = GreedyPolicy(agent.actor)
    rows = np.concatenate([np.random.default_rng(0).normal(size=(6, 39)), np.eye(2).repeat(3, 0)], 1)
    with torch.no_grad():
        ids = torch.arange(2).repeat_interleave(3)
        expected, _ = agent.actor.act_greedily(torch.from_numpy(rows[:, :39]).float(), ids)
        action = policy.eval_action(rows)
        np.testing.assert_array_equal(action, expected.numpy())
        assert action.dtype == np.float32
        for p in agent.actor.parameters():
            p.zero_()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(policy)).eval_action(rows), action)
    assert agent.actor.training


def result(success, episodes=50):
    tasks = tuple(f"task-{k}" for k in range(len(success)))
    return ProtocolResult(OFFICIAL._replace(episodes=episodes), tasks, 0, list(success), [10.0] * len(success), 1.0)


def test_intervals():
    assert wilson_interval(0.5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)
    assert wilson_interval(0.0, 50) == pytest.approx((0, 0.07135), abs=1e-5)
    assert wilson_interval(1.0, 50) == pytest.approx((0.92865, 1), abs=1e-5)
    alone = result([0.3])
    assert alone.mean_interval == pytest.approx(alone.intervals[0])
    # Nothing observed to vary is still uncertain, and more tasks make the mean surer.
    widths = [np.ptp(result([1.0] * n).mean_interval) for n in (1, 4, 16)]
    assert widths[0] > widths[1] > widths[2] > 0
    assert widths[0] / widths[2] == pytest.approx(4)


def test_interval_of_the_mean_covers():
    """At least about 95 of 100 times, by simulation, for tasks that are solved, half solved and hopeless."""
    chance = np.array([0.0, 0.02, 0.3, 0.5, 0.9, 0.98, 1.0])
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(500):
        low, high = result(rng.binomial(32, chance) / 32, episodes=32).mean_interval
        held += low <= chance.mean() <= high
    assert 0.93 <= held / 500 <= 1


def test_table_and_json():
    out = result([1.0, 0.5])
    table = out.table().splitlines()
    assert table[0] == OFFICIAL.text
    assert table[2].split() == ["task-0", "1.00", "0.93", "to", "1.00", "10"]
    assert table[-1].split()[:2] == ["mean", "0.75"]
    record = json.loads(json.dumps(out.as_dict()))
    assert record["success"] == [1.0, 0.5] and record["mean_success"] == 0.75
    assert record["protocol"]["episode_length"] == 500 and len(record["success_interval"]) == 2


class Failing(ExpertPolicy):
    """Fails while it acts for the second task."""

    def eval_action(self, observations):
        if (observations[:, 39:].argmax(1) == 1).any():
            raise OSError("no more")
        return super().eval_action(observations)


def test_sizes_that_do_not_fit_are_refused(agent):
    policy = GreedyPolicy(agent.actor)
    for spec, n, message in [
        (OFFICIAL, 2, "envs_per_task: the official protocol has one environment a task, got 2"),
        (PUBLISHED, 5, "episodes: expected a multiple of envs_per_task=5, got 32"),
        (PUBLISHED, 0, "episodes: expected a multiple of envs_per_task=0, got 32"),
        (PUBLISHED._replace(episodes=0), None, "episodes: expected at least 1, got 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_protocol(policy, TASKS[:2], spec, seed=0, envs_per_task=n)


def test_a_failing_worker_names_its_tasks():
    with pytest.raises(RuntimeError, match=r"official evaluation of reach failed: OSError\('no more'\)"):
        evaluate_protocol(Failing(TASKS), TASKS, SHORT, seed=0, n_workers=3)


def test_workers_end_with_a_killed_parent(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from d2r_fast.evaluation.workers import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    import os\n"
        "    pool = worker_pool(1)\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        assert worker.is_running()
        parent.send_signal(signal.SIGKILL)
    until = time.monotonic() + 20
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until, "the worker outlived its parent"
        time.sleep(0.1)
