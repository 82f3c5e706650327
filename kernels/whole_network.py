"""Whole D2R networks in one launch forward and one backward, several of them over several sets of rows: what
`d2r_fast.learning.layered` does in a launch a layer.

A program takes one tile of rows of one member, a network over a set of rows, from its observations to its output. What
one layer writes for a tile the next reads: same program, but other threads, hence a barrier behind every layer. The
activations lie in global memory, where the backward and the gradients of the weights find them; a tile's part of them
stays in the L2. Against layer by layer: no launch and no wait for the slowest tile between layers, and modules of
another tile while this one is in its base; but the weights of all layers are read once a tile.

Rows stand in task order, and a tile takes them so: rows of one task agree most on what to skip, and to sort them by
their routes would need the routes before the launch that chooses them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.layers import task_row
from d2r_fast.kernels.module_walk import mix_last, push_last, walk, walk_back
from d2r_fast.kernels.select_routes import choose, route_launch, unchoose
from d2r_fast.kernels.settings import FUSED, check_dtype
from d2r_fast.kernels.squashed_normal import act, act_back
from d2r_fast.kernels.tiles import (
    in_front_of_relu,
    known_place,
    linear_tile,
    linear_tile_backward,
    load_tile,
    rounded_product,
)

GREEDY, SAMPLED, GIVEN = 0, 1, 2
"""How a member chooses routes."""
N_ACTING = tl.constexpr(2)  # members of the actor, which come first
_SAMPLED, _GIVEN = tl.constexpr(SAMPLED), tl.constexpr(GIVEN)
# Columns of a member's line, in numbers from where the tensor that is meant begins; places of layers follow.
X_AT, N_IN, OUT_AT, N_OUT, CHOICE, CHOICE_AT, D_OUT_AT, D_X_AT, BACK, NUMBER, N_FIXED = range(11)
_X_AT, _N_IN, _OUT_AT, _N_OUT, _CHOICE, _CHOICE_AT, _D_OUT_AT, _D_X_AT, _BACK, _NUMBER, _N_FIXED = (
    tl.constexpr(v) for v in range(11)
)


def layer_names(n_hidden: int) -> list[str]:
    """The layers, in the order of their places in a member's line: of each, where its weight and bias begin."""
    return ["base0", "base1", "task", *(f"route{i}" for i in range(n_hidden + 1)), "module0", "modules", "head"]


def kept_names(n_hidden: int) -> list[str]:
    """What forward leaves, in the order of the columns behind the layers': where each [B,width] begins. base1 is f."""
    return ["base0", "base1", "scaled", "opened", *(f"route{i}" for i in range(n_hidden + 1)), "mixed"]


def gradient_names(n_hidden: int) -> list[str]:
    """What backward leaves, behind those: the gradient of what each layer gives, in front of its ReLU."""
    return ["base0", "base1", "task", *(f"route{i}" for i in range(n_hidden + 1)), "module0", "head"]


def n_columns(n_hidden: int) -> int:
    """Of the table of members."""
    return N_FIXED + 2 * len(layer_names(n_hidden)) + len(kept_names(n_hidden)) + len(gradient_names(n_hidden))


@triton.jit
def _at(line_ptr, column, WIDTH: tl.constexpr):
    """A place of float32 numbers in a member's line."""
    return known_place(line_ptr + column, WIDTH, 4)


