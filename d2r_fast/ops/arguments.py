"""What every operation asks of its arguments before it looks at their shapes."""

from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["float", "integer"]


def is_integer(dtype: torch.dtype) -> bool:
    """Whole numbers, of which bool is none."""
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def require_tensor(name: str, value: Any, kind: Kind) -> None:
    """TypeError unless `value` is a tensor; ValueError unless it is dense and of the kind."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got {value.layout}")
    if not (value.is_floating_point() if kind == "float" else is_integer(value.dtype)):
        raise ValueError(f"{name}: expected {'a float' if kind == 'float' else 'an integer'} dtype, got {value.dtype}")


def require_flag(name: str, value: Any) -> None:
    """TypeError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def under_autocast(tensor: Tensor) -> bool:
    """Whether torch.autocast is on for the tensor's device."""
    device = tensor.device.type
    return device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
