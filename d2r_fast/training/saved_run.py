"""A run directory: its newest good checkpoint, whether that is the run's own, and what a run makes of it."""

import dataclasses
import json
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import torch

from d2r_fast.config import RunConfig
from d2r_fast.config_json import config_from_json, config_to_json, read_config
from d2r_fast.host.files import whole_file
from d2r_fast.learning.saved_state import count, describe, field
from d2r_fast.nets.settings import NetConfigBase
from d2r_fast.training.checkpoint import (
    DamagedCheckpoint,
    checkpoint_files,
    checkpoint_path,
    discarded,
    find_checkpoint,
    load_checkpoint,
    located,
    set_aside_later,
    share_files,
)
from d2r_fast.training.claim import FILE, Claim, read_run_id
from d2r_fast.training.exported import NAME, holds_policy, read_policy
from d2r_fast.training.metrics import MetricsLog
from d2r_fast.training.saved_shares import load_share, ranks_of
from d2r_fast.training.sessions import record_session
from d2r_fast.training.wandb_log import WandbLog

# What a resumed run may change: nothing that the saved state was made with.
RESUMABLE_FIELDS = {"total_steps", "device", "overlap", "eval", "log", "checkpoint_every_chunks", "checkpoint_replay"}


class SavedRun(NamedTuple):
    """A checkpoint that is whole, and its run's own."""

    path: Path
    run_dir: Path | None  # None: the file lies in no run directory
    state: dict[str, Any]
    cfg: RunConfig
    passed_over: dict[Path, DamagedCheckpoint]  # newer files in the run directory


def read_saved_run(wanted: Path, with_shares: bool = False) -> SavedRun:
    """The checkpoint `wanted`, or the newest good one of the run directory `wanted`; or the policy that `d2r export`
    left in a directory, without what only training needs. Only reads.

    with_shares: good is one only with what each of several ranks saved of it.
    FileNotFoundError: there is none. DamagedCheckpoint: it is damaged, or in a directory all are; the message names one
    beside it that is good. ValueError: it is of another format, or of another run than the directory is. OSError.
    """
    passed_over: dict[Path, DamagedCheckpoint] = {}
    if wanted.is_dir() and (files := checkpoint_files(wanted)):
        for path in reversed(files):
            try:
                return _checked(path, wanted, load_checkpoint(path), passed_over, with_shares)
            except DamagedCheckpoint as error:
                passed_over[path] = error
        raise DamagedCheckpoint(f"{passed_over[files[-1]]}; so are all {len(files) - 1} others beside it")
    if wanted.is_dir() and holds_policy(wanted):
        policy_cfg, policy = read_policy(wanted)
        return SavedRun(wanted / f"{NAME}.safetensors", wanted, policy, policy_cfg, passed_over)
    path = find_checkpoint(wanted)
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else None
    try:
        return _checked(path, run_dir, load_checkpoint(path), passed_over, with_shares)
    except DamagedCheckpoint as error:
        good = _newest_good(run_dir, path) if run_dir is not None else None
        raise DamagedCheckpoint(f"{error}; the newest good one beside it is {good}" if good else str(error)) from error


def _checked(
    path: Path,
    run_dir: Path | None,
    state: dict[str, Any],
    passed_over: dict[Path, DamagedCheckpoint],
    with_shares: bool,
) -> SavedRun:
    with located(path):
        steps, cfg = count(state, "steps"), config_from_json(field(state, "config", str), "config")
        if run_dir is not None:
            if path != checkpoint_path(run_dir, steps) and path in checkpoint_files(run_dir):
                raise ValueError(f"steps: expected those that the file is named after, got {steps}")
            check_same_run(run_dir, state, cfg)
    if run_dir is not None and with_shares:
        for rank in range(1, ranks_of(state)):
            load_share(run_dir, state, rank)
    return SavedRun(path, run_dir, state, cfg, passed_over)


def _newest_good(run_dir: Path, damaged: Path) -> Path | None:
    for path in reversed(checkpoint_files(run_dir)):
        try:
            if path != damaged and load_checkpoint(path):
                return path
        except (ValueError, OSError):
            pass
    return None


def check_same_run(run_dir: Path, state: dict[str, Any], cfg: RunConfig) -> None:
    """ValueError if a checkpoint, of configuration `cfg`, is of another run than its directory is.

    Their identities decide. Where one is missing, as in runs of earlier versions, the configurations do.
    """
    theirs, ours = saved_id(state), read_run_id(run_dir)
    if theirs is not None and ours is not None:
        if theirs != ours:
            difference = _difference(cfg, _directory_config(run_dir))
            raise ValueError(
                f"it is of another run, {theirs[:8]}; {run_dir} is of run {ours[:8]}"
                f"{difference and f' ({difference})'}; if it belongs here, remove {run_dir / 'run_id'}"
            )
    elif difference := _difference(cfg, _directory_config(run_dir)):
        raise ValueError(f"it is of another run than {run_dir / 'config.json'}: {difference}")


