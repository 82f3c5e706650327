"""A network's forward pass and its backward over the rows of an update: gradients of the parameters are written where
they are wanted, and nothing is kept that no backward needs."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from d2r_fast.learning.parameters import FlatParameters
from d2r_fast.nets.agent import run
from d2r_fast.nets.d2r import GREEDY, EnsembleLinear, RouteChoice, RoutedNetwork
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.ops.backends import choose_backend
from d2r_fast.ops.contract import launcher
from d2r_fast.ops.reference.products import product
from d2r_fast.ops.routed_network import backward, forward
from d2r_fast.ops.select_routes import Routes


class RowTasks(NamedTuple):
    """The tasks of the rows that a pass runs.

    index    [R]   int64
    one_hot  [R,T] float: 1 at the row's task, else 0
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    one_hot: Tensor

    @staticmethod
    def of(index: Tensor, n_tasks: int, dtype: torch.dtype) -> "RowTasks":
        return RowTasks(index, torch.nn.functional.one_hot(index, n_tasks).to(dtype))

    def first(self, n_rows: int) -> "RowTasks":
        return RowTasks(self.index[:n_rows], self.one_hot[:n_rows])


class Pass(Protocol):
    """What a forward pass leaves: its output [E,R,n_out], and how to go back through it once."""

    out: Tensor

    def backward(self, d_out: Tensor) -> Tensor | None:
        """From d_out [E,n,n_out], of the first n rows.

        The rows that the choice of routes was for give the parameters their gradient, written over what was there. To
        rows after them parameters are constant: returned is the gradient at their x, summed over the networks, if d_out
        reaches to them.
        """


class Network:
    """Runs passes through one network; made once, for what every pass looks up.

    parameters  as `RoutedNetwork.in_order`, or simply in order
    gradients   of each, where a backward writes: views of `flat_gradient`; none unless `trained`
    """

    def __init__(self, net: RoutedNetwork | UnroutedNetwork, flat: FlatParameters, trained: bool = True):
        self.net: Any = net  # of the kind that a pass is for
        in_order = net.in_order() if isinstance(net, RoutedNetwork) else net.parameters()
        self.parameters: list[Tensor] = list(in_order)
        self.flat_gradient = flat.gradient
        self.gradients = flat.gradients(self.parameters) if trained else []
        self.gradient_of: dict[Tensor, Tensor] = dict(zip(self.parameters, self.gradients, strict=False))
        self.bias_places: Tensor | None = None  # made by `_Layered`
        self._kinds: dict[int, type[Pass]] = {}

    def forward(self, x: Tensor, tasks: RowTasks, choice: RouteChoice = GREEDY, n_back: int = 0) -> Pass:
        """Run x [R,n_in]. The first rows route by `choice`, as many as it holds routes or noise for; the rest is
        greedy. A backward goes through the first `n_back` rows; 0: there will be none.

        Either kind of rows is in task order, as many of each task. A network without routes has only one way, but there
        too `choice` says how many rows are of the first kind: it holds as many routes of no module.
        """
        kind = self._kinds.get(len(x))
        if kind is None:  # who hooks a layer later is not seen: looking costs more than a small layer
            kind = self._kinds[len(x)] = self._kind_for(x)
        return kind(self, x, tasks, choice, n_back)  # type: ignore[call-arg]

    def runs_as_one(self, x: Tensor) -> bool:
        """Whether a pass over rows like x is one call of `routed_network`."""
        return isinstance(self.net, RoutedNetwork) and self.net.runs_as_one(x)

    def _kind_for(self, x: Tensor) -> type[Pass]:
        if self.runs_as_one(x):
            return _Whole
        return _Layered if isinstance(self.net, RoutedNetwork) and _runs_layered(self.net, x) else _Composed


def _rows_of(choice: RouteChoice) -> int:
    """How many rows a choice is for."""
    chosen = choice.noise if choice.noise is not None else choice.index
    return 0 if chosen is None else chosen.shape[1]


