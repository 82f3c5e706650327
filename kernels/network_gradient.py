"""The gradients of all linear layers of a pass in one launch, straight into the flat gradient
(`d2r_fast.learning.layered`)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.ensemble_linear import GRADIENT, tile_of
from d2r_fast.kernels.settings import FUSED, check_dtype
from d2r_fast.kernels.tiles import load_tile, rounded_product
from d2r_fast.ops.layer_gradients import Product, Sum

SUM_ROWS = tl.constexpr(256)
"""Rows that a sum takes at a time: it waits for each load."""
N_COLUMNS = tl.constexpr(11)  # of the table: what `_lines` puts there


@triton.jit
def network_gradient_kernel(
    act_ptr, x_ptr, d_z_ptr, gradient_ptr, table_ptr,
    N_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (lines of the table,); a program owns one tile of a weight's gradient, or BLOCK_OUT sums, over all rows: the
    layers of a pass are some hundred tiles, which fill a device without splitting rows. Every number is summed in one
    order, so that runs agree bitwise.

    N_ROWS is a constant, for Triton 3.6's interpreter takes no tensor as the bound of a loop; a run has one.
    """
    table_ptr += tl.program_id(0) * N_COLUMNS
    is_sum = tl.load(table_ptr) != 0
    d_z_at, n_out = tl.load(table_ptr + 1), tl.load(table_ptr + 2)
    out = tl.load(table_ptr + 3) // BLOCK_OUT * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    to, to_stride = tl.load(table_ptr + 4), tl.load(table_ptr + 5)
    x_at, x_stride = tl.load(table_ptr + 7), tl.load(table_ptr + 8)
    first, n_summed = tl.load(table_ptr + 9), tl.load(table_ptr + 10)
    if is_sum:
        total = tl.zeros((BLOCK_OUT,), gradient_ptr.dtype.element_ty)
        for start in range(0, N_ROWS, SUM_ROWS):
            if start < n_summed:
                own = start + tl.arange(0, SUM_ROWS)
                d_z = load_tile(d_z_ptr + d_z_at, first + own, own < n_summed, out, n_out, n_out)
                total += tl.sum(d_z.to(total.dtype), 0)
        tl.store(gradient_ptr + to + out * to_stride, total, mask=out < n_out)
    else:
        feature = first // BLOCK_IN * BLOCK_IN + tl.arange(0, BLOCK_IN)
        outside = tl.load(table_ptr + 6) != 0
        # One place in the code for both where they are of one type: each takes shared memory of its own.
        if x_ptr.dtype == act_ptr.dtype:
            if not outside:
                x_ptr = act_ptr
            _layer_tile(
                x_ptr, x_at, d_z_ptr, d_z_at, gradient_ptr, to,
                out, feature, n_out, to_stride, x_stride, N_ROWS, PRECISION, BLOCK_DEPTH,
            )  # fmt: skip
        else:
            if outside:
                _layer_tile(
                    x_ptr, x_at, d_z_ptr, d_z_at, gradient_ptr, to,
                    out, feature, n_out, to_stride, x_stride, N_ROWS, PRECISION, BLOCK_DEPTH,
                )  # fmt: skip
            else:
                _layer_tile(
                    act_ptr, x_at, d_z_ptr, d_z_at, gradient_ptr, to,
                    out, feature, n_out, to_stride, x_stride, N_ROWS, PRECISION, BLOCK_DEPTH,
                )  # fmt: skip


