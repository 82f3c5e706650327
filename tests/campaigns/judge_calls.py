"""What a call came to, held against what its docstring says and against the reference in float64."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from odd_calls import ILLEGAL, LEGAL, UNSAID, Call, describe
from torch import Tensor

from d2r_fast.ops.backends import MAX_TRITON_WIDTH
from d2r_fast.ops.reference.select_routes import active_bits

REFUSALS = (ValueError, TypeError, RuntimeError)


@dataclasses.dataclass
class Outcome:
    """What a call came to: tensors by name (gradients as d_name), or the exception."""

    results: dict[str, Tensor | None] = dataclasses.field(default_factory=dict)
    error: Exception | None = None


def judge(call: Call, outcomes: dict[str, Outcome], truth: Outcome | None) -> Iterator[tuple[str, str, str]]:
    """(backend, kind, what is wrong) for all that is. truth: the reference's in float64, where there is one."""
    accepted = {name: outcome for name, outcome in outcomes.items() if outcome.error is None}
    for backend, outcome in outcomes.items():
        if outcome.error is not None and (kind := wrong_refusal(call, backend, outcome.error)):
            yield backend, kind, in_one_line(outcome.error)
    if call.verdict == ILLEGAL:
        yield from ((backend, "accepted", "no error") for backend in accepted)
        return
    if truth is not None and truth.error is not None:
        if call.verdict == LEGAL:
            yield "reference in float64", "refused", in_one_line(truth.error)
        truth = None
    able = {name for name in outcomes if not cannot_run(call, name)}
    if call.verdict == UNSAID and able & accepted.keys() and able - accepted.keys():
        yield "all", "disagree", f"accepted by {' '.join(accepted)}, refused by {' '.join(able - accepted.keys())}"
    expected = truth or next(iter(accepted.values()), None)
    for backend, outcome in accepted.items():
        if expected is None or outcome is expected:
            continue
        message = poison_spread(outcome, expected, call) if call.poisoned else unlike(outcome, expected, call)
        if message:
            yield backend, "garbage", message


def wrong_refusal(call: Call, backend: str, error: Exception) -> str:
    """ "unclear" if the error is none for a caller's eyes, "refused" if there should be none, or nothing."""
    if not isinstance(error, REFUSALS):
        return "unclear"
    if cannot_run(call, backend) and names_one(str(error), ("backend", "precision")):
        return ""
    if call.verdict == LEGAL:
        # These are torch's to refuse, where they have no meaning.
        return "" if call.cotangent in ("wrong shape", "sparse") or call.twist else "refused"
    return "" if names_one(str(error), call.names) else "unclear"


def names_one(message: str, names: tuple[str, ...]) -> bool:
    """The package's way: "name: what was expected, what came"; torch's own: "argument 'name'"."""
    return any(
        re.search(rf"\b{re.escape(name)}(\[[\d,]+\]| \w+|(, \w+)+)?:|argument '{name}'", message) for name in names
    )


def in_one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def floats_of(call: Call) -> list[Tensor]:
    found = [v for v in call.arguments.values() if isinstance(v, Tensor) and v.is_floating_point()]
    net = call.arguments.get("net")
    return [*found, net.module_weight] if net is not None else found


def cannot_run(call: Call, backend: str) -> bool:
    """Whether the backend may refuse the call for what it is not made for."""
    name = backend.partition(":")[0]
    if name in ("reference", "auto"):
        return False
    tensors = [v for v in call.arguments.values() if isinstance(v, Tensor)]
    if any(v.device.type != "cpu" or v.layout != torch.strided for v in tensors):
        return True
    dtypes = {v.dtype for v in floats_of(call)}
    if not dtypes <= {torch.float32, torch.float64}:
        return True
    if call.arguments.get("precision") == "bf16" and torch.float64 in dtypes:
        return True
    return name == "triton" and any(v.dim() and v.shape[-1] > MAX_TRITON_WIDTH for v in tensors)


# Are two outcomes the same?


def rounds_freely(call: Call) -> bool:
    """Whether rounding alone may move a result by more than float32's last digits, or choose another route."""
    if call.context == "autocast" or call.arguments.get("precision") in ("bf16", "tf32"):
        return True
    dtypes = {v.dtype for v in floats_of(call)}
    return bool(dtypes & {torch.float16, torch.bfloat16}) or ("task" in call.arguments and torch.float32 in dtypes)


