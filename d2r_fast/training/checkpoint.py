"""Saving and loading a run: whole or not at all, not one bit changed, and never by executing what a file holds.

A checkpoint is what `torch.save` writes, and 48 bytes behind it, which `torch.load` passes over: a mark, how many bytes
stand before it, and their SHA-256. Files of format 1 have no such end; they still load.
"""

import hashlib
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from d2r_fast.host.files import sync_directory, whole_file
from d2r_fast.learning.saved_state import describe

FORMAT = 2
KEPT = 3
_END = struct.Struct("<8sQ32s")
_MARK = b"d2r_fast"


class DamagedCheckpoint(ValueError):
    """A file that is not, or no longer, what was saved."""


def checkpoint_files(run_dir: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((run_dir / "checkpoints").glob("step-*.pt"))


def share_files(run_dir: Path) -> list[Path]:
    """What ranks have saved beside the checkpoints (`saved_shares.py`)."""
    return sorted((run_dir / "checkpoints").glob("share-*.pt"))


def checkpoint_path(run_dir: Path, steps: int) -> Path:
    """Where the checkpoint after `steps` steps a task lies."""
    return run_dir / "checkpoints" / f"step-{steps:010d}.pt"


def save_checkpoint(run_dir: Path, steps: int, state: dict[str, Any]) -> Path:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) as the checkpoint after `steps` steps a task.

    The file appears under its name only when it is whole and on the disk, so a crash or a full disk at any moment
    leaves the earlier ones as they were. Then all but the last three are removed, and what a crash left unfinished.
    OSError: it could not be written.
    """
    path = checkpoint_path(run_dir, steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_checkpoint(path, state)
    for old in checkpoint_files(run_dir)[:-KEPT] + list(path.parent.glob("*.tmp")):
        old.unlink()
    return path


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` as the file `path`, for `load_checkpoint`. OSError: it could not be written, and `path` is as it
    was."""
    with whole_file(path) as file:
        summed = _Summed(file)
        try:
            torch.save({"format": FORMAT, **state}, summed)  # type: ignore[arg-type]  # all that it needs of a file
        except RuntimeError:
            if summed.failure is not None:  # torch tells of a full disk in words of its own
                raise summed.failure from None
            raise
        file.write(_END.pack(_MARK, summed.length, summed.digest()))


class _Summed:
    """Passes on to `file` what is written, and sums it up."""

    def __init__(self, file: BinaryIO):
        self._file, self._sum = file, hashlib.sha256()
        self.length = 0
        self.failure: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._file.write(data)
        except OSError as error:
            self.failure = error
            raise
        self._sum.update(data)
        self.length += written
        return written

    def flush(self) -> None:
        """torch.save calls it; `whole_file` flushes."""

    def digest(self) -> bytes:
        return self._sum.digest()


def set_aside_later(run_dir: Path, steps: int) -> list[Path]:
    """Rename checkpoints of more than `steps` steps a task to *.discarded: a run that goes on from there makes its own.

    Otherwise they would count as its newest. Their ranks' shares go with them. Returns what they are called; an earlier
    file of that name is replaced.
    """
    later = [path for path in checkpoint_files(run_dir) if path > checkpoint_path(run_dir, steps)]
    later += [path for path in share_files(run_dir) if path > run_dir / "checkpoints" / f"share-{steps:010d}.pt"]
    aside = [path.replace(discarded(path)) for path in later]
    if later:
        sync_directory(later[0].parent)
    return aside


def discarded(path: Path) -> Path:
    """What a checkpoint is called once it is set aside."""
    return path.with_name(path.name + ".discarded")


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

    DamagedCheckpoint: the file was cut off or changed, or is no checkpoint at all. ValueError: it is of another kind or
    format. OSError: it cannot be read.
    """
    with path.open("rb") as file:
        summed = _check_sum(file, path)
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            if summed:  # then the file is not to blame, but memory, say
                raise ValueError(f"{path}: whole, but could not be read: {str(error).partition(chr(10))[0]}") from error
            raise DamagedCheckpoint(f"{path}: not a readable checkpoint ({type(error).__name__})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"{path}: not a d2r_fast checkpoint")
    if type(state["format"]) is not int or not 1 <= state["format"] <= FORMAT:
        raise ValueError(f"{path}: expected checkpoint format 1 or {FORMAT}, got {describe(state['format'])}")
    if not summed and state["format"] > 1:
        raise DamagedCheckpoint(f"{path}: damaged: its end with the checksum is missing")
    return state


def _check_sum(file: BinaryIO, path: Path) -> bool:
    """Whether the file has a checksum. DamagedCheckpoint: it has, and another content than when it was written."""
    size = file.seek(0, os.SEEK_END)
    if size < _END.size:
        return False
    file.seek(size - _END.size)
    mark, length, digest = _END.unpack(file.read(_END.size))
    if mark != _MARK:
        return False
    if length != size - _END.size:
        raise DamagedCheckpoint(f"{path}: damaged: expected {length} bytes and their checksum, got {size - _END.size}")
    file.seek(0)
    found, left = hashlib.sha256(), length
    while left > 0 and (piece := file.read(min(left, 2**22))):
        found.update(piece)
        left -= len(piece)
    if found.digest() != digest:
        raise DamagedCheckpoint(f"{path}: damaged: its checksum is not that of its content")
    return True


@contextmanager
def located(path: Path) -> Iterator[None]:
    """Begin the message of a ValueError from the block with `path`."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
