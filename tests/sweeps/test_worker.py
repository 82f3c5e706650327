"""A run in a process of its own, as a worker starts, ends and judges it, without a cluster."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import tiny

from d2r_fast.sweeps import cluster, leave_with_parent, worker
from d2r_fast.sweeps.cluster import check_address
from d2r_fast.sweeps.folder import create_sweep
from d2r_fast.sweeps.plan import PlannedRun


@pytest.fixture
def sweep(tmp_path):
    return create_sweep(tmp_path / "sweep", [], 1, 0, [PlannedRun("seed0", tiny.RUN)])


def train(sweep, args, sweep_id=None):
    log = sweep.log("seed0")
    return worker.train(str(sweep.folder), sweep_id or sweep.id, str(log), args, 1, 0), log


@pytest.mark.parametrize("missing", ["file", "folder", "id"])
def test_a_machine_that_does_not_see_the_folder_says_so(sweep, missing):
    if missing == "file":
        (sweep.folder / "sweep.json").unlink()
    elif missing == "folder":
        sweep.folder.rename(sweep.folder.with_name("elsewhere"))
    with pytest.raises(FileNotFoundError, match=r"sweep\.json of this sweep is not there on .*: --out must lie on "):
        train(sweep, [], "another" if missing == "id" else None)


def test_the_end_of_a_run_is_told_with_its_last_line(sweep):
    status, log = train(sweep, ["no-such-command"])
    assert status == 2
    first, *rest = log.read_text().splitlines()
    assert first.endswith(": d2r no-such-command")
    assert rest[-1].startswith("d2r: unknown command 'no-such-command'")
    assert worker.how_it_ended(status, log) == f"exit status 2: {rest[-1]}"
    with log.open("a") as file:
        file.write("\rd2r train: disk full\n 50%|####      | 20/40\n\n")
    assert worker.how_it_ended(-9, log) == "ended by SIGKILL: d2r train: disk full"


def test_an_empty_log_has_no_last_line(tmp_path):
    (tmp_path / "log").touch()
    assert worker.last_line(tmp_path / "log") == ""


def test_a_cancelled_task_asks_its_run_to_stop(sweep, monkeypatch):
    def cancelled(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.time, "sleep", cancelled)
    status, _ = train(sweep, ["presets"])  # still importing when it is asked
    assert status == -signal.SIGTERM


def test_a_run_has_its_cores_and_no_gpu_but_its_own():
    assert worker._resources(2, 0) == {"OMP_NUM_THREADS": "2", "CUDA_VISIBLE_DEVICES": ""}
    assert worker._resources(1, 0.5) == {"OMP_NUM_THREADS": "1"}


PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, sys.argv[1], str(os.getpid()), *sys.argv[2:]], start_new_session=True)
input()
"""
TELLS = """
import signal, sys, time
from pathlib import Path
def tell(*_):
    Path(sys.argv[1]).write_text("SIGTERM")
    sys.exit()
signal.signal(signal.SIGTERM, tell)
Path(sys.argv[1]).write_text("ready")
time.sleep(60)
"""


def until(done, seconds=60.0):
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_run_is_asked_to_stop_when_its_worker_is_killed(tmp_path):
    told = tmp_path / "told"
    command = [sys.executable, "-c", PARENT, leave_with_parent.__file__, sys.executable, "-c", TELLS, str(told)]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as parent:
        until(lambda: told.exists() and told.read_text() == "ready")
        parent.kill()
    until(lambda: told.read_text() == "SIGTERM")


def test_a_run_does_not_begin_without_its_worker(tmp_path):
    """The worker may be gone before the run could ask to be told of that."""
    begun = tmp_path / "begun"
    program = [sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", str(begun)]
    for parent, begins in ((os.getppid(), False), (os.getpid(), True)):
        subprocess.run([sys.executable, leave_with_parent.__file__, str(parent), *program], check=True)
        assert begun.exists() == begins


@pytest.mark.parametrize("address", ["", "host", "host:", "host:x", "ray://host:10001", "host:123456", "a b:1"])
def test_a_bad_address_is_one_line(address):
    with pytest.raises(ValueError, match="--address: expected auto or HOST:PORT of a Ray cluster's head, got '"):
        check_address(address)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999"])
def test_an_address_where_nothing_answers_is_one_line(address):
    with pytest.raises(ConnectionError, match=f"^--address: nothing answers at {address}: ") as caught:
        check_address(address)
    assert "\n" not in str(caught.value)


def test_addresses_that_may_be():
    check_address(None)
    check_address("auto")


class FailingRay:
    """Ray whose first so many starts fail, in as many lines as Ray's do."""

    def __init__(self, failures):
        self.failures, self.starts, self.shutdowns = failures, 0, 0
        self._private = SimpleNamespace(worker=SimpleNamespace())

    def init(self, **options):
        self.starts += 1
        if self.starts <= self.failures:
            raise Exception("The current node timed out during startup.\nThis could happen")

    def shutdown(self):
        self.shutdowns += 1


@pytest.mark.parametrize(
    ("address", "failures", "starts", "said"),
    [
        ("local", 2, 3, None),
        ("local", 9, 3, "Ray does not start on this machine: The current node timed out during startup."),
        ("host:6379", 9, 1, "Ray does not reach host:6379: The current node timed out during startup."),
    ],
)
def test_a_cluster_of_this_machine_is_started_again(address, failures, starts, said):
    ray = FailingRay(failures)
    if said is None:
        cluster._connect(ray, {"address": address})
    else:
        with pytest.raises(ConnectionError) as caught:
            cluster._connect(ray, {"address": address})
        assert str(caught.value) == said
    assert (ray.starts, ray.shutdowns) == (starts, min(failures, starts))
