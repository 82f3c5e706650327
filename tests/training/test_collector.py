"""The collector on the real simulation, against raw EnvPool pools stepped by hand with the collector's own actions."""

from typing import NamedTuple

import envpool
import numpy as np
import pytest
import torch
from tiny import NET

from d2r_fast.envs import MultiTaskEnvs, make_envs
from d2r_fast.envs.envpool import envpool_name
from d2r_fast.learning.replay import Replay
from d2r_fast.nets.agent import Agent
from d2r_fast.nets.d2r import RouteChoice
from d2r_fast.ops.gumbel import gumbel
from d2r_fast.training.collector import Chunk, Collector

TASKS = ("reach", "drawer-close")
T, N_ENVS = 2, 2
SCALE = 0.25
ENV_SEED, ACTING_SEED = 0, 5
# Long enough for the pushing agent to solve some episodes, and with chunks that end in the middle of them.
LENGTH = 60
CHUNKS = (25, 92, 1, 62)


def make_agent() -> Agent:
    """An agent that pushes towards +y: it moves the drawer now and then, and its hand passes some of reach's goals."""
    torch.manual_seed(0)
    agent = Agent(MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size, T, NET)
    with torch.no_grad():
        agent.actor.net.head.bias[0] = torch.tensor([0.0, 1.5, 0.0, 0.0, -1.0, -1.0, -1.0, -1.0])
        # Temperatures and routing logits far apart, so that a route drawn for the wrong row would show.
        agent.route_temp.copy_(torch.tensor([0.2, 1.8]))
        agent.actor.net.route[-1].weight.mul_(20)
    return agent


def collect(chunks: tuple[int, ...], length: int, time_limit_is_terminal: bool = False) -> list[Chunk]:
    envs = make_envs(TASKS, N_ENVS, length, ENV_SEED, SCALE)
    generator = torch.Generator().manual_seed(ACTING_SEED)
    collector = Collector(envs, make_agent(), torch.device("cpu"), generator, time_limit_is_terminal)
    try:
        return [collector.collect(n) for n in chunks]
    finally:
        collector.close()


def by_env(rows: torch.Tensor) -> np.ndarray:
    """[T,S*n,...] as the replay gets it -> [T,n,S,...]: the steps of each environment in a row."""
    return rows.unflatten(1, (-1, N_ENVS)).transpose(1, 2).numpy()


class Trajectory(NamedTuple):
    """[T,n,S,...]: what the collector's chunks hold together, or what raw EnvPool gave for the same actions."""

    obs: np.ndarray
    action: np.ndarray
    reward: np.ndarray
    next_obs: np.ndarray


def step_raw_pools(action: np.ndarray, length: int) -> tuple[Trajectory, np.ndarray]:
    """Replay actions [T,n,S,4] in pools of our own, skipping EnvPool's reset rows; with them success [T,n,S]."""
    n_steps = action.shape[2]
    obs = np.zeros((T, N_ENVS, n_steps, 39), np.float32)
    next_obs, reward, success = obs.copy(), obs[..., 0].copy(), obs[..., 0] > 0
    for t, task in enumerate(TASKS):
        pool = envpool.make(
            envpool_name(task),
            env_type="gymnasium",
            num_envs=N_ENVS,
            num_threads=1,
            seed=ENV_SEED + t * N_ENVS,
            max_episode_steps=length,
            partially_observable=False,
        )
        now, _ = pool.reset()
        for s in range(n_steps):
            obs[t, :, s] = now
            now, reward[t, :, s], terminated, truncated, info = pool.step(action[t, :, s])
            next_obs[t, :, s], success[t, :, s] = now, info["success"]
            assert not terminated.any()
            assert (truncated == ((s + 1) % length == 0)).all()
            if truncated.all():
                now = pool.step(action[t, :, s])[0]  # the reset row
    return Trajectory(obs, action, reward * np.float32(SCALE), next_obs), success


@pytest.fixture(scope="module")
def chunks() -> list[Chunk]:
    return collect(CHUNKS, LENGTH)


@pytest.fixture(scope="module")
def stored(chunks: list[Chunk]) -> Trajectory:
    rows = [np.concatenate([by_env(getattr(c.transitions, f)) for c in chunks], 2) for f in Trajectory._fields]
    return Trajectory(*rows)


@pytest.fixture(scope="module")
def raw(stored: Trajectory) -> tuple[Trajectory, np.ndarray]:
    return step_raw_pools(stored.action, LENGTH)


