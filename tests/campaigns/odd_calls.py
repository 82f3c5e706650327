"""Calls of the public operations, each made from a seed and its number: legal but odd ones, and ones with a fault.

A legal call must be accepted by every backend and come out as the reference does in float64. An illegal one breaks a
sentence of a docstring and must be refused by all. Where the docstrings say nothing the backends must do alike.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2r_fast import NetConfig, RouteChoice, RoutedNetwork
from d2r_fast.ops import Routes, make_routes

LEGAL, ILLEGAL, UNSAID = "legal", "illegal", "unsaid"
LAYERS = ("base", "task", "module", "head", "route", "weight", "bias", "parameters")


@dataclass
class Call:
    operation: str
    arguments: dict[str, Any]
    verdict: str = LEGAL
    change: str = ""
    """What was done to a plain call; empty: nothing."""
    names: tuple[str, ...] = ()
    """A refusal must name one of these."""
    poisoned: bool = False
    """NaN or infinity went in: what no poisoned number reaches must stay as it was."""
    context: str = "grad"
    cotangent: str = "plain"
    twist: str = ""
    """What is done between forward and backward."""
    needs: tuple[str, ...] = ()
    """Arguments that want a gradient."""
    n_modules: int = 0


@dataclass
class Change:
    """One thing done to a call's arguments."""

    label: str
    verdict: str
    names: tuple[str, ...]
    apply: Callable[[dict[str, Any]], None]
    poisoned: bool = False


@dataclass
class Sizes:
    e: int
    b: int
    n: int
    k: int
    d: int
    dtype: torch.dtype
    rng: random.Random = field(repr=False)


def draw_sizes(rng: random.Random) -> Sizes:
    n = rng.choice([1, 2, 2, 3, 3, 4, 5, 6, 8, 16, 32] if rng.random() < 0.2 else [1, 2, 3, 4, 5])
    return Sizes(
        e=0 if rng.random() < 0.05 else rng.choice([1, 2, 3]),
        b=0 if rng.random() < 0.07 else rng.choice([1, 2, 5, 17, 70] if rng.random() < 0.3 else [1, 3, 9]),
        n=n,
        k=n if rng.random() < 0.3 else rng.randint(1, min(n, 3)),
        d=rng.choice([1, 2, 7, 8, 9, 16, 17, 33]),
        dtype=torch.float32 if rng.random() < 0.4 else torch.float64,
        rng=rng,
    )


# Values


def spaced_logits(s: Sizes) -> Tensor:
    """[E,B,R]: no two of a route so close that rounding could order them otherwise."""
    routes = [torch.rand(s.e, s.b, i, dtype=torch.float64).argsort(-1) * 0.37 for i in range(1, s.n + 1)]
    packed = torch.cat(routes, -1)
    return (packed + 0.05 * torch.rand(packed.shape, dtype=torch.float64)).to(s.dtype)


def legal_index(s: Sizes) -> Tensor:
    index = torch.zeros(s.e, s.b, s.n, s.k, dtype=torch.int64)
    for i in range(1, s.n + 1):
        kept = min(s.k, i)
        index[:, :, i - 1, :kept] = torch.rand(s.e, s.b, i).argsort(-1)[..., :kept]
    return index


def used_slots(n: int, k: int) -> Tensor:
    return torch.arange(k) < torch.arange(1, n + 1)[:, None]  # [N,K]


def normal(s: Sizes, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(s.dtype)


def far_from_kinks(s: Sizes, *shape: int) -> Tensor:
    """A bias that keeps float32 on the same side of every ReLU as float64."""
    return torch.where(torch.rand(shape) < 0.5, -8.0, 8.0).to(s.dtype)


# Layouts: the same numbers, lying in memory in another way


def odd_layout(value: Tensor, rng: random.Random) -> Tensor:
    kind = rng.choice(["transposed", "every second", "offset", "negative bit", "reversed strides"])
    if kind == "transposed" and value.dim() >= 2:
        return value.transpose(-1, -2).contiguous().transpose(-1, -2)
    if kind == "reversed strides" and value.dim() >= 2:
        order = list(range(value.dim()))[::-1]
        return value.permute(order).contiguous().permute(order)
    if kind == "every second" and value.dim() >= 1:
        return value.repeat_interleave(2, -1)[..., ::2]
    if kind == "negative bit" and value.is_floating_point() and value.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(value), -value).conj().imag
    if value.numel():
        storage = torch.cat([value.new_zeros(1), value.flatten()])
        return storage[1:].view(value.shape)
    return value


