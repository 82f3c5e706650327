"""MOORE: N experts whose features are made orthogonal row by row, then summed with weights of the task.

As the published code (AhmedMagdyHendawy/MOORE a7550c5), sizes and initial values too. `norm_epsilon` is 0 there; the
JAX port (rainx0r/metaworld-algorithms 30c9991) adds 1e-8 to each norm.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor, nn

from d2r_fast.nets.layers import LinearStack, Table, TaskRows, by_inputs, in_turn, multiply_adds, uniform, xavier
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.nets.settings import NetConfigBase, Role, require
from d2r_fast.ops.expert_sum import expert_sum


@dataclass(frozen=True, kw_only=True)
class MooreConfig(NetConfigBase):
    """Sizes of one MOORE network; actor and critics share them."""

    kind: ClassVar[str] = "moore"

    n_experts: int = 4
    """N, experts; 4 for MT10, 6 for MT50 as published. At most the last width."""
    widths: tuple[int, ...] = (400, 400, 400)
    """D, widths of an expert's layers."""
    norm_epsilon: float = 0.0
    """Added to each norm that features are divided by."""

    def __post_init__(self) -> None:
        self.require_positive("n_experts", "widths")
        # More vectors than dimensions cannot be orthogonal: the last ones would be rounding errors, made 1 long.
        require(
            self.n_experts <= self.widths[-1],
            f"net.n_experts: expected at most the last of widths={self.widths}, got {self.n_experts}",
        )
        require(
            0 <= self.norm_epsilon < float("inf"),
            f"net.norm_epsilon: expected a finite number of at least 0, got {self.norm_epsilon}",
        )

    @property
    def widest(self) -> int:
        return max(self.widths)

    def make(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, role: Role) -> "Moore":
        return Moore(n_in, n_out, n_tasks, n_nets, self)


class Moore(UnroutedNetwork):
    """E MOORE networks."""

    def __init__(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, cfg: MooreConfig):
        super().__init__(n_in, n_tasks, n_nets, cfg)
        self.n_experts = n = cfg.n_experts
        width = cfg.widths[-1]
        self.norm_epsilon = cfg.norm_epsilon
        self.task = Table(n_nets, n, n_tasks)  # weight [E,N,T]
        nn.init.uniform_(self.task.weight, -xavier(n_tasks, n).weight, xavier(n_tasks, n).weight)
        self.experts = nn.ModuleList(
            LinearStack(n_nets, n, a, b, cfg, by_inputs) for a, b in pairwise((n_in, *cfg.widths))
        )
        bound = xavier(width, n_out).weight
        self.heads = LinearStack(n_nets, n_tasks, width, n_out, cfg, uniform(bound))
        nn.init.uniform_(self.heads.bias, -(width**-0.5), width**-0.5)

    def equations(self, x: Tensor, rows: TaskRows) -> Tensor:
        w = rows.pick(self.task.weight.mT)  # [E,B,N]
        v = in_turn(self.experts, x)  # [E,B,N,D]
        y = expert_sum(v, w, True, self.norm_epsilon, self.cfg.backend).tanh()  # [E,B,D]
        return rows.linear(y, self.heads.weight, self.heads.bias, self.cfg)  # [E,B,o]

    @property
    def multiply_adds(self) -> int:
        return self.n_experts * multiply_adds(*self.experts) + multiply_adds(self.heads)
