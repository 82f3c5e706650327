"""Arithmetic of one thread."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ptx.batch import Batch
from ptx.operands import Operands
from ptx.parser import Group, Immediate, Instruction, Register
from ptx.values import INTEGER, KINDS, WIDER, bf16_of, to_bfloat16


def flushing(compute: Callable) -> Callable:
    """With denormal operands and results as zeros of their sign (.ftz)."""

    def flushed(value: Any) -> Any:
        value = np.asarray(value)
        return np.where(np.abs(value) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), value), value)

    return lambda *operands: flushed(compute(*(flushed(operand) for operand in operands)))


def high_word(a: Any, b: Any) -> Any:
    """The upper 64 bits of a product of 64-bit numbers."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b = np.asarray(a, np.uint64), np.asarray(b, np.uint64)
    middle = (a >> half) * (b & low) + ((a & low) * (b & low) >> half)
    rest = (a & low) * (b >> half) + (middle & low)
    return (a >> half) * (b >> half) + (middle >> half) + (rest >> half)


class Arithmetic(Operands):
    """Integers, floats, predicates and conversions."""

    def op_add(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._binary(i, parts, np.add)

    def op_sub(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._binary(i, parts, np.subtract)

    def _binary(self, i: Instruction, parts: list[str], compute: Callable) -> Callable | None:
        kind = parts[-1]
        if set(parts[1:-1]) - {"rn", "ftz"} or kind not in KINDS or (parts[1:-1] and kind[0] != "f"):
            return None
        if "ftz" in parts:
            return self._plain(i, [kind, kind], flushing(compute), kind)
        return self._plain(i, [kind, kind], compute, kind)

    def op_mul(self, i: Instruction, parts: list[str]) -> Callable | None:
        kind = parts[-1]
        if kind[0] == "f":
            return self._binary(i, parts, np.multiply)
        if parts[1] == "lo":
            return self._plain(i, [kind, kind], np.multiply, kind)
        if parts[1:] == ["hi", "u64"]:
            return self._plain(i, [kind, kind], high_word, kind)
        wide = np.dtype(WIDER[INTEGER[kind]]) if INTEGER[kind] in WIDER else None
        if wide is None:
            return None
        if parts[1] == "wide":
            result = next(k for k, v in KINDS.items() if v == wide and k[0] == kind[0])
            return self._plain(i, [kind, kind], lambda a, b: a.astype(wide) * b.astype(wide), result)
        if parts[1] == "hi":
            shift = wide.type(8 * KINDS[kind].itemsize)
            return self._plain(i, [kind, kind], lambda a, b: (a.astype(wide) * b.astype(wide)) >> shift, kind)
        return None

    def op_mad(self, i: Instruction, parts: list[str]) -> Callable | None:
        kind = parts[-1]
        if parts[1] == "lo":
            return self._plain(i, [kind] * 3, lambda a, b, c: a * b + c, kind)
        if parts[1] == "wide" and INTEGER[kind] in WIDER:
            wide = np.dtype(WIDER[INTEGER[kind]])
            result = next(k for k, v in KINDS.items() if v == wide and k[0] == kind[0])
            return self._plain(i, [kind, kind, result], lambda a, b, c: a.astype(wide) * b.astype(wide) + c, result)
        return None

    def op_fma(self, i: Instruction, parts: list[str]) -> Callable | None:
        """The product is exact in float64; the sum is rounded to float64 first: rarely an ulp off."""
        kind = parts[-1]
        if parts[1] != "rn" or set(parts[2:-1]) - {"ftz"} or kind not in ("f32", "f64"):
            return None
        wide = np.float64 if kind == "f32" else np.longdouble

        def compute(a: Any, b: Any, c: Any) -> Any:
            return (np.asarray(a).astype(wide) * b + c).astype(KINDS[kind])

        return self._plain(i, [kind] * 3, flushing(compute) if "ftz" in parts else compute, kind)

    def op_sqrt(self, i: Instruction, parts: list[str]) -> Callable | None:
        kind = parts[-1]
        if parts[1:] == ["approx", "ftz", "f32"]:
            return self._plain(i, [kind], flushing(np.sqrt), kind)
        return self._plain(i, [kind], np.sqrt, kind) if parts[1:] == ["rn", "f64"] else None

    def op_neg(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._plain(i, [parts[-1]], np.negative, parts[-1]) if len(parts) == 2 else None

    def op_abs(self, i: Instruction, parts: list[str]) -> Callable | None:
        if parts[1:] == ["ftz", "f32"]:
            return self._plain(i, ["f32"], flushing(np.abs), "f32")
        return self._plain(i, [parts[-1]], np.abs, parts[-1]) if len(parts) == 2 else None

    def op_not(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._plain(i, [parts[-1]], np.invert, parts[-1])

    def op_and(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._plain(i, [parts[-1]] * 2, np.bitwise_and, parts[-1])

    def op_or(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._plain(i, [parts[-1]] * 2, np.bitwise_or, parts[-1])

    def op_xor(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._plain(i, [parts[-1]] * 2, np.bitwise_xor, parts[-1])

    def op_min(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._extreme(i, parts, np.minimum, np.fmin)

    def op_max(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._extreme(i, parts, np.maximum, np.fmax)

    def _extreme(self, i: Instruction, parts: list[str], with_nan: Callable, without: Callable) -> Callable | None:
        kind = parts[-1]
        if set(parts[1:-1]) - {"NaN"}:
            return None
        return self._plain(i, [kind] * 2, with_nan if kind[0] != "f" or "NaN" in parts else without, kind)

    def op_shl(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._shift(i, parts, np.left_shift)

    def op_shr(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._shift(i, parts, np.right_shift)

    def _shift(self, i: Instruction, parts: list[str], compute: Callable) -> Callable | None:
        kind = parts[-1]
        dtype, bits = KINDS[kind], 8 * KINDS[kind].itemsize
        keeps_sign = kind[0] == "s" and compute is np.right_shift

        def shift(a: Any, b: Any) -> Any:
            most = np.minimum(b, bits - 1).astype(dtype)
            shifted = compute(a, most)
            return shifted if keeps_sign else np.where(b >= bits, dtype.type(0), shifted)

        return self._plain(i, [kind, "u32"], shift, kind)

    def op_shf(self, i: Instruction, parts: list[str]) -> Callable | None:
        if parts[-1] != "b32" or parts[2] not in ("wrap", "clamp"):
            return None
        wraps, left = parts[2] == "wrap", parts[1] == "l"

        def shift(a: Any, b: Any, c: Any) -> Any:
            n = (c & 31 if wraps else np.minimum(c, 32)).astype(np.uint64)
            both = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | a
            return (both << n) >> np.uint64(32) if left else both >> n

        return self._plain(i, ["b32"] * 3, shift, "b32")

    def op_bfe(self, i: Instruction, parts: list[str]) -> Callable | None:
        kind = parts[-1]
        if kind not in ("u32", "s32") or not all(isinstance(o, Immediate) for o in i.operands[2:]):
            return None
        start, length = (o.bits & 255 for o in i.operands[2:])
        if length == 0 or start + length > 32:
            return None
        read, put = self.read(i.operands[1], kind), self.write(i.operands[0], kind)
        kind_of = KINDS[kind].type
        left, right = kind_of(32 - start - length), kind_of(32 - length)
        return lambda s, at: put(s, at, (read(s, at) << left) >> right)

    def op_prmt(self, i: Instruction, parts: list[str]) -> Callable | None:
        if parts != ["prmt", "b32"]:
            return None
        byte, low, high = np.uint32(255), np.uint32(3), np.uint32(128)

        def permute(a: Any, b: Any, mode: Any) -> Any:
            total = np.uint32(0)
            for n in range(4):
                selector = (mode >> np.uint32(4 * n)) & np.uint32(15)
                value = np.where(selector & np.uint32(4), b, a) >> ((selector & low) << low) & byte
                signs = np.where(value & high, byte, np.uint32(0))
                total = total | (np.where(selector & np.uint32(8), signs, value) << np.uint32(8 * n))
            return total

        return self._plain(i, ["b32"] * 3, permute, "b32")

    def op_popc(self, i: Instruction, parts: list[str]) -> Callable | None:
        return self._plain(i, [parts[-1]], lambda a: np.bitwise_count(a).astype(np.uint32), "u32")

    def op_clz(self, i: Instruction, parts: list[str]) -> Callable | None:
        if parts != ["clz", "b32"]:
            return None
        return self._plain(
            i, ["b32"], lambda a: (32 - np.ceil(np.log2(a.astype(np.float64) + 1))).astype(np.uint32), "u32"
        )

    def op_rem(self, i: Instruction, parts: list[str]) -> Callable | None:
        kind = parts[-1]
        compute = np.fmod if kind[0] == "s" else np.remainder
        return self._plain(i, [kind] * 2, compute, kind) if kind in INTEGER else None

    def op_div(self, i: Instruction, parts: list[str]) -> Callable | None:
        kind = parts[-1]
        if kind[0] == "u":
            return self._plain(i, [kind] * 2, np.floor_divide, kind)
        if kind[0] == "s":
            towards_zero = lambda a, b: (np.abs(a) // np.abs(b)) * (np.sign(a) * np.sign(b))  # noqa: E731
            return self._plain(i, [kind] * 2, towards_zero, kind)
        if parts[1:] == ["rn", "f64"]:
            return self._plain(i, [kind] * 2, np.divide, kind)
        if parts[1:] in (["full", "f32"], ["rn", "f32"], ["approx", "f32"]):
            return self._plain(i, [kind] * 2, np.divide, kind)
        return None

    def op_ex2(self, i: Instruction, parts: list[str]) -> Callable | None:
        wide = np.float64
        if parts != ["ex2", "approx", "f32"]:
            return None
        return self._plain(i, ["f32"], lambda a: np.exp2(a.astype(wide)), "f32")

    def op_selp(self, i: Instruction, parts: list[str]) -> Callable | None:
        kind = parts[-1]
        return self._plain(i, [kind, kind, "pred"], lambda a, b, p: np.where(p, a, b), kind)

    def op_setp(self, i: Instruction, parts: list[str]) -> Callable | None:
        if len(parts) != 3 or not isinstance(i.operands[0], Register | Group):
            return None
        test, kind = parts[1:]
        in_halves = kind == "bf16x2"
        if in_halves != isinstance(i.operands[0], Group):
            return None
        nan = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
        tests: dict[str, Callable] = {
            "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
            "ge": np.greater_equal,
        }  # fmt: skip
        if kind[0] == "f" or in_halves:
            floats = {name + "u": lambda a, b, f=f: f(a, b) | nan(a, b) for name, f in tests.items()}
            tests = tests | floats | {"num": lambda a, b: ~nan(a, b), "nan": nan}
            tests["ne"] = lambda a, b: np.not_equal(a, b) & ~nan(a, b)
        if test not in tests:
            return None
        if in_halves:
            return self._of_halves(i, tests[test])
        return self._plain(i, [kind, kind], tests[test], "pred")

    def _of_halves(self, i: Instruction, test: Callable) -> Callable:
        """Two predicates, of the lower and the upper halves of two registers."""
        pair: Any = i.operands[0]
        puts = [self.write(operand, "pred") for operand in pair.parts]
        a, b = (self.read(operand, "b32") for operand in i.operands[1:])

        def both(s: Batch, at: Any) -> None:
            left, right = np.asarray(a(s, at)), np.asarray(b(s, at))
            for half, put in enumerate(puts):
                put(s, at, test(bf16_of(left, half), bf16_of(right, half)))

        return both

    def op_cvt(self, i: Instruction, parts: list[str]) -> Callable | None:
        target, source, modifiers = parts[-2], parts[-1], parts[1:-2]
        if target in INTEGER and source in INTEGER and not modifiers:
            return self._plain(i, [source], lambda a: np.asarray(a).astype(KINDS[target]), target)
        if modifiers == ["rn"] and target == "f32" and source in ("u32", "s32", "s64", "u64"):
            return self._plain(i, [source], lambda a: np.asarray(a).astype(np.float32), target)
        if modifiers == ["rn"] and (target, source) in (("f32", "f64"), ("f64", "s64"), ("f64", "s32")):
            return self._plain(i, [source], lambda a: np.asarray(a).astype(KINDS[target]), target)
        if modifiers == ["rzi"] and (target, source) == ("s64", "f64"):
            return self._plain(i, ["f64"], lambda a: np.nan_to_num(np.trunc(a)).clip(-(2.0**63), 2.0**63 - 1024), "s64")
        if parts[1:] == ["rn", "bf16", "f32"]:
            return self._plain(i, ["f32"], to_bfloat16, "b16")
        if parts[1:] == ["rn", "bf16x2", "f32"]:
            both = lambda a, b: (to_bfloat16(a).astype(np.uint32) << np.uint32(16)) | to_bfloat16(b)  # noqa: E731
            return self._plain(i, ["f32", "f32"], both, "b32")
        if parts[1:] == ["f32", "bf16"]:
            return self._plain(i, ["b16"], lambda a: (a.astype(np.uint32) << np.uint32(16)).view(np.float32), "f32")
        if parts[1:] in (["rna", "tf32", "f32"], ["rn", "tf32", "f32"]):
            half = np.uint32(0x1000)
            return self._plain(i, ["b32"], lambda a: (a + half) & np.uint32(0xFFFFE000), "b32")
        if modifiers == ["rzi"] and target == "s32" and source == "f32":
            return self._plain(i, ["f32"], lambda a: np.nan_to_num(np.trunc(a)).clip(-(2.0**31), 2.0**31 - 1), "s32")
        return None
