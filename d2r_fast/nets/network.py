"""What callers may ask of any network, and what the networks without routes share."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from d2r_fast.nets.layers import TaskRows
from d2r_fast.nets.settings import NetConfigBase
from d2r_fast.ops.arguments import require_tensor, under_autocast


class UnroutedNetwork(nn.Module):
    """E independent networks over the same rows, all of whose layers every row runs through.

    n_in     width of a row: the observation, for a critic with the action behind it
    n_tasks  T
    n_nets   E
    """

    def __init__(self, n_in: int, n_tasks: int, n_nets: int, cfg: NetConfigBase):
        super().__init__()
        self.n_in, self.n_tasks, self.n_nets, self.cfg = n_in, n_tasks, n_nets, cfg

    def forward(self, x: Tensor, task: Tensor, in_task_order: bool = False) -> Tensor:
        """x [B,n_in] float, task [B] integer in [0,T) -> out [E,B,n_out].

        in_task_order  the caller's word that the rows of a task stand together, B/T of each, tasks in order: layers of
                       a task's own then run for its rows alone. The values are the same to rounding.
        ValueError: x or task has another shape, dtype or device. IndexError, on a GPU an assertion on the device: a
        task out of range.
        """
        check_rows(self, x, task)
        return self.equations(x, TaskRows(task, self.n_tasks, in_task_order))

    @abstractmethod
    def equations(self, x: Tensor, rows: TaskRows) -> Tensor:
        """The network: x [B,n_in] -> out [E,B,n_out]."""

    @property
    @abstractmethod
    def multiply_adds(self) -> int:
        """A row of one network, in a batch that is in task order; what is computed once a task is left out."""


def check_rows(net: nn.Module, x: Tensor, task: Tensor) -> None:
    """ValueError: x is no [B,n_in] in the dtype and on the device of the parameters, or task no [B] integer there."""
    require_tensor("x", x, "float")
    require_tensor("task", task, "integer")
    if x.dim() != 2 or x.shape[1] != net.n_in:
        raise ValueError(f"x: expected [B,{net.n_in}], got {list(x.shape)}")
    if task.shape != x.shape[:1]:
        raise ValueError(f"task: expected [B={x.shape[0]}], got {list(task.shape)}")
    like = next(net.parameters())
    for name, value in (("x", x), ("task", task)):
        if value.device != like.device:
            raise ValueError(f"{name}: expected device {like.device} like the parameters, got {value.device}")
    # Autocast brings these to one dtype, and leaves float64 alone.
    may_differ = under_autocast(x) and torch.float64 not in (x.dtype, like.dtype)
    if x.dtype != like.dtype and not may_differ:
        raise ValueError(f"x: expected {like.dtype} like the parameters, got {x.dtype}")
