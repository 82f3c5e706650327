"""Types of PTX as NumPy has them, and how a device rounds."""

from typing import Any

import numpy as np

INTEGER = {
    "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "b32": "u4", "u32": "u4", "s32": "i4",
    "b64": "u8", "u64": "u8", "s64": "i8",
}  # fmt: skip
KINDS = {name: np.dtype(code) for name, code in INTEGER.items()} | {
    "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool), "bf16": np.dtype("u2"),
    "bf16x2": np.dtype("u4"), "f16": np.dtype("u2"),
}  # fmt: skip
WIDER = {"u1": "u2", "u2": "u4", "u4": "u8", "i1": "i2", "i2": "i4", "i4": "i8"}
CANONICAL_NAN = np.array([0x7FFFFFFF], np.uint32).view(np.float32)[0]
LANES = np.arange(32)


def full(values: Any, n: int, width: int = 32) -> Any:
    """Per-lane values, [warps, lanes], also where all lanes share one."""
    return np.broadcast_to(values, (n * width,)).reshape(n, width)


def canonical(values: Any) -> Any:
    """Rounded to float32; every NaN that arithmetic makes is the same one, as on the device."""
    values = np.asarray(values, np.float32)
    nan = values != values
    if nan.any():
        values = np.where(nan, CANONICAL_NAN, values)
    return values


def tf32_of(bits: Any) -> Any:
    """What a tensor core takes of a float32: the low 13 bits are dropped."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def bf16_of(bits: Any, half: int) -> Any:
    part = bits & np.uint32(0xFFFF0000) if half else bits << np.uint32(16)
    return part.view(np.float32).astype(np.float64)


def left_operand(registers: list[Any], n: int, kind: str) -> Any:
    """A of one product from the four registers of every lane: [warps, 16, 8 (tf32) or 16 (bf16)]."""
    row, pair = LANES // 4, LANES % 4
    left = np.empty((n, 16, 8 if kind == "tf32" else 16))
    for r, values in enumerate(registers):
        bits = np.ascontiguousarray(full(values, n))
        if kind == "tf32":
            left[:, row + 8 * (r % 2), pair + 4 * (r // 2)] = tf32_of(bits)
        else:
            for half in range(2):
                left[:, row + 8 * (r % 2), pair * 2 + half + 8 * (r // 2)] = bf16_of(bits, half)
    return left


def to_bfloat16(value: Any) -> Any:
    """Rounded to nearest, ties to even; a NaN becomes the canonical one."""
    bits = np.ascontiguousarray(value).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)
