"""Sums of a row's experts, as they are or made orthonormal, in one launch each way
(`d2r_fast.ops.expert_sum` is contract and oracle)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, check_real, check_tensor, packed
from d2r_fast.kernels.tiles import sum_products


@triton.jit
def expert_sum_fwd_kernel(
    v_ptr, weight_ptr, y_ptr, basis_ptr,
    N: tl.constexpr, D: tl.constexpr, ORTHOGONAL: tl.constexpr, NORM_EPSILON: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (E B,); a program owns a row: reads N D numbers, writes D. Orthogonal: its basis [N,D] goes through `basis`,
    where it finds its earlier vectors in the first-level cache."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    exists = column < D
    y = tl.zeros((BLOCK_D,), y_ptr.dtype.element_ty)
    for k in tl.static_range(N):
        at = (row * N + k) * D + column
        v = tl.load(v_ptr + at, mask=exists, other=0.0)
        if ORTHOGONAL:
            v, _ = _next(v, basis_ptr, row, column, exists, NORM_EPSILON, N, D, k)
            tl.store(basis_ptr + at, v, mask=exists)
            tl.debug_barrier()  # other threads of the program read it
        y += tl.load(weight_ptr + row * N + k) * v
    tl.store(y_ptr + row * D + column, y, mask=exists)


@triton.jit
def expert_sum_bwd_kernel(
    d_y_ptr, v_ptr, weight_ptr, basis_ptr, d_v_ptr, d_weight_ptr,
    N: tl.constexpr, D: tl.constexpr, ORTHOGONAL: tl.constexpr, NORM_EPSILON: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (E B,); a program owns a row. Orthogonal: `basis` is what forward left there, and d_v holds the gradients of
    the basis until, from the last vector to the first, they have become those of v."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    exists = column < D
    d_y = tl.load(d_y_ptr + row * D + column, mask=exists, other=0.0)
    summed_ptr = basis_ptr if ORTHOGONAL else v_ptr
    for k in tl.static_range(N):
        at = (row * N + k) * D + column
        tl.store(d_weight_ptr + row * N + k, sum_products(d_y, tl.load(summed_ptr + at, mask=exists, other=0.0), 0))
        tl.store(d_v_ptr + at, tl.load(weight_ptr + row * N + k) * d_y, mask=exists)
    if ORTHOGONAL:
        for i in tl.static_range(N - 1, -1, -1):
            tl.debug_barrier()
            at = (row * N + i) * D + column
            v = tl.load(v_ptr + at, mask=exists, other=0.0)
            b, length = _next(v, basis_ptr, row, column, exists, NORM_EPSILON, N, D, i)
            d_b = tl.load(d_v_ptr + at, mask=exists, other=0.0)
            # Through the division by |r| + eps. A norm of 0 has no slope.
            norm = length + NORM_EPSILON
            along = tl.where(length == 0, 0.0, sum_products(d_b, b, 0) * norm / length)
            d_r = (d_b - along * b) / norm
            d_v = d_r
            for j in tl.static_range(i):
                other = (row * N + j) * D + column
                b_j = tl.load(basis_ptr + other, mask=exists, other=0.0)
                d_c = -sum_products(d_r, b_j, 0)
                d_v += d_c * b_j
                d_b_j = tl.load(d_v_ptr + other, mask=exists, other=0.0)
                tl.debug_barrier()  # of a narrow row several threads read what one of them writes
                tl.store(d_v_ptr + other, d_b_j + d_c * v - sum_products(v, b_j, 0) * d_r, mask=exists)
            tl.debug_barrier()
            tl.store(d_v_ptr + at, d_v, mask=exists)


@triton.jit
def _next(
    v, basis_ptr, row, column, exists, NORM_EPSILON: tl.constexpr, N: tl.constexpr, D: tl.constexpr, k: tl.constexpr
):
    """Vector k of the basis, from those before it in memory, and |r_k|."""
    r = v
    for j in tl.static_range(k):
        b = tl.load(basis_ptr + (row * N + j) * D + column, mask=exists, other=0.0)
        r -= sum_products(v, b, 0) * b
    length = tl.sqrt(sum_products(r, r, 0))
    return r / (length + NORM_EPSILON), length


def sum_launch(n_experts: int, width: int, orthogonal: bool, norm_epsilon: float) -> dict[str, Any]:
    """Constants and options of both kernels: about four numbers a thread."""
    block = triton.next_power_of_2(max(1, width))
    sizes = {"N": n_experts, "D": width, "ORTHOGONAL": orthogonal, "NORM_EPSILON": norm_epsilon, "BLOCK_D": block}
    return sizes | {"num_warps": min(8, max(1, block // 128))} | FUSED


def forward(v: Tensor, weight: Tensor, orthogonal: bool, norm_epsilon: float) -> Tensor:
    """y [E,B,D]. ValueError: shapes or dtypes disagree."""
    return _forward(*_checked(v, weight), orthogonal, norm_epsilon)[0]


def _checked(v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor("weight", weight, check_real("v", v), v.shape[:3])
    return packed(v), packed(weight)


def _forward(v: Tensor, weight: Tensor, orthogonal: bool, norm_epsilon: float) -> tuple[Tensor, Tensor]:
    """y, and the basis like v, empty unless orthogonal."""
    n_nets, n_rows, n_experts, width = v.shape
    y, basis = v.new_empty(n_nets, n_rows, width), v.new_empty(v.shape if orthogonal else 0)
    if y.numel() > 0:
        launch = sum_launch(n_experts, width, orthogonal, norm_epsilon)
        expert_sum_fwd_kernel[(n_nets * n_rows,)](v, weight, y, basis, **launch)
    return y, basis


def backward(d_y: Tensor, v: Tensor, weight: Tensor, orthogonal: bool, norm_epsilon: float) -> tuple[Tensor, Tensor]:
    """d_v [E,B,N,D] and d_weight [E,B,N]; the basis is made anew. ValueError: shapes or dtypes disagree."""
    v, weight = _checked(v, weight)
    n_nets, n_rows, n_experts, width = v.shape
    check_tensor("d_y", d_y, v.dtype, [n_nets, n_rows, width])
    d_v, d_weight = torch.empty_like(v), torch.empty_like(weight)
    if d_v.numel() > 0:
        basis = _forward(v, weight, True, norm_epsilon)[1] if orthogonal else v.new_empty(0)
        launch = sum_launch(n_experts, width, orthogonal, norm_epsilon)
        expert_sum_bwd_kernel[(n_nets * n_rows,)](packed(d_y), v, weight, basis, d_v, d_weight, **launch)
    return d_v, d_weight
