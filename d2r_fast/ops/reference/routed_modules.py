"""Backend `reference` of `routed_modules`: every module for every row, on any device and in any dtype.

The backward needs two adjoints a module, because ResRouting lets a gradient pass a source's residual but not its
ReLU layer; plain autograd knows only one gradient a tensor.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2r_fast.ops.reference.products import product


class ReferenceModules(torch.autograd.Function):
    """Buffers are module-major, [N,E*B,D], so that a module's rows are one matrix and a source is one row of it.
    A row keeps each source at most once a route, so one `index_add_` never meets a target twice: no order to fix."""

    @staticmethod
    def forward(
        ctx: Any,
        h0: Tensor,
        weight: Tensor,
        bias: Tensor,
        gate: Tensor,
        index: Tensor,
        flow: Tensor,
        residual: bool,
        precision: str,
    ) -> Tensor:
        n_nets, rows, width = h0.shape
        n_modules, n_kept = index.shape[2:]
        at = _buffer_rows(index)  # [N,K,E*B]
        gate_of = _per_slot(gate)  # [N,K,E*B,1]
        h = h0.new_empty(n_modules, n_nets * rows, width)
        x = h0.new_empty(n_modules, n_nets * rows, width)  # x[i-1] is x_i
        open_relu = torch.empty_like(x, dtype=torch.bool)  # z_i > 0 at [i-1]; the head's slot stays unused
        every_row = h.view(-1, width)
        h[0] = h0.flatten(0, 1)
        for i in range(1, n_modules + 1):
            kept, x_i = min(n_kept, i), x[i - 1]
            picked = every_row.index_select(0, at[i - 1, :kept].flatten()).view(kept, -1, width)  # [k,E*B,D]
            torch.sum(gate_of[i - 1, :kept] * picked, 0, out=x_i)
            if i < n_modules:
                z = product(x_i.view(n_nets, rows, width), weight[:, i - 1].mT, precision, bias[:, i - 1, None])
                z = z.flatten(0, 1)
                torch.gt(z, 0, out=open_relu[i - 1])
                torch.clamp_min(z, 0, out=h[i])
                if residual:
                    h[i] += x_i
        ctx.save_for_backward(weight, at, gate_of, flow, h, x, open_relu)
        ctx.residual, ctx.precision = residual, precision
        return x[n_modules - 1].view(n_nets, rows, width).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mixed: Tensor) -> tuple[Tensor | None, ...]:
        weight, at, gate_of, flow, h, x, open_relu = ctx.saved_tensors
        n_modules, n_kept = at.shape[:2]
        n_nets, rows, width = d_mixed.shape
        flow_of = _per_slot(flow.to(h.dtype))  # [N,K,E*B,1]
        every_row = h.view(-1, width)
        to_relu = torch.zeros_like(every_row)  # A: reaches a module's ReLU layer
        to_residual = torch.zeros_like(every_row)  # S: reaches a module's residual
        d_gate = h.new_zeros(n_modules, n_kept, n_nets * rows)
        d_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        d_bias = weight.new_empty(n_nets, n_modules - 1, width) if ctx.needs_input_grad[2] else None

        def push(i: int, d_main: Tensor, d_res: Tensor | None) -> None:
            kept = min(n_kept, i)
            source, g, m = at[i - 1, :kept].flatten(), gate_of[i - 1, :kept], flow_of[i - 1, :kept]
            d_all = d_main if d_res is None else d_main + d_res
            d_relu = d_main * m if d_res is None else torch.addcmul(d_res, d_main, m)  # [k,E*B,D]
            to_relu.index_add_(0, source, (g * d_relu).flatten(0, 1))
            to_residual.index_add_(0, source, (g * d_all).flatten(0, 1))
            picked = every_row.index_select(0, source).view(kept, -1, width)
            torch.sum(d_all * picked, -1, out=d_gate[i - 1, :kept])

        push(n_modules, d_mixed.flatten(0, 1), None)
        adjoint_relu, adjoint_residual = to_relu.view_as(h), to_residual.view_as(h)
        for i in range(n_modules - 1, 0, -1):
            d_z = (adjoint_relu[i] * open_relu[i - 1]).view(n_nets, rows, width)
            x_i = x[i - 1].view(n_nets, rows, width)
            if d_weight is not None:
                d_weight[:, i - 1] = product(d_z.mT, x_i, ctx.precision)
            if d_bias is not None:
                d_bias[:, i - 1] = d_z.sum(1)
            d_x = product(d_z, weight[:, i - 1], ctx.precision).flatten(0, 1)
            push(i, d_x, adjoint_residual[i] if ctx.residual else None)
        d_h0 = adjoint_relu[0].view(n_nets, rows, width)
        d_gate = d_gate.permute(2, 0, 1).view(n_nets, rows, n_modules, n_kept)
        return d_h0, d_weight, d_bias, d_gate, None, None, None, None


def _per_slot(value: Tensor) -> Tensor:
    """[E,B,N,K] -> [N,K,E*B,1], contiguous: one column a slot, to scale the rows of a module-major buffer."""
    return value.flatten(0, 1).permute(1, 2, 0).contiguous().unsqueeze(-1)


def _buffer_rows(index: Tensor) -> Tensor:
    """Source indices [E,B,N,K] -> rows of the module-major buffer [N,K,E*B]: source * E*B + row."""
    source = _per_slot(index.long()).squeeze(-1)
    n_rows = source.shape[2]
    return source * n_rows + torch.arange(n_rows, device=index.device)