class _Whole:
    """On the CPU: one call each way."""

    def __init__(self, network: Network, x: Tensor, tasks: RowTasks, choice: RouteChoice, n_back: int):
        self._network, self._x, self._task, self._n_chosen = network, x, tasks.index, _rows_of(choice)
        cfg = network.net.cfg
        self.out, *self._saved = forward(
            *(x, tasks.index, choice.temperature, choice.noise, choice.index, cfg.top_k, cfg.residual),
            *(cfg.resrouting and network.net.training, cfg.precision, n_back, network.parameters),
        )

    def backward(self, d_out: Tensor) -> Tensor | None:
        network, cfg, n = self._network, self._network.net.cfg, self._n_chosen
        d_x: Tensor = backward(
            *(d_out, None, self._x, self._task, network.parameters, *self._saved),
            *(cfg.residual, cfg.precision, n, n, network.gradients),
        )
        return d_x if d_out.shape[1] > n else None


_split_base, _split_base_backward = launcher("layers", "split_base"), launcher("layers", "split_base_backward")
_bias_gradient = launcher("layers", "bias_gradient")
_select_routes, _select_routes_backward = (launcher("select_routes", way) for way in ("forward", "backward"))
_routed_modules, _routed_modules_backward = (launcher("routed_modules", way) for way in ("forward", "backward"))


def _runs_layered(net: RoutedNetwork, x: Tensor) -> bool:
    cfg = net.cfg
    return net.is_plain(x) and choose_backend(cfg.backend, x, cfg.module_width, cfg.precision) == "triton"


