"""Backend `cpp` of `select_routes`."""

import torch
from torch import Tensor

from d2r_fast.ops.cpp.library import operations


def forward(
    logits: Tensor,
    temperature: Tensor | None,
    noise: Tensor | None,
    given: Tensor | None,
    k: int,
    n_modules: int,
    resrouting: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """index, gate, flow [E,B,N,K] and active [E,B] of `Routes`."""
    shape = (*logits.shape[:2], n_modules, k)
    index, gate = torch.empty(shape, dtype=torch.int32), logits.new_empty(shape)
    flow, active = torch.empty(shape, dtype=torch.bool), torch.empty(shape[:2], dtype=torch.int32)
    temperature, noise = (None if v is None else v.to(logits.dtype).contiguous() for v in (temperature, noise))
    given = None if given is None else readable_index(given)
    operations().select_routes(logits.contiguous(), temperature, noise, given, resrouting, index, gate, flow, active)
    return index, gate, flow, active


def readable_index(index: Tensor) -> Tensor:
    """The same numbers, contiguous, in a dtype that the library reads: as they come, unless they come in a rare one."""
    if index.dtype not in (torch.uint8, torch.int32, torch.int64):
        index = index.to(torch.int64)
    return index.contiguous()


def backward(d_gate: Tensor, index: Tensor, gate: Tensor) -> Tensor:
    """d_logits [E,B,R]."""
    n_modules = index.shape[2]
    d_logits = gate.new_empty(*index.shape[:2], n_modules * (n_modules + 1) // 2)
    operations().select_routes_backward(d_gate.contiguous(), index, gate, d_logits)
    return d_logits
