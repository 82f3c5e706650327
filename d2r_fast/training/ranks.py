"""One run made by several processes, as torchrun starts them: who this process is, and what it asks of the others.

Each process, called rank here as there, steps its share of every task's environments, keeps its share of the replay and
draws its share of every batch. What all decide together they decide at the same place in the program: whether to stop,
what a chunk brought, the mean of a gradient. All else follows from counters, parameters and settings that are the same
everywhere. Rank 0 is the first: it alone writes metrics and the checkpoint, evaluates, and talks to the user.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from d2r_fast.config import RunConfig
from d2r_fast.learning.shares import Shares
from d2r_fast.training.watch import Watch, meeting_place

T = TypeVar("T")

# The first rank may evaluate, or write its report, for long while the others wait. That they live, `Watch` sees.
PATIENCE = timedelta(days=1)


class Alone:
    """A run of one process."""

    rank, count = 0, 1
    first = True
    shares: Shares | None = None

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in order."""
        return [value]

    def from_first(self, value: T | None) -> T:
        """The first rank's value, which it alone need have."""
        assert value is not None
        return value

    def failed(self, message: str) -> bool:
        """This rank ends with an error. Returns whether to tell the user: no other has told of one before."""
        return True

    def close(self) -> None:
        """Leave, once all have come here."""


class Ranks(Alone):
    """One of several processes; as `Alone`, whose methods all ranks call in the same order, but for `failed`.

    shares  what updates ask of each other
    A rank that dies, or fails, ends all others within half a minute, with one message from one of them: they cannot go
    on without it, and the launcher starts all anew from the last checkpoint (`torchrun --max-restarts`).
    """

    def __init__(self, rank: int, count: int):
        self.rank, self.count, self.first = rank, count, rank == 0
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=meeting_place(rank), rank=rank, world_size=count, timeout=PATIENCE)
        self._watch = Watch(rank, count)
        self.shares = _Shares(self)

    def any(self, flag: bool) -> bool:
        there = torch.tensor([flag], dtype=torch.int32)
        with self.talking():
            dist.all_reduce(there, dist.ReduceOp.MAX)
        return bool(there)

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        with self.talking():
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value: T | None) -> T:
        holder: list[Any] = [value]
        with self.talking():
            dist.broadcast_object_list(holder)
        found: T = holder[0]
        return found

    def failed(self, message: str) -> bool:
        return self._watch.tell(f"{self}: {message}")

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.count}"

    def close(self) -> None:
        self.any(False)
        self._watch.close()
        dist.destroy_process_group()

    @contextmanager
    def talking(self) -> Iterator[None]:
        """Talk to the others inside; where that fails, one of them is gone, and this process ends."""
        try:
            yield
        except RuntimeError as error:  # what torch makes of a connection that is closed
            self._watch.leave(str(error).splitlines()[0])


class _Shares:
    """The updates' side of `Ranks`: tensors, on the device that they are on."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks

    def average(self, tensor: Tensor) -> None:
        with self._ranks.talking():
            if tensor.is_cuda:
                dist.all_reduce(tensor, dist.ReduceOp.AVG)
            else:
                dist.all_reduce(tensor)  # gloo has no mean
                tensor.div_(self._ranks.count)

    def from_first(self, tensor: Tensor) -> None:
        with self._ranks.talking():
            dist.broadcast(tensor, 0)


def join() -> Alone:
    """Meet the other ranks, if the environment is torchrun's and names more than one.

    ValueError: variables that torchrun sets are missing, or there are more ranks here than GPUs.
    """
    variables = {name: os.environ.get(name) for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")}
    if (variables["WORLD_SIZE"] or "1") == "1":
        return Alone()
    for name, value in variables.items():
        if not value or (name != "MASTER_ADDR" and not value.isdecimal()):
            raise ValueError(
                f"{name}: expected what torchrun sets beside WORLD_SIZE={variables['WORLD_SIZE']}, got {value!r}"
            )
    here = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if here >= torch.cuda.device_count():
            raise ValueError(f"LOCAL_RANK: expected one rank a GPU, {torch.cuda.device_count()} here, got {here}")
        torch.cuda.set_device(here)
    return Ranks(int(variables["RANK"] or 0), int(variables["WORLD_SIZE"] or 1))


def launched_at() -> float:
    """When this run was launched, in seconds of the clock: the same for all starts of a launcher's, else now."""
    launcher = psutil.Process().parent() if "TORCHELASTIC_RUN_ID" in os.environ else None
    return launcher.create_time() if launcher else time.time()


class Share:
    """What one of `count` ranks has of a run.

    envs_per_task, batch_size, replay_capacity  as in the configuration, which counts all ranks' together
    ValueError: the run cannot be shared out equally.
    """

    def __init__(self, cfg: RunConfig, count: int):
        n, rows = cfg.env.envs_per_task, cfg.batch_size // cfg.n_tasks
        if n % count != 0:
            raise ValueError(
                f"env.envs_per_task: expected a multiple of the {count} ranks, which share each task's environments, "
                f"got {n} (try --env.envs-per-task {-(-n // count) * count})"
            )
        if rows % count != 0:
            raise ValueError(
                f"batch_size: expected a multiple of {count * cfg.n_tasks}, {count} ranks times {cfg.n_tasks} tasks, "
                f"got {cfg.batch_size}"
            )
        self.envs_per_task = n // count
        self.batch_size = cfg.batch_size // count
        self.replay_capacity = cfg.replay_capacity // cfg.n_tasks // count * cfg.n_tasks
