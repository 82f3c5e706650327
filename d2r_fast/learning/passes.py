"""A network's forward pass and its backward over the rows of an update: gradients of the parameters are written where
they are wanted, and nothing is kept that no backward needs."""

from typing import Any, Protocol

import torch
from torch import Tensor

from d2r_fast.learning.beside import Beside
from d2r_fast.learning.layered import LayeredPass, Plan
from d2r_fast.learning.parameters import FlatParameters
from d2r_fast.nets.agent import run
from d2r_fast.nets.d2r import GREEDY, RouteChoice, RoutedNetwork
from d2r_fast.nets.network import UnroutedNetwork
from d2r_fast.ops.backends import choose_backend
from d2r_fast.ops.routed_network import backward, forward


class Pass(Protocol):
    """What a forward pass leaves: its output [E,R,n_out], and how to go back through it once."""

    out: Tensor

    def backward(self, d_out: Tensor) -> Tensor | None:
        """From d_out [E,n,n_out], of the first n rows.

        The rows that the choice of routes was for give the parameters their gradient, written over what was there, at
        the latest when the network's `beside` is joined, until when the pass must live. To rows after them parameters
        are constant: returned is the gradient at their x, summed over the networks, if d_out reaches to them.
        """


class Network:
    """Runs passes through one network; made once, for what every pass looks up.

    beside      for the gradients of parameters, which a backward does not wait for
    parameters  as `RoutedNetwork.in_order`, or simply in order
    gradients   of each, where a backward writes: views of `flat_gradient`; none unless `trained`
    """

    def __init__(
        self, net: RoutedNetwork | UnroutedNetwork, flat: FlatParameters, beside: Beside, trained: bool = True
    ):
        self.net: Any = net  # of the kind that a pass is for
        in_order = net.in_order() if isinstance(net, RoutedNetwork) else net.parameters()
        self.parameters: list[Tensor] = list(in_order)
        self._flat, self._beside = flat, beside
        self.gradients = flat.gradients(self.parameters) if trained else []
        self._kinds: dict[int, type[Pass]] = {}
        self._plans: dict[tuple[int, ...], Plan] = {}

    def forward(self, x: Tensor, task: Tensor, choice: RouteChoice = GREEDY, n_back: int = 0) -> Pass:
        """Run x [R,n_in] of tasks [R] int64. The first rows route by `choice`, as many as it holds routes or noise for;
        the rest is greedy. A backward goes through the first `n_back` rows; 0: there will be none.

        Either kind of rows is in task order, as many of each task. A network without routes has only one way, but there
        too `choice` says how many rows are of the first kind: it holds as many routes of no module.
        """
        kind = self._kind_of(x)
        if kind is LayeredPass:
            return self._forward_layered(x, task, choice, n_back, [])
        return kind(self, x, task, choice, n_back)  # type: ignore[call-arg]

    def forward_beside(
        self, x: Tensor, task: Tensor, choice: RouteChoice, n_back: int, other: "Network", x_of_other: Tensor
    ) -> tuple[Pass, Tensor]:
        """`forward`, and the output [E,n,n_out] of another network of equal sizes, greedily over x_of_other [n,n_in],
        which lies in the same memory as x; of as many rows as `choice` is for, and of the same tasks."""
        if self._kind_of(x) is LayeredPass is other._kind_of(x_of_other):
            both = self._forward_layered(x, task, choice, n_back, [(other.net, x_of_other)])
            return both, both.out_beside
        return self.forward(x, task, choice, n_back), other.forward(x_of_other, task[: len(x_of_other)]).out

    def _forward_layered(
        self, x: Tensor, task: Tensor, choice: RouteChoice, n_back: int, beside: list[tuple[RoutedNetwork, Tensor]]
    ) -> LayeredPass:
        n_rows = _rows_of(choice) or len(x)
        sizes = (n_rows, n_back, x.stride(0), *(part for net, rows in [(self.net, x), *beside] for part in rows.shape))
        plan = self._plans.get(sizes)
        if plan is None:
            nets = [(self.net, x), *beside]
            plan = self._plans[sizes] = Plan(self._flat, nets, n_rows, n_back // n_rows)
        return LayeredPass(plan, self._flat, self._beside, x, task, choice)

    def runs_as_one(self, x: Tensor) -> bool:
        """Whether a pass over rows like x is one call of `routed_network`."""
        return isinstance(self.net, RoutedNetwork) and self.net.runs_as_one(x)

    def _kind_of(self, x: Tensor) -> type[Pass]:
        kind = self._kinds.get(len(x))
        if kind is None:  # who hooks a layer later is not seen: looking costs more than a small layer
            kind = self._kinds[len(x)] = self._kind_for(x)
        return kind

    def _kind_for(self, x: Tensor) -> type[Pass]:
        if self.runs_as_one(x):
            return _Whole
        return LayeredPass if isinstance(self.net, RoutedNetwork) and _runs_layered(self.net, x) else _Composed


def _rows_of(choice: RouteChoice) -> int:
    """How many rows a choice is for."""
    chosen = choice.noise if choice.noise is not None else choice.index
    return 0 if chosen is None else chosen.shape[1]


class _Whole:
    """On the CPU: one call each way."""

    def __init__(self, network: Network, x: Tensor, task: Tensor, choice: RouteChoice, n_back: int):
        self._network, self._x, self._task, self._n_chosen = network, x, task, _rows_of(choice)
        cfg = network.net.cfg
        self.out, *self._saved = forward(
            *(x, task, choice.temperature, choice.noise, choice.index, cfg.top_k, cfg.residual),
            *(cfg.resrouting and network.net.training, cfg.precision, n_back, network.parameters),
        )

    def backward(self, d_out: Tensor) -> Tensor | None:
        network, cfg, n = self._network, self._network.net.cfg, self._n_chosen
        d_x: Tensor = backward(
            *(d_out, None, self._x, self._task, network.parameters, *self._saved),
            *(cfg.residual, cfg.precision, n, n, network.gradients),
        )
        return d_x if d_out.shape[1] > n else None


def _runs_layered(net: RoutedNetwork, x: Tensor) -> bool:
    cfg = net.cfg
    return net.is_plain(x) and choose_backend(cfg.backend, x, cfg.module_width, cfg.precision) == "triton"


class _Composed:
    """Elsewhere: autograd over the network's operations, for either kind of rows."""

    def __init__(self, network: Network, x: Tensor, task: Tensor, choice: RouteChoice, n_back: int):
        self._network, self._n_chosen, net = network, _rows_of(choice), network.net
        n = self._n_chosen
        outs = []
        if n:
            with torch.set_grad_enabled(n_back > 0):
                # Copied: its place may be written to meanwhile.
                outs.append(run(net, x[:n].clone(), task[:n], choice, in_task_order=True)[0])
        if n < len(x):
            constant = {name: parameter.detach() for name, parameter in net.named_parameters()}
            self._x = x[n:].clone().requires_grad_(n_back > n)
            with torch.set_grad_enabled(n_back > n):
                outs.append(run(net, self._x, task[n:], in_task_order=True, parameters=constant)[0])
        self._outs, self.out = outs, torch.cat([out.detach() for out in outs], 1)

    def backward(self, d_out: Tensor) -> Tensor | None:
        n = self._n_chosen
        if n:
            of_each = torch.autograd.grad(self._outs[0], self._network.parameters, d_out[:, :n], materialize_grads=True)
            torch._foreach_copy_(self._network.gradients, of_each)
        if d_out.shape[1] == n:
            return None
        return torch.autograd.grad(self._outs[-1], self._x, d_out[:, n:])[0]
