"""A policy in files for other programs: PREFIX.safetensors, the actor's parameters, and PREFIX.json, what they are of.

`agents/` holds some; what reads a run reads a directory with policy.json and policy.safetensors too.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from d2r_fast.config import RunConfig
from d2r_fast.config_json import config_from_json, config_to_json
from d2r_fast.envs.metaworld import ACTION_SIZE, OBS_SIZE
from d2r_fast.host.files import whole_file
from d2r_fast.learning.saved_state import check_tensors, count
from d2r_fast.nets.agent import Agent
from d2r_fast.ops.squashed_normal import LOG_STD_RANGE
from d2r_fast.training.agents import make_agent

FORMAT = "d2r_fast policy 1"
NAME = "policy"
_ACTOR = "actor.net."


def write_policy(prefix: Path, agent: Agent, cfg: RunConfig, steps: int) -> list[Path]:
    """Write an agent's policy, of a run of `cfg` after `steps` steps a task, each file whole or not at all; returns the
    files. OSError."""
    about = {
        "format": FORMAT,
        "network": {"kind": cfg.net.kind, **dataclasses.asdict(cfg.net)},
        "observation": OBS_SIZE,
        "action": ACTION_SIZE,
        "log_std_range": list(LOG_STD_RANGE),
        "tasks": list(cfg.task_names),
        "steps": steps,
        "config": json.loads(config_to_json(cfg)),
    }
    weights, description = (prefix.with_name(prefix.name + ending) for ending in (".safetensors", ".json"))
    with whole_file(weights) as file:
        file.write(safetensors.torch.save(_plain(agent.actor.net.state_dict())))
    with whole_file(description) as file:
        file.write((json.dumps(about, indent=2) + "\n").encode())
    return [weights, description]


def _plain(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that share no memory, as the format wants them."""
    return {name: value.clone().contiguous() for name, value in state_dict.items()}


def holds_policy(directory: Path) -> bool:
    """Whether `write_policy` was told to write into this directory as `policy`."""
    return (directory / f"{NAME}.json").is_file()


def read_policy(directory: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The run's configuration, and what a checkpoint would hold of the agent: "agent", whose critics are fresh ones,
    and "steps".

    ValueError, naming the file: it is none of these, damaged, or of another network. OSError: it cannot be read.
    """
    description, weights = directory / f"{NAME}.json", directory / f"{NAME}.safetensors"
    try:
        about = json.loads(description.read_text(encoding="utf-8"))
        if not isinstance(about, dict) or about.get("format") != FORMAT:
            raise ValueError(f"expected what d2r export writes, {FORMAT!r}")
        if "config" not in about:
            raise ValueError("written before policies told of their runs; d2r export writes it anew")
        cfg, steps = config_from_json(json.dumps(about["config"]), "config"), count(about, "steps")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{description}: {error}") from error
    agent = make_agent(cfg, torch.device("cpu")).state_dict()
    try:
        saved = safetensors.torch.load(weights.read_bytes())
        actor = {name.removeprefix(_ACTOR): value for name, value in agent.items() if name.startswith(_ACTOR)}
        check_tensors(saved, "the policy", actor)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{weights}: {error}") from error
    return cfg, {"agent": agent | {_ACTOR + name: value for name, value in saved.items()}, "steps": steps}
