"""Calls of the operations that the networks without routes are made of, as odd_calls.py makes those of the others."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from odd_calls import (
    ILLEGAL,
    LEGAL,
    Call,
    Change,
    Sizes,
    choices_by_name,
    far_from_kinks,
    flags,
    normal,
    poisons,
    scalars,
    tensor_faults,
)
from torch import Tensor


def layer(s: Sizes, *shape: int) -> list[Tensor]:
    """Weight [..,out,in] and bias [..,out] of one layer or a stack."""
    *side, n_out, n_in = shape
    kinks = s.dtype == torch.float64
    bias = normal(s, *side, n_out) if kinks else far_from_kinks(s, *side, n_out)
    return [normal(s, *shape) * (1 if kinks else 0.1) / max(1, n_in) ** 0.5, bias]


def draw_precision(s: Sizes) -> str:
    return s.rng.choice(["bf16", "tf32"]) if s.rng.random() < 0.15 else "float32"


def parameter_changes(s: Sizes, parameters: list[Tensor], names: tuple[str, ...]) -> list[Change]:
    """Faults of one of them, and of the list."""
    at = s.rng.randrange(len(parameters))
    names = ("parameters", *names)

    def with_list(new: Any) -> Callable[[dict[str, Any]], None]:
        return lambda a: a.__setitem__("parameters", new)

    found = []
    for fault in tensor_faults("parameter", parameters[at], ()):
        holder: dict[str, Any] = {}
        fault.apply(holder)
        label = f"parameters[{at}]:{fault.label.split(':', 1)[1]}"
        changed = [*parameters[:at], holder["parameter"], *parameters[at + 1 :]]
        found.append(Change(label, ILLEGAL, names, with_list(changed)))
    lists: dict[str, tuple[Any, str]] = {
        "None": (None, ILLEGAL),
        "empty": ([], ILLEGAL),
        "one short": (parameters[:-1], ILLEGAL),
        "one more": ([*parameters, parameters[-1]], ILLEGAL),
        "no Sequence": (iter(parameters), ILLEGAL),
        "a tuple": (tuple(parameters), LEGAL),
        "a tensor": (parameters[0], ILLEGAL),
        "reversed": (parameters[::-1], ILLEGAL),
        "a dict": (dict(enumerate(parameters)), ILLEGAL),
    }
    return found + [
        Change(f"parameters: {label}", verdict, names, with_list(value)) for label, (value, verdict) in lists.items()
    ]


def input_changes(s: Sizes, name: str, value: Tensor, names: tuple[str, ...], free: tuple[int, ...]) -> list[Change]:
    return tensor_faults(name, value, names, free) + poisons(name, value, s.rng)


def own_or_shared(s: Sizes, b: int, n_in: int) -> Tensor:
    """[E,B,in], or [B,in] for all networks."""
    return normal(s, b, n_in) if s.rng.random() < 0.3 else normal(s, s.e, b, n_in)


def not_of_other_rank(x: Tensor, changes: list[Change]) -> list[Change]:
    """[B,in] and [E,B,in] are both legal: what has one axis more or less may be the other."""
    return [c for c in changes if "rank" not in c.label and not ("trailing" in c.label and x.shape[-1] == 1)]


def chain_call(s: Sizes) -> tuple[Call, list[Change]]:
    side = [s.n] if s.rng.random() < 0.5 else []
    widths = [s.d, *(s.rng.choice([1, 3, 8, 17]) for _ in range(s.rng.choice([1, 2, 3])))]
    parameters = [v for a, b in pairwise(widths) for v in layer(s, s.e, *side, b, a)]
    x = own_or_shared(s, s.b, s.d)
    arguments = {"x": x, "parameters": parameters, "relu": s.rng.random() < 0.5, "precision": draw_precision(s)}
    names = ("x", "parameters")
    changes = choices_by_name(True) + flags("relu") + parameter_changes(s, parameters, names)
    changes += not_of_other_rank(x, input_changes(s, "x", x, names, (x.dim() - 2,)))
    return Call("layer_chain", arguments, needs=names), changes


def expert_sum_call(s: Sizes) -> tuple[Call, list[Change]]:
    orthogonal = s.n <= s.d and s.rng.random() < 0.6
    v = normal(s, s.e, s.b, s.n, s.d)
    if orthogonal:  # far from each other's span, where float32 would lose what float64 keeps
        v = 0.3 * v / s.d**0.5 + 3 * torch.eye(s.n, s.d, dtype=s.dtype)
    weight = normal(s, s.e, s.b, s.n)
    arguments = {"v": v, "weight": weight, "orthogonal": orthogonal, "norm_epsilon": s.rng.choice([0.0, 0, 0.1])}
    names = ("v", "weight")
    changes = choices_by_name(False) + flags("orthogonal")
    changes += scalars("norm_epsilon", [-1.0, float("nan"), float("inf"), None, "0", True, [0.0]], ILLEGAL)
    changes += input_changes(s, "v", v, names, (3,)) + input_changes(s, "weight", weight, names, ())
    none = v[:, :, :0]
    changes.append(Change("v: no vectors", ILLEGAL, names, lambda a: a.update(v=none, weight=weight[:, :, :0])))
    narrow = normal(s, s.e, s.b, 3, 2)
    changes.append(
        Change(
            "v: more vectors than numbers", ILLEGAL, names,
            lambda a: a.update(v=narrow, weight=narrow[..., 0].clone(), orthogonal=True),
        )
    )  # fmt: skip
    return Call("expert_sum", arguments, needs=names), changes


def levels_call(s: Sizes) -> tuple[Call, list[Change]]:
    n, n_levels, n_in = min(s.n, 5), s.rng.choice([1, 2, 3]), s.rng.choice([1, 5, 16])
    parameters = layer(s, s.e, n, s.d, n_in)
    for _ in range(n_levels - 1):
        parameters += layer(s, s.e, n, s.d, s.d)
    u, gate = normal(s, s.e, s.b, n_in), normal(s, s.e, s.b, (n_levels - 1) * n * n + n)
    arguments = {"u": u, "gate": gate, "parameters": parameters, "precision": draw_precision(s)}
    names = ("u", "gate", "parameters")
    changes = choices_by_name(True) + parameter_changes(s, parameters, names)
    for name in ("u", "gate"):
        changes += input_changes(s, name, arguments[name], names, ())
    return Call("module_levels", arguments, needs=names), changes


def gates_call(s: Sizes) -> tuple[Call, list[Change]]:
    n, n_levels = min(s.n, 5), s.rng.choice([1, 2, 3])
    parameters: list[Tensor] = []
    for level in range(n_levels):
        if level:
            parameters += layer(s, s.e, s.d, level * n * n)
        parameters += layer(s, s.e, n * n if level < n_levels - 1 else n, s.d)
    c = normal(s, s.e, s.b, s.d)
    arguments = {"c": c, "n_modules": n, "parameters": parameters, "precision": draw_precision(s)}
    names = ("c", "parameters")
    changes = choices_by_name(True) + parameter_changes(s, parameters, names)
    changes += input_changes(s, "c", c, names, (1,))
    wrong = scalars("n_modules", [0, -1, 33, 2**31, None, "2", 1.5, True, [2], n + 1], ILLEGAL)
    changes += [Change(w.label, w.verdict, ("n_modules", *names), w.apply) for w in wrong]
    return Call("level_gates", arguments, needs=names), changes


def task_linear_call(s: Sizes) -> tuple[Call, list[Change]]:
    n_tasks, ordered = s.rng.choice([1, 2, 4]), s.rng.random() < 0.5
    b = s.b * n_tasks
    n_out = s.rng.choice([1, 3, 8, 17])
    weight, bias = layer(s, s.e, n_tasks, n_out, s.d)
    task = torch.arange(n_tasks).repeat_interleave(s.b) if ordered else torch.randint(0, n_tasks, (b,))
    x = own_or_shared(s, b, s.d)
    arguments = {"x": x, "weight": weight, "bias": bias, "task": task, "in_task_order": ordered}
    arguments |= {"relu": s.rng.random() < 0.5, "precision": draw_precision(s)}
    names = ("x", "weight", "bias", "task")
    changes = choices_by_name(True) + flags("relu") + flags("in_task_order")
    changes += not_of_other_rank(x, input_changes(s, "x", x, names, ()))
    for name in ("weight", "bias"):
        changes += input_changes(s, name, arguments[name], names, ())
    changes += tensor_faults("task", task, names)
    for dtype in (torch.uint8, torch.int16, torch.int32):
        changes.append(Change(f"task: {dtype}", LEGAL, ("task",), lambda a, t=dtype: a.__setitem__("task", task.to(t))))
    if ordered and n_tasks > 1 and s.b:
        short = {"x": x[..., :-1, :], "task": task[:-1]}
        changes.append(Change("x: not as many rows of each task", ILLEGAL, names, lambda a: a.update(short)))
    return Call("task_linear", arguments, needs=("x", "weight", "bias")), changes