def test_shapes_and_dtypes(chunks):
    for n_steps, chunk in zip(CHUNKS, chunks, strict=True):
        rows = n_steps * N_ENVS
        assert {name: (tuple(x.shape), x.dtype) for name, x in chunk.transitions._asdict().items()} == {
            "obs": ((T, rows, 39), torch.float32),
            "action": ((T, rows, 4), torch.float32),
            "reward": ((T, rows), torch.float32),
            "terminal": ((T, rows), torch.bool),
            "next_obs": ((T, rows, 39), torch.float32),
            "route": ((T, rows, NET.n_modules, NET.top_k), torch.uint8),
        }
        assert chunk.active_modules.shape == (T,)


def test_every_row_is_a_step_of_the_simulation(stored, raw):
    """Rows come in the order [T, S*n], none is missing and EnvPool's reset rows are not among them."""
    for name in Trajectory._fields:
        np.testing.assert_array_equal(getattr(stored, name), getattr(raw[0], name), err_msg=name)


def test_rows_follow_one_another_within_an_episode_and_only_there(stored):
    ends = (np.arange(sum(CHUNKS)) + 1) % LENGTH == 0
    within = ~ends[:-1]
    np.testing.assert_array_equal(stored.next_obs[:, :, :-1][:, :, within], stored.obs[:, :, 1:][:, :, within])
    # Over an episode's end the goal is drawn anew, so a row that crossed it would show two goals.
    np.testing.assert_array_equal(stored.next_obs[..., 36:], stored.obs[..., 36:])
    goals = stored.obs[..., 36:]
    assert (goals[:, :, :-1][:, :, ends[:-1]] != goals[:, :, 1:][:, :, ends[:-1]]).any(-1).all()


def test_every_next_obs_remembers_the_obs_of_its_row(stored):
    np.testing.assert_array_equal(stored.next_obs[..., 18:36], stored.obs[..., :18])
    moved = stored.next_obs[..., :18] != stored.obs[..., :18]
    assert moved.any(-1).all()  # or the line above would hold of any two rows


def test_the_replay_holds_the_same_rows(chunks):
    rows = sum(CHUNKS) * N_ENVS
    replay = Replay(T, T * rows, 39, 4, (NET.n_modules, NET.top_k), torch.device("cpu"))
    for chunk in chunks:
        replay.add(chunk.transitions)
    drawn = replay.sample(2000, torch.Generator().manual_seed(0))
    obs, next_obs = drawn.obs.numpy(), drawn.next_obs.numpy()
    np.testing.assert_array_equal(next_obs[:, 18:36], obs[:, :18])
    np.testing.assert_array_equal(next_obs[:, 36:], obs[:, 36:])
    assert len(np.unique(obs, axis=0)) > rows  # out of 2 * rows: draws reach all over it
    assert not drawn.terminal.any()


@pytest.mark.parametrize("time_limit_is_terminal", [False, True])
def test_terminal_marks_the_time_limit_only_where_asked(time_limit_is_terminal):
    length, n_steps = 5, 13
    (chunk,) = collect((n_steps,), length, time_limit_is_terminal)
    ends = (np.arange(n_steps) + 1) % length == 0
    expected = np.broadcast_to(ends & time_limit_is_terminal, (T, N_ENVS, n_steps))
    np.testing.assert_array_equal(by_env(chunk.transitions.terminal), expected)


def test_action_and_route_are_what_the_actor_draws_for_that_row(chunks):
    """Each step again, row by row order included, from the stored observations and the same random stream."""
    agent, generator = make_agent(), torch.Generator().manual_seed(ACTING_SEED)
    task = torch.arange(T).repeat_interleave(N_ENVS)
    rows = T * N_ENVS
    for n_steps, chunk in zip(CHUNKS, chunks, strict=True):
        obs, action, route = (
            x.unflatten(1, (n_steps, N_ENVS))
            for x in (chunk.transitions.obs, chunk.transitions.action, chunk.transitions.route)
        )
        for s in range(n_steps):
            noise = torch.randn(rows, 4, generator=generator)
            route_noise = gumbel((1, rows, NET.n_logits), obs, generator)
            with torch.no_grad():
                choice = RouteChoice.sampled(agent.route_temp[task], route_noise)
                sample = agent.actor.sample(obs[:, s].flatten(0, 1), task, noise, choice)
            assert torch.equal(sample.action, action[:, s].flatten(0, 1))
            assert torch.equal(sample.routes.index[0].to(torch.uint8), route[:, s].flatten(0, 1))


