"""All N modules in one launch forward and three backward (`d2r_fast.ops.routed_modules` is contract and oracle).

A module's sources are rows of the same tile, so one program walks all modules of a tile of rows by itself. What it
writes for one module it reads for a later one: same program, but other threads, hence the barrier after every module.
The buffers between modules are [E,N,B,D] in global memory; a tile's part of them stays in L2.

What a row's `active` does not reach is neither computed, written nor read: those rows of `h`, `opened` and of both
adjoints hold whatever the allocation held. A tile whose rows all skip a module pays one reduction for it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.row_order import row_order
from d2r_fast.kernels.settings import check_dtype, packed, walk_launch
from d2r_fast.kernels.tiles import at_place, by_rows, mix_sources, product, sum_products, tile_rows
from d2r_fast.kernels.weight_gradient import weight_gradient
from d2r_fast.ops.select_routes import Routes

# Sorting rows by their active modules lets a tile skip more, starts tiles that skip least first, and costs a launch.
# Up to about two tiles of 16 a multiprocessor (132 on an H100 or H200) all run at once, and the slowest decides.
SORT_FROM_ROWS = 264 * 16
MOST_TILES = 65535
"""Programs along any but the first axis of a grid."""


@triton.jit
def walk(
    h_ptr, weight_ptr, bias_ptr, index_ptr, gate_ptr, opened_ptr, slot, row, inside, active, n_rows,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Run modules 1..N-1 of one network over a tile of rows, whose module 0 is in h [N,B,D] and awaited; returns what
    the last route mixes, [rows,BLOCK_D]. Writes h and opened of active modules. slot: of route 1, by row."""
    col = tl.arange(0, BLOCK_D)
    in_width = (col < D)[None, :]
    for i in range(1, N):
        wanted = inside & (((active >> i) & 1) != 0)
        if tl.max(wanted.to(tl.int32), 0) > 0:
            route = slot + (i - 1) * K
            module = i - 1
            z = tl.zeros((BLOCK_ROWS, BLOCK_D), h_ptr.dtype.element_ty)
            for start in range(0, D, BLOCK_K):
                feature = start + tl.arange(0, BLOCK_K)
                x = mix_sources(h_ptr, index_ptr, gate_ptr, route, row, wanted, i, feature, n_rows, D, K)
                w = tl.load(
                    weight_ptr + module * D * D + (col * D)[:, None] + feature[None, :],
                    mask=(col < D)[:, None] & (feature < D)[None, :],
                    other=0.0,
                )
                z = product(x, tl.trans(w), z, PRECISION)
            z += tl.load(bias_ptr + module * D + col, mask=col < D, other=0.0)[None, :]
            h = tl.where(z <= 0, 0.0, z)  # a NaN stays: a diverged network must show
            if RESIDUAL:
                h += mix_sources(h_ptr, index_ptr, gate_ptr, route, row, wanted, i, col, n_rows, D, K)
            at = ((i * n_rows + row) * D)[:, None] + col[None, :]
            tl.store(h_ptr + at, h, mask=wanted[:, None] & in_width)
            if opened_ptr is not None:
                tl.store(opened_ptr + at, z > 0, mask=wanted[:, None] & in_width)
            tl.debug_barrier()
    return mix_sources(h_ptr, index_ptr, gate_ptr, slot + (N - 1) * K, row, inside, N, col, n_rows, D, K)


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
    row, inside, active = tile_rows(active_ptr + net * n_rows, order_ptr, n_rows, tile, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_D)
    in_width = (col < D)[None, :]
    buffer = net * N * n_rows * D
    slot = (net * n_rows + row) * (N * K)  # of route 1
    own_row = ((net * n_rows + row) * D)[:, None] + col[None, :]

    # Module 0's output joins the buffer, so that every source is a row of one array.
    h0 = tl.load(h0_ptr + own_row, mask=inside[:, None] & in_width, other=0.0)
    tl.store(h_ptr + buffer + (row * D)[:, None] + col[None, :], h0, mask=inside[:, None] & in_width)
    tl.debug_barrier()
    if opened_ptr is not None:
        opened_ptr += buffer
    mixed = walk(
        h_ptr + buffer, weight_ptr, bias_ptr, index_ptr, gate_ptr, opened_ptr, slot, row, inside, active, n_rows,
        N, K, D, RESIDUAL, PRECISION, BLOCK_D, BLOCK_ROWS, BLOCK_K,
    )  # fmt: skip
    tl.store(mixed_ptr + own_row, mixed, mask=inside[:, None] & in_width)


