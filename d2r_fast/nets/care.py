"""CARE: N encoders, mixed by attention of the task's context, before a multilayer perceptron that reads both.

As the JAX port (rainx0r/metaworld-algorithms 30c9991), whose sizes these are. Initial values: mtrl, the published code
(facebookresearch/mtrl e282c3f).

dev   paper, mtrl                                       port, and here
1     the task's description as a fixed embedding       a table that is learnt
2     paper: attention compares context and encodings   attention reads the context alone; so does mtrl
3     mtrl: one encoder for actor and critics,          encoders of their own, trained by their own losses
      trained by the critics' loss
4     mtrl: the action enters behind the encoder        the encoders read it
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from d2r_fast.nets.layers import (
    EnsembleLinear,
    LinearStack,
    Table,
    TaskRows,
    in_turn,
    linear_layers,
    multiply_adds,
    xavier,
)
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.nets.settings import NetConfigBase, Role, require
from d2r_fast.ops.expert_sum import expert_sum


@dataclass(frozen=True, kw_only=True)
class CareConfig(NetConfigBase):
    """Sizes of one CARE network; actor and critics share them."""

    kind: ClassVar[str] = "care"

    n_experts: int = 6
    """N, encoders; 6 for MT10 and 10 for MT50 in the JAX port."""
    embedding_width: int = 50
    """C, width of a task's embedding, of its context and of what an encoder gives."""
    encoder_widths: tuple[int, ...] = (50, 50)
    """D_e, hidden widths of an encoder, of the context's network and of the attention's."""
    widths: tuple[int, ...] = (400, 400, 400)
    """D, hidden widths behind the encoders."""
    temperature: float = 1.0
    """tau, divides the attention's logits."""

    def __post_init__(self) -> None:
        self.require_positive("n_experts", "embedding_width", "encoder_widths", "widths")
        require(
            0 < self.temperature < float("inf"),
            f"net.temperature: expected a finite number over 0, got {self.temperature}",
        )

    @property
    def widest(self) -> int:
        return max(2 * self.embedding_width, self.n_experts, *self.encoder_widths, *self.widths)

    def make(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, role: Role) -> "Care":
        return Care(n_in, n_out, n_tasks, n_nets, self)


class Care(UnroutedNetwork):
    """E CARE networks."""

    def __init__(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, cfg: CareConfig):
        super().__init__(n_in, n_tasks, n_nets, cfg)
        self.n_experts = n = cfg.n_experts
        width, inner = cfg.embedding_width, cfg.encoder_widths
        self.temperature = cfg.temperature
        self.embedding = Table(n_nets, n_tasks, width)
        self.context = linear_layers(n_nets, (width, *inner, width), cfg, xavier)
        self.attention = linear_layers(n_nets, (width, *inner, n), cfg, xavier)
        self.experts = nn.ModuleList(
            LinearStack(n_nets, n, a, b, cfg, xavier) for a, b in pairwise((n_in, *inner, width))
        )
        self.torso = linear_layers(n_nets, (2 * width, *cfg.widths), cfg, xavier)
        self.head = EnsembleLinear(n_nets, cfg.widths[-1], n_out, cfg, xavier)

    def equations(self, x: Tensor, rows: TaskRows) -> Tensor:
        h = self.embedding.weight.relu()  # [E,T,C]
        c = in_turn(self.context, h)  # [E,T,C]
        a = (in_turn(self.attention, c) / self.temperature).softmax(-1)  # [E,T,N]
        v = in_turn(self.experts, x)  # [E,B,N,C]
        mixed = expert_sum(v, rows.pick(a), backend=self.cfg.backend)  # [E,B,C]
        x = torch.cat([mixed, rows.pick(c)], -1)  # [E,B,2C]
        return in_turn([*self.torso, self.head], x)  # [E,B,o]

    @property
    def multiply_adds(self) -> int:
        return self.n_experts * multiply_adds(*self.experts) + multiply_adds(*self.torso, self.head)
