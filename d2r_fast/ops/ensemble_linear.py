"""E linear layers as one operation, with their ReLU: the layers around the routed modules."""

from typing import Any

import torch
from torch import Tensor

from d2r_fast.ops.arguments import require_flag, require_tensor, under_autocast
from d2r_fast.ops.backends import Backend, Precision, check_precision, choose_backend
from d2r_fast.ops.contract import Run, define, differentiable, launcher
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
    backend   "auto": the fastest that can run here; "reference": torch's own product
    precision see `d2r_fast.ops.backends`

    Returns [E,B,out]. Differentiable once on `cpp` and `triton`, and in bf16. Under autocast it is torch's own product.
    ValueError: shapes, dtypes or devices disagree, or the backend cannot run. TypeError: an argument of another kind.
    """
    require_tensor("x", x, "float")
    autocast = under_autocast(x)
    n_nets, n_out, n_in = _check(x, weight, bias, autocast)
    require_flag("relu", relu)
    check_precision(precision)
    on_gpu = backend == "triton" or not x.is_cpu  # whose kernels take any width
    few = backend == "auto" and not on_gpu and n_nets * x.shape[-2] < FEWEST_ROWS
    # Under autocast x is what the layer before made, bf16 perhaps: whether the backend can run depends on the weight.
    chosen = choose_backend(backend, weight if autocast else x, 0 if on_gpu else max(n_in, n_out), precision)
    if chosen == "reference" or few or autocast:
        rows = x.expand(n_nets, *x.shape) if x.dim() == 2 else x
        if precision == "bf16" and not autocast:
            return RoundedLinear.apply(rows, weight, bias, relu, precision)
        y = torch.baddbmm(bias[:, None], rows, weight.mT)
        return y.relu() if relu else y
    layer: Tensor = _run(chosen, x, weight, bias, relu, precision)
    return layer


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


def _gradient_shapes(d_y: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    to_x, to_weight = rest[3:]
    d_weight, d_bias = (weight.new_empty(v if to_weight else 0) for v in (weight.shape, weight.shape[:2]))
    return x.new_empty(x.shape if to_x else 0), d_weight, d_bias


_launchers = launcher("ensemble_linear", "forward"), launcher("ensemble_linear", "backward")
_forward = define(
    "ensemble_linear(Tensor x, Tensor weight, Tensor bias, bool relu, str precision) -> Tensor",
    None,
    lambda x, weight, *_: x.new_empty(weight.shape[0], x.shape[-2], weight.shape[1]),
    _launchers[0],
)
# Gradients that are not wanted come empty.
_backward = define(
    "ensemble_linear_backward(Tensor d_y, Tensor x, Tensor weight, Tensor y, bool relu, str precision, bool to_x, "
    "bool to_weight) -> (Tensor d_x, Tensor d_weight, Tensor d_bias)",
    None,
    _gradient_shapes,
    _launchers[1],
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, _, ctx.relu, ctx.precision = inputs
    ctx.save_for_backward(x, weight, output)


def _differentiate(backward: Run, ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    to_x, to_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    d_x, *to_layer = backward(d_y, *ctx.saved_tensors, ctx.relu, ctx.precision, to_x, to_weight)
    return d_x if to_x else None, *(to_layer if to_weight else (None, None)), None, None


_run = differentiable(_forward, _backward, _save, _differentiate, _launchers)
