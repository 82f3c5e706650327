"""An instruction's operands as functions over threads; what the handlers of instructions share."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ptx.batch import GLOBAL_BASE, PARAMETER_BASE, SHARED_BASE, Batch
from ptx.memory import EmulationError, Memory
from ptx.parser import Address, Immediate, Instruction, Register, Special, Symbol
from ptx.values import KINDS, canonical


class Operands:
    """Reads and writes registers, and finds addresses, of one launch's program."""

    def __init__(self, launch: Any):
        self.launch, self.program = launch, launch.program

    def parameter_at(self, name: str) -> int:
        """The address of a parameter."""
        return PARAMETER_BASE + 8 * list(self.launch.arguments).index(name)

    def _refuse(self, i: Instruction) -> None:
        raise EmulationError(f"not supported: {self.program.describe(i.line)}")

    def read(self, operand: Any, kind: str) -> Callable:
        """A function of (batch, threads) to values of the type `kind`, an array or a scalar of its NumPy type."""
        dtype = KINDS[kind]
        if isinstance(operand, Register):
            width = self.program.registers[operand.kind][0]
            prefix, number = operand.kind, operand.number
            if width == dtype.itemsize or (width == 0 and kind == "pred"):
                return lambda s, at: s.registers[prefix][dtype][number][at]
            if width > dtype.itemsize and dtype.kind in "ui" and kind != "pred":
                raw = np.dtype(f"u{width}")
                return lambda s, at: s.registers[prefix][raw][number][at].astype(f"u{dtype.itemsize}").view(dtype)
            raise EmulationError(f"register %{prefix}{number} read as {kind}")
        if isinstance(operand, Special):
            if dtype.itemsize != 4:
                raise EmulationError(f"special register {operand} read as {kind}")
            key = (operand.name, operand.axis)
            return lambda s, at: s.special[key][at].view(dtype)
        if isinstance(operand, Symbol):
            if operand.name != "global_smem" and operand.name not in self.launch.arguments:
                raise EmulationError(f"unknown symbol {operand.name}")
            value = dtype.type(SHARED_BASE if operand.name == "global_smem" else self.parameter_at(operand.name))
            return lambda s, at: value
        if isinstance(operand, Immediate):
            if kind == "pred":
                constant: Any = np.bool_(operand.bits != 0)
            else:
                mask = (1 << 8 * dtype.itemsize) - 1
                constant = np.array([operand.bits & mask], np.dtype(f"u{dtype.itemsize}")).view(dtype)[0]
            return lambda s, at: constant
        raise EmulationError(f"operand {operand} read as {kind}")

    def write(self, operand: Any, kind: str) -> Callable:
        """A function of (batch, threads, values). Narrower values are extended, by their sign if they have one."""
        dtype = KINDS[kind]
        if operand == Symbol("_"):  # a part that nobody wants
            return lambda s, at, values: None
        if not isinstance(operand, Register):
            raise EmulationError(f"cannot write to {operand}")
        prefix, number = operand.kind, operand.number
        width = self.program.registers[prefix][0]
        if width == dtype.itemsize or kind == "pred":
            target = dtype
        elif width > dtype.itemsize and dtype.kind in "ui":
            target = np.dtype(f"{dtype.kind}{width}")
        else:
            raise EmulationError(f"register %{prefix}{number} written as {kind}")

        def put(s: Batch, at: Any, values: Any) -> None:
            s.registers[prefix][target][number][at] = values

        return put

    def _plain(self, i: Instruction, kinds: list[str], compute: Callable, result: str) -> Callable:
        """d = compute(a, b, ...)"""
        put = self.write(i.operands[0], result)
        sources = [self.read(o, k) for o, k in zip(i.operands[1:], kinds, strict=True)]
        dtype = KINDS[result]
        if result == "f32" and i.opcode.split(".")[0] not in ("mov", "selp", "neg", "abs"):
            return lambda s, at: put(s, at, canonical(compute(*(read(s, at) for read in sources))))
        if len(sources) == 1:
            (a,) = sources
            return lambda s, at: put(s, at, compute(a(s, at)))
        if len(sources) == 2:
            a, b = sources

            def two(s: Batch, at: Any) -> None:
                put(s, at, compute(a(s, at), b(s, at)).astype(dtype, copy=False))

            return two
        return lambda s, at: put(s, at, compute(*(read(s, at) for read in sources)).astype(dtype, copy=False))

    def _locate(self, i: Instruction, address: Address, space: str, width: int) -> Callable:
        """A function of (batch, threads) to (memory, byte offsets), after the check that all of it may be accessed."""
        describe, launch, program = self.program.describe, self.launch, self.program
        wide = "b64" if space == "global" else "b32"
        base, more, line = self.read(address.base, wide), address.offset, i.line

        def stray(s: Batch, at: Any, offset: Any, bad: Any, why: str, name: str) -> None:
            n = int(np.flatnonzero(bad)[0])
            position = s.position[at][n] if np.ndim(bad) else s.position[at][0]
            raise EmulationError(
                f"{why}: {describe(line)}: {space} address of {width} bytes at {name}, "
                f"CTA {s.cta[position]} thread {s.tid[position]} ({int(np.sum(bad))} threads)"
            )

        def locate_global(s: Batch, at: Any) -> tuple[Memory, Any]:
            offset = np.asarray(base(s, at)).view(np.int64) + (more - GLOBAL_BASE)
            offset = np.broadcast_to(offset, s.position[at].shape)
            memory = launch.memory
            bad = (offset < 0) | (offset > memory.size - width)
            if not bad.any():
                first = memory.owner[offset]
                bad = (first == 0) | (first != memory.owner[offset + (width - 1)])
            if bad.any():
                where = int(offset[np.flatnonzero(bad)[0]])
                stray(s, at, offset, bad, "out of bounds", memory.name_of(where))
            if (offset % width).any():
                stray(s, at, offset, offset % width != 0, "misaligned", memory.name_of(int(offset[0])))
            return memory, offset

        def locate_shared(s: Batch, at: Any) -> tuple[Memory, Any]:
            inside = np.asarray(base(s, at)).astype(np.int64) + more
            inside = np.broadcast_to(inside, s.position[at].shape)
            bad = (inside < SHARED_BASE) | (inside + width > SHARED_BASE + launch.shared_bytes)
            if bad.any():
                where = int(inside[np.flatnonzero(bad)[0]]) - SHARED_BASE
                stray(s, at, inside, bad, "out of bounds", f"byte {where} of {launch.shared_bytes}")
            if (inside % width).any():
                stray(s, at, inside, inside % width != 0, "misaligned", f"byte {int(inside[0]) - SHARED_BASE}")
            return s.shared, inside + s.shared_start[at]

        assert program is self.program
        return locate_global if space == "global" else locate_shared
