"""Runs the PTX of one kernel, as Triton emits it for sm_90, over NumPy arrays, and reports what it must not do.

All threads of a batch of CTAs run in lockstep; threads that branched apart run lowest block first, until they meet
again. Warps are dealt to groups that run one after another between barriers, in an order drawn anew at every barrier:
a missing barrier then shows as a wrong result too, not only as a race.

Asynchronous work is done as late as the program allows: a `cp.async` lands at the `wait_group` that covers it, a
`wgmma` reads shared memory and writes its registers at its `wgmma.wait_group`.
"""

from collections import defaultdict
from typing import Any

import numpy as np
from ptx.batch import Arena, Batch
from ptx.compiler import Compiler, narrowest
from ptx.memory import EmulationError, Findings
from ptx.parser import Program, parse


class Launch:
    """One kernel over one grid. `run` executes it; what it must not do is in `findings`."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        arguments: list[int],
        arena: Arena,
        shared_bytes: int,
        seed: int = 0,
        groups: int = 2,
        batch_threads: int = 8192,
    ):
        self.program, self.grid, self.shared_bytes = program, grid, shared_bytes
        self.groups, self.batch_threads = groups, batch_threads
        self.rng = np.random.default_rng(seed)
        self.findings = Findings(program.describe)
        self.has_wgmma = any(i.opcode.startswith("wgmma") for i in program.instructions)
        if len(arguments) != len(program.parameters):
            raise EmulationError(f"{program.name}: expected {len(program.parameters)} arguments, got {len(arguments)}")
        self.arguments = {name: value for (name, _), value in zip(program.parameters, arguments, strict=True)}
        self.shared_granule = narrowest(program, "shared")
        self.memory = arena.build(narrowest(program, "global"), self.findings, program.threads)
        self.memory.coin = lambda: bool(self.rng.integers(2))
        self.issued = 0  # instructions of one warp
        self._epochs = 0
        self.blocks = Compiler(self).blocks()

    def new_epochs(self, count: int) -> np.ndarray:
        self._epochs += count
        return np.arange(self._epochs - count, self._epochs, dtype=np.int32)

    def run(self) -> "Launch":
        threads = self.program.threads
        n_ctas = self.grid[0] * self.grid[1] * self.grid[2]
        per_batch = max(1, self.batch_threads // threads)
        ctas = self.rng.permutation(n_ctas)
        with np.errstate(all="ignore"):
            for start in range(0, n_ctas, per_batch):
                self._run_batch(Batch(self, ctas[start : start + per_batch], self.rng))
        return self

    def _run_batch(self, s: Batch) -> None:
        threads = self.program.threads
        waiting: dict[tuple[int, int], list[Any]] = defaultdict(list)  # (group, block) to threads
        for group in range(self.groups):
            if s.starts[group] < s.starts[group + 1]:
                waiting[group, 0].append(slice(s.starts[group], s.starts[group + 1]))
        rank = self.rng.permutation(self.groups)
        arrived = np.full(s.size, -1, np.int32)  # block after the barrier that a thread waits at
        n_arrived = np.zeros(s.local.max() + 1, np.int64)
        where = ""
        while waiting:
            key = min(waiting, key=lambda k: (rank[k[0]], k[1]))
            at = self._join(s, key[0], waiting.pop(key))
            block = self.blocks[key[1]]
            n = int(at.stop - at.start) if isinstance(at, slice) else len(at)
            for step in block.steps:
                step(s, at)
            self.issued += -(-n // 32) * block.length
            if block.barrier:
                where = block.where
                positions = s.position[at]
                arrived[positions] = block.following
                np.add.at(n_arrived, s.local[positions], 1)
                opened = n_arrived == threads
                if opened.any():
                    released = opened[s.local]
                    epochs = self.new_epochs(len(n_arrived))
                    s.epoch[released] = epochs[s.local[released]]
                    s.warp_epoch[released] += 1
                    n_arrived[opened] = 0
                    chosen = s.position[released]
                    self._queue(s, waiting, chosen, arrived[chosen])
                    arrived[chosen] = -1
                    rank = self.rng.permutation(self.groups)
            elif block.branch is not None:
                target = block.branch(s, at)
                if target is None:
                    continue
                if isinstance(target, int):
                    waiting[key[0], target].append(at)
                else:
                    self._queue(s, waiting, s.position[at], target)
        if (arrived >= 0).any():
            raise EmulationError(
                f"deadlock: {int((arrived >= 0).sum())} threads wait at a barrier that others never reach: {where}"
            )

    def _queue(self, s: Batch, waiting: dict, positions: np.ndarray, blocks: np.ndarray) -> None:
        groups = s.group[positions]
        for block in np.unique(blocks):
            for group in np.unique(groups[blocks == block]):
                waiting[int(group), int(block)].append(positions[(blocks == block) & (groups == group)])

    def _join(self, s: Batch, group: int, parts: list[Any]) -> Any:
        if len(parts) == 1 and isinstance(parts[0], slice):
            return parts[0]
        at = np.sort(np.concatenate([s.position[p] for p in parts]))
        if at[-1] - at[0] + 1 == len(at):
            return slice(int(at[0]), int(at[-1]) + 1)
        return at


def emulate(text: str, grid, arguments, arena, shared_bytes, **options) -> Launch:
    """Parse and run; `launch.memory` holds what was written."""
    return Launch(parse(text), grid, arguments, arena, shared_bytes, **options).run()
