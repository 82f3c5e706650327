"""Launch settings of the routed modules: what the launchers pass is, word for word, what `compile_report` compiles."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from d2r_fast.ops.backends import MAX_TRITON_WIDTH, check_precision

# Contract a * b + c to one instruction; Triton's default for it changes between versions.
FUSED = {"enable_fp_fusion": True}


class Settings(NamedTuple):
    """How one kernel is launched at one precision."""

    block_rows: int
    """Rows that a program works on at a time."""
    block_k: int
    """Input features of one product (the walking kernels); input features of a program's tile (weight gradient)."""
    num_warps: int
    num_stages: int
    from_programs: int = 0
    """Of a launch; fewer take the next settings."""


# Widths up to 128, then up to 256; of each the first whose launch has programs enough. Measured on an H200
# (benches/NOTES.md): a walk takes as long as its chain of waits, nearly the same by 4 warps a tile as by 16, and the
# more tiles a multiprocessor holds, the more of them wait together. 32 rows read half the weights, and agree less on
# what to skip.
MULTIPROCESSORS = 132
"""Of an H100 or H200: how many programs make a round of one each."""
_MANY = 2 * MULTIPROCESSORS
SETTINGS = {
    ("routed_modules_fwd", "float32"): (
        [Settings(16, 64, 4, 3, _MANY), Settings(16, 64, 8, 3)],
        [Settings(16, 32, 8, 2)],
    ),
    ("routed_modules_fwd", "tf32"): ([Settings(16, 64, 4, 2)], [Settings(16, 64, 8, 2)]),
    ("routed_modules_fwd", "bf16"): ([Settings(16, 64, 4, 3)], [Settings(16, 64, 8, 2)]),
    ("routed_modules_bwd", "float32"): ([Settings(16, 64, 8, 3)], [Settings(16, 32, 8, 2)]),
    ("routed_modules_bwd", "tf32"): (
        [Settings(16, 64, 4, 2, 2 * _MANY), Settings(16, 64, 8, 3)],
        [Settings(16, 64, 8, 2)],
    ),
    ("routed_modules_bwd", "bf16"): ([Settings(16, 64, 4, 3, _MANY), Settings(16, 64, 8, 3)], [Settings(16, 32, 8, 2)]),
}
ENOUGH = MULTIPROCESSORS
"""Programs that a larger tile must leave: one for each."""


def enough(n_programs: int) -> bool:
    """Whether a launch of as many programs fills the device well enough for their tiles to be large."""
    return n_programs >= ENOUGH


def walk_launch(
    kernel: str, precision: str, n_modules: int, n_kept: int, width: int, n_rows: int, n_nets: int
) -> dict[str, Any]:
    """Constants and options of a kernel that walks modules, all but RESIDUAL; n_rows: of each network."""
    settings = _settings(kernel, precision, width, n_rows, n_nets)
    blocks = {"BLOCK_D": _block_width(width), "BLOCK_ROWS": settings.block_rows}
    blocks["BLOCK_K"] = min(settings.block_k, blocks["BLOCK_D"])
    return {"N": n_modules, "K": n_kept, "D": width, "PRECISION": precision} | blocks | _options(settings)


def gradient_launch(
    precision: str, n_modules: int, n_kept: int, width: int, n_rows: int, n_nets: int
) -> dict[str, Any]:
    """Constants and options of the weight-gradient kernel.

    A tile is a whole matrix where that is up to 128 x 128, so that what makes its operands is read once; in float32 it
    is a quarter of that, for each of its products is three. A step is a chain of loads, list, row, source: many rows a
    step make few.

    SPLIT_ROWS, the rows of one program: as many splits as make one round of all programs, for more would only add
    rounds, and partial sums of E*(N-1)*D*D each. At most 8,192, which is what a program lists at once; at least 128.
    """
    _check(precision, width)
    settings, side = Settings(64, 128, 8, 1), 128
    if precision == "float32" or width <= 64:
        settings, side = Settings(64, 64, 4, 1), 64
    elif width > 128:
        settings = Settings(16, 128, 16, 1)
    block = _block_width(width)
    blocks = {
        "BLOCK_OUT": min(side, block),
        "BLOCK_IN": min(settings.block_k, block),
        "BLOCK_ROWS": settings.block_rows,
    }
    n_tiles = triton.cdiv(width, blocks["BLOCK_OUT"]) * triton.cdiv(width, blocks["BLOCK_IN"])
    at_once, in_a_split = MULTIPROCESSORS * (4 if settings.num_warps == 4 else 1), n_nets * (n_modules - 1) * n_tiles
    n_splits = max(1, at_once // max(1, in_a_split))
    split_rows = min(8192, max(128, triton.cdiv(triton.cdiv(n_rows, n_splits), 16) * 16))
    blocks |= {"SPLIT_ROWS": split_rows, "BLOCK_LIST": triton.next_power_of_2(split_rows)}
    return {"N": n_modules, "K": n_kept, "D": width, "PRECISION": precision} | blocks | _options(settings)


def check_dtype(name: str, value: Tensor) -> None:
    """float32 everywhere; float64 under the interpreter, so that a test can tell an error from rounding."""
    if value.dtype != torch.float32 and not (value.dtype == torch.float64 and triton.knobs.runtime.interpret):
        raise ValueError(f"triton: expected float32 for {name}, got {value.dtype}")


def packed(value: Tensor) -> Tensor:
    """Contiguous, and as it reads: torch may hold numbers with the other sign and a bit that says so."""
    return value.resolve_neg().contiguous()


def check_real(name: str, value: Tensor) -> torch.dtype:
    """The dtype of `value`, float32 or float64: of kernels that make no products."""
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name}: expected torch.float32 or torch.float64, got {value.dtype}")
    return value.dtype


def check_tensor(name: str, value: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """ValueError: another dtype or shape, which a kernel would read past its end."""
    if value.dtype != dtype:
        raise ValueError(f"{name}: expected a tensor of {dtype}, got {value.dtype}")
    if list(value.shape) != list(shape):
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(value.shape)}")


def check_in_place(name: str, value: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> None:
    """As `check_tensor`, of what a kernel changes, or what is too large to copy. ValueError: it is not contiguous."""
    check_tensor(name, value, dtype, shape)
    if not value.is_contiguous() or value.is_neg():
        raise ValueError(f"{name}: expected a contiguous tensor")


def _settings(kernel: str, precision: str, width: int, n_rows: int, n_nets: int) -> Settings:
    """The first whose launch has programs enough."""
    _check(precision, width)
    *others, last = SETTINGS[kernel, precision][width > 128]
    for settings in others:
        if n_nets * triton.cdiv(n_rows, settings.block_rows) >= settings.from_programs:
            return settings
    return last


def _check(precision: str, width: int) -> None:
    check_precision(precision)
    if not 1 <= width <= MAX_TRITON_WIDTH:
        raise ValueError(f"triton: expected a module width D of 1..{MAX_TRITON_WIDTH}, got {width}")


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "num_warps": settings.num_warps,
        "num_stages": settings.num_stages,
    } | FUSED


def _block_width(width: int) -> int:
    """D as a block: a power of two, at least the 16 that a product takes."""
    return max(16, triton.next_power_of_2(width))
