"""The command line: d2r train | eval | fidelity | presets | info."""

import dataclasses
import json
import platform
import resource
import shlex
import sys
import time
from importlib import metadata, util
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from d2r_fast.checkpoint import checkpoint_files, find_checkpoint
from d2r_fast.claim import Claim
from d2r_fast.config import RunConfig
from d2r_fast.config_json import load_config, read_config
from d2r_fast.envs import WorkerError, describe_engines, parse_tasks
from d2r_fast.envs.fidelity_table import EngineChoice
from d2r_fast.eval_command import check_output, evaluate_command, write_output
from d2r_fast.fidelity import run_fidelity
from d2r_fast.metrics import read_metrics
from d2r_fast.ops.backends import availability
from d2r_fast.presets import PRESETS
from d2r_fast.report import success_table, write_report
from d2r_fast.saved_run import RESUMABLE_FIELDS, begun_without_checkpoint, notes_on_resume, read_saved_run
from d2r_fast.trainer import Trainer

USAGE = """usage: d2r COMMAND ...

  d2r train PRESET [--FIELD VALUE ...] [--run-dir DIR]   train; PRESET may be a run's config.json
  d2r train --resume RUN [--FIELD VALUE ...]             go on from a run directory's newest good checkpoint, or from
                                                         the one of its checkpoints that RUN is
  d2r eval RUN_OR_CHECKPOINT [--protocol fast|published|official] [--json FILE]
                                                         success per task of a saved agent
  d2r fidelity [--tasks TASKS] [--json FILE] [--markdown FILE]
                                                         our environments against the official package
  d2r presets                                            the presets and what they are for
  d2r info                                               versions, devices and backends

d2r train PRESET --help, d2r eval --help and d2r fidelity --help list every option.
"""

# What a run directory may hold that a start left behind which was killed before there was a run.
LEFT_BY_A_START = {"run_id", "config.json.tmp"}


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. What is wrong with the input is one line on standard error."""
    args = sys.argv[1:] if argv is None else argv
    commands = {"train": _train, "eval": evaluate_command, "fidelity": _fidelity, "presets": _presets, "info": _info}
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    if args[0] not in commands:
        print(f"d2r: unknown command {args[0]!r}: expected {', '.join(commands)}", file=sys.stderr)
        return 2
    try:
        return commands[args[0]](args[1:])
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError, WorkerError) as error:
        print(f"d2r {args[0]}: {error}", file=sys.stderr)
        return 1


def _take_option(args: list[str], name: str) -> tuple[Path | None, list[str]]:
    """Take `--name VALUE` or `--name=VALUE` out of the arguments."""
    for i, arg in enumerate(args):
        if arg == name:
            if i + 1 == len(args):
                raise ValueError(f"{name}: expected a path behind it")
            return Path(args[i + 1]), args[:i] + args[i + 2 :]
        if arg.startswith(name + "="):
            return Path(arg.partition("=")[2]), args[:i] + args[i + 1 :]
    return None, args


def _train(args: list[str]) -> int:
    wanted, args = _take_option(args, "--resume")
    if wanted is not None:
        return _run(_resume(wanted, args))
    if not args or args[0].startswith("-"):
        raise ValueError(f"expected a preset ({', '.join(PRESETS)}), a config.json or --resume RUN first")
    run_dir, overrides = _take_option(args[1:], "--run-dir")
    cfg = tyro.cli(RunConfig, prog=f"d2r train {args[0]}", default=load_config(args[0]), args=overrides)
    if run_dir is None:
        run_dir = Path("runs") / f"{cfg.name}-seed{cfg.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    if run_dir.exists() and (not run_dir.is_dir() or {path.name for path in run_dir.iterdir()} - LEFT_BY_A_START):
        raise FileExistsError(f"--run-dir: {run_dir} exists and is not empty; to go on from it: --resume {run_dir}")
    return _run(Trainer(cfg, run_dir))


def _resume(wanted: Path, args: list[str]) -> Trainer:
    """A run that goes on from a run directory's newest good checkpoint, or from the checkpoint file `wanted`."""
    run_dir = wanted.parent.parent if wanted.is_file() else wanted
    if wanted.is_file() and wanted not in checkpoint_files(run_dir):
        raise ValueError(f"--resume: expected a run directory or a checkpoint in one, got {wanted}")
    never_saved = wanted == run_dir and begun_without_checkpoint(run_dir)
    if not never_saved:
        find_checkpoint(wanted)  # no claim on a directory that is none of a run
    claim = Claim(run_dir)
    try:
        if never_saved:
            saved, state = read_config(run_dir / "config.json"), None
            notes = [f"{run_dir}: stopped before its first checkpoint; training begins again"]
        else:
            found = read_saved_run(wanted)
            saved, state, notes = found.cfg, found.state, notes_on_resume(found, run_dir)
        cfg = tyro.cli(RunConfig, prog=f"d2r train --resume {wanted}", default=saved, args=args)
        for field in dataclasses.fields(RunConfig):
            before, after = getattr(saved, field.name), getattr(cfg, field.name)
            if before != after and field.name not in RESUMABLE_FIELDS:
                raise ValueError(
                    f"--resume: {field.name} cannot change, the saved run has {before}; a resumed run may change "
                    f"{', '.join(sorted(RESUMABLE_FIELDS))}"
                )
        trainer = Trainer(cfg, run_dir, resume=state, claim=claim)
    except BaseException:
        claim.release()
        raise
    for note in notes:
        tqdm.write(f"d2r train: {note}", file=sys.stderr)  # the bar is there already
    return trainer


