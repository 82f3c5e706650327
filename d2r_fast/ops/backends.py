"""Which implementation of the operations runs: asked for, or the fastest that can.

reference  plain PyTorch, any device and dtype; computes every module for every row; what the others are held against
cpp        C++ on the CPU, float32 and float64; skips what a row does not need
triton     Triton on a CUDA GPU, float32; skips what a tile of rows does not need
"""

import os
from functools import lru_cache
from importlib import import_module, util
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from d2r_fast.ops.cpp import library

Backend = Literal["auto", "reference", "cpp", "triton"]
Precision = Literal["float32", "tf32", "bf16"]
BACKENDS: tuple[Backend, ...] = ("auto", "reference", "cpp", "triton")
MAX_TRITON_WIDTH = 256  # past that a tile's rows no longer fit the registers
PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bf16")


def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def availability() -> dict[str, str]:
    """Every backend: "ready" (with what it found), or why it cannot be used here."""
    if not torch.cuda.is_available() and not _interpreted():
        triton = "needs a CUDA GPU, torch finds none"
    elif util.find_spec("triton") is None:
        triton = "needs the package triton, which is not installed"
    elif _interpreted():
        triton = "ready (interpreted, on the CPU: to check, not to run)"
    elif torch.cuda.get_device_capability() < (8, 0):
        triton = "needs a GPU of compute capability 8.0 or newer"
    else:
        triton = f"ready ({torch.cuda.get_device_name()})"
    return {"reference": "ready", "cpp": library.state(), "triton": triton}


# Constant for torch.compile: the answer depends on the tensor's device and dtype only, both of which it guards.
@torch.compiler.assume_constant_result
def _choose(backend: str, device: str, dtype: torch.dtype, width: int) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return backend
    name = backend if backend != "auto" else "cpp" if device == "cpu" else "triton"
    limits = {
        "cpp": ("cpu", (torch.float32, torch.float64), library.MAX_WIDTH),
        "triton": ("cuda", (torch.float32,), MAX_TRITON_WIDTH),
    }
    if _interpreted():
        limits["triton"] = ("cpu", (torch.float32, torch.float64), MAX_TRITON_WIDTH)
    on, dtypes, widest = limits[name]
    if device != on:
        why = f"expected tensors on {on}, got {device}"
    elif dtype not in dtypes:
        why = f"expected {' or '.join(str(d) for d in dtypes)}, got {dtype}"
    elif width > widest:
        why = f"expected a width of at most {widest}, got {width}"
    elif not availability()[name].startswith("ready"):
        why = availability()[name]
    else:
        return name
    if backend == "auto":
        return "reference"
    raise ValueError(f"backend {backend}: {why}")


def choose_backend(backend: str, tensor: Tensor, width: int = 0) -> str:
    """The backend for operations on `tensor`; `width` is D where modules run.

    "auto" takes the fastest that can; another name is taken or refused. ValueError: no such backend, or it cannot run
    here, or not on this device, dtype or width; the message says why.
    """
    return _choose(backend, tensor.device.type, tensor.dtype, width)


def check_precision(precision: str) -> None:
    """ValueError unless `precision` is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")


def kernels(backend: str, op: str) -> ModuleType:
    """The module with `forward` and `backward` of an operation. Triton is imported only where it runs."""
    package = {"cpp": "d2r_fast.ops.cpp", "triton": "d2r_fast.kernels"}[backend]
    return import_module(f"{package}.{op}")