@triton.jit
def _layer_tile(
    x_ptr, x_at, d_z_ptr, d_z_at, to_ptr, to, out, feature, n_out, n_in, x_stride,
    N_ROWS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Accesses are wide where rows begin at multiples of 16 bytes, and the compiler knows it: of x and d_z, or, as in a
    first layer, of d_z alone."""
    X_WIDE: tl.constexpr = 128 // x_ptr.dtype.element_ty.primitive_bitwidth
    D_WIDE: tl.constexpr = 128 // d_z_ptr.dtype.element_ty.primitive_bitwidth
    if (n_out % D_WIDE == 0) & (n_in % X_WIDE == 0) & (x_stride % X_WIDE == 0):
        _weight_tile(
            x_ptr + x_at // X_WIDE * X_WIDE, d_z_ptr + d_z_at // D_WIDE * D_WIDE, to_ptr + to // X_WIDE * X_WIDE,
            out, feature, n_out // D_WIDE * D_WIDE, n_in // X_WIDE * X_WIDE, x_stride // X_WIDE * X_WIDE,
            N_ROWS, PRECISION, BLOCK_DEPTH,
        )  # fmt: skip
    elif n_out % D_WIDE == 0:
        _weight_tile(
            x_ptr + x_at, d_z_ptr + d_z_at // D_WIDE * D_WIDE, to_ptr + to,
            out, feature, n_out // D_WIDE * D_WIDE, n_in, x_stride, N_ROWS, PRECISION, BLOCK_DEPTH,
        )  # fmt: skip
    else:
        _weight_tile(
            x_ptr + x_at, d_z_ptr + d_z_at, to_ptr + to,
            out, feature, n_out, n_in, x_stride, N_ROWS, PRECISION, BLOCK_DEPTH,
        )  # fmt: skip


@triton.jit
def _weight_tile(
    x_ptr, d_z_ptr, to_ptr, out, feature, n_out, n_in, x_stride,
    N_ROWS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    total = tl.zeros((out.shape[0], feature.shape[0]), to_ptr.dtype.element_ty)
    for start in range(0, N_ROWS, BLOCK_DEPTH):
        row = (start + tl.arange(0, BLOCK_DEPTH)).to(tl.int64)
        d_z = load_tile(d_z_ptr, row, row < N_ROWS, out, n_out, n_out)
        if d_z.dtype == tl.float32:
            # Nothing changes; but what goes straight to a product turned round is copied as that takes it, number by
            # number, and this is copied by 16 bytes.
            d_z = tl.where((row < N_ROWS)[:, None], d_z, 0.0)
        x = load_tile(x_ptr, row, row < N_ROWS, feature, n_in, x_stride)
        total = rounded_product(tl.trans(d_z), x, total, PRECISION)
    mask = (out < n_out)[:, None] & (feature < n_in)[None, :]
    tl.store(to_ptr + (out * n_in)[:, None] + feature[None, :], total, mask=mask)


class Table(NamedTuple):
    """What a launch computes, for batches of as many rows: made once, and kept."""

    lines: Tensor
    """[programs,11] int64, on the device."""
    launch: dict[str, Any]
    """Constants and options of the kernel, which say how the lines cut the gradients."""


def gradient_launch(gradients: Sequence[Product | Sum], precision: str, n_rows: int) -> dict[str, Any]:
    """Constants and options of the kernel."""
    tile = tile_of(precision, [(g.d_z.width, g.n_in) for g in gradients if isinstance(g, Product)], GRADIENT)
    blocks = {"BLOCK_OUT": tile.first, "BLOCK_IN": tile.second, "BLOCK_DEPTH": tile.depth}
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | FUSED
    return {"N_ROWS": n_rows, "PRECISION": precision} | blocks | options


def gradient_table(like: Tensor, gradients: Sequence[Product | Sum], precision: str, n_rows: int) -> Table:
    """A program for each tile of the gradients, on the device of `like`; products first, which take longer."""
    launch = gradient_launch(gradients, precision, n_rows)
    lines: dict[type, list[tuple[int, ...]]] = {Product: [], Sum: []}
    for g in gradients:
        lines[type(g)] += _lines(g, launch, n_rows)
    return Table(torch.tensor(lines[Product] + lines[Sum], dtype=torch.int64).to(like.device), launch)


def _lines(g: Product | Sum, launch: dict[str, Any], n_rows: int) -> list[tuple[int, ...]]:
    z = g.d_z
    lines: list[tuple[int, ...]] = []
    for out in range(0, z.width, launch["BLOCK_OUT"]):
        head = isinstance(g, Sum), z.at, z.width, out, g.to
        if isinstance(g, Sum):
            lines.append((*head, g.stride, 0, 0, 0, g.first_row, g.n_rows))
        else:
            x = g.n_in, g.x_outside, g.x_at, g.x_stride
            lines += [(*head, *x, first, n_rows) for first in range(0, g.n_in, launch["BLOCK_IN"])]
    return lines


def network_gradient(gradient: Tensor, table: Table, act: Tensor, x: Tensor, d_z: Tensor) -> None:
    """Writes to the flat gradient what `table` says.

    act, x  what the layers read: a buffer, which may be bfloat16 where products are, and what the first one reads
    d_z     the gradients of what they give, in front of their ReLU: a buffer, as act
    """
    check_dtype("gradient", gradient)
    network_gradient_kernel[(len(table.lines),)](act, x, d_z, gradient, table.lines, **table.launch)
