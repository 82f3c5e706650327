"""All N modules in one launch forward and three backward (`d2r_fast.ops.routed_modules` is contract and oracle).

A program walks one tile of rows through all modules (`module_walk`). The buffers between modules are [E,N,B,D]
in global memory; a tile's part of them stays in L2.

What a row's `active` does not reach is neither computed, written nor read: those rows of `h`, `opened` and of both
adjoints hold whatever the allocation held.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.module_walk import load_rows, mix_last, push_last, store_rows, tile_rows, walk, walk_back
from d2r_fast.kernels.row_order import row_order
from d2r_fast.kernels.settings import check_dtype, packed, walk_launch
from d2r_fast.kernels.tiles import at_place
from d2r_fast.kernels.weight_gradient import weight_gradient
from d2r_fast.ops.select_routes import Routes

# Sorting rows by their active modules lets a tile skip more, starts tiles that skip least first, and costs a launch.
# Up to about two tiles of 16 a multiprocessor (132 on an H100 or H200) all run at once, and the slowest decides.
SORT_FROM_ROWS = 264 * 16
MOST_PROGRAMS = 65535
"""Programs along any but the first axis of a grid."""


@triton.jit(do_not_specialize=["n_rows"])
def routed_modules_fwd_kernel(
    h0_ptr, weight_ptr, bias_ptr, place_ptr, index_ptr, gate_ptr, active_ptr, order_ptr, mixed_ptr, h_ptr, opened_ptr,
    n_rows,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid `_grid`; a program owns its rows of h, opened and mixed through all N modules.

    Per active module and row: reads K sources of D twice (as the product's operand, and for the residual: to hold x
    next to the accumulator spills), writes D of h and D bytes of opened. Per module that a tile touches: D*D weights.
    place [E,3]: where each network's weights and biases begin; None: they stand one behind another.
    Invariant: an active module's sources are active, so no load that the masks let through meets unwritten memory.
    """
    net = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    if place_ptr is None:
        weight_ptr += net * (N - 1) * D * D
        bias_ptr += net * (N - 1) * D
    else:
        weight_ptr = at_place(weight_ptr, place_ptr, net, 0, D)
        bias_ptr = at_place(bias_ptr, place_ptr, net, 1, D)
    if order_ptr is not None:
        order_ptr += net * n_rows
    rows = tile_rows(active_ptr + net * n_rows, order_ptr, n_rows, tile, BLOCK_ROWS, N, K)
    index_ptr += net * n_rows * N * K
    gate_ptr += net * n_rows * N * K
    h0_ptr += net * n_rows * D
    mixed_ptr += net * n_rows * D
    h_ptr += net * N * n_rows * D
    if opened_ptr is not None:
        opened_ptr += net * N * n_rows * D

    # Module 0's output joins the buffer, so that every source is a row of one array.
    store_rows(load_rows(h0_ptr, rows, D, BLOCK_D), h_ptr, rows, D, BLOCK_D)
    tl.debug_barrier()
    walk(
        h_ptr, weight_ptr, bias_ptr, index_ptr, gate_ptr, opened_ptr, rows, n_rows,
        N, K, D, RESIDUAL, PRECISION, BLOCK_D, BLOCK_ROWS, BLOCK_K,
    )  # fmt: skip
    mix_last(h_ptr, index_ptr, gate_ptr, mixed_ptr, rows, n_rows, N, K, D, BLOCK_D)


