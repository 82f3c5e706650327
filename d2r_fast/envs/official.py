"""Meta-World's official package in worker processes, each of which steps its share of the environments in turn."""

import importlib.util
import json
import mmap
import os
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from d2r_fast.envs import official_worker as worker
from d2r_fast.envs.metaworld import (
    ACTION_SIZE,
    CallOrder,
    Goals,
    MultiTaskEnvs,
    NumberCheck,
    Step,
    WorkerError,
    check_action,
    check_sizes,
    check_tasks,
    usable_cores,
)


class OfficialEnvs(MultiTaskEnvs):
    """`envs_per_task` environments of each task, episodes of `episode_length` steps: Meta-World as it is meant.

    Observation, reward (v2), success and physics are the package's own to the last bit, before rounding to float32.
    Environment i of task k has the stream of random numbers of seed + k*envs_per_task + i: runs with equal arguments
    and actions are bitwise equal, whatever `n_workers`.

    goals "random"    drawn from the task's continuous range at every reset
          "official"  a reset picks one of 50; they are those of `metaworld.MT10(seed)` (MT25, MT50) if `tasks` are that
                      benchmark's in its order, of `metaworld.MT1(task, seed)` if it is one task
          "fixed"     always the first goal of `metaworld.MT1(task, seed)`: depends on task and seed alone, so that
                      training and evaluation share it when they share the seed
    n_workers: processes; by default as many as there are usable cores, and never more than environments.

    ImportError: metaworld is missing. ValueError: tasks, counts, seed or goals out of range.
    WorkerError, from `reset`, `send` and `recv`: a worker failed or was killed. It names the task the worker was at;
    its cause is the worker's traceback, if there was one.
    The constructor returns while the workers start; the first `reset` waits for them.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        envs_per_task: int,
        episode_length: int,
        seed: int,
        reward_scale: float = 1.0,
        goals: Goals = "random",
        n_workers: int | None = None,
    ):
        check_tasks(tasks)
        if n_workers is None:
            n_workers = usable_cores()
        n_rows = len(tasks) * envs_per_task
        check_sizes(seed, n_rows, envs_per_task=envs_per_task, episode_length=episode_length, n_workers=n_workers)
        if goals not in ("random", "official", "fixed"):
            raise ValueError(f'goals={goals!r}: expected "random", "official" or "fixed"')
        if importlib.util.find_spec("metaworld") is None:
            raise ImportError("the official engine needs Meta-World: pip install metaworld==3.1.1")

        self.tasks = tuple(tasks)
        self.envs_per_task = envs_per_task
        self.episode_length = episode_length
        self.reward_scale = reward_scale
        self.n_workers = min(n_workers, n_rows)
        self._order = CallOrder()
        self._numbers = NumberCheck(tasks)
        spec = {
            "tasks": self.tasks,
            "envs_per_task": envs_per_task,
            "episode_length": episode_length,
            "seed": seed,
            "goals": goals,
            "n_workers": self.n_workers,
        }
        self._processes: list[subprocess.Popen[bytes]] = []
        self._sockets: list[socket.socket] = []
        # Also at the interpreter's exit, and when the environments are forgotten without being closed.
        self._stop = weakref.finalize(self, _stop, os.getpid(), self._processes, self._sockets)
        # Memory without a name: nobody has to delete it, however the processes end.
        memory = os.memfd_create("d2r_fast")
        try:
            _, n_bytes = worker.shared_arrays(None, n_rows, self.n_workers)
            os.truncate(memory, n_bytes)
            self._shared, _ = worker.shared_arrays(mmap.mmap(memory, n_bytes), n_rows, self.n_workers)
            for w in range(self.n_workers):
                self._start_worker(spec | {"worker": w, "memory": memory})
        finally:
            os.close(memory)

    def _start_worker(self, spec: dict) -> None:
        ours, theirs = socket.socketpair()
        # While a worker is busy, look once a second whether it is alive: should anything else in this process fork just
        # here, the copy of `theirs` would keep the stream open after the worker's death.
        ours.settimeout(1.0)
        self._sockets.append(ours)
        with theirs:
            spec |= {"socket": theirs.fileno(), "parent": os.getpid()}
            one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
            path = os.pathsep.join(entry for entry in sys.path if entry)
            # Not multiprocessing, whose workers would import the caller's main module, and torch with it. -P: this
            # package's own metaworld.py must not hide the real one.
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-P", worker.__file__, json.dumps(spec)],
                    stdin=subprocess.DEVNULL,
                    env=os.environ | one_thread | {"PYTHONPATH": path},
                    pass_fds=(spec["socket"], spec["memory"]),
                    process_group=0,  # Ctrl-C is the parent's to handle: it may want to finish the step and save
                )
            )

    def reset(self) -> np.ndarray:
        self._order.expect("reset", "made", "ready")
        starting, self._order.state = self._order.state == "made", "broken"
        if starting:
            self._wait()
        self._command(worker.RESET)
        self._wait()
        obs = self._copy("obs")
        self._numbers.first(obs)
        self._order.state = "ready"
        return obs

    def send(self, action: np.ndarray) -> None:
        self._order.expect("send", "ready")
        check_action(action, self.tasks, self.envs_per_task)
        self._order.state = "broken"
        np.clip(action.reshape(-1, ACTION_SIZE), -1, 1, out=self._shared.action)
        self._command(worker.STEP)
        self._order.state = "stepping"

    def recv(self) -> Step:
        self._order.expect("recv", "stepping")
        self._order.state = "broken"
        self._wait()
        step = Step(
            obs=self._copy("obs"),
            next_obs=self._copy("next_obs"),
            reward=self._copy("reward"),
            terminated=np.zeros((self.n_tasks, self.envs_per_task), bool),
            truncated=self._copy("truncated"),
            success=self._copy("success"),
        )
        step.reward[:] *= self.reward_scale
        self._numbers.step(step)
        self._order.state = "ready"
        return step

    def close(self) -> None:
        self._stop()
        self._order.state = "closed"

    def _copy(self, name: str) -> np.ndarray:
        rows = getattr(self._shared, name)
        return rows.reshape(self.n_tasks, self.envs_per_task, *rows.shape[1:]).copy()

    def _command(self, command: bytes) -> None:
        for w, to_worker in enumerate(self._sockets):
            try:
                to_worker.sendall(command)
            except OSError:
                self._fail(w)

    def _wait(self) -> None:
        for w, from_worker in enumerate(self._sockets):
            while True:
                try:
                    answer = from_worker.recv(1)
                    break
                except TimeoutError:
                    if self._processes[w].poll() is not None:
                        self._fail(w)
                except ConnectionError:
                    self._fail(w)
            if answer != worker.DONE:
                self._fail(w, answer)

    def _fail(self, w: int, answer: bytes = b"") -> NoReturn:
        """End all workers, and raise what happened to worker `w`."""
        said = b""
        try:
            # After a failure while it was idle, what it said is still unread.
            while chunk := self._sockets[w].recv(65536):
                said += chunk
        except OSError:
            pass
        cause = None
        if (answer or said[:1]) == worker.FAILED:
            traceback = (said if answer else said[1:]).decode(errors="replace").strip()
            why = f"failed: {traceback.splitlines()[-1] if traceback else 'it does not say why'}"
            cause = RuntimeError(f"in the worker:\n{traceback}")
        else:
            why = f"ended with exit status {self._processes[w].wait()} (negative: the signal that killed it)"
        k, i = divmod(int(self._shared.row[w]), self.envs_per_task)
        self._stop()
        raise WorkerError(f"worker {w} at task {self.tasks[k]}, environment {i}, {why}") from cause


def _stop(owner: int, processes: list[subprocess.Popen[bytes]], sockets: list[socket.socket]) -> None:
    for to_worker in sockets:
        to_worker.close()
    if os.getpid() != owner:
        return  # a fork of the owner ends; the workers are not its own
    for process in processes:
        process.kill()  # they hold nothing that needs care, and one may be in the middle of a long start
    for process in processes:
        process.wait()
