"""The D2R network: base, task row, routing network, N routed modules, head; E of them side by side.

Where the paper, the published code and this file differ:

dev   paper                              published code                       here
1     one-hot task id through a layer    the same                             one-hot product, no gradient to the id
2     routes kept as dense gates         N(N+1)/2 float32 a row               K integers a route (`Routes.index`)
3     ResRouting stops a gradient where  softmax > 1/(i+1) keeps it flowing,  as the code; values never change
      the source "would not be routed"   through the ReLU layer only
4     temperature from Gumbel            multinomial without replacement      Gumbel top-k: the same distribution
5     -                                  a Parameter handed to Adam           a buffer of the agent, set by `sac.update`
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from d2r_fast.nets.layers import EnsembleLinear, linear_layers, multiply_adds, uniform
from d2r_fast.nets.network import check_rows
from d2r_fast.nets.settings import NetConfigBase, Role, require
from d2r_fast.ops import Routes, routed_modules, routed_network, select_routes
from d2r_fast.ops.arguments import under_autocast
from d2r_fast.ops.backends import choose_backend
from d2r_fast.ops.ensemble_linear import FEWEST_ROWS
from d2r_fast.ops.select_routes import MAX_MODULES, RouteMode


class RouteChoice(NamedTuple):
    """How a forward pass chooses routes; the fields are those of `select_routes`."""

    mode: RouteMode = "greedy"
    temperature: Tensor | None = None  # [B]
    noise: Tensor | None = None  # [E,B,R] standard Gumbel
    index: Tensor | None = None  # type: ignore[assignment]  # [E,B,N,K]; hides tuple.index

    @staticmethod
    def sampled(temperature: Tensor, noise: Tensor) -> "RouteChoice":
        return RouteChoice("sampled", temperature, noise)

    @staticmethod
    def given(index: Tensor) -> "RouteChoice":
        return RouteChoice("given", index=index)


GREEDY = RouteChoice()


@dataclass(frozen=True, kw_only=True)
class NetConfig(NetConfigBase):
    """Sizes and switches of one D2R network; actor and critics share them."""

    kind: ClassVar[str] = "d2r"

    n_modules: int = 16
    """N, modules a network; route i chooses among i sources."""
    top_k: int = 2
    """K, sources kept a route; N keeps all of them (dense soft routing)."""
    module_width: int = 128
    """D, width of a module."""
    base_width: int = 400
    """H, width of the base's two layers and of the task row."""
    route_widths: tuple[int, ...] = (256, 256)
    """Hidden widths of the routing network."""
    residual: bool = True
    """Add a module's input to its output."""
    resrouting: bool = True
    """ResRouting: mask gradients into sources that today's routing would hardly pick."""
    dynamic_depth: bool = True
    """A row runs the modules that its routes reach. False: all N of them, a fixed number as in the methods that the
    paper's abstract sets itself against: route i keeps module i-1 always, and chooses K-1 others. A network that does
    runs layer by layer."""

    def __post_init__(self) -> None:
        require(1 <= self.n_modules <= MAX_MODULES, f"net.n_modules: expected 1..{MAX_MODULES}, got {self.n_modules}")
        require(
            1 <= self.top_k <= self.n_modules,
            f"net.top_k: expected 1..n_modules={self.n_modules}, got {self.top_k}",
        )
        self.require_positive("module_width", "base_width", "route_widths")

    @property
    def n_logits(self) -> int:
        return self.n_modules * (self.n_modules + 1) // 2

    @property
    def route_shape(self) -> tuple[int, int]:
        return self.n_modules, self.top_k

    @property
    def widest(self) -> int:
        # Triton's kernels of the layers around the modules take any width.
        around = (self.base_width, *self.route_widths) if self.backend == "cpp" else ()
        return max((self.module_width, *around))

    def make(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, role: Role) -> "RoutedNetwork":
        return RoutedNetwork(n_in, n_out, n_tasks, n_nets, self)


