"""Sums of experts in plain PyTorch: what the faster backends are held against."""

import torch
from torch import Tensor


def expert_sum(v: Tensor, weight: Tensor, orthogonal: bool, norm_epsilon: float) -> Tensor:
    """As `d2r_fast.ops.expert_sum.expert_sum`."""
    if orthogonal:
        v = orthonormal(v, norm_epsilon)
    return torch.einsum("ebn,ebnd->ebd", weight.to(v.dtype), v)


def orthonormal(v: Tensor, norm_epsilon: float) -> Tensor:
    """Classical Gram-Schmidt, in each row for itself: v [E,B,N,D] -> N vectors of length 1, each without the directions
    of those before it.

        b_1 = v_1 / (|v_1| + eps)
        b_i = r_i / (|r_i| + eps),  r_i = v_i - sum_{j<i} <v_i, b_j> b_j
    """
    basis: list[Tensor] = []
    for v_i in v.unbind(2):
        r = v_i
        for b in basis:
            r = r - (v_i * b).sum(-1, keepdim=True) * b
        basis.append(r / (torch.linalg.vector_norm(r, dim=-1, keepdim=True) + norm_epsilon))
    return torch.stack(basis, 2)
