"""Batched products of operands in the precision asked for: what defines `precision` for every backend."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def product(a: Tensor, b: Tensor, precision: str, start: Tensor | None = None) -> Tensor:
    """start + a b of [E,n,m] and [E,m,p]; start broadcasts to [E,n,p], None: zero.

    "bf16": a and b rounded to bfloat16 (to nearest, ties to even), sums in their own dtype. Other precisions leave the
    operands as they are.
    """
    if precision == "bf16":
        if a.is_cuda and a.dtype == torch.float32:
            y = torch.bmm(a.bfloat16(), b.bfloat16(), out_dtype=torch.float32)
            return y if start is None else y + start
        a, b = a.bfloat16().to(a.dtype), b.bfloat16().to(b.dtype)
    return torch.bmm(a, b) if start is None else torch.baddbmm(start, a, b)


class RoundedLinear(torch.autograd.Function):
    """`ensemble_linear` of rounded operands: autograd alone would round the gradients too, as a cast's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, relu: bool, precision: str) -> Tensor:
        """y [E,B,out] from x [E,B,in]."""
        y = product(x, weight.mT, precision, bias[:, None])
        if relu:
            y = y.relu_()
        ctx.relu, ctx.precision = relu, precision
        ctx.save_for_backward(x, weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, y = ctx.saved_tensors
        d_z = d_y * (y > 0) if ctx.relu else d_y
        d_x = product(d_z, weight, ctx.precision) if ctx.needs_input_grad[0] else None
        d_weight = product(d_z.mT, x, ctx.precision) if ctx.needs_input_grad[1] else None
        d_bias = d_z.sum(1) if ctx.needs_input_grad[2] else None
        return d_x, d_weight, d_bias, None, None
