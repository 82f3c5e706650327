"""Parameters of the published PyTorch implementation, under our names."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_LAYERS = {
    "base.fc0": "base.0",
    "base.fc1": "base.1",
    "em_base.fc0": "task",
    "depth_route_net.gates": "route",
    "depth_route_net.module_fcs.0": "module0",
    "last": "head",
}
_MODULE = re.compile(r"depth_route_net\.module_fcs\.(\d+)\.(weight|bias)")


def _load_one(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    modules: dict[tuple[str, int], Tensor] = {}
    for name, value in published.items():
        if name == "gumbel_temperature":
            continue  # the agent's `route_temp`; it follows from log alpha
        module = _MODULE.fullmatch(name)
        if module and module[1] != "0":
            modules[module[2], int(module[1])] = value
            continue
        for theirs, our in _LAYERS.items():
            if name.startswith(theirs + "."):
                ours[our + name[len(theirs) :]] = value
                break
        else:
            raise ValueError(f"not a parameter of the published network: {name!r}")
    missing = {f"{our}.weight" for our in _LAYERS.values() if our != "route"} - ours.keys()
    if missing:
        raise ValueError(f"published parameters: nothing given for {', '.join(sorted(missing))}")
    for kind in ("weight", "bias"):
        numbers = sorted(i for k, i in modules if k == kind)
        if numbers != list(range(1, len(numbers) + 1)):
            raise ValueError(f"depth_route_net.module_fcs.*.{kind}: expected modules 1, 2, ..., got {numbers}")
        width = ours["module0.weight"].shape[0]
        shape = (0, width, width) if kind == "weight" else (0, width)
        stacked = (
            torch.stack([modules[kind, i] for i in numbers]) if numbers else ours["module0.weight"].new_empty(shape)
        )
        ours[f"module_{kind}"] = stacked
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
