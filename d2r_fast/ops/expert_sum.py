"""Weighted sums of a row's experts, as they are (CARE) or made orthonormal first (MOORE)."""

import math
from typing import Any

import torch
from torch import Tensor

from d2r_fast.ops.arguments import require_flag, require_tensor, under_autocast
from d2r_fast.ops.backends import Backend, choose_backend
from d2r_fast.ops.contract import Run, define, differentiable, launcher
from d2r_fast.ops.reference import expert_sum as reference


def expert_sum(
    v: Tensor, weight: Tensor, orthogonal: bool = False, norm_epsilon: float = 0.0, backend: Backend = "auto"
) -> Tensor:
    """sum_k w_k v_k over the N vectors of each row; or, if `orthogonal`, sum_k w_k b_k with

        b_k = r_k / (|r_k| + eps),   r_k = v_k - sum_{j<k} <v_k, b_j> b_j

    v             [E,B,N,D] float, N at least 1; orthogonal: N <= D, and none in the span of those before it
    weight        [E,B,N] of any sign; dtype and device of v
    norm_epsilon  eps, finite and not negative
    backend       "auto": the fastest that can run here; see `d2r_fast.ops.backends`

    Returns [E,B,D]. Differentiable once, in v and weight. Under autocast it runs in v's dtype.
    ValueError: shapes, dtypes or devices disagree, or the backend cannot run. TypeError: an argument of another kind.
    """
    require_tensor("v", v, "float")
    require_tensor("weight", weight, "float")
    require_flag("orthogonal", orthogonal)
    if isinstance(norm_epsilon, bool) or not isinstance(norm_epsilon, int | float):
        raise TypeError(f"norm_epsilon: expected a number, got {type(norm_epsilon).__name__}")
    if not 0 <= norm_epsilon < math.inf:
        raise ValueError(f"norm_epsilon: expected a finite number of at least 0, got {norm_epsilon}")
    if v.dim() != 4 or v.shape[2] < 1 or (orthogonal and v.shape[2] > v.shape[3]):
        raise ValueError(f"v: expected [E,B,N,D]{' with N <= D' if orthogonal else ''}, got {list(v.shape)}")
    if weight.shape != v.shape[:3]:
        raise ValueError(f"weight: expected shape {list(v.shape[:3])}, got {list(weight.shape)}")
    if under_autocast(v) and torch.float64 not in (v.dtype, weight.dtype):
        weight = weight.to(v.dtype)
    if weight.dtype != v.dtype:
        raise ValueError(f"weight: expected {v.dtype} like v, got {weight.dtype}")
    if weight.device != v.device:
        raise ValueError(f"weight: expected device {v.device} like v, got {weight.device}")
    chosen = choose_backend(backend, v)
    if chosen == "reference" or 0 in v.shape:
        with torch.autocast(v.device.type, enabled=False):
            return reference.expert_sum(v, weight, orthogonal, float(norm_epsilon))
    y: Tensor = _run(chosen, v, weight, orthogonal, float(norm_epsilon))
    return y


_launchers = launcher("expert_sum", "forward"), launcher("expert_sum", "backward")
_forward = define(
    "expert_sum(Tensor v, Tensor weight, bool orthogonal, float norm_epsilon) -> Tensor",
    None,
    lambda v, *_: v.new_empty(v.shape[0], v.shape[1], v.shape[3]),
    _launchers[0],
)
_backward = define(
    "expert_sum_backward(Tensor d_y, Tensor v, Tensor weight, bool orthogonal, float norm_epsilon) -> "
    "(Tensor d_v, Tensor d_weight)",
    None,
    lambda d_y, v, weight, *_: (v.new_empty(v.shape), v.new_empty(weight.shape)),
    _launchers[1],
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, weight, ctx.orthogonal, ctx.norm_epsilon = inputs
    ctx.save_for_backward(v, weight)


def _differentiate(backward: Run, ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
    d_v, d_weight = backward(d_y, *ctx.saved_tensors, ctx.orthogonal, ctx.norm_epsilon)
    return d_v, d_weight, None, None


_run = differentiable(_forward, _backward, _save, _differentiate, _launchers)
