"""A tile of rows on its way through the N modules of a network, forward and back: what a program of `routed_modules`
does between module 0's output and what the last route mixes.

A module's sources are rows of the same tile, so one program walks all modules by itself. What it writes for one module
it reads for a later one: same program, but other threads, hence the barrier after every module. The walk is a chain of
waits for memory, so whatever does not depend on the module before is asked for early and all at once. A tile skips a
module that none of its rows runs.
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
def touched_modules(rows):
    """Bits of the modules that any row of a tile runs."""
    _, _, inside, active = rows
    return tl.reduce_or(tl.where(inside, active, 0), 0)


@triton.jit
def _weights(weight_ptr, i, first, second, D: tl.constexpr):
    """Rows `first` and columns `second` of module i's weight."""
    mask = (first < D)[:, None] & (second < D)[None, :]
    return tl.load(weight_ptr + (i - 1) * D * D + (first * D)[:, None] + second[None, :], mask=mask, other=0.0)


@triton.jit
def walk(
    h_ptr, weight_ptr, bias_ptr, index_ptr, gate_ptr, opened_ptr, rows, n_rows,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Run modules 1..N-1 of one network over a tile of rows, whose module 0 is in h [N,B,D] and awaited: writes h and
    opened of active modules.

    rows: the tile's slots of route 1, rows, whether they exist, and their active bits.
    """
    slot, row, inside, active = rows
    col = tl.arange(0, BLOCK_D)
    touched = touched_modules(rows)
    for i in range(1, N):
        if ((touched >> i) & 1) != 0:
            wanted = inside & (((active >> i) & 1) != 0)
            at = slot + (i - 1) * K
            z = tl.zeros((BLOCK_ROWS, BLOCK_D), h_ptr.dtype.element_ty)
            for start in range(0, D, BLOCK_K):
                feature = start + tl.arange(0, BLOCK_K)
                some = mix_sources(h_ptr, index_ptr, gate_ptr, at, row, wanted, i, feature, n_rows, D, K)
                z = product(some, tl.trans(_weights(weight_ptr, i, col, feature, D)), z, PRECISION)
            x = z
            if RESIDUAL:  # mixed once more: one piece for the product and the residual was slower (benches/NOTES.md)
                x = mix_sources(h_ptr, index_ptr, gate_ptr, at, row, wanted, i, col, n_rows, D, K)
            _finish_module(z, x, h_ptr, bias_ptr, opened_ptr, row, wanted, i, n_rows, D, RESIDUAL, BLOCK_D)
            tl.debug_barrier()


@triton.jit
def _finish_module(
    z, x, h_ptr, bias_ptr, opened_ptr, row, wanted, i, n_rows,
    D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """From the product z of module i, and x that it read, to its output; writes this and whether the ReLU is open."""
    col = tl.arange(0, BLOCK_D)
    z += tl.load(bias_ptr + (i - 1) * D + col, mask=col < D, other=0.0)[None, :]
    h = tl.where(z <= 0, 0.0, z)  # a NaN stays: a diverged network must show
    if RESIDUAL:
        h += x
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
def _load_slot(
    h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, slot, row, wanted, route, k, touched, n_rows,
    D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What slot k of a route takes: which rows use it, their sources (as bits), gates and flow, where these sources lie
    [rows,BLOCK_D], h there, and both adjoints as far as they exist (0 else)."""
    col = tl.arange(0, BLOCK_D)
    used = tl.where(route > k, wanted, False)
    source = tl.load(index_ptr + slot + k, mask=used, other=0)
    gate = tl.load(gate_ptr + slot + k, mask=used, other=0.0)
    flow = tl.load(flow_ptr + slot + k, mask=used, other=0)
    tile = used[:, None] & (col < D)[None, :]
    seen = tile & (((touched >> source) & 1) != 0)[:, None]
    later = (source > 0)[:, None]
    at = ((source.to(tl.int64) * n_rows + row) * D)[:, None] + col[None, :]
    h = tl.load(h_ptr + at, mask=tile, other=0.0)
    to_relu = tl.load(to_relu_ptr + at, mask=seen, other=0.0)
    to_residual = to_relu
    if RESIDUAL:
        to_residual = tl.load(to_residual_ptr + at, mask=seen & later, other=0.0)
    bits = tl.where(used, tl.full(source.shape, 1, tl.int32) << source.to(tl.int32), 0)
    return used, bits, gate, flow, later, at, h, to_relu, to_residual


@triton.jit
def _push_slot(
    loaded, d_main, d_res, to_relu_ptr, to_residual_ptr, d_gate_ptr, slot, k,
    D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Hand the gradient at x of one route to the sources in slot k, of which `loaded` is all that is read."""
    used, _, gate, flow, later, at, h, to_relu, to_residual = loaded
    tile = used[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    d_all = d_main + d_res
    d_flow = tl.where((flow != 0)[:, None], d_main, 0.0) + d_res
    tl.store(to_relu_ptr + at, to_relu + gate[:, None] * d_flow, mask=tile)
    if RESIDUAL:
        tl.store(to_residual_ptr + at, to_residual + gate[:, None] * d_all, mask=tile & later)
    tl.store(d_gate_ptr + slot + k, sum_products(d_all, h, 1), mask=used)


@triton.jit
def _load_two_slots(
    h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, slot, row, wanted, route, touched, n_rows,
    D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`_load_slot` of both slots of a route."""
    first = _load_slot(
        h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, slot, row, wanted, route, 0, touched,
        n_rows, D, RESIDUAL, BLOCK_D,
    )  # fmt: skip
    second = _load_slot(
        h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, slot, row, wanted, route, 1, touched,
        n_rows, D, RESIDUAL, BLOCK_D,
    )  # fmt: skip
    return first, second


@triton.jit
def _push_two(
    first, second, d_main, d_res, to_relu_ptr, to_residual_ptr, d_gate_ptr, slot, touched,
    D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`_push_slot` of both slots of a route; returns which adjoint rows exist by now (bits)."""
    _push_slot(first, d_main, d_res, to_relu_ptr, to_residual_ptr, d_gate_ptr, slot, 0, D, RESIDUAL, BLOCK_D)
    _push_slot(second, d_main, d_res, to_relu_ptr, to_residual_ptr, d_gate_ptr, slot, 1, D, RESIDUAL, BLOCK_D)
    return touched | first[1] | second[1]


@triton.jit
def _push(
    d_main, d_res, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr,
    slot, row, wanted, route, touched, n_rows,
    K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Hand the gradient at x of one route to its sources; returns which adjoint rows exist by now (bits).

    The first gradient that reaches an adjoint row is stored, later ones are added: nothing has to be zeroed before,
    and a row reads only what it wrote. Sources of a route are distinct, so its slots never meet, and two of them are
    read before either is written: else the second would wait for the first's stores. S_0 is never read.
    """
    if K == 2:
        first, second = _load_two_slots(
            h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, slot, row, wanted, route, touched,
            n_rows, D, RESIDUAL, BLOCK_D,
        )  # fmt: skip
        touched = _push_two(
            first, second, d_main, d_res, to_relu_ptr, to_residual_ptr, d_gate_ptr, slot, touched,
            D, RESIDUAL, BLOCK_D,
        )  # fmt: skip
    else:
        for k in tl.range(0, K, loop_unroll_factor=K if K <= 4 else 1):  # unrolled, many slots compile for minutes
            one = _load_slot(
                h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, slot, row, wanted, route, k,
                touched, n_rows, D, RESIDUAL, BLOCK_D,
            )  # fmt: skip
            _push_slot(one, d_main, d_res, to_relu_ptr, to_residual_ptr, d_gate_ptr, slot, k, D, RESIDUAL, BLOCK_D)
            touched |= one[1]
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
    rows, reached, n_rows,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """From what `push_last` left, `reached`, back through modules N-1..1 of one network: writes both adjoints [N,B,D]
    of active modules, module 0 among them and awaited, and d_gate of active routes. rows as in `walk`."""
    slot, row, inside, active = rows
    col = tl.arange(0, BLOCK_D)
    touched = touched_modules(rows)
    tl.debug_barrier()
    for i in range(N - 1, 0, -1):
        if ((touched >> i) & 1) != 0:
            wanted = inside & (((active >> i) & 1) != 0)
            _clear_unread(to_relu_ptr, to_residual_ptr, row, wanted, reached, i, n_rows, D, RESIDUAL, BLOCK_D)
            d_main = tl.zeros((BLOCK_ROWS, BLOCK_D), h_ptr.dtype.element_ty)
            d_res = tl.zeros_like(d_main)
            if RESIDUAL:
                at = ((i * n_rows + row) * D)[:, None] + col[None, :]
                d_res = tl.load(to_residual_ptr + at, mask=wanted[:, None] & (col < D)[None, :], other=0.0)
            slot_of_route = slot + (i - 1) * K
            if K == 2:  # what it hands on to is asked for before the product
                first, second = _load_two_slots(
                    h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, slot_of_route, row, wanted, i,
                    reached, n_rows, D, RESIDUAL, BLOCK_D,
                )  # fmt: skip
            for start in range(0, D, BLOCK_K):
                feature = start + tl.arange(0, BLOCK_K)
                d_z = _in_front_of_module(to_relu_ptr, opened_ptr, row, wanted, i, feature, n_rows, D)
                d_main = product(d_z, _weights(weight_ptr, i, feature, col, D), d_main, PRECISION)
            d_main = by_rows(d_main)
            if K == 2:
                reached = _push_two(
                    first, second, d_main, d_res, to_relu_ptr, to_residual_ptr, d_gate_ptr, slot_of_route, reached,
                    D, RESIDUAL, BLOCK_D,
                )  # fmt: skip
            else:
                reached = _push(
                    d_main, d_res, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr,
                    slot_of_route, row, wanted, i, reached, n_rows, K, D, RESIDUAL, BLOCK_D,
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
