"""Files that are whole or as they were, and named when they cannot be written."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from d2r_fast.host.files import AppendedFile, naming, whole_file


@contextlib.contextmanager
def no_file_over(n_bytes: int) -> Iterator[None]:
    """Past this many bytes a write fails, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def write_whole(path: Path, content: bytes) -> None:
    with whole_file(path) as file:
        file.write(content)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path):
    path = tmp_path / "config.json"
    write_whole(path, b"old")
    with no_file_over(1000), pytest.raises(OSError, match=rf"^\[Errno 27\] File too large: '{path}'$"):
        write_whole(path, bytes(100_000))
    with pytest.raises(ZeroDivisionError), whole_file(path) as file:
        file.write(b"new" + bytes([1 // 0]))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_what_is_appended_is_there_at_once_and_a_full_disk_is_named_once(tmp_path):
    path = tmp_path / "log"
    file = AppendedFile(path)
    file.write(b"one")
    assert path.read_bytes() == b"one"
    with no_file_over(1000):
        with pytest.raises(OSError, match=rf"^\[Errno 27\] File too large: '{path}'$"):
            file.write(bytes(2000))
        file.close()  # nothing is left to write, so nothing fails again
    assert path.read_bytes()[:3] == b"one"


def test_an_error_that_names_its_file_keeps_that_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"'{tmp_path / 'there'}'$"), naming(tmp_path / "here"):
        (tmp_path / "there").read_bytes()
    with pytest.raises(BlockingIOError, match=r"^held$"), naming(tmp_path / "here"):
        raise BlockingIOError("held")
