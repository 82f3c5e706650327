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

from torch import Tensor, nn

from d2r_fast.nets.layers import (
    EnsembleLinear,
    LinearStack,
    TaskRows,
    in_turn,
    linear_layers,
    multiply_adds,
    uniform,
    weights_and_biases,
)
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.nets.settings import NetConfigBase, Role, require
from d2r_fast.ops.module_levels import level_gates, module_levels


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
        n_gates = (self.n_layers - 1) * self.n_modules**2  # the last of the gates' layers reads as many
        return max(self.module_width, n_gates, *self.base_widths, *self.gating_widths)

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
        gate = self.gates(in_turn(self.gating, z.relu()))
        levels = weights_and_biases(self.layers)
        y = module_levels(f.relu(), gate, levels, self.cfg.backend, self.cfg.precision)  # [E,B,D]
        return self.head(y)

    def gates(self, c: Tensor) -> Tensor:
        """c [E,B,G] -> for each mix its weights, [E,B,(L-1) N^2 + N] as `module_levels` takes them."""
        layers = [self.gate[0]]
        for gate_cond, gate in zip(self.gate_cond.values(), self.gate[1:], strict=True):
            layers += [gate_cond, gate]
        return level_gates(c, self.n_modules, weights_and_biases(layers), self.cfg.backend, self.cfg.precision)

    @property
    def multiply_adds(self) -> int:
        around = (*self.base, *self.gating, *self.gate, *self.gate_cond.values(), self.head)
        return multiply_adds(*around) + self.n_modules * multiply_adds(*self.layers)
