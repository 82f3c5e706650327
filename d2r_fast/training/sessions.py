"""What a run was trained with: a line in `sessions.jsonl` each time training begins or goes on, by the code at work."""

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from d2r_fast.host.files import AppendedFile

FILE = "sessions.jsonl"
PACKAGES = ("d2r_fast", "numpy", "envpool", "metaworld", "mujoco")


def record_session(run_dir: Path, steps: int, device: torch.device, ranks: int) -> None:
    """Write down who trains from now on. steps: a task's, from which it goes on. OSError: it could not be written."""
    session = {
        "at": time.strftime("%Y-%m-%d %H:%M"),
        "steps": steps,
        "versions": {"python": platform.python_version(), "torch": torch.__version__} | _versions(),
        "machine": _machine(device),
        "ranks": ranks,
    }
    path = run_dir / FILE
    # One that a crash cut off must not swallow this one.
    torn = path.exists() and not path.read_bytes().endswith(b"\n")
    file = AppendedFile(path)
    file.write(("\n" * torn + json.dumps(session) + "\n").encode())
    file.close()


def read_sessions(run_dir: Path) -> list[dict[str, Any]]:
    """The sessions that made the run as it is, in order of steps: one that a later one has undone is left out, as are
    lines that cannot be read. None in runs of earlier versions."""
    path = run_dir / FILE
    sessions: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            session = json.loads(line)
            steps, told = session["steps"], (session["at"], session["machine"], *session["versions"].values())
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
        if type(steps) is int and all(type(text) is str for text in told):
            sessions = [earlier for earlier in sessions if earlier["steps"] < steps] + [session]
    return sessions


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # on the path, not installed
            continue
    return found


def _machine(device: torch.device) -> str:
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0))
    cpu = f"{names[0] if names else platform.machine()}, {cores} core{'s' * (cores > 1)}"
    return f"{torch.cuda.get_device_name(device)}, beside {cpu}" if device.type == "cuda" else cpu


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []
