"""Which implementation of the operations runs: asked for, or the fastest that can.

reference  plain PyTorch, any device and dtype; computes every module for every row; what the others are held against
cpp        C++ on the CPU, float32 and float64; skips what a row does not need
triton     Triton on a CUDA GPU, float32; skips what a tile of rows does not need

Precisions, of the operands of matrix products; sums, weights and everything else stay float32:

float32    as they are
tf32       may be rounded to 10 bits, where a GPU multiplies those faster; elsewhere as they are
bf16       rounded to bfloat16, to nearest even, on every backend and processor: the same numbers everywhere, up to the
           rounding of sums
"""

import os
import warnings
from functools import lru_cache
from importlib import util
from typing import Literal

import torch
from torch import Tensor

from d2r_fast.ops.cpp import library

Backend = Literal["auto", "reference", "cpp", "triton"]
Precision = Literal["float32", "tf32", "bf16"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "cpp", "triton")
MAX_TRITON_WIDTH = 256  # past that a tile's rows no longer fit the registers
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bf16")


# Looked up at import: a torch.compile that traces through the choice can read a dictionary, but not a file system.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton's kernels run in its interpreter, on CPU tensors: to check them, not to train."""
STATE = {
    "reference": "ready",
    "cpp": library.state(),
    "triton": "ready" if util.find_spec("triton") else "needs the package triton, which is not installed",
}


def availability() -> dict[str, str]:
    """Every backend: "ready" (with what it found), or why it cannot be used here."""
    triton = STATE["triton"]
    if triton == "ready" and INTERPRETED:
        triton = "ready (interpreted, on the CPU: to check, not to run)"
    elif triton == "ready" and not torch.cuda.is_available():
        triton = "needs a CUDA GPU, torch finds none"
    elif triton == "ready":
        triton = f"ready ({torch.cuda.get_device_name()})"
    return STATE | {"triton": triton}


def choose_backend(backend: str, tensor: Tensor, width: int = 0, precision: str = "float32") -> str:
    """The backend for operations on `tensor`; `width` is D where modules run.

    "auto" takes the fastest that can; another name is taken or refused. ValueError: no such backend, or it cannot run
    here, or not on this device, dtype, width or precision; the message says why.
    """
    device, dtype = tensor.device.type, tensor.dtype
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    name = backend if backend != "auto" else "cpp" if device == "cpu" else "triton"
    on: str
    dtypes: tuple[torch.dtype, ...]
    if name == "cpp":
        on, dtypes, widest = "cpu", (torch.float32, torch.float64), library.MAX_WIDTH
    elif INTERPRETED:
        on, dtypes, widest = "cpu", (torch.float32, torch.float64), MAX_TRITON_WIDTH
    else:
        on, dtypes, widest = "cuda", (torch.float32,), MAX_TRITON_WIDTH
    if device != on:
        why = f"expected tensors on {on}, got {device}"
    elif dtype not in dtypes:
        why = f"expected {' or '.join(str(d) for d in dtypes)}, got {dtype}"
    elif precision == "bf16" and dtype != torch.float32:
        why = f"expected torch.float32 for bf16 products, got {dtype}"
    elif width > widest:
        why = f"expected a width of at most {widest}, got {width}"
    elif name == "triton" and INTERPRETED and torch.compiler.is_compiling():
        why = "its interpreter cannot be compiled"
    elif not STATE[name].startswith("ready"):
        why = STATE[name]
        if backend == "auto" and name == "cpp" and not torch.compiler.is_compiling():  # where a warning cannot be given
            _warn_of_the_slow_path(why)
    else:
        return name
    if backend == "auto":
        return "reference"
    raise ValueError(f"backend {backend}: {why}")


@lru_cache(maxsize=1)  # once a process
def _warn_of_the_slow_path(why: str) -> None:
    warnings.warn(f"the slow reference runs on this CPU, for the C++ kernels are {why}", RuntimeWarning, stacklevel=3)


def check_precision(precision: str) -> None:
    """ValueError unless `precision` is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
