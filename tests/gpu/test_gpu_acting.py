"""Acting as a captured graph, and captures that meet or fail: what only a GPU can show."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_gpu import N_TASKS, NET, TASKS, make_learner

from d2r_fast import Agent
from d2r_fast.envs import MultiTaskEnvs, Step
from d2r_fast.training.collector import Chunk, Collector

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch finds none")


class PlayedEnvs(MultiTaskEnvs):
    """Observations from a fixed stream whatever the actions, so that acting alone decides what is collected."""

    def __init__(self, seed: int):
        super().__init__()
        self.tasks, self.envs_per_task, self.episode_length = TASKS, 5, 500
        self._random = np.random.default_rng(seed)

    def reset(self) -> np.ndarray:
        return self._random.standard_normal((N_TASKS, self.envs_per_task, self.obs_size), np.float32)

    def send(self, action: np.ndarray) -> None:
        assert np.isfinite(action).all()

    def recv(self) -> Step:
        never, reward = np.zeros((N_TASKS, self.envs_per_task), bool), np.zeros((N_TASKS, self.envs_per_task), "f4")
        return Step(self.reset(), self.reset(), reward, never, never, never)

    def close(self) -> None:
        pass


def make_collector(cuda_graph: bool, agent: Agent | None = None) -> Collector:
    torch.manual_seed(0)
    agent = agent or Agent(39, 4, N_TASKS, NET).cuda()
    device, generator = torch.device("cuda"), torch.Generator("cuda").manual_seed(3)
    return Collector(PlayedEnvs(0), agent, device, generator, False, cuda_graph)


def assert_same_chunk(ours: Chunk, expected: Chunk) -> None:
    for name, value in expected.transitions._asdict().items():
        torch.testing.assert_close(getattr(ours.transitions, name), value, rtol=1e-5, atol=1e-6, msg=name)
    assert torch.equal(ours.active_modules, expected.active_modules)


def test_captured_acting_is_the_eager_one() -> None:
    eager, graphed = make_collector(cuda_graph=False), make_collector(cuda_graph=True)
    for n_steps in (2, 10, 7):  # captured in the middle of a chunk
        assert_same_chunk(graphed.collect(n_steps), eager.collect(n_steps))
        assert torch.equal(graphed.generator_state(), eager.generator_state())
    assert graphed._policy.is_captured and not eager._policy.is_captured
    graph = graphed._policy._graph
    for collector in (eager, graphed):
        collector.replace_envs(PlayedEnvs(1))
    assert_same_chunk(graphed.collect(3), eager.collect(3))
    assert graphed._policy._graph is graph


def test_captured_acting_takes_the_parameters_of_today() -> None:
    agent = Agent(39, 4, N_TASKS, NET).cuda()
    collector = make_collector(cuda_graph=True, agent=agent)
    collector.collect(6)
    assert collector._policy.is_captured
    with torch.no_grad():
        agent.actor.net.head.bias[0] = torch.tensor([9.0, -9.0, 9.0, -9.0] + [-20.0] * 4)
        agent.route_temp.fill_(1e-6)
    before = collector.collect(2).transitions.action
    assert before.abs().median() < 0.99
    collector.take_parameters()
    action = collector.collect(2).transitions.action
    torch.testing.assert_close(action, torch.tensor([1.0, -1.0, 1.0, -1.0]).expand_as(action), rtol=0, atol=1e-3)


def test_collector_and_learner_capture_in_threads_of_their_own() -> None:
    learner, alone = make_learner(0, cuda_graph=True), make_learner(0, cuda_graph=True)
    collector, expected = make_collector(cuda_graph=True), make_collector(cuda_graph=False).collect(60)
    with ThreadPoolExecutor(1) as thread:
        chunk = thread.submit(collector.collect, 60)
        learner.run(60)
        assert_same_chunk(chunk.result(), expected)
    assert collector._policy.is_captured and learner._one_update.is_captured
    alone.run(60)
    for name, value in learner.agent.state_dict().items():
        torch.testing.assert_close(value, alone.agent.state_dict()[name], rtol=1e-3, atol=1e-4, msg=name)


# In a process of its own: torch's allocator keeps thinking that the failed capture goes on.
FAILING_CAPTURE = """
import warnings
import torch
from d2r_fast.learning.captured import Captured

generator = torch.Generator("cuda").manual_seed(0)

def draw():
    value = torch.rand(3, generator=generator, device="cuda")
    value.sum().item()
    return value

call = Captured(draw, generator, "drawing")
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    drawn = torch.stack([call() for _ in range(8)])
assert len(told) == 1 and str(told[0].message).startswith("drawing: not as a CUDA graph, "), told
assert torch.cuda.current_stream() == torch.cuda.default_stream()
again = torch.Generator("cuda").manual_seed(0)
assert torch.equal(drawn, torch.stack([torch.rand(3, generator=again, device="cuda") for _ in range(8)]))
"""


def test_a_capture_that_fails_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", FAILING_CAPTURE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
