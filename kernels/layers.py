"""What lies between the products of a D2R network's layers, in one launch each: how the base's output goes on, and its
gradient (`d2r_fast.learning.layered`). Both are bandwidth-bound."""

import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, check_dtype
from d2r_fast.kernels.tiles import place_of

ELEMENTS_LAUNCH = {"BLOCK": 1024, "num_warps": 4} | FUSED


@triton.jit(do_not_specialize=["n_rows"])
def split_base_kernel(
    f_ptr, parameters_ptr, place_ptr, task_ptr, scaled_ptr, opened_ptr, n_rows,
    H: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B H, BLOCK), E). Reads f [E,B,H] once, writes f g and ReLU(f); g by `_task_row`."""
    net, inside, task, feature, at = _elements(task_ptr, n_rows, H, BLOCK)
    f = tl.load(f_ptr + at, mask=inside, other=0.0)
    g = _task_row(parameters_ptr, place_ptr, net, task, feature, inside, H, T)
    tl.store(scaled_ptr + at, f * g, mask=inside)
    tl.store(opened_ptr + at, tl.where(f <= 0, 0.0, f), mask=inside)  # a NaN stays: a diverged network must show


@triton.jit(do_not_specialize=["n_rows"])
def split_base_bwd_kernel(
    d_scaled_ptr, d_opened_ptr, f_ptr, parameters_ptr, place_ptr, task_ptr, d_f_ptr, d_g_ptr, n_rows,
    H: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B H, BLOCK), E). Reads both gradients and f, all [E,B,H], writes those of f and g."""
    net, inside, task, feature, at = _elements(task_ptr, n_rows, H, BLOCK)
    f = tl.load(f_ptr + at, mask=inside, other=0.0)
    g = _task_row(parameters_ptr, place_ptr, net, task, feature, inside, H, T)
    d_scaled = tl.load(d_scaled_ptr + at, mask=inside, other=0.0)
    d_opened = tl.load(d_opened_ptr + at, mask=inside, other=0.0)
    tl.store(d_f_ptr + at, d_scaled * g + tl.where(f > 0, d_opened, 0.0), mask=inside)
    tl.store(d_g_ptr + at, d_scaled * f, mask=inside)


@triton.jit
def _elements(task_ptr, n_rows, H: tl.constexpr, BLOCK: tl.constexpr):
    """A program's network, and of its numbers of [B,H]: which exist, their row's task and their feature, and where they
    lie in [E,B,H]."""
    net = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n_rows * H
    task = tl.load(task_ptr + at // H, mask=inside, other=0)
    return net, inside, task, at % H, net * n_rows * H + at


@triton.jit
def _task_row(parameters_ptr, place_ptr, net, task, feature, inside, H: tl.constexpr, T: tl.constexpr):
    """Column `task` of the task's weight [H,T], plus its bias: what a product with the one-hot task gives. A task that
    does not exist adds nothing to the bias."""
    weight_at = place_of(place_ptr, net, 0, T) + feature * T + task
    weight = tl.load(parameters_ptr + weight_at, mask=inside & (task >= 0) & (task < T), other=0.0)
    return weight + tl.load(parameters_ptr + place_of(place_ptr, net, 1, H) + feature, mask=inside, other=0.0)


def split_base(
    f: Tensor, parameters: Tensor, place: Tensor, task: Tensor, n_tasks: int, scaled: Tensor, opened: Tensor
) -> None:
    """Writes f g and ReLU(f), all contiguous [E,B,H]; g from the task's layer, whose weight and bias lie within
    `parameters` where place [E,3] says, and task [B]."""
    check_dtype("f", f)
    n_nets, n_rows, width = f.shape
    if f.numel() > 0:
        grid = (triton.cdiv(n_rows * width, ELEMENTS_LAUNCH["BLOCK"]), n_nets)
        split_base_kernel[grid](
            f, parameters, place, task, scaled, opened, n_rows, H=width, T=n_tasks, **ELEMENTS_LAUNCH
        )


def split_base_backward(
    d_scaled: Tensor, d_opened: Tensor, f: Tensor, parameters: Tensor, place: Tensor, task: Tensor, n_tasks: int,
    d_f: Tensor, d_g: Tensor,
) -> None:  # fmt: skip
    """Writes the gradients of f and g, of the first networks that f is of; as `split_base`."""
    check_dtype("d_scaled", d_scaled)
    n_nets, n_rows, width = d_scaled.shape
    if d_scaled.numel() > 0:
        grid = (triton.cdiv(n_rows * width, ELEMENTS_LAUNCH["BLOCK"]), n_nets)
        split_base_bwd_kernel[grid](
            d_scaled, d_opened, f, parameters, place, task, d_f, d_g, n_rows, H=width, T=n_tasks, **ELEMENTS_LAUNCH
        )
