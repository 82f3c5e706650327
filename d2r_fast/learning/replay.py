"""The replay: a ring buffer on the learner's device that gives the same number of rows of every task."""

from itertools import accumulate
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from d2r_fast.learning.sac import Batch
from d2r_fast.learning.saved_state import check_tensor, count, field
from d2r_fast.ops.replay_rows import ReplayRows, replay_rows
from d2r_fast.ops.route_checks import require_legal_index

_ROWS_CHECKED = 10_000  # at once, in some hundred MiB at the published MT10 size


class Transitions(NamedTuple):
    """S transitions of each of T tasks, on any device."""

    obs: Tensor  # [T,S,O] float32
    action: Tensor  # [T,S,A] float32
    reward: Tensor  # [T,S] float32, scaled
    terminal: Tensor  # [T,S] bool
    next_obs: Tensor  # [T,S,O] float32
    route: Tensor  # [T,S,N,K] uint8: the sources the actor's routes kept


def _row_fields(
    obs_size: int, action_size: int, route_shape: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each field of one transition."""
    return {
        "obs": ((obs_size,), torch.float32),
        "action": ((action_size,), torch.float32),
        "reward": ((), torch.float32),
        "terminal": ((), torch.bool),
        "next_obs": ((obs_size,), torch.float32),
        "route": (route_shape, torch.uint8),
    }


class Staging:
    """Host memory for S transitions of each of T tasks, in one piece, so that one copy takes them to a GPU.

    rows    its fields, not initialised: for the collector to write and the learner's thread to add to the replay
    pinned  page-locked memory, from which a GPU copies by itself; needs CUDA
    """

    def __init__(
        self,
        n_tasks: int,
        n_rows: int,
        obs_size: int,
        action_size: int,
        route_shape: tuple[int, int],
        pinned: bool = False,
    ):
        fields = _row_fields(obs_size, action_size, route_shape).values()
        self._fields = [(torch.Size((n_tasks, n_rows, *shape)), dtype) for shape, dtype in fields]
        sizes = [shape.numel() * dtype.itemsize for shape, dtype in self._fields]
        self._ends = list(accumulate(-(-size // 16) * 16 for size in sizes))  # every field begins aligned
        self._memory = torch.empty(self._ends[-1], dtype=torch.uint8, pin_memory=pinned)
        self.rows = self._views(self._memory)

    def _views(self, memory: Tensor) -> Transitions:
        views = []
        for begin, (shape, dtype) in zip([0, *self._ends], self._fields, strict=False):
            views.append(memory[begin : begin + shape.numel() * dtype.itemsize].view(dtype).view(shape))
        return Transitions(*views)

    def rows_on(self, device: torch.device) -> Transitions:
        """The rows on `device`: `rows` themselves on the CPU, elsewhere a copy, made when this returns."""
        return self.rows if device.type == "cpu" else self._views(self._memory.to(device))


class Replay:
    """Preallocated storage for `capacity` transitions over all T tasks; every task holds the same number.

    The routes take N K bytes a transition (32 at D2R's published sizes); dense 0/1 gates in float32 would take 544. A
    network without routes has (0, 0) of them, which take nothing.
    MemoryError: more than the device has free, told before anything is allocated.
    """

    def __init__(
        self,
        n_tasks: int,
        capacity: int,
        obs_size: int,
        action_size: int,
        route_shape: tuple[int, int],
        device: torch.device,
    ):
        self.n_tasks, self.rows_per_task, self.device = n_tasks, capacity // n_tasks, device
        self._shapes = _row_fields(obs_size, action_size, route_shape)
        self._require_memory()
        # Zeros written, not just reserved: the memory is taken here, not bit by bit while training runs.
        self._store = Transitions(
            **{
                name: torch.empty(n_tasks, self.rows_per_task, *shape, dtype=dtype, device=device).zero_()
                for name, (shape, dtype) in self._shapes.items()
            }
        )
        self.size = 0  # filled rows of each task
        self._head = 0  # where the next row goes
        self._task = torch.arange(n_tasks, device=device)
        # `size` where a captured update reads it: a graph keeps numbers as they were, but not what tensors hold.
        self._size_there = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def n_bytes(self) -> int:
        """Memory the storage takes."""
        per_row = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._shapes.values())
        return per_row * self.n_tasks * self.rows_per_task

    def _require_memory(self) -> None:
        on_gpu = self.device.type == "cuda"
        free = torch.cuda.mem_get_info(self.device)[0] if on_gpu else psutil.virtual_memory().available
        if self.n_bytes > free:
            raise MemoryError(
                f"replay_capacity: {self.rows_per_task * self.n_tasks:,} transitions need {self.n_bytes / 2**30:.1f} "
                f"GiB, but {self.device} has {free / 2**30:.1f} GiB free"
            )

    def add(self, new: Transitions) -> None:
        """Append S <= rows_per_task transitions a task; the oldest are overwritten. ValueError: other shapes."""
        n_new = new.reward.shape[1]
        if n_new > self.rows_per_task:
            raise ValueError(f"expected at most {self.rows_per_task} transitions a task at once, got {n_new}")
        for name, store, value in zip(Transitions._fields, self._store, new, strict=True):
            expected = [self.n_tasks, n_new, *store.shape[2:]]
            if list(value.shape) != expected:
                raise ValueError(f"{name}: expected {expected}, got {list(value.shape)}")
        first = min(n_new, self.rows_per_task - self._head)
        for store, value in zip(self._store, new, strict=True):
            store[:, self._head : self._head + first].copy_(value[:, :first])
            store[:, : n_new - first].copy_(value[:, first:])
        self._head = (self._head + n_new) % self.rows_per_task
        self._set_size(min(self.size + n_new, self.rows_per_task))

    def _set_size(self, size: int) -> None:
        self.size = size
        self._size_there.fill_(size)

    def sample(self, batch_size: int, generator: torch.Generator) -> Batch:
        """The same rows as `sample_rows` gives, field by field."""
        rows = self.sample_rows(batch_size, generator)
        acted, _, after = rows.x
        n_obs = self._store.obs.shape[2]
        return Batch(
            obs=acted[:, :n_obs],
            action=acted[:, n_obs:],
            reward=rows.reward,
            terminal=rows.terminal,
            next_obs=after[:, :n_obs],
            task=self.tasks_of(batch_size),
            route=rows.route[0],
        )

    def sample_rows(self, batch_size: int, generator: torch.Generator) -> ReplayRows:
        """B rows, B/T of every task, drawn uniformly and independently; `generator` lives on the replay's device."""
        if self.size == 0:
            raise RuntimeError("the replay is empty: collect before sampling")
        shape = (self.n_tasks, batch_size // self.n_tasks)
        share = torch.rand(shape, dtype=torch.float64, generator=generator, device=self.device)
        return ReplayRows(*replay_rows(*self._store, share, self._size_there))

    def tasks_of(self, batch_size: int) -> Tensor:
        """The task of every row of a batch [B] int64."""
        return self._task.repeat_interleave(batch_size // self.n_tasks)

    def tensors(self) -> dict[str, Tensor]:
        """The storage, rows not filled yet included: zeros."""
        return {f"replay {name}": store for name, store in zip(Transitions._fields, self._store, strict=True)}

    def state_dict(self) -> dict[str, object]:
        """The filled part, on the CPU; a full replay on the CPU is not copied."""
        # Contiguous: a view of a part-filled store would be saved with all of its storage.
        filled = {
            n: s[:, : self.size].contiguous().cpu() for n, s in zip(Transitions._fields, self._store, strict=True)
        }
        return {"head": self._head, "size": self.size, "rows": filled}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave.

        ValueError, and nothing is changed: it has other tasks or sizes, more rows than fit, or routes that cannot
        be.
        """
        size, head, rows = count(state, "size"), count(state, "head"), field(state, "rows", dict)
        fits = size <= self.rows_per_task and (head < size == self.rows_per_task or head == size)
        for name, store in zip(Transitions._fields, self._store, strict=True):
            shape = (self.n_tasks, size, *store.shape[2:])
            value = field(rows, name, Tensor)
            if not fits or tuple(value.shape) != shape:
                raise ValueError(
                    f"saved replay: {name} is {list(value.shape)} (next row {head}), which does not fit "
                    f"{self.rows_per_task} rows a task of shape {list(shape)}"
                )
            check_tensor(value, f"saved replay: {name}", like=store, shape=shape)
        for begin in range(0, size, _ROWS_CHECKED):
            some = rows["route"][:, begin : begin + _ROWS_CHECKED]
            require_legal_index(some, f"saved replay, rows from {begin}: route")
        for name, store in zip(Transitions._fields, self._store, strict=True):
            store[:, :size].copy_(rows[name])
        self._set_size(size)
        self._head = head % self.rows_per_task