def expanded(value: Tensor, rng: random.Random) -> Tensor:
    """The axis of the networks or of the rows with stride 0, its first slice everywhere."""
    axes = [a for a in range(min(2, value.dim())) if value.shape[a] > 0 and (a == 0 or value.dim() > 2)]
    if not axes:
        return value
    axis = rng.choice(axes)
    return value.narrow(axis, 0, 1).expand(value.shape)


# Faults that any tensor argument can have


def tensor_faults(
    name: str, value: Tensor, all_names: tuple[str, ...], free_axes: tuple[int, ...] = ()
) -> list[Change]:
    def put(new: Any) -> Callable[[dict[str, Any]], None]:
        return lambda arguments: arguments.__setitem__(name, new)

    alone, any_name = (name,), (name, *all_names)
    found = [
        Change("None", ILLEGAL, alone, put(None)),
        Change("a list", ILLEGAL, alone, put(value.tolist())),
        Change("a number", ILLEGAL, alone, put(1.5)),
        Change("numpy", ILLEGAL, alone, put(value.numpy())),
        Change("a string", ILLEGAL, alone, put("tensor")),
        Change("rank + 1", ILLEGAL, any_name, put(value[None])),
        Change("trailing axis", ILLEGAL, any_name, put(value[..., None])),
        Change("0-dim", ILLEGAL, any_name, put(value.new_zeros(()))),
        Change("on meta", ILLEGAL, any_name, put(value.to("meta"))),
        Change("sparse", ILLEGAL, any_name, put(value.to_sparse())),
        Change("complex", ILLEGAL, any_name, put(value.to(torch.complex64))),
        Change(
            "2^31 copies, expanded",
            ILLEGAL,
            any_name,
            put(value.new_zeros([1] * (value.dim() + 1)).expand(2**31, *value.shape)),
        ),
    ]
    if value.dim() > 1 and value.shape[0] > 0:
        found.append(Change("rank - 1", ILLEGAL, any_name, put(value[0])))
    for axis in range(value.dim()):
        if axis in free_axes:
            continue
        for step in (-1, 1):
            shape = list(value.shape)
            shape[axis] += step
            if shape[axis] >= 0:
                found.append(Change(f"axis {axis} {step:+d}", ILLEGAL, any_name, put(value.new_zeros(shape))))
        if value.dim() and value.shape[axis] != 2**31:
            shape = [1] * value.dim()
            wide = list(value.shape)
            wide[axis] = 2**31
            if all(wide[a] for a in range(len(wide))):
                found.append(
                    Change(f"axis {axis} of 2^31", ILLEGAL, any_name, put(value.new_zeros(shape).expand(wide)))
                )
    if value.is_floating_point():
        other = torch.float32 if value.dtype == torch.float64 else torch.float64
        found += [Change(str(t), ILLEGAL, any_name, put(value.to(t))) for t in (other, torch.int32, torch.bool)]
        found.append(Change("torch.float16", ILLEGAL, any_name, put(value.half())))
    elif value.dtype != torch.bool:
        found += [Change(str(t), ILLEGAL, any_name, put(value.to(t))) for t in (torch.float32, torch.bool)]
    return [Change(f"{name}: {c.label}", c.verdict, c.names, c.apply) for c in found]


