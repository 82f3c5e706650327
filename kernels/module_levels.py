"""Mixes of the modules of one level, and their gradient, in one launch each; the products between them are torch's
(`d2r_fast.ops.module_levels` is contract and oracle).

A level's outputs lie as [E,N,B,D], so that its products are one batched product, and all levels' as [L,E,N,B,D].
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, check_dtype, packed
from d2r_fast.kernels.tiles import sum_products
from d2r_fast.ops.reference.products import product


@triton.jit(do_not_specialize=["n_rows"])
def mix_fwd_kernel(
    m_ptr, gate_ptr, x_ptr, n_rows, n_gates, first_gate,
    N: tl.constexpr, TARGETS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS), TARGETS, E); a program owns the rows of one target: x_j = ReLU(sum_k p_jk m_k), of
    m [E,N,B,D] to x [E,TARGETS,B,D]. Every target reads its row's N D numbers anew, from the L2."""
    net, target = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row, inside, column, exists = _rows(n_rows, D, BLOCK_D, BLOCK_ROWS)
    gate_at = (net * n_rows + row) * n_gates + first_gate + target * N
    x = tl.zeros((BLOCK_ROWS, BLOCK_D), x_ptr.dtype.element_ty)
    for k in tl.static_range(N):
        gate = tl.load(gate_ptr + gate_at + k, mask=inside, other=0.0)
        x += gate[:, None] * tl.load(
            m_ptr + ((net * N + k) * n_rows + row)[:, None] * D + column, mask=exists, other=0.0
        )
    x = tl.where(x < 0, 0.0, x)  # a NaN stays: a diverged network must show
    tl.store(x_ptr + ((net * TARGETS + target) * n_rows + row)[:, None] * D + column, x, mask=exists)


@triton.jit(do_not_specialize=["n_rows"])
def mix_bwd_kernel(
    d_x_ptr, x_ptr, m_ptr, gate_ptr, d_m_ptr, d_gate_ptr, n_rows, n_gates, first_gate,
    N: tl.constexpr, TARGETS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS), N, E); a program owns the rows of one source: d_m_k = sum_j p_jk d_z_j and
    d_p_jk = <d_z_j, m_k>, where d_z_j is d_x_j where x_j is above 0."""
    net, source = tl.program_id(2).to(tl.int64), tl.program_id(1)
    row, inside, column, exists = _rows(n_rows, D, BLOCK_D, BLOCK_ROWS)
    gate_at = (net * n_rows + row) * n_gates + first_gate + source
    own = ((net * N + source) * n_rows + row)[:, None] * D + column
    m = tl.load(m_ptr + own, mask=exists, other=0.0)
    d_m = tl.zeros((BLOCK_ROWS, BLOCK_D), d_m_ptr.dtype.element_ty)
    for j in tl.static_range(TARGETS):
        at = ((net * TARGETS + j) * n_rows + row)[:, None] * D + column
        x = tl.load(x_ptr + at, mask=exists, other=0.0)
        d_z = tl.where(x > 0, tl.load(d_x_ptr + at, mask=exists, other=0.0), 0.0)
        d_m += tl.load(gate_ptr + gate_at + j * N, mask=inside, other=0.0)[:, None] * d_z
        tl.store(d_gate_ptr + gate_at + j * N, sum_products(d_z, m, 1), mask=inside)
    tl.store(d_m_ptr + own, d_m, mask=exists)


@triton.jit
def _rows(n_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """A program's rows [rows] (int64, because they are multiplied by widths) and columns [1,cols], and which exist."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_D)[None, :]
    return row, row < n_rows, column, (row < n_rows)[:, None] & (column < D)


