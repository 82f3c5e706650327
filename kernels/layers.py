"""Layers of a D2R network whose results meet others at once, in one launch each way (`d2r_fast.learning.layered`): the
base's last, f, which goes on as f g to the routing network, g by the task, and as ReLU(f) to the modules."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.ensemble_linear import Tile, Tiles, linear_launch
from d2r_fast.kernels.settings import check_dtype
from d2r_fast.kernels.tiles import at_place, block, by_rows, linear_tile, linear_tile_backward, load_tile, zeros_for

# With 32 numbers a thread: what a product meets takes as many registers again, several times.
_FORWARD: Tiles = {
    "float32": [Tile(64, 64, 32, 4, 3)],
    "tf32": [Tile(128, 128, 32, 16, 3), Tile(64, 64, 32, 4, 3)],
    "bf16": [Tile(64, 64, 64, 4, 3)],
}
_BACKWARD: Tiles = {
    "float32": [Tile(32, 64, 64, 4, 3)],
    "tf32": [Tile(32, 64, 64, 4, 3)],
    "bf16": [Tile(32, 64, 128, 4, 3)],
}


@triton.jit
def task_row(weight_ptr, bias_ptr, task, inside, feature, exists, H: tl.constexpr, T: tl.constexpr):
    """g, [rows,features]: column `task` of the task's weight [H,T], plus its bias, which is what a product with the
    one-hot task gives. A task that does not exist adds nothing to the bias."""
    known = (inside & (task >= 0) & (task < T))[:, None] & exists[None, :]
    weight = tl.load(weight_ptr + feature[None, :] * T + task[:, None], mask=known, other=0.0)
    return weight + tl.load(bias_ptr + feature, mask=exists, other=0.0)[None, :]


@triton.jit
def _task_row_at(
    parameters_ptr, place_ptr, net, task_ptr, row, inside, feature, exists, H: tl.constexpr, T: tl.constexpr
):  # fmt: skip
    weight_ptr = at_place(parameters_ptr, place_ptr, net, 0, T)
    bias_ptr = at_place(parameters_ptr, place_ptr, net, 1, H)
    task = tl.load(task_ptr + row, mask=inside, other=0)
    return task_row(weight_ptr, bias_ptr, task, inside, feature, exists, H, T)


@triton.jit(do_not_specialize=["n_rows"])
def split_base_kernel(
    x_ptr, weights_ptr, parameters_ptr, place_ptr, task_place_ptr, task_ptr, f_ptr, scaled_ptr, positive_ptr, n_rows,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, T: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS), cdiv(out, BLOCK_OUT), E); a program owns one tile of f, f g and ReLU(f) [E,B,out],
    each written once. place and task_place [E,3]: of this layer, and of the task's."""
    net = tl.program_id(2).to(tl.int64)
    row, inside = block(tl.program_id(0), n_rows, BLOCK_ROWS)
    out, exists = block(tl.program_id(1), N_OUT, BLOCK_OUT)
    f = tl.zeros((BLOCK_ROWS, BLOCK_OUT), f_ptr.dtype.element_ty)
    f = linear_tile(
        f, at_place(x_ptr, place_ptr, net, 2, N_IN), row, inside, at_place(weights_ptr, place_ptr, net, 0, N_IN),
        out, exists, N_IN, N_IN, N_IN, PRECISION, BLOCK_DEPTH,
    )  # fmt: skip
    f += tl.load(at_place(parameters_ptr, place_ptr, net, 1, N_OUT) + out, mask=exists, other=0.0)[None, :]
    g = _task_row_at(parameters_ptr, task_place_ptr, net, task_ptr, row, inside, out, exists, N_OUT, T)
    at, mask = ((net * n_rows + row) * N_OUT)[:, None] + out[None, :], inside[:, None] & exists[None, :]
    tl.store(f_ptr + at, f, mask=mask)
    tl.store(scaled_ptr + at, f * g, mask=mask)
    tl.store(positive_ptr + at, tl.where(f <= 0, 0.0, f), mask=mask)  # a NaN stays: a diverged network must show


