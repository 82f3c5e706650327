"""Levels of modules and their gates in plain PyTorch: what the faster backends are held against."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2r_fast.ops.backends import Precision
from d2r_fast.ops.ensemble_linear import ensemble_linear


def module_levels(u: Tensor, gate: Tensor, parameters: Sequence[Tensor], precision: Precision) -> Tensor:
    """As `d2r_fast.ops.module_levels.module_levels`."""
    m = u[:, None].expand(-1, parameters[0].shape[1], -1, -1)  # [E,N,B,H]
    n_nets, n_modules = m.shape[:2]
    for level, (weight, bias) in enumerate(zip(parameters[::2], parameters[1::2], strict=True)):
        if level > 0:
            first = (level - 1) * n_modules**2
            m = _mixed(gate[..., first : first + n_modules**2].unflatten(-1, (n_modules, n_modules)), m)
        m = ensemble_linear(
            *(m.flatten(0, 1), weight.flatten(0, 1), bias.flatten(0, 1), False, "reference", precision)
        ).unflatten(0, (n_nets, n_modules))
    return _mixed(gate[..., None, -n_modules:], m)[:, 0]


def _mixed(p: Tensor, m: Tensor) -> Tensor:
    """p [E,B,J,N], m [E,N,B,D] -> [E,J,B,D]."""
    return torch.einsum("ebjk,ekbd->ejbd", p, m.to(p.dtype)).relu()


def level_gates(c: Tensor, n_modules: int, parameters: Sequence[Tensor], precision: Precision) -> Tensor:
    """As `d2r_fast.ops.module_levels.level_gates`."""

    def layer(x: Tensor, i: int) -> Tensor:
        return ensemble_linear(x, parameters[2 * i], parameters[2 * i + 1], False, "reference", precision)

    p = layer(c.relu(), 0).unflatten(-1, (-1, n_modules)).softmax(-1).flatten(-2)
    for i in range(1, len(parameters) // 2, 2):
        logits = layer((layer(p, i) * c).relu(), i + 1)
        p = torch.cat([p, logits.unflatten(-1, (-1, n_modules)).softmax(-1).flatten(-2)], -1)
    return p