def mix_launch(n_modules: int, targets: int, width: int) -> dict[str, Any]:
    """Constants and options of both kernels: about 2,048 numbers a program, 16 a thread."""
    block = triton.next_power_of_2(width)
    sizes = {"N": n_modules, "TARGETS": targets, "D": width, "BLOCK_D": block, "BLOCK_ROWS": max(1, 2048 // block)}
    return sizes | {"num_warps": 4} | FUSED


def _mix(m: Tensor, gate: Tensor, first_gate: int, targets: int) -> Tensor:
    """m [E,N,B,D] -> ReLU of its mixes [E,TARGETS,B,D]; gates from `first_gate` on."""
    n_nets, n_modules, n_rows, width = m.shape
    x = m.new_empty(n_nets, targets, n_rows, width)
    if x.numel() > 0:
        launch = mix_launch(n_modules, targets, width)
        grid = triton.cdiv(n_rows, launch["BLOCK_ROWS"]), targets, n_nets
        mix_fwd_kernel[grid](m, gate, x, n_rows, gate.shape[2], first_gate, **launch)
    return x


def _mix_backward(d_x: Tensor, x: Tensor, m: Tensor, gate: Tensor, d_gate: Tensor, first_gate: int) -> Tensor:
    """d_m like m; writes its part of d_gate."""
    n_nets, n_modules, n_rows, width = m.shape
    d_m = torch.empty_like(m)
    if m.numel() > 0:
        launch = mix_launch(n_modules, x.shape[1], width)
        grid = triton.cdiv(n_rows, launch["BLOCK_ROWS"]), n_modules, n_nets
        mix_bwd_kernel[grid](d_x, x, m, gate, d_m, d_gate, n_rows, gate.shape[2], first_gate, **launch)
    return d_m


def forward(u: Tensor, gate: Tensor, precision: str, keep: bool, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    """y [E,B,D] and, if `keep`, every module's output [E,B,L,N,D] in the order [L,E,N,B,D]. ValueError: no float32."""
    for name, value in {"u": u, "gate": gate}.items():
        check_dtype(name, value)
    n_nets, n_rows, _ = u.shape
    n_levels, (n_modules, width) = len(parameters) // 2, parameters[0].shape[1:3]
    gate = packed(gate)
    kept = u.new_empty(n_levels if keep else 2, n_nets, n_modules, n_rows, width)
    x, m = u, kept[0]
    for level in range(n_levels):
        if level > 0:
            x = _mix(m, gate, (level - 1) * n_modules**2, n_modules)
            m = kept[level if keep else level % 2]
        _products(x, parameters[2 * level], parameters[2 * level + 1], precision, m)
    y = _mix(m, gate, (n_levels - 1) * n_modules**2, 1)[:, 0]
    shape = (n_nets, n_rows, n_levels, n_modules, width)
    return y, kept.view(shape) if keep else u.new_empty(0)


def _products(x: Tensor, weight: Tensor, bias: Tensor, precision: str, m: Tensor) -> None:
    """m [E,N,B,D] of x [E,N,B,D], or [E,B,H] for all N alike."""
    shared = x.dim() == 3
    own = x[:, None].expand(-1, weight.shape[1], -1, -1) if shared else x
    y = product(own.flatten(0, 1), weight.flatten(0, 1).mT, precision, bias.flatten(0, 1)[:, None])
    m.copy_(y.view(m.shape))


def backward(
    d_y: Tensor, u: Tensor, gate: Tensor, y: Tensor, m: Tensor, precision: str, parameters: list[Tensor],
    d_parameters: list[Tensor],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """d_u [E,B,H] and d_gate; writes the parameters' gradients to d_parameters, if there are any."""
    check_dtype("d_y", d_y)
    n_nets, n_rows, _ = u.shape
    n_levels, (n_modules, width) = len(parameters) // 2, parameters[0].shape[1:3]
    square, gate = n_modules**2, packed(gate)
    kept = m.view(n_levels, n_nets, n_modules, n_rows, width)
    d_gate = torch.empty_like(gate)
    d_m = _mix_backward(packed(d_y)[:, None], packed(y)[:, None], kept[-1], gate, d_gate, (n_levels - 1) * square)
    for level in range(n_levels - 1, -1, -1):
        weight = parameters[2 * level].flatten(0, 1)  # [E N,D,in]
        d_z = d_m.flatten(0, 1)  # [E N,B,D]
        if level > 0:
            x = _mix(kept[level - 1], gate, (level - 1) * square, n_modules)
        else:
            x = u[:, None].expand(-1, n_modules, -1, -1)
        if d_parameters:
            d_weight = product(d_z.mT, x.flatten(0, 1), precision)
            d_parameters[2 * level].copy_(d_weight.view(parameters[2 * level].shape))
            torch.sum(d_m, 2, out=d_parameters[2 * level + 1])
        d_x = product(d_z, weight, precision).view(n_nets, n_modules, n_rows, -1)
        if level == 0:
            return d_x.sum(1), d_gate
        d_m = _mix_backward(d_x, x, kept[level - 1], gate, d_gate, (level - 1) * square)
    raise AssertionError("levels: none")
