"""A pass through D2R networks on a GPU: layer by layer, one launch a layer for all of them, forward and backward.

Networks of equal sizes over sets of as many rows run as one: both critics at the actions taken and at the actor's, and
their targets beside them, are six members of one pass. What the layers read and gave lies in one buffer, their
gradients in another, so that a table made once can say which products are the parameters' gradients: one launch. In
bf16 both buffers hold that: what products read is rounded once, when it is written.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2r_fast.learning.beside import Beside
from d2r_fast.learning.parameters import FlatParameters, aligned
from d2r_fast.nets.d2r import RouteChoice, RoutedNetwork
from d2r_fast.ops.contract import launcher
from d2r_fast.ops.layer_gradients import Product, Rows, Sum
from d2r_fast.ops.select_routes import Routes

_linear, _linear_backward = (launcher("ensemble_linear", way) for way in ("forward_at", "backward_at"))
_split_base, _split_base_backward = (launcher("layers", way) for way in ("split_base", "split_base_backward"))
_select_routes, _select_routes_backward = (launcher("select_routes", way) for way in ("forward", "backward_at"))
_routed_modules, _routed_modules_backward = (launcher("routed_modules", way) for way in ("forward", "backward_at"))
_order_if_many = launcher("routed_modules", "order_if_many")
_modules_gradient = launcher("weight_gradient", "weight_gradient")
_gradient_table, _network_gradient = (launcher("network_gradient", f) for f in ("gradient_table", "network_gradient"))


class Member(NamedTuple):
    """One network over one set of rows, which begin at number `x_at` from the first member's."""

    net: RoutedNetwork
    number: int
    x_at: int


class Pieces:
    """Parts [members,B,width] of one buffer, by name."""

    def __init__(self, n_members: int, n_rows: int, widths: dict[str, int]):
        self._widths, self._shape = widths, (n_members, n_rows)
        self._begin: dict[str, int] = {}
        self.size = 0
        for name, width in widths.items():
            self._begin[name] = self.size
            self.size += aligned(n_members * n_rows * width)

    def of(self, buffer: Tensor) -> dict[str, Tensor]:
        n_members, n_rows = self._shape
        return {
            name: buffer[self._begin[name] :][: n_members * n_rows * width].view(n_members, n_rows, width)
            for name, width in self._widths.items()
        }

    def at(self, name: str, member: int) -> int:
        """Where a member's part begins."""
        return self._begin[name] + member * self._shape[1] * self._widths[name]


