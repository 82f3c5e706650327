"""One multilayer perceptron for all tasks, which reads the task's one-hot id: multi-task SAC (MT-SAC).

Sizes: Meta-World's MT-SAC. Initial values: its PyTorch version beside Soft Modules (RchalYang/Soft-Module e6d7c8a),
which the D2R paper compares with; the JAX port (rainx0r/metaworld-algorithms) starts with other ranges.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from d2r_fast.nets.layers import EnsembleLinear, TaskRows, in_turn, linear_layers, multiply_adds, uniform
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.nets.settings import NetConfigBase, Role


@dataclass(frozen=True, kw_only=True)
class MlpConfig(NetConfigBase):
    """Sizes of one multilayer perceptron; actor and critics share them."""

    kind: ClassVar[str] = "mlp"

    widths: tuple[int, ...] = (400, 400, 400)
    """D, widths of the hidden layers."""

    def __post_init__(self) -> None:
        self.require_positive("widths")

    @property
    def widest(self) -> int:
        return max(self.widths)

    def make(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, role: Role) -> "Mlp":
        return Mlp(n_in, n_out, n_tasks, n_nets, self)


class Mlp(UnroutedNetwork):
    """E multilayer perceptrons."""

    def __init__(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, cfg: MlpConfig):
        super().__init__(n_in, n_tasks, n_nets, cfg)
        self.layers = linear_layers(n_nets, (n_in + n_tasks, *cfg.widths), cfg)
        self.head = EnsembleLinear(n_nets, cfg.widths[-1], n_out, cfg, uniform(3e-3))

    def equations(self, x: Tensor, rows: TaskRows) -> Tensor:
        x = torch.cat([x, rows.onehot(x.dtype)], -1)  # [B,O+T]
        return in_turn([*self.layers, self.head], x)  # [E,B,o]

    @property
    def multiply_adds(self) -> int:
        return multiply_adds(*self.layers, self.head)
