"""A network's forward pass and its backward, without autograd where the network is one operation: gradients of the
parameters are written where they are wanted, and nothing is kept that no backward needs."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from d2r_fast.nets.d2r import RouteChoice, RoutedNetwork
from d2r_fast.ops.routed_network import backward, forward


class Pass(Protocol):
    """What a forward pass leaves: its output [E,B,n_out], and how to go back through it once."""

    out: Tensor

    def to_input(self, d_out: Tensor) -> Tensor:
        """The gradient at x [B,n_in], summed over the networks; parameters get none."""

    def to_parameters(self, d_out: Tensor, gradients: Sequence[Tensor]) -> None:
        """Write the parameters' gradients, in the order of `net.parameters()`, over what `gradients` holds."""


def forward_pass(net: RoutedNetwork, x: Tensor, task: Tensor, choice: RouteChoice, needs: str = "nothing") -> Pass:
    """Run `net` on x [B,n_in]; `needs` says what the backward will be asked for: "input", "parameters" or "nothing"."""
    return _Whole(net, x, task, choice, needs) if net.runs_as_one(x) else _Composed(net, x, task, choice, needs)


class _Whole:
    """On the CPU: one call each way."""

    def __init__(self, net: RoutedNetwork, x: Tensor, task: Tensor, choice: RouteChoice, needs: str):
        cfg = net.cfg
        self._net, self._parameters = net, net.in_order()
        self.out, *self._saved = forward(
            *(x, task, choice.temperature, choice.noise, choice.index, cfg.top_k, cfg.residual),
            *(cfg.resrouting and net.training, cfg.precision, needs != "nothing", self._parameters),
        )
        self._x, self._task = x, task

    def _backward(self, d_out: Tensor, to_x: bool, gradients: list[Tensor]) -> Tensor:
        cfg = self._net.cfg
        inputs: list[Any] = [d_out, None, self._x, self._task, self._parameters, *self._saved]
        d_x: Tensor = backward(*inputs, cfg.residual, cfg.precision, to_x, gradients)
        return d_x

    def to_input(self, d_out: Tensor) -> Tensor:
        return self._backward(d_out, True, [])

    def to_parameters(self, d_out: Tensor, gradients: Sequence[Tensor]) -> None:
        by_parameter: dict[Tensor, Tensor] = dict(zip(self._net.parameters(), gradients, strict=True))
        self._backward(d_out, False, [by_parameter[p] for p in self._parameters])


class _Composed:
    """Elsewhere: autograd over the network's operations."""

    def __init__(self, net: RoutedNetwork, x: Tensor, task: Tensor, choice: RouteChoice, needs: str):
        self._net = net
        self._x = x.contiguous().detach().requires_grad_(needs == "input")  # its place may be written to meanwhile
        with torch.set_grad_enabled(needs != "nothing"):
            if needs == "parameters":
                out, _ = net(self._x, task, choice)
            else:
                constant = {name: parameter.detach() for name, parameter in net.named_parameters()}
                out, _ = functional_call(net, constant, (self._x, task, choice))
        self._out, self.out = out, out.detach()

    def to_input(self, d_out: Tensor) -> Tensor:
        return torch.autograd.grad(self._out, self._x, d_out)[0]

    def to_parameters(self, d_out: Tensor, gradients: Sequence[Tensor]) -> None:
        parameters = list(self._net.parameters())
        found = torch.autograd.grad(self._out, parameters, d_out, materialize_grads=True)
        torch._foreach_copy_(list(gradients), found)
