"""Inputs of the two operations for benchmarks, with any number of active modules."""

from typing import NamedTuple

import torch
from torch import Tensor

from d2r_fast import Routes, count_active, make_routes, select_routes
from d2r_fast.ops.gumbel import gumbel


class Sizes(NamedTuple):
    """E networks, B rows, N modules, K sources a route, D wide. The published critics: 2, 1280, 16, 2, 128."""

    e: int = 2
    b: int = 1280
    n: int = 16
    k: int = 2
    d: int = 128

    @property
    def text(self) -> str:
        return f"E{self.e}-B{self.b}-N{self.n}-K{self.k}-D{self.d}"


class Case(NamedTuple):
    """Inputs of `routed_modules`, all leaves, and a cotangent."""

    h0: Tensor
    weight: Tensor
    bias: Tensor
    routes: Routes
    cotangent: Tensor

    def products(self) -> float:
        """Multiply-adds times two of one forward pass: what active modules 1..N-1 need at the least."""
        n_modules, width = self.routes.index.shape[2], self.h0.shape[2]
        active = count_active(self.routes.active, n_modules) - 1  # module 0 is the caller's
        return 2.0 * float(active.sum()) * width * width


def sampled_routes(sizes: Sizes, device: str) -> Routes:
    """What training draws: routes sampled from random logits, 7.4 of 16 modules active a row."""
    logits = torch.randn(sizes.e, sizes.b, sizes.n * (sizes.n + 1) // 2, device=device)
    return select_routes(logits, sizes.k, "sampled", torch.ones(sizes.b, device=device), gumbel(logits.shape, logits))


def routes_with_active(sizes: Sizes, n_active: int, device: str) -> Routes:
    """Random routes that reach exactly `n_active` modules a row: a chain through them, and other sources among them."""
    e, b, n, k, _ = sizes
    if not k <= n_active <= n:
        raise ValueError(f"n_active: expected K={k}..N={n}, got {n_active}")
    # Module 0 .. k-1 always (a route below K takes all there is), the others drawn.
    score = torch.rand(e, b, n, device=device)
    score[..., :k] = 2
    on = torch.zeros(e, b, n, dtype=torch.bool, device=device).scatter_(2, score.topk(n_active, -1).indices, True)
    index = torch.zeros(e, b, n, k, dtype=torch.int32, device=device)
    for i in range(1, n + 1):
        kept = min(k, i)
        below = on[..., :i] * (1 + torch.rand(e, b, i, device=device))
        # The nearest active module below comes first, so that the chain from the head meets them all.
        nearest = (on[..., :i] * torch.arange(1, i + 1, device=device)).argmax(-1, keepdim=True)
        below.scatter_(2, nearest, 3.0)
        index[:, :, i - 1, :kept] = below.topk(kept, -1).indices.int()
    gate = torch.rand(e, b, n, k, device=device)
    return make_routes(index, gate / gate.sum(-1, keepdim=True), torch.rand(e, b, n, k, device=device) > 0.3)


def make_case(sizes: Sizes, routes: Routes, device: str) -> Case:
    e, b, n, _, d = sizes
    leaves = [
        torch.randn(e, b, d, device=device).relu(),
        torch.randn(e, n - 1, d, d, device=device) / d**0.5,
        torch.randn(e, n - 1, d, device=device) * 0.1,
    ]
    h0, weight, bias = (v.requires_grad_() for v in leaves)
    routes = routes._replace(gate=routes.gate.detach().requires_grad_())
    return Case(h0, weight, bias, routes, torch.randn(e, b, d, device=device))
