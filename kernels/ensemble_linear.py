"""E linear layers with bias and ReLU in one launch forward, and one each for the gradients of their input and of their
parameters (`d2r_fast.ops.ensemble_linear` is contract and oracle)."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, check_dtype, enough, packed
from d2r_fast.kernels.tiles import (
    at_place,
    block,
    in_front_of_relu,
    linear_tile,
    linear_tile_backward,
    load_d_z,
    load_tile,
    rounded_product,
    zeros_for,
)
from d2r_fast.kernels.weight_gradient import sum_parts
from d2r_fast.ops.backends import check_precision


class Tile(NamedTuple):
    """What a program makes, [first,second] numbers, summed over chunks of `depth`."""

    first: int
    second: int
    depth: int
    num_warps: int
    num_stages: int


Tiles = dict[str, list[Tile]]  # by precision
# From large, which reads least, to small, of which there are most programs. Measured on an H200 at the published sizes
# (benches/NOTES.md). In bf16 both operands go to the tensor cores as they lie in memory; in the others they pass
# through registers, to be rounded or split, and a wgmma then waits for what it reads to be put back.
FORWARD: Tiles = {
    "float32": [Tile(64, 64, 32, 4, 3)],
    "tf32": [Tile(128, 128, 32, 16, 3), Tile(64, 128, 32, 4, 3), Tile(32, 64, 64, 4, 3)],
    "bf16": [Tile(128, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 64, 64, 4, 4)],
}
# Not by wgmma, which takes the weights of this product turned round in bf16 alone.
BACKWARD: Tiles = FORWARD | {precision: [Tile(32, 64, 32, 4, 4)] for precision in ("float32", "tf32")}
GRADIENT: Tiles = {
    "float32": [Tile(32, 64, 64, 4, 3)],
    "tf32": [Tile(64, 64, 64, 4, 3)],
    # Of one warpgroup. Between what threads put into shared memory and wgmma's reads of it Triton 3.9 makes a fence
    # behind the barrier, not in front of it, where the other operand is copied there: with several warpgroups, one's
    # products could be made before another's threads are past theirs.
    "bf16": [Tile(64, 64, 64, 4, 3)],
}
# Of rows of x that do not begin at multiples of 16 bytes, which are copied number by number: a short row all at once.
ODD_FORWARD: Tiles = FORWARD | {precision: [Tile(64, 64, 64, 4, 3)] for precision in ("float32", "tf32")}
ODD_BACKWARD: Tiles = {precision: [Tile(16, 64, 64, 4, 3)] for precision in FORWARD}


def tile_of(precision: str, sizes: Sequence[tuple[int, int]], tiles: Tiles) -> Tile:
    """The largest tile that leaves enough programs of matrices of these sizes, or the smallest. ValueError: unknown
    precision."""
    check_precision(precision)
    *larger, smallest = tiles[precision]
    for tile in larger:
        if enough(sum(triton.cdiv(n, tile.first) * triton.cdiv(m, tile.second) for n, m in sizes)):
            return tile
    return smallest


@triton.jit(do_not_specialize=["n_rows"])
def ensemble_linear_fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, place_ptr, n_rows,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, X_STRIDE: tl.constexpr, SHARED: tl.constexpr, RELU: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS), cdiv(out, BLOCK_OUT), E); a program owns one tile of y [E,B,out], written once.

    Rows of x lie X_STRIDE numbers apart. place [E,3]: where each network's weight, bias and x begin; None: they stand
    one behind another. x, weight and y may be bfloat16, which is what a product in bf16 takes of them.
    """
    net = tl.program_id(2).to(tl.int64)
    row, inside = block(tl.program_id(0), n_rows, BLOCK_ROWS)
    out, exists = block(tl.program_id(1), N_OUT, BLOCK_OUT)
    if place_ptr is None:
        x_ptr += 0 if SHARED else net * n_rows * X_STRIDE
        weight_ptr += net * N_OUT * N_IN
        bias_ptr += net * N_OUT
    else:
        x_ptr = at_place(x_ptr, place_ptr, net, 2, X_STRIDE)
        weight_ptr = at_place(weight_ptr, place_ptr, net, 0, N_IN)
        bias_ptr = at_place(bias_ptr, place_ptr, net, 1, N_OUT)
    z = tl.zeros((BLOCK_ROWS, BLOCK_OUT), bias_ptr.dtype.element_ty)
    z = linear_tile(z, x_ptr, row, inside, weight_ptr, out, exists, N_IN, X_STRIDE, N_IN, PRECISION, BLOCK_DEPTH)
    z += tl.load(bias_ptr + out, mask=exists, other=0.0)[None, :]
    if RELU:
        z = tl.where(z <= 0, 0.0, z)  # a NaN stays: a diverged network must show
    at = ((net * n_rows + row) * N_OUT)[:, None] + out[None, :]
    tl.store(y_ptr + at, z, mask=inside[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def ensemble_linear_bwd_kernel(
    d_y_ptr, weight_ptr, y_ptr, x_ptr, d_x_ptr, place_ptr, n_rows,
    E: tl.constexpr, FIRST: tl.constexpr, STEP: tl.constexpr, N_IN: tl.constexpr, N_OUT: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS), cdiv(in, BLOCK_IN), E, or 1 where all networks share x); a program owns one tile of
    d_x, written once. Networks that share x are summed first to last, within the program: E of them, from FIRST on each
    STEP-th. place as in the forward kernel, of which x's part is not read.

    y [E,B,out]: a ReLU gave it, and d_y counts where it is above 0. x [E,B,in]: a ReLU gave what the layer reads, and
    d_x is the gradient in front of it. None: there is no ReLU.
    """
    row, inside = block(tl.program_id(0), n_rows, BLOCK_ROWS)
    feature, exists = block(tl.program_id(1), N_IN, BLOCK_IN)
    d_x = zeros_for(d_x_ptr, BLOCK_ROWS, BLOCK_IN)
    own = tl.program_id(2).to(tl.int64)
    for other in range(E if SHARED else 1):
        net = own + FIRST + other * STEP
        own_ptr = weight_ptr + net * N_OUT * N_IN
        if place_ptr is not None:
            own_ptr = at_place(weight_ptr, place_ptr, net, 0, N_IN)
        gradient = net * n_rows * N_OUT
        d_x = linear_tile_backward(
            d_x, d_y_ptr + gradient, y_ptr if y_ptr is None else y_ptr + gradient, row, inside, own_ptr, feature,
            N_IN, N_OUT, PRECISION, BLOCK_DEPTH,
        )  # fmt: skip
    if x_ptr is not None:
        d_x = in_front_of_relu(d_x, x_ptr + own * n_rows * N_IN, row, inside, feature, N_IN)
    at = ((own * n_rows + row) * N_IN)[:, None] + feature[None, :]
    tl.store(d_x_ptr + at, d_x, mask=inside[:, None] & exists[None, :])


@triton.jit(do_not_specialize=["n_rows"])
def ensemble_linear_gradient_kernel(
    d_y_ptr, x_ptr, y_ptr, d_weight_ptr, d_bias_ptr, n_rows,
    N_IN: tl.constexpr, N_OUT: tl.constexpr, SHARED: tl.constexpr, PRECISION: tl.constexpr,
    SPLIT_ROWS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of out x in, splits, E); a program owns one tile of d_weight [splits,E,out,in] over the rows of its
    split, and where the tile is the first of its rows, their part of d_bias [splits,E,out]. Sums of the splits in order
    are the gradients: the same in every run."""
    n_in_tiles: tl.constexpr = tl.cdiv(N_IN, BLOCK_IN)
    net = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    in_tile = tl.program_id(0) % n_in_tiles
    out, exists = block(tl.program_id(0) // n_in_tiles, N_OUT, BLOCK_OUT)
    feature, _ = block(in_tile, N_IN, BLOCK_IN)
    x_ptr += 0 if SHARED else net * n_rows * N_IN
    d_y_ptr += net * n_rows * N_OUT
    if y_ptr is not None:
        y_ptr += net * n_rows * N_OUT
    d_weight = tl.zeros((BLOCK_OUT, BLOCK_IN), d_weight_ptr.dtype.element_ty)
    of_bias = tl.zeros((BLOCK_DEPTH, BLOCK_OUT), d_weight_ptr.dtype.element_ty)
    for start in range(0, SPLIT_ROWS, BLOCK_DEPTH):
        row, inside = block(0, n_rows, BLOCK_DEPTH, split * SPLIT_ROWS + start)
        d_z = load_d_z(d_y_ptr, y_ptr, row, inside, out, N_OUT)
        x = load_tile(x_ptr, row, inside, feature, N_IN, N_IN)
        d_weight = rounded_product(tl.trans(d_z), x, d_weight, PRECISION)
        of_bias += d_z
    part = split.to(tl.int64) * tl.num_programs(2) + net
    at = ((part * N_OUT + out) * N_IN)[:, None] + feature[None, :]
    tl.store(d_weight_ptr + at, d_weight, mask=exists[:, None] & (feature < N_IN)[None, :])
    if in_tile == 0:
        tl.store(d_bias_ptr + part * N_OUT + out, tl.sum(of_bias, 0), mask=exists)


def linear_launch(
    kernel: str, precision: str, n_in: int, n_out: int, n_rows: int, n_nets: int, tiles: Tiles | None = None
) -> dict[str, Any]:
    """Constants and options of "fwd", "bwd" or "gradient", all but RELU and what says which networks share what.

    n_nets: whose results are apart. tiles: to choose from; None: from all that suit. SPLIT_ROWS: about eight splits
    fill the device, and more would only add partial sums.
    """
    sizes = {"fwd": ("ROWS", "OUT", n_in), "bwd": ("ROWS", "IN", n_out), "gradient": ("OUT", "IN", n_rows)}
    first, second, depth = sizes[kernel]
    widths = {"ROWS": n_rows, "IN": n_in, "OUT": n_out}
    split_rows = min(8192, max(256, triton.next_power_of_2(triton.cdiv(n_rows, 8))))
    n_splits = triton.cdiv(n_rows, split_rows) if kernel == "gradient" else 1
    if tiles is None:
        odd = n_in % 4 != 0
        tiles = {"fwd": ODD_FORWARD if odd else FORWARD, "bwd": ODD_BACKWARD if odd else BACKWARD}.get(kernel, GRADIENT)
    tile = tile_of(precision, [(widths[first], widths[second])] * (n_nets * n_splits), tiles)
    blocks = {
        f"BLOCK_{first}": _fitting(tile.first, widths[first]),
        f"BLOCK_{second}": _fitting(tile.second, widths[second]),
        "BLOCK_DEPTH": _fitting(tile.depth, depth),
    }
    if kernel == "gradient":
        blocks["SPLIT_ROWS"] = split_rows
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages} | FUSED
    return {"N_IN": n_in, "N_OUT": n_out, "PRECISION": precision} | blocks | options


def _fitting(block: int, n: int) -> int:
    """No longer than what there is, and at least the 16 that a product takes."""
    return min(block, max(16, triton.next_power_of_2(n)))


def forward(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, precision: str) -> Tensor:
    """y [E,B,out]. ValueError: a dtype other than float32."""
    for name, value in {"x": x, "weight": weight, "bias": bias}.items():
        check_dtype(name, value)
    (n_nets, n_out, n_in), n_rows = weight.shape, x.shape[-2]
    y = x.new_empty(n_nets, n_rows, n_out)
    if y.numel() > 0:
        launch = linear_launch("fwd", precision, n_in, n_out, n_rows, n_nets)
        grid = triton.cdiv(n_rows, launch["BLOCK_ROWS"]), triton.cdiv(n_out, launch["BLOCK_OUT"]), n_nets
        ensemble_linear_fwd_kernel[grid](
            packed(x), packed(weight), packed(bias), y, None, n_rows,
            X_STRIDE=n_in, SHARED=x.dim() == 2, RELU=relu, **launch,
        )  # fmt: skip
    return y


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, relu: bool, precision: str, to_x: bool, to_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x like x, d_weight [E,out,in], d_bias [E,out]; what is not asked for comes empty."""
    check_dtype("d_y", d_y)
    (n_nets, n_out, n_in), n_rows = weight.shape, x.shape[-2]
    d_y, x, weight = (packed(v) for v in (d_y, x, weight))
    behind, shared = packed(y) if relu else None, x.dim() == 2
    d_x = x.new_empty(x.shape if to_x else 0)
    d_weight, d_bias = (weight.new_empty(v if to_weight else 0) for v in (weight.shape, weight.shape[:2]))
    if d_x.numel() > 0:
        n_own = len(d_x) if x.dim() == 3 else 1
        launch = linear_launch("bwd", precision, n_in, n_out, n_rows, n_own)
        grid = triton.cdiv(n_rows, launch["BLOCK_ROWS"]), triton.cdiv(n_in, launch["BLOCK_IN"]), n_own
        ensemble_linear_bwd_kernel[grid](
            d_y, weight, behind, None, d_x, None, n_rows, E=n_nets, FIRST=0, STEP=1, SHARED=shared, **launch
        )
    if d_weight.numel() > 0:
        launch = linear_launch("gradient", precision, n_in, n_out, n_rows, n_nets)
        _gradient(d_y, x, behind, d_weight, d_bias, launch | {"SHARED": shared})
    elif to_weight:  # of a layer that reads nothing, which has no tile of weights for a program to own
        d_bias.copy_((d_y * (y > 0) if relu else d_y).sum(1))
    return d_x, d_weight, d_bias


def forward_at(
    x: Tensor, weights: Tensor, biases: Tensor, place: Tensor, y: Tensor, n_in: int, x_stride: int, relu: bool,
    precision: str,
) -> None:  # fmt: skip
    """Writes y [M,B,out] of M networks, whose weights, biases and x lie within these buffers where place [M,3] int64
    says, in numbers; rows of x [B,n_in] lie `x_stride` apart. x, weights and y may be bfloat16 where products are."""
    n_nets, n_rows, n_out = y.shape
    if y.numel() > 0:
        launch = linear_launch("fwd", precision, n_in, n_out, n_rows, n_nets)
        grid = triton.cdiv(n_rows, launch["BLOCK_ROWS"]), triton.cdiv(n_out, launch["BLOCK_OUT"]), n_nets
        ensemble_linear_fwd_kernel[grid](
            x, weights, biases, y, place, n_rows, X_STRIDE=x_stride, SHARED=False, RELU=relu, **launch
        )


def backward_at(
    d_y: Tensor, weights: Tensor, place: Tensor, x: Tensor | None, d_x: Tensor, precision: str,
    shared: range | None = None,
) -> None:  # fmt: skip
    """Writes d_x [M,B,in] from d_y [M,B,out]; with `shared`, d_x [B,in], a sum over these of the M networks.

    weights and place as in `forward_at`. x [M or more,B,in]: a ReLU gave what the layer reads, and d_x is the gradient
    in front of it, so that who reads it, several times, needs no x; None: there is no ReLU. All but place may be
    bfloat16 where products are.
    """
    n_rows, n_out = d_y.shape[1:]
    n_in = d_x.shape[-1]
    if d_x.numel() > 0:
        n_own = len(d_x) if shared is None else 1
        launch = linear_launch("bwd", precision, n_in, n_out, n_rows, n_own)
        grid = triton.cdiv(n_rows, launch["BLOCK_ROWS"]), triton.cdiv(n_in, launch["BLOCK_IN"]), n_own
        of = range(1) if shared is None else shared
        ensemble_linear_bwd_kernel[grid](
            d_y, weights, None, x, d_x, place, n_rows,
            E=len(of), FIRST=of.start, STEP=of.step, SHARED=shared is not None, **launch,
        )  # fmt: skip


def _gradient(
    d_y: Tensor, x: Tensor, y: Tensor | None, d_weight: Tensor, d_bias: Tensor, launch: dict[str, Any]
) -> None:
    (n_nets, n_out, n_in), n_rows = d_weight.shape, x.shape[-2]
    n_splits = max(1, triton.cdiv(n_rows, launch["SPLIT_ROWS"]))
    n_tiles = triton.cdiv(n_out, launch["BLOCK_OUT"]) * triton.cdiv(n_in, launch["BLOCK_IN"])
    parts = [d_weight, d_bias] if n_splits == 1 else [v.new_empty(n_splits, *v.shape) for v in (d_weight, d_bias)]
    ensemble_linear_gradient_kernel[n_tiles, n_splits, n_nets](d_y, x, y, *parts, n_rows, **launch)
    if n_splits > 1:
        sum_parts(parts, d_weight, d_bias)