def poisons(name: str, value: Tensor, rng: random.Random) -> list[Change]:
    if not value.numel():
        return []
    at = rng.randrange(value.numel())

    def put(bad: float) -> Callable[[dict[str, Any]], None]:
        def apply(arguments: dict[str, Any]) -> None:
            new = value.clone()
            new.view(-1)[at] = bad
            arguments[name] = new

        return apply

    return [
        Change(f"{name}: {bad} at {at}", LEGAL, (name,), put(bad), poisoned=True)
        for bad in (float("nan"), float("inf"), float("-inf"))
    ]


def scalars(name: str, values: list[Any], verdict: str) -> list[Change]:
    def put(value: Any) -> Callable[[dict[str, Any]], None]:
        return lambda arguments: arguments.__setitem__(name, value)

    return [Change(f"{name}={value!r}", verdict, (name,), put(value)) for value in values]


def choices_by_name(has_precision: bool) -> list[Change]:
    found = scalars("backend", ["CPP", "", "cuda", None, 1, ["cpp"]], ILLEGAL)
    return found + (scalars("precision", ["fp32", "BF16", "", None, 32, ["bf16"]], ILLEGAL) if has_precision else [])


def flags(name: str) -> list[Change]:
    return scalars(name, [None, "no", 1, 0, 0.0, torch.tensor(True), []], UNSAID)


