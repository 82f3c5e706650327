"""PaCo: a network's parameters are a sum of N shared sets, weighted by task.

As the JAX port (rainx0r/metaworld-algorithms 30c9991): every network has its own task weights, with a bias. Published
(TToTMooN/paco-mtrl b63387f): one set of task weights for actor and critics, without one. Initial values are published:
the N sets start equal, the task weights standard normal. The bias, which the published code lacks, starts at 0.

`extreme_tasks`, `leave_out` and `reset_extreme` are the published code's way with tasks whose loss explodes; an update
does the same by `SacConfig.max_task_loss` and `reset_extreme`.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from d2r_fast.nets.layers import EnsembleLinear, Initial, LinearStack, TaskRows, multiply_adds, uniform, xavier
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.nets.settings import NetConfigBase, Role


@dataclass(frozen=True, kw_only=True)
class PacoConfig(NetConfigBase):
    """Sizes of one PaCo network; actor and critics share them."""

    kind: ClassVar[str] = "paco"

    n_sets: int = 5
    """N, parameter sets; 5 for MT10 as published, 20 for MT50 in the JAX port."""
    widths: tuple[int, ...] = (400, 400, 400)
    """D, widths of the hidden layers."""

    def __post_init__(self) -> None:
        self.require_positive("n_sets", "widths")

    @property
    def widest(self) -> int:
        return max(self.widths)

    @property
    def has_task_weights(self) -> bool:
        return True

    def make(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, role: Role) -> "PaCo":
        return PaCo(n_in, n_out, n_tasks, n_nets, self, role)


def _by_inputs(n_in: int, n_out: int) -> Initial:
    return Initial(n_in**-0.5, 0.0)


def _actor_head(n_in: int, n_out: int) -> Initial:
    """Xavier with gain 0.3, of mean and log std as the two heads that they are in the published code."""
    return Initial(0.3 * xavier(n_in, n_out // 2).weight, 0.0)


class PaCo(UnroutedNetwork):
    """E PaCo networks."""

    def __init__(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, cfg: PacoConfig, role: Role = "actor"):
        super().__init__(n_in, n_tasks, n_nets, cfg)
        n, widths = cfg.n_sets, (n_in, *cfg.widths)
        self.task = EnsembleLinear(n_nets, n_tasks, n, cfg, uniform(1, 0.0))
        self.task.weight = nn.Parameter(torch.randn(n_nets, n, n_tasks))
        hidden = xavier if role == "actor" else _by_inputs
        self.layers = nn.ModuleList(LinearStack(n_nets, n, a, b, cfg, hidden, equal=True) for a, b in pairwise(widths))
        head = _actor_head if role == "actor" else uniform(3e-3, 0.0)
        self.head = LinearStack(n_nets, n, widths[-1], n_out, cfg, head, equal=True)

    def equations(self, x: Tensor, rows: TaskRows) -> Tensor:
        w = self.task.weight.mT + self.task.bias[:, None]  # [E,T,N], of any sign
        mixed = self._composed if rows.in_task_order else self._mixed
        for stack in self.layers:
            x = mixed(x, w, cast(LinearStack, stack), rows, relu=True)  # [E,B,D]
        return mixed(x, w, self.head, rows)

    def _mixed(self, x: Tensor, w: Tensor, stack: LinearStack, rows: TaskRows, relu: bool = False) -> Tensor:
        """As written: all N layers for every row, then their sum."""
        own = x if x.dim() == 2 else x[:, None].expand(-1, w.shape[-1], -1, -1)
        y = torch.einsum("ebn,enbo->ebo", rows.pick(w), stack(own))
        return y.relu() if relu else y

    def _composed(self, x: Tensor, w: Tensor, stack: LinearStack, rows: TaskRows, relu: bool = False) -> Tensor:
        """The same with one matrix a task, sum_n w_tn W_n, over that task's rows: N times less arithmetic."""
        weight = torch.einsum("etn,enoi->etoi", w, stack.weight)
        bias = torch.einsum("etn,eno->eto", w, stack.bias)
        return rows.linear(x, weight, bias, self.cfg, relu)

    @property
    def multiply_adds(self) -> int:
        return multiply_adds(*self.layers, self.head)


def extreme_tasks(row_loss: Tensor, task: Tensor, n_tasks: int, threshold: float = 3000.0) -> tuple[Tensor, Tensor]:
    """Each task's loss [T], the mean of its rows' (0 without rows), and whether it exceeds `threshold` [T] bool.

    row_loss [B] total loss of each row (actor, both critics and alpha), task [B] integer
    """
    task = task.to(torch.int64)
    total = row_loss.new_zeros(n_tasks).index_add_(0, task, row_loss)
    rows = row_loss.new_zeros(n_tasks).index_add_(0, task, torch.ones_like(row_loss))
    task_loss = total / rows.clamp(min=1)
    return task_loss, task_loss > threshold


def leave_out(row_loss: Tensor, task: Tensor, extreme: Tensor) -> Tensor:
    """row_loss [B] with 0 in the rows of extreme tasks; a mean of it still divides by all rows."""
    return torch.where(extreme[task.to(torch.int64)], 0, row_loss)


def reset_extreme(weight: Tensor, extreme: Tensor, uniform: Tensor) -> Tensor:
    """Task weights [...,N,T] in which extreme tasks have become random means of the others; all of them if all are.

    extreme  [T] bool
    uniform  [T,T] in [0, 1): the share of each task in another, before the shares of an extreme task in the others are
             divided by their sum. The rest of them is not looked at
    To be done after the optimiser's step; Adam's moments stay as they are. ValueError: `uniform` has another shape.
    """
    n_tasks = len(extreme)
    if uniform.shape != (n_tasks, n_tasks):
        raise ValueError(f"uniform: expected [T={n_tasks},T={n_tasks}], got {list(uniform.shape)}")
    share = uniform * ~extreme
    total = share.sum(-1, keepdim=True)
    mean = weight @ (share / torch.where(total > 0, total, 1)).mT
    return torch.where(extreme & (total[:, 0] > 0), mean, weight)
