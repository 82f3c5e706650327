"""What a network amounts to, in a line."""

import dataclasses

import torch

from d2r_fast.envs.metaworld import ACTION_SIZE, OBS_SIZE
from d2r_fast.nets.agent import N_CRITICS, Actor, Critics
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.nets.settings import NetConfigBase


def describe(cfg: NetConfigBase, n_tasks: int) -> str:
    """Parameters, and multiply-adds of a row in the actor, at this number of tasks; nothing is allocated for it."""
    with torch.device("meta"):
        actor, critics = (make(OBS_SIZE, ACTION_SIZE, n_tasks, cfg) for make in (Actor, Critics))
    sizes = [sum(p.numel() for p in net.parameters()) for net in (actor, critics)]
    at_most = "at most " if isinstance(cfg, NetConfig) and cfg.dynamic_depth else ""  # what the row's routes reach
    return (
        f"{cfg.kind}, {sizes[0]:,} parameters (each of {N_CRITICS} critics {sizes[1] // N_CRITICS:,}), "
        f"{at_most}{actor.net.multiply_adds / 1e6:.2f} M multiply-adds a row"
    )


def sizes(cfg: NetConfigBase) -> str:
    """Its own settings by name."""
    common = {field.name for field in dataclasses.fields(NetConfigBase)}
    own = (field.name for field in dataclasses.fields(cfg) if field.name not in common)
    return ", ".join(f"{name} {getattr(cfg, name)}" for name in own)