@triton.jit(do_not_specialize=["n_rows"])
def routed_modules_bwd_kernel(
    d_mixed_ptr, h_ptr, weight_ptr, place_ptr, opened_ptr, index_ptr, gate_ptr, flow_ptr, active_ptr, order_ptr,
    d_h0_ptr, d_gate_ptr, to_relu_ptr, to_residual_ptr, n_rows,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, FIRST_RELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid `_grid`; a program owns its rows of d_h0, d_gate and of both adjoints, so no atomics.

    Adjoints [E,N,B,D]: to_relu (A) reaches a module's ReLU layer, to_residual (S) its residual. Per active module and
    row: reads D of A, S and D bytes of opened, then for each of K sources D of h and both adjoints, which it writes
    back. A is left for the weight gradient (dz = A where opened). Skipped routes of d_gate are not written. FIRST_RELU:
    there is a ReLU in front of module 0, which d_h0 is to be in front of too. place as in the forward kernel.
    """
    net = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1) + tl.program_id(2) * tl.num_programs(1)
    if order_ptr is not None:
        order_ptr += net * n_rows
    if place_ptr is None:
        weight_ptr += net * (N - 1) * D * D
    else:
        weight_ptr = at_place(weight_ptr, place_ptr, net, 0, D)
    d_mixed_ptr += net * n_rows * D
    d_h0_ptr += net * n_rows * D
    index_ptr += net * n_rows * N * K
    gate_ptr += net * n_rows * N * K
    flow_ptr += net * n_rows * N * K
    d_gate_ptr += net * n_rows * N * K
    h_ptr += net * N * n_rows * D
    opened_ptr += net * N * n_rows * D
    to_relu_ptr += net * N * n_rows * D
    if RESIDUAL:
        to_residual_ptr += net * N * n_rows * D

    rows = tile_rows(active_ptr + net * n_rows, order_ptr, n_rows, tile, BLOCK_ROWS, N, K)
    reached = push_last(
        load_rows(d_mixed_ptr, rows, D, BLOCK_D), h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr,
        d_gate_ptr, rows, n_rows, N, K, D, RESIDUAL, BLOCK_D,
    )  # fmt: skip
    walk_back(
        h_ptr, weight_ptr, opened_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr, to_relu_ptr, to_residual_ptr,
        rows, reached, n_rows, N, K, D, RESIDUAL, PRECISION, BLOCK_D, BLOCK_ROWS, BLOCK_K,
    )  # fmt: skip
    _leave(to_relu_ptr, h_ptr, d_h0_ptr, rows, FIRST_RELU, D, BLOCK_D)


@triton.jit
def _leave(
    to_relu_ptr, h_ptr, d_h0_ptr, rows, FIRST_RELU: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """The gradient that reached module 0, of a tile; written to d_h0 [B,D]."""
    d_h0 = load_rows(to_relu_ptr, rows, D, BLOCK_D)
    if FIRST_RELU:
        d_h0 = tl.where(load_rows(h_ptr, rows, D, BLOCK_D) > 0, d_h0, 0.0)
    store_rows(d_h0, d_h0_ptr, rows, D, BLOCK_D)


def _grid(n_rows: int, launch: dict[str, Any], n_nets: int) -> tuple[int, int, int]:
    """(E, programs for its rows), so that all networks' first tiles start first; what the second axis has no room for
    goes along the third."""
    n_programs = triton.cdiv(n_rows, launch["BLOCK_ROWS"])
    return n_nets, min(n_programs, MOST_PROGRAMS), triton.cdiv(n_programs, MOST_PROGRAMS)


def forward(
    h0: Tensor,
    weight: Tensor,
    bias: Tensor,
    routes: Routes,
    residual: bool,
    precision: str,
    keep: bool,
    order: Tensor | None = None,
    place: Tensor | None = None,
    mixed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """mixed [E,B,D], and for backward h [E,N,B,D] and opened [E,N,B,D] bool (z_i > 0).

    Arguments as `d2r_fast.ops.routed_modules`. Rows of modules that are not active are left as allocated in h and
    opened, and module 0's opened too. keep=False: both come empty.
    order: as `order_if_many` gives it; None: asked of it. It never changes a result.
    place: [E,3] int64, where each network's weights and biases begin within `weight` and `bias`; weights may then be
    bfloat16 where products are. mixed: where it goes, which may be bfloat16.
    ValueError: a dtype other than float32, or an unknown precision.
    """
    check_dtype("h0", h0)
    n_nets, n_rows, width = h0.shape
    n_modules, n_kept = routes.index.shape[2:]
    launch = walk_launch("routed_modules_fwd", precision, n_modules, n_kept, width, n_rows, n_nets)
    if mixed is None:
        mixed = torch.empty_like(h0, memory_format=torch.contiguous_format)
    h = h0.new_empty(n_nets, n_modules, n_rows, width)
    opened = torch.empty_like(h, dtype=torch.bool) if keep else None
    if mixed.numel() > 0:
        routed_modules_fwd_kernel[_grid(n_rows, launch, n_nets)](
            packed(h0), packed(weight), packed(bias), place, packed(routes.index), packed(routes.gate),
            packed(routes.active), order_if_many(routes.active) if order is None else order, mixed, h, opened, n_rows,
            RESIDUAL=residual, **launch,
        )  # fmt: skip
    if opened is None:
        return mixed, h.new_empty(0), h.new_empty(0, dtype=torch.bool)
    return mixed, h, opened


def backward(
    d_mixed: Tensor,
    weight: Tensor,
    h: Tensor,
    opened: Tensor,
    routes: Routes,
    residual: bool,
    precision: str,
    to_weight: bool = True,
    order: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d_h0 [E,B,D] (what may enter module 0's ReLU layer), d_weight, d_bias, d_gate [E,B,N,K].

    h and opened as `forward` left them, order as there. d_gate is 0 in unused slots and in routes of modules that are
    not active. to_weight=False skips the weight gradient: d_weight and d_bias come empty.
    """
    check_dtype("d_mixed", d_mixed)
    routes = Routes(*map(packed, routes))
    d_h0 = torch.empty_like(d_mixed, memory_format=torch.contiguous_format)
    d_gate = torch.zeros_like(routes.gate)
    to_relu = backward_at(packed(d_mixed), packed(weight), None, h, opened, routes, residual, precision, order,
                          d_h0, d_gate, first_relu=False)  # fmt: skip
    if not to_weight:
        return d_h0, h.new_empty(0), h.new_empty(0), d_gate
    d_weight, d_bias = (h.new_empty(weight.shape[:n]) for n in (4, 3))
    weight_gradient(to_relu, opened, h, routes.index, routes.gate, routes.active, precision, d_weight, d_bias)
    return d_h0, d_weight, d_bias, d_gate


def backward_at(
    d_mixed: Tensor,
    weight: Tensor,
    place: Tensor | None,
    h: Tensor,
    opened: Tensor,
    routes: Routes,
    residual: bool,
    precision: str,
    order: Tensor | None,
    d_h0: Tensor,
    d_gate: Tensor,
    first_relu: bool,
) -> Tensor:
    """Writes d_h0 [E,B,D] and d_gate [E,B,N,K], but no gates of modules that are not active; returns the adjoint that
    `weight_gradient` takes. d_mixed [E,B,D] is of the first networks that `forward` ran; place as there. first_relu: a
    ReLU gave h0, and d_h0 is to be the gradient in front of it."""
    n_nets, n_rows, width = d_mixed.shape
    n_modules, n_kept = routes.index.shape[2:]
    launch = walk_launch("routed_modules_bwd", precision, n_modules, n_kept, width, n_rows, n_nets)
    to_relu = h.new_empty(n_nets, n_modules, n_rows, width)
    to_residual = torch.empty_like(to_relu) if residual else h.new_empty(0)
    if d_h0.numel() > 0:
        routed_modules_bwd_kernel[_grid(n_rows, launch, n_nets)](
            d_mixed, h, weight, place, opened, *routes, order_if_many(routes.active) if order is None else order,
            d_h0, d_gate, to_relu, to_residual, n_rows,
            RESIDUAL=residual, FIRST_RELU=first_relu, **launch,
        )  # fmt: skip
    return to_relu


def order_if_many(active: Tensor) -> Tensor | None:
    """Rows of every network by their active modules, [E,B] int64; or None for as they come, where there are few."""
    return row_order(active) if active.numel() > SORT_FROM_ROWS else None
