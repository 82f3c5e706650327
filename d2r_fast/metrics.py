"""What a run writes down: metrics.jsonl, one record a line, and the same numbers for TensorBoard."""

import json
import os
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter


class MetricsLog:
    """Appends records to `metrics.jsonl`. A record is {"kind", "steps", "updates", ...}; its "time" part holds whatever
    depends on the clock, so that all else is the same in two runs of one seed."""

    def __init__(self, run_dir: Path, tasks: tuple[str, ...], resume_at: int | None = None):
        """`resume_at`: the file's length when the checkpoint was made; what was logged after it goes to
        `metrics.discarded.jsonl`, for those steps are taken again."""
        self._path, self._tasks = run_dir / "metrics.jsonl", tasks
        if resume_at is not None:
            _cut(self._path, resume_at)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in record.items():
            self._board_scalar(record, name, value)

    def _board_scalar(self, record: dict[str, Any], name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                self._board_scalar(record, f"{name}/{key}", inner)
            return
        numbers = value if isinstance(value, list) else [value]
        if name in ("kind", "steps") or not all(isinstance(v, int | float) for v in numbers):
            return
        # Gradient norms are one a network, also where there are as many tasks as critics.
        per_task = len(numbers) == len(self._tasks) and not name.startswith("grad_norm/")
        for i, number in enumerate(numbers):
            tag = f"{record['kind']}/{name}"
            if len(numbers) > 1:
                tag += f"/{self._tasks[i] if per_task else i}"
            self._board.add_scalar(tag, number, record["steps"])

    def length(self) -> int:
        """Bytes of metrics.jsonl that are safely on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._path.stat().st_size

    def close(self) -> None:
        self._file.close()
        self._board.close()


def _cut(path: Path, length: int) -> None:
    size = path.stat().st_size if path.exists() else 0
    if size < length:
        raise ValueError(f"{path}: expected at least the {length} bytes that the checkpoint knows of, got {size}")
    if size > length:
        with path.open("rb+") as file:
            file.seek(length)
            with path.with_name("metrics.discarded.jsonl").open("ab") as discarded:
                discarded.write(file.read())
            file.truncate(length)


def read_metrics(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind ("train" or "eval"), in order. FileNotFoundError: the run has no metrics.jsonl."""
    with (run_dir / "metrics.jsonl").open(encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    return [record for record in records if record["kind"] == kind]
