"""Backend `reference` of `select_routes`: plain PyTorch, on any device and in any dtype."""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=32)
def _tables(n_modules: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Constants of N: where route i's logits start in the packed row; the packed position of (route, source), or R
    (one past the end) where the source does not exist; how many sources each route has; bit value of each module."""
    route = torch.arange(1, n_modules + 1)
    offset = route * (route - 1) // 2  # [N]
    source = torch.arange(n_modules)
    n_logits = n_modules * (n_modules + 1) // 2
    position = torch.where(source < route[:, None], offset[:, None] + source, n_logits)  # [N,N]
    bit = torch.ones(n_modules, dtype=torch.int64).bitwise_left_shift(source).to(torch.int32)
    return offset.to(device), position.flatten().to(device), route.to(device), bit.to(device)


def _softmax(x: Tensor) -> Tensor:
    """Softmax over the last axis, which is short here: torch's CPU kernel vectorises along it only if it is another."""
    return x.movedim(-1, 0).softmax(0).movedim(0, -1).contiguous()


def _active_bits(index: Tensor, used: Tensor, bit: Tensor) -> Tensor:
    """Modules reachable from the head, [E,B] int32: walk back from route N; a reached module brings its own route."""
    picked = torch.where(used, bit[index], 0).sum(-1, dtype=torch.int32)  # [E,B,N]: distinct bits, so the sum is an or
    n_modules = index.shape[2]
    active = picked[:, :, n_modules - 1].clone()
    for module in range(n_modules - 1, 0, -1):
        reached = active.bitwise_right_shift(module).bitwise_and(1)
        active |= picked[:, :, module - 1] * reached
    return active


def forward(
    logits: Tensor,
    temperature: Tensor | None,
    noise: Tensor | None,
    given: Tensor | None,
    k: int,
    n_modules: int,
    resrouting: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """index, gate, flow [E,B,N,K] and active [E,B] of `Routes`; differentiable in logits through gate."""
    n_nets, rows = logits.shape[:2]
    offset, position, n_sources, bit = _tables(n_modules, logits.device)
    used = torch.arange(k, device=logits.device) < n_sources[:, None]  # [N,K]

    def unpack(packed: Tensor) -> Tensor:  # [E,B,R] -> [E,B,N,N], -inf where route i has no such source
        padded = torch.nn.functional.pad(packed, (0, 1), value=-torch.inf)
        return padded.index_select(2, position).view(n_nets, rows, n_modules, n_modules)

    def largest(scores: Tensor) -> Tensor:  # -inf is a score like any other, and no reason to take what does not exist
        return unpack(scores.clamp(min=torch.finfo(scores.dtype).min)).topk(k, dim=-1).indices

    with torch.no_grad():
        by_route = unpack(logits)
        if given is not None:
            chosen = given.long()
        elif noise is not None:
            assert temperature is not None
            # logits / tau + noise in the order of logits + tau * noise: no division, so no overflow at a tiny tau.
            chosen = largest(logits + temperature[:, None] * noise)
        else:
            chosen = largest(logits)
        chosen = torch.where(used, chosen, 0)  # [E,B,N,K]
        if resrouting:
            # dev 3: the published threshold is 1/(i+1), not 1/i, over all i sources and without the temperature.
            share = _softmax(by_route).gather(-1, chosen)
            flow = (share * (n_sources[:, None] + 1) > 1) & used
        else:
            flow = used.expand(chosen.shape).contiguous()
        active = _active_bits(chosen, used, bit)

    picked = logits.gather(2, (chosen + offset[:, None]).flatten(2)).view(chosen.shape)
    gate = _softmax(picked.masked_fill(~used, -torch.inf))
    return chosen.to(torch.int32), gate, flow, active


def active_bits(index: Tensor) -> Tensor:
    """Modules reachable from the head by the used slots of index [E,B,N,K], as bits [E,B] int32."""
    n_modules, k = index.shape[2:]
    _, _, n_sources, bit = _tables(n_modules, index.device)
    used = torch.arange(k, device=index.device) < n_sources[:, None]
    return _active_bits(torch.where(used, index.long(), 0), used, bit)
