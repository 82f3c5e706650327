"""Linear layers one after another with ReLU between them, as one operation: a multilayer perceptron, or N side by side.
A block of rows stays in the cache from one layer to the next."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2r_fast.ops.arguments import require_flag, require_tensor, under_autocast
from d2r_fast.ops.backends import Backend, Precision, check_precision, choose_backend
from d2r_fast.ops.contract import Run, define, differentiable
from d2r_fast.ops.ensemble_linear import FEWEST_ROWS, ensemble_linear
from d2r_fast.ops.layer_lists import gradients_like, require_layers, require_like


def layer_chain(
    x: Tensor,
    parameters: Sequence[Tensor],
    relu: bool = False,
    backend: Backend = "auto",
    precision: Precision = "float32",
) -> Tensor:
    """x through L linear layers, with a ReLU between them and, if `relu`, behind the last; for each of E networks.

    x           [E,B,in] float, or [B,in] for all networks alike
    parameters  weight [E,out,in] and bias [E,out] of each layer, first to last; or [E,N,out,in] and [E,N,out]: N chains
                side by side in each network, which all read x; dtype and device of x
    backend, precision  as in `ensemble_linear`, of which it is a chain on every backend but `cpp`

    Returns [E,B,out], or [E,B,N,out]. Differentiable once on `cpp` and `triton`.
    ValueError: shapes, dtypes or devices disagree, or the backend cannot run. TypeError: an argument of another kind.
    """
    require_tensor("x", x, "float")
    require_flag("relu", relu)
    check_precision(precision)
    require_layers(parameters, (3, 4))
    n_nets, *side, _, n_in = parameters[0].shape
    if x.dim() not in (2, 3) or x.shape[-1] != n_in or (x.dim() == 3 and x.shape[0] != n_nets):
        raise ValueError(f"x: expected [E={n_nets},B,{n_in}] or [B,{n_in}], got {list(x.shape)}")
    widest = n_in
    for i in range(0, len(parameters), 2):
        n_out = parameters[i].shape[-2] if parameters[i].dim() == parameters[0].dim() else 0
        require_like(f"parameters[{i}]", parameters[i], [n_nets, *side, n_out, n_in], x)
        require_like(f"parameters[{i + 1}]", parameters[i + 1], [n_nets, *side, n_out], x)
        n_in, widest = n_out, max(widest, n_out)
    autocast = under_autocast(x)
    on_gpu = backend == "triton" or not x.is_cpu
    chosen = choose_backend(backend, parameters[0] if autocast else x, 0 if on_gpu else widest, precision)
    few = backend == "auto" and n_nets * x.shape[-2] < FEWEST_ROWS
    if chosen != "cpp" or few or autocast:
        return _layer_by_layer(x, parameters, relu, backend, precision)
    keep = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    y: Tensor = _run(chosen, x, relu, precision, keep, list(parameters))[0]
    return y if side else y.squeeze(2)


def _layer_by_layer(
    x: Tensor, parameters: Sequence[Tensor], relu: bool, backend: Backend, precision: Precision
) -> Tensor:
    side = parameters[0].shape[1:-2]
    for i in range(0, len(parameters), 2):
        weight, bias, opens = parameters[i], parameters[i + 1], relu or i < len(parameters) - 2
        if not side:
            x = ensemble_linear(x, weight, bias, opens, backend, precision)
        elif i == 0:  # one layer of N out outputs
            x = ensemble_linear(x, weight.flatten(1, 2), bias.flatten(1, 2), opens, backend, precision)
            x = x.unflatten(-1, weight.shape[1:3]).transpose(1, 2)  # [E,N,B,out]
        else:  # E N networks
            own = weight.flatten(0, 1), bias.flatten(0, 1)
            x = ensemble_linear(x.flatten(0, 1), *own, opens, backend, precision).unflatten(0, weight.shape[:2])
    return x.transpose(1, 2) if side else x


def _shapes(x: Tensor, relu: bool, precision: str, keep: bool, parameters: list[Tensor]) -> tuple[Tensor, Tensor]:
    *nets, n_out, _ = parameters[-2].shape
    n_nets, n_side = nets if len(nets) == 2 else (*nets, 1)
    rows = x.shape[-2]
    # The distance between rows that products read side by side, as csrc/kernels.h has it.
    strides = [((p.shape[-2] * x.itemsize + 127) // 128 * 128 + 64) // x.itemsize for p in parameters[:-2:2]]
    return x.new_empty(n_nets, rows, n_side, n_out), x.new_empty(n_nets * n_side * rows * sum(strides) if keep else 0)


# y; for backward, if `keep`, what the layers before the last gave, which backward alone reads.
_forward = define(
    "layer_chain(Tensor x, bool relu, str precision, bool keep, Tensor[] parameters) -> (Tensor y, Tensor kept)",
    None,
    _shapes,
)
# d_x comes empty unless `to_x`; d_parameters, a tensor for each parameter or none, is where gradients are written.
_backward = define(
    "layer_chain_backward(Tensor d_y, Tensor x, Tensor y, Tensor kept, bool relu, str precision, bool to_x, "
    "Tensor[] parameters, Tensor(a!)[] d_parameters) -> Tensor",
    None,
    lambda d_y, x, *rest: x.new_empty(x.shape if rest[4] else 0),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, ctx.relu, ctx.precision, _, parameters = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.n_parameters, ctx.to_parameters = len(parameters), any(p.requires_grad for p in parameters)
    ctx.save_for_backward(*parameters, x, *output)


def _differentiate(backward: Run, ctx: Any, d_y: Tensor | None, *_: None) -> tuple[Any, ...]:
    parameters, saved = ctx.saved_tensors[: ctx.n_parameters], ctx.saved_tensors[ctx.n_parameters :]
    if d_y is None:
        return (None,) * 4 + ([None] * len(parameters),)
    d_parameters, to_x = gradients_like(parameters, ctx.to_parameters), ctx.needs_input_grad[0]
    d_x = backward(d_y, *saved, ctx.relu, ctx.precision, to_x, parameters, d_parameters)
    return d_x if to_x else None, None, None, None, d_parameters or [None] * len(parameters)


_run = differentiable(_forward, _backward, _save, _differentiate)
