"""Gumbel noise out of uniform noise, in place, in one launch (`d2r_fast.ops.gumbel` is contract and oracle)."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, check_in_place, check_real

LAUNCH = {"BLOCK": 1024, "num_warps": 4} | FUSED  # 8 numbers a thread, in two accesses of 128 bits


@triton.jit
def gumbel_kernel(noise_ptr, n, TINY: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (cdiv(n, BLOCK),); a program owns BLOCK numbers. Reads and writes each once: bandwidth-bound."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(noise_ptr + at, mask=at < n, other=0.5)
    tl.store(noise_ptr + at, gumbel_of(u, TINY), mask=at < n)


@triton.jit
def gumbel_of(u, TINY: tl.constexpr):
    """Of uniform numbers; 0 counts as TINY, the smallest normal one."""
    return -tl.log(-tl.log(tl.where(u < TINY, TINY, u)))


def gumbel_(uniform: Tensor) -> None:
    """-log(-log u) in place; 0 counts as the smallest normal number.

    ValueError: neither float32 nor float64, or not contiguous.
    """
    dtype = check_real("uniform", uniform)
    check_in_place("uniform", uniform, dtype, uniform.shape)
    n = uniform.numel()
    if n > 0:
        gumbel_kernel[(triton.cdiv(n, LAUNCH["BLOCK"]),)](uniform, n, TINY=torch.finfo(dtype).tiny, **LAUNCH)
