"""Random arguments of the operations on routes, and what comes out with its gradients."""

import torch

from d2r_fast import make_routes

GRADS = ("h0", "weight", "bias", "gate")


def n_logits(n):
    return n * (n + 1) // 2


def random_logits(e, b, n, dtype=torch.float64):
    return 2 * torch.randn(e, b, n_logits(n), dtype=dtype)


def random_index(e, b, n, k):
    """Distinct sources below i in the used slots of route i, 99 in the others."""
    index = torch.full((e, b, n, k), 99)
    for i in range(1, n + 1):
        kept = min(k, i)
        index[:, :, i - 1, :kept] = torch.rand(e, b, i).argsort(-1)[..., :kept]
    return index


def make_case(e, b, n, k, d, flow="random", dtype=torch.float64):
    """Inputs of the operation: h0, weight, bias, routes. Gates are any weights, as the contract allows."""
    used = torch.arange(k) < torch.arange(1, n + 1)[:, None]
    index = torch.zeros(e, b, n, k, dtype=torch.int32)
    for i in range(1, n + 1):
        kept = min(k, i)
        index[:, :, i - 1, :kept] = torch.rand(e, b, i).argsort(-1)[..., :kept].int()
    gate = torch.where(used, torch.randn(e, b, n, k, dtype=dtype) / k**0.5, 0)
    flow_of = {"all": torch.ones(e, b, n, k), "none": torch.zeros(e, b, n, k), "random": torch.rand(e, b, n, k) > 0.5}
    h0 = torch.randn(e, b, d, dtype=dtype).relu()
    weight = torch.randn(e, n - 1, d, d, dtype=dtype) / d**0.5
    bias = torch.randn(e, n - 1, d, dtype=dtype) * 0.3
    return h0, weight, bias, make_routes(index, gate, flow_of[flow].bool())


def run(op, case, cotangent, residual=True, dtype=None, needs=GRADS, retain=False):
    """Output and gradients of `op`, by name; the inputs in `dtype` and fresh as leaves."""
    h0, weight, bias, routes = case
    leaves = {"h0": h0, "weight": weight, "bias": bias, "gate": routes.gate}
    leaves = {name: v.detach().to(dtype or v.dtype).requires_grad_(name in needs) for name, v in leaves.items()}
    out = op(leaves["h0"], leaves["weight"], leaves["bias"], routes._replace(gate=leaves["gate"]), residual)
    out.backward(cotangent.to(out.dtype), retain_graph=retain)
    grads = {name: torch.zeros_like(v) if v.grad is None else v.grad for name, v in leaves.items() if name in needs}
    return {"out": out.detach()} | grads


def largest(value):
    return value.abs().max().item() if value.numel() else 0.0
