"""What the networks are built of: linear layers of E networks, stacks of them, and rows of several tasks.

Axis 0 of every parameter is the network: E of them, which share rows and nothing else, run as one.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from d2r_fast.nets.settings import NetConfigBase
from d2r_fast.ops import ensemble_linear
from d2r_fast.ops.layer_chain import layer_chain
from d2r_fast.ops.task_linear import task_linear


class Initial(NamedTuple):
    """How a linear layer starts: weights uniform in +-weight, biases all `bias` or, if None, like the weights."""

    weight: float
    bias: float | None = None


Initialiser = Callable[[int, int], Initial]
"""From a layer's numbers of inputs and outputs to how it starts."""


def by_outputs(n_in: int, n_out: int) -> Initial:
    """+-1/sqrt(out), biases 0.1: hidden layers of the published D2R and Soft Modules, whose code calls it fan-in."""
    return Initial(n_out**-0.5, 0.1)


def by_inputs(n_in: int, n_out: int) -> Initial:
    """+-1/sqrt(in), biases alike: PyTorch's own."""
    return Initial(n_in**-0.5)


def xavier(n_in: int, n_out: int) -> Initial:
    """+-sqrt(6/(in + out)), biases 0."""
    return Initial((6 / (n_in + n_out)) ** 0.5, 0.0)


def uniform(bound: float, bias: float | None = None) -> Initialiser:
    """+-bound, whatever the sizes."""
    return lambda n_in, n_out: Initial(bound, bias)


class EnsembleLinear(nn.Module):
    """E linear layers as one: [E,B,in] or [B,in] (shared input) -> [E,B,out], with a ReLU behind them if asked for.

    weight [E,out,in], bias [E,out]; they start as `initial` says.
    """

    def __init__(self, n_nets: int, n_in: int, n_out: int, cfg: NetConfigBase, initial: Initialiser = by_outputs):
        super().__init__()
        self.cfg = cfg
        self.weight, self.bias = _drawn((n_nets,), n_in, n_out, initial(n_in, n_out))

    def forward(self, x: Tensor, relu: bool = False) -> Tensor:
        return ensemble_linear(x, self.weight, self.bias, relu, self.cfg.backend, self.cfg.precision)


class LinearStack(nn.Module):
    """N linear layers side by side in each of E networks: weight [E,N,out,in], bias [E,N,out].

    equal  True: the N layers of a network start with the same numbers
    """

    def __init__(
        self,
        n_nets: int,
        n_layers: int,
        n_in: int,
        n_out: int,
        cfg: NetConfigBase,
        initial: Initialiser = by_outputs,
        equal: bool = False,
    ):
        super().__init__()
        self.cfg = cfg
        self.weight, self.bias = _drawn((n_nets, n_layers), n_in, n_out, initial(n_in, n_out))
        if equal:
            with torch.no_grad():
                for parameter in (self.weight, self.bias):
                    parameter.copy_(parameter[:, :1].clone().expand_as(parameter))

    def forward(self, x: Tensor) -> Tensor:
        """x [E,N,B,in], one input a layer; or [B,in], read by all -> [E,N,B,out]."""
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten(0, 1)  # E N networks
        own = x if x.dim() == 2 else x.flatten(0, 1)
        y = ensemble_linear(own, weight, bias, False, self.cfg.backend, self.cfg.precision)
        return y.unflatten(0, self.weight.shape[:2])


class Table(nn.Module):
    """weight [E,n,m] of numbers that belong to the tasks; it starts standard normal."""

    def __init__(self, n_nets: int, n: int, m: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_nets, n, m))


def _drawn(leading: tuple[int, ...], n_in: int, n_out: int, start: Initial) -> tuple[nn.Parameter, nn.Parameter]:
    weight = torch.empty(*leading, n_out, n_in).uniform_(-start.weight, start.weight)
    bias = torch.empty(*leading, n_out)
    bias = bias.uniform_(-start.weight, start.weight) if start.bias is None else bias.fill_(start.bias)
    return nn.Parameter(weight), nn.Parameter(bias)


def linear_layers(
    n_nets: int, widths: tuple[int, ...], cfg: NetConfigBase, initial: Initialiser = by_outputs
) -> nn.ModuleList:
    """Layers from each width to the next."""
    return nn.ModuleList(EnsembleLinear(n_nets, n_in, n_out, cfg, initial) for n_in, n_out in pairwise(widths))


def in_turn(layers: Iterable[nn.Module], x: Tensor, relu_behind_last: bool = False) -> Tensor:
    """`layer_chain` over layers, or over stacks of them."""
    layers = list(layers)
    cfg: NetConfigBase = layers[0].cfg  # type: ignore[assignment]  # every layer here has one
    return layer_chain(x, weights_and_biases(layers), relu_behind_last, cfg.backend, cfg.precision)


def weights_and_biases(layers: Iterable[nn.Module]) -> list[Tensor]:
    """Weight and bias of each, as operations of several layers take them."""
    return [getattr(layer, name) for layer in layers for name in ("weight", "bias")]


def multiply_adds(*layers: nn.Module) -> int:
    """Of one row through one network's share of each layer, of a stack through one of its N."""
    return sum(layer.get_parameter("weight").shape[-2:].numel() for layer in layers)


class TaskRows:
    """Rows of several tasks: what is computed once a task, spread over the rows of the task.

    task           [B] integer in [0,T). Outside of it: an IndexError on the CPU, on a GPU an assertion on the device
    n_tasks        T
    in_task_order  as in `task_linear`
    """

    def __init__(self, task: Tensor, n_tasks: int, in_task_order: bool):
        if in_task_order and len(task) % n_tasks:
            raise ValueError(f"task: expected as many rows of each of {n_tasks} tasks, got {len(task)} in task order")
        self.task, self.n_tasks, self.in_task_order = task.to(torch.int64), n_tasks, in_task_order

    def pick(self, by_task: Tensor) -> Tensor:
        """[E,T,...] -> each row's own [E,B,...]."""
        if self.in_task_order:
            return by_task.repeat_interleave(len(self.task) // self.n_tasks, 1)
        return by_task[:, self.task]

    def onehot(self, dtype: torch.dtype) -> Tensor:
        """[B,T]."""
        return (self.task[:, None] == torch.arange(self.n_tasks, device=self.task.device)).to(dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, cfg: NetConfigBase, relu: bool = False) -> Tensor:
        """`task_linear` over these rows."""
        return task_linear(x, weight, bias, self.task, self.in_task_order, relu, cfg.backend, cfg.precision)
