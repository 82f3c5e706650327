"""The library that setup.py builds from csrc/."""

import ctypes
import hashlib
from functools import lru_cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).parents[2] / "_cpu.so"
SOURCES = Path(__file__).parents[3] / "csrc"
"""Where they lie in a checkout; an installed package has none."""
MAX_WIDTH = 1024
MEND = (
    "install a C++20 compiler (g++ or clang++), then this package again, in its checkout: "
    "pip install -v --force-reinstall --no-deps ."
)


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library with its operations registered, or why there is none."""
    if not LIBRARY.is_file():
        return None, f"not built: {MEND}"
    if not _is_of_these_sources():
        return None, f"built from other sources than those in {SOURCES}: {MEND}"
    try:
        torch.ops.load_library(str(LIBRARY))
        library = ctypes.CDLL(str(LIBRARY))
        library.d2r_fast_isa.restype = ctypes.c_char_p
    except OSError as error:
        return None, f"built for another torch or machine ({error}): {MEND}"
    return library, ""


def _is_of_these_sources() -> bool:
    """Whether the library is what a checkout's csrc/ builds; an installed package's came with it.

    One from before an update would take other arguments than this Python gives, and read past them.
    """
    if not (SOURCES / "library.cpp").is_file():
        return True
    return f"d2r_fast sources {hash_of_sources(SOURCES)}".encode() in LIBRARY.read_bytes()


def hash_of_sources(folder: Path) -> str:
    """As csrc/CMakeLists.txt makes it."""
    paths = [*folder.glob("*.cpp"), *folder.glob("*.h"), folder / "CMakeLists.txt"]
    hashes = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in paths)
    return hashlib.sha256(";".join(hashes).encode()).hexdigest()


def is_ready() -> bool:
    """Whether the library is there, with kernels behind the names of `d2r_fast.ops.contract`."""
    return _load()[0] is not None


def require() -> ctypes.CDLL:
    """The library. ValueError: the backend cannot be used, and why."""
    library, why = _load()
    if library is None:
        raise ValueError(f"backend cpp: {why}")
    return library


def instruction_sets() -> list[str]:
    """Those the library has kernels for and this processor runs, the fastest (the default) first."""
    library, _ = _load()
    names: list[str] = []
    while library is not None and (name := library.d2r_fast_isa(len(names))) is not None:
        names.append(name.decode())
    return names


def use_instruction_set(name: str) -> None:
    """Run on `name`, one of `instruction_sets()`, from now on: what tests compare and benchmarks measure."""
    library = require()
    if name not in instruction_sets():
        raise ValueError(f"instruction set: expected one of {', '.join(instruction_sets())}, got {name!r}")
    library.d2r_fast_use_isa(instruction_sets().index(name))


def state() -> str:
    """ "ready" with the instruction set, or why the backend cannot be used."""
    library, why = _load()
    return f"ready ({instruction_sets()[0]})" if library is not None else why


def has_bf16_products() -> bool:
    """Whether this processor multiplies bf16 by itself, faster than float32; others make the same products slower."""
    return "avx512bf16" in instruction_sets()
