"""What the lanes of a warp do together."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ptx.batch import Batch
from ptx.memory import EmulationError
from ptx.operands import Operands
from ptx.parser import Group, Immediate, Instruction, Register
from ptx.values import KINDS, LANES, bf16_of, canonical, full, left_operand, tf32_of


class Warps(Operands):
    """Shuffles, matrices from and to shared memory, and products of a warp."""

    def warps(self, i: Instruction, s: Batch, at: Any, width: int = 32) -> int:
        """How many whole warps (or warpgroups) these threads are; an error where some lane is missing."""
        positions = s.position[at]
        n = len(positions)
        if (
            n % width
            or (s.tid[positions[::width]] % width).any()
            or (not isinstance(at, slice) and (np.diff(positions.reshape(-1, width), axis=1) != 1).any())
        ):
            raise EmulationError(f"not all lanes of a warp are here: {self.program.describe(i.line)}")
        return n // width

    def _mask_is_full(self, operand: Any) -> bool:
        if isinstance(operand, Register):
            moved = [
                c.operands[1] for c in self.program.instructions
                if c.operands and c.operands[0] == operand and c.opcode == "mov.b32"
            ]  # fmt: skip
            return len(moved) == 1 and isinstance(moved[0], Immediate) and moved[0].bits & 0xFFFFFFFF == 0xFFFFFFFF
        return isinstance(operand, Immediate) and operand.bits & 0xFFFFFFFF == 0xFFFFFFFF

    def op_shfl(self, i: Instruction, parts: list[str]) -> Callable | None:
        if parts[1] != "sync" or parts[3] != "b32" or not self._mask_is_full(i.operands[4]):
            return None
        mode, (target, source, by, clamp) = parts[2], i.operands[:4]
        if mode not in ("up", "down", "bfly", "idx") or not isinstance(clamp, Immediate) or isinstance(target, Group):
            return None
        segment, c = (clamp.bits >> 8) & 31, clamp.bits & 31
        limit, lowest = (LANES & segment) | (c & ~segment & 31), LANES & segment
        read, read_by, put = self.read(source, "b32"), self.read(by, "b32"), self.write(target, "b32")

        def shuffle(s: Batch, at: Any) -> None:
            n = self.warps(i, s, at)
            by = full(read_by(s, at), n).astype(np.int64) & 31
            if mode == "idx":
                lane = lowest | (by & ~segment)
            else:
                lane = {"up": LANES - by, "down": LANES + by, "bfly": LANES ^ by}[mode]
            lane = np.where(lane >= limit if mode == "up" else lane <= limit, lane, LANES)
            put(s, at, np.take_along_axis(full(read(s, at), n), lane, 1).reshape(-1))

        return shuffle

    def op_redux(self, i: Instruction, parts: list[str]) -> Callable | None:
        compute = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or}
        kind = parts[-1]
        if parts[1] != "sync" or parts[2] not in compute or not self._mask_is_full(i.operands[2]) or kind[0] == "f":
            return None
        read, put, reduce = self.read(i.operands[1], kind), self.write(i.operands[0], kind), compute[parts[2]].reduce
        dtype = KINDS[kind]

        def combine(s: Batch, at: Any) -> None:
            n = self.warps(i, s, at)
            put(s, at, reduce(np.ascontiguousarray(read(s, at)).reshape(n, 32), axis=1, dtype=dtype).repeat(32))

        return combine

    def op_bar_warp_sync(self, i: Instruction, parts: list[str]) -> Callable | None:
        if not self._mask_is_full(i.operands[0]):
            return None

        def barrier(s: Batch, at: Any) -> None:
            self.warps(i, s, at)
            s.warp_epoch[at] += 1

        return barrier

    def op_ldmatrix(self, i: Instruction, parts: list[str]) -> Callable | None:
        count, transposed = self._matrices(parts)
        if count is None:
            return None
        group = i.operands[0]
        targets = group.parts if isinstance(group, Group) else (group,)
        puts, locate, line = (
            [self.write(o, "b32") for o in targets],
            self._locate(i, i.operands[1], "shared", 16),
            i.line,
        )
        if len(puts) != count:
            return None

        def load(s: Batch, at: Any) -> None:
            n = self.warps(i, s, at)
            offset = self._rows(s, at, locate, n, count)
            who = s.who(at)
            for m, put in enumerate(puts):
                if transposed:
                    row = m * 8 + LANES % 4 * 2
                    low, high = ((offset[:, row + k] + LANES // 4 * 2).reshape(-1) for k in range(2))
                    value = s.shared.load(low, 2, 1, who, line)[0].astype(np.uint32)
                    put(s, at, value | (s.shared.load(high, 2, 1, who, line)[0].astype(np.uint32) << np.uint32(16)))
                else:
                    where = (offset[:, m * 8 + LANES // 4] + LANES % 4 * 4).reshape(-1)
                    put(s, at, s.shared.load(where, 4, 1, who, line)[0])

        return load

    def op_stmatrix(self, i: Instruction, parts: list[str]) -> Callable | None:
        count, transposed = self._matrices(parts)
        if count is None or transposed:
            return None
        group = i.operands[1]
        sources = group.parts if isinstance(group, Group) else (group,)
        reads, locate, line = (
            [self.read(o, "b32") for o in sources],
            self._locate(i, i.operands[0], "shared", 16),
            i.line,
        )
        if len(reads) != count:
            return None

        def store(s: Batch, at: Any) -> None:
            n = self.warps(i, s, at)
            offset = self._rows(s, at, locate, n, count)
            who = s.who(at)
            for m, read in enumerate(reads):
                where = (offset[:, m * 8 + LANES // 4] + LANES % 4 * 4).reshape(-1)
                s.shared.store(where, 4, np.ascontiguousarray(read(s, at))[None], who, line)

        return store

    def _matrices(self, parts: list[str]) -> tuple[int | None, bool]:
        known = {"sync", "aligned", "m8n8", "shared", "shared::cta", "b16", "trans", "x1", "x2", "x4"}
        if (
            set(parts[1:]) - known
            or not {"m8n8", "b16"} <= set(parts)
            or (self.launch.shared_granule > 2 and "trans" in parts)
        ):
            return None, False
        return next((int(p[1]) for p in parts if p in ("x1", "x2", "x4")), None), "trans" in parts

    def _rows(self, s: Batch, at: Any, locate: Callable, n: int, count: int) -> Any:
        """Offsets of the rows of the matrices, [warps, 8*count]: lane r of matrix m holds that of row r."""
        rows = s.position[at].reshape(n, 32)[:, : 8 * count]
        return locate(s, rows.reshape(-1))[1].reshape(n, 8 * count)

    def op_mma(self, i: Instruction, parts: list[str]) -> Callable | None:
        shapes = {
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32": (8, "tf32"),
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": (16, "bf16"),
        }
        if i.opcode not in shapes:
            return None
        depth, kind = shapes[i.opcode]
        d, a, b, c = (o.parts for o in i.operands)
        read_a, read_b = ([self.read(o, "b32") for o in group] for group in (a, b))
        read_c, puts = [self.read(o, "f32") for o in c], [self.write(o, "f32") for o in d]
        row, pair = LANES // 4, LANES % 4

        def multiply(s: Batch, at: Any) -> None:
            n = self.warps(i, s, at)
            left, right = left_operand([read(s, at) for read in read_a], n, kind), np.empty((n, depth, 8))
            for r, read in enumerate(read_b):
                bits = full(read(s, at), n)
                if kind == "tf32":
                    right[:, pair + 4 * r, row] = tf32_of(bits)
                else:
                    for half in range(2):
                        right[:, pair * 2 + half + 8 * r, row] = bf16_of(bits, half)
            total = left @ right
            for r, (read, put) in enumerate(zip(read_c, puts, strict=True)):
                at_row, at_col = row + 8 * (r // 2), pair * 2 + r % 2
                put(s, at, canonical((total[:, at_row, at_col] + full(read(s, at), n)).reshape(-1)))

        return multiply
