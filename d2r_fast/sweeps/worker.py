"""What a worker does, on whatever machine: a run in a process of its own, whose crash is not the worker's."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from d2r_fast.sweeps import leave_with_parent
from d2r_fast.sweeps.folder import FILE

_POLL_SECONDS = 0.2
# Of a log, what its last line is looked for in.
_TAIL_BYTES = 2**14


def train(folder: str, sweep_id: str, log: str, args: list[str], cpus: int, gpus: float) -> int:
    """Run `d2r ARGS` to its end; what it says goes to the file `log`. Returns its exit status, negative for a signal.

    KeyboardInterrupt, which is what cancelling a task raises here, makes it save and leave.
    FileNotFoundError: this machine does not see the sweep's folder.
    """
    _require_seen(Path(folder), sweep_id)
    with open(log, "ab", buffering=0) as out:
        told = f"{time.strftime('%Y-%m-%d %H:%M:%S')} on {socket.gethostname()}: d2r {shlex.join(args)}\n"
        out.write(told.encode())  # also the sign by which the sweep knows that the run has begun
        process = subprocess.Popen(
            [sys.executable, leave_with_parent.__file__, str(os.getpid()), sys.executable, "-m", "d2r_fast", *args],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=os.environ | _resources(cpus, gpus) | {"PYTHONUNBUFFERED": "1"},  # what a killed run said is there
            start_new_session=True,  # Ctrl-C in the terminal is for the sweep, which then asks its runs to stop
        )
        try:
            while process.poll() is None:
                time.sleep(_POLL_SECONDS)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
        return process.returncode


def _resources(cpus: int, gpus: float) -> dict[str, str]:
    """Variables that keep a run to its cores and its GPU. Which GPU, Ray has said in this process's own variables."""
    return {"OMP_NUM_THREADS": str(cpus), **({} if gpus > 0 else {"CUDA_VISIBLE_DEVICES": ""})}


def _require_seen(folder: Path, sweep_id: str) -> None:
    try:
        seen = json.loads((folder / FILE).read_bytes())["id"] == sweep_id
    except (OSError, ValueError, KeyError, TypeError):
        seen = False
    if not seen:
        raise FileNotFoundError(
            f"{folder / FILE} of this sweep is not there on {socket.gethostname()}: --out must lie on a file system "
            "that all machines of the cluster share, at the same path"
        )


def how_it_ended(status: int, log: Path) -> str:
    """`exit status 1: ...` or `ended by SIGKILL: ...`, with the last line that a run has left in its log."""
    how = f"exit status {status}" if status >= 0 else f"ended by {signal.Signals(-status).name}"
    return f"{how}: {last_line(log)}"


def last_line(log: Path) -> str:
    """The last line of a log but for progress bars. "" if there is none."""
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in re.split(r"[\r\n]", text)]
    return next((line for line in reversed(lines) if line and "%|" not in line), "")