@triton.jit
def _outputs(
    x_ptr, x_stride, n_in, weight_ptr, bias_ptr, row, inside, out, exists,
    N_IN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """x W^T + b of some outputs; n_in is N_IN, or of a member with fewer inputs what it has."""
    z = tl.zeros((row.shape[0], out.shape[0]), weight_ptr.dtype.element_ty)
    z = linear_tile(
        z, x_ptr, row, inside, weight_ptr, out.to(tl.int64), exists, n_in, x_stride, N_IN, PRECISION, BLOCK_DEPTH
    )
    return z + tl.load(bias_ptr + out, mask=exists, other=0.0)[None, :]


@triton.jit
def _inputs(
    d_y_ptr, weight_ptr, row, inside, feature, n_in,
    N_OUT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """d_y W of some inputs."""
    d_x = tl.zeros((row.shape[0], feature.shape[0]), weight_ptr.dtype.element_ty)
    return linear_tile_backward(
        d_x, d_y_ptr, None, row, inside, weight_ptr, feature, n_in, N_OUT, PRECISION, BLOCK_DEPTH
    )


@triton.jit
def _open(z):
    return tl.where(z <= 0, 0.0, z)  # a NaN stays: a diverged network must show


@triton.jit
def _layer(
    x_ptr, x_stride, n_in, weight_ptr, bias_ptr, y_ptr, row, inside,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """One linear layer of a tile, written and awaited."""
    for first in range(0, N_OUT, BLOCK_OUT):
        out = first + tl.arange(0, BLOCK_OUT)
        z = _outputs(
            x_ptr, x_stride, n_in, weight_ptr, bias_ptr, row, inside, out, out < N_OUT, N_IN, PRECISION, BLOCK_DEPTH
        )
        if RELU:
            z = _open(z)
        tl.store(y_ptr + (row * N_OUT)[:, None] + out[None, :], z, mask=inside[:, None] & (out < N_OUT)[None, :])
    tl.debug_barrier()


@triton.jit
def _layer_back(
    d_y_ptr, weight_ptr, x_ptr, d_x_ptr, row, inside,
    N_IN: tl.constexpr, N_OUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """The gradient of x, which a ReLU gave and a linear layer of a tile reads, in front of it; written and awaited."""
    for first in range(0, N_IN, BLOCK_OUT):
        feature = first + tl.arange(0, BLOCK_OUT)
        d_x = _inputs(d_y_ptr, weight_ptr, row, inside, feature, N_IN, N_OUT, PRECISION, BLOCK_DEPTH)
        d_x = in_front_of_relu(d_x, x_ptr, row, inside, feature, N_IN)
        mask = inside[:, None] & (feature < N_IN)[None, :]
        tl.store(d_x_ptr + (row * N_IN)[:, None] + feature[None, :], d_x, mask=mask)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["n_rows"])
def whole_network_fwd_kernel(
    x_ptr, parameters_ptr, line_ptr, task_ptr, temperature_ptr, noise_ptr, given_ptr, normal_ptr,
    kept_ptr, out_ptr, logp_ptr, index_ptr, gate_ptr, flow_ptr, active_ptr, h_ptr, opened_ptr, n_rows,
    X_STRIDE: tl.constexpr, MOST_IN: tl.constexpr, A: tl.constexpr, BLOCK_A: tl.constexpr, H: tl.constexpr,
    T: tl.constexpr, WIDTHS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, D: tl.constexpr, RESIDUAL: tl.constexpr, RESROUTING: tl.constexpr,
    TINY: tl.constexpr, PRECISION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr, BLOCK_CHOOSING: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS), members); a program owns its rows of everything that is written, each once.

    WIDTHS: of what the routing network's layers read and give, from H to N(N+1)/2 logits. index, gate and flow
    [members,B,N,K], active [members,B], h and opened [members,N,B,D] by a member's NUMBER. TINY: the noise is uniform
    yet, and temperatures are those of the tasks. normal [2B,A]: the members are the actor's, which come first in out
    and go on to their actions, behind their observations in x, and to the log probabilities of these.
    """
    line_ptr += tl.program_id(1) * COLUMNS
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    inside = row < n_rows
    number = tl.load(line_ptr + _NUMBER)
    n_in = tl.load(line_ptr + _N_IN)
    N_HIDDEN: tl.constexpr = len(WIDTHS) - 2
    LAYERS: tl.constexpr = _N_FIXED
    KEPT: tl.constexpr = LAYERS + 2 * (7 + N_HIDDEN)

    base0_ptr = kept_ptr + _at(line_ptr, KEPT, H)
    _layer(
        x_ptr + tl.load(line_ptr + _X_AT), X_STRIDE, n_in, parameters_ptr + tl.load(line_ptr + LAYERS),
        parameters_ptr + _at(line_ptr, LAYERS + 1, H), base0_ptr, row, inside,
        MOST_IN, H, True, PRECISION, BLOCK_OUT, BLOCK_DEPTH,
    )  # fmt: skip
    f_ptr, scaled_ptr = kept_ptr + _at(line_ptr, KEPT + 1, H), kept_ptr + _at(line_ptr, KEPT + 2, H)
    positive_ptr = kept_ptr + _at(line_ptr, KEPT + 3, H)
    task = tl.load(task_ptr + row, mask=inside, other=0)
    for first in range(0, H, BLOCK_OUT):
        feature = first + tl.arange(0, BLOCK_OUT)
        f = _outputs(
            base0_ptr, H, H, parameters_ptr + _at(line_ptr, LAYERS + 2, H),
            parameters_ptr + _at(line_ptr, LAYERS + 3, H),
            row, inside, feature, feature < H, H, PRECISION, BLOCK_DEPTH,
        )  # fmt: skip
        g = task_row(
            parameters_ptr + _at(line_ptr, LAYERS + 4, T), parameters_ptr + _at(line_ptr, LAYERS + 5, H),
            task, inside, feature, feature < H, H, T,
        )  # fmt: skip
        at, mask = (row * H)[:, None] + feature[None, :], inside[:, None] & (feature < H)[None, :]
        tl.store(f_ptr + at, f, mask=mask)
        tl.store(scaled_ptr + at, f * g, mask=mask)
        tl.store(positive_ptr + at, _open(f), mask=mask)
    tl.debug_barrier()

    read_ptr = scaled_ptr
    for i in tl.static_range(N_HIDDEN + 1):
        logits_ptr = kept_ptr + _at(line_ptr, KEPT + 4 + i, WIDTHS[i + 1])
        _layer(
            read_ptr, WIDTHS[i], WIDTHS[i], parameters_ptr + _at(line_ptr, LAYERS + 6 + 2 * i, WIDTHS[i]),
            parameters_ptr + _at(line_ptr, LAYERS + 7 + 2 * i, WIDTHS[i + 1]), logits_ptr, row, inside,
            WIDTHS[i], WIDTHS[i + 1], i < N_HIDDEN, PRECISION, BLOCK_OUT, BLOCK_DEPTH,
        )  # fmt: skip
        read_ptr = logits_ptr
    index_ptr += number * n_rows * N * K
    gate_ptr += number * n_rows * N * K
    flow_ptr += number * n_rows * N * K
    active_ptr += number * n_rows
    choice, choice_at = tl.load(line_ptr + _CHOICE), tl.load(line_ptr + _CHOICE_AT)
    for part in range(0, BLOCK_ROWS, BLOCK_CHOOSING):
        own = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + part + tl.arange(0, BLOCK_CHOOSING)
        tau_at = own if TINY is None else tl.load(task_ptr + own, mask=own < n_rows, other=0)
        how = tl.zeros_like(own) + choice  # of each row, for the interpreter makes no mask of a scalar
        choose(
            read_ptr, temperature_ptr, noise_ptr, given_ptr, index_ptr, gate_ptr, flow_ptr, active_ptr,
            own, own < n_rows, tau_at, choice_at + own,
            (own < n_rows) & (how == _SAMPLED), (own < n_rows) & (how == _GIVEN),
            N, K, RESROUTING, TINY, BLOCK_N, BLOCK_SLOTS, BLOCK_CHOOSING,
        )  # fmt: skip

    # Module 0's output joins the buffer, so that every source is a row of one array.
    MODULES: tl.constexpr = LAYERS + 2 * (4 + N_HIDDEN)
    h_ptr += number * N * n_rows * D
    opened_ptr += number * N * n_rows * D
    col = tl.arange(0, BLOCK_D)
    h0 = _outputs(
        positive_ptr, H, H, parameters_ptr + _at(line_ptr, MODULES, H), parameters_ptr + _at(line_ptr, MODULES + 1, D),
        row, inside, col, col < D, H, PRECISION, BLOCK_DEPTH,
    )  # fmt: skip
    h0 = _open(h0)
    at, mask = (row * D)[:, None] + col[None, :], inside[:, None] & (col < D)[None, :]
    tl.store(h_ptr + at, h0, mask=mask)
    tl.debug_barrier()
    active = tl.load(active_ptr + row, mask=inside, other=0)
    rows = (row * (N * K), row, inside, active)
    walk(
        h_ptr, parameters_ptr + _at(line_ptr, MODULES + 2, D), parameters_ptr + _at(line_ptr, MODULES + 3, D),
        index_ptr, gate_ptr, opened_ptr, rows, None, n_rows,
        N, K, D, RESIDUAL, PRECISION, BLOCK_D, BLOCK_ROWS, min(BLOCK_DEPTH, BLOCK_D),
    )  # fmt: skip
    mixed_ptr = kept_ptr + _at(line_ptr, KEPT + 5 + N_HIDDEN, D)
    mix_last(h_ptr, index_ptr, gate_ptr, mixed_ptr, rows, n_rows, N, K, D, BLOCK_D)
    tl.debug_barrier()
    n_out = tl.load(line_ptr + _N_OUT)
    out = tl.arange(0, BLOCK_HEAD)
    y = _outputs(
        mixed_ptr, D, D, parameters_ptr + _at(line_ptr, MODULES + 4, D),
        parameters_ptr + tl.load(line_ptr + MODULES + 5),
        row, inside, out, out < n_out, D, PRECISION, min(BLOCK_DEPTH, BLOCK_D),
    )  # fmt: skip
    own_ptr = out_ptr + tl.load(line_ptr + _OUT_AT)
    tl.store(own_ptr + (row * n_out)[:, None] + out[None, :], y, mask=inside[:, None] & (out < n_out)[None, :])
    if normal_ptr is not None:
        tl.debug_barrier()
        x_ptr += tl.load(line_ptr + _X_AT) + n_in
        act(out_ptr, normal_ptr, x_ptr, logp_ptr, number * n_rows + row, inside, row * X_STRIDE, A, BLOCK_A)


@triton.jit(do_not_specialize=["n_rows"])
def whole_network_bwd_kernel(
    d_out_ptr, x_ptr, out_ptr, normal_ptr, d_logp_ptr, parameters_ptr, line_ptr, task_ptr, kept_ptr, index_ptr,
    gate_ptr, flow_ptr, active_ptr, h_ptr,
    opened_ptr, d_z_ptr, d_x_ptr, d_gate_ptr, to_relu_ptr, to_residual_ptr, n_rows,
    X_STRIDE: tl.constexpr, H: tl.constexpr, T: tl.constexpr, WIDTHS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, RESIDUAL: tl.constexpr, N_CRITICS: tl.constexpr, A: tl.constexpr, BLOCK_A: tl.constexpr,
    PRECISION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SLOTS: tl.constexpr, BLOCK_HEAD: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr, BLOCK_CHOOSING: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS), members); a program owns its rows of everything that is written, so no atomics.

    d_gate [back,B,N,K] and the adjoints [back,N,B,D] by a member's BACK, as `routed_modules_bwd_kernel` leaves them.
    normal [2B,A]: the actor is among the members. Its gradient begins at its actions: a sum of what all critics left in
    d_x [N_CRITICS,B,X_STRIDE] in a launch before, and d_logp [B].
    """
    line_ptr += tl.program_id(1) * COLUMNS
    row = (tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    inside = row < n_rows
    number, back = tl.load(line_ptr + _NUMBER), tl.load(line_ptr + _BACK)
    n_in, n_out = tl.load(line_ptr + _N_IN), tl.load(line_ptr + _N_OUT)
    N_HIDDEN: tl.constexpr = len(WIDTHS) - 2
    LAYERS: tl.constexpr = _N_FIXED
    KEPT: tl.constexpr = LAYERS + 2 * (7 + N_HIDDEN)
    GRADIENTS: tl.constexpr = KEPT + 6 + N_HIDDEN
    MODULES: tl.constexpr = LAYERS + 2 * (4 + N_HIDDEN)

    # The head's gradient is kept among the others, where that of its weight is made of them.
    out, col = tl.arange(0, BLOCK_HEAD), tl.arange(0, BLOCK_D)
    head_ptr = d_z_ptr + tl.load(line_ptr + GRADIENTS + 5 + N_HIDDEN)
    acts = number < N_ACTING
    if normal_ptr is not None:  # noqa: SIM102 (decided when the kernel is compiled)
        if acts:
            act_back(
                d_x_ptr + n_in, d_logp_ptr, out_ptr, normal_ptr, x_ptr + tl.load(line_ptr + _X_AT) + n_in, head_ptr,
                row, inside, row * X_STRIDE, n_rows.to(tl.int64) * X_STRIDE, row * X_STRIDE, N_CRITICS, A, BLOCK_A,
            )  # fmt: skip
    if not acts:
        d_out = load_tile(d_out_ptr + tl.load(line_ptr + _D_OUT_AT), row, inside, out, n_out, n_out)
        mask_out = inside[:, None] & (out < n_out)[None, :]
        tl.store(head_ptr + (row * n_out)[:, None] + out[None, :], d_out, mask=mask_out)
    tl.debug_barrier()
    d_out = load_tile(head_ptr, row, inside, out, n_out, n_out)
    weight = load_tile(parameters_ptr + _at(line_ptr, MODULES + 4, D), out.to(tl.int64), out < n_out, col, D, D)
    d_mixed = tl.zeros((BLOCK_ROWS, BLOCK_D), h_ptr.dtype.element_ty)
    d_mixed = rounded_product(d_out, weight, d_mixed, PRECISION)

    index_ptr += number * n_rows * N * K
    gate_ptr += number * n_rows * N * K
    flow_ptr += number * n_rows * N * K
    active_ptr += number * n_rows
    h_ptr += number * N * n_rows * D
    d_gate_ptr += back * n_rows * N * K
    to_relu_ptr += back * N * n_rows * D
    if RESIDUAL:
        to_residual_ptr += back * N * n_rows * D
    active = tl.load(active_ptr + row, mask=inside, other=0)
    rows = (row * (N * K), row, inside, active)
    touched = push_last(
        d_mixed, h_ptr, to_relu_ptr, to_residual_ptr, index_ptr, gate_ptr, flow_ptr, d_gate_ptr, rows, n_rows,
        N, K, D, RESIDUAL, BLOCK_D,
    )  # fmt: skip
    walk_back(
        h_ptr, parameters_ptr + _at(line_ptr, MODULES + 2, D), opened_ptr + number * N * n_rows * D,
        index_ptr, gate_ptr, flow_ptr, d_gate_ptr, to_relu_ptr, to_residual_ptr, rows, touched, None, None, n_rows,
        N, K, D, RESIDUAL, PRECISION, BLOCK_D, BLOCK_ROWS, min(BLOCK_DEPTH, BLOCK_D),
    )  # fmt: skip
    tl.debug_barrier()
    module0_ptr = d_z_ptr + _at(line_ptr, GRADIENTS + 4 + N_HIDDEN, D)
    at, mask = (row * D)[:, None] + col[None, :], inside[:, None] & (col < D)[None, :]
    d_h0 = tl.load(to_relu_ptr + at, mask=mask, other=0.0)
    tl.store(module0_ptr + at, in_front_of_relu(d_h0, h_ptr, row, inside, col, D), mask=mask)
    last_ptr = d_z_ptr + _at(line_ptr, GRADIENTS + 3 + N_HIDDEN, WIDTHS[N_HIDDEN + 1])
    for part in range(0, BLOCK_ROWS, BLOCK_CHOOSING):
        own = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + part + tl.arange(0, BLOCK_CHOOSING)
        unchoose(
            d_gate_ptr, index_ptr, gate_ptr, active_ptr, last_ptr, own, own, own < n_rows,
            N, K, BLOCK_N, BLOCK_SLOTS, BLOCK_CHOOSING,
        )  # fmt: skip
    tl.debug_barrier()

    d_y_ptr = last_ptr
    for j in tl.static_range(N_HIDDEN):
        # From layer N_HIDDEN - j, which reads WIDTHS[N_HIDDEN - j].
        d_before_ptr = d_z_ptr + _at(line_ptr, GRADIENTS + 2 + N_HIDDEN - j, WIDTHS[N_HIDDEN - j])
        _layer_back(
            d_y_ptr, parameters_ptr + _at(line_ptr, LAYERS + 6 + 2 * (N_HIDDEN - j), WIDTHS[N_HIDDEN - j]),
            kept_ptr + _at(line_ptr, KEPT + 3 + N_HIDDEN - j, WIDTHS[N_HIDDEN - j]), d_before_ptr,
            row, inside, WIDTHS[N_HIDDEN - j], WIDTHS[N_HIDDEN - j + 1], PRECISION, BLOCK_OUT, BLOCK_DEPTH,
        )  # fmt: skip
        d_y_ptr = d_before_ptr

    f_ptr, d_f_ptr = kept_ptr + _at(line_ptr, KEPT + 1, H), d_z_ptr + _at(line_ptr, GRADIENTS + 1, H)
    d_g_ptr = d_z_ptr + _at(line_ptr, GRADIENTS + 2, H)
    task = tl.load(task_ptr + row, mask=inside, other=0)
    for first in range(0, H, BLOCK_OUT):
        feature = first + tl.arange(0, BLOCK_OUT)
        d_scaled = _inputs(
            d_y_ptr, parameters_ptr + _at(line_ptr, LAYERS + 6, H), row, inside, feature, H, WIDTHS[1],
            PRECISION, BLOCK_DEPTH,
        )  # fmt: skip
        d_positive = _inputs(
            module0_ptr, parameters_ptr + _at(line_ptr, MODULES, H), row, inside, feature, H, D,
            PRECISION, min(BLOCK_DEPTH, BLOCK_D),
        )  # fmt: skip
        f = load_tile(f_ptr, row, inside, feature, H, H)
        g = task_row(
            parameters_ptr + _at(line_ptr, LAYERS + 4, T), parameters_ptr + _at(line_ptr, LAYERS + 5, H),
            task, inside, feature, feature < H, H, T,
        )  # fmt: skip
        place, exists = (row * H)[:, None] + feature[None, :], inside[:, None] & (feature < H)[None, :]
        tl.store(d_f_ptr + place, d_scaled * g + tl.where(f > 0, d_positive, 0.0), mask=exists)
        tl.store(d_g_ptr + place, d_scaled * f, mask=exists)
    tl.debug_barrier()

    d_base0_ptr, base0_ptr = d_z_ptr + _at(line_ptr, GRADIENTS, H), kept_ptr + _at(line_ptr, KEPT, H)
    _layer_back(
        d_f_ptr, parameters_ptr + _at(line_ptr, LAYERS + 2, H), base0_ptr, d_base0_ptr, row, inside,
        H, H, PRECISION, BLOCK_OUT, BLOCK_DEPTH,
    )  # fmt: skip
    d_x_at = tl.load(line_ptr + _D_X_AT)
    if d_x_at >= 0:
        feature = tl.arange(0, BLOCK_IN)
        d_x = _inputs(
            d_base0_ptr, parameters_ptr + tl.load(line_ptr + LAYERS), row, inside, feature, n_in,
            H, PRECISION, BLOCK_DEPTH,
        )  # fmt: skip
        mask_x = inside[:, None] & (feature < n_in)[None, :]
        tl.store(d_x_ptr + d_x_at + (row * n_in)[:, None] + feature[None, :], d_x, mask=mask_x)


# Forward and backward, chosen by what sm_90 code they compile to (compile_report) and by `d2r_fast.kernels.cost`,
# before any timing. 32 rows a tile: 80, 240, 80 and 120 programs for an update's members at MT10, one of which fills a
# multiprocessor (132 of them); two, of 8 warps, and 64 rows would take more than 128 registers a thread, and spill, as
# do 256 outputs at a time in the backward.
_SETTINGS = {"BLOCK_ROWS": 32, "num_warps": 16, "num_stages": 3}
SETTINGS = {
    "float32": ({"BLOCK_OUT": 128, "BLOCK_DEPTH": 16}, {"BLOCK_OUT": 128, "BLOCK_DEPTH": 16}),
    "tf32": ({"BLOCK_OUT": 256, "BLOCK_DEPTH": 32}, {"BLOCK_OUT": 128, "BLOCK_DEPTH": 32}),
    "bf16": ({"BLOCK_OUT": 128, "BLOCK_DEPTH": 64}, {"BLOCK_OUT": 128, "BLOCK_DEPTH": 64}),
}


def whole_launch(cfg: Any, n_tasks: int, most_in: int, n_actions: int, backward: bool) -> dict[str, Any]:
    """Constants and options of either kernel for networks of a `NetConfig`, all but RESROUTING, TINY and N_CRITICS.

    most_in: what a critic reads, which is how far rows of x lie apart.
    """
    routes, settings = route_launch(cfg.n_modules, cfg.top_k), _SETTINGS | SETTINGS[cfg.precision][backward]
    widest = max(16, triton.next_power_of_2(max(cfg.base_width, *cfg.route_widths)))
    sizes = {
        "X_STRIDE": most_in,
        "A": n_actions,
        "BLOCK_A": triton.next_power_of_2(n_actions),
        "H": cfg.base_width,
        "T": n_tasks,
        "WIDTHS": (cfg.base_width, *cfg.route_widths, cfg.n_logits),
        "N": cfg.n_modules,
        "K": cfg.top_k,
        "D": cfg.module_width,
        "RESIDUAL": cfg.residual,
        "PRECISION": cfg.precision,
        "COLUMNS": n_columns(len(cfg.route_widths)),
        "BLOCK_D": max(16, triton.next_power_of_2(cfg.module_width)),
        "BLOCK_HEAD": max(16, triton.next_power_of_2(2 * n_actions)),
        "BLOCK_CHOOSING": 8,
        **{name: routes[name] for name in ("BLOCK_N", "BLOCK_SLOTS")},
    }
    sizes |= {"BLOCK_IN": max(16, triton.next_power_of_2(most_in))} if backward else {"MOST_IN": most_in}
    return sizes | settings | {"BLOCK_OUT": min(settings["BLOCK_OUT"], widest)} | FUSED


def forward(
    x: Tensor, parameters: Tensor, lines: Tensor, task: Tensor, temperature: Tensor | None, noise: Tensor | None,
    given: Tensor | None, normal: Tensor | None, kept: Tensor, out: Tensor, logp: Tensor, routes: tuple[Tensor, ...],
    h: Tensor, opened: Tensor, uniform: bool, resrouting: bool, launch: dict[str, Any],
) -> None:  # fmt: skip
    """Runs the members whose lines [M,columns] are given, over x [3,B,O+A].

    task [B]; temperature [B] and noise [..,B,R] of members that sample, given [..,B,N,K] of those that are told.
    uniform: of which the noise is to be made; temperature is then [T]. normal [2B,A]: the actor's members act, into x
    and logp [2B]. Writes kept and out where the lines say; routes (index, gate, flow, active), h and opened by a
    member's number.
    """
    check_dtype("x", x)
    n_rows, tiny = len(task), torch.finfo(x.dtype).tiny if uniform else None
    if n_rows > 0:
        whole_network_fwd_kernel[triton.cdiv(n_rows, launch["BLOCK_ROWS"]), len(lines)](
            x, parameters, lines, task, temperature, noise, given, normal, kept, out, logp, *routes, h, opened, n_rows,
            RESROUTING=resrouting, TINY=tiny, **launch,
        )  # fmt: skip


def backward(
    x: Tensor, d_out: Tensor, out: Tensor, normal: Tensor | None, d_logp: Tensor | None, parameters: Tensor,
    lines: Tensor, task: Tensor, kept: Tensor, routes: tuple[Tensor, ...], h: Tensor, opened: Tensor, d_z: Tensor,
    d_x: Tensor, d_gate: Tensor, to_relu: Tensor, to_residual: Tensor, launch: dict[str, Any],
) -> None:  # fmt: skip
    """Goes back through the members of these lines to d_z, and to d_x where a line asks for it: from d_out, or of the
    actor, which is among them if there are normal and d_logp, from d_x as the critics left it in a call before."""
    check_dtype("x", x)
    n_rows = len(task)
    if n_rows > 0:
        whole_network_bwd_kernel[triton.cdiv(n_rows, launch["BLOCK_ROWS"]), len(lines)](
            d_out, x, out, normal, d_logp, parameters, lines, task, kept, *routes, h, opened, d_z, d_x, d_gate,
            to_relu, to_residual, n_rows, N_CRITICS=len(d_x), **launch,
        )  # fmt: skip
