"""What a run writes down: metrics.jsonl, one record a line, and the same numbers for TensorBoard and W&B."""

import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.record_writer import RecordWriter

from d2r_fast.host.files import AppendedFile
from d2r_fast.training.wandb_log import WandbLog


class MetricsLog:
    """Appends records to `metrics.jsonl`. A record is {"kind", "steps", "updates", ...}; its "time" part holds whatever
    depends on the clock, so that all else is the same in two runs of one seed.

    OSError, naming the file: one could not be written.
    """

    def __init__(self, run_dir: Path, tasks: tuple[str, ...], resume_at: int = 0, wandb: WandbLog | None = None):
        """`resume_at`: the file's length when the checkpoint was made; what was logged after it goes to
        `metrics.discarded.jsonl`, for those steps are taken again. `wandb`: closed with the rest."""
        self.wandb = wandb
        path, self._tasks = run_dir / "metrics.jsonl", tasks
        kept = _cut(path, resume_at)
        self._length, self._sum = len(kept), hashlib.sha256(kept)
        self._file = AppendedFile(path)
        self._board = EventFile(run_dir / "tensorboard")

    def write(self, record: dict[str, Any]) -> None:
        line = f"{json.dumps(record)}\n".encode()
        self._file.write(line)
        self._length += len(line)
        self._sum.update(line)
        numbers = dict(self._scalars(record["kind"], record))
        self._board.write(record["steps"], numbers)
        if self.wandb is not None:
            self.wandb.write(record["steps"], numbers)

    def _scalars(self, prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, float]]:
        """The numbers in a record, each with the name it has in TensorBoard and W&B."""
        for name, value in values.items():
            numbers = value if isinstance(value, list) else [value]
            if isinstance(value, dict):
                yield from self._scalars(f"{prefix}/{name}", value)
            elif name not in ("kind", "steps") and all(isinstance(v, int | float) for v in numbers):
                # Gradient norms are one a network, also where there are as many tasks as critics.
                per_task = len(numbers) == len(self._tasks) and not name.startswith("grad_norm/")
                for i, number in enumerate(numbers):
                    which = f"/{self._tasks[i] if per_task else i}" if len(numbers) > 1 else ""
                    yield f"{prefix}/{name}{which}", number

    def state_dict(self) -> dict[str, Any]:
        """What has been logged and is on the disk: the length of metrics.jsonl in bytes, and their SHA-256."""
        self._file.sync()
        return {"metrics_length": self._length, "metrics_sha256": self._sum.hexdigest()}

    def close(self) -> None:
        self._file.close()
        self._board.close()
        if self.wandb is not None:
            self.wandb.close()


class EventFile:
    """A new file of numbers for TensorBoard in `directory`.

    Not torch's SummaryWriter: it writes in a thread, where a full disk ends in a traceback, of which the caller learns
    minutes later or never.
    """

    def __init__(self, directory: Path):
        directory.mkdir(exist_ok=True)
        now = time.time_ns()
        name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{os.getpid()}.{now % 10**9}"
        self._file = AppendedFile(directory / name)
        self._records = RecordWriter(self._file)
        self._records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def write(self, steps: int, numbers: dict[str, float]) -> None:
        event = Event(wall_time=time.time(), step=steps)
        for name, number in numbers.items():
            event.summary.value.add(tag=name, simple_value=number)
        self._records.write(event.SerializeToString())

    def close(self) -> None:
        self._file.close()


def _cut(path: Path, length: int) -> bytes:
    """Move what stands behind the first `length` bytes to metrics.discarded.jsonl; returns those bytes."""
    content = path.read_bytes() if path.exists() else b""
    if len(content) > length:
        discarded = AppendedFile(path.with_name("metrics.discarded.jsonl"))
        discarded.write(content[length:])
        discarded.sync()
        discarded.close()
        os.truncate(path, length)
    return content[:length]


def check_metrics(run_dir: Path, n_tasks: int, length: int, sha256: str | None) -> None:
    """ValueError unless the first `length` bytes of metrics.jsonl are what the run wrote, or there is no metrics.jsonl.

    sha256: of those bytes, if it is known; otherwise every line must be a record of T=n_tasks tasks.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    content = path.read_bytes()
    remedy = f"; to go on without these records, move it away: mv {path} {path.with_name('metrics.damaged.jsonl')}"
    if len(content) < length:
        raise ValueError(
            f"{path}: expected at least the {length} bytes that the checkpoint knows of, got {len(content)}{remedy}"
        )
    kept = content[:length]
    if sha256 is not None and hashlib.sha256(kept).hexdigest() == sha256:
        return
    lines = kept.splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if problem := _problem(line, n_tasks):
            raise ValueError(f"{path}, line {number}: {problem}{remedy}")
    if sha256 is not None:
        raise ValueError(f"{path}, lines 1 to {len(lines)}: their checksum is not the checkpoint's{remedy}")


def _problem(line: bytes, n_tasks: int) -> str:
    """What is wrong with a line of metrics.jsonl; "" if nothing is."""
    try:
        record = parse_record(line)
    except ValueError as error:
        return str(error)
    if record["kind"] == "eval":  # what pictures and tables are made of
        for name, kind in (("mean_success", float), ("episodes", int)):
            if type(record.get(name)) is not kind:
                return f"{name}: expected {kind.__name__}, got {record.get(name)!r:.40}"
        for name, per_task in (("success", float), ("episode_return", float), ("module_use", list)):
            values = record.get(name)
            if not isinstance(values, list) or [type(v) for v in values] != [per_task] * n_tasks:
                return f"{name}: expected {n_tasks} values, one a task, got {values!r:.40}"
    return "" if line.endswith(b"\n") else "not a whole line"


def parse_record(line: bytes) -> dict[str, Any]:
    """A line of metrics.jsonl. ValueError: it is no record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(record, dict) or record.get("kind") not in ("train", "eval"):
        raise ValueError(f'expected a record of kind "train" or "eval", got {record!r:.40}')
    for name in ("steps", "updates"):
        if type(record.get(name)) is not int:
            raise ValueError(f"{name}: expected an integer, got {record.get(name)!r:.40}")
    return record


def read_metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind ("train" or "eval"), in order.

    FileNotFoundError: the run has no metrics.jsonl. ValueError, naming the line: one is no record.
    """
    path = run_dir / "metrics.jsonl"
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(parse_record(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return [record for record in records if record["kind"] == kind]