@triton.jit
def _push(
    d_main, d_res, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr,
    slot, row, wanted, route, col, touched, n_rows,
    D: tl.constexpr, K: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Hand the gradient at x of one route to its sources; returns which adjoint rows exist by now (bits).

    The first gradient that reaches an adjoint row is stored, later ones are added: nothing has to be zeroed before,
    and a row reads only what it wrote. Sources of a route are distinct, so its slots never meet. S_0 is never read.
    """
    d_all = d_main + d_res
    for k in tl.range(0, K, loop_unroll_factor=K if K <= 4 else 1):  # unrolled, many slots compile for minutes
        used = tl.where(route > k, wanted, False)
        source = tl.load(index_ptr + slot + k, mask=used, other=0)
        gate = tl.load(gate_ptr + slot + k, mask=used, other=0.0)[:, None]
        flow = tl.load(flow_ptr + slot + k, mask=used, other=0)[:, None]
        tile = used[:, None] & (col < D)[None, :]
        seen = tile & (((touched >> source) & 1) != 0)[:, None]
        source = source.to(tl.int64)
        at = ((source * n_rows + row) * D)[:, None] + col[None, :]
        h = tl.load(h_ptr + at, mask=tile, other=0.0)
        tl.store(d_gate_ptr + slot + k, sum_products(d_all, h, 1), mask=used)
        to_relu = tl.load(to_relu_ptr + at, mask=seen, other=0.0)
        tl.store(to_relu_ptr + at, to_relu + gate * (tl.where(flow != 0, d_main, 0.0) + d_res), mask=tile)
        if RESIDUAL:
            later = (source > 0)[:, None]
            to_residual = tl.load(to_residual_ptr + at, mask=seen & later, other=0.0)
            tl.store(to_residual_ptr + at, to_residual + gate * d_all, mask=tile & later)
        touched |= tl.where(used, tl.full(source.shape, 1, tl.int32) << source.to(tl.int32), 0)
    return touched


@triton.jit
def walk_back(
    d_x, h_ptr, weight_ptr, opened_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr, to_relu_ptr, to_residual_ptr,
    slot, row, inside, active, n_rows,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From the gradient d_x [rows,BLOCK_D] at what the last route mixed, back through modules N-1..1 of one network:
    writes both adjoints [N,B,D] of active modules, module 0 among them and awaited, and d_gate of active routes."""
    col = tl.arange(0, BLOCK_D)
    in_width = (col < D)[None, :]
    touched = _push(
        d_x, tl.zeros_like(d_x), h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr,
        flow_ptr, d_gate_ptr, slot + (N - 1) * K, row, inside, N, col, tl.zeros_like(active),
        n_rows, D, K, RESIDUAL,
    )  # fmt: skip
    tl.debug_barrier()
    for i in range(N - 1, 0, -1):
        wanted = inside & (((active >> i) & 1) != 0)
        if tl.max(wanted.to(tl.int32), 0) > 0:
            module = i - 1
            at = ((i * n_rows + row) * D)[:, None]
            # Of routes made by hand: a module that runs, though nothing reads it.
            unread = wanted & (((touched >> i) & 1) == 0)
            if tl.max(unread.to(tl.int32), 0) > 0:
                mask = unread[:, None] & in_width
                tl.store(to_relu_ptr + at + col[None, :], tl.zeros_like(d_x), mask=mask)
                if RESIDUAL:
                    tl.store(to_residual_ptr + at + col[None, :], tl.zeros_like(d_x), mask=mask)
                tl.debug_barrier()
            d_main = tl.zeros((BLOCK_ROWS, BLOCK_D), h_ptr.dtype.element_ty)
            for start in range(0, D, BLOCK_K):
                feature = start + tl.arange(0, BLOCK_K)
                part = wanted[:, None] & (feature < D)[None, :]
                d_z = tl.load(to_relu_ptr + at + feature[None, :], mask=part, other=0.0)
                opened = tl.load(opened_ptr + at + feature[None, :], mask=part, other=0)
                w = tl.load(
                    weight_ptr + module * D * D + (feature * D)[:, None] + col[None, :],
                    mask=(feature < D)[:, None] & in_width,
                    other=0.0,
                )
                d_main = product(tl.where(opened != 0, d_z, 0.0), w, d_main, PRECISION)
            d_main = by_rows(d_main)
            d_res = tl.zeros_like(d_main)
            if RESIDUAL:
                d_res = tl.load(to_residual_ptr + at + col[None, :], mask=wanted[:, None] & in_width, other=0.0)
            touched = _push(
                d_main, d_res, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr,
                flow_ptr, d_gate_ptr, slot + (i - 1) * K, row, wanted, i, col, touched,
                n_rows, D, K, RESIDUAL,
            )  # fmt: skip
            tl.debug_barrier()


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
    row, inside, active = tile_rows(active_ptr + net * n_rows, order_ptr, n_rows, tile, BLOCK_ROWS)
    col = tl.arange(0, BLOCK_D)
    in_width = (col < D)[None, :]
    buffer = net * N * n_rows * D
    if place_ptr is None:
        weight_ptr += net * (N - 1) * D * D
    else:
        weight_ptr = at_place(weight_ptr, place_ptr, net, 0, D)
    h_ptr += buffer
    opened_ptr += buffer
    slot = (net * n_rows + row) * (N * K)  # of route 1
    own_row = ((net * n_rows + row) * D)[:, None] + col[None, :]

    d_x = tl.load(d_mixed_ptr + own_row, mask=inside[:, None] & in_width, other=0.0)
    to_relu_ptr += buffer
    if RESIDUAL:
        to_residual_ptr += buffer
    walk_back(
        d_x, h_ptr, weight_ptr, opened_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr, to_relu_ptr, to_residual_ptr,
        slot, row, inside, active, n_rows, N, K, D, RESIDUAL, PRECISION, BLOCK_D, BLOCK_ROWS, BLOCK_K,
    )  # fmt: skip
    first = (row * D)[:, None] + col[None, :]
    to_relu = tl.load(to_relu_ptr + first, mask=inside[:, None] & in_width, other=0.0)
    if FIRST_RELU:
        to_relu = tl.where(tl.load(h_ptr + first, mask=inside[:, None] & in_width, other=0.0) > 0, to_relu, 0.0)
    tl.store(d_h0_ptr + own_row, to_relu, mask=inside[:, None] & in_width)


def _grid(n_rows: int, block_rows: int, n_nets: int) -> tuple[int, int, int]:
    """(E, tiles of rows), so that all networks' first tiles start first; what the second axis has no room for goes
    along the third."""
    n_tiles = triton.cdiv(n_rows, block_rows)
    return n_nets, min(n_tiles, MOST_TILES), triton.cdiv(n_tiles, MOST_TILES)


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
        routed_modules_fwd_kernel[_grid(n_rows, launch["BLOCK_ROWS"], n_nets)](
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
        routed_modules_bwd_kernel[_grid(n_rows, launch["BLOCK_ROWS"], n_nets)](
            d_mixed, h, weight, place, opened, *routes, order_if_many(routes.active) if order is None else order,
            d_h0, d_gate, to_relu, to_residual, n_rows,
            RESIDUAL=residual, FIRST_RELU=first_relu, **launch,
        )  # fmt: skip
    return to_relu


def order_if_many(active: Tensor) -> Tensor | None:
    """Rows of every network by their active modules, [E,B] int64; or None for as they come, where there are few."""
    return row_order(active) if active.numel() > SORT_FROM_ROWS else None
