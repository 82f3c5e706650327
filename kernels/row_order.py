"""Rows by their active modules, so that those that route alike share a tile: one launch, where a sort takes several."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED

LAUNCH = {"BLOCK_ROWS": 32, "BLOCK_OTHERS": 256, "num_warps": 4} | FUSED


@triton.jit
def row_order_kernel(active_ptr, order_ptr, N_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr):
    """Grid (cdiv(B, BLOCK_ROWS), E). A row's place is the number of its network's rows that come before it: with a
    higher module among those that only one of them runs, or with the same modules and earlier. Rows of few modules come
    last, so that the tiles which take longest start first and short ones fill in behind them.

    B^2 comparisons a network, of numbers in L2: at B=1280 less work than a launch.
    N_ROWS is a constant, for Triton 3.6's interpreter takes no tensor as the bound of a loop; a run has one.
    """
    net = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < N_ROWS
    active_ptr += net * N_ROWS
    own = _key(tl.load(active_ptr + row, mask=inside, other=0), row)
    place = tl.zeros((BLOCK_ROWS,), tl.int32)
    for start in range(0, N_ROWS, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)
        exists = other < N_ROWS
        before = _key(tl.load(active_ptr + other, mask=exists, other=0), other)[None, :] < own[:, None]
        place += tl.sum((before & exists[None, :]).to(tl.int32), 1)
    tl.store(order_ptr + net * N_ROWS + place, row, mask=inside)


@triton.jit
def _key(active, row):
    """One number that says which of two rows comes first. Module 31 is the sign."""
    return ((~active).to(tl.int64) & 0xFFFFFFFF) << 31 | row


def row_order(active: Tensor) -> Tensor:
    """[E,B] int32 of active [E,B] int32: the rows of every network by their bits, read as a number, from the
    largest on; those with the same as they come."""
    order = torch.empty_like(active)
    if order.numel() > 0:
        grid = (triton.cdiv(active.shape[1], LAUNCH["BLOCK_ROWS"]), len(active))
        row_order_kernel[grid](active, order, N_ROWS=active.shape[1], **LAUNCH)
    return order