def index_faults(name: str, index: Tensor, rng: random.Random) -> Iterator[Change]:
    """Wrong sources in used slots, of one row or of all. name: "index", or "routes.index" of routes made by hand."""
    e, b, n, k = index.shape
    if e * b == 0:
        return

    def put(route: int, slot: int, value: int, dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
        row = (slice(None), slice(None)) if rng.random() < 0.5 else (rng.randrange(e), rng.randrange(b))

        def apply(arguments: dict[str, Any]) -> None:
            new = index.clone().to(dtype)
            new[(*row, route - 1, slot)] = value
            if name == "index":
                arguments[name] = new
            else:
                arguments["routes"] = arguments["routes"]._replace(index=new)

        return apply

    for route in {1, n, (n + 1) // 2}:
        slot = rng.randrange(min(k, route))
        values = [-1, route, n, 7, 100, 2**31 - 1, -(2**31), 2**32, 2**32 + route - 1, 2**63 - 1, -(2**32)]
        for value in (v for v in values if not 0 <= v < route):
            for dtype in (torch.int32, torch.int64):
                if torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max:
                    label = f"{name}: {str(dtype).removeprefix('torch.')} {value} in route {route}"
                    yield Change(label, ILLEGAL, ("index", name), put(route, slot, value, dtype))
        if k > 1 and route > 1:

            def twice(arguments: dict[str, Any], route: int = route) -> None:
                new = index.clone()
                new[:, -1, route - 1, 1] = new[:, -1, route - 1, 0]
                if name == "index":
                    arguments[name] = new
                else:
                    arguments["routes"] = arguments["routes"]._replace(index=new)

            yield Change(f"{name}: a source twice in route {route}", ILLEGAL, ("index", name), twice)


def unused_slot_values(name: str, index: Tensor) -> Iterator[Change]:
    unused = ~used_slots(*index.shape[2:])
    for value, dtype in ((99, torch.uint8), (-1, torch.int64), (2**31 - 1, torch.int32), (2**40, torch.int64)):
        new = torch.where(unused, torch.tensor(value), index).to(dtype)
        yield Change(f"{name}: {value} in unused slots", LEGAL, ("index",), lambda a, new=new: a.__setitem__(name, new))


def index_dtypes(name: str, index: Tensor) -> Iterator[Change]:
    kinds = {t: LEGAL for t in (torch.uint8, torch.int8, torch.int16, torch.int32)}
    kinds |= {t: UNSAID for t in (torch.uint16, torch.uint32, torch.uint64)}
    for dtype, verdict in kinds.items():
        yield Change(
            f"{name}: {dtype}", verdict, ("index", name), lambda a, dtype=dtype: a.__setitem__(name, index.to(dtype))
        )


# The operations


def choice_arguments(s: Sizes) -> dict[str, Any]:
    """mode, temperature, noise, index."""
    mode = s.rng.choice(["greedy", "sampled", "given"])
    found: dict[str, Any] = {"mode": mode, "temperature": None, "noise": None, "index": None}
    if mode == "sampled":
        r = s.n * (s.n + 1) // 2
        found["temperature"] = (torch.rand(s.b, dtype=torch.float64) + 0.5).to(s.dtype)
        uniform = torch.rand(s.e, s.b, r, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        found["noise"] = -(-uniform.log()).log().to(s.dtype)  # standard Gumbel
    elif mode == "given":
        found["index"] = legal_index(s)
    return found


def choice_changes(s: Sizes, arguments: dict[str, Any], names: tuple[str, ...]) -> list[Change]:
    found: list[Change] = []
    mode, index = arguments["mode"], arguments["index"]
    found += scalars("k", [0, -1, s.n + 1, 2**31, 2**40, -(2**63), "2", None, 1.5, torch.tensor([1, 1])], ILLEGAL)
    found += [Change(c.label, c.verdict, ("k", "index"), c.apply) for c in scalars("k", [True, float(s.k)], UNSAID)]
    found += scalars("mode", ["Greedy", "", None, 3, ["greedy"]], ILLEGAL)
    found += flags("resrouting")
    spare = {
        "temperature": torch.ones(s.b, dtype=s.dtype),
        "noise": torch.zeros(s.e, s.b, s.n * (s.n + 1) // 2, dtype=s.dtype),
        "index": torch.zeros(s.e, s.b, s.n, s.k, dtype=torch.int64),
    }
    for name, value in spare.items():
        if arguments[name] is None:
            found.append(
                Change(
                    f"{name}: given to mode {mode}", ILLEGAL, (name,), lambda a, n=name, v=value: a.__setitem__(n, v)
                )
            )
    if mode == "sampled":
        for name in ("temperature", "noise"):
            value = arguments[name]
            faults = tensor_faults(name, value, names)
            # Any float dtype will do for these two.
            found += [c for c in faults if "float" not in c.label]
            found += poisons(name, value, s.rng)
        for bad in (0.0, -1.0, 1e-30, 1e30):
            verdict = LEGAL if bad > 0 else UNSAID
            found.append(
                Change(
                    f"temperature: {bad}", verdict, ("temperature",),
                    lambda a, bad=bad: a.__setitem__("temperature", torch.full_like(a["temperature"], bad)),
                )
            )  # fmt: skip
    if mode == "given":
        found += tensor_faults("index", index, names)
        found += [
            *index_faults("index", index, s.rng),
            *unused_slot_values("index", index),
            *index_dtypes("index", index),
        ]
    return found


def select_call(s: Sizes) -> tuple[Call, list[Change]]:
    arguments = {"logits": spaced_logits(s), "k": s.k, **choice_arguments(s), "resrouting": s.rng.random() < 0.7}
    names = ("logits", "temperature", "noise", "index")
    changes = choice_changes(s, arguments, names) + choices_by_name(False)
    faults = tensor_faults(
        "logits", arguments["logits"], names, free_axes=(0, 1) if arguments["mode"] == "greedy" else ()
    )
    # Any float will do, and any device, where there is no other tensor.
    alone = arguments["mode"] == "greedy"
    changes += [c for c in faults if "float" not in c.label and not (alone and "meta" in c.label)]
    changes += poisons("logits", arguments["logits"], s.rng)
    wide = torch.zeros(s.e, s.b, 561, dtype=s.dtype)
    changes.append(Change("logits: 33 modules", ILLEGAL, names, lambda a: a.__setitem__("logits", wide)))
    none = torch.zeros(s.e, s.b, 0, dtype=s.dtype)
    changes.append(Change("logits: no modules", ILLEGAL, names, lambda a: a.__setitem__("logits", none)))
    other = torch.float64 if s.dtype == torch.float32 else torch.float32
    for name in ("temperature", "noise"):
        if arguments[name] is not None:
            changes.append(
                Change(f"{name}: {other}", LEGAL, (name,), lambda a, n=name: a.__setitem__(n, a[n].to(other)))
            )
    return Call("select_routes", arguments, needs=("logits",)), changes


def modules_arguments(s: Sizes) -> dict[str, Any]:
    kinks = s.dtype == torch.float64
    bias = normal(s, s.e, s.n - 1, s.d) if kinks else far_from_kinks(s, s.e, s.n - 1, s.d)
    weight = normal(s, s.e, s.n - 1, s.d, s.d) * (1 if kinks else 0.1) / s.d**0.5
    return {"h0": normal(s, s.e, s.b, s.d).relu(), "weight": weight, "bias": bias}


def make_routes_call(s: Sizes) -> tuple[Call, list[Change]]:
    rest = modules_arguments(s)
    index = legal_index(s)
    flow = None if s.rng.random() < 0.3 else torch.rand(index.shape) < 0.5
    arguments = {"index": index, "gate": normal(s, *index.shape), "flow": flow, **rest}
    names = ("index", "gate", "flow", "routes")
    faults = tensor_faults("index", index, names)
    gate_faults = tensor_faults("gate", arguments["gate"], names)
    changes = faults + gate_faults + poisons("gate", arguments["gate"], s.rng)
    if flow is not None:
        changes += [c for c in tensor_faults("flow", flow, names) if not c.label.endswith(": None")]
        for dtype in (torch.uint8, torch.float32, torch.int64):
            changes.append(
                Change(f"flow: {dtype}", ILLEGAL, names, lambda a, t=dtype: a.__setitem__("flow", flow.to(t)))
            )
    changes += [
        *index_faults("index", index, s.rng),
        *unused_slot_values("index", index),
        *index_dtypes("index", index),
    ]
    spare = torch.where(used_slots(s.n, s.k), arguments["gate"], torch.nan)
    changes.append(Change("gate: NaN in unused slots", LEGAL, names, lambda a: a.__setitem__("gate", spare)))
    call = Call("make_routes", arguments, needs=("gate", "h0", "weight", "bias"))
    return call, changes


def routed_modules_call(s: Sizes) -> tuple[Call, list[Change]]:
    rest = modules_arguments(s)
    index = legal_index(s)
    gate = torch.where(used_slots(s.n, s.k), normal(s, *index.shape), 0)
    routes = make_routes(index, gate, torch.rand(index.shape) < 0.7)
    arguments = {**rest, "routes": routes, "residual": s.rng.random() < 0.6, "precision": "float32"}
    if s.rng.random() < 0.15:
        arguments["precision"] = s.rng.choice(["bf16", "tf32"])
    names = ("h0", "weight", "bias", "routes", "index", "gate", "flow", "active")
    changes = choices_by_name(True) + flags("residual")
    for name in ("h0", "weight", "bias"):
        changes += tensor_faults(name, arguments[name], names) + poisons(name, arguments[name], s.rng)
    for name in ("index", "gate", "flow", "active"):
        value = getattr(routes, name)
        for fault in tensor_faults(name, value, names):
            holder: dict[str, Any] = {}
            fault.apply(holder)
            changes.append(
                Change(
                    f"routes.{fault.label}", ILLEGAL, fault.names,
                    lambda a, n=name, v=holder[name]: a.__setitem__("routes", a["routes"]._replace(**{n: v})),
                )
            )  # fmt: skip
    changes += scalars("routes", [None, 3, [1, 2]], ILLEGAL)
    changes.append(Change("routes: a tuple", UNSAID, names, lambda a: a.__setitem__("routes", tuple(a["routes"]))))
    changes += index_faults("routes.index", routes.index, s.rng)
    changes += hand_made_routes(s, routes)
    for dtype in (torch.int64, torch.uint8, torch.uint32):
        changes.append(
            Change(
                f"routes.index: {dtype}", UNSAID, names,
                lambda a, t=dtype: a.__setitem__("routes", a["routes"]._replace(index=a["routes"].index.to(t))),
            )
        )  # fmt: skip
    call = Call("routed_modules", arguments, needs=("h0", "weight", "bias", "gate"))
    return call, changes


def hand_made_routes(s: Sizes, routes: Routes) -> Iterator[Change]:
    """Routes whose fields do not fit each other, though each has its shape and dtype."""

    def replace(label: str, verdict: str, **fields: Tensor) -> Change:
        names = ("routes", *fields)
        return Change(label, verdict, names, lambda a: a.__setitem__("routes", a["routes"]._replace(**fields)))

    every = torch.full_like(routes.active, (1 << s.n) - 1 if s.n < 32 else -1)
    yield replace("routes.active: all modules", LEGAL, active=every)
    # Refused, or not believed: either is right, if every backend does the same.
    yield replace("routes.active: no module", UNSAID, active=torch.zeros_like(routes.active))
    yield replace("routes.active: module 0 alone", UNSAID, active=torch.ones_like(routes.active))
    yield replace("routes.active: bits of modules that do not exist", UNSAID, active=torch.full_like(routes.active, -1))
    if routes.active.numel():
        one_less = routes.active.clone()
        lowest = one_less.view(-1)[-1]
        one_less.view(-1)[-1] = lowest & ~(1 << (int(lowest) & 0xFFFFFFFF).bit_length() - 1) if lowest > 0 else 1
        yield replace("routes.active: a needed module missing", UNSAID, active=one_less)
        rotated = routes.active.flatten().roll(1).view(routes.active.shape)
        yield replace("routes.active: of other rows", UNSAID, active=rotated)
    used = used_slots(s.n, s.k)
    yield replace("routes.gate: 1 in unused slots", UNSAID, gate=torch.where(used, routes.gate, 1))
    yield replace("routes.gate: NaN in unused slots", UNSAID, gate=torch.where(used, routes.gate, torch.nan))
    yield replace("routes.flow: True in unused slots", UNSAID, flow=routes.flow | ~used)
    for value in (-1, 99, 2**31 - 1):
        index = torch.where(used, routes.index, value).int()
        yield replace(f"routes.index: {value} in unused slots", UNSAID, index=index)


def linear_call(s: Sizes) -> tuple[Call, list[Change]]:
    n_in = 0 if s.rng.random() < 0.06 else s.d
    n_out = 0 if s.rng.random() < 0.04 else s.rng.choice([1, 3, 8, 16, 17, 40])
    b = 300 if s.rng.random() < 0.05 else s.b
    shared = s.rng.random() < 0.3
    x = normal(s, b, n_in) if shared else normal(s, s.e, b, n_in)
    kinks = s.dtype == torch.float64
    bias = normal(s, s.e, n_out) if kinks else far_from_kinks(s, s.e, n_out)
    weight = normal(s, s.e, n_out, n_in) * (1 if kinks else 0.1) / max(1, n_in) ** 0.5
    arguments = {"x": x, "weight": weight, "bias": bias, "relu": s.rng.random() < 0.5, "precision": "float32"}
    if s.rng.random() < 0.15:
        arguments["precision"] = s.rng.choice(["bf16", "tf32"])
    names = ("x", "weight", "bias")
    changes = choices_by_name(True) + flags("relu")
    for name in names:
        free = (x.dim() - 2,) if name == "x" else ()
        for fault in tensor_faults(name, arguments[name], names, free):
            # [B,in] for all networks and [E,B,in] are both legal: what has one axis more or less may be the other.
            if not (name == "x" and "rank" in fault.label):
                changes.append(fault)
        changes += poisons(name, arguments[name], s.rng)
    if n_in != n_out:
        changes.append(Change("weight: transposed", ILLEGAL, names, lambda a: a.__setitem__("weight", a["weight"].mT)))
    for dtype in (torch.int64, torch.bool, torch.complex64, torch.float16, torch.bfloat16):
        verdict = LEGAL if dtype.is_floating_point else ILLEGAL
        changes.append(
            Change(
                f"all of {dtype}", verdict, names,
                lambda a, t=dtype: a.update({n: a[n].to(t) for n in ("x", "weight", "bias")}),
            )
        )  # fmt: skip
    return Call("ensemble_linear", arguments, needs=names), changes


N_TASKS = 4


def make_network(s: Sizes) -> RoutedNetwork:
    n_in, n_out = s.rng.choice([1, 3, 8]), s.rng.choice([1, 2, 5])
    route_widths = tuple(s.rng.choice([1, 5, 9]) for _ in range(s.rng.choice([1, 1, 2, 3])))
    cfg = NetConfig(
        n_modules=s.n, top_k=s.k, module_width=s.d, base_width=s.rng.choice([4, 9, 16]), route_widths=route_widths,
        residual=s.rng.random() < 0.6, resrouting=s.rng.random() < 0.7,
    )  # fmt: skip
    net = RoutedNetwork(n_in, n_out, N_TASKS, max(1, s.e), cfg).to(s.dtype).train(s.rng.random() < 0.7)
    with torch.no_grad():
        net.head.weight.uniform_(-1, 1)
        net.route[-1].bias.normal_(std=1.5)
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def task_changes(s: Sizes, task: Tensor, names: tuple[str, ...]) -> list[Change]:
    changes = [c for c in tensor_faults("task", task, names)]
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        changes.append(Change(f"task: {dtype}", LEGAL, ("task",), lambda a, t=dtype: a.__setitem__("task", task.to(t))))
    for dtype in (torch.uint16, torch.uint32, torch.uint64):
        changes.append(
            Change(f"task: {dtype}", UNSAID, ("task",), lambda a, t=dtype: a.__setitem__("task", task.to(t)))
        )
    for value in (-1, N_TASKS, 2**31 - 1, 2**32, 2**63 - 1, -(2**63)):
        changes.append(
            Change(
                f"task: {value}", LEGAL, ("task",), lambda a, v=value: a.__setitem__("task", torch.full_like(task, v))
            )
        )
    changes.append(Change("task: [B,1]", ILLEGAL, ("task",), lambda a: a.__setitem__("task", task[:, None])))
    half = task + 0.5
    changes.append(Change("task: 0.5 more", ILLEGAL, ("task",), lambda a: a.__setitem__("task", half)))
    return changes


def network_forward_call(s: Sizes) -> tuple[Call, list[Change]]:
    s.e = max(1, s.e)
    net = make_network(s)
    task = torch.randint(0, N_TASKS, (s.b,))
    choice = choice_arguments(s)
    arguments = {"x": normal(s, s.b, net.n_in), "task": task, "net": net, **choice}
    names = ("x", "task", "temperature", "noise", "index")
    changes = [
        c for c in choice_changes(s, arguments, names) if not c.label.startswith(("k=", "resrouting="))
    ]  # which belong to the network
    changes += tensor_faults("x", arguments["x"], names) + task_changes(s, task, names)
    changes += poisons("x", arguments["x"], s.rng)
    call = Call("RoutedNetwork.forward", arguments, needs=("x", "parameters"))
    return call, changes


def routed_network_call(s: Sizes) -> tuple[Call, list[Change]]:
    s.e = max(1, s.e)
    net = make_network(s)
    parameters = [p.detach() for p in net.in_order()]
    task = torch.randint(0, N_TASKS, (s.b,))
    arguments = {"x": normal(s, s.b, net.n_in), "task": task, "parameters": parameters, "k": s.k, **choice_arguments(s)}
    arguments |= {"residual": net.cfg.residual, "resrouting": net.cfg.resrouting, "precision": "float32"}
    if s.rng.random() < 0.15:
        arguments["precision"] = s.rng.choice(["bf16", "tf32"])
    names = ("x", "task", "temperature", "noise", "index", "k", *LAYERS)
    changes = choice_changes(s, arguments, names) + flags("residual")
    changes += [c for c in choices_by_name(True) if c.names[0] == "precision"]
    changes += tensor_faults("x", arguments["x"], names) + task_changes(s, task, names)
    changes += poisons("x", arguments["x"], s.rng)
    at = s.rng.randrange(len(parameters))
    replaced = parameters[at]

    def with_parameter(new: Any) -> Callable[[dict[str, Any]], None]:
        return lambda a: a.__setitem__("parameters", [*parameters[:at], new, *parameters[at + 1 :]])

    tasks = (2,) if at == 4 else ()  # the task layer reads as many as it likes
    for fault in tensor_faults("parameter", replaced, LAYERS, tasks):
        holder: dict[str, Any] = {}
        fault.apply(holder)
        label = f"parameters[{at}]:{fault.label.split(':', 1)[1]}"
        changes.append(Change(label, ILLEGAL, names, with_parameter(holder["parameter"])))
    if replaced.dim() >= 3:
        # A transposed matrix has the right count of numbers.
        verdict = ILLEGAL if replaced.shape[-1] != replaced.shape[-2] else LEGAL
        changes.append(Change(f"parameters[{at}]: transposed", verdict, names, with_parameter(replaced.mT)))
        changes.append(
            Change(f"parameters[{at}]: transposed copy", verdict, names, with_parameter(replaced.mT.contiguous()))
        )
    if replaced.dim() >= 2:
        verdict = UNSAID if list(replaced.flatten(0, 1).shape) == list(replaced.shape) else ILLEGAL
        changes.append(
            Change(f"parameters[{at}]: networks flattened", verdict, names, with_parameter(replaced.flatten(0, 1)))
        )
    lists: dict[str, tuple[Any, str]] = {
        "None": (None, ILLEGAL),
        "empty": ([], ILLEGAL),
        "one short": (parameters[:-1], ILLEGAL),
        "one more": ([*parameters, parameters[-1]], ILLEGAL),
        "without the routing network": (parameters[:12], ILLEGAL),
        "no Sequence": (iter(parameters), ILLEGAL),
        "a tuple": (tuple(parameters), LEGAL),
        "a tensor": (parameters[0], ILLEGAL),
        "reversed": (parameters[::-1], ILLEGAL),
        "a dict": (dict(enumerate(parameters)), ILLEGAL),
    }
    for label, (value, verdict) in lists.items():
        changes.append(
            Change(f"parameters: {label}", verdict, names, lambda a, v=value: a.__setitem__("parameters", v))
        )
    return Call("routed_network", arguments, needs=("x", "parameters")), changes


def active_call(s: Sizes) -> tuple[Call, list[Change]]:
    shape = s.rng.choice([(s.e, s.b), (s.b,), (), (2, s.e, s.b)])
    active = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
    arguments = {"active": active, "n_modules": s.n}
    put = lambda v: lambda a: a.__setitem__("active", v)  # noqa: E731
    names = ("active",)
    changes = scalars("n_modules", [-1, 33, 64, 2**31, None, "3", torch.tensor([1, 2])], ILLEGAL)
    changes += scalars("n_modules", [0, 2.0, True], UNSAID)
    for dtype in (torch.float32, torch.bool, torch.complex64):
        changes.append(Change(f"active: {dtype}", ILLEGAL, names, put(active.to(dtype))))
    for dtype in (torch.int64, torch.uint8):
        changes.append(Change(f"active: {dtype}", UNSAID, names, put(active.to(dtype))))
    for label, value in {"None": None, "a list": [3], "a number": 3, "numpy": active.numpy()}.items():
        changes.append(Change(f"active: {label}", ILLEGAL, names, put(value)))
    return Call(s.rng.choice(["unpack_active", "count_active"]), arguments), changes


def as_choice(arguments: dict[str, Any]) -> RouteChoice:
    return RouteChoice(*(arguments[name] for name in RouteChoice._fields))


def describe(value: Any) -> str:
    """An argument in a few words."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Routes):
        return f"Routes({', '.join(describe(v) for v in value)})"
    if isinstance(value, RoutedNetwork):
        return f"net E{value.n_nets}-N{value.cfg.n_modules}-K{value.cfg.top_k}-D{value.cfg.module_width}"
    if isinstance(value, list | tuple) and len(value) > 6:
        return f"{type(value).__name__} of {len(value)}"
    return " ".join(repr(value).split())[:60]
