"""E linear layers as one operation, with their ReLU: the layers around the routed modules."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from d2r_fast.ops.arguments import require_flag, require_tensor, under_autocast
from d2r_fast.ops.backends import Backend, Precision, check_precision, choose_backend
from d2r_fast.ops.cpp import ensemble_linear as cpp
from d2r_fast.ops.reference.products import RoundedLinear

# Below this many rows over all networks, packing the weights would cost more than the product gains.
FEWEST_ROWS = 256


def ensemble_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    relu: bool = False,
    backend: Backend = "auto",
    precision: Precision = "float32",
) -> Tensor:
    """y = x W^T + b for each of E networks, with a ReLU behind it if `relu`.

    x         [E,B,in] float, or [B,in] for all networks alike
    weight    [E,out,in], bias [E,out]; dtype and device of x
    backend   "auto": the fastest that can run here; a GPU's is torch's own product, which reference means too
    precision see `d2r_fast.ops.backends`

    Returns [E,B,out]. Differentiable once on `cpp` and in bf16. Under autocast it is torch's own product.
    ValueError: shapes, dtypes or devices disagree, or the backend cannot run. TypeError: an argument of another kind.
    """
    require_tensor("x", x, "float")
    autocast = under_autocast(x)
    n_nets, n_out, n_in = _check(x, weight, bias, autocast)
    require_flag("relu", relu)
    check_precision(precision)
    few = backend == "auto" and n_nets * x.shape[-2] < FEWEST_ROWS
    # Under autocast x is what the layer before made, bf16 perhaps: whether the backend can run depends on the weight.
    chosen = choose_backend(
        backend, weight if autocast else x, 0 if backend == "triton" else max(n_in, n_out), precision
    )
    if chosen != "cpp" or few or autocast:
        rows = x.expand(n_nets, *x.shape) if x.dim() == 2 else x
        if precision == "bf16" and not autocast:
            return RoundedLinear.apply(rows, weight, bias, relu, precision)
        y = torch.baddbmm(bias[:, None], rows, weight.mT)
        return y.relu() if relu else y
    run: Any = _forward if torch.compiler.is_compiling() else _Eager.apply
    return run(x, weight, bias, relu, precision)


def _check(x: Tensor, weight: Tensor, bias: Tensor, autocast: bool) -> tuple[int, int, int]:
    require_tensor("weight", weight, "float")
    require_tensor("bias", bias, "float")
    if weight.dim() != 3:
        raise ValueError(f"weight: expected [E,out,in], got {list(weight.shape)}")
    n_nets, n_out, n_in = weight.shape
    if x.dim() not in (2, 3) or x.shape[-1] != n_in or (x.dim() == 3 and x.shape[0] != n_nets):
        raise ValueError(f"x: expected [E={n_nets},B,{n_in}] or [B,{n_in}], got {list(x.shape)}")
    if bias.shape != (n_nets, n_out):
        raise ValueError(f"bias: expected [E={n_nets},{n_out}], got {list(bias.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        # Autocast brings these to one dtype, and leaves float64 alone.
        mixed = autocast and torch.float64 not in (x.dtype, value.dtype)
        if value.dtype != x.dtype and not mixed:
            raise ValueError(f"{name}: expected {x.dtype} like x, got {value.dtype}")
        if value.device != x.device:
            raise ValueError(f"{name}: expected device {x.device} like x, got {value.device}")
    return n_nets, n_out, n_in


@torch.library.custom_op("d2r_fast::ensemble_linear", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, precision: str) -> Tensor:
    """y [E,B,out], on the CPU."""
    return cpp.forward(x, weight, bias, relu, precision)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, precision: str) -> Tensor:
    return x.new_empty(weight.shape[0], x.shape[-2], weight.shape[1])


@torch.library.custom_op("d2r_fast::ensemble_linear_backward", mutates_args=())
def _backward(
    d_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, relu: bool, precision: str, to_x: bool, to_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x [E,B,in], d_weight, d_bias; empty where not wanted."""
    return cpp.backward(d_y, x, weight, y, relu, precision, to_x, to_weight)


@_backward.register_fake
def _(
    d_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, relu: bool, precision: str, to_x: bool, to_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d_x = x.new_empty((*d_y.shape[:2], weight.shape[2]) if to_x else 0)
    return d_x, weight.new_empty(weight.shape if to_weight else 0), weight.new_empty(d_y.shape[::2] if to_weight else 0)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.relu, ctx.precision = inputs
    ctx.save_for_backward(x, weight, output)


def _differentiate(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    to_x, to_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    x = ctx.saved_tensors[0]
    run: Any = _backward if torch.compiler.is_compiling() else cpp.backward
    d_x, d_weight, d_bias = run(d_y, *ctx.saved_tensors, ctx.relu, ctx.precision, to_x, to_weight)
    to_input = None if not to_x else d_x.sum(0) if x.dim() == 2 else d_x
    return to_input, *((d_weight, d_bias) if to_weight else (None, None)), None, None


_forward.register_autograd(_differentiate, setup_context=_save_for_backward)


class _Eager(torch.autograd.Function):
    """The same without torch.library's bookkeeping, which costs more than a small layer: 0.1 ms a call."""

    forward = staticmethod(cpp.forward)
    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(once_differentiable(_differentiate))  # type: ignore[assignment]
