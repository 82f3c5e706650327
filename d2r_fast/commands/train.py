"""`d2r train`: a run from a preset or a config.json, or one that goes on, and what is told at its end."""

import io
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from d2r_fast.analysis.pictures import success_table, write_pictures
from d2r_fast.analysis.report import write_report
from d2r_fast.commands.arguments import take_option
from d2r_fast.commands.networks import describe
from d2r_fast.config import RunConfig
from d2r_fast.config_args import config_from_args
from d2r_fast.config_json import read_config
from d2r_fast.envs import describe_engines
from d2r_fast.presets import PRESETS
from d2r_fast.training.checkpoint import checkpoint_files, find_checkpoint
from d2r_fast.training.claim import Claim
from d2r_fast.training.metrics import read_metrics
from d2r_fast.training.ranks import Alone, join, launched_at
from d2r_fast.training.saved_run import (
    RESUMABLE_FIELDS,
    begun_without_checkpoint,
    first_change,
    notes_on_resume,
    read_saved_run,
)
from d2r_fast.training.saved_shares import ranks_of
from d2r_fast.training.trainer import Trainer
from d2r_fast.training.watch import restarts

# What a run directory may hold that a start left behind which was killed before there was a run.
LEFT_BY_A_START = {"run_id", "config.json.tmp", "wandb"}


def run(args: list[str]) -> int:
    """Train to the end or to a stop, perhaps as one of several ranks. ValueError, OSError: what was asked for cannot be
    had."""
    ranks = join()
    try:
        status = _to_the_end(_trainer(args, ranks), ranks)
    except SystemExit:  # all of them, by options that nobody knows, or --help
        ranks.close()
        raise
    except Exception as error:
        if not ranks.failed(str(error)):
            return 1
        if ranks.count > 1:
            error.add_note(str(ranks))
        raise
    ranks.close()
    return status


def _trainer(args: list[str], ranks: Alone) -> Trainer:
    wanted, args = take_option(args, "--resume")
    if wanted is not None:
        return _resume(Path(wanted), args, ranks)
    if not args or args[0].startswith("-"):
        raise ValueError(f"expected a preset ({', '.join(PRESETS)}), a config.json or --resume RUN first")
    asked_dir, overrides = take_option(args[1:], "--run-dir")
    kind, overrides = take_option(overrides, "--net")
    with _said_once(ranks):
        cfg = config_from_args(args[0], kind, overrides, prog=f"d2r train {args[0]}")
    begun = time.strftime("%Y%m%d-%H%M%S", time.localtime(launched_at()))
    run_dir = ranks.from_first(Path(asked_dir or f"runs/{cfg.name}-seed{cfg.seed}-{begun}"))
    if ranks.from_first(_is_taken(run_dir) if ranks.first else None):
        if restarts() > 0:  # the launcher repeats the command that began it
            return _resume(run_dir, [], ranks)
        raise FileExistsError(f"--run-dir: {run_dir} exists and is not empty; to go on from it: --resume {run_dir}")
    return Trainer(cfg, run_dir, ranks=ranks)


@contextmanager
def _said_once(ranks: Alone) -> Iterator[None]:
    """What is wrong with a command line, the first rank alone says."""
    said = nullcontext() if ranks.first else redirect_stdout(io.StringIO())
    with said, nullcontext() if ranks.first else redirect_stderr(io.StringIO()):
        yield


def _is_taken(run_dir: Path) -> bool:
    """Whether a directory holds more than a start left behind that was killed before there was a run."""
    return run_dir.exists() and (not run_dir.is_dir() or bool({p.name for p in run_dir.iterdir()} - LEFT_BY_A_START))


def _resume(wanted: Path, args: list[str], ranks: Alone) -> Trainer:
    """A run that goes on from a run directory's newest good checkpoint, or from the checkpoint file `wanted`."""
    run_dir = wanted.parent.parent if wanted.is_file() else wanted
    if wanted.is_file() and wanted not in checkpoint_files(run_dir):
        raise ValueError(f"--resume: expected a run directory or a checkpoint in one, got {wanted}")
    never_saved = ranks.from_first(wanted == run_dir and begun_without_checkpoint(run_dir))
    if not never_saved:
        find_checkpoint(wanted)  # no claim on a directory that is none of a run
    claim = Claim(run_dir) if ranks.first else None
    try:
        state, notes = None, [f"{run_dir}: stopped before its first checkpoint; training begins again"]
        if never_saved:
            saved = read_config(run_dir / "config.json")
        else:
            found = read_saved_run(wanted, with_shares=True) if ranks.first else None
            path = ranks.from_first(found and found.path)
            found = found or read_saved_run(path)
            saved, state, notes = found.cfg, found.state, notes_on_resume(found, run_dir)
            if ranks_of(state) != ranks.count:
                notes.append(
                    f"{path}: saved by {ranks_of(state)} ranks, goes on with {ranks.count}: the replay is dealt anew, "
                    "random numbers are others"
                )
        with _said_once(ranks):
            cfg = tyro.cli(RunConfig, prog=f"d2r train --resume {wanted}", default=saved, args=args)
        if (change := first_change(saved, cfg)) is not None:
            raise ValueError(
                f"--resume: {change[0]} cannot change, the saved run has {change[1]}; a resumed run may change "
                f"{', '.join(sorted(RESUMABLE_FIELDS))}"
            )
        trainer = Trainer(cfg, run_dir, resume=state, claim=claim, ranks=ranks)
    except BaseException:
        if claim is not None:
            claim.release()
        raise
    for note in notes if ranks.first else []:
        tqdm.write(f"d2r train: {note}", file=sys.stderr)  # the bar is there already
    return trainer


def _to_the_end(trainer: Trainer, ranks: Alone) -> int:
    if not ranks.first:
        trainer.run()
        return 0
    cfg, run_dir = trainer.cfg, trainer.run_dir
    print(f"run        {run_dir}")
    if ranks.count > 1:
        print(f"ranks      {ranks.count}, which share environments, replay and the rows of an update")
    print(f"device     {trainer.device} ({torch.get_num_threads()} threads), torch {torch.__version__}")
    env = cfg.env
    print(f"tasks      {', '.join(trainer.tasks)}; {env.envs_per_task} environments each")
    print(f"engines    {describe_engines(trainer.tasks, env.engine, env.goals)}")
    print(f"network    {describe(cfg.net, cfg.n_tasks)}")
    print(
        f"replay     {cfg.replay_capacity:,} transitions, {trainer.replay.n_bytes / 2**20:,.0f} MiB on {trainer.device}"
    )
    if trainer.wandb is not None:
        print(f"wandb      {trainer.wandb}")
    begin = time.perf_counter()
    finished = trainer.run()
    seconds = time.perf_counter() - begin

    evals = read_metrics(run_dir, "eval")
    pictures = write_pictures(run_dir, trainer.tasks)
    report = run_dir / "report.html" if read_metrics(run_dir, "train") else None
    if report is not None:
        write_report(report, [run_dir], play=finished)  # whoever stops a run does not want to wait for episodes
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
    if report is not None:
        print(f"report     {report}")
    if not finished:
        print(f"to go on   d2r train --resume {run_dir}")
    return 0
