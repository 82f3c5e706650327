"""A tanh-squashed normal policy's action and log probability, and the gradient, in one launch each
(`d2r_fast.ops.squashed_normal` is contract and oracle)."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, check_real, check_tensor, packed
from d2r_fast.ops.squashed_normal import EDGE as EDGE_OF_LOG
from d2r_fast.ops.squashed_normal import LOG_STD_RANGE

LEAST_LOG_STD, MOST_LOG_STD, EDGE = (tl.constexpr(v) for v in (*LOG_STD_RANGE, EDGE_OF_LOG))
LOG_ROOT_TWO_PI = tl.constexpr(0.5 * math.log(2 * math.pi))
# One warp a program, 4 numbers a thread: a row of 4 actions is one access, and needs no other thread.
WARP_NUMBERS = 128


@triton.jit(do_not_specialize=["n_rows"])
def squashed_normal_fwd_kernel(
    out_ptr, noise_ptr, action_ptr, logp_ptr, n_rows, action_stride,
    A: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS),); a program owns its rows. Reads 3 A numbers a row, writes A + 1, each once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = tl.arange(0, BLOCK_A)[None, :]
    inside = (row < n_rows)[:, None] & (at < A)
    mean, _, log_std, noise = _policy(out_ptr, noise_ptr, row, at, inside, A)
    action, slope = _tanh(mean + tl.exp(log_std) * noise)
    logp = -0.5 * noise * noise - log_std - LOG_ROOT_TWO_PI - tl.log(slope + EDGE)
    tl.store(action_ptr + (row * action_stride)[:, None] + at, action, mask=inside)
    tl.store(logp_ptr + row, tl.sum(tl.where(inside, logp, 0.0), 1), mask=row < n_rows)


@triton.jit(do_not_specialize=["n_rows"])
def squashed_normal_bwd_kernel(
    d_action_ptr, d_logp_ptr, out_ptr, noise_ptr, action_ptr, d_out_ptr, n_rows, d_action_stride, action_stride,
    A: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS),); a program owns its rows. Reads 4 A + 1 numbers a row, writes 2 A, each once."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = tl.arange(0, BLOCK_A)[None, :]
    inside = (row < n_rows)[:, None] & (at < A)
    _, raw, log_std, noise = _policy(out_ptr, noise_ptr, row, at, inside, A)
    action = tl.load(action_ptr + (row * action_stride)[:, None] + at, mask=inside, other=0.0)
    d_action = tl.load(d_action_ptr + (row * d_action_stride)[:, None] + at, mask=inside, other=0.0)
    d_logp = tl.load(d_logp_ptr + row, mask=row < n_rows, other=0.0)[:, None]
    slope = 1 - action * action
    d_mean = (d_action + d_logp * 2 * action / (slope + EDGE)) * slope
    d_raw = tl.where(raw == log_std, d_mean * tl.exp(log_std) * noise - d_logp, 0.0)  # no gradient where it was clamped
    own = (row * (2 * A))[:, None] + at
    tl.store(d_out_ptr + own, d_mean, mask=inside)
    tl.store(d_out_ptr + own + A, d_raw, mask=inside)


@triton.jit
def _policy(out_ptr, noise_ptr, row, at, inside, A: tl.constexpr):
    """Mean, log std as it came and clamped, and noise; [rows,actions]. A NaN is clamped to nothing."""
    own = (row * (2 * A))[:, None] + at
    mean = tl.load(out_ptr + own, mask=inside, other=0.0)
    raw = tl.load(out_ptr + own + A, mask=inside, other=0.0)
    noise = tl.load(noise_ptr + (row * A)[:, None] + at, mask=inside, other=0.0)
    log_std = tl.where(raw < LEAST_LOG_STD, LEAST_LOG_STD, tl.where(raw > MOST_LOG_STD, MOST_LOG_STD, raw))
    return mean, raw, log_std, noise


@triton.jit
def _tanh(x):
    """tanh x, as -e / (2 + e) with e = exp(-2|x|) - 1 and the sign of x; and 1 - tanh^2 x, in full precision where the
    tanh is so near to 1 that this difference would be all rounding.

    Where e cancels, near 0, it is taken of u = exp(y) as rounded, and divided by what y would be for that very u,
    log u: the rounding of u is in both and drops out (Kahan).
    """
    y = -2 * tl.abs(x)
    u = tl.exp(y)
    e = tl.where(u == 1, y, tl.where(y > -1, (u - 1) * y / tl.log(u), u - 1))
    t = -e / (2 + e)
    return tl.where(x < 0, -t, t), 2 * u / (1 + u) * (1 + t)


def policy_launch(n_actions: int) -> dict[str, Any]:
    """Constants and options that both kernels share."""
    block_a = triton.next_power_of_2(max(1, n_actions))
    return {"A": n_actions, "BLOCK_A": block_a, "BLOCK_ROWS": max(1, WARP_NUMBERS // block_a), "num_warps": 1} | FUSED


def forward(out: Tensor, noise: Tensor, action: Tensor) -> Tensor:
    """Writes action [B,A], which may be columns of a wider matrix; returns the log probability [B].

    ValueError: shapes or dtypes disagree, or the numbers of an action are not adjacent.
    """
    dtype = _check_sizes(out, noise)
    check_tensor("action", action, dtype, noise.shape)
    if not _has_adjacent_numbers(action):
        raise ValueError("action: expected rows of adjacent numbers")
    n_rows, n_actions = noise.shape
    logp = out.new_empty(n_rows)
    if n_rows > 0:
        launch = policy_launch(n_actions)
        squashed_normal_fwd_kernel[(triton.cdiv(n_rows, launch["BLOCK_ROWS"]),)](
            packed(out), packed(noise), action, logp, n_rows, action.stride(0), **launch
        )
    return logp


def backward(d_action: Tensor, d_logp: Tensor, out: Tensor, noise: Tensor, action: Tensor) -> Tensor:
    """d_out [B,2A]. ValueError: shapes or dtypes disagree."""
    dtype = _check_sizes(out, noise)
    n_rows, n_actions = noise.shape
    check_tensor("d_action", d_action, dtype, noise.shape)
    check_tensor("action", action, dtype, noise.shape)
    check_tensor("d_logp", d_logp, dtype, [n_rows])
    d_action, action = (v if _has_adjacent_numbers(v) else packed(v) for v in (d_action, action))
    d_out = out.new_empty(n_rows, 2 * n_actions)
    if n_rows > 0:
        launch = policy_launch(n_actions)
        squashed_normal_bwd_kernel[(triton.cdiv(n_rows, launch["BLOCK_ROWS"]),)](
            d_action, packed(d_logp), packed(out), packed(noise), action, d_out, n_rows, d_action.stride(0),
            action.stride(0), **launch,
        )  # fmt: skip
    return d_out


def _check_sizes(out: Tensor, noise: Tensor) -> torch.dtype:
    dtype = check_real("out", out)
    if noise.dim() != 2:
        raise ValueError(f"noise: expected [B,A], got {list(noise.shape)}")
    check_tensor("noise", noise, dtype, noise.shape)
    check_tensor("out", out, dtype, [noise.shape[0], 2 * noise.shape[1]])
    return dtype


def _has_adjacent_numbers(rows: Tensor) -> bool:
    """Rows [B,A] of adjacent numbers, however far apart they lie."""
    return not rows.is_neg() and (rows.shape[1] <= 1 or rows.stride(1) == 1)
