"""Backend `cpp` of `routed_network`."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2r_fast.ops.cpp.library import operations
from d2r_fast.ops.cpp.select_routes import readable_index

# Where a network's parameters stand in the list, weight then bias of each; the routing network's come last.
BASE, MODULES, HEAD, ROUTE = 0, 8, 10, 12


def saved_shapes(x: Tensor, parameters: Sequence[Tensor], keep: bool) -> tuple[int, tuple[int, ...]]:
    """Numbers of the saved activations of the layers, and the shape of those of the modules; nothing unless `keep`."""
    n_nets, per_net, width = parameters[MODULES].shape[:3]
    hidden, route = parameters[BASE].shape[1], sum(w.shape[1] for w in parameters[ROUTE:-2:2])
    rows = n_nets * x.shape[0]
    return (rows * (2 * hidden + 2 * width + route), (n_nets, per_net + 1, x.shape[0], width)) if keep else (0, (0,))


def rows_of_adjacent_numbers(x: Tensor) -> Tensor:
    """x [B,n_in] itself, or a copy unless each row lies in one piece: rows may be columns of a wider matrix."""
    # Not `contiguous`, which takes a matrix without rows as it is.
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.clone(memory_format=torch.contiguous_format)


def forward(
    x: Tensor,
    task: Tensor,
    temperature: Tensor | None,
    noise: Tensor | None,
    given: Tensor | None,
    parameters: Sequence[Tensor],
    k: int,
    residual: bool,
    resrouting: bool,
    precision: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [E,B,n_out]; gate, index, flow and active of `Routes`; and what backward needs: the layers' activations, h
    and opened as in `routed_modules`, or three empty tensors."""
    n_nets, rows, n_modules = len(parameters[0]), len(x), parameters[MODULES].shape[1] + 1
    shape = (n_nets, rows, n_modules, k)
    out, gate = x.new_empty(n_nets, rows, parameters[HEAD].shape[1]), x.new_empty(shape)
    index, flow = torch.empty(shape, dtype=torch.int32), torch.empty(shape, dtype=torch.bool)
    active = torch.empty(shape[:2], dtype=torch.int32)
    n_activations, kept_shape = saved_shapes(x, parameters, keep)
    activations, h = x.new_empty(n_activations), x.new_empty(kept_shape)
    opened = torch.empty(kept_shape, dtype=torch.bool)
    temperature, noise = (None if v is None else v.to(x.dtype).contiguous() for v in (temperature, noise))
    given = None if given is None else readable_index(given)
    operations().network(
        rows_of_adjacent_numbers(x),
        task.to(torch.int64).contiguous(),
        list(parameters),
        *(temperature, noise, given),
        *(residual, resrouting, precision == "bf16", keep),
        *(out, index, gate, flow, active, activations, h, opened),
    )
    return out, gate, index, flow, active, activations, h, opened


def backward(
    d_out: Tensor,
    to_gate: Tensor | None,
    x: Tensor,
    task: Tensor,
    parameters: Sequence[Tensor],
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
    d_parameters: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """d_x [B,n_in], empty unless `to_x`; a gradient for each parameter, or none unless `to_parameters`.

    to_gate [E,B,N,K]: gradient that reaches `gate` by another way than `out`; None: nothing does.
    d_parameters: where the parameters' gradients are written; None: to fresh memory.
    """
    n_nets = len(parameters[0])
    d_x = x.new_empty((n_nets, *x.shape) if to_x else 0)
    if d_parameters is None:
        d_parameters = [p.new_empty(p.shape) for p in parameters] if to_parameters else []
    operations().network_backward(
        d_out.contiguous(),
        None if to_gate is None else to_gate.contiguous(),
        rows_of_adjacent_numbers(x),
        task.to(torch.int64).contiguous(),
        list(parameters),
        *(index, gate, flow, active, activations, h, opened),
        *(residual, precision == "bf16", to_x),
        *(d_x, list(d_parameters)),
    )
    return d_x.sum(0) if to_x else d_x, list(d_parameters)
