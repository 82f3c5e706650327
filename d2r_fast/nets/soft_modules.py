"""Soft Modularization: L layers of N modules, each reading a softmax mix of the modules before it.

As the published code (RchalYang/Soft-Module e6d7c8a), sizes and initial values too. Where the paper differs:

dev   paper                                            code, and here
1     a module's output passes ReLU, then is mixed     linear outputs are mixed, then ReLU
2     gates of a layer depend on the layer before      on the gates of all layers before
3     gates read the task times the observation        two more layers between, and a ReLU on the base before modules
4     the last layer's modules are summed              mixed with a softmax of their own
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from d2r_fast.nets.layers import EnsembleLinear, LinearStack, TaskRows, in_turn, linear_layers, multiply_adds, uniform
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.nets.settings import NetConfigBase, Role, require


@dataclass(frozen=True, kw_only=True)
class SoftModulesConfig(NetConfigBase):
    """Sizes of one Soft Modules network; actor and critics share them. The defaults are the published deep network."""

    kind: ClassVar[str] = "soft-modules"

    n_layers: int = 4
    """L, layers of modules; at least 2."""
    n_modules: int = 4
    """N, modules a layer."""
    module_width: int = 128
    """D, width of a module."""
    base_widths: tuple[int, ...] = (400, 400)
    """H, widths of the base's layers; the last is the task row's too."""
    gating_widths: tuple[int, ...] = (256, 256)
    """G, widths of the layers before the gates."""

    def __post_init__(self) -> None:
        require(self.n_layers >= 2, f"net.n_layers: expected at least 2, got {self.n_layers}")
        self.require_positive("n_modules", "module_width", "base_widths", "gating_widths")

    @property
    def widest(self) -> int:
        # A layer's modules read the base as one layer of N D outputs.
        return max(self.n_modules * max(self.module_width, self.n_modules), *self.base_widths, *self.gating_widths)

    def make(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, role: Role) -> "SoftModules":
        return SoftModules(n_in, n_out, n_tasks, n_nets, self)


class SoftModules(UnroutedNetwork):
    """E Soft Modules networks."""

    def __init__(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, cfg: SoftModulesConfig):
        super().__init__(n_in, n_tasks, n_nets, cfg)
        self.n_modules = n = cfg.n_modules
        width, hidden, gating = cfg.module_width, cfg.base_widths[-1], cfg.gating_widths[-1]
        later = range(1, cfg.n_layers)  # layers that read the one before
        self.base = linear_layers(n_nets, (n_in, *cfg.base_widths), cfg)
        self.task = EnsembleLinear(n_nets, n_tasks, hidden, cfg)
        self.gating = linear_layers(n_nets, (hidden, *cfg.gating_widths), cfg)
        sources = [n * n] * (cfg.n_layers - 1) + [n]  # gates into layers 1..L-1, and into the output
        self.gate = nn.ModuleList(EnsembleLinear(n_nets, gating, m, cfg, uniform(3e-3)) for m in sources)
        self.gate_cond = nn.ModuleDict({str(i): EnsembleLinear(n_nets, i * n * n, gating, cfg) for i in later})
        first = LinearStack(n_nets, n, hidden, width, cfg)
        self.layers = nn.ModuleList([first, *(LinearStack(n_nets, n, width, width, cfg) for _ in later)])
        self.head = EnsembleLinear(n_nets, width, n_out, cfg, uniform(3e-3))

    def equations(self, x: Tensor, rows: TaskRows) -> Tensor:
        f = in_turn(self.base, x)  # [E,B,H]
        z = f * rows.pick(self.task.weight.mT + self.task.bias[:, None])  # [E,B,H]
        *between, last = self.gates(in_turn(self.gating, z.relu()))
        m = self.layers[0](f.relu())  # [E,N,B,D]
        for layer, p in zip(self.layers[1:], between, strict=True):
            mixed = torch.einsum("ebjk,ekbd->ejbd", p, m)
            m = layer(mixed.relu())
        y = torch.einsum("ebjk,ekbd->ejbd", last, m)[:, 0].relu()  # [E,B,D]
        return self.head(y)

    def gates(self, c: Tensor) -> list[Tensor]:
        """c [E,B,G] -> for each mix its weights [E,B,targets,N], positive with sum 1 over the N sources; the last mix
        has one target, the output."""
        logits = self.gate[0](c.relu())
        p = [logits.unflatten(-1, (-1, self.n_modules)).softmax(-1)]
        for gate, gate_cond in zip(self.gate[1:], self.gate_cond.values(), strict=True):
            earlier = torch.cat([q.flatten(-2) for q in p], -1)
            logits = gate((gate_cond(earlier) * c).relu())
            p.append(logits.unflatten(-1, (-1, self.n_modules)).softmax(-1))
        return p

    @property
    def multiply_adds(self) -> int:
        around = (*self.base, *self.gating, *self.gate, *self.gate_cond.values(), self.head)
        return multiply_adds(*around) + self.n_modules * multiply_adds(*self.layers)
