"""Parameters of the published PyTorch implementation, under our names, and back."""

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from d2r_fast.nets.d2r import NetConfig, RoutedNetwork

_LAYERS = {
    "base.fc0": "base.0",
    "base.fc1": "base.1",
    "em_base.fc0": "task",
    "depth_route_net.module_fcs.0": "module0",
    "last": "head",
}
_NUMBERED = re.compile(r"depth_route_net\.(gates|module_fcs)\.(\d+)")
_KINDS = ("weight", "bias")
TEMPERATURE = "gumbel_temperature"
"""[T] the agent's `route_temp`, a parameter of every published network."""


def _load_one(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    modules: dict[str, dict[int, Tensor]] = {kind: {} for kind in _KINDS}
    n_gates = 1
    for name, value in published.items():
        if name == TEMPERATURE:
            continue  # it belongs to the agent
        layer, _, kind = name.rpartition(".")
        numbered = _NUMBERED.fullmatch(layer)
        if kind in _KINDS and layer in _LAYERS:
            ours[f"{_LAYERS[layer]}.{kind}"] = value
        elif kind in _KINDS and numbered and numbered[1] == "gates":
            ours[f"route.{numbered[2]}.{kind}"] = value
            n_gates = max(n_gates, int(numbered[2]) + 1)
        elif kind in _KINDS and numbered:
            modules[kind][int(numbered[2])] = value
        else:
            raise ValueError(f"not a parameter of the published network: {name!r}")
    layers = [*_LAYERS.values(), *(f"route.{i}" for i in range(n_gates))]
    missing = [name for layer in layers for name in (f"{layer}.weight", f"{layer}.bias") if name not in ours]
    if missing:
        raise ValueError(f"published parameters: nothing given for {', '.join(missing)}")
    width = ours["module0.weight"].shape[0]
    n_modules = max((i for numbers in modules.values() for i in numbers), default=0)
    for kind, shape in (("weight", (width, width)), ("bias", (width,))):
        numbers = sorted(modules[kind])
        if numbers != list(range(1, n_modules + 1)):
            raise ValueError(f"depth_route_net.module_fcs.*.{kind}: expected modules 1..{n_modules}, got {numbers}")
        for i in numbers:
            if modules[kind][i].shape != shape:
                raise ValueError(
                    f"depth_route_net.module_fcs.{i}.{kind}: expected {list(shape)} like module 0, "
                    f"got {list(modules[kind][i].shape)}"
                )
        empty = ours["module0.weight"].new_empty(0, *shape)
        ours[f"module_{kind}"] = torch.stack([modules[kind][i] for i in numbers]) if numbers else empty
    return ours


def load_published(*state_dicts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published parameter names -> the `state_dict` of a `RoutedNetwork` with as many networks as arguments.

    One argument for an actor; `load_published(qf1, qf2)` for the critics. Route temperatures
    (`gumbel_temperature`) are left out: they belong to the agent. Dtypes and devices stay as they are.
    ValueError: a name the published network does not have, a missing layer, or networks of different shapes.
    """
    if not state_dicts:
        raise ValueError("load_published: expected at least one state dict, got none")
    nets = [_load_one(d) for d in state_dicts]
    for net in nets[1:]:
        if {k: v.shape for k, v in net.items()} != {k: v.shape for k, v in nets[0].items()}:
            raise ValueError("load_published: the networks differ in names or shapes, so they are no ensemble")
    return {name: torch.stack([net[name] for net in nets]) for name in nets[0]}


def to_published(state_dict: Mapping[str, Tensor], route_temp: Tensor) -> list[dict[str, Tensor]]:
    """The `state_dict` of a `RoutedNetwork` -> published parameter names, for each of its E networks.

    route_temp  [T] the agent's route temperatures, which every published network holds
    """
    layers = {ours: published for published, ours in _LAYERS.items()}
    nets: list[dict[str, Tensor]] = []
    for e in range(len(state_dict["head.weight"])):
        named = {TEMPERATURE: route_temp.clone()}
        for name, value in state_dict.items():
            layer, _, kind = name.rpartition(".")
            if name.startswith("module_"):  # modules 1..N-1 in one tensor
                kind = name.removeprefix("module_")
                named |= {f"depth_route_net.module_fcs.{i}.{kind}": m.clone() for i, m in enumerate(value[e], start=1)}
            elif layer.startswith("route."):
                named[f"depth_route_net.gates.{layer.removeprefix('route.')}.{kind}"] = value[e].clone()
            else:
                named[f"{layers[layer]}.{kind}"] = value[e].clone()
        nets.append(named)
    return nets


class PublishedSizes(NamedTuple):
    """Of a published network: the columns it reads, the numbers it gives, T, and its settings. K, sources a route
    keeps, is in no parameter: it is 2, as published, or N if that is 1."""

    n_in: int
    n_out: int
    n_tasks: int
    cfg: NetConfig


def published_sizes(published: Mapping[str, Tensor]) -> PublishedSizes:
    """What a published network's parameters tell of it. ValueError: as `load_published`, or shapes that do not fit."""
    for name, value in published.items():
        kind = name.rpartition(".")[2]
        if kind in _KINDS and (value.dim() != (2 if kind == "weight" else 1) or 0 in value.shape):
            raise ValueError(f"published parameters: {name} is {list(value.shape)}, as of no layer")
    ours = load_published(published)
    n_modules = ours["module_weight"].shape[1] + 1
    routes = sorted(
        (int(n.split(".")[1]), v.shape[1]) for n, v in ours.items() if re.fullmatch(r"route\.\d+\.weight", n)
    )
    cfg = NetConfig(
        n_modules=n_modules,
        top_k=min(NetConfig.top_k, n_modules),
        module_width=ours["module0.weight"].shape[1],
        base_width=ours["base.0.weight"].shape[1],
        route_widths=tuple(width for _, width in routes[:-1]),
    )
    found = PublishedSizes(
        ours["base.0.weight"].shape[2], ours["head.weight"].shape[1], ours["task.weight"].shape[2], cfg
    )
    with torch.device("meta"):
        expected = RoutedNetwork(found.n_in, found.n_out, found.n_tasks, 1, cfg).state_dict()
    for name, value in ours.items():
        if value.shape != expected[name].shape:
            raise ValueError(
                f"published parameters: {name} is {list(value.shape[1:])}, where the layers around it expect "
                f"{list(expected[name].shape[1:])}"
            )
    return found
