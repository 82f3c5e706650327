"""A run directory belongs to one run, and at most one process at a time trains in it.

Both stand in the directory's file `run_id`. Its first line is the run's identity, 32 hexadecimal digits that its
checkpoints hold too (hyphens until it is known: runs of earlier versions have none). The second line names the process
that holds the directory. What keeps others out is a lock on the file, which the system takes back however that process
ends.
"""

import errno
import fcntl
import os
import re
import socket
import warnings
from pathlib import Path

from d2r_fast.host.files import naming

FILE = "run_id"
_UNKNOWN = "-" * 32


class Claim:
    """Holds a run directory for this process until `release`, or until the process is gone.

    id  the identity of the run in the directory; None if it has none yet

    BlockingIOError: another process holds it. ValueError: `run_id` is damaged. OSError: it cannot be written.
    """

    def __init__(self, run_dir: Path):
        self._path = run_dir / FILE
        self._file = self._open_locked()
        try:
            with naming(self._path):
                self.id = _read_id(self._path, os.pread(self._file, 1000, 0))
                holder = f"process {os.getpid()} on {socket.gethostname()}\n"
                text = f"{self.id or _UNKNOWN}\n{holder}".encode()
                os.pwrite(self._file, text, 0)
                os.truncate(self._file, len(text))
        except BaseException:
            os.close(self._file)
            raise

    def _open_locked(self) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                found = _holder(file)
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    os.close(file)
                    raise BlockingIOError(f"{self._path.parent}: {found} trains here") from None
                lockless = f"{self._path}: this file system has no locks, so nothing keeps a second process out"
                warnings.warn(lockless, stacklevel=3)
                return file
            # A claim that was released without an identity has removed the file, perhaps since we opened it.
            if self._path.exists() and os.path.samestat(os.fstat(file), self._path.stat()):
                return file
            os.close(file)

    def name(self, run_id: str) -> None:
        """Give the run its identity, if it has none."""
        if self.id is None:
            with naming(self._path):
                os.pwrite(self._file, run_id.encode(), 0)
                os.fsync(self._file)
            self.id = run_id

    def release(self) -> None:
        """Let others in. Without an identity nothing is left behind."""
        if self._file < 0:
            return
        if self.id is None:
            self._path.unlink(missing_ok=True)
        else:
            os.truncate(self._file, len(_UNKNOWN) + 1)
        os.close(self._file)
        self._file = -1


def holder(run_dir: Path) -> str | None:
    """The process that holds a run directory, as "process NUMBER on HOST"; None if there is none."""
    try:
        file = os.open(run_dir / FILE, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        return _holder(file)
    finally:
        os.close(file)
    return None


def _holder(file: int) -> str:
    lines = os.pread(file, 1000, 0).decode(errors="replace").splitlines()
    return lines[1] if len(lines) > 1 else "another process"


def read_run_id(run_dir: Path) -> str | None:
    """The identity of the run in a directory; None if it has none. ValueError: `run_id` is damaged."""
    path = run_dir / FILE
    return _read_id(path, path.read_bytes()) if path.exists() else None


def _read_id(path: Path, content: bytes) -> str | None:
    first = content.partition(b"\n")[0].decode(errors="replace")
    if first in ("", _UNKNOWN):
        return None
    if re.fullmatch("[0-9a-f]{32}", first) is None:
        raise ValueError(
            f"{path}: expected 32 hexadecimal digits in line 1, got {first[:40]!r}; "
            "if the checkpoints here are the run's own, remove this file"
        )
    return first
