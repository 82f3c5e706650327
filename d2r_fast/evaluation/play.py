"""Evaluation: greedy routes, mean action, on environments of its own; success means success at any step."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from d2r_fast.config import EvalConfig
from d2r_fast.envs import MultiTaskEnvs, make_envs
from d2r_fast.envs.fidelity_table import EngineChoice
from d2r_fast.envs.metaworld import ACTION_SIZE, OBS_SIZE, Goals
from d2r_fast.evaluation.policies import EvalPolicy, GreedyPolicy
from d2r_fast.nets.agent import Agent


class Played(NamedTuple):
    """E episodes, one after another, in each of n environments of T tasks; of one task, the arrays are without T."""

    start: np.ndarray  # [E,T,n,39] float32, first observation
    success: np.ndarray  # [E,T,n] bool, at any step
    episode_return: np.ndarray  # [E,T,n] sum of rewards


class EvalResult(NamedTuple):
    """Per task, over `episodes` episodes each."""

    success: list[float]  # [T] share of episodes
    episode_return: list[float]  # [T] mean sum of unscaled rewards
    module_use: list[list[float]]  # [T][N] share of steps in which the actor ran the module; N is 0 without routes
    episodes: int

    @property
    def mean_success(self) -> float:
        return float(np.mean(self.success))


def play(
    policy: EvalPolicy, envs: MultiTaskEnvs, rounds: int, after_round: Callable[[], None] = lambda: None
) -> Played:
    """Reset `envs` and play `rounds` whole episodes in each; `after_round` is called at the end of every one.

    RuntimeError: the environments' episodes do not end together.
    """
    shape = (envs.n_tasks, envs.envs_per_task)
    task_id = np.eye(envs.n_tasks, dtype=np.float32).repeat(envs.envs_per_task, 0)  # [T*n,T]
    everywhere = np.ones(len(task_id), bool)
    played = Played(
        start=np.empty((rounds, *shape, OBS_SIZE), np.float32),
        success=np.zeros((rounds, *shape), bool),
        episode_return=np.zeros((rounds, *shape)),
    )
    obs = envs.reset()  # [T,n,O]
    for start, success, episode_return in zip(*played, strict=True):
        start[:] = obs
        policy.reset(everywhere)
        for _ in range(envs.episode_length):
            rows = np.concatenate([obs.reshape(len(task_id), OBS_SIZE), task_id], 1)
            step = envs.step(policy.eval_action(rows).reshape(*shape, ACTION_SIZE))
            success |= step.success
            episode_return += step.reward
            obs = step.obs
        if not step.truncated.all():
            raise RuntimeError(f"episodes of {envs.episode_length} steps did not end together: {step.truncated}")
        after_round()
    return played


def evaluate(
    agent: Agent,
    tasks: tuple[str, ...],
    episode_length: int,
    cfg: EvalConfig,
    seed: int,
    engine: EngineChoice = "auto",
    goals: Goals = "random",
) -> EvalResult:
    """Run `cfg.episodes` episodes of each task, with goals drawn from `seed`. The agent is left as it was."""
    policy = GreedyPolicy(agent.actor)
    with make_envs(tasks, cfg.envs_per_task, episode_length, seed, engine=engine, goals=goals) as envs:
        played = play(policy, envs, cfg.episodes // cfg.envs_per_task)
    return EvalResult(
        success=played.success.mean((0, 2)).tolist(),
        episode_return=played.episode_return.mean((0, 2)).tolist(),
        module_use=policy.module_use(),
        episodes=cfg.episodes,
    )
