"""The progress bar and the clock of a run."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import psutil
from tqdm import tqdm


class Waits(NamedTuple):
    """Seconds between the moments at which chunks were taken, and how many of them each side waited for the other."""

    wall: float = 0.0
    learner: float = 0.0
    collector: float = 0.0

    def plus(self, other: "Waits") -> "Waits":
        return Waits(*(a + b for a, b in zip(self, other, strict=True)))

    def shares(self) -> dict[str, float]:
        """Idle shares of the wall time, 0 to 1."""
        return {"learner_idle": self.learner / self.wall, "collector_idle": self.collector / self.wall}

    def __str__(self) -> str:
        return f"learner {self.learner / self.wall:.0%}, collector {self.collector / self.wall:.0%}"


class Progress:
    """Shows updates made, updates/s, steps/s of all tasks together, idle shares, time left, mean and worst success."""

    def __init__(self, tasks: tuple[str, ...], total_updates: int, updates: int, show: bool):
        self._tasks = tasks
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._rated = (0.0, 0, updates)  # seconds, steps and updates up to the last call of `rates`
        self._success = ""
        self._taken_at: float | None = None
        self._last = Waits()
        self.waits = Waits()  # of the chunks counted so far
        self._bar = tqdm(
            total=total_updates,
            initial=updates,
            unit="update",
            disable=not show,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file wants a line now and then
            bar_format="{percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards `name`."""
        begin = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - begin

    def steps_taken(self, steps: int) -> None:
        """`steps` more environment steps, of all tasks together."""
        self._steps += steps
        self._describe()

    def chunk_taken(self, waited: float, collecting: float, counts: bool) -> None:
        """A chunk was taken just now: the learner waited `waited` seconds for it, the collector spent `collecting`.

        counts: whether it goes into `waits`; one of the warm-up, for which the learner can only wait, does not.
        """
        now = time.perf_counter()
        wall = waited if self._taken_at is None else now - self._taken_at
        self._taken_at = now
        self._last = Waits(wall, waited, max(0.0, wall - collecting))
        if counts:
            self.waits = self.waits.plus(self._last)

    def evaluated(self, success: list[float]) -> None:
        worst = min(range(len(success)), key=success.__getitem__)
        mean = sum(success) / len(success)
        self._success = f", success mean {mean:.2f}, worst {success[worst]:.2f} ({self._tasks[worst]})"
        self._describe()

    def _describe(self) -> None:
        rate = self._steps / (time.perf_counter() - self._start)
        idle = f", idle: {self.waits}" if self.waits.wall > 0 else ""
        self._bar.set_postfix_str(f"{rate:.0f} steps/s{idle}{self._success}", refresh=False)

    def show(self, updates: int) -> None:
        """Move the bar to `updates`."""
        self._bar.update(updates - self._bar.n)

    def write(self, line: str) -> None:
        """Print a line without breaking the bar."""
        self._bar.write(line)

    def times(self) -> dict[str, float]:
        """Seconds since this process began the run, in all and of each phase of the main thread ("collect": waiting for
        a chunk and adding it to the replay); the idle shares from the last chunk but one to the last; and the memory
        the process holds, in MiB, beside that of its worker processes (where several share pages, each counts them).
        """
        seconds = {"wall": time.perf_counter() - self._start, **self._seconds}
        if self._last.wall > 0:
            seconds |= self._last.shares()
        process = psutil.Process()
        memory = {"rss_mib": _rss_mib([process]), "workers_rss_mib": _rss_mib(process.children(recursive=True))}
        return {name: round(value, 3) for name, value in seconds.items()} | memory

    def rates(self, updates: int) -> dict[str, float]:
        """Environment steps of all tasks, and updates, a second since the last call; evaluations and saves left out.

        updates: made so far
        """
        apart = self._seconds["evaluate"] + self._seconds["save"]
        now = (time.perf_counter() - self._start - apart, self._steps, updates)
        seconds, steps, made = (new - old for new, old in zip(now, self._rated, strict=True))
        self._rated = now
        return {"steps_per_s": round(steps / seconds, 3), "updates_per_s": round(made / seconds, 3)}

    def close(self) -> None:
        self._bar.close()


def _rss_mib(processes: list[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # one may have ended since it was listed
            total += process.memory_info().rss
    return round(total / 2**20)
