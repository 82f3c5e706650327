"""Gumbel noise, out of one call of the random generator."""

import torch
from torch import Tensor

from d2r_fast.ops.contract import define, launcher


def gumbel(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Standard Gumbel noise with the dtype and device of `like`: -log(-log u) of uniform u."""
    noise = torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)
    _gumbel_(noise)
    return noise


def reference(uniform: Tensor) -> None:
    """In place; 0 counts as the smallest normal number."""
    uniform.clamp_(min=torch.finfo(uniform.dtype).tiny).log_().neg_().log_().neg_()


_gumbel_ = define(
    "gumbel_(Tensor(a!) uniform) -> ()",
    reference,
    lambda uniform: None,
    launcher("gumbel", "gumbel_", reference),
)
