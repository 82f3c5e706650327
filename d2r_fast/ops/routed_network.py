"""A whole network as one operation on the CPU: base, task, routing network, modules and head, forward and backward.

It computes what `RoutedNetwork.forward` composes of the other operations. One call instead of ten a pass counts where
layers are small, and a block of rows stays in the cache from one layer to the next.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2r_fast.ops.arguments import require_flag, require_tensor
from d2r_fast.ops.backends import Precision, check_precision
from d2r_fast.ops.contract import Run, define, differentiable, without_autograd
from d2r_fast.ops.cpp.library import MAX_WIDTH
from d2r_fast.ops.select_routes import MAX_MODULES, RouteMode, Routes, check_select_arguments

# Where a network's parameters stand in the list, weight then bias of each; the routing network's come last.
BASE, MODULES, HEAD, ROUTE = 0, 8, 10, 12


def routed_network(
    x: Tensor,
    task: Tensor,
    parameters: Sequence[Tensor],
    k: int,
    mode: RouteMode = "greedy",
    temperature: Tensor | None = None,
    noise: Tensor | None = None,
    index: Tensor | None = None,
    residual: bool = True,
    resrouting: bool = True,
    precision: Precision = "float32",
) -> tuple[Tensor, Routes]:
    """E networks over the same rows (see `RoutedNetwork`): out [E,B,n_out] and the routes they took.

    x          [B,n_in] float32 or float64, on the CPU
    task       [B] integer; a number outside 0..T-1 adds nothing to the task layer's bias
    parameters weight and bias of each layer, as `ensemble_linear` and `routed_modules` take them, in this order: both
               base layers, task, module 0, modules 1..N-1, head, and the routing network's layers, first to last
    k, mode, temperature, noise, index, resrouting: as in `select_routes`; residual, precision: as in `routed_modules`

    Differentiable once, in x, the parameters, and through the routes' gates.
    ValueError: an argument that does not fit the mode, a source in `index` that its route may not read, or parameters
    that do not fit x or each other. TypeError: an argument of another kind.
    """
    require_tensor("x", x, "float")
    require_tensor("task", task, "integer")
    check_precision(precision)
    require_flag("residual", residual)
    require_flag("resrouting", resrouting)
    _check_parameters(parameters)
    if x.dim() != 2 or task.shape != x.shape[:1]:
        raise ValueError(f"x, task: expected [B,n_in] and [B], got {list(x.shape)} and {list(task.shape)}")
    if not (x.is_cpu and task.is_cpu):
        raise ValueError(f"x, task: expected tensors on cpu, got {x.device} and {task.device}")
    if x.shape[1] != parameters[0].shape[2]:
        raise ValueError(f"x: expected [B,n_in={parameters[0].shape[2]}], got {list(x.shape)}")
    n_nets, n_modules = len(parameters[0]), parameters[MODULES].shape[1] + 1
    logits_shape = (n_nets, len(x), n_modules * (n_modules + 1) // 2)
    check_select_arguments(logits_shape, x.device, k, mode, temperature, noise, index)
    keep = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    n_back = len(x) if keep else 0
    out, gate, chosen, flow, active, *_ = _run(
        "cpp", x, task, temperature, noise, index, k, residual, resrouting, precision, n_back, list(parameters)
    )
    return out, Routes(chosen, gate, flow, active)


def _check_parameters(parameters: Sequence[Tensor]) -> None:
    """What the library, which looks at shapes and dtypes, cannot look at."""
    if not hasattr(parameters, "__getitem__"):
        raise TypeError(f"parameters: expected a sequence of tensors, got {type(parameters).__name__}")
    for i, parameter in enumerate(parameters):
        if not isinstance(parameter, Tensor):
            raise TypeError(f"parameters[{i}]: expected a tensor, got {type(parameter).__name__}")
        if not parameter.is_cpu or parameter.layout is not torch.strided:
            raise ValueError(
                f"parameters[{i}]: expected a dense tensor on cpu, got {parameter.layout} on {parameter.device}"
            )
    if len(parameters) <= ROUTE or parameters[0].dim() != 3 or parameters[MODULES].dim() != 4:
        raise ValueError(
            f"parameters: expected weights [E,out,in] and, at {MODULES}, [E,N-1,D,D], {ROUTE + 2} tensors or "
            f"more, got shapes {[list(p.shape) for p in parameters]}"
        )
    n_nets, n_modules = len(parameters[0]), parameters[MODULES].shape[1] + 1
    if n_modules > MAX_MODULES:
        raise ValueError(f"parameters[{MODULES}]: expected at most {MAX_MODULES} modules, got N={n_modules}")
    for i, parameter in enumerate(parameters):  # before anything of such sizes is allocated
        if parameter.dim() < 2 or len(parameter) != n_nets or max(parameter.shape[1:]) > MAX_WIDTH:
            raise ValueError(
                f"parameters[{i}]: expected E={n_nets} networks and widths of at most {MAX_WIDTH}, got "
                f"{list(parameter.shape)}"
            )


def saved_shapes(x: Tensor, parameters: Sequence[Tensor], keep: bool) -> tuple[int, tuple[int, ...]]:
    """Numbers of the saved activations of the layers, and the shape of those of the modules; nothing unless `keep`."""
    n_nets, per_net, width = parameters[MODULES].shape[:3]
    if not keep:
        return 0, (0,)

    def stride(weight: Tensor) -> int:  # as `row_stride` in csrc/kernels.h
        return (-(-weight.shape[1] * x.itemsize // 128) * 128 + 64) // x.itemsize

    per_row = 2 * stride(parameters[BASE]) + 2 * width + sum(stride(w) for w in parameters[ROUTE:-2:2])
    return n_nets * x.shape[0] * per_row, (n_nets, per_net + 1, x.shape[0], width)


def _shapes(x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    k, n_back, parameters = rest[4], rest[8], rest[9]
    rows = parameters[0].shape[0], x.shape[0]
    shape = (*rows, parameters[MODULES].shape[1] + 1, k)
    n_activations, kept_shape = saved_shapes(x, parameters, n_back > 0)
    return (
        x.new_empty(*rows, parameters[HEAD].shape[1]),
        x.new_empty(shape),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(shape, dtype=torch.bool),
        x.new_empty(rows, dtype=torch.int32),
        x.new_empty(n_activations),
        x.new_empty(kept_shape),
        x.new_empty(kept_shape, dtype=torch.bool),
    )


def _gradient_shape(d_out: Tensor, to_gate: Tensor | None, x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(d_out.shape[1] - rest[-2], x.shape[1])


# The first rows of each network route by noise or `given`, as many as these have; the rest is greedy. gate, index, flow
# and active are those of `Routes`; what backward needs of the first `n_back` rows, empty if there are none: the layers'
# activations, h and opened as in `routed_modules`. n_back: 0, the rows that were chosen for, or all.
_forward = define(
    "routed_network(Tensor x, Tensor task, Tensor? temperature, Tensor? noise, Tensor? given, int k, bool residual, "
    "bool resrouting, str precision, int n_back, Tensor[] parameters) -> (Tensor out, Tensor gate, Tensor index, "
    "Tensor flow, Tensor active, Tensor activations, Tensor h, Tensor opened)",
    None,
    _shapes,
)
# d_out [E,n,n_out] of the first n rows. Returns d_x [n-first_to_x,n_in] of the rows from first_to_x on. d_parameters, a
# tensor for each parameter or none, is where their gradients are written, of the first `n_learning` rows. to_gate
# [E,B,N,K]: gradient that reaches `gate` by another way than `out`; None: nothing does.
_backward = define(
    "routed_network_backward(Tensor d_out, Tensor? to_gate, Tensor x, Tensor task, Tensor[] parameters, Tensor gate, "
    "Tensor index, Tensor flow, Tensor active, Tensor activations, Tensor h, Tensor opened, bool residual, "
    "str precision, int n_learning, int first_to_x, Tensor(a!)[] d_parameters) -> Tensor",
    None,
    _gradient_shape,
)
# For who wants no graph and has a place for the gradients.
forward, backward = without_autograd(_forward), without_autograd(_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, task, *_, ctx.residual, _, ctx.precision, _, parameters = inputs
    _, *kept = output
    ctx.mark_non_differentiable(*kept[1:])  # all but the gate
    ctx.set_materialize_grads(False)
    ctx.n_parameters, ctx.to_parameters = len(parameters), any(p.requires_grad for p in parameters)
    ctx.save_for_backward(x, task, *parameters, *kept)


def _differentiate(backward: Run, ctx: Any, d_out: Tensor | None, to_gate: Tensor | None, *_: None) -> tuple[Any, ...]:
    x, task, *saved = ctx.saved_tensors
    parameters, kept = saved[: ctx.n_parameters], saved[ctx.n_parameters :]
    nothing = [None] * len(parameters)
    if d_out is None and to_gate is None:
        return *(None,) * 10, nothing
    if d_out is None:
        d_out = x.new_zeros(len(parameters[0]), len(x), parameters[HEAD].shape[1])
    to_x = ctx.needs_input_grad[0]
    d_parameters = [p.new_empty(p.shape) for p in parameters] if ctx.to_parameters else []
    rows = len(x), 0 if to_x else len(x)
    d_x = backward(d_out, to_gate, x, task, parameters, *kept, ctx.residual, ctx.precision, *rows, d_parameters)
    return d_x if to_x else None, *(None,) * 9, d_parameters or nothing


_run = differentiable(_forward, _backward, _save, _differentiate)
