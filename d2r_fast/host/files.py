"""Writing files: whole or not at all, and named when the disk is full."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name `path` in an OSError from the block that names no file: the system's "No space left on device" does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to. It becomes `path`, on the disk, when the block ends; if that fails, `path` stays as it was.

    OSError, naming `path`: it could not be written.
    """
    unfinished = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(path)
            sync_directory(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Wait until files made, renamed or removed in `directory` are so on the disk."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class AppendedFile:
    """A file that grows by whole pieces, each handed to the system at once: nothing is left to write when it is closed.

    OSError, naming the file: it could not be written.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        with naming(self._path):
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])

    def sync(self) -> None:
        """Wait until all of it is on the disk."""
        with naming(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
