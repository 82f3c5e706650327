"""An action of a tanh-squashed normal policy and its log probability, with a backward of their own."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2r_fast.ops.arguments import require_tensor
from d2r_fast.ops.contract import define, launcher

LOG_STD_RANGE = (-20.0, 2.0)
EDGE = 1e-6  # keeps the logarithm finite where the tanh is saturated


def squashed_normal(out: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """action = tanh(mean + std noise), and log p(action) = sum_A [log N(noise) - log std - log(1 - action^2 + 1e-6)].

    out    [B,2A] float: mean, and log std, which is clamped to [-20, 2]
    noise  [B,A]  float: standard normal; dtype and device of out

    Returns action [B,A] and its log probability [B]. Differentiable once, in out (reparametrised).
    ValueError: shapes, dtypes or devices disagree.
    """
    require_tensor("out", out, "float")
    require_tensor("noise", noise, "float")
    if out.dim() != 2 or noise.dim() != 2 or list(out.shape) != [noise.shape[0], 2 * noise.shape[1]]:
        raise ValueError(f"out, noise: expected [B,2A] and [B,A], got {list(out.shape)} and {list(noise.shape)}")
    if noise.dtype != out.dtype or noise.device != out.device:
        raise ValueError(f"noise: expected {out.dtype} on {out.device} like out, got {noise.dtype} on {noise.device}")
    action, logp = _SquashedNormal.apply(out, noise)
    return action, logp


def reference(out: Tensor, noise: Tensor, action: Tensor) -> Tensor:
    """Writes action [B,A], which may be columns of a wider matrix; returns the log probability [B]."""
    mean, log_std = out.chunk(2, dim=-1)
    log_std = log_std.clamp(*LOG_STD_RANGE)
    torch.tanh(mean + log_std.exp() * noise, out=action)
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    return (log_normal - torch.log(1 - action.square() + EDGE)).sum(-1)


def reference_backward(d_action: Tensor, d_logp: Tensor, out: Tensor, noise: Tensor, action: Tensor) -> Tensor:
    """d_out [B,2A]."""
    _, raw = out.chunk(2, dim=-1)
    slope = 1 - action.square()
    d_mean = (d_action + d_logp[:, None] * 2 * action / (slope + EDGE)) * slope
    inside = (raw >= LOG_STD_RANGE[0]) & (raw <= LOG_STD_RANGE[1])
    d_raw = torch.where(inside, d_mean * raw.exp() * noise - d_logp[:, None], 0)
    return torch.cat([d_mean, d_raw], -1)


squash = define(
    "squashed_normal(Tensor out, Tensor noise, Tensor(a!) action) -> Tensor",
    reference,
    lambda out, noise, action: out.new_empty(out.shape[0]),
    launcher("squashed_normal", "forward", reference),
)
squash_backward = define(
    "squashed_normal_backward(Tensor d_action, Tensor d_logp, Tensor out, Tensor noise, Tensor action) -> Tensor",
    reference_backward,
    lambda d_action, d_logp, out, noise, action: out.new_empty(out.shape),
    launcher("squashed_normal", "backward", reference_backward),
)


class _SquashedNormal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        out, noise = out.contiguous(), noise.contiguous()
        action = torch.empty_like(noise)
        logp = squash(out, noise, action)
        ctx.save_for_backward(out, noise, action)
        return action, logp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_action: Tensor, d_logp: Tensor) -> tuple[Tensor, None]:
        return squash_backward(d_action.contiguous(), d_logp.contiguous(), *ctx.saved_tensors), None
