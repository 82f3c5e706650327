"""A whole network as one operation on the CPU: base, task, routing network, modules and head, forward and backward.

It computes what `RoutedNetwork.forward` composes of the other operations. One call instead of ten a pass counts where
layers are small, and a block of rows stays in the cache from one layer to the next.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2r_fast.ops.arguments import require_flag, require_tensor
from d2r_fast.ops.backends import Precision, check_precision
from d2r_fast.ops.cpp import routed_network as cpp
from d2r_fast.ops.cpp.library import MAX_WIDTH
from d2r_fast.ops.select_routes import MAX_MODULES, RouteMode, Routes, check_select_arguments


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
    n_nets, n_modules = len(parameters[0]), parameters[cpp.MODULES].shape[1] + 1
    logits_shape = (n_nets, len(x), n_modules * (n_modules + 1) // 2)
    check_select_arguments(logits_shape, x.device, k, mode, temperature, noise, index)
    keep = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    settings = (k, residual, resrouting, precision, keep)
    if torch.compiler.is_compiling():
        out, *routes = _forward(x, task, temperature, noise, index, list(parameters), *settings)
    else:
        out, *routes = _Eager.apply(x, task, temperature, noise, index, *settings, *parameters)
    gate, chosen, flow, active = routes[:4]
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
    if len(parameters) <= cpp.ROUTE or parameters[0].dim() != 3 or parameters[cpp.MODULES].dim() != 4:
        raise ValueError(
            f"parameters: expected weights [E,out,in] and, at {cpp.MODULES}, [E,N-1,D,D], {cpp.ROUTE + 2} tensors or "
            f"more, got shapes {[list(p.shape) for p in parameters]}"
        )
    n_nets, n_modules = len(parameters[0]), parameters[cpp.MODULES].shape[1] + 1
    if n_modules > MAX_MODULES:
        raise ValueError(f"parameters[{cpp.MODULES}]: expected at most {MAX_MODULES} modules, got N={n_modules}")
    for i, parameter in enumerate(parameters):  # before anything of such sizes is allocated
        if parameter.dim() < 2 or len(parameter) != n_nets or max(parameter.shape[1:]) > MAX_WIDTH:
            raise ValueError(
                f"parameters[{i}]: expected E={n_nets} networks and widths of at most {MAX_WIDTH}, got "
                f"{list(parameter.shape)}"
            )


@torch.library.custom_op("d2r_fast::routed_network", mutates_args=())
def _forward(
    x: Tensor,
    task: Tensor,
    temperature: Tensor | None,
    noise: Tensor | None,
    given: Tensor | None,
    parameters: list[Tensor],
    k: int,
    residual: bool,
    resrouting: bool,
    precision: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return cpp.forward(x, task, temperature, noise, given, parameters, k, residual, resrouting, precision, keep)


@_forward.register_fake
def _(
    x: Tensor,
    task: Tensor,
    temperature: Tensor | None,
    noise: Tensor | None,
    given: Tensor | None,
    parameters: list[Tensor],
    k: int,
    residual: bool,
    resrouting: bool,
    precision: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n_nets, rows = parameters[0].shape[0], x.shape[0]
    shape = (n_nets, rows, parameters[cpp.MODULES].shape[1] + 1, k)
    n_activations, kept_shape = cpp.saved_shapes(x, parameters, keep)
    return (
        x.new_empty(n_nets, rows, parameters[cpp.HEAD].shape[1]),
        x.new_empty(shape),
        x.new_empty(shape, dtype=torch.int32),
        x.new_empty(shape, dtype=torch.bool),
        x.new_empty(shape[:2], dtype=torch.int32),
        x.new_empty(n_activations),
        x.new_empty(kept_shape),
        x.new_empty(kept_shape, dtype=torch.bool),
    )


@torch.library.custom_op("d2r_fast::routed_network_backward", mutates_args=())
def _backward(
    d_out: Tensor,
    to_gate: Tensor | None,
    x: Tensor,
    task: Tensor,
    parameters: list[Tensor],
    gate: Tensor,
    index: Tensor,
    flow: Tensor,
    active: Tensor,
    activations: Tensor,
    h: Tensor,
    opened: Tensor,
    residual: bool,
    precision: str,
    to_x: bool,
    to_parameters: bool,
) -> tuple[Tensor, list[Tensor]]:
    saved = (gate, index, flow, active, activations, h, opened)
    return cpp.backward(d_out, to_gate, x, task, parameters, *saved, residual, precision, to_x, to_parameters)


@_backward.register_fake
def _(
    d_out: Tensor,
    to_gate: Tensor | None,
    x: Tensor,
    task: Tensor,
    parameters: list[Tensor],
    gate: Tensor,
    index: Tensor,
    flow: Tensor,
    active: Tensor,
    activations: Tensor,
    h: Tensor,
    opened: Tensor,
    residual: bool,
    precision: str,
    to_x: bool,
    to_parameters: bool,
) -> tuple[Tensor, list[Tensor]]:
    d_parameters = [p.new_empty(p.shape) for p in parameters] if to_parameters else []
    return x.new_empty(x.shape if to_x else 0), d_parameters


def _save(ctx: Any, x: Tensor, task: Tensor, parameters: Sequence[Tensor], output: tuple[Tensor, ...]) -> None:
    out, gate, *rest = output
    del out
    ctx.mark_non_differentiable(*rest)
    ctx.set_materialize_grads(False)
    ctx.n_parameters = len(parameters)
    ctx.save_for_backward(x, task, *parameters, gate, *rest)


def _differentiate(ctx: Any, d_out: Tensor | None, to_gate: Tensor | None, to_parameters: bool) -> Any:
    """d_x or None, and a list of the parameters' gradients or of None."""
    x, task, *saved = ctx.saved_tensors
    parameters, saved = saved[: ctx.n_parameters], saved[ctx.n_parameters :]
    nothing = [None] * len(parameters)
    if d_out is None and to_gate is None:
        return None, nothing
    if d_out is None:
        d_out = x.new_zeros(len(parameters[0]), len(x), parameters[cpp.HEAD].shape[1])
    to_x = ctx.needs_input_grad[0]
    run: Any = _backward if torch.compiler.is_compiling() else cpp.backward
    d_x, d_parameters = run(
        d_out, to_gate, x, task, parameters, *saved, ctx.residual, ctx.precision, to_x, to_parameters
    )
    return d_x if to_x else None, d_parameters if to_parameters else nothing


