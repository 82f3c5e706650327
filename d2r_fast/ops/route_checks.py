"""Routes that come from outside, looked at where they enter; csrc/route_checks.h does the same for backend `cpp`."""

import torch
from torch import Tensor


def require_legal_index(index: Tensor, name: str = "index") -> None:
    """index [E,B,N,K] integer: route i (slot i-1) must read min(K, i) modules, all below i, none twice.

    ValueError: the first slot that does not. On a GPU this waits for it; in a graph being captured or compiled it is an
    assertion on the device instead.
    """
    index = index.to(torch.int64)  # of unsigned dtypes torch compares few; what wraps becomes negative
    n_modules, k = index.shape[2:]
    route = torch.arange(1, n_modules + 1, device=index.device)[:, None]  # [N,1]
    slot = torch.arange(k, device=index.device)
    used = slot < route  # [N,K]
    outside = used & ((index < 0) | (index >= route))
    # Slots that are not used get numbers of their own, which repeat nothing.
    ordered = torch.where(used, index, -1 - slot).sort(-1).values
    repeats = (ordered[..., 1:] == ordered[..., :-1]).any()
    illegal = outside.any() | repeats
    if _cannot_wait(index):
        torch._assert_async(~illegal, f"{name}: expected route i to read distinct modules below i")
    elif illegal:
        _refuse(index, outside, used, name)


def require_active(index: Tensor, active: Tensor) -> None:
    """active [E,B] int32 must have the bit of every module that legal routes read, from the head down.

    ValueError: the first row that lacks one.
    """
    if _cannot_wait(index):
        return
    n_modules, k = index.shape[2:]
    module = torch.arange(n_modules, device=index.device)
    used = torch.arange(k, device=index.device) <= module[:, None]  # [N,K]
    read = torch.where(used, torch.ones_like(index, dtype=torch.int64) << index, 0).sum(-1)  # [E,B,N] bits
    bits = active.to(torch.int64)[..., None] & 0xFFFFFFFF
    runs = (bits >> (module + 1) & 1).bool()  # route i runs with module i
    runs[..., n_modules - 1] = True
    lacking = (torch.where(runs, read, 0) & ~bits).ne(0).any(-1)
    if lacking.any():
        e, b = lacking.nonzero()[0].tolist()
        raise ValueError(
            f"active[{e},{b}]: expected the bits of all modules that the head reaches, got {active[e, b].item()}"
        )


def _cannot_wait(tensor: Tensor) -> bool:
    """Whether values cannot be looked at here: in a graph that is compiled or captured."""
    return torch.compiler.is_compiling() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _refuse(index: Tensor, outside: Tensor, used: Tensor, name: str) -> None:
    # A slot repeats if an earlier one of its route holds the same.
    k = index.shape[3]
    earlier = torch.ones(k, k, dtype=torch.bool, device=index.device).tril(-1)
    same = (index[..., :, None] == index[..., None, :]) & used[..., :, None] & used[..., None, :] & earlier
    repeated = same.any(-1)
    e, b, i, slot = (outside | repeated).nonzero()[0].tolist()
    raise ValueError(
        f"{name}[{e},{b},{i},{slot}]: route {i + 1} reads distinct modules of 0..{i}, got {index[e, b, i, slot].item()}"
        f"{'' if outside[e, b, i, slot] else ' again'}"
    )
