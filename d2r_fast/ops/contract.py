"""Where an operation's schema stands, once; what runs it hangs behind its name, by device.

The C++ library registers its kernels for the CPU under the same names (csrc/library.cpp). Where it is missing, and on a
GPU where no kernel of ours takes over, the reference in plain PyTorch runs.
"""

from collections.abc import Callable
from typing import Any

import torch

from d2r_fast.ops.cpp import library

LIBRARY = torch.library.Library("d2r_fast", "FRAGMENT")


def define(
    schema: str, reference: Callable[..., Any], fake: Callable[..., Any], cuda: Callable[..., Any] | None = None
) -> Any:
    """Define `schema` in namespace d2r_fast; returns the operation.

    reference  runs where nothing faster does, on any device
    fake       the results' shapes and dtypes, without computing
    cuda       what runs on a GPU instead of the reference
    """
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if not library.is_ready():
        LIBRARY.impl(name, reference, "CPU")
    LIBRARY.impl(name, cuda or reference, "CUDA")
    torch.library.register_fake(f"d2r_fast::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.d2r_fast, name).default
