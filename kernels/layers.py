"""What lies between the products of a network's layers, in one launch each: how the base's output goes on, its
gradient, and the gradient of all biases (`d2r_fast.learning.passes`). All of them are bandwidth-bound."""

from typing import Any

import torch
import triton
import triton.language as tl
from d2r_fast.kernels.settings import FUSED, check_dtype
from torch import Tensor

ELEMENTS_LAUNCH = {"BLOCK": 1024, "num_warps": 4} | FUSED
BIAS_LAUNCH = {"BLOCK_COLUMNS": 32, "BLOCK_ROWS": 64, "num_warps": 4} | FUSED


@triton.jit
def split_base_kernel(f_ptr, g_ptr, scaled_ptr, opened_ptr, n, BLOCK: tl.constexpr):
    """Grid (cdiv(n, BLOCK),). Reads f and g once, writes f g and ReLU(f)."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(f_ptr + at, mask=at < n, other=0.0)
    g = tl.load(g_ptr + at, mask=at < n, other=0.0)
    tl.store(scaled_ptr + at, f * g, mask=at < n)
    tl.store(opened_ptr + at, tl.where(f <= 0, 0.0, f), mask=at < n)  # a NaN stays: a diverged network must show


@triton.jit(do_not_specialize=["n_rows", "n_saved"])
def split_base_bwd_kernel(
    d_scaled_ptr, d_opened_ptr, f_ptr, g_ptr, d_f_ptr, d_g_ptr, n_rows, n_saved, stride,
    H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B H, BLOCK), E). Reads both gradients [E,B,H], and of f and g the first B of n_saved rows; writes d_f
    and d_g, whose rows lie `stride` numbers apart."""
    net = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_rows * H
    saved, back = net * n_saved * H + at, net * n_rows * H + at
    f = tl.load(f_ptr + saved, mask=inside, other=0.0)
    g = tl.load(g_ptr + saved, mask=inside, other=0.0)
    d_scaled = tl.load(d_scaled_ptr + back, mask=inside, other=0.0)
    d_opened = tl.load(d_opened_ptr + back, mask=inside, other=0.0)
    to = (net * n_rows + at // H) * stride + at % H
    tl.store(d_f_ptr + to, d_scaled * g + tl.where(f > 0, d_opened, 0.0), mask=inside)
    tl.store(d_g_ptr + to, d_scaled * f, mask=inside)


@triton.jit(do_not_specialize=["n_back"])
def bias_gradient_kernel(
    d_z_ptr, place_ptr, gradient_ptr, n_back, n_columns,
    N_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(W, BLOCK_COLUMNS), E); a program sums its columns of d_z [E,n_back,W] over the first N_ROWS rows, in
    one order whatever the device does meanwhile, and writes each sum where `place` [E,W] says.

    N_ROWS is a constant, for Triton 3.6's interpreter takes no tensor as the bound of a loop; a run has one.
    """
    net = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    inside = column < n_columns
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), d_z_ptr.dtype.element_ty)
    for start in range(0, N_ROWS, BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        at = (net * n_back + row)[:, None] * n_columns + column[None, :]
        total += tl.load(d_z_ptr + at, mask=(row < N_ROWS)[:, None] & inside[None, :], other=0.0)
    place = tl.load(place_ptr + net * n_columns + column, mask=inside, other=0)
    tl.store(gradient_ptr + place, tl.sum(total, 0), mask=inside)


def split_base(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """f g and ReLU(f) of contiguous [E,B,H]."""
    check_dtype("f", f)
    scaled, opened = torch.empty_like(f), torch.empty_like(f)
    if f.numel() > 0:
        grid = (triton.cdiv(f.numel(), ELEMENTS_LAUNCH["BLOCK"]),)
        split_base_kernel[grid](f, g, scaled, opened, f.numel(), **ELEMENTS_LAUNCH)
    return scaled, opened


def split_base_backward(d_scaled: Tensor, d_opened: Tensor, f: Tensor, g: Tensor, d_f: Tensor, d_g: Tensor) -> None:
    """Writes the gradients of f and g; f, g [E,B or more,H]; d_f, d_g [E,B,H] columns of one wider matrix."""
    check_dtype("d_scaled", d_scaled)
    n_nets, n_rows, width = d_scaled.shape
    if d_scaled.numel() > 0:
        grid = (triton.cdiv(n_rows * width, ELEMENTS_LAUNCH["BLOCK"]), n_nets)
        split_base_bwd_kernel[grid](
            d_scaled, d_opened, f, g, d_f, d_g, n_rows, f.shape[1], d_f.stride(1), H=width, **ELEMENTS_LAUNCH
        )


def bias_gradient(d_z: Tensor, place: Tensor, gradient: Tensor, n_rows: int) -> None:
    """gradient[place[e,j]] becomes the sum of d_z [E,B,W] over its first `n_rows` rows; place [E,W] int64."""
    check_dtype("d_z", d_z)
    n_nets, n_back, n_columns = d_z.shape
    launch: dict[str, Any] = BIAS_LAUNCH
    grid = (triton.cdiv(n_columns, launch["BLOCK_COLUMNS"]), n_nets)
    bias_gradient_kernel[grid](d_z, place, gradient, n_back, n_columns, N_ROWS=n_rows, **launch)
