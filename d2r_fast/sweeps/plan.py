"""What a sweep consists of: every seed with every network and every combination of settings, each a checked run."""

import contextlib
import dataclasses
import io
import itertools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from d2r_fast.config import RunConfig
from d2r_fast.config_args import config_from_args
from d2r_fast.config_json import load_config

# What stands on its own behind another option.
SEEDS, SET, NETS = "--seeds", "--set", "--nets"


class Setting(NamedTuple):
    """A field of the configuration, and the values that it takes, as they were typed."""

    field: str
    values: tuple[str, ...]


class PlannedRun(NamedTuple):
    """A run of a sweep; its name is that of its folder."""

    name: str
    cfg: RunConfig


class Grid(NamedTuple):
    """What is asked for. `overrides` are `--FIELD VALUE ...` of all runs; of no `nets`, the preset's own, or `net`."""

    preset: str
    seeds: tuple[int, ...]
    nets: tuple[str, ...] = ()
    settings: tuple[Setting, ...] = ()
    overrides: tuple[str, ...] = ()
    net: str | None = None


def parse_seeds(text: str) -> tuple[int, ...]:
    """`0-7`, `3`, or several of such with commas between. ValueError: something else, or a seed twice."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,10})(?:-(\d{1,10}))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last >= 2**32:
            raise ValueError(f"{SEEDS}: expected seeds such as 0-7 or 0,1,5 below 2**32, got {text!r}")
        if last - first >= 10_000:
            raise ValueError(f"{SEEDS}: expected at most 10,000 seeds, got {text!r}")
        seeds += range(first, last + 1)
    _refuse_twice(SEEDS, [str(seed) for seed in seeds])
    return tuple(seeds)


def parse_nets(text: str) -> tuple[str, ...]:
    """Kinds of networks with commas between; which ones there are is checked with the runs. ValueError: one twice."""
    nets = [part.strip() for part in text.split(",")]
    _refuse_twice(NETS, nets)
    return tuple(nets)


def parse_setting(text: str) -> Setting:
    """`FIELD=V1,V2`, or `FIELD=V1;V2` where values have commas of their own. ValueError: something else, or a value
    twice."""
    field, equals, values = text.partition("=")
    field = field.strip().removeprefix("--").replace("-", "_")
    parts = [part.strip() for part in values.split(";" if ";" in values else ",")]
    if not equals or not field or not all(parts):
        raise ValueError(f"{SET}: expected FIELD=VALUE,VALUE,... such as net.top_k=1,2,4, got {text!r}")
    if field == "seed":
        raise ValueError(f"{SET}: expected the seeds as {SEEDS}, got {text!r}")
    _refuse_twice(f"{SET} {field}", parts)
    return Setting(field, tuple(parts))


def _refuse_twice(what: str, values: list[str]) -> None:
    twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
    if twice is not None:
        raise ValueError(f"{what}: expected each value once, got {twice} twice")


def plan_runs(grid: Grid) -> list[PlannedRun]:
    """The runs, all of a seed before those of the next, so that a sweep that is stopped early has compared something.

    ValueError, naming the run: `d2r train` would refuse it, or it is the same as another.
    """
    _refuse_twice(SET, [setting.field for setting in grid.settings])
    if any(arg.partition("=")[0] == "--seed" for arg in grid.overrides):
        raise ValueError(f"--seed: expected the seeds as {SEEDS}")
    if grid.nets and grid.net is not None:
        raise ValueError(f"--net: expected either it or {NETS}, got both")
    _read(grid, grid.nets[0] if grid.nets else grid.net, [], "")  # what is wrong for all is told as such
    runs: dict[str, PlannedRun] = {}
    for seed, (name, net, args) in itertools.product(grid.seeds, list(_points(grid))):
        name = f"{name}-seed{seed}".removeprefix("-")
        cfg = _read(grid, net, [*args, "--seed", str(seed)], f"{name}: ")
        same = next((other.name for other in runs.values() if other.name == name or other.cfg == cfg), None)
        if same is not None:
            raise ValueError(f"{name}: expected every run once, got {same} again")
        runs[name] = PlannedRun(name, cfg)
    return list(runs.values())


def _points(grid: Grid) -> Iterator[tuple[str, str | None, list[str]]]:
    """Every network with every combination of values: what runs of it are called, the network, its arguments."""
    for net in grid.nets or (None,):
        default = _read(grid, net or grid.net, [], "")
        for values in itertools.product(*(setting.values for setting in grid.settings)):
            parts, args = [net] if net else [], []
            for setting, value in zip(grid.settings, values, strict=True):
                parts.append(f"{setting.field}={re.sub(r'[^A-Za-z0-9._+-]', '_', value)}")
                args += _option(default, setting.field, value)
            yield "-".join(parts), net or grid.net, args


def _option(cfg: RunConfig, field: str, value: str) -> list[str]:
    """The arguments that set a field. ValueError: there is no such field, or a switch gets no true or false."""
    *parents, last = field.split(".")
    holder: Any = cfg
    for name in parents:
        holder = getattr(holder, name, None)
    names = [f.name for f in dataclasses.fields(holder)] if dataclasses.is_dataclass(holder) else []
    before = "".join(f"{name}." for name in parents)
    if last not in names:
        of = f" of a run with network {cfg.net.kind}"
        expected = ", ".join(before + name for name in names) if names else "net, sac, env or eval before the first dot"
        raise ValueError(f"{SET} {field}: expected a setting{of} ({expected})")
    current = getattr(holder, last)
    if dataclasses.is_dataclass(current):
        inner = ", ".join(f"{field}.{f.name}" for f in dataclasses.fields(current))
        raise ValueError(f"{SET} {field}: expected one of its settings ({inner})")
    if isinstance(current, bool):
        if value.lower() not in ("true", "false"):
            raise ValueError(f"{SET} {field}: expected true or false, got {value!r}")
        return [f"--{before}{'' if value.lower() == 'true' else 'no-'}{last}"]
    return [f"--{field}", *value.split()]


def _read(grid: Grid, net: str | None, args: list[str], where: str) -> RunConfig:
    """The configuration of a run. ValueError, in one line: there is none."""
    load_config(grid.preset)  # what is wrong with the preset is wrong with no run in particular
    said = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # by which tyro knows how to draw its boxes
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return config_from_args(grid.preset, net, [*grid.overrides, *args], prog="d2r train")
    except SystemExit:
        said.seek(0)
        raise ValueError(f"{where}{_first_paragraph(said.read())}") from None
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _first_paragraph(boxed: str) -> str:
    """What tyro says in its box, above the first rule, as one line."""
    lines = [line.strip("│ ") for line in boxed.splitlines()[1:]]
    said = itertools.takewhile(lambda line: not line.startswith(("─", "╰")), lines)
    return " ".join(said)
