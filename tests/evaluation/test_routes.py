"""Recorded routes, against counting by hand."""

import math
import pickle

import numpy as np
import pytest
import torch
from tiny import NET

from d2r_fast.config import EvalConfig
from d2r_fast.envs import MultiTaskEnvs
from d2r_fast.evaluation.play import evaluate
from d2r_fast.evaluation.routes import RecordingPolicy, longest_path, record_routes
from d2r_fast.nets.agent import Agent
from d2r_fast.nets.mlp import MlpConfig

TASKS = ("reach", "drawer-close", "push")
N, K = NET.n_modules, NET.top_k


@pytest.fixture
def agent() -> Agent:
    """Its routes differ from row to row."""
    torch.manual_seed(7)
    agent = Agent(MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size, len(TASKS), NET)
    with torch.no_grad():
        agent.actor.net.task.weight.mul_(5)
        agent.actor.net.route[-1].weight.mul_(20)
        agent.actor.net.route[-1].bias.zero_()
    return agent


def paths(route: list[list[int]], to: int) -> list[list[int]]:
    """Every path of modules that leads into module `to` (N: the head), itself left out."""
    if to == 0:
        return [[]]
    return [[*path, j] for j in set(route[to - 1][: min(K, to)]) for path in paths(route, j)]


def test_counts_are_those_of_a_loop_over_rows_and_paths(agent):
    rows = 120
    task = torch.arange(rows) % 2  # the third task has no row
    obs = torch.randn(rows, MultiTaskEnvs.obs_size) * 3
    policy = RecordingPolicy(agent.actor)
    onehot = torch.nn.functional.one_hot(task, len(TASKS))
    observations = torch.cat([obs, onehot], 1).numpy().astype(np.float32)
    actions = np.concatenate([policy.eval_action(part) for part in (observations[:50], observations[50:])])
    with torch.no_grad():
        mean, _, routes = agent.actor.eval()(obs, task)
    np.testing.assert_allclose(actions, mean.tanh(), atol=1e-6)

    weight, use = np.zeros((2, N, N)), np.zeros((2, N))
    bits, ran, deep = np.zeros(2), np.zeros(2), np.zeros(2)
    for b, route in enumerate(routes.index[0].tolist()):
        t, found = b % 2, paths(route, N)
        reached = {j for path in found for j in path}
        use[t, list(reached)] += 1
        deep[t] += max(len(path) for path in found)
        for i in [*(reached - {0}), N]:
            gates = routes.gate[0, b, i - 1, : min(K, i)].tolist()
            for j, gate in zip(route[i - 1], gates, strict=False):
                weight[t, i - 1, j] += gate
            bits[t] -= sum(gate * math.log2(gate) for gate in gates)
            ran[t] += 1
    per_task = rows / 2
    np.testing.assert_allclose(policy.weight()[:2], weight / per_task, atol=1e-6)
    np.testing.assert_allclose(policy.module_use()[:2], use / per_task, atol=1e-12)
    np.testing.assert_allclose(policy.entropy()[:2], bits / ran, atol=1e-6)
    np.testing.assert_allclose(policy.depth()[:2], deep / per_task, atol=1e-12)
    assert np.isnan(policy.weight()[2]).all()
    assert (use > 0).sum(1).max() > 1 and ((use > 0) & (use < per_task)).any()  # the rows do differ


@pytest.mark.parametrize(
    ("index", "length"),
    [
        ([[0, 0], [0, 0], [0, 0]], 1),  # the head reads module 0
        ([[0, 0], [1, 0], [2, 1]], 3),
        ([[0, 0], [0, 1], [1, 0]], 2),  # 0 -> 1 -> head; module 2 is not reached
    ],
)
def test_longest_path(index, length):
    assert longest_path(torch.tensor([index, index])).tolist() == [length, length]


def test_episodes_are_those_of_an_evaluation(agent):
    use = record_routes(agent, TASKS, 10, 4, 2, seed=3)
    result = evaluate(agent, TASKS, 10, EvalConfig(episodes=4, envs_per_task=2), seed=3)
    assert (use.success.tolist(), use.episodes) == (result.success, 4)
    np.testing.assert_array_equal(use.module_use, result.module_use)
    # A module's route runs when the module does, the head's always, and its weights sum to that.
    runs = np.concatenate([use.module_use[:, 1:], np.ones((3, 1))], 1)
    np.testing.assert_allclose(use.weight.sum(2), runs, atol=1e-6)
    assert (np.triu(use.weight, 1) == 0).all()
    again = record_routes(agent, TASKS, 10, 4, 2, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(use, again, strict=True))


def test_what_cannot_be_recorded(agent):
    mlp = Agent(MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size, 3, MlpConfig(widths=(6,)))
    with pytest.raises(ValueError, match=r"expected a network with routes \(d2r\), got mlp"):
        record_routes(mlp, TASKS, 10, 1, 1, seed=0)
    with pytest.raises(ValueError, match="expected a positive multiple of envs_per_task=2, got 3"):
        record_routes(agent, TASKS, 10, 3, 2, seed=0)
    with pytest.raises(TypeError, match="in this process alone"):
        pickle.dumps(RecordingPolicy(agent.actor))
