"""`d2r export`: a trained policy as safetensors with a JSON of its sizes, or in the published layout."""

import dataclasses
import sys
from pathlib import Path

import torch
import tyro

from d2r_fast.host.files import whole_file
from d2r_fast.nets.agent import Agent
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.nets.published import to_published
from d2r_fast.training.agents import load_agent, make_agent
from d2r_fast.training.checkpoint import located
from d2r_fast.training.exported import NAME, write_policy
from d2r_fast.training.saved_run import read_saved_run


@dataclasses.dataclass(frozen=True)
class ExportArgs:
    """Write a run's policy for other programs: PREFIX.safetensors, the actor's parameters, and PREFIX.json, its
    network, sizes and tasks. examples/run_policy.py runs them with torch alone."""

    run: tyro.conf.Positional[Path]
    """A run directory (its newest checkpoint) or a checkpoint file."""
    out: Path | None = None
    """PREFIX; by default RUN/policy, or beside the checkpoint file."""
    published: bool = False
    """Instead, PREFIX-pf.pth, PREFIX-qf1.pth and PREFIX-qf2.pth: actor and critics as the published code of D2R saves
    and loads them."""


def run(args: list[str]) -> int:
    """Write the files, each whole or not at all. ValueError: the run's network is none of D2R's, or as `d2r eval`."""
    wanted = tyro.cli(ExportArgs, prog="d2r export", args=args)
    saved = read_saved_run(wanted.run)
    for error in saved.passed_over.values():
        print(f"d2r export: {error}; exporting {saved.path.name}", file=sys.stderr)
    agent = make_agent(saved.cfg, torch.device("cpu"))
    with located(saved.path):
        load_agent(agent, saved.state)
    out = wanted.out or (wanted.run if wanted.run.is_dir() else wanted.run.parent) / NAME
    if wanted.published:
        if not isinstance(saved.cfg.net, NetConfig):
            raise ValueError(f"--published: expected a run of network {NetConfig.kind}, got {saved.cfg.net.kind}")
        if not saved.cfg.net.dynamic_depth:
            raise ValueError("--published: expected net.dynamic_depth True, for the published code has no other way")
        written = _write_published(out, agent)
    else:
        written = write_policy(out, agent, saved.cfg, saved.state["steps"])
    print(
        f"policy     {saved.path}: {saved.cfg.net.kind}, {saved.cfg.n_tasks} tasks, {saved.state['steps']:,} steps each"
    )
    for path in written:
        print(f"file       {path}")
    return 0


def _write_published(out: Path, agent: Agent) -> list[Path]:
    (actor,) = to_published(agent.actor.net.state_dict(), agent.route_temp)
    critics = to_published(agent.critics.net.state_dict(), agent.route_temp)
    written = []
    for name, parameters in zip(("pf", "qf1", "qf2"), (actor, *critics), strict=True):
        path = out.with_name(f"{out.name}-{name}.pth")
        with whole_file(path) as file:
            torch.save(parameters, file)
        written.append(path)
    return written