def check_state(run_dir: Path, state: dict[str, Any], cfg: RunConfig) -> None:
    """ValueError unless a checkpoint is of the run in its directory, and its counters fit `cfg`.

    Networks, moments, replay and random streams are for those to check who take them over.
    """
    saved = config_from_json(field(state, "config", str), "config")
    check_same_run(run_dir, state, saved)
    field(state, "replay", dict if saved.checkpoint_replay else type(None))
    steps, ended = count(state, "steps"), count(state, "chunks_ended") * cfg.chunk_steps
    if steps not in (ended, ended + cfg.chunk_steps):
        raise ValueError(f"steps: expected {ended} or {ended + cfg.chunk_steps}, as chunks_ended says, got {steps}")
    count(state, "evaluations"), count(state, "env_epoch")
    for name, values in field(state, "collected", dict).items():
        numbers = values if isinstance(values, list) else [None]
        if len(numbers) != cfg.n_tasks or not all(type(v) in (int, float) for v in numbers):
            raise ValueError(f"collected[{name!r}]: expected {cfg.n_tasks} numbers, got {describe(values)}")
    count(state, "metrics_length")
    if state.get("format", 1) > 1:
        field(state, "evaluation_due", bool)
        field(state, "metrics_sha256", str)


def saved_id(state: dict[str, Any]) -> str | None:
    """The identity of the run that a checkpoint is of; None in those of earlier versions."""
    return field(state, "run_id", str) if state.get("format", 1) > 1 else None


def _directory_config(run_dir: Path) -> RunConfig | None:
    """The configuration in config.json, if there is a readable one."""
    try:
        return read_config(run_dir / "config.json")
    except (ValueError, OSError):
        return None


def _difference(saved: RunConfig, here: RunConfig | None) -> str:
    """The first setting in which a checkpoint and its directory differ, but for those that a resume may change."""
    if here is None or (first := first_change(saved, here)) is None:
        return ""
    name, a, b = first
    return f"{name} is {a} in the checkpoint and {b} in the directory"


def first_change(saved: RunConfig, other: RunConfig) -> tuple[str, Any, Any] | None:
    """The first setting in which two runs differ, but for those that a resume may change: dotted name, two values."""
    for name in (f.name for f in dataclasses.fields(RunConfig) if f.name not in RESUMABLE_FIELDS):
        a, b = getattr(saved, name), getattr(other, name)
        if a == b:
            continue
        if isinstance(a, NetConfigBase) and type(a) is not type(b):
            return f"{name}.kind", a.kind, b.kind
        if dataclasses.is_dataclass(a):
            inner = next(f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name))
            return f"{name}.{inner}", getattr(a, inner), getattr(b, inner)
        return name, a, b
    return None


def begun_without_checkpoint(run_dir: Path) -> bool:
    """Whether a run began in a directory and stopped before it saved anything, so that it can only begin again."""
    unfinished = {path.name for path in share_files(run_dir)}  # shares of a checkpoint that never came to be
    saved = (path for path in (run_dir / "checkpoints").glob("*") if path.suffix != ".tmp")
    nothing = all(path.name in unfinished for path in saved)
    return (run_dir / FILE).is_file() and (run_dir / "config.json").is_file() and nothing


def notes_on_resume(saved: SavedRun, run_dir: Path) -> list[str]:
    """What will be left behind when the run goes on from `saved`, a line each."""
    notes = [
        f"{error}; going on from {saved.path.name}, the damaged file is kept as {discarded(path).name}"
        for path, error in saved.passed_over.items()
    ]
    later = [path for path in checkpoint_files(run_dir) if path > saved.path and path not in saved.passed_over]
    if later:
        names = ", ".join(discarded(path).name for path in later)
        notes.append(f"{run_dir}: going on from {saved.path.name}; later checkpoints are kept as {names}")
    config, metrics = run_dir / "config.json", run_dir / "metrics.jsonl"
    if not config.exists():
        notes.append(f"{config}: missing; written anew from the checkpoint")
    elif config.read_bytes() != saved.state["config"].encode():
        notes.append(f"{config}: not what the checkpoint holds, which counts; kept as config.discarded.json")
    if read_run_id(run_dir) is None and saved_id(saved.state) is not None:
        notes.append(f"{run_dir / FILE}: missing; written anew from the checkpoint")
    if not metrics.exists() and saved.state.get("metrics_length", 0) != 0:
        notes.append(f"{metrics}: missing; records begin after {saved.state['steps']} steps a task")
    return notes


def open_run(
    run_dir: Path,
    cfg: RunConfig,
    resume: dict[str, Any] | None,
    claim: Claim | None,
    device: torch.device | None = None,
    ranks: int = 1,
) -> tuple[Claim, MetricsLog]:
    """Make a directory the one in which a run of `cfg` trains: held, named, with its configuration and its records.

    resume: the checkpoint it goes on from. What lies there beyond it is kept as *.discarded*.
    device, ranks: where it trains from now on, and in how many processes; None: it does not yet.
    BlockingIOError: another process trains there. FileExistsError: without `resume`, it has checkpoints. OSError, also
    where Weights & Biases is wanted and cannot be reached.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    config, claim = run_dir / "config.json", claim or Claim(run_dir)
    try:
        if resume is None and checkpoint_files(run_dir):
            raise FileExistsError(f"{run_dir}: has the checkpoints of a run; to go on from it: --resume {run_dir}")
        claim.name((saved_id(resume) if resume else None) or uuid.uuid4().hex)
        settings, wandb = config_to_json(cfg), None
        if cfg.log.wandb != "off":
            wandb = WandbLog(cfg.log, run_dir, str(claim.id), json.loads(settings))
        if resume is not None:
            set_aside_later(run_dir, resume["steps"])
            if config.exists() and config.read_bytes() != resume["config"].encode():
                config.replace(config.with_name("config.discarded.json"))
        with whole_file(config) as file:
            file.write(settings.encode())
        if device is not None:
            record_session(run_dir, resume["steps"] if resume else 0, device, ranks)
        return claim, MetricsLog(run_dir, cfg.task_names, resume["metrics_length"] if resume else 0, wandb)
    except BaseException:
        claim.release()
        raise
