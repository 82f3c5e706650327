"""`d2r sweep`: many runs as one command, on the cores and GPUs of this machine or of a Ray cluster."""

import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from d2r_fast.commands.arguments import require_no_arguments, take_option
from d2r_fast.config import RunConfig
from d2r_fast.config_json import read_config
from d2r_fast.presets import PRESETS
from d2r_fast.sweeps.cluster import cluster
from d2r_fast.sweeps.driver import Driver
from d2r_fast.sweeps.folder import Sweep, SweepRun, create_sweep, read_sweep, require_free
from d2r_fast.sweeps.plan import Grid, PlannedRun, parse_nets, parse_seeds, parse_setting, plan_runs
from d2r_fast.sweeps.table import Lines, LiveTable, Row, table
from d2r_fast.training.claim import Claim, holder

HELP = """usage: d2r sweep PRESET [--seeds SEEDS] [--set FIELD=VALUES ...] [--nets KINDS] [--FIELD VALUE ...] [options]
       d2r sweep --resume DIR [--retry-failed] [options]

Train every seed with every network and every combination of the values that are set, each run in a process of its own,
as many at a time as there are cores or GPUs for. PRESET may be a run's config.json.

  --seeds SEEDS          such as 0-7 or 0,1,5; 0 if not given
  --set FIELD=VALUES     such as net.top_k=1,2,4 or net.resrouting=true,false; between values that have commas
                         themselves, ; ('env.tasks=reach,push;door-open'); a field of several numbers takes them with
                         blanks between ('net.route_widths=32 32,64'). May be given several times
  --nets KINDS           such as d2r,soft-modules
  --FIELD VALUE          for all runs, as d2r train takes it (d2r train PRESET --help lists them), --net KIND too
  --out DIR              the sweep's folder; runs/PRESET-sweep-DATE if not given. On a cluster of several machines it
                         must lie on a file system that they share

  --resume DIR           go on with a sweep: what is finished is not run again, what was interrupted goes on from its
                         last checkpoint
  --retry-failed         with --resume: what failed, too

  --cpus N               cores of each run; 1 if not given, or what the sweep had
  --gpus F               GPUs of each run, such as 1, or 0.25 for four runs on one; 0 if not given, or what it had
  --address ADDR         the Ray cluster to run on, auto or HOST:PORT of its head, where this machine is one of it. Not
                         given: this machine alone

Exit status 0 only if every run is finished. Ctrl-C or SIGTERM: the runs at work save and leave.
"""


def run(args: list[str]) -> int:
    """Run a sweep to its end or to a stop. ValueError, OSError, ImportError: what was asked for cannot be had."""
    if not args or "-h" in args or "--help" in args:
        print(HELP, end="")
        return 0 if args else 2
    command = args
    wanted, args = take_option(args, "--resume")
    address, args = take_option(args, "--address")
    cpus, args = take_option(args, "--cpus")
    gpus, args = take_option(args, "--gpus")
    n_cpus = None if cpus is None else _parse_cpus(cpus)
    n_gpus = None if gpus is None else _parse_gpus(gpus)
    if wanted is None:
        out, planned = _plan(args)
        n_cpus, n_gpus = n_cpus or 1, n_gpus or 0.0
        _require_gpus([run.cfg for run in planned], n_gpus)
        require_free(out)
        with cluster(address, n_cpus, n_gpus) as ray:
            sweep = create_sweep(out, command, n_cpus, n_gpus, planned)
            claim = Claim(sweep.folder)
            try:
                return _to_the_end(sweep, sweep.runs, ray)
            finally:
                claim.release()
    retry_failed = "--retry-failed" in args
    require_no_arguments([arg for arg in args if arg != "--retry-failed"])
    return _resume(Path(wanted), retry_failed, n_cpus, n_gpus, address)


