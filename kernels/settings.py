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
    max_registers: int | None = None
    """128 registers in 8 warps let two programs share a multiprocessor."""
    tiles: int = 1
    """Of block_rows each, that a program walks through the modules side by side (the walking kernels)."""

    @property
    def rows(self) -> int:
        """Of a program."""
        return self.block_rows * self.tiles


# Widths up to 128, then up to 256; of each from large tiles, which read fewer weights from the L2, to small, of which
# there are more programs. Chosen by what sm_90 code they compile to (compile_report) and by `d2r_fast.kernels.cost`,
# before any timing:
# - 16 rows a tile: 160 tiles at the published E=2, B=1280, all resident at once where two programs fit a
#   multiprocessor (132 of them), and few rows that disagree on what to skip. 32 rows halve the weights read from L2;
#   by 16 warps they hardly spill (16 bytes of stack at most). Two tiles of 32 halve them again; one of 64 would too,
#   by wgmma, but spills hundreds of bytes. By 16 warps two tiles spill 72 to 152 bytes, but for the forward in tf32
#   (56 at most); by 8, of which each thread has 255 registers, 40 at most.
# - The backward holds two adjoints and needs 143 registers; at 128 it spills up to 10 (40 bytes of stack), none of them
#   in the loop of products, which costs less than a second round of tiles.
# - 2 stages are one buffer: a copy is issued after the product and awaited at once. 3 are two, so that a chunk's
#   weights come while the one before is multiplied; but the forward in float32 would take 146 registers, and D = 256
#   leaves no shared memory for a second program.
# - float32 products are FFMA, unrolled over block_k: a longer chunk only lengthens the code.
_LARGE, _SMALL, _SMALL_BACK = Settings(32, 64, 16, 3), Settings(16, 64, 8, 3), Settings(16, 64, 8, 3, 128)
SETTINGS = {
    ("routed_modules_fwd", "float32"): ([Settings(16, 32, 8, 2)], [Settings(16, 32, 8, 2)]),
    ("routed_modules_fwd", "tf32"): ([Settings(32, 64, 16, 3, tiles=2), _LARGE, _SMALL], [Settings(16, 64, 8, 2)]),
    ("routed_modules_fwd", "bf16"): ([Settings(32, 64, 8, 3, tiles=2), _LARGE, _SMALL], [Settings(16, 64, 8, 2)]),
    ("routed_modules_bwd", "float32"): ([Settings(16, 32, 8, 3, 128)], [Settings(16, 32, 8, 2)]),
    ("routed_modules_bwd", "tf32"): ([Settings(32, 32, 8, 3, tiles=2), _LARGE, _SMALL_BACK], [Settings(16, 64, 8, 2)]),
    ("routed_modules_bwd", "bf16"): ([Settings(32, 64, 8, 3, tiles=2), _LARGE, _SMALL_BACK], [Settings(16, 32, 8, 2)]),
}
MULTIPROCESSORS = 132
"""Of an H100 or H200: how many programs make a round of one each."""
ENOUGH = 80
"""Programs that a larger tile must leave, of a round."""
MORE_THAN_A_ROUND = MULTIPROCESSORS + 1
"""Programs that two tiles side by side must leave: within a round longer programs only make a longer launch."""


def enough(n_programs: int) -> bool:
    """Whether a launch of as many programs fills the device well enough for their tiles to be large."""
    return n_programs >= ENOUGH


def walk_launch(
    kernel: str, precision: str, n_modules: int, n_kept: int, width: int, n_rows: int, n_nets: int
) -> dict[str, Any]:
    """Constants and options of a kernel that walks modules, all but RESIDUAL; n_rows: of each network."""
    settings = _settings(kernel, precision, width, n_rows, n_nets)
    blocks = {"BLOCK_D": _block_width(width), "BLOCK_ROWS": settings.block_rows, "TILES": settings.tiles}
    blocks["BLOCK_K"] = min(settings.block_k, blocks["BLOCK_D"])
    return {"N": n_modules, "K": n_kept, "D": width, "PRECISION": precision} | blocks | _options(settings)


def gradient_launch(
    precision: str, n_modules: int, n_kept: int, width: int, n_rows: int, n_nets: int
) -> dict[str, Any]:
    """Constants and options of the weight-gradient kernel.

    A tile is a whole matrix where that is up to 128 x 128, so that what makes its operands is read once; by 16 warps,
    for two programs of 8 hold no more of it. 32 rows a step halve the chain of loads, where they hardly spill.

    SPLIT_ROWS, the rows of one program: as many splits as make one round of all programs, for more would only add
    rounds, and partial sums of E*(N-1)*D*D each. At most 8,192, which is what a program lists at once; at least 128.
    """
    _check(precision, width)
    settings = Settings(16, 64, 8, 1)
    if precision != "float32" and width > 64:
        settings = Settings(32 if width <= 128 else 16, 128, 16, 1)
    block = _block_width(width)
    blocks = {"BLOCK_OUT": min(128, block), "BLOCK_IN": min(settings.block_k, block), "BLOCK_ROWS": settings.block_rows}
    n_tiles = triton.cdiv(width, blocks["BLOCK_OUT"]) * triton.cdiv(width, blocks["BLOCK_IN"])
    at_once, in_a_split = MULTIPROCESSORS * (16 // settings.num_warps), n_nets * (n_modules - 1) * n_tiles
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
    """Those of the largest tile that leaves enough programs, or of the smallest."""
    _check(precision, width)
    *larger, smallest = SETTINGS[kernel, precision][width > 128]
    for settings in larger:
        n_programs = n_nets * triton.cdiv(n_rows, settings.rows)
        if enough(n_programs) if settings.tiles == 1 else n_programs >= MORE_THAN_A_ROUND:
            return settings
    return smallest


def _check(precision: str, width: int) -> None:
    check_precision(precision)
    if not 1 <= width <= MAX_TRITON_WIDTH:
        raise ValueError(f"triton: expected a module width D of 1..{MAX_TRITON_WIDTH}, got {width}")


def _options(settings: Settings) -> dict[str, Any]:
    return {
        "num_warps": settings.num_warps,
        "num_stages": settings.num_stages,
        "maxnreg": settings.max_registers,
    } | FUSED


def _block_width(width: int) -> int:
    """D as a block: a power of two, at least the 16 that a product takes."""
    return max(16, triton.next_power_of_2(width))
