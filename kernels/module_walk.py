"""A tile of rows on its way through the N modules of a network, forward and back: what programs of `routed_modules` do
between module 0's output and what the last route mixes.

A module's sources are rows of the same tile, so one program walks all modules by itself. What it writes for one module
it reads for a later one: same program, but other threads, hence the barrier after every module. A tile that skips a
module with all its rows pays one reduction for it.

Two tiles may walk side by side: each chunk of weights, most of what is read from the L2, then serves both.
"""

import triton
import triton.language as tl

from d2r_fast.kernels.tiles import by_rows, load_tile, mix_sources, product, sum_products


@triton.jit
def tile_rows(
    active_ptr, order_ptr, n_rows, tile, BLOCK_ROWS: tl.constexpr, N: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Of a tile's rows: their first slots among all routes [B,N,K], the rows themselves (both int64), whether each
    exists, and its active bits (0 where it does not).

    `active` [B] is one network's. `order` [B] lists its rows so that rows that route alike share a tile; None: as they
    come. int64, because rows are multiplied by widths: E*N*B*D passes 2^31.
    """
    at = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = at < n_rows
    row = at.to(tl.int64)
    if order_ptr is not None:
        row = tl.load(order_ptr + at, mask=inside, other=0).to(tl.int64)
    return row * (N * K), row, inside, tl.load(active_ptr + row, mask=inside, other=0)


@triton.jit
def load_rows(from_ptr, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile of a matrix [B,D]."""
    _, row, inside, _ = rows
    return load_tile(from_ptr, row, inside, tl.arange(0, BLOCK_D), D, D)


@triton.jit
def store_rows(a, to_ptr, rows, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """To a tile of a matrix [B,D]."""
    _, row, inside, _ = rows
    col = tl.arange(0, BLOCK_D)
    tl.store(to_ptr + (row * D)[:, None] + col[None, :], a, mask=inside[:, None] & (col < D)[None, :])


@triton.jit
def _wanted(rows, rows_2, i):
    """Rows of either tile that run module i, and in how many tiles there are any. Of one tile: its rows twice."""
    _, _, inside, active = rows
    wanted = inside & (((active >> i) & 1) != 0)
    wanted_2 = wanted
    n_tiles = tl.max(wanted.to(tl.int32), 0)
    if rows_2 is not None:
        _, _, inside_2, active_2 = rows_2
        wanted_2 = inside_2 & (((active_2 >> i) & 1) != 0)
        n_tiles += tl.max(wanted_2.to(tl.int32), 0)
    return wanted, wanted_2, n_tiles


@triton.jit
def walk(
    h_ptr, weight_ptr, bias_ptr, index_ptr, gate_ptr, opened_ptr, rows, rows_2, n_rows,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Run modules 1..N-1 of one network over a tile of rows, whose module 0 is in h [N,B,D] and awaited: writes h and
    opened of active modules.

    rows: a tile's slots of route 1, rows, whether they exist, and their active bits. rows_2: another's, which shares
    each chunk of weights with it; or None.
    """
    slot, row, _, _ = rows
    if rows_2 is not None:
        slot_2, row_2, _, _ = rows_2
    col = tl.arange(0, BLOCK_D)
    for i in range(1, N):
        wanted, wanted_2, n_tiles = _wanted(rows, rows_2, i)
        if n_tiles > 0:
            route = (i - 1) * K
            z = tl.zeros((BLOCK_ROWS, BLOCK_D), h_ptr.dtype.element_ty)
            if rows_2 is not None:
                z_2 = tl.zeros((BLOCK_ROWS, BLOCK_D), h_ptr.dtype.element_ty)
            for start in range(0, D, BLOCK_K):
                feature = start + tl.arange(0, BLOCK_K)
                x = mix_sources(h_ptr, index_ptr, gate_ptr, slot + route, row, wanted, i, feature, n_rows, D, K)
                w = tl.load(
                    weight_ptr + (i - 1) * D * D + (col * D)[:, None] + feature[None, :],
                    mask=(col < D)[:, None] & (feature < D)[None, :],
                    other=0.0,
                )
                z = product(x, tl.trans(w), z, PRECISION)
                if rows_2 is not None:
                    x = mix_sources(
                        h_ptr, index_ptr, gate_ptr, slot_2 + route, row_2, wanted_2, i, feature, n_rows, D, K
                    )
                    z_2 = product(x, tl.trans(w), z_2, PRECISION)
            _finish_module(
                z, h_ptr, bias_ptr, index_ptr, gate_ptr, opened_ptr, slot + route, row, wanted, i, n_rows,
                K, D, RESIDUAL, BLOCK_D,
            )  # fmt: skip
            if rows_2 is not None:
                _finish_module(
                    z_2, h_ptr, bias_ptr, index_ptr, gate_ptr, opened_ptr, slot_2 + route, row_2, wanted_2, i, n_rows,
                    K, D, RESIDUAL, BLOCK_D,
                )  # fmt: skip
            tl.debug_barrier()


@triton.jit
def _finish_module(
    z, h_ptr, bias_ptr, index_ptr, gate_ptr, opened_ptr, slot, row, wanted, i, n_rows,
    K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From the product z of module i to its output; writes this and whether the ReLU is open."""
    col = tl.arange(0, BLOCK_D)
    z += tl.load(bias_ptr + (i - 1) * D + col, mask=col < D, other=0.0)[None, :]
    h = tl.where(z <= 0, 0.0, z)  # a NaN stays: a diverged network must show
    if RESIDUAL:
        h += mix_sources(h_ptr, index_ptr, gate_ptr, slot, row, wanted, i, col, n_rows, D, K)
    at, mask = ((i * n_rows + row) * D)[:, None] + col[None, :], wanted[:, None] & (col < D)[None, :]
    tl.store(h_ptr + at, h, mask=mask)
    if opened_ptr is not None:
        tl.store(opened_ptr + at, z > 0, mask=mask)


@triton.jit
def mix_last(
    h_ptr, index_ptr, gate_ptr, mixed_ptr, rows, n_rows,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the last route mixes, of a tile; written to mixed [B,D]."""
    slot, row, inside, _ = rows
    col = tl.arange(0, BLOCK_D)
    mixed = mix_sources(h_ptr, index_ptr, gate_ptr, slot + (N - 1) * K, row, inside, N, col, n_rows, D, K)
    store_rows(mixed, mixed_ptr, rows, D, BLOCK_D)


@triton.jit
def _push(
    d_main, d_res, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr,
    slot, row, wanted, route, touched, n_rows,
    K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Hand the gradient at x of one route to its sources; returns which adjoint rows exist by now (bits).

    The first gradient that reaches an adjoint row is stored, later ones are added: nothing has to be zeroed before,
    and a row reads only what it wrote. Sources of a route are distinct, so its slots never meet. S_0 is never read.
    """
    col = tl.arange(0, BLOCK_D)
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
def push_last(
    d_mixed, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr, rows, n_rows,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From the gradient d_mixed [rows,BLOCK_D] at what the last route mixes to its sources; which these are (bits)."""
    slot, row, inside, active = rows
    return _push(
        d_mixed, tl.zeros_like(d_mixed), h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr,
        d_gate_ptr, slot + (N - 1) * K, row, inside, N, tl.zeros_like(active), n_rows, K, D, RESIDUAL, BLOCK_D,
    )  # fmt: skip


@triton.jit
def walk_back(
    h_ptr, weight_ptr, opened_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr, to_relu_ptr, to_residual_ptr,
    rows, touched, rows_2, touched_2, n_rows,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From what `push_last` left, `touched`, back through modules N-1..1 of one network: writes both adjoints [N,B,D]
    of active modules, module 0 among them and awaited, and d_gate of active routes. rows and rows_2 as in `walk`."""
    slot, row, _, _ = rows
    if rows_2 is not None:
        slot_2, row_2, _, _ = rows_2
    col = tl.arange(0, BLOCK_D)
    tl.debug_barrier()
    for i in range(N - 1, 0, -1):
        wanted, wanted_2, n_tiles = _wanted(rows, rows_2, i)
        if n_tiles > 0:
            route = (i - 1) * K
            _clear_unread(to_relu_ptr, to_residual_ptr, row, wanted, touched, i, n_rows, D, RESIDUAL, BLOCK_D)
            d_main = tl.zeros((BLOCK_ROWS, BLOCK_D), h_ptr.dtype.element_ty)
            if rows_2 is not None:
                _clear_unread(to_relu_ptr, to_residual_ptr, row_2, wanted_2, touched_2, i, n_rows, D, RESIDUAL, BLOCK_D)
                d_main_2 = tl.zeros((BLOCK_ROWS, BLOCK_D), h_ptr.dtype.element_ty)
            for start in range(0, D, BLOCK_K):
                feature = start + tl.arange(0, BLOCK_K)
                d_z = _in_front_of_module(to_relu_ptr, opened_ptr, row, wanted, i, feature, n_rows, D)
                w = tl.load(
                    weight_ptr + (i - 1) * D * D + (feature * D)[:, None] + col[None, :],
                    mask=(feature < D)[:, None] & (col < D)[None, :],
                    other=0.0,
                )
                d_main = product(d_z, w, d_main, PRECISION)
                if rows_2 is not None:
                    d_z = _in_front_of_module(to_relu_ptr, opened_ptr, row_2, wanted_2, i, feature, n_rows, D)
                    d_main_2 = product(d_z, w, d_main_2, PRECISION)
            touched = _push_back(
                d_main, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr,
                slot + route, row, wanted, i, touched, n_rows, K, D, RESIDUAL, BLOCK_D,
            )  # fmt: skip
            if rows_2 is not None:
                touched_2 = _push_back(
                    d_main_2, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr,
                    slot_2 + route, row_2, wanted_2, i, touched_2, n_rows, K, D, RESIDUAL, BLOCK_D,
                )  # fmt: skip
            tl.debug_barrier()


@triton.jit
def _clear_unread(
    to_relu_ptr, to_residual_ptr, row, wanted, touched, i, n_rows,
    D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of routes made by hand: a module that runs, though nothing reads it."""
    unread = wanted & (((touched >> i) & 1) == 0)
    if tl.max(unread.to(tl.int32), 0) > 0:
        col = tl.arange(0, BLOCK_D)
        at, mask = ((i * n_rows + row) * D)[:, None] + col[None, :], unread[:, None] & (col < D)[None, :]
        nothing = tl.zeros(at.shape, to_relu_ptr.dtype.element_ty)
        tl.store(to_relu_ptr + at, nothing, mask=mask)
        if RESIDUAL:
            tl.store(to_residual_ptr + at, nothing, mask=mask)
        tl.debug_barrier()


@triton.jit
def _in_front_of_module(to_relu_ptr, opened_ptr, row, wanted, i, feature, n_rows, D: tl.constexpr):
    """The gradient in front of the ReLU of module i, of a tile and some features."""
    at, mask = ((i * n_rows + row) * D)[:, None] + feature[None, :], wanted[:, None] & (feature < D)[None, :]
    d_y = tl.load(to_relu_ptr + at, mask=mask, other=0.0)
    opened = tl.load(opened_ptr + at, mask=mask, other=0)
    return tl.where(opened != 0, d_y, 0.0)


@triton.jit
def _push_back(
    d_main, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr,
    slot, row, wanted, i, touched, n_rows,
    K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From the gradient through the product of module i, and from its residual, to its sources; as `_push`."""
    d_main = by_rows(d_main)
    d_res = tl.zeros_like(d_main)
    if RESIDUAL:
        col = tl.arange(0, BLOCK_D)
        at = ((i * n_rows + row) * D)[:, None] + col[None, :]
        d_res = tl.load(to_residual_ptr + at, mask=wanted[:, None] & (col < D)[None, :], other=0.0)
    return _push(
        d_main, d_res, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr,
        slot, row, wanted, i, touched, n_rows, K, D, RESIDUAL, BLOCK_D,
    )  # fmt: skip
