"""Moves, loads and stores."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx.batch import Batch
from ptx.memory import EmulationError
from ptx.operands import Operands
from ptx.parser import Address, Group, Instruction, Register
from ptx.values import KINDS


class Moves(Operands):
    """`mov`, `ld`, `st`."""

    def op_mov(self, i: Instruction, parts: list[str]) -> Callable | None:
        kind = parts[-1]
        target, source = i.operands
        if len(parts) != 2 or kind not in KINDS:
            return None
        if isinstance(source, Group) or isinstance(target, Group):
            group = source if isinstance(source, Group) else target
            part = {("b32", 2): "b16", ("b64", 2): "b32", ("b64", 4): "b16"}.get((kind, len(group.parts)))
            if part is None:
                return None
            bits, whole = 8 * KINDS[part].itemsize, KINDS[kind].type
            if isinstance(source, Group):
                reads, put = [self.read(o, part) for o in source.parts], self.write(target, kind)

                def pack(s: Batch, at: Any) -> None:
                    total = whole(0)
                    for n, read in enumerate(reads):
                        total = total | (np.asarray(read(s, at)).astype(whole) << whole(n * bits))
                    put(s, at, total)

                return pack
            read, puts = self.read(source, kind), [self.write(o, part) for o in target.parts]

            def unpack(s: Batch, at: Any) -> None:
                value = np.array(read(s, at))
                for n, put in enumerate(puts):
                    put(s, at, (value >> whole(n * bits)).astype(KINDS[part]))

            return unpack
        return self._plain(i, [kind], lambda a: a, kind)

    def op_ld(self, i: Instruction, parts: list[str]) -> Callable | None:
        if parts[1] == "param":
            put, address, kind = self.write(i.operands[0], parts[-1]), i.operands[1], parts[-1]
            dtype = KINDS[kind]
            if isinstance(address.base, Register):
                return self._any_parameter(i, address, put, dtype)
            value = self.launch.arguments[address.base.name] >> (8 * address.offset)
            constant = np.array([value & ((1 << 8 * dtype.itemsize) - 1)], f"u{dtype.itemsize}").view(dtype)[0]
            return lambda s, at: put(s, at, constant)
        space, vector, kind = self._access(parts)
        if space is None:
            return None
        targets = i.operands[0].parts if isinstance(i.operands[0], Group) else (i.operands[0],)
        if len(targets) != vector or len(i.operands) > 3:  # a third operand is a cache policy
            return None
        puts, element = [self.write(o, kind) for o in targets], KINDS[kind].itemsize
        locate, line, used = self._locate(i, i.operands[1], space, element * vector), i.line, i.used_bytes
        dtype = KINDS[kind]

        def load(s: Batch, at: Any) -> None:
            memory, offset = locate(s, at)
            values = memory.load(offset, element, vector, s.who(at), line, used)
            for put, value in zip(puts, values, strict=True):
                put(s, at, value.view(dtype))

        return load

    def _any_parameter(self, i: Instruction, address: Address, put: Callable, dtype: np.dtype) -> Callable:
        """A parameter whose address was chosen by the program."""
        base = self.read(address.base, "b32")
        values = {self.parameter_at(name): value for name, value in self.launch.arguments.items()}

        def load(s: Batch, at: Any) -> None:
            places = np.asarray(base(s, at)).astype(np.int64) + address.offset
            unknown = set(np.unique(places)) - set(values)
            if unknown or dtype.itemsize != 8:
                raise EmulationError(f"no parameter at {sorted(unknown)}: {self.program.describe(i.line)}")
            table = {place: np.array([values[place]], np.uint64).view(dtype)[0] for place in np.unique(places)}
            put(s, at, np.array([table[place] for place in places], dtype))

        return load

    def op_st(self, i: Instruction, parts: list[str]) -> Callable | None:
        space, vector, kind = self._access(parts)
        if space is None:
            return None
        sources = i.operands[1].parts if isinstance(i.operands[1], Group) else (i.operands[1],)
        if len(sources) != vector or len(i.operands) != 2:
            return None
        raw = {1: "b8", 2: "b16", 4: "b32", 8: "b64"}[KINDS[kind].itemsize]
        reads, element = [self.read(o, raw) for o in sources], KINDS[kind].itemsize
        locate, line = self._locate(i, i.operands[0], space, element * vector), i.line

        def store(s: Batch, at: Any) -> None:
            memory, offset = locate(s, at)
            values = np.empty((vector, len(offset)), KINDS[raw])
            for n, read in enumerate(reads):
                values[n] = read(s, at)
            memory.store(offset, element, values, s.who(at), line)

        return store

    def _access(self, parts: list[str]) -> tuple[str | None, int, str]:
        """Space, vector length and type of a load or store; space None if a part of the opcode is not known."""
        kind, space, vector = parts[-1], None, 1
        for part in parts[1:-1]:
            if part in ("global", "shared", "shared::cta"):
                space = part.split("::")[0]
            elif part in ("v2", "v4"):
                vector = int(part[1])
            elif not re.match(r"(L1|L2)::|weak$", part):
                return None, 0, kind
        return (space if kind in KINDS and kind != "pred" else None), vector, kind
