"""Saving and loading a run: whole or not at all, and never by executing what a file holds."""

import os
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
KEPT = 3


def checkpoint_files(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*.pt"))


def save_checkpoint(run_dir: Path, steps: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) as the checkpoint after `steps` steps a task.

    The file appears under its name only when it is whole and on the disk, so a crash or a full disk at any moment
    leaves the earlier ones as they were. Then all but the last three are removed.
    OSError: it could not be written.
    """
    directory = run_dir / "checkpoints"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"step-{steps:010d}.pt"
    unfinished = path.with_suffix(".tmp")
    try:
        with unfinished.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(f"{path}: could not be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    handle = os.open(directory, os.O_RDONLY)  # the rename itself must reach the disk before older files go
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    for old in checkpoint_files(run_dir)[:-KEPT]:
        old.unlink()
    return path


def find_checkpoint(path: Path) -> Path:
    """`path` itself if it is a file, else the newest checkpoint of the run directory `path`.

    FileNotFoundError: there is none.
    """
    if path.is_file():
        return path
    files = checkpoint_files(path)
    if not files:
        raise FileNotFoundError(f"{path}: expected a checkpoint file, or a run directory with checkpoints/step-*.pt")
    return files[-1]


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU. Only tensors and plain values are read; nothing in the file is executed.

    ValueError: the file is damaged, is no checkpoint of ours, or of another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        earlier = [f.name for f in checkpoint_files(path.parent.parent) if f != path]
        hint = f"; other checkpoints beside it: {', '.join(earlier)}" if earlier else ""
        raise ValueError(f"{path}: not a readable checkpoint ({type(error).__name__}){hint}") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: not a d2r_fast checkpoint")
    if state["format"] != FORMAT:
        raise ValueError(f"{path}: expected checkpoint format {FORMAT}, got {state['format']}")
    return state
