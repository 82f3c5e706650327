"""Evaluation on the real simulation, against episodes stepped one by one."""

import numpy as np
import pytest
import torch
from tiny import NET

from d2r_fast.config import EvalConfig
from d2r_fast.envs import MultiTaskEnvs, make_envs
from d2r_fast.evaluation.play import EvalResult, evaluate
from d2r_fast.nets.agent import Agent

TASKS = ("reach", "drawer-close")
LENGTH = 40
CFG = EvalConfig(episodes=6, envs_per_task=3)
SEED = 4


@pytest.fixture
def agent() -> Agent:
    """Pushes towards +y, which closes some drawers; its routes differ from observation to observation."""
    torch.manual_seed(7)
    agent = Agent(MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size, len(TASKS), NET)
    with torch.no_grad():
        agent.actor.net.head.bias[0, 1] = 1.5
        agent.actor.net.task.weight.mul_(5)
        agent.actor.net.route[-1].bias.zero_()
    return agent


@pytest.fixture
def result(agent: Agent) -> EvalResult:
    return evaluate(agent, TASKS, LENGTH, CFG, SEED)


def reached(route: list[list[int]]) -> set[int]:
    """Modules that a path from the head reaches, given each route's sources [N,K]."""
    found, todo = set(), [len(route)]
    while todo:
        i = todo.pop()
        new = set(route[i - 1][: min(NET.top_k, i)] if i > 0 else []) - found
        found |= new
        todo += new
    return found


def test_the_numbers_are_those_of_episodes_stepped_by_hand(agent, result):
    """Greedy routes, mean action, success at any step, unscaled return, every episode whole."""
    rounds = CFG.episodes // CFG.envs_per_task
    solved = np.zeros((rounds, LENGTH, len(TASKS), CFG.envs_per_task), bool)
    task = [t for t in range(len(TASKS)) for _ in range(CFG.envs_per_task)]
    total, use = np.zeros(len(TASKS)), np.zeros((len(TASKS), NET.n_modules))
    with make_envs(TASKS, CFG.envs_per_task, LENGTH, SEED) as envs:
        obs = envs.reset()
        for episode in range(rounds):
            for s in range(LENGTH):
                with torch.no_grad():
                    mean, _, routes = agent.actor(torch.from_numpy(np.concatenate(obs)), torch.tensor(task))
                for t, route in zip(task, routes.index[0].tolist(), strict=True):
                    use[t, list(reached(route))] += 1
                step = envs.step(np.stack(np.split(mean.tanh().numpy(), len(TASKS))))
                solved[episode, s], obs = step.success, step.obs
                total += step.reward.sum(1)
            assert step.truncated.all()
    per_step = rounds * LENGTH * CFG.envs_per_task
    assert result.success == solved.any(1).mean((0, 2)).tolist()
    np.testing.assert_allclose(result.episode_return, total / CFG.episodes, rtol=1e-5)
    np.testing.assert_allclose(result.module_use, use / per_step, atol=1e-6)
    assert result.episodes == 6
    # The agent solves some episodes and not others, and uses some modules now and then.
    assert 0 < result.mean_success < 1
    assert ((use > 0) & (use < per_step)).any()


def test_mean_success_is_the_mean_over_tasks(result):
    assert len(result.success) == len(result.episode_return) == len(TASKS)
    assert result.mean_success == pytest.approx(sum(result.success) / len(TASKS), abs=1e-12)
    assert all((share * CFG.episodes) % 1 == pytest.approx(0) for share in result.success)


def test_module_use(agent, result):
    """Every path ends in module 0; the rows sum to the mean number of modules that ran."""
    use = np.array(result.module_use)
    assert use.shape == (len(TASKS), NET.n_modules)
    assert (use[:, 0] == 1.0).all()
    assert ((use >= 0) & (use <= 1)).all()

    counts = [[] for _ in TASKS]
    forward = agent.actor.act_greedily

    def counting(obs, task):
        action, routes = forward(obs, task)
        for t, route in zip(task.tolist(), routes.index[0].tolist(), strict=True):
            counts[t].append(len(reached(route)))
        return action, routes

    agent.actor.act_greedily = counting
    again = evaluate(agent, TASKS, LENGTH, CFG, SEED)
    assert [len(c) for c in counts] == [CFG.episodes * LENGTH] * len(TASKS)
    np.testing.assert_allclose(np.sum(again.module_use, axis=1), [np.mean(c) for c in counts], rtol=1e-6)


def test_the_seed_alone_decides(agent, result):
    torch.manual_seed(99)
    assert evaluate(agent, TASKS, LENGTH, CFG, SEED) == result
    other = evaluate(agent, TASKS, LENGTH, CFG, SEED + 1000)
    assert all(a != b for a, b in zip(other.episode_return, result.episode_return, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_the_agent_is_left_as_it_was(agent, training):
    agent.train(training)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    evaluate(agent, TASKS, 5, EvalConfig(episodes=1, envs_per_task=1), SEED)
    assert {module.training for module in agent.modules()} == {training}
    assert all(torch.equal(value, before[name]) for name, value in agent.state_dict().items())
    assert all(p.grad is None for p in agent.parameters())


def test_one_environment_a_task_and_one_task(agent):
    torch.manual_seed(0)
    alone = Agent(MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size, 1, NET)
    result = evaluate(alone, ("drawer-close",), 3, EvalConfig(episodes=2, envs_per_task=1), SEED)
    assert result.episodes == 2
    assert [len(result.success), len(result.episode_return), len(result.module_use)] == [1, 1, 1]
    assert result.episode_return[0] > 0