def test_routes_are_distinct_earlier_modules(chunks):
    route = torch.cat([chunk.transitions.route for chunk in chunks], 1).flatten(0, 1).long()  # [rows,N,K]
    for i in range(1, NET.n_modules + 1):
        used = min(NET.top_k, i)
        kept = route[:, i - 1, :used]
        assert (kept < i).all()
        assert all(len(set(row)) == used for row in kept.tolist())
        assert (route[:, i - 1, used:] == 0).all()
        # Sampling reaches every source of the route.
        assert set(kept.flatten().tolist()) == set(range(i))


def test_active_modules_is_the_mean_number_that_the_stored_routes_reach(chunks):
    def n_reached(route: list[list[int]]) -> int:
        reached, todo = set(), [NET.n_modules]
        while todo:
            i = todo.pop()
            sources = route[i - 1][: min(NET.top_k, i)] if i > 0 else []
            todo += [s for s in sources if s not in reached]
            reached |= set(sources)
        return len(reached)

    for chunk in chunks:
        counted = [[n_reached(row) for row in rows] for rows in chunk.transitions.route.tolist()]
        np.testing.assert_allclose(chunk.active_modules.numpy(), np.mean(counted, axis=1), rtol=1e-6)
    assert len(set(np.ravel(counted))) > 1


def test_success_and_return_of_episodes_that_run_over_chunks(chunks, raw):
    rows, success = raw
    n_episodes = sum(CHUNKS) // LENGTH
    whole = n_episodes * LENGTH
    solved = success[:, :, :whole].reshape(T, N_ENVS, n_episodes, LENGTH)
    returns = rows.reward.astype(np.float64)[:, :, :whole].reshape(T, N_ENVS, n_episodes, LENGTH).sum(-1)
    any_step = solved.any(-1)
    # The rollout must tell "at any step" from "at the last step", and from "never" and "always".
    assert (any_step & ~solved[..., -1]).any()
    assert 0 < any_step.mean() < 1
    # ... and hold an episode solved only in a chunk before the one that it ends in.
    chunk_of_step = np.repeat(np.arange(len(CHUNKS)), CHUNKS)[:whole].reshape(n_episodes, LENGTH)
    in_last_chunk = chunk_of_step == chunk_of_step[:, -1:]
    assert (any_step & ~(solved & in_last_chunk).any(-1)).any()

    for c, chunk in enumerate(chunks):
        ended = [e for e in range(n_episodes) if chunk_of_step[e, -1] == c]
        for t in range(T):
            assert chunk.success[t] == [float(any_step[t, i, e]) for e in ended for i in range(N_ENVS)]
            expected = [returns[t, i, e] for e in ended for i in range(N_ENVS)]
            np.testing.assert_allclose(chunk.episode_return[t], expected, rtol=1e-12)
    assert sum(len(c.success[0]) for c in chunks) == n_episodes * N_ENVS
    assert [len(c.success[0]) for c in chunks].count(0) > 0  # a chunk in which no episode ends


def test_replacing_the_environments_begins_new_episodes():
    """Nothing of the half-finished episode is stored or counted, and the old environments are closed."""
    length = 5
    old = make_envs(TASKS, N_ENVS, length, ENV_SEED, SCALE)
    collector = Collector(old, make_agent(), torch.device("cpu"), torch.Generator().manual_seed(0), False)
    first = collector.collect(3)
    collector.replace_envs(make_envs(TASKS, N_ENVS, length, ENV_SEED + 100, SCALE))
    second = collector.collect(length)
    collector.close()
    with pytest.raises(RuntimeError, match="closed"):
        old.reset()
    assert first.success == [[], []]
    assert [len(s) for s in second.success] == [N_ENVS, N_ENVS]
    obs = by_env(second.transitions.obs)
    assert (obs[:, :, 0] != by_env(first.transitions.next_obs)[:, :, -1]).any(-1).all()
    np.testing.assert_array_equal(obs[:, :, 0, :18], obs[:, :, 0, 18:36])  # a first observation has no step before it
    sums = by_env(second.transitions.reward).astype(np.float64).sum(-1)
    np.testing.assert_allclose(second.episode_return, sums, rtol=1e-6)
