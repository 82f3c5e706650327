"""Evaluation: greedy routes, mean action, on environments of its own; success means success at any step."""

from typing import NamedTuple

import numpy as np
import torch

from d2r_fast.config import EvalConfig
from d2r_fast.envs import make_envs
from d2r_fast.envs.fidelity_table import EngineChoice
from d2r_fast.envs.metaworld import Goals
from d2r_fast.ops import unpack_active
from d2r_fast.policy import Agent


class EvalResult(NamedTuple):
    """Per task, over `episodes` episodes each."""

    success: list[float]  # [T] share of episodes
    episode_return: list[float]  # [T] mean sum of unscaled rewards
    module_use: list[list[float]]  # [T][N] share of steps in which the actor ran the module
    episodes: int

    @property
    def mean_success(self) -> float:
        return float(np.mean(self.success))


@torch.no_grad()
def evaluate(
    agent: Agent,
    tasks: tuple[str, ...],
    episode_length: int,
    cfg: EvalConfig,
    seed: int,
    engine: EngineChoice = "auto",
    goals: Goals = "random",
) -> EvalResult:
    """Run `cfg.episodes` episodes of each task, with goals drawn from `seed`. The agent keeps its mode."""
    device = agent.log_alpha.device
    task = torch.arange(len(tasks), device=device).repeat_interleave(cfg.envs_per_task)
    n_modules = agent.actor.net.cfg.n_modules
    shape = (len(tasks), cfg.envs_per_task)
    succeeded, total = np.zeros(len(tasks)), np.zeros(len(tasks))
    use = torch.zeros(*shape, n_modules, device=device)
    n_rounds = cfg.episodes // cfg.envs_per_task

    was_training = agent.training
    agent.eval()
    with make_envs(tasks, cfg.envs_per_task, episode_length, seed, engine=engine, goals=goals) as envs:
        obs = envs.reset()  # [T,n,O]
        for _ in range(n_rounds):
            success = np.zeros(shape, dtype=bool)
            for _ in range(episode_length):
                rows = torch.from_numpy(obs.reshape(len(task), -1)).to(device)
                action, routes = agent.actor.act_greedily(rows, task)
                use += unpack_active(routes.active[0], n_modules).view(*shape, n_modules)
                step = envs.step(action.cpu().numpy().reshape(*shape, -1))
                success |= step.success
                total += step.reward.sum(1)
                obs = step.obs
            succeeded += success.sum(1)
    agent.train(was_training)
    return EvalResult(
        success=(succeeded / cfg.episodes).tolist(),
        episode_return=(total / cfg.episodes).tolist(),
        module_use=(use.mean(1) / (n_rounds * episode_length)).tolist(),
        episodes=cfg.episodes,
    )
