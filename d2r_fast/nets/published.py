"""Parameters of the published PyTorch implementation, under our names."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_LAYERS = {
    "base.fc0": "base.0",
    "base.fc1": "base.1",
    "em_base.fc0": "task",
    "depth_route_net.module_fcs.0": "module0",
    "last": "head",
}
_NUMBERED = re.compile(r"depth_route_net\.(gates|module_fcs)\.(\d+)")
_KINDS = ("weight", "bias")


def _load_one(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    modules: dict[str, dict[int, Tensor]] = {kind: {} for kind in _KINDS}
    n_gates = 1
    for name, value in published.items():
        if name == "gumbel_temperature":
            continue  # the agent's `route_temp`; it follows from log alpha
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
