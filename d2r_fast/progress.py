"""The progress bar and the clock of a run."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
from tqdm import tqdm


class Progress:
    """Shows updates made, updates/s, steps/s of all tasks together, time left, mean and worst success."""

    def __init__(self, tasks: tuple[str, ...], total_updates: int, updates: int, show: bool):
        self._tasks = tasks
        self._start = time.perf_counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._success = ""
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

    def evaluated(self, success: list[float]) -> None:
        worst = min(range(len(success)), key=success.__getitem__)
        mean = sum(success) / len(success)
        self._success = f", success mean {mean:.2f}, worst {success[worst]:.2f} ({self._tasks[worst]})"
        self._describe()

    def _describe(self) -> None:
        rate = self._steps / (time.perf_counter() - self._start)
        self._bar.set_postfix_str(f"{rate:.0f} steps/s{self._success}", refresh=False)

    def show(self, updates: int) -> None:
        """Move the bar to `updates`."""
        self._bar.update(updates - self._bar.n)

    def write(self, line: str) -> None:
        """Print a line without breaking the bar."""
        self._bar.write(line)

    def times(self) -> dict[str, float]:
        """Seconds since this process began the run, in all and of each phase; and the memory it holds, in MiB, beside
        that of its worker processes (where several share pages, each counts them).
        """
        seconds = {"wall": time.perf_counter() - self._start, **self._seconds}
        process = psutil.Process()
        memory = {"rss_mib": _rss_mib([process]), "workers_rss_mib": _rss_mib(process.children(recursive=True))}
        return {name: round(value, 3) for name, value in seconds.items()} | memory

    def close(self) -> None:
        self._bar.close()


def _rss_mib(processes: list[psutil.Process]) -> int:
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):  # one may have ended since it was listed
            total += process.memory_info().rss
    return round(total / 2**20)
