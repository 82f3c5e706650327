"""A run directory around an agent that was trained elsewhere."""

from pathlib import Path

import torch

from d2r_fast.config import RunConfig
from d2r_fast.config_json import config_to_json
from d2r_fast.envs import MultiTaskEnvs
from d2r_fast.learning.replay import Replay
from d2r_fast.learning.update import Update
from d2r_fast.nets.agent import Agent
from d2r_fast.training import seeds
from d2r_fast.training.checkpoint import save_checkpoint
from d2r_fast.training.saved_run import open_run


def begin_run(run_dir: Path, cfg: RunConfig, agent: Agent) -> Path:
    """Make `run_dir` that of a run of `cfg` which holds `agent`, on the CPU, and has not taken a step; returns its
    checkpoint. It can be evaluated, and gone on with: a warm-up follows then, as in any run.

    Errors as `open_run` and `save_checkpoint` raise them.
    """
    streams = (torch.Generator().manual_seed(seeds.stream_seed(cfg.seed, s)) for s in (seeds.LEARNER, seeds.ACTING))
    learner, acting = (stream.get_state() for stream in streams)
    # Of no rows: a whole one would take the memory that training needs.
    empty = Replay(
        cfg.n_tasks, 0, MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size, cfg.net.route_shape, learner.device
    )
    claim, log = open_run(run_dir, cfg, None, None)
    try:
        state = {
            "config": config_to_json(cfg),
            "agent": agent.state_dict(),
            "learner": {"optimiser": Update(agent, cfg.sac).state_dict(), "generator": learner, "updates": 0},
            "replay": empty.state_dict() if cfg.checkpoint_replay else None,
            "acting_generator": acting,
            **{"steps": 0, "chunks_ended": 0, "evaluations": 0, "env_epoch": 1},
            **{"evaluation_due": False, "collected": {}, "run_id": claim.id},
            **log.state_dict(),
        }
        return save_checkpoint(run_dir, 0, state)
    finally:
        log.close()
        claim.release()
