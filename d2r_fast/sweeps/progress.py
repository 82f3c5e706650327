"""How far a run of a sweep has come, read from its metrics.jsonl while that grows."""

from fractions import Fraction
from pathlib import Path

from d2r_fast.config import RunConfig
from d2r_fast.training.metrics import parse_record


class RunProgress:
    """What the records say so far, after each `read`.

    steps, updates  made so far; of `total_steps` a task, the warm-up's included
    success         mean over tasks at the last evaluation; None before there was one
    minutes_left    at the pace of this session; None before there is one
    """

    def __init__(self, run_dir: Path, cfg: RunConfig):
        self._path = run_dir / "metrics.jsonl"
        self.total_steps = cfg.warmup_steps + cfg.total_steps
        self._total_updates = int(cfg.total_steps * Fraction(str(cfg.updates_per_step)))
        self._begin_anew()

    def _begin_anew(self) -> None:
        self._offset = 0
        self.steps = self.updates = 0
        self.success: float | None = None
        self._first = self._last = (0, 0.0)  # updates, and seconds since its session began, of two records

    def read(self) -> None:
        """Take in what has been written since. What is no record is passed over: resuming will tell."""
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:  # a run that goes on cuts off what it will do again
                    self._begin_anew()
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return
        self._offset += len(whole) + len(newline)
        for line in whole.splitlines():
            try:
                record = parse_record(line)
                wall = float(record["time"]["wall"])
                success = float(record["mean_success"]) if record["kind"] == "eval" else self.success
            except (ValueError, KeyError, TypeError):
                continue
            self.steps, self.updates, self.success = record["steps"], record["updates"], success
            if wall < self._last[1] or self._first[0] == 0:  # another session; or no update yet, when steps are fast
                self._first = self.updates, wall
            self._last = self.updates, wall

    @property
    def minutes_left(self) -> float | None:
        made, seconds = self._last[0] - self._first[0], self._last[1] - self._first[1]
        return (self._total_updates - self.updates) * seconds / made / 60 if made > 0 else None