def _plan(args: list[str]) -> tuple[Path, list[PlannedRun]]:
    """The folder and the runs that are asked for."""
    if not args or args[0].startswith("-"):
        raise ValueError(f"expected a preset ({', '.join(PRESETS)}), a config.json or --resume DIR first")
    preset, args = args[0], args[1:]
    out, args = take_option(args, "--out")
    seeds, args = take_option(args, "--seeds")
    nets, args = take_option(args, "--nets")
    net, args = take_option(args, "--net")
    settings = []
    setting, args = take_option(args, "--set")
    while setting is not None:
        settings.append(parse_setting(setting))
        setting, args = take_option(args, "--set")
    planned = plan_runs(
        Grid(
            preset,
            parse_seeds(seeds or "0"),
            parse_nets(nets) if nets is not None else (),
            tuple(settings),
            tuple(args),
            net,
        )
    )
    name = f"{planned[0].cfg.name}-sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    return Path(out or f"runs/{name}"), planned


def _parse_cpus(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4096:
        raise ValueError(f"--cpus: expected a whole number of cores from 1, got {text!r}")
    return int(text)


def _parse_gpus(text: str) -> float:
    """Ray gives out shares of one GPU, or whole ones."""
    try:
        gpus = float(text)
    except ValueError:
        gpus = math.nan
    if not (0 <= gpus <= 1 or (1 < gpus <= 4096 and gpus == int(gpus))):
        raise ValueError(f"--gpus: expected a share such as 0.25, or a whole number, got {text!r}")
    return gpus


def _require_gpus(configs: list[RunConfig], gpus: float) -> None:
    if gpus == 0 and any(cfg.device == "cuda" for cfg in configs):
        raise ValueError("--gpus: expected a share of a GPU for runs with --device cuda, such as 0.5, got none")


def _resume(folder: Path, retry_failed: bool, cpus: int | None, gpus: float | None, address: str | None) -> int:
    sweep = read_sweep(folder)
    claim = Claim(sweep.folder)
    try:
        sweep.note_finished()
        sweep.save()
        to_do = sweep.to_do(retry_failed)
        for run in to_do:
            run_dir = sweep.run_dir(run.name)
            if (who := holder(run_dir)) is not None:
                raise BlockingIOError(f"{run_dir}: {who} trains here; end it, or wait until it has left")
        if not to_do:
            return _tell(sweep, Driver(sweep, [], None).rows())
        sweep.cpus, sweep.gpus = cpus or sweep.cpus, sweep.gpus if gpus is None else gpus
        _require_gpus([read_config(sweep.config(run.name)) for run in to_do], sweep.gpus)
        with cluster(address, sweep.cpus, sweep.gpus) as ray:
            return _to_the_end(sweep, to_do, ray)
    finally:
        claim.release()


def _to_the_end(sweep: Sweep, to_do: list[SweepRun], ray: Any) -> int:
    print(f"sweep      {sweep.folder}")
    print(f"runs       {len(sweep.runs)}, {len(to_do)} of them to do; cores {sweep.cpus}, GPUs {sweep.gpus:g} each")
    there = ray.cluster_resources()
    print(f"cluster    cores {there.get('CPU', 0):g}, GPUs {there.get('GPU', 0):g}", flush=True)
    display = LiveTable(sys.stdout) if sys.stdout.isatty() else Lines(sys.stdout)

    def say(line: str) -> None:
        display.close()
        print(line, flush=True)

    driver = Driver(sweep, to_do, ray)
    try:
        driver.run(display.show, say)
    except KeyboardInterrupt:
        say(f"left at once; to go on: d2r sweep --resume {shlex.quote(str(sweep.folder))}")
        return 130  # as a shell counts Ctrl-C
    display.close()
    return _tell(sweep, driver.rows())


def _tell(sweep: Sweep, rows: list[Row]) -> int:
    """The table at the end, what failed and what to do next. Returns the exit status."""
    print("\n".join(["", *table(rows), ""]))
    folder = shlex.quote(str(sweep.folder))
    failed = [run for run in sweep.runs if run.failure is not None]
    for run in failed:
        print(f"failed     {run.name}: {run.failure}")
        print(f"  log      {sweep.log(run.name)}")
        print(f"  again    d2r {shlex.join(sweep.train_args(run.name))}")
    if failed:
        print(f"to try them again: d2r sweep --resume {folder} --retry-failed")
    if any(not run.finished and run.failure is None for run in sweep.runs):
        print(f"to go on   d2r sweep --resume {folder}")
    if any(run.finished for run in sweep.runs):
        print(f"to compare d2r compare {folder}")
    return 0 if all(run.finished for run in sweep.runs) else 1
