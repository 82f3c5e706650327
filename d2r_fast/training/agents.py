"""The agent of a configuration, or of a checkpoint, on the device that it asks for."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from d2r_fast.config import RunConfig
from d2r_fast.envs import MultiTaskEnvs
from d2r_fast.learning.finite import first_not_finite
from d2r_fast.learning.saved_state import check_tensors, field
from d2r_fast.nets.agent import Agent
from d2r_fast.training.seeds import NETWORKS, stream_seed


def choose_device(wanted: str) -> torch.device:
    """ "auto", "cpu" or "cuda" -> a device. ValueError: a GPU was asked for and torch finds none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected a GPU for 'cuda', but torch {torch.__version__} finds none (see d2r info)")
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def make_agent(cfg: RunConfig, device: torch.device) -> Agent:
    """The agent of a configuration, with initial parameters drawn from its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(cfg.seed, NETWORKS))
        agent = Agent(
            MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size, cfg.n_tasks, cfg.net, init_alpha=cfg.sac.init_alpha
        )
    return agent.to(device)


def load_agent(agent: Agent, state: dict[str, Any]) -> None:
    """Take over the agent of a checkpoint. ValueError: it is of another network, or its numbers are not finite."""
    saved = field(state, "agent", dict)
    check_tensors(saved, "agent", agent.state_dict())
    require_finite(saved)
    agent.load_state_dict(saved)


def require_finite(saved: Mapping[str, Tensor]) -> None:
    """ValueError if one of the tensors of a checkpoint holds NaN or infinity."""
    if (bad := first_not_finite(saved)) is not None:
        raise ValueError(f"holds a number that is not finite: {bad}")
