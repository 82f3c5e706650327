"""Copies from global to shared memory that go on by themselves."""

from collections.abc import Callable
from typing import Any

import numpy as np
from ptx.batch import Batch
from ptx.memory import EmulationError
from ptx.operands import Operands
from ptx.parser import Instruction


class Copies(Operands):
    """`cp.async`."""

    def op_cp(self, i: Instruction, parts: list[str]) -> Callable | None:
        if parts[1] != "async":
            return None
        if parts[2:] == ["commit_group"]:

            def commit(s: Batch, at: Any) -> None:
                s.copy_groups[at] += 1

            return commit
        if parts[2:] == ["wait_group"]:
            pending = i.operands[0].bits
            return lambda s, at: self._land_copies(s, at, pending)
        if parts[2:] == ["wait_all"]:
            return lambda s, at: self._land_copies(s, at, -1)
        if (
            parts[2] not in ("ca", "cg")
            or parts[3:5] != ["shared", "global"]
            or any(not p.startswith("L2::") for p in parts[5:])
        ):
            return None
        target, source, size, *limit = i.operands
        width = size.bits
        read = self.read(limit[0], "u32") if limit else lambda s, at: np.uint32(width)
        locate_target = self._locate(i, target, "shared", width)
        locate_source, line = self._locate(i, source, "global", width), i.line

        def copy(s: Batch, at: Any) -> None:
            positions = s.position[at]
            amount = np.broadcast_to(read(s, at), positions.shape).astype(np.int64)
            if ((amount != 0) & (amount != width)).any():
                raise EmulationError(f"not supported: a part of a copy: {self.program.describe(line)}")
            memory, to = locate_target(s, positions)
            who = s.who(positions)
            memory.note_write(
                memory.granules(to, width), np.ones((max(1, width // memory.granule), 1), bool), who, line
            )
            memory.fill(memory.granules(to, width), 1)
            origin = np.full(len(positions), -1)
            real = amount > 0
            if real.any():
                outer, found = locate_source(s, positions[real])
                outer.note_read(outer.granules(found, width), who.take(real), line)
                outer.drain(outer.granules(found, width), 1)
                origin[real] = found
            s.copies.append(
                (
                    positions,
                    s.copy_groups[positions],
                    to,
                    origin,
                    np.full(len(positions), width),
                    np.full(len(positions), line),
                )
            )

        return copy

    def _land_copies(self, s: Batch, at: Any, pending: int) -> None:
        chosen = np.zeros(s.size, bool)
        chosen[at] = True
        left = []
        outer, memory = self.launch.memory, s.shared
        for entry in s.copies:
            positions, group, to, origin, width, line = entry
            done = chosen[positions] & (group < s.copy_groups[positions] - pending)
            if done.any():
                size, number = int(width[0]), int(line[0])
                element = min(size, 8)
                where = memory.granules(to[done], size)
                memory.fill(where, -1)
                who = s.who(positions[done])
                real = origin[done] >= 0
                values = np.zeros((size // element, int(done.sum())), f"u{element}")
                if real.any():
                    found = origin[done][real]
                    g = outer.granules(found, size)
                    outer.drain(g, -1)
                    outer.note_read(g, who.take(real), number)
                    values[:, real] = outer.views[element][
                        (found // element)[None, :] + np.arange(len(values))[:, None]
                    ]
                memory.store(to[done], element, values, who, number, proxy=False)
                memory.unfenced[where] = True
            if not done.all():
                left.append(tuple(part[~done] for part in entry))
        s.copies = left
