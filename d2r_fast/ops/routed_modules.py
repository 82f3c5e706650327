"""All N modules as one operation with its own backward (algorithm: "network", "dynamic depth" and "ResRouting")."""

from typing import Any

import torch
from torch import Tensor

from d2r_fast.ops.arguments import require_flag, require_tensor, under_autocast
from d2r_fast.ops.backends import Backend, Precision, check_precision, choose_backend
from d2r_fast.ops.contract import Run, define, differentiable, launcher
from d2r_fast.ops.reference.routed_modules import ReferenceModules
from d2r_fast.ops.route_checks import require_active, require_legal_index
from d2r_fast.ops.select_routes import MAX_MODULES, Routes


def routed_modules(
    h0: Tensor,
    weight: Tensor,
    bias: Tensor,
    routes: Routes,
    residual: bool = True,
    backend: Backend = "auto",
    precision: Precision = "float32",
) -> Tensor:
    """Run modules 1..N-1 on top of module 0's output and mix what route N picked:

        x_i = sum_k gate_ik h_{index_ik};   h_i = ReLU(W_i x_i + b_i) + x_i;   returns x_N

    h0        [E,B,D] float     module 0's output, h_0 = ReLU(z_0). Its gradient is A_0: what may enter the ReLU layer.
    weight    [E,N-1,D,D]       W_i at [:, i-1], applied as W_i x (out, in); dtype and device of h0
    bias      [E,N-1,D]         b_i at [:, i-1]
    routes    index, gate, flow [E,B,N,K], active [E,B] as `select_routes` or `make_routes` return them; gate may be any
              weights in h0's dtype; a module whose active bit is off is not computed, and may not be read
    residual  False: h_i = ReLU(W_i x_i + b_i)
    backend   "auto": the fastest that can run here; see `d2r_fast.ops.backends`
    precision what operands of the modules' products are rounded to; see `d2r_fast.ops.backends`

    Returns [E,B,D]. Differentiable once, in h0, weight, bias and routes.gate. Under autocast it runs in weight's dtype.
    ValueError: shapes, dtypes or devices disagree, a route reads a module that it may not or that is not active, or the
    backend cannot run. TypeError: an argument of another kind. On a GPU the values in `routes` are not looked at here,
    which would mean to wait for it: `make_routes` and `select_routes`, where routes come from, have looked.
    """
    require_tensor("h0", h0, "float")
    if not isinstance(routes, Routes):
        raise TypeError(f"routes: expected Routes, got {type(routes).__name__}")
    require_tensor("weight", weight, "float")
    require_tensor("routes.gate", routes.gate, "float")
    autocast = under_autocast(h0)
    _check(h0, weight, bias, routes, autocast)
    if autocast:
        with torch.autocast(h0.device.type, enabled=False):
            routes = routes._replace(gate=routes.gate.to(weight.dtype))
            return routed_modules(h0.to(weight.dtype), weight, bias, routes, residual, backend, precision)
    require_flag("residual", residual)
    check_precision(precision)
    chosen = choose_backend(backend, h0, h0.shape[2], precision)
    if chosen != "cpp" and not (chosen == "triton" and h0.is_cuda):
        require_legal_index(routes.index, "routes.index")
        require_active(routes.index, routes.active)
    if chosen == "reference":
        return ReferenceModules.apply(h0, weight, bias, routes.gate, routes.index, routes.flow, residual, precision)
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in (h0, weight, bias, routes.gate))
    mixed: Tensor = _run(chosen, h0, weight, bias, *routes, residual, precision, keep)[0]
    return mixed


