"""A program as blocks of functions of (batch, threads). What it does not know it refuses."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ptx.arithmetic import Arithmetic
from ptx.batch import Batch
from ptx.copies import Copies
from ptx.memory import EmulationError
from ptx.moves import Moves
from ptx.parser import Immediate, Instruction, Program
from ptx.values import KINDS
from ptx.warpgroups import Warpgroups


def narrowest(program: Program, space: str) -> int:
    """Bytes of the narrowest access to a space: what the shadow must tell apart (4 at most)."""
    width = 4
    for i in program.instructions:
        parts = i.opcode.split(".")
        here = any(p == space or p.startswith(space + "::") for p in parts)
        if here and parts[0] in ("ld", "st", "atom", "red"):
            width = min(width, KINDS[parts[-1]].itemsize)
        elif here and "trans" in parts:  # a thread takes two numbers of different rows
            width = min(width, 2)
    return width


class Block:
    """Instructions without a branch in or out; then a barrier, a branch, an end, or the next block."""

    def __init__(self) -> None:
        self.steps: list[Callable] = []
        self.length = 0
        self.barrier = False
        self.following = -1
        self.branch: Callable | None = None
        self.where = ""


class Compiler(Moves, Arithmetic, Warpgroups, Copies):
    """Instructions to functions of (batch, threads). What it does not know it refuses."""

    def blocks(self) -> list[Block]:
        code = self.program.instructions
        targets = {i.operands[0].name for i in code if i.opcode.split(".")[0] == "bra"}
        leaders = {0, *(self.program.labels[name] for name in targets)}
        for i, instruction in enumerate(code):
            if instruction.opcode.split(".")[0] in ("bra", "ret", "exit") or self._is_barrier(instruction):
                leaders.add(i + 1)
        starts = sorted(v for v in leaders if v < len(code))
        number = {start: n for n, start in enumerate(starts)}
        blocks = []
        for n, start in enumerate(starts):
            end = starts[n + 1] if n + 1 < len(starts) else len(code)
            block = Block()
            following = n + 1 if end < len(code) else None
            block.branch = lambda s, at, following=following: following
            for i in code[start:end]:
                block.length += 1
                name = i.opcode.split(".")[0]
                if self._is_barrier(i):
                    if i.guard or [o for o in i.operands if o != Immediate(0)]:
                        self._refuse(i)
                    if following is None:
                        raise EmulationError(f"{self.program.describe(i.line)}: nothing follows the barrier")
                    block.barrier, block.following, block.where = True, following, self.program.describe(i.line)
                elif name == "bra":
                    block.branch = self._branch(i, number[self.program.labels[i.operands[0].name]], following)
                elif name in ("ret", "exit"):
                    if i.guard:
                        self._refuse(i)
                    block.branch = lambda s, at: None
                else:
                    block.steps.append(self._step(i))
            blocks.append(block)
        return blocks

    @staticmethod
    def _is_barrier(i: Instruction) -> bool:
        return i.opcode in (
            "bar.sync",
            "barrier.sync",
            "barrier.sync.aligned",
            "bar.sync.aligned",
            "barrier.cta.sync.aligned",
        )

    def _branch(self, i: Instruction, target: int, following: int | None) -> Callable:
        if i.guard is None:
            return lambda s, at: target
        read, negated = self.read(i.guard[0], "pred"), i.guard[1]

        def branch(s: Batch, at: Any) -> Any:
            taken = read(s, at) != negated
            if taken.all():
                return target
            if not taken.any():
                return following
            return np.where(taken, target, following)

        return branch

    def _step(self, i: Instruction) -> Callable:
        name = i.opcode.split(".")[0]
        handler = getattr(self, "op_" + i.opcode.replace(".", "_").replace("::", "_"), None) or getattr(
            self, "op_" + name, None
        )
        if handler is None:
            self._refuse(i)
        parts = i.opcode.split(".")
        step = handler(i, parts)
        if step is None:
            self._refuse(i)
        if i.guard is None:
            return step
        guard, negated = self.read(i.guard[0], "pred"), i.guard[1]

        def guarded(s: Batch, at: Any) -> None:
            on = guard(s, at) != negated
            if on.all():
                step(s, at)
            elif on.any():
                step(s, s.position[at][on])

        return guarded
