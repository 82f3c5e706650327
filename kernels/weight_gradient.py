"""Weight and bias gradients of all modules: one product a module over its active rows, in a fixed order of sums."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, gradient_launch
from d2r_fast.kernels.tiles import mix_sources, product

REDUCE_LAUNCH = {"BLOCK": 1024, "num_warps": 4} | FUSED


@triton.jit(do_not_specialize=["n_rows"])
def weight_gradient_kernel(
    to_relu_ptr, opened_ptr, h_ptr, index_ptr, gate_ptr, active_ptr, list_ptr, d_weight_ptr, d_bias_ptr, member_ptr,
    n_rows,
    STEP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, BLOCK_LIST: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (E*(N-1), splits, tiles of D*D); a program owns one tile of d_weight [splits,E,N-1,D,D] of one module.

    Of each STEP-th network that A [E,N,B,D] and what forward saved hold, from the first on; or member [E,4] says where:
    which of those that forward saved for, which of A.
    It first lists the active rows of its split, in order, in its own part of `list`, then sums dz^T x over blocks of
    listed rows: work is proportional to active rows. x is mixed again from h (K*D read) rather than saved. Per listed
    row: BLOCK_OUT of A and opened, K*BLOCK_IN of h. Every tile is written, by zeros where no row is active.
    """
    module = tl.program_id(0)
    net = (module // (N - 1)).to(tl.int64)
    i = module % (N - 1) + 1
    split = tl.program_id(1)
    n_in_tiles: tl.constexpr = tl.cdiv(D, BLOCK_IN)
    out_tile = tl.program_id(2) // n_in_tiles
    in_tile = tl.program_id(2) % n_in_tiles
    out = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    feature = in_tile * BLOCK_IN + tl.arange(0, BLOCK_IN)

    saved = net * STEP
    back = saved
    if member_ptr is not None:
        saved, back = tl.load(member_ptr + net * 4), tl.load(member_ptr + net * 4 + 1)
    own = tl.arange(0, BLOCK_LIST)
    at = split * SPLIT_ROWS + own
    active = tl.load(active_ptr + saved * n_rows + at, mask=(own < SPLIT_ROWS) & (at < n_rows), other=0)
    listed = (active >> i) & 1
    place = tl.cumsum(listed, 0) - 1
    program = (module.to(tl.int64) * tl.num_programs(1) + split) * tl.num_programs(2) + tl.program_id(2)
    list_ptr += program * SPLIT_ROWS
    tl.store(list_ptr + place, at, mask=listed != 0)
    n_listed = tl.sum(listed, 0)
    tl.debug_barrier()

    h_ptr += saved * N * n_rows * D
    d_weight = tl.zeros((BLOCK_OUT, BLOCK_IN), h_ptr.dtype.element_ty)
    d_bias = tl.zeros((BLOCK_OUT,), h_ptr.dtype.element_ty)
    for start in range(0, SPLIT_ROWS, BLOCK_ROWS):
        if start < n_listed:
            pos = start + tl.arange(0, BLOCK_ROWS)
            wanted = pos < n_listed
            row = tl.load(list_ptr + pos, mask=wanted, other=0).to(tl.int64)
            mask = wanted[:, None] & (out < D)[None, :]
            opened_at = (((saved * N + i) * n_rows + row) * D)[:, None] + out[None, :]
            d_z_at = opened_at
            if member_ptr is not None:
                d_z_at = (((back * N + i) * n_rows + row) * D)[:, None] + out[None, :]
            d_z = tl.load(to_relu_ptr + d_z_at, mask=mask, other=0.0)
            d_z = tl.where(tl.load(opened_ptr + opened_at, mask=mask, other=0) != 0, d_z, 0.0)
            slot = ((saved * n_rows + row) * N + i - 1) * K
            x = mix_sources(h_ptr, index_ptr, gate_ptr, slot, row, wanted, i, feature, n_rows, D, K)
            d_weight = product(tl.trans(d_z), x, d_weight, PRECISION)
            d_bias += tl.sum(d_z, 0)
    part = split.to(tl.int64) * tl.num_programs(0) + module
    tl.store(
        d_weight_ptr + part * D * D + (out * D)[:, None] + feature[None, :],
        d_weight,
        mask=(out < D)[:, None] & (feature < D)[None, :],
    )
    if in_tile == 0:
        tl.store(d_bias_ptr + part * D + out, d_bias, mask=out < D)


@triton.jit
def weight_gradient_reduce_kernel(
    weight_part_ptr, bias_part_ptr, d_weight_ptr, d_bias_ptr, member_ptr, n_weights, n_biases,
    N_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(n_weights, BLOCK) + cdiv(n_biases, BLOCK), networks): sums the splits, first to last, so runs agree
    bitwise. n_weights and n_biases are of one network; member [networks,4], if there is one, says from which places on
    its sums go, else they stand one behind another."""
    tile, net = tl.program_id(0), tl.program_id(1).to(tl.int64)
    n_weight_tiles = tl.cdiv(n_weights, BLOCK)
    if tile < n_weight_tiles:
        d_weight_ptr += net * n_weights if member_ptr is None else tl.load(member_ptr + net * 4 + 2)
        _sum_splits(weight_part_ptr, d_weight_ptr, tile, net, n_weights, N_SPLITS, BLOCK)
    else:
        d_bias_ptr += net * n_biases if member_ptr is None else tl.load(member_ptr + net * 4 + 3)
        _sum_splits(bias_part_ptr, d_bias_ptr, tile - n_weight_tiles, net, n_biases, N_SPLITS, BLOCK)


@triton.jit
def _sum_splits(part_ptr, total_ptr, tile, net, n, N_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), part_ptr.dtype.element_ty)
    n_nets = tl.num_programs(1)
    for split in range(N_SPLITS):
        total += tl.load(part_ptr + (split * n_nets + net) * n + at, mask=at < n, other=0.0)
    tl.store(total_ptr + at, total, mask=at < n)


def weight_gradient(
    to_relu: Tensor,
    opened: Tensor,
    h: Tensor,
    index: Tensor,
    gate: Tensor,
    active: Tensor,
    precision: str,
    d_weight: Tensor,
    d_bias: Tensor,
) -> None:
    """Writes d_weight [E,N-1,D,D] and d_bias [E,N-1,D] from the adjoint A [M,N,B,D] that the backward kernel left of M
    networks, a multiple of E: of each (M/E)-th, from the first on."""
    (n_back, n_modules, n_rows, width), n_nets = to_relu.shape, len(d_weight)
    if h.numel() == 0 or n_rows == 0 or n_modules == 1:
        d_weight.zero_()
        d_bias.zero_()
        return
    launch = gradient_launch(precision, n_modules, index.shape[3], width, n_rows, n_nets)
    n_splits = triton.cdiv(n_rows, launch["SPLIT_ROWS"])
    whole = n_splits == 1
    parts = [d_weight, d_bias] if whole else [v.new_empty(n_splits, *v.shape) for v in (d_weight, d_bias)]
    _sum_products(to_relu, opened, h, index, gate, active, parts, None, n_nets, n_back // n_nets, launch)
    if not whole:
        sum_parts(parts, d_weight, d_bias, None, n_nets, n_splits)


def weight_gradient_at(
    to_relu: Tensor,
    opened: Tensor,
    h: Tensor,
    index: Tensor,
    gate: Tensor,
    active: Tensor,
    precision: str,
    member: Tensor,
    gradient: Tensor,
) -> None:
    """Writes the gradients of several networks to their places in the flat gradient. member [G,4] int64 of each: its
    number among those that forward saved for, and in to_relu; where its weight and its bias begin. N is at least 2."""
    (n_modules, n_rows, width), n_nets = to_relu.shape[1:], len(member)
    launch = gradient_launch(precision, n_modules, index.shape[3], width, n_rows, n_nets)
    n_splits = triton.cdiv(n_rows, launch["SPLIT_ROWS"])
    parts = [h.new_empty(n_splits, n_nets, n_modules - 1, *shape) for shape in ((width, width), (width,))]
    _sum_products(to_relu, opened, h, index, gate, active, parts, member, n_nets, 0, launch)
    sum_parts(parts, gradient, gradient, member, n_nets, n_splits)


def _sum_products(
    to_relu: Tensor, opened: Tensor, h: Tensor, index: Tensor, gate: Tensor, active: Tensor, parts: list[Tensor],
    member: Tensor | None, n_nets: int, step: int, launch: dict[str, Any],
) -> None:  # fmt: skip
    (n_modules, n_rows, width) = h.shape[1:]
    n_tiles = triton.cdiv(width, launch["BLOCK_OUT"]) * triton.cdiv(width, launch["BLOCK_IN"])
    grid = (n_nets * (n_modules - 1), triton.cdiv(n_rows, launch["SPLIT_ROWS"]), n_tiles)
    listed = torch.empty(math.prod(grid) * launch["SPLIT_ROWS"], dtype=torch.int32, device=h.device)
    weight_gradient_kernel[grid](
        to_relu, opened, h, index, gate, active, listed, *parts, member, n_rows, STEP=step, **launch
    )


def sum_parts(
    parts: list[Tensor], d_weight: Tensor, d_bias: Tensor, member: Tensor | None, n_nets: int, n_splits: int
) -> None:
    """Sums of the splits of both parts [n_splits,networks,...]: to their places, as the kernel says."""
    n_weights, n_biases = (part[0].numel() // n_nets for part in parts)
    block = REDUCE_LAUNCH["BLOCK"]
    weight_gradient_reduce_kernel[triton.cdiv(n_weights, block) + triton.cdiv(n_biases, block), n_nets](
        *parts, d_weight, d_bias, member, n_weights, n_biases, N_SPLITS=n_splits, **REDUCE_LAUNCH
    )