def _shapes(h0: Tensor, weight: Tensor, bias: Tensor, index: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    keep = rest[-1]
    shape = (h0.shape[0], index.shape[2], *h0.shape[1:]) if keep else (0,)
    return h0.new_empty(h0.shape), h0.new_empty(shape), h0.new_empty(shape, dtype=torch.bool)


def _gradient_shapes(d_mixed: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gate, to_weight = rest[3], rest[-1]
    to_layers = (weight.new_empty(v if to_weight else 0) for v in (weight.shape, weight.shape[:3]))
    return d_mixed.new_empty(d_mixed.shape), *to_layers, gate.new_empty(gate.shape)


def _launcher(function: str, n_before: int) -> Run:
    """Triton's launchers take the four tensors of the routes, which follow `n_before` others, as one `Routes`."""
    launch, behind = launcher("routed_modules", function), n_before + len(Routes._fields)
    return lambda *args: launch(*args[:n_before], Routes(*args[n_before:behind]), *args[behind:])


_launchers = _launcher("forward", 3), _launcher("backward", 4)
# mixed [E,B,D]; for backward, if `keep`, h and opened (bool, z > 0), E*N*B*D numbers each, which only the same
# backend's backward reads: where in them an active module's output lies, and what the rest holds, is the backend's
# choice. `flow` matters to backward only.
_forward = define(
    "routed_modules(Tensor h0, Tensor weight, Tensor bias, Tensor index, Tensor gate, Tensor flow, Tensor active, "
    "bool residual, str precision, bool keep) -> (Tensor mixed, Tensor h, Tensor opened)",
    None,
    _shapes,
    _launchers[0],
)
# d_weight and d_bias come empty unless `to_weight`.
_backward = define(
    "routed_modules_backward(Tensor d_mixed, Tensor weight, Tensor h, Tensor opened, Tensor index, Tensor gate, "
    "Tensor flow, Tensor active, bool residual, str precision, bool to_weight) -> "
    "(Tensor d_h0, Tensor d_weight, Tensor d_bias, Tensor d_gate)",
    None,
    _gradient_shapes,
    _launchers[1],
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight, _, *routes, ctx.residual, ctx.precision, _ = inputs
    _, h, opened = output
    ctx.mark_non_differentiable(h, opened)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(weight, h, opened, *routes)


def _differentiate(backward: Run, ctx: Any, d_mixed: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_mixed is None:
        return (None,) * 10
    to_weight = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
    d_h0, d_weight, d_bias, d_gate = backward(d_mixed, *ctx.saved_tensors, ctx.residual, ctx.precision, to_weight)
    to_layers = (d_weight, d_bias) if to_weight else (None, None)
    return d_h0, *to_layers, None, d_gate, None, None, None, None, None


_run = differentiable(_forward, _backward, _save, _differentiate, _launchers)


def _check(h0: Tensor, weight: Tensor, bias: Tensor, routes: Routes, autocast: bool) -> None:
    """autocast: h0 and the gates are yet to be cast to weight's dtype."""
    if h0.dim() != 3:
        raise ValueError(f"h0: expected [E,B,D], got {list(h0.shape)}")
    n_nets, rows, width = h0.shape
    require_tensor("routes.index", routes.index, "integer")
    if routes.index.dim() != 4 or list(routes.index.shape[:2]) != [n_nets, rows]:
        raise ValueError(f"routes.index: expected [E={n_nets},B={rows},N,K], got {list(routes.index.shape)}")
    n_modules, k = routes.index.shape[2:]
    if not 1 <= k <= n_modules <= MAX_MODULES:
        raise ValueError(f"routes.index: expected 1 <= K <= N <= {MAX_MODULES}, got {list(routes.index.shape)}")
    real = weight.dtype if autocast else h0.dtype
    for name, value, shape, dtype in (
        ("routes.index", routes.index, list(routes.index.shape), torch.int32),
        ("weight", weight, [n_nets, n_modules - 1, width, width], real),
        ("bias", bias, [n_nets, n_modules - 1, width], real),
        ("routes.gate", routes.gate, list(routes.index.shape), routes.gate.dtype if autocast else real),
        ("routes.flow", routes.flow, list(routes.index.shape), torch.bool),
        ("routes.active", routes.active, [n_nets, rows], torch.int32),
    ):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.layout is not torch.strided:
            raise ValueError(f"{name}: expected a dense tensor, got {value.layout}")
        if list(value.shape) != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")
        if value.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, got {value.dtype}")
        if value.device != h0.device:
            raise ValueError(f"{name}: expected device {h0.device} like h0, got {value.device}")
