"""A saved state is checked before it is taken over: a ValueError says what was expected and what came."""

import reprlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def describe(value: Any) -> str:
    """A value in an error message: its type, and what it is as far as that is short."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return f"{type(value).__name__} {reprlib.repr(value)}"


def field(state: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """`state[name]`, whose type must be one of `kinds`. ValueError: it is missing, or of another type."""
    expected = " or ".join("nothing" if kind is type(None) else kind.__name__ for kind in kinds)
    if name not in state:
        raise ValueError(f"{name}: expected {expected}, but it is missing")
    if not any(type(state[name]) is kind or (kind is dict and isinstance(state[name], dict)) for kind in kinds):
        raise ValueError(f"{name}: expected {expected}, got {describe(state[name])}")
    return state[name]


def count(state: Mapping[str, Any], name: str) -> int:
    """`state[name]`, which must be an integer from 0 on. ValueError: it is not."""
    value: int = field(state, name, int)
    if not 0 <= value < 2**62:
        raise ValueError(f"{name}: expected a count from 0 on, got {reprlib.repr(value)}")
    return value


def check_tensor(value: Any, name: str, like: Tensor, shape: tuple[int, ...] | None = None) -> None:
    """ValueError unless `value` is a plain tensor with the dtype of `like` and its shape (or `shape`)."""
    wanted = list(like.shape if shape is None else shape)
    if (
        not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.dtype != like.dtype
        or list(value.shape) != wanted
    ):
        dtype = str(like.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: expected {dtype} {wanted}, got {describe(value)}")


def check_tensors(values: Any, name: str, like: Mapping[str, Tensor]) -> None:
    """ValueError unless `values` has the tensors of `like`, no more, each of its shape and dtype."""
    if not isinstance(values, dict):
        raise ValueError(f"{name}: expected {len(like)} tensors, got {describe(values)}")
    for key in [*like, *values]:
        if key not in values or key not in like:
            raise ValueError(f"{name}: {'unexpected' if key in values else 'missing'} {reprlib.repr(key)}")
        check_tensor(values[key], f"{name}[{key!r}]", like[key])
