"""Backend `cpp` of `routed_modules`."""

import torch
from torch import Tensor

from d2r_fast.ops.cpp.library import operations


def forward(
    h0: Tensor,
    weight: Tensor,
    bias: Tensor,
    index: Tensor,
    gate: Tensor,
    active: Tensor,
    residual: bool,
    precision: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Modules' mixed output [E,B,D], and for backward h and opened (bool, z > 0), or two empty ones.

    Both have room for E*N*B lines of D numbers, but only those of active modules are stored, row by row from the start:
    memory past the last is never touched, and where the system hands out pages on demand it is never taken.
    """
    n_nets, rows, width = h0.shape
    kept_shape = (n_nets, index.shape[2], rows, width) if keep else (0,)
    mixed, h = h0.new_empty(h0.shape), h0.new_empty(kept_shape)
    opened = torch.empty(kept_shape, dtype=torch.bool)
    inputs = (v.contiguous() for v in (h0, weight, bias, index, gate, active))
    bf16 = precision == "bf16"
    operations().routed_modules(*inputs, residual, bf16, keep, mixed, h, opened)
    return mixed, h, opened


def backward(
    d_mixed: Tensor,
    weight: Tensor,
    h: Tensor,
    opened: Tensor,
    index: Tensor,
    gate: Tensor,
    flow: Tensor,
    active: Tensor,
    residual: bool,
    precision: str,
    to_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_h0, d_weight, d_bias, d_gate; the middle two are empty unless `to_weight`."""
    d_h0, d_gate = d_mixed.new_empty(d_mixed.shape), gate.new_empty(gate.shape)
    d_weight = weight.new_empty(weight.shape if to_weight else 0)
    d_bias = weight.new_empty(weight.shape[:3] if to_weight else 0)
    inputs = (v.contiguous() for v in (d_mixed, weight, index, gate, flow, active, h, opened))
    bf16 = precision == "bf16"
    operations().routed_modules_backward(*inputs, residual, bf16, to_weight, d_h0, d_weight, d_bias, d_gate)
    return d_h0, d_weight, d_bias, d_gate
