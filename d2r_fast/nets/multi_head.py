"""A multilayer perceptron with a head a task: multi-task multi-head SAC (MT-SAC with heads).

Sizes and initial values: as `mlp.py`; the published code's heads are one layer of o T outputs, here T layers.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2r_fast.nets.layers import LinearStack, TaskRows, in_turn, linear_layers, multiply_adds, uniform
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.nets.settings import NetConfigBase, Role


@dataclass(frozen=True, kw_only=True)
class MultiHeadConfig(NetConfigBase):
    """Sizes of one multilayer perceptron with a head a task; actor and critics share them."""

    kind: ClassVar[str] = "multi-head"

    widths: tuple[int, ...] = (400, 400, 400)
    """D, widths of the hidden layers."""

    def __post_init__(self) -> None:
        self.require_positive("widths")

    @property
    def widest(self) -> int:
        return max(self.widths)

    def make(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, role: Role) -> "MultiHead":
        return MultiHead(n_in, n_out, n_tasks, n_nets, self)


class MultiHead(UnroutedNetwork):
    """E multilayer perceptrons with T heads each."""

    def __init__(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, cfg: MultiHeadConfig):
        super().__init__(n_in, n_tasks, n_nets, cfg)
        self.layers = linear_layers(n_nets, (n_in + n_tasks, *cfg.widths), cfg)
        self.heads = LinearStack(n_nets, n_tasks, cfg.widths[-1], n_out, cfg, uniform(3e-3))

    def equations(self, x: Tensor, rows: TaskRows) -> Tensor:
        x = torch.cat([x, rows.onehot(x.dtype)], -1)  # [B,O+T]
        y = in_turn(self.layers, x, relu_behind_last=True)  # [E,B,D]
        return rows.linear(y, self.heads.weight, self.heads.bias, self.cfg)  # [E,B,o]

    @property
    def multiply_adds(self) -> int:
        return multiply_adds(*self.layers, self.heads)
