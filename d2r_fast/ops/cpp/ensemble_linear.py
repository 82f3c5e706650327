"""Backend `cpp` of `ensemble_linear`."""

from torch import Tensor

from d2r_fast.ops.cpp.library import operations


def forward(x: Tensor, weight: Tensor, bias: Tensor, relu: bool, precision: str) -> Tensor:
    """y [E,B,out]."""
    y = x.new_empty(weight.shape[0], x.shape[-2], weight.shape[1])
    inputs = (v.contiguous() for v in (x, weight, bias))
    operations().linear(*inputs, relu, precision == "bf16", y)
    return y


def backward(
    d_y: Tensor, x: Tensor, weight: Tensor, y: Tensor, relu: bool, precision: str, to_x: bool, to_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x [E,B,in], a network each though x be shared; d_weight; d_bias. Empty where not wanted."""
    n_nets, n_out, n_in = weight.shape
    d_x = x.new_empty((n_nets, x.shape[-2], n_in) if to_x else 0)
    d_weight = weight.new_empty(weight.shape if to_weight else 0)
    d_bias = weight.new_empty((n_nets, n_out) if to_weight else 0)
    inputs = (v.contiguous() for v in (d_y, x, weight, y))
    operations().linear_backward(*inputs, relu, precision == "bf16", to_x, to_weight, d_x, d_weight, d_bias)
    return d_x, d_weight, d_bias
