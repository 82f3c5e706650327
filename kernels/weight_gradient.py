"""Weight and bias gradients of all modules: one product a module over its active rows, in a fixed order of sums."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, gradient_launch
from d2r_fast.kernels.tiles import mix_sources, product

REDUCE_LAUNCH = {"BLOCK": 1024, "num_warps": 4} | FUSED


@triton.jit(do_not_specialize=["n_rows"])
def weight_gradient_kernel(
    to_relu_ptr, opened_ptr, h_ptr, index_ptr, gate_ptr, active_ptr, list_ptr, d_weight_ptr, d_bias_ptr,
    n_rows,
    STEP: tl.constexpr, N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, BLOCK_LIST: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (E*(N-1), splits, tiles of D*D); a program owns one tile of d_weight [splits,E,N-1,D,D] of one module.

    Of each STEP-th network that A [E,N,B,D] and what forward saved hold, from the first on.
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
            d_z_at = (((saved * N + i) * n_rows + row) * D)[:, None] + out[None, :]
            d_z = tl.load(to_relu_ptr + d_z_at, mask=mask, other=0.0)
            d_z = tl.where(tl.load(opened_ptr + d_z_at, mask=mask, other=0) != 0, d_z, 0.0)
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
    weight_part_ptr, bias_part_ptr, d_weight_ptr, d_bias_ptr, n_weights, n_biases,
    N_SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(n_weights, BLOCK) + cdiv(n_biases, BLOCK),): sums the splits, first to last, so runs agree bitwise."""
    tile = tl.program_id(0)
    n_weight_tiles = tl.cdiv(n_weights, BLOCK)
    if tile < n_weight_tiles:
        _sum_splits(weight_part_ptr, d_weight_ptr, tile, n_weights, N_SPLITS, BLOCK)
    else:
        _sum_splits(bias_part_ptr, d_bias_ptr, tile - n_weight_tiles, n_biases, N_SPLITS, BLOCK)


@triton.jit
def _sum_splits(part_ptr, total_ptr, tile, n, N_SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    at = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), part_ptr.dtype.element_ty)
    for split in range(N_SPLITS):
        total += tl.load(part_ptr + split * tl.cast(n, tl.int64) + at, mask=at < n, other=0.0)
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
    n_tiles = triton.cdiv(width, launch["BLOCK_OUT"]) * triton.cdiv(width, launch["BLOCK_IN"])
    grid = (n_nets * (n_modules - 1), n_splits, n_tiles)
    listed = torch.empty(math.prod(grid) * launch["SPLIT_ROWS"], dtype=torch.int32, device=h.device)
    parts = [d_weight, d_bias] if n_splits == 1 else [v.new_empty(n_splits, *v.shape) for v in (d_weight, d_bias)]
    weight_gradient_kernel[grid](
        to_relu, opened, h, index, gate, active, listed, *parts, n_rows, STEP=n_back // n_nets, **launch
    )
    if n_splits > 1:
        sum_parts(parts, d_weight, d_bias)


def sum_parts(parts: list[Tensor], d_weight: Tensor, d_bias: Tensor) -> None:
    """Sums of the splits of both parts [n_splits,...]."""
    (n_splits, *_), n_weights, n_biases = parts[0].shape, d_weight.numel(), d_bias.numel()
    block = REDUCE_LAUNCH["BLOCK"]
    weight_gradient_reduce_kernel[(triton.cdiv(n_weights, block) + triton.cdiv(n_biases, block),)](
        *parts, d_weight, d_bias, n_weights, n_biases, N_SPLITS=n_splits, **REDUCE_LAUNCH
    )
