"""`d2r import`: published D2R checkpoints as a run directory, for `d2r eval` and `d2r train --resume`."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import Tensor

from d2r_fast.commands.arguments import take_option
from d2r_fast.commands.networks import describe
from d2r_fast.config import EnvConfig, RunConfig
from d2r_fast.envs import MT10, MT25, MT50, parse_tasks
from d2r_fast.envs.metaworld import ACTION_SIZE, OBS_SIZE
from d2r_fast.learning.finite import first_not_finite
from d2r_fast.nets.published import TEMPERATURE, PublishedSizes, load_published, published_sizes
from d2r_fast.training.agents import make_agent
from d2r_fast.training.checkpoint import located
from d2r_fast.training.imported import begin_run

USAGE = """usage: d2r import ACTOR.pth [CRITIC.pth CRITIC.pth] [--run-dir DIR] [--FIELD VALUE ...]

Published D2R checkpoints (state dicts as torch saves them) become a run directory. Network sizes and the number of
tasks are read from the files; 10, 25 and 50 tasks are those of MT10, MT25 and MT50, others need --env.tasks. Without
critics, which evaluation does not use, the run gets fresh ones. --FIELD VALUE: as d2r train has them.
"""
_SIZES = ("n_modules", "module_width", "base_width", "route_widths")
_SUITES = {len(tasks): name for name, tasks in (("MT10", MT10), ("MT25", MT25), ("MT50", MT50))}


class _File(NamedTuple):
    path: Path
    parameters: Mapping[str, Tensor]
    sizes: PublishedSizes


def run(args: list[str]) -> int:
    """Make the run directory. ValueError, OSError: a file is none of a published network, or they do not fit."""
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    asked_dir, args = take_option(args, "--run-dir")
    tasks, args = take_option(args, "--env.tasks")
    first_option = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    files = [_read(Path(name)) for name in args[:first_option]]
    actor, critics = _sort(files)
    n_tasks = actor.sizes.n_tasks
    tasks = tasks or _SUITES.get(n_tasks)
    if tasks is None or len(parse_tasks(tasks)) != n_tasks:
        named = "--env.tasks with their names" if tasks is None else f"as many names, got {tasks}"
        raise ValueError(f"{actor.path}: is of {n_tasks} tasks: expected {named}")
    default = RunConfig(
        name="imported",
        env=EnvConfig(tasks=tasks),
        net=actor.sizes.cfg,
        batch_size=128 * n_tasks,
        replay_capacity=(100_000 if n_tasks <= 10 else 200_000) * n_tasks,
    )
    cfg = tyro.cli(RunConfig, prog="d2r import", default=default, args=args[first_option:])

    agent = make_agent(cfg, torch.device("cpu"))
    for owner, of_its in ((agent.actor, [actor]), (agent.critics, critics)):
        if of_its:
            loaded = load_published(*(file.parameters for file in of_its))
            shapes = {name: value.shape for name, value in owner.net.state_dict().items()}
            if shapes != {name: value.shape for name, value in loaded.items()}:
                raise ValueError(f"{of_its[0].path}: is of other sizes than --net asks for: {actor.sizes.cfg}")
            owner.net.load_state_dict(loaded)
    agent.target_critics.load_state_dict(agent.critics.state_dict())
    if TEMPERATURE in actor.parameters:
        agent.route_temp.copy_(actor.parameters[TEMPERATURE])

    run_dir = Path(asked_dir or f"runs/{cfg.name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
        raise FileExistsError(f"--run-dir: {run_dir} exists and is not empty")
    path = begin_run(run_dir, cfg, agent)
    print(f"run        {run_dir}")
    print(f"tasks      {', '.join(cfg.task_names)}")
    print(f"network    {describe(cfg.net, n_tasks)}")
    print(f"critics    {', '.join(str(c.path) for c in critics) or 'fresh ones: no file of theirs was given'}")
    print(f"checkpoint {path}")
    return 0


def _read(path: Path) -> _File:
    """ValueError, naming the file and what was expected of it; OSError: it cannot be read."""
    expected = f"{path}: expected a state dict of a published D2R network, as torch.save writes it"
    try:
        with path.open("rb") as file:
            values = torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch's reader meets what is none of its files in many ways
        raise ValueError(f"{expected}; it is not readable as one ({type(error).__name__})") from error
    if not isinstance(values, Mapping) or not values:
        raise ValueError(f"{expected}, got {'no parameter' if values == {} else type(values).__name__}")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not value.is_floating_point():
            raise ValueError(f"{expected}, got {type(value).__name__} under {name!r}")
    with located(path):
        sizes = published_sizes(values)
        if (bad := first_not_finite(values)) is not None:
            raise ValueError(f"holds a number that is not finite: {bad}")
        temperature = values.get(TEMPERATURE)
        if temperature is not None and (temperature.shape != (sizes.n_tasks,) or not (temperature > 0).all()):
            raise ValueError(f"{TEMPERATURE}: expected {sizes.n_tasks} positive numbers")
    return _File(path, {name: value.float() for name, value in values.items()}, sizes)


def _sort(files: list[_File]) -> tuple[_File, list[_File]]:
    """The actor, and two critics or none."""
    actors, critics = [], []
    for file in files:
        match file.sizes[:2]:
            case (n_in, n_out) if (n_in, n_out) == (OBS_SIZE, 2 * ACTION_SIZE):
                actors.append(file)
            case (n_in, 1) if n_in == OBS_SIZE + ACTION_SIZE:
                critics.append(file)
            case (n_in, n_out):
                raise ValueError(
                    f"{file.path}: reads {n_in} numbers and gives {n_out}: expected an actor, which reads {OBS_SIZE} "
                    f"and gives {2 * ACTION_SIZE}, or a critic, {OBS_SIZE + ACTION_SIZE} and 1"
                )
    if len(actors) != 1 or len(critics) not in (0, 2):
        given = f"{len(actors)} and {len(critics)}"
        raise ValueError(f"expected the file of one actor, and those of two critics or none, got {given}")
    (actor,) = actors
    for critic in critics:
        ours, theirs = (
            {"tasks": file.sizes.n_tasks} | {name: getattr(file.sizes.cfg, name) for name in _SIZES}
            for file in (critic, actor)
        )
        for name, size in theirs.items():
            if ours[name] != size:
                raise ValueError(f"{critic.path}: expected {name} {size} like {actor.path}, got {ours[name]}")
    return actor, critics