@triton.jit(do_not_specialize=["n_rows"])
def split_base_bwd_kernel(
    d_y_ptr, weights_ptr, place_ptr, d_scaled_ptr, f_ptr, parameters_ptr, task_place_ptr, task_ptr, d_f_ptr, d_g_ptr,
    n_rows,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, T: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS), cdiv(in, BLOCK_IN), E); a program owns one tile of d_f and d_g [E,B,in].

    The gradient at ReLU(f) is made here, of d_y [E,B,out] behind the layer that reads it; that at f g is read.
    """
    net = tl.program_id(2).to(tl.int64)
    row, inside = block(tl.program_id(0), n_rows, BLOCK_ROWS)
    feature, exists = block(tl.program_id(1), N_IN, BLOCK_IN)
    gradient = net * n_rows * N_OUT
    d_positive = zeros_for(d_f_ptr, BLOCK_ROWS, BLOCK_IN)
    d_positive = linear_tile_backward(
        d_positive, d_y_ptr + gradient, None, row, inside, at_place(weights_ptr, place_ptr, net, 0, N_IN), feature,
        N_IN, N_OUT, PRECISION, BLOCK_DEPTH,
    )  # fmt: skip
    d_positive = by_rows(d_positive)
    g = _task_row_at(parameters_ptr, task_place_ptr, net, task_ptr, row, inside, feature, exists, N_IN, T)
    own = net * n_rows * N_IN
    f = load_tile(f_ptr + own, row, inside, feature, N_IN, N_IN)
    d_scaled = load_tile(d_scaled_ptr + own, row, inside, feature, N_IN, N_IN)
    at, mask = own + (row * N_IN)[:, None] + feature[None, :], inside[:, None] & exists[None, :]
    tl.store(d_f_ptr + at, d_scaled * g + tl.where(f > 0, d_positive, 0.0), mask=mask)
    tl.store(d_g_ptr + at, d_scaled * f, mask=mask)


def base_launch(way: str, precision: str, n_in: int, n_out: int, n_rows: int, n_nets: int) -> dict[str, Any]:
    """Constants and options of either kernel, all but T: as `linear_launch`, in smaller tiles."""
    return linear_launch(way, precision, n_in, n_out, n_rows, n_nets, _FORWARD if way == "fwd" else _BACKWARD)


def split_base(
    x: Tensor, weights: Tensor, parameters: Tensor, place: Tensor, task_place: Tensor, task: Tensor, n_tasks: int,
    f: Tensor, scaled: Tensor, positive: Tensor, precision: str,
) -> None:  # fmt: skip
    """Writes f = x W^T + b, f g and ReLU(f), all contiguous [E,B,H], of x [E,B,in]; g from the task's layer and task
    [B]. W lies within `weights`, what else is of both layers within `parameters`, and x within x, where their places
    [E,3] say. x, weights, scaled and positive may be bfloat16 where products are."""
    check_dtype("f", f)
    n_nets, n_rows, width = f.shape
    if f.numel() > 0:
        launch = base_launch("fwd", precision, x.shape[-1], width, n_rows, n_nets)
        grid = triton.cdiv(n_rows, launch["BLOCK_ROWS"]), triton.cdiv(width, launch["BLOCK_OUT"]), n_nets
        split_base_kernel[grid](
            x, weights, parameters, place, task_place, task, f, scaled, positive, n_rows, T=n_tasks, **launch
        )


def split_base_backward(
    d_y: Tensor, weights: Tensor, place: Tensor, d_scaled: Tensor, f: Tensor, parameters: Tensor, task_place: Tensor,
    task: Tensor, n_tasks: int, d_f: Tensor, d_g: Tensor, precision: str,
) -> None:  # fmt: skip
    """Writes the gradients of f and g [E,B,H], of the first networks that f is of: from that of f g, and from d_y
    [E,B,out] of the layer whose weight is at `place`, which reads ReLU(f). d_f, d_g, d_y and weights may be bfloat16
    where products are. The rest as `split_base`."""
    check_dtype("d_scaled", d_scaled)
    n_nets, n_rows, width = d_scaled.shape
    if d_scaled.numel() > 0:
        launch = base_launch("bwd", precision, width, d_y.shape[-1], n_rows, n_nets)
        grid = triton.cdiv(n_rows, launch["BLOCK_ROWS"]), triton.cdiv(width, launch["BLOCK_IN"]), n_nets
        split_base_bwd_kernel[grid](
            d_y, weights, place, d_scaled, f, parameters, task_place, task, d_f, d_g, n_rows, T=n_tasks, **launch
        )