class RoutedNetwork(nn.Module):
    """E independent D2R networks over the same rows.

    n_in     width of a row: the observation, for a critic with the action behind it
    n_out    width of the output
    n_tasks  T
    n_nets   E
    """

    def __init__(self, n_in: int, n_out: int, n_tasks: int, n_nets: int, cfg: NetConfig):
        super().__init__()
        self.cfg, self.n_in, self.n_tasks, self.n_nets = cfg, n_in, n_tasks, n_nets
        hidden, width = cfg.base_width, cfg.module_width
        self.base = linear_layers(n_nets, (n_in, hidden, hidden), cfg)
        # A row of its weight, not a product: nothing to round.
        self.task = EnsembleLinear(n_nets, n_tasks, hidden, replace(cfg, precision="float32"))
        self.route = linear_layers(n_nets, (hidden, *cfg.route_widths, cfg.n_logits), cfg)
        self.module0 = EnsembleLinear(n_nets, hidden, width, cfg)
        bound = width**-0.5
        self.module_weight = nn.Parameter(torch.empty(n_nets, cfg.n_modules - 1, width, width).uniform_(-bound, bound))
        self.module_bias = nn.Parameter(torch.full((n_nets, cfg.n_modules - 1, width), 0.1))
        self.head = EnsembleLinear(n_nets, width, n_out, cfg, initial=uniform(3e-3))

    def forward(self, x: Tensor, task: Tensor, choice: RouteChoice = GREEDY) -> tuple[Tensor, Routes]:
        """x [B,n_in] float, task [B] integer in [0,T) -> out [E,B,n_out], routes.

        ResRouting's gradient mask applies in training mode only. An out-of-range task adds nothing to `task`'s bias.
        On the CPU all layers run as one operation, unless a layer has hooks.
        ValueError: x or task has another shape, dtype or device, or `choice` does not fit the rows.
        """
        check_rows(self, x, task)
        cfg = self.cfg
        masked = cfg.resrouting and self.training
        if not cfg.dynamic_depth:
            choice = _through_all_modules(choice, self.n_nets, x, cfg)
        if self.runs_as_one(x):
            return routed_network(
                x, task, self.in_order(), cfg.top_k, *choice, cfg.residual, resrouting=masked, precision=cfg.precision
            )
        onehot = (task.to(torch.int64)[:, None] == torch.arange(self.n_tasks, device=task.device)).to(x.dtype)  # [B,T]
        f = self.base[1](self.base[0](x, relu=True))  # [E,B,H]
        logits = f * self.task(onehot)  # [E,B,H]
        for layer in self.route[:-1]:
            logits = layer(logits, relu=True)
        logits = self.route[-1](logits)  # [E,B,R]
        routes = select_routes(logits, cfg.top_k, *choice, resrouting=masked, backend=cfg.backend)
        h0 = self.module0(f.relu(), relu=True)  # [E,B,D]
        mixed = routed_modules(
            h0, self.module_weight, self.module_bias, routes, cfg.residual, cfg.backend, cfg.precision
        )  # [E,B,D]
        return self.head(mixed), routes

    def is_plain(self, x: Tensor) -> bool:
        """Whether x meets each layer as it is: no autocast, and nobody has hooked or replaced a layer, which whoever
        computes from the parameters alone would pass over; and routes are as chosen, with nothing to add."""
        if not self.cfg.dynamic_depth:
            return False
        layers = (*self.base, self.task, self.module0, self.head, *self.route)
        if under_autocast(x) or not all(type(v) is EnsembleLinear for v in layers):
            return False
        return not any(
            v._forward_hooks or v._forward_pre_hooks or v._backward_hooks or v._backward_pre_hooks for v in layers
        )

    def runs_as_one(self, x: Tensor) -> bool:
        """Whether `routed_network` takes all of it: on the CPU, for as many rows as make packing the weights worth it,
        and where each layer is plain."""
        cfg = self.cfg
        if not self.is_plain(x):
            return False
        if cfg.backend not in ("auto", "cpp"):  # whose limits of width are for the modules alone
            return False
        widest = max(self.n_in, cfg.base_width, cfg.module_width, *cfg.route_widths, self.head.weight.shape[1])
        few = cfg.backend == "auto" and self.n_nets * len(x) < FEWEST_ROWS
        return not few and choose_backend(cfg.backend, x, widest, cfg.precision) == "cpp"

    @property
    def multiply_adds(self) -> int:
        """A row of one network with all of its modules active."""
        return multiply_adds(*self.base, *self.route, self.module0, self.head) + self.module_weight[0].numel()

    def layers(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight and bias of each layer, by name, in the order of `in_order`; `modules` are 1..N-1."""
        around: dict[str, Any] = {
            "base0": self.base[0],
            "base1": self.base[1],
            "task": self.task,
            "module0": self.module0,
        }
        pairs = {name: (layer.weight, layer.bias) for name, layer in around.items()}
        pairs |= {"modules": (self.module_weight, self.module_bias), "head": (self.head.weight, self.head.bias)}
        return pairs | {f"route{i}": (layer.weight, layer.bias) for i, layer in enumerate(self.route)}

    def in_order(self) -> list[Tensor]:
        """The parameters as `routed_network` takes them."""
        return [parameter for layer in self.layers().values() for parameter in layer]


def _through_all_modules(choice: RouteChoice, n_nets: int, x: Tensor, cfg: NetConfig) -> RouteChoice:
    """The same choice, but that route i keeps source i-1 first. Routes that are given stay: they were chosen so."""
    if choice.mode == "given":
        return choice
    scores = x.new_zeros(n_nets, len(x), cfg.n_logits)
    if choice.noise is not None:
        assert choice.temperature is not None
        scores += choice.temperature[:, None] * choice.noise
    last = torch.arange(1, cfg.n_modules + 1, device=x.device).cumsum(0) - 1  # of each route, in the packed row
    scores[..., last] = torch.finfo(x.dtype).max / 2  # no logit comes near, and the sum stays finite
    return RouteChoice.sampled(x.new_ones(len(x)), scores)
