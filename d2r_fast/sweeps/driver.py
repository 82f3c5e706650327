"""The runs of a sweep on a cluster: all handed to Ray, followed to their ends, and stopped when that is asked for."""

import signal
from collections.abc import Callable
from typing import Any

from d2r_fast.config_json import read_config
from d2r_fast.sweeps import worker
from d2r_fast.sweeps.folder import Sweep, SweepRun
from d2r_fast.sweeps.progress import RunProgress
from d2r_fast.sweeps.table import Row, State

Show = Callable[[list[Row]], None]
_LOOK_SECONDS = 1.0


class Driver:
    """Runs what there is to do of a sweep, and takes down in sweep.json how each run ended."""

    def __init__(self, sweep: Sweep, to_do: list[SweepRun], ray: Any):
        self._sweep, self._ray = sweep, ray
        self._progress = {
            run.name: RunProgress(sweep.run_dir(run.name), read_config(sweep.config(run.name))) for run in sweep.runs
        }
        self._to_do = {run.name for run in to_do}
        self._log_length = {run.name: self._length_of_log(run) for run in to_do}
        self._stop_requested: str | None = None  # the name of the signal

    def run(self, show: Show, say: Callable[[str], None]) -> None:
        """Until every run has ended, or SIGINT or SIGTERM has come and those at work have saved and left.

        show: given all runs about every second. say: given a line to print. KeyboardInterrupt: a second signal came.
        """
        handlers = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._follow(self._hand_out(), show, say)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _hand_out(self) -> dict[Any, SweepRun]:
        """A task a run. Ray starts as many as there are cores and GPUs for."""
        sweep = self._sweep
        train = self._ray.remote(num_cpus=sweep.cpus, num_gpus=sweep.gpus, max_retries=0)(worker.train)
        tasks = {}
        for run in sweep.runs:
            if run.name in self._to_do:
                run.failure = None
                args = sweep.train_args(run.name)
                log = str(sweep.log(run.name))
                tasks[train.remote(str(sweep.folder), sweep.id, log, args, sweep.cpus, sweep.gpus)] = run
        sweep.save()
        return tasks

    def _follow(self, tasks: dict[Any, SweepRun], show: Show, say: Callable[[str], None]) -> None:
        asked_to_stop = False
        while tasks:
            ended, _ = self._ray.wait(list(tasks), timeout=_LOOK_SECONDS)
            for task in ended:
                self._take_down(tasks.pop(task), task)
            if self._stop_requested and not asked_to_stop:
                asked_to_stop = True
                say(f"{self._stop_requested}: the runs at work save and leave (again: at once, unsaved)")
                for task in tasks:
                    self._ray.cancel(task)
            show(self.rows())

    def _take_down(self, run: SweepRun, task: Any) -> None:
        """How a run ended, in sweep.json. One that was stopped is neither finished nor failed."""
        self._to_do.discard(run.name)
        errors = self._ray.exceptions
        try:
            status = self._ray.get(task)
        except errors.TaskCancelledError:
            return
        except errors.RayTaskError as error:
            run.failure = str(error.cause)
        except errors.RayError as error:
            first_sentence = str(error).strip().split("\n")[0].split(". ")[0]
            run.failure = f"its worker was lost: {first_sentence or type(error).__name__}"
        else:
            if status != 0 and not self._stop_requested:
                run.failure = worker.how_it_ended(status, self._sweep.log(run.name))
            run.finished = status == 0 and self._sweep.has_ended(run.name)
        self._sweep.save()

    def rows(self) -> list[Row]:
        """All runs of the sweep as they are now."""
        rows = []
        for run in self._sweep.runs:
            progress = self._progress[run.name]
            progress.read()
            counts = progress.steps, progress.total_steps, progress.updates
            rows.append(Row(run.name, self._state(run), *counts, progress.success, progress.minutes_left))
        return rows

    def _state(self, run: SweepRun) -> State:
        if run.finished:
            return "finished"
        if run.failure is not None:
            return "failed"
        if run.name not in self._to_do:
            return "stopped" if self._sweep.begun(run.name) else "waiting"
        return "running" if self._length_of_log(run) > self._log_length[run.name] else "waiting"

    def _length_of_log(self, run: SweepRun) -> int:
        log = self._sweep.log(run.name)
        return log.stat().st_size if log.exists() else 0

    def _on_signal(self, number: int, frame: object) -> None:
        if self._stop_requested:
            raise KeyboardInterrupt
        self._stop_requested = signal.Signals(number).name
