"""Choosing sources: packed routing logits -> `Routes` (algorithm: dynamic depth routing, "choosing sources")."""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

MAX_MODULES = 32  # a row's active modules are the bits of one int32
RouteMode = Literal["greedy", "sampled", "given"]


class Routes(NamedTuple):
    """The sources every row of every network kept. Route i (1..N) is slot i-1; it chooses among modules 0..i-1.

    index  [E,B,N,K] int32   the kept sources; 0 in an unused slot (route i has min(K, i) used ones)
    gate   [E,B,N,K] float   their weights, summing to 1 over the used slots; 0 in an unused slot
    flow   [E,B,N,K] bool    ResRouting: may the gradient enter the source's ReLU layer? False in an unused slot
    active [E,B]     int32   bit j: module j is reachable from the head
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    gate: Tensor
    flow: Tensor
    active: Tensor


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


def modules_for(n_logits: int) -> int:
    """N such that N(N+1)/2 == n_logits. ValueError where there is none, or N is over 32."""
    n_modules = int(((8 * n_logits + 1) ** 0.5 - 1) / 2)
    if n_modules < 1 or n_modules * (n_modules + 1) // 2 != n_logits:
        raise ValueError(f"logits: expected a last axis of N(N+1)/2 (1, 3, 6, 10, ...), got {n_logits}")
    if n_modules > MAX_MODULES:
        raise ValueError(f"logits: expected at most {MAX_MODULES} modules, got N={n_modules}")
    return n_modules


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


def select_routes(
    logits: Tensor,
    k: int,
    mode: RouteMode = "greedy",
    temperature: Tensor | None = None,
    noise: Tensor | None = None,
    index: Tensor | None = None,
    resrouting: bool = True,
) -> Routes:
    """Choose min(k, i) of the i sources of every route i, and weight them by softmax over the chosen *unscaled* logits.

    logits      [E,B,R] float, R = N(N+1)/2: route i's i logits follow those of route i-1; N at most 32
    mode        "greedy": the k largest. "sampled": k without replacement from softmax(logits / temperature), drawn as
                the k largest of logits / temperature + noise. "given": the sources in `index`.
    temperature [B] float, positive, each row's route temperature ("sampled" only)
    noise       [E,B,R] float, standard Gumbel ("sampled" only)
    index       [E,B,N,K] integer ("given" only), each used slot a distinct source below i; unused slots are ignored.
                An out-of-range index is undefined behaviour.
    resrouting  False: gradients flow everywhere (flow is True in every used slot)

    Returns `Routes`; `gate` carries the gradient to the chosen logits, the rest is constant.
    ValueError: k outside 1..N, or a shape, dtype, device or argument that does not fit the mode.
    """
    n_modules = _check(logits, k, mode, temperature, noise, index)
    n_nets, rows = logits.shape[:2]
    offset, position, n_sources, bit = _tables(n_modules, logits.device)
    used = torch.arange(k, device=logits.device) < n_sources[:, None]  # [N,K]

    def unpack(packed: Tensor) -> Tensor:  # [E,B,R] -> [E,B,N,N], -inf where route i has no such source
        padded = torch.nn.functional.pad(packed, (0, 1), value=-torch.inf)
        return padded.index_select(2, position).view(n_nets, rows, n_modules, n_modules)

    with torch.no_grad():
        by_route = unpack(logits)
        if index is not None:
            chosen = index.long()
        elif mode == "sampled":
            assert temperature is not None and noise is not None
            # logits / tau + noise in the order of logits + tau * noise: no division, so no overflow at a tiny tau.
            chosen = unpack(logits + temperature[:, None] * noise).topk(k, dim=-1).indices
        else:
            chosen = by_route.topk(k, dim=-1).indices
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
    return Routes(chosen.to(torch.int32), gate, flow, active)


def _check(
    logits: Tensor, k: int, mode: str, temperature: Tensor | None, noise: Tensor | None, index: Tensor | None
) -> int:
    """Validate the arguments of `select_routes`; returns N."""
    if logits.dim() != 3 or not logits.is_floating_point():
        raise ValueError(f"logits: expected a float tensor [E,B,R], got {logits.dtype} {list(logits.shape)}")
    n_nets, rows, n_logits = logits.shape
    n_modules = modules_for(n_logits)
    if not 1 <= k <= n_modules:
        raise ValueError(f"k: expected 1..N={n_modules} sources a route, got {k}")
    wanted = {
        "greedy": {},
        "sampled": {"temperature": (temperature, [rows]), "noise": (noise, [n_nets, rows, n_logits])},
        "given": {"index": (index, [n_nets, rows, n_modules, k])},
    }
    if mode not in wanted:
        raise ValueError(f"mode: expected one of {', '.join(wanted)}, got {mode!r}")
    for name, value in {"temperature": temperature, "noise": noise, "index": index}.items():
        if name not in wanted[mode]:
            if value is not None:
                raise ValueError(f"{name}: not used by mode {mode!r}, so expected None")
            continue
        shape = wanted[mode][name][1]
        if value is None or list(value.shape) != shape:
            raise ValueError(
                f"{name}: mode {mode!r} expects shape {shape}, got {None if value is None else list(value.shape)}"
            )
        if value.device != logits.device:
            raise ValueError(f"{name}: expected device {logits.device} like logits, got {value.device}")
        if value.is_floating_point() == (name == "index"):
            kind = "an integer" if name == "index" else "a float"
            raise ValueError(f"{name}: expected {kind} dtype, got {value.dtype}")
    return n_modules


def unpack_active(active: Tensor, n_modules: int) -> Tensor:
    """The active bits as a mask: [...] int32 -> [...,N] bool."""
    module = torch.arange(n_modules, dtype=torch.int32, device=active.device)
    return active[..., None].bitwise_right_shift(module).bitwise_and(1).bool()


def count_active(active: Tensor, n_modules: int) -> Tensor:
    """How many modules each row runs: [...] int32 bits -> [...] int64."""
    return unpack_active(active, n_modules).sum(-1)