def _run(trainer: Trainer) -> int:
    cfg, run_dir = trainer.cfg, trainer.run_dir
    sizes = {name: sum(p.numel() for p in getattr(trainer.agent, name).parameters()) for name in ("actor", "critics")}
    print(f"run        {run_dir}")
    print(f"device     {trainer.device} ({torch.get_num_threads()} threads), torch {torch.__version__}")
    env = cfg.env
    print(f"tasks      {', '.join(trainer.tasks)}; {env.envs_per_task} environments each")
    print(f"engines    {describe_engines(trainer.tasks, env.engine, env.goals)}")
    print(f"parameters actor {sizes['actor']:,}, both critics {sizes['critics']:,}")
    print(
        f"replay     {cfg.replay_capacity:,} transitions, {trainer.replay.n_bytes / 2**20:,.0f} MiB on {trainer.device}"
    )
    begin = time.perf_counter()
    finished = trainer.run()
    seconds = time.perf_counter() - begin

    evals = read_metrics(run_dir, "eval")
    pictures = write_report(run_dir, trainer.tasks)
    if evals:
        last = evals[-1]
        print(f"\nevaluation after {last['steps']:,} steps a task and {last['updates']:,} updates:")
        print(success_table(trainer.tasks, last["success"], last["episode_return"], last["episodes"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts it in KiB
    print(f"\n{'finished' if finished else 'stopped'} after {seconds / 60:.1f} minutes in this session")
    if trainer.idle is not None:
        print(f"idle       {trainer.idle} (waiting for the other, since the warm-up)")
    on_gpu = ""
    if trainer.device.type == "cuda":  # all that torch took from the driver, captured graphs' memory included
        on_gpu = f", {torch.cuda.max_memory_reserved(trainer.device) / 2**20:,.0f} MiB on the GPU"
    print(f"memory     {peak:,.0f} MiB at the peak{on_gpu}")
    print(f"checkpoint {find_checkpoint(run_dir)}")
    print(f"metrics    {run_dir / 'metrics.jsonl'}, TensorBoard: {run_dir / 'tensorboard'}")
    for picture in pictures:
        print(f"picture    {picture}")
    if not finished:
        print(f"to go on   d2r train --resume {run_dir}")
    return 0


@dataclasses.dataclass(frozen=True)
class FidelityArgs:
    """Compare our environments with the official package: scripted experts, consecutive episodes, paired starts.

    All 50 tasks take six to ten minutes on two cores. The exit status is 0 if every task agrees.
    """

    tasks: str = "MT50"
    """MT10, MT25, MT50, MT1-<task>, or a comma-separated list."""
    episodes: int = 3
    """Consecutive episodes in each environment; at least 2, since drift shows from the second on."""
    engine: EngineChoice = "auto"
    """What to compare: the engine that the fidelity table names for each task, or one for all."""
    envs_per_task: int = 6
    """Environments a task: with the episodes, the pairs that a verdict rests on."""
    seed: int = 0
    """Seeds the goals."""
    json: Path | None = None
    """Write the report here as JSON."""
    markdown: Path | None = None
    """Write the printed table here."""


def _fidelity(args: list[str]) -> int:
    wanted = tyro.cli(FidelityArgs, prog="d2r fidelity", args=args)
    check_output(wanted.json)
    check_output(wanted.markdown)
    report = run_fidelity(
        parse_tasks(wanted.tasks),
        wanted.episodes,
        wanted.engine,
        wanted.envs_per_task,
        seed=wanted.seed,
        show_progress=True,
    )
    command = shlex.join(["d2r", "fidelity", *args])
    text = f"{report.markdown()}\nMade by `{command}`.\n"
    print(text)
    if wanted.json is not None:
        record = {"command": command} | report.as_dict()
        write_output(wanted.json, json.dumps(record, indent=2) + "\n")
    if wanted.markdown is not None:
        write_output(wanted.markdown, text)
    return 0 if report.ok else 1


def _require_no_arguments(args: list[str]) -> None:
    if args:
        raise ValueError(f"expected no further argument, got {' '.join(args)}")


def _presets(args: list[str]) -> int:
    _require_no_arguments(args)
    for name, (purpose, cfg) in PRESETS.items():
        print(f"{name:<10} {purpose}")
        print(
            f"{'':<10} {cfg.n_tasks} tasks, N={cfg.net.n_modules} K={cfg.net.top_k} D={cfg.net.module_width} "
            f"H={cfg.net.base_width}, {cfg.batch_size} rows an update, {cfg.total_steps:,} steps a task"
        )
    return 0


def _version(package: str) -> str:
    if package == "torch":  # with its build, which the package's metadata may lack: 2.13.0+cu130
        return torch.__version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "on the path, not installed" if util.find_spec(package) else "not installed"


def _info(args: list[str]) -> int:
    _require_no_arguments(args)
    print(f"python     {platform.python_version()} on {platform.platform()}")
    for package in ("d2r_fast", "torch", "triton", "numpy", "envpool", "metaworld", "mujoco", "gymnasium"):
        print(f"{package:<10} {_version(package)}")
    print(f"cpu        {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties: Any = torch.cuda.get_device_properties(i)
            print(
                f"gpu {i}      {properties.name}, {properties.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
            )
    else:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "CUDA finds no device"
        print(f"gpu        none: {why}")
    for name, state in availability().items():
        print(f"backend    {name}: {state}")
    return 0