class Plan:
    """Where everything of a pass lies; made once for its sizes.

    n_sets, n_back  sets of rows of the network that is trained: all of them, and those that a backward goes through,
                    all as well or, of a single network, the first ones
    own             where in `flat.all` the networks' parameters lie
    place           by layer: where each member's weight, bias and rows begin, [M,3] int64
    gradients       of all layers but the modules; none if there is no backward
    """

    def __init__(self, flat: FlatParameters, nets: list[tuple[RoutedNetwork, Tensor]], n_rows: int, n_back: int):
        (net, x), *_ = nets
        cfg: Any = net.cfg
        self.n_rows, self.n_sets, self.n_back = n_rows, len(x) // n_rows, n_back
        self.members = [
            Member(owner, number, int(rows.storage_offset() - x.storage_offset()) + at * x.stride(0))
            for owner, rows in nets
            for number in range(owner.n_nets)
            for at in range(0, len(rows), n_rows)
        ]
        hidden = {f"route{i}": width for i, width in enumerate(cfg.route_widths)}
        base, modules = cfg.base_width, cfg.module_width
        self.layers = net.layers()
        ends = [(int(p.storage_offset()), p.numel()) for owner, _ in nets for p in owner.parameters()]
        self.own = slice(min(begin for begin, _ in ends), max(begin + n for begin, n in ends))
        self.kept = Pieces(
            len(self.members),
            n_rows,
            {"base0": base, "scaled": base, "opened": base, **hidden, "mixed": modules},
        )
        last = {f"route{len(hidden)}": cfg.n_logits, "head": self.layers["head"][0].shape[-2]}
        self.d_z = Pieces(
            net.n_nets * n_back,
            n_rows,
            {"base0": base, "base1": base, "task": base, **hidden, **last, "module0": modules},
        )
        places = {name: torch.tensor([self._place(m, name) for m in self.members]) for name in self.layers}
        self.place = {name: place.to(x.device) for name, place in places.items()}
        self.gradients: list[Product | Sum] = self._gradients(flat, *nets[0]) if n_back else []
        # What the launch computes that writes them.
        self.table: Any = _gradient_table(x, self.gradients, cfg.precision, n_rows) if n_back else None

    def _place(self, member: Member, name: str) -> list[int]:
        weight, bias = member.net.layers()[name]
        of_layer = [int(p.storage_offset()) + member.number * p[0].numel() for p in (weight, bias)]
        own = self.members.index(member) * self.n_rows * weight.shape[-1]
        return [*of_layer, member.x_at if name == "base0" else own]

    def _gradients(self, flat: FlatParameters, net: RoutedNetwork, x: Tensor) -> list[Product | Sum]:
        """Of the first set of every network: parameters are constant for the others."""
        reads = {"base1": "base0", "module0": "opened", "head": "mixed", "route0": "scaled"}
        reads |= {f"route{i}": f"route{i - 1}" for i in range(1, len(net.route))}
        gradients: list[Product | Sum] = []
        for number in range(net.n_nets):
            member, back = number * self.n_sets, number * self.n_back
            for name, (weight, bias) in self.layers.items():
                if name == "modules":  # whose gradient is a launch of its own
                    continue
                n_out, n_in = weight.shape[-2:]
                to_weight, to_bias = (flat.place(p) + number * p[0].numel() for p in (weight, bias))
                d_z = Rows(self.d_z.at(name, back), n_out)
                gradients.append(Sum(d_z, 0, self.n_rows, to_bias, 1))
                if name == "task":  # its product with the one-hot tasks: of rows in task order, a sum a task
                    n = self.n_rows // net.n_tasks
                    gradients += [Sum(d_z, t * n, n, to_weight + t, n_in) for t in range(n_in)]
                elif name == "base0":
                    gradients.append(Product(d_z, True, self.members[member].x_at, x.stride(0), n_in, to_weight))
                else:
                    gradients.append(Product(d_z, False, self.kept.at(reads[name], member), n_in, n_in, to_weight))
        return gradients