def _save_for_op(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, task, _, _, _, parameters, _, ctx.residual, _, ctx.precision, _ = inputs
    _save(ctx, x, task, parameters, output)


def _differentiate_op(ctx: Any, d_out: Tensor | None, to_gate: Tensor | None, *_: None) -> tuple[Any, ...]:
    d_x, d_parameters = _differentiate(ctx, d_out, to_gate, any(ctx.needs_input_grad[5]))
    return d_x, None, None, None, None, d_parameters, *(None,) * 5


_forward.register_autograd(_differentiate_op, setup_context=_save_for_op)


class _Eager(torch.autograd.Function):
    """The same without torch.library's bookkeeping; autograd wants the parameters one by one."""

    @staticmethod
    def forward(
        x: Tensor,
        task: Tensor,
        temperature: Tensor | None,
        noise: Tensor | None,
        given: Tensor | None,
        k: int,
        residual: bool,
        resrouting: bool,
        precision: str,
        keep: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        return cpp.forward(x, task, temperature, noise, given, parameters, k, residual, resrouting, precision, keep)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, task, _, _, _, _, ctx.residual, _, ctx.precision, _, *parameters = inputs
        _save(ctx, x, task, parameters, output)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, to_gate: Tensor | None, *_: None) -> tuple[Any, ...]:
        d_x, d_parameters = _differentiate(ctx, d_out, to_gate, any(ctx.needs_input_grad[10:]))
        return d_x, *(None,) * 9, *d_parameters