def unlike(ours: Outcome, expected: Outcome, call: Call) -> str:
    """What differs, or nothing."""
    freely = rounds_freely(call)
    for name, value in expected.results.items():
        got = ours.results.get(name)
        if name.startswith("d_") and name not in ours.results:
            if call.context in ("grad", "autocast"):
                return f"{name} is missing"
            continue
        if got is None or value is None:  # no gradient, which is as good as a gradient of zeros
            given = value if got is None else got
            if given is not None and bool((given != 0).any()):
                return f"{name}: {describe(got)}, expected {describe(value)}"
            continue
        if got.shape != value.shape:
            return f"{name}: shape {list(got.shape)}, expected {list(value.shape)}"
        if value.is_floating_point():
            if message := far(got, value.double(), freely):
                return f"{name}: {message}"
        elif not torch.equal(got.to(value.dtype), value):
            share = (got != value).double().mean().item()
            if freely and share < 0.2:
                return ""  # a route at a tie: what follows from it may differ too
            return f"{name}: {got.flatten()[:6].tolist()}, expected {value.flatten()[:6].tolist()}"
    return ""


def far(got: Tensor, expected: Tensor, freely: bool) -> str:
    """How far off, if further than rounding goes; numbers are held against the largest one expected."""
    if not bool(got.isfinite().all()) and bool(expected.isfinite().all()):
        return f"{int((~got.isfinite()).sum())} of {got.numel()} numbers are not finite"
    if not got.numel() or not bool(expected.isfinite().all()):
        return ""
    if freely:
        error, scale = (got - expected).norm().item(), expected.norm().item()
        return "" if error <= 0.1 * max(1.0, scale) else f"{error:.2g} off in the 2-norm, of {scale:.2g}"
    error, scale = (got - expected).abs().max().item(), expected.abs().max().item()
    return "" if error <= rounding(got) * max(1.0, scale) else f"{error:.2g} off, the largest is {scale:.2g}"


def rounding(value: Tensor) -> float:
    """What sums of some hundred rows lose in the dtype of `value`."""
    return 1e-10 if value.dtype == torch.float64 else 1e-3


# NaN and infinity


def poison_spread(ours: Outcome, expected: Outcome, call: Call) -> str:
    """What no poisoned number reaches must be as it was, and routes must be routes whatever the logits."""
    if message := no_routes(ours.results.get("index"), ours.results.get("active")):
        return message
    rows, chooses = clean_rows(call)
    for name, value in expected.results.items():
        got, gradient = ours.results.get(name), name.startswith("d_")
        if got is None or value is None or not value.is_floating_point():
            continue
        if got.shape != value.shape:
            return f"{name}: shape {list(got.shape)}, expected {list(value.shape)}"
        if gradient and (rows is None or name not in ("d_logits", "d_h0", "d_gate", "d_x") or got.dim() < 3):
            continue  # a sum that a poisoned row enters
        finite = value.isfinite()
        scale = value.double().nan_to_num(0, 0, 0).abs().clamp(min=1)
        allowed = 0.1 if rounds_freely(call) else rounding(got)
        same = ((got.double() - value.double()).abs() <= allowed * scale) | ~finite
        if gradient or chooses:
            same = same.movedim(1, 0)[rows]
        if not same.all():
            return f"{name}: {int((~same).sum())} numbers changed that no poisoned one reaches"
        if not gradient and not chooses and bool((got.isfinite() & ~finite).any()):
            return f"{name}: a poisoned number was swallowed"
    return ""


def no_routes(index: Tensor | None, active: Tensor | None) -> str:
    """Why index [E,B,N,K] and active [E,B] are no routes, if they are none."""
    if index is None or active is None or not index.numel():
        return ""
    n_modules, k = index.shape[2:]
    route = torch.arange(1, n_modules + 1)[:, None]
    used = torch.arange(k) < route  # [N,K]
    if bool(((index < 0) | ((index >= route) & used) | ((index != 0) & ~used)).any()):
        return f"index: sources that are not below their route: {index.flatten()[:8].tolist()}"
    twice = (index[..., :, None] == index[..., None, :]) & used[..., :, None] & used[..., None, :]
    if bool((twice.sum((-1, -2)) != used.sum(-1)).any()):
        return "index: a source twice in a route"
    return "" if torch.equal(active_bits(index), active) else "active: not what index says"


def clean_rows(call: Call) -> tuple[Tensor | None, bool]:
    """Rows [B] without a poisoned number of their own, None where a weight is poisoned; and whether the poison chooses
    routes: a row that has it may then come out as it likes."""
    arguments: dict[str, Any] = call.arguments
    name = next(n for n, v in arguments.items() if n in call.names and not v.isfinite().all())
    if name in ("weight", "bias"):
        return None, False
    clean = arguments[name].isfinite()
    if name != "temperature":
        clean = clean.flatten(2).all(-1).all(0) if clean.dim() > 2 else clean.all(-1)
    return clean, name in ("logits", "noise", "temperature") or "task" in arguments
