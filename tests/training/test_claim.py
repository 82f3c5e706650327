"""A run directory: whose it is, and who trains in it."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from d2r_fast.training.claim import Claim, holder, read_run_id

ID, OTHER = "0123456789abcdef" * 2, "f" * 32

HOLD = """
import sys
from pathlib import Path
from d2r_fast.training.claim import Claim
claim = Claim(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


def hold(run_dir: Path) -> subprocess.Popen[str]:
    """A process that holds a run directory."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run_dir)], stdin=-1, stdout=-1, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_held_directory_is_refused_and_its_holder_named(tmp_path):
    with hold(tmp_path) as process:
        for _ in range(2):
            with pytest.raises(BlockingIOError, match=f"^{tmp_path}: process {process.pid} on .* trains here$"):
                Claim(tmp_path)
        process.communicate("\n")
    Claim(tmp_path).release()


def test_who_holds_a_directory_can_be_asked(tmp_path):
    assert holder(tmp_path / "none") is None
    assert holder(tmp_path) is None
    with hold(tmp_path) as process:
        assert holder(tmp_path).startswith(f"process {process.pid} on ")
        process.kill()
    assert holder(tmp_path) is None
    Claim(tmp_path).release()


def test_a_claim_dies_with_its_process(tmp_path):
    (tmp_path / "run_id").write_text(f"{ID}\n")
    with hold(tmp_path) as process:
        process.kill()
    assert (tmp_path / "run_id").read_text().splitlines()[1].startswith(f"process {process.pid} ")
    claim = Claim(tmp_path)
    assert claim.id == ID
    assert (tmp_path / "run_id").read_text().splitlines()[1].startswith(f"process {os.getpid()} ")
    claim.release()


def test_one_process_cannot_claim_twice_either(tmp_path):
    claim = Claim(tmp_path)
    with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"):
        Claim(tmp_path)
    claim.release()
    claim.release()
    Claim(tmp_path).release()


def test_the_first_name_stays(tmp_path):
    claim = Claim(tmp_path)
    assert (claim.id, read_run_id(tmp_path)) == (None, None)
    claim.name(ID)
    claim.name(OTHER)
    assert (claim.id, read_run_id(tmp_path)) == (ID, ID)
    claim.release()
    assert (tmp_path / "run_id").read_text() == f"{ID}\n"
    again = Claim(tmp_path)
    assert again.id == ID
    again.release()


def test_a_claim_without_a_name_leaves_nothing_behind(tmp_path):
    Claim(tmp_path).release()
    assert list(tmp_path.iterdir()) == []
    assert read_run_id(tmp_path) is None


def test_a_claim_on_a_file_that_is_removed_meanwhile_takes_the_one_in_its_place(tmp_path, monkeypatch):
    """Between opening the file and locking it, its holder lets go and removes it: a lock on it keeps nobody out."""
    first, flock = Claim(tmp_path), fcntl.flock

    def flock_late(*args: int) -> None:
        if first._file >= 0:
            first.release()
        flock(*args)

    monkeypatch.setattr("fcntl.flock", flock_late)
    claim = Claim(tmp_path)
    with pytest.raises(BlockingIOError):
        Claim(tmp_path)
    claim.release()


@pytest.mark.parametrize("content", [b"0123\n", b"\xff\n", ID.upper().encode(), (ID + "0").encode()])
def test_a_damaged_identity_is_told(tmp_path, content):
    (tmp_path / "run_id").write_bytes(content)
    for read in (Claim, read_run_id):
        with pytest.raises(
            ValueError, match=r"run_id: expected 32 hexadecimal digits in line 1, got '.*remove this file$"
        ):
            read(tmp_path)
    assert (tmp_path / "run_id").read_bytes() == content
    (tmp_path / "run_id").unlink()
    Claim(tmp_path).release()


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
    def no_locks(*args: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(
        UserWarning, match="run_id: this file system has no locks, so nothing keeps a second process out"
    ):
        Claim(tmp_path).release()
