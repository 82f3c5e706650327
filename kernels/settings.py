"""Launch settings, one table: what the launchers use is what `compile_report` compiles."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

PRECISIONS = ("float32", "tf32", "bf16")


class Settings(NamedTuple):
    """How one kernel is launched at one precision."""

    block_rows: int
    """Rows a program works on at a time."""
    block_k: int
    """Input features of one product (walking kernels), columns of a program's output tile (weight gradient)."""
    num_warps: int
    num_stages: int


SETTINGS = {
    ("routed_modules_fwd", "float32"): Settings(32, 16, 8, 2),
    ("routed_modules_fwd", "tf32"): Settings(32, 32, 8, 2),
    ("routed_modules_fwd", "bf16"): Settings(32, 32, 8, 2),
    ("routed_modules_bwd", "float32"): Settings(32, 16, 8, 2),
    ("routed_modules_bwd", "tf32"): Settings(32, 32, 8, 2),
    ("routed_modules_bwd", "bf16"): Settings(32, 32, 8, 2),
    ("weight_gradient", "float32"): Settings(16, 64, 8, 2),
    ("weight_gradient", "tf32"): Settings(32, 64, 8, 2),
    ("weight_gradient", "bf16"): Settings(32, 64, 8, 2),
}


def settings_for(kernel: str, precision: str, width: int) -> Settings:
    """The table's row. ValueError: an unknown precision."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    return SETTINGS[kernel, precision]


def block_width(width: int) -> int:
    """D as a block: a power of two, at least the 16 that a product takes."""
    return max(16, triton.next_power_of_2(width))


def check_dtype(name: str, value: Tensor) -> None:
    """float32 everywhere; float64 under the interpreter, so that a test can tell an error from rounding."""
    if value.dtype == torch.float32 or (value.dtype == torch.float64 and triton.knobs.runtime.interpret):
        return
    raise ValueError(f"triton: expected float32 for {name}, got {value.dtype}")
