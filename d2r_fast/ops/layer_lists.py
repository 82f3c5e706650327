"""Lists of layers, weight and bias of each, as operations of several layers take them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2r_fast.ops.arguments import require_tensor, under_autocast


def require_layers(parameters: Sequence[Tensor], weight_dims: tuple[int, ...]) -> None:
    """TypeError, ValueError: not dense float tensors, two a layer, the first a weight of one or more numbers a network
    with as many axes as one of `weight_dims`."""
    if not hasattr(parameters, "__getitem__") or isinstance(parameters, Tensor | dict):
        raise TypeError(f"parameters: expected a sequence of tensors, got {type(parameters).__name__}")
    for i, parameter in enumerate(parameters):
        require_tensor(f"parameters[{i}]", parameter, "float")
    fits = len(parameters) >= 2 and len(parameters) % 2 == 0 and parameters[0].dim() in weight_dims
    if not fits or 0 in parameters[0].shape[1:]:
        raise ValueError(
            f"parameters: expected weight and bias of every layer, the first weight with "
            f"{' or '.join(map(str, weight_dims))} axes, got shapes {[list(p.shape) for p in parameters]}"
        )


def require_like(name: str, value: Tensor, shape: list[int], like: Tensor) -> None:
    """ValueError: not of that shape, or of another dtype or device than `like`."""
    if list(value.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {list(value.shape)}")
    # Autocast brings these to one dtype, and leaves float64 alone.
    mixed = under_autocast(like) and torch.float64 not in (like.dtype, value.dtype)
    if value.dtype != like.dtype and not mixed:
        raise ValueError(f"{name}: expected {like.dtype}, got {value.dtype}")
    if value.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {value.device}")


def gradients_like(parameters: Sequence[Tensor], wanted: bool) -> list[Tensor]:
    """Fresh memory for the gradient of each; none unless wanted."""
    return [p.new_empty(p.shape) for p in parameters] if wanted else []