class _Layered:
    """On a GPU: layer by layer, the products as torch's; between them as few launches as can be."""

    def __init__(self, network: Network, x: Tensor, tasks: RowTasks, choice: RouteChoice, n_back: int):
        self._network, self._n_chosen = network, _rows_of(choice)
        net: Any = network.net  # whose lists of layers have no type
        cfg = net.cfg
        self._one_hot = tasks.one_hot.expand(net.n_nets, *tasks.one_hot.shape)
        self._x = x.expand(net.n_nets, *x.shape)
        self._base0 = self._linear(net.base[0], self._x, relu=True)  # [E,R,H]
        self._f = self._linear(net.base[1], self._base0)
        self._g = torch.baddbmm(net.task.bias[:, None], self._one_hot, net.task.weight.mT)
        scaled, self._opened_f = _split_base(self._f, self._g)
        self._route = [scaled]
        for layer in net.route[:-1]:
            self._route.append(self._linear(layer, self._route[-1], relu=True))
        logits = self._linear(net.route[-1], self._route[-1])
        gate, index, flow, active = _select_routes(
            *(logits, choice.temperature, choice.noise, choice.index, cfg.top_k, cfg.n_modules),
            cfg.resrouting and net.training,
        )
        self._routes = Routes(index, gate, flow, active)
        self._h0 = self._linear(net.module0, self._opened_f, relu=True)  # [E,R,D]
        self._mixed, self._h, self._opened = _routed_modules(
            *(self._h0, net.module_weight, net.module_bias, self._routes, cfg.residual, cfg.precision, n_back > 0)
        )
        self.out = self._linear(net.head, self._mixed)

    def _linear(self, layer: EnsembleLinear, x: Tensor, relu: bool = False) -> Tensor:
        y = product(x, layer.weight.mT, self._network.net.cfg.precision, layer.bias[:, None])
        return y.relu_() if relu else y

    def backward(self, d_out: Tensor) -> Tensor | None:
        net: Any = self._network.net
        precision, n, n_back = net.cfg.precision, self._n_chosen, d_out.shape[1]
        gradient = self._network.gradient_of
        # Gradients before each layer's ReLU stand side by side, for one launch to sum them all over the rows.
        layers = [*net.base, net.task, net.module0, net.head, *net.route]
        widths = [layer.weight.shape[1] for layer in layers]
        d_z_all = d_out.new_empty(net.n_nets, n_back, sum(widths))
        d_z = dict(zip(layers, d_z_all.split(widths, -1), strict=True))

        def through_relu(layer: EnsembleLinear, d_y: Tensor, y: Tensor) -> None:
            torch.ops.aten.threshold_backward(d_y, y[:, :n_back], 0, grad_input=d_z[layer])

        def to_weight(layer: EnsembleLinear, x: Tensor, precision: str = precision) -> None:
            product(d_z[layer][:, :n].mT, x[:, :n], precision, out=gradient[layer.weight])

        def to_input(layer: EnsembleLinear) -> Tensor:
            return product(d_z[layer], layer.weight, precision)

        d_z[net.head].copy_(d_out)
        to_weight(net.head, self._mixed)
        d_h0, *_, d_gate = _routed_modules_backward(
            *(to_input(net.head), net.module_weight, self._h, self._opened, self._routes, net.cfg.residual, precision),
            *(True, None, n, gradient[net.module_weight], gradient[net.module_bias]),
        )
        through_relu(net.module0, d_h0, self._h0)
        to_weight(net.module0, self._opened_f)
        _select_routes_backward(d_gate, self._routes.index, self._routes.gate, d_z[net.route[-1]])
        for i in range(len(net.route) - 1, 0, -1):
            to_weight(net.route[i], self._route[i])
            through_relu(net.route[i - 1], to_input(net.route[i]), self._route[i])
        to_weight(net.route[0], self._route[0])
        _split_base_backward(
            to_input(net.route[0]), to_input(net.module0), self._f, self._g, d_z[net.base[1]], d_z[net.task]
        )
        to_weight(net.task, self._one_hot, "float32")  # of a weight whose rows are taken as they are
        to_weight(net.base[1], self._base0)
        through_relu(net.base[0], to_input(net.base[1]), self._base0)
        to_weight(net.base[0], self._x)
        _bias_gradient(d_z_all, self._bias_places(layers), self._network.flat_gradient, n)
        if n_back == n:
            return None
        return product(d_z[net.base[0]][:, n:], net.base[0].weight, precision).sum(0)

    def _bias_places(self, layers: list[EnsembleLinear]) -> Tensor:
        """Where each column's sum goes in the flat gradient, [E,W]."""
        if self._network.bias_places is None:
            base = self._network.flat_gradient.storage_offset()
            biases = [self._network.gradient_of[layer.bias] for layer in layers]
            places: list[Any] = [
                torch.arange(b.numel()).view(b.shape) + (int(b.storage_offset()) - base) for b in biases
            ]
            self._network.bias_places = torch.cat(places, 1).to(self._x.device)
        return self._network.bias_places


class _Composed:
    """Elsewhere: autograd over the network's operations, for either kind of rows."""

    def __init__(self, network: Network, x: Tensor, tasks: RowTasks, choice: RouteChoice, n_back: int):
        self._network, self._n_chosen, net = network, _rows_of(choice), network.net
        n = self._n_chosen
        outs = []
        if n:
            with torch.set_grad_enabled(n_back > 0):
                # Copied: its place may be written to meanwhile.
                outs.append(run(net, x[:n].clone(), tasks.index[:n], choice, in_task_order=True)[0])
        if n < len(x):
            constant = {name: parameter.detach() for name, parameter in net.named_parameters()}
            self._x = x[n:].clone().requires_grad_(n_back > n)
            with torch.set_grad_enabled(n_back > n):
                outs.append(run(net, self._x, tasks.index[n:], in_task_order=True, parameters=constant)[0])
        self._outs, self.out = outs, torch.cat([out.detach() for out in outs], 1)

    def backward(self, d_out: Tensor) -> Tensor | None:
        n = self._n_chosen
        if n:
            of_each = torch.autograd.grad(self._outs[0], self._network.parameters, d_out[:, :n], materialize_grads=True)
            torch._foreach_copy_(self._network.gradients, of_each)
        if d_out.shape[1] == n:
            return None
        return torch.autograd.grad(self._outs[-1], self._x, d_out[:, n:])[0]