class LayeredPass:
    """One pass, as `d2r_fast.learning.passes.Pass`: `out` [E,R,n_out] of the first of its networks; `out_beside` of the
    second, of equal sizes, if there is one: greedy, and without a backward."""

    def __init__(self, plan: Plan, flat: FlatParameters, beside: Beside, x: Tensor, task: Tensor, choice: RouteChoice):
        self._plan, self._flat, self._beside, self._x, self._task = plan, flat, beside, x, task
        self._learns = choice.noise is not None or choice.index is not None  # from the first set of rows
        member = plan.members[0]
        net, n, n_members = member.net, plan.n_rows, len(plan.members)
        cfg, self._all, place = net.cfg, flat.all, plan.place
        self._weights = flat.operands(cfg.precision, plan.own)
        self._buffer = x.new_empty(plan.kept.size, dtype=self._weights.dtype)
        kept = self._kept = plan.kept.of(self._buffer)

        def linear(name: str, given: Tensor, relu: bool = False, y: Tensor | None = None) -> Tensor:
            weight = plan.layers[name][0]
            n_out, n_in = weight.shape[-2:]
            y = x.new_empty(n_members, n, n_out) if y is None else y
            _linear(given, self._weights, self._all, place[name], y, n_in, given.stride(-2), relu, cfg.precision)
            return y

        linear("base0", x, True, kept["base0"])
        self._f = x.new_empty(kept["scaled"].shape)
        _split_base(
            *(kept["base0"], self._weights, self._all, place["base1"], place["task"], task, net.n_tasks),
            *(self._f, kept["scaled"], kept["opened"], cfg.precision),
        )
        read, n_hidden = kept["scaled"], len(cfg.route_widths)
        for i in range(n_hidden):
            read = linear(f"route{i}", read, True, kept[f"route{i}"])
        logits = linear(f"route{n_hidden}", read)
        # Of as many rows a network as the first: its first set chooses, and the sets beside it never do.
        gate, index, flow, active = _select_routes(
            *(logits.view(-1, plan.n_sets * n, cfg.n_logits), choice.temperature, choice.noise, choice.index),
            *(cfg.top_k, cfg.n_modules, cfg.resrouting and net.training),
        )
        self._routes = Routes(*(v.view(n_members, n, *v.shape[2:]) for v in (index, gate, flow, active)))
        self._order = _order_if_many(self._routes.active)
        module0 = linear("module0", kept["opened"], True)
        _, self._h, self._opened = _routed_modules(
            *(module0, self._weights, self._all, self._routes, cfg.residual, cfg.precision, plan.n_back > 0),
            *(self._order, place["modules"], kept["mixed"]),
        )
        out = linear("head", kept["mixed"])
        own = net.n_nets * plan.n_sets
        self.out = out[:own].view(net.n_nets, plan.n_sets * n, -1)
        self.out_beside = out[own:].view(net.n_nets, -1, out.shape[-1])

    def backward(self, d_out: Tensor) -> Tensor | None:
        """As `Pass.backward`. The gradients of the parameters are made beside what follows, until `Beside.join`."""
        plan, flat, kept, place = self._plan, self._flat, self._kept, self._plan.place
        net = plan.members[0].net
        cfg, n, precision = net.cfg, plan.n_rows, net.cfg.precision
        n_members = net.n_nets * plan.n_back
        buffer = self._buffer.new_empty(plan.d_z.size)
        d_z = plan.d_z.of(buffer)
        d_z["head"].copy_(d_out.reshape(n_members, n, -1))

        def fresh(width: int) -> Tensor:
            return self._f.new_empty(n_members, n, width)

        def to_input(name: str, d_y: Tensor, d_x: Tensor, x: Tensor | None = None) -> Tensor:
            """x: a ReLU gave what the layer reads, and d_x is in front of it."""
            _linear_backward(d_y, self._weights, place[name], x, d_x, precision)
            return d_x

        d_mixed = to_input("head", d_z["head"], fresh(cfg.module_width))
        d_gate = fresh(cfg.n_modules * cfg.top_k).view(n_members, n, cfg.n_modules, cfg.top_k)
        adjoint = _routed_modules_backward(
            *(d_mixed, self._weights, place["modules"], self._h, self._opened, self._routes, cfg.residual, precision),
            *(self._order, d_z["module0"], d_gate, True),
        )
        index, gate, _, active = self._routes
        self._read_beside = adjoint, buffer  # held until the branches are joined, see `Beside`
        if self._learns:
            with self._beside.branch():
                _modules_gradient(
                    *(adjoint, self._opened, self._h, index, gate, active, precision),
                    *(flat.view(flat.gradient, parameter) for parameter in plan.layers["modules"]),
                )
        last = len(cfg.route_widths)
        _select_routes_backward(d_gate, index, gate, active, d_z[f"route{last}"])
        for i in range(last, 0, -1):
            name, before = f"route{i}", f"route{i - 1}"
            to_input(name, d_z[name], d_z[before], kept[before])
        d_scaled = to_input("route0", d_z["route0"], fresh(cfg.base_width))
        _split_base_backward(
            *(d_z["module0"], self._weights, place["module0"], d_scaled, self._f, self._all, place["task"]),
            *(self._task, net.n_tasks, d_z["base1"], d_z["task"], precision),
        )
        to_input("base1", d_z["base1"], d_z["base0"], kept["base0"])
        to_x = range(1 if self._learns else 0, plan.n_back)
        d_x = self._f.new_empty(len(to_x) * n, net.n_in)
        for at, i in enumerate(to_x):
            own, of_set = d_x[at * n :][:n], range(i, n_members, plan.n_back)
            # Rows of so odd a width are copied 4 bytes at a time, which takes numbers of 4 bytes: not bfloat16.
            _linear_backward(d_z["base0"], self._all, place["base0"], None, own, precision, of_set)
        if self._learns:  # after that launch, which would be several times as long beside this one
            with self._beside.branch():
                _network_gradient(flat.gradient, plan.table, self._buffer, self._x, buffer)
        return d_x if len(to_x) > 0 else None
