"""Rows by their active modules, so that those that route alike share a tile: one launch, where a sort takes several."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED

LAUNCH = {"BLOCK_ROWS": 8, "BLOCK_OTHERS": 256, "num_warps": 1} | FUSED  # no barriers; more would spill


@triton.jit
def row_order_kernel(active_ptr, order_ptr, N_ROWS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OTHERS: tl.constexpr):
    """Grid (cdiv(B, BLOCK_ROWS), E). A row's place is the number of its network's rows that come before it: with a
    higher module among those that only one of them runs, or with the same modules and earlier. Rows of few modules come
    last, so that the tiles which take longest start first and short ones fill in behind them.

    B^2 comparisons a network, of numbers in L2, and an addition each. Which of two rows is the earlier is compared
    within the block of own rows only: other blocks' rows are earlier than all of these, or later.
    N_ROWS is a constant, for Triton 3.6's interpreter takes no tensor as the bound of a loop; a run has one.
    """
    net = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_ROWS
    active_ptr += net * N_ROWS
    row = first + tl.arange(0, BLOCK_ROWS)[:, None]
    beside = first + tl.arange(0, BLOCK_ROWS)[None, :]
    key_beside = _load_key(active_ptr, beside, beside < N_ROWS)
    # A sum over threads, for LLVM knows no bounds of it: else it makes comparisons of the differences in `_before`.
    own = tl.sum(tl.where(beside == row, key_beside, 0), 1)[:, None]
    count = tl.zeros((BLOCK_ROWS, BLOCK_OTHERS), tl.int32)  # added up once, so that no sum over threads is in the loop
    for start in range(0, N_ROWS, BLOCK_OTHERS):
        other = start + tl.arange(0, BLOCK_OTHERS)[None, :]
        is_later = other >= first
        key = _load_key(active_ptr, other, (other < N_ROWS) & (~is_later | (other >= first + BLOCK_ROWS)))
        count += _before(key, own, is_later)
    place = -(tl.sum(count, 1) + tl.sum(_before(key_beside, own, beside >= row), 1))[:, None]
    tl.store(order_ptr + net * N_ROWS + place, row, mask=row < N_ROWS)


@triton.jit
def _load_key(active_ptr, row, exists):
    """What decides which of two rows comes first: the bits of all modules but 0, which every row runs, as a number of 0
    or more. 0 where there is no row."""
    return (tl.load(active_ptr + row, mask=exists, other=0) >> 1) & 0x7FFFFFFF


@triton.jit
def _before(key, own, is_later):
    """-1 where a row with this key comes before, else 0: its key is larger, or it is not later and has the same.

    The sign of a difference that does not overflow: to count it takes two instructions, and a comparison four.
    """
    return (own - 1 - (key - is_later.to(tl.int32))) >> 31


def row_order(active: Tensor) -> Tensor:
    """[E,B] int32 of active [E,B] int32: the rows of every network by their bits, read as a number, from the
    largest on; those with the same as they come. Bit 0 does not count: module 0 runs for every row."""
    order = torch.empty_like(active)
    if order.numel() > 0:
        grid = (triton.cdiv(active.shape[1], LAUNCH["BLOCK_ROWS"]), len(active))
        row_order_kernel[grid](active, order, N_ROWS=active.shape[1], **LAUNCH)
    return order
