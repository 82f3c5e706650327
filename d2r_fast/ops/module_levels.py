"""Levels of modules side by side, every module of a level reading a mix of the level before it: soft modularization.

Two operations: the gates of the mixes, and the modules. Gates never depend on what modules give.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from d2r_fast.ops.arguments import require_tensor, under_autocast
from d2r_fast.ops.backends import Backend, Precision, check_precision, choose_backend
from d2r_fast.ops.contract import Run, define, differentiable, launcher
from d2r_fast.ops.ensemble_linear import FEWEST_ROWS
from d2r_fast.ops.layer_lists import gradients_like, require_layers, require_like
from d2r_fast.ops.reference import module_levels as reference
from d2r_fast.ops.select_routes import MAX_MODULES


def module_levels(
    u: Tensor,
    gate: Tensor,
    parameters: Sequence[Tensor],
    backend: Backend = "auto",
    precision: Precision = "float32",
) -> Tensor:
    """L levels of N modules, which are linear layers; ReLU stands behind the mixes:

        m_1j = W_1j u + b_1j;   m_lj = W_lj ReLU(sum_k p_ljk m_{l-1,k}) + b_lj;   returns ReLU(sum_k q_k m_Lk)

    u           [E,B,H] float
    gate        [E,B,(L-1) N^2 + N] any weights in u's dtype: p_ljk at ((l - 2) N + j) N + k, for l = 2..L and j from 0;
                q in the last N places
    parameters  weight and bias of each level: [E,N,D,H] and [E,N,D], then [E,N,D,D] and [E,N,D]; u's dtype and device
    backend     "auto": the fastest that can run here; see `d2r_fast.ops.backends`
    precision   what operands of the modules' products are rounded to; see `d2r_fast.ops.backends`

    Returns [E,B,D]. Differentiable once, in u, gate and parameters. Under autocast it is torch's own products.
    ValueError: shapes, dtypes or devices disagree, or the backend cannot run. TypeError: an argument of another kind.
    """
    require_tensor("u", u, "float")
    require_tensor("gate", gate, "float")
    check_precision(precision)
    if u.dim() != 3:
        raise ValueError(f"u: expected [E,B,H], got {list(u.shape)}")
    require_layers(parameters, (4,))
    n_nets, rows, n_in = u.shape
    n_modules, width = parameters[0].shape[1:3]
    for i, parameter in enumerate(parameters):
        shape = [n_nets, n_modules, width, *([n_in if i == 0 else width] if i % 2 == 0 else [])]
        require_like(f"parameters[{i}]", parameter, shape, u)
    require_like("gate", gate, [n_nets, rows, (len(parameters) // 2 - 1) * n_modules**2 + n_modules], u)
    chosen = _choose(backend, u, parameters[0], max(n_in, width), precision)
    if chosen == "reference" or 0 in u.shape:
        return reference.module_levels(u, gate, parameters, precision)
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in (u, gate, *parameters))
    y: Tensor = _run_levels(chosen, u, gate, precision, keep, list(parameters))[0]
    return y


def level_gates(
    c: Tensor,
    n_modules: int,
    parameters: Sequence[Tensor],
    backend: Backend = "auto",
    precision: Precision = "float32",
) -> Tensor:
    """Gates of the L mixes of `module_levels`, each a softmax over its N sources:

        p_1 = softmax(G_1 ReLU(c));   p_l = softmax(G_l ReLU((S_l [p_1, .., p_{l-1}]) * c));   returns [p_1, .., p_L]

    c           [E,B,C] float
    n_modules   N, at most 32; mixes before the last have N targets, the last has one
    parameters  weight [E,out,in] and bias [E,out] of the layers G_1, S_2, G_2, .., S_L, G_L; c's dtype and device
    backend, precision  as in `module_levels`; a GPU runs the reference

    Returns [E,B,(L-1) N^2 + N]. Differentiable once on `cpp`, in c and parameters.
    ValueError, TypeError: as in `module_levels`.
    """
    require_tensor("c", c, "float")
    check_precision(precision)
    if isinstance(n_modules, bool) or not isinstance(n_modules, int):
        raise TypeError(f"n_modules: expected an int, got {type(n_modules).__name__}")
    if not 1 <= n_modules <= MAX_MODULES:
        raise ValueError(f"n_modules: expected 1..{MAX_MODULES}, got {n_modules}")
    if c.dim() != 3:
        raise ValueError(f"c: expected [E,B,C], got {list(c.shape)}")
    require_layers(parameters, (3,))
    if len(parameters) % 4 != 2:
        raise ValueError(f"parameters: expected an odd number of layers, got {len(parameters) // 2}")
    n_nets, _, n_in = c.shape
    n_levels, square = (len(parameters) + 2) // 4, n_modules**2
    for i in range(len(parameters) // 2):
        level = (i + 1) // 2  # from 0
        of_scale = i % 2 == 1
        out = n_in if of_scale else square if level < n_levels - 1 else n_modules
        require_like(f"parameters[{2 * i}]", parameters[2 * i], [n_nets, out, level * square if of_scale else n_in], c)
        require_like(f"parameters[{2 * i + 1}]", parameters[2 * i + 1], [n_nets, out], c)
    widest = max(n_in, square if n_levels > 1 else n_modules, (n_levels - 1) * square)
    chosen = _choose(backend, c, parameters[0], widest, precision)
    if chosen != "cpp":
        return reference.level_gates(c, n_modules, parameters, precision)
    keep = torch.is_grad_enabled() and any(v.requires_grad for v in (c, *parameters))
    p: Tensor = _run_gates(chosen, c, n_modules, precision, keep, list(parameters))[0]
    return p


def _choose(backend: Backend, x: Tensor, weight: Tensor, width: int, precision: Precision) -> str:
    """Which backend runs; `width` is that of the widest layer, of which a GPU leaves the products to torch."""
    # Under autocast x is what the layer before made, bf16 perhaps: whether the backend can run depends on the weight.
    autocast = under_autocast(x)
    on_gpu = backend == "triton" or not x.is_cpu
    chosen = choose_backend(backend, weight if autocast else x, 0 if on_gpu else width, precision)
    few = backend == "auto" and chosen == "cpp" and x.shape[0] * x.shape[1] < FEWEST_ROWS
    return "reference" if few or autocast else chosen


def _level_shapes(
    u: Tensor, gate: Tensor, precision: str, keep: bool, parameters: list[Tensor]
) -> tuple[Tensor, Tensor]:
    n_modules, width = parameters[0].shape[1:3]
    kept = (*u.shape[:2], len(parameters) // 2, n_modules, width)
    return u.new_empty(*u.shape[:2], width), u.new_empty(kept if keep else 0)


def _gate_shapes(
    c: Tensor, n_modules: int, precision: str, keep: bool, parameters: list[Tensor]
) -> tuple[Tensor, Tensor]:
    n_levels = (len(parameters) + 2) // 4
    n_gates = (n_levels - 1) * n_modules**2 + n_modules
    return c.new_empty(*c.shape[:2], n_gates), c.new_empty((*c.shape[:2], n_levels - 1, c.shape[2]) if keep else 0)


# y; for backward, if `keep`, what every module gave, which only the same backend's backward reads.
_levels = define(
    "module_levels(Tensor u, Tensor gate, str precision, bool keep, Tensor[] parameters) -> (Tensor y, Tensor m)",
    None,
    _level_shapes,
    launcher("module_levels", "forward"),
)
# d_parameters, a tensor for each parameter or none, is where their gradients are written.
_levels_backward = define(
    "module_levels_backward(Tensor d_y, Tensor u, Tensor gate, Tensor y, Tensor m, str precision, Tensor[] parameters, "
    "Tensor(a!)[] d_parameters) -> (Tensor d_u, Tensor d_gate)",
    None,
    lambda d_y, u, gate, *_: (u.new_empty(u.shape), gate.new_empty(gate.shape)),
    launcher("module_levels", "backward"),
)
# p; for backward, if `keep`, what scaled c.
_gates = define(
    "level_gates(Tensor c, int n_modules, str precision, bool keep, Tensor[] parameters) -> (Tensor p, Tensor scale)",
    None,
    _gate_shapes,
)
_gates_backward = define(
    "level_gates_backward(Tensor d_p, Tensor c, Tensor p, Tensor scale, int n_modules, str precision, "
    "Tensor[] parameters, Tensor(a!)[] d_parameters) -> Tensor",
    None,
    lambda d_p, c, *_: c.new_empty(c.shape),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *before, ctx.precision, _, parameters = inputs
    ctx.n_modules = next((v for v in before if isinstance(v, int)), None)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.n_parameters, ctx.to_parameters = len(parameters), any(p.requires_grad for p in parameters)
    ctx.save_for_backward(*parameters, *(v for v in before if isinstance(v, Tensor)), *output)


def _differentiate_levels(backward: Run, ctx: Any, d_y: Tensor | None, *_: None) -> tuple[Any, ...]:
    parameters, saved = ctx.saved_tensors[: ctx.n_parameters], ctx.saved_tensors[ctx.n_parameters :]
    if d_y is None:
        return (None,) * 4 + ([None] * len(parameters),)
    d_parameters = gradients_like(parameters, ctx.to_parameters)
    d_u, d_gate = backward(d_y, *saved, ctx.precision, parameters, d_parameters)
    return d_u, d_gate, None, None, d_parameters or [None] * len(parameters)


def _differentiate_gates(backward: Run, ctx: Any, d_p: Tensor | None, *_: None) -> tuple[Any, ...]:
    parameters, saved = ctx.saved_tensors[: ctx.n_parameters], ctx.saved_tensors[ctx.n_parameters :]
    if d_p is None:
        return (None,) * 4 + ([None] * len(parameters),)
    d_parameters = gradients_like(parameters, ctx.to_parameters)
    d_c = backward(d_p, *saved, ctx.n_modules, ctx.precision, parameters, d_parameters)
    return d_c, None, None, None, d_parameters or [None] * len(parameters)


_launchers = launcher("module_levels", "forward"), launcher("module_levels", "backward")
_run_levels = differentiable(_levels, _levels_backward, _save, _differentiate_levels, _launchers)
_run_gates = differentiable(_gates, _gates_backward, _save, _differentiate_gates)
