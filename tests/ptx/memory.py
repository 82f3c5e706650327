"""Memory of the emulated device, with a shadow that finds races, stray addresses and reads of unwritten bytes.

Ordering is what PTX promises between threads: a barrier of the whole CTA (`bar.sync`) orders all its threads,
`bar.warp.sync` those of one warp, nothing orders two CTAs of a launch. Every barrier starts an epoch with a number of
its own (a CTA's never equals another's), so "same epoch" is one comparison.

Per granule (the narrowest access of the program, 1 to 4 bytes) the shadow keeps the last writer and the readers since:
thread, CTA epoch, warp epoch, and the line of the PTX that did it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

POISON = 0xFF  # bytes never written: a float32 of these is a NaN, an int32 is -1
VIEWS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class EmulationError(Exception):
    """The program did what it must not (a stray access, a barrier that never opens) or what is not supported."""


@dataclass
class Finding:
    """One kind of defect at one place (or pair of places) of the program."""

    kind: str
    space: str
    line: int
    other: int
    example: str
    count: int = 0


@dataclass
class Findings:
    """All defects of a launch, one entry a place, with how often it was met."""

    describe: Callable[[int], str] = str
    entries: dict[tuple[str, str, int, int], Finding] = field(default_factory=dict)

    def add(self, kind: str, space: str, line: int, other: int, count: int, example: Callable[[], str]) -> None:
        key = (kind, space, line, other)
        if key not in self.entries:
            text = f"{kind} in {space} memory: {self.describe(line)}"
            if other >= 0 and other != line:
                text += f"  against  {self.describe(other)}"
            self.entries[key] = Finding(kind, space, line, other, f"{text}; e.g. {example()}")
        self.entries[key].count += int(count)

    def of(self, *kinds: str) -> list[Finding]:
        return [f for f in self.entries.values() if f.kind in kinds]


# lanes disagree: threads write different values to one place in one instruction; PTX leaves open which one stays.
RACES = (
    "lanes disagree",
    "write-write race",
    "write-read race",
    "read-write race",
    "race between CTAs",
    "copy in flight",
    "proxy",
)
UNINITIALISED = "uninitialised read"


@dataclass
class Who:
    """The threads of one access: launch-wide thread number, CTA, and the epochs they are in; arrays of one length."""

    thread: Any
    cta: Any
    epoch: Any
    warp_epoch: Any

    def take(self, chosen: Any) -> "Who":
        return Who(self.thread[chosen], self.cta[chosen], self.epoch[chosen], self.warp_epoch[chosen])


def words(*values: np.unsignedinteger) -> str:
    """Unsigned integers as they are, and as float32 if they may be."""
    floats = [repr(float(np.array([v]).view(np.float32)[0])) for v in values if v.dtype == np.uint32]
    return " and ".join(f"{int(v):#x}" for v in values) + (f" ({' and '.join(floats)})" if floats else "")


class Memory:
    """A flat array of bytes with its shadow. Offsets are the caller's business, bounds are checked before."""

    def __init__(self, space: str, size: int, granule: int, findings: Findings, threads: int):
        size = -(-size // 16) * 16
        self.space, self.size, self.granule, self.findings, self.threads = space, size, granule, findings, threads
        self.bytes = np.full(size, POISON, np.uint8)
        self.views = {width: self.bytes.view(kind) for width, kind in VIEWS.items()}
        count = size // granule
        self.written = np.zeros(count, bool)
        self.w_thread = np.full(count, -1, np.int32)
        self.w_epoch = np.full(count, -1, np.int32)
        self.w_warp_epoch = np.full(count, -1, np.int32)
        self.w_line = np.full(count, -1, np.int32)
        self.r_thread = np.full(count, -1, np.int32)
        self.r_epoch = np.full(count, -1, np.int32)
        self.r_warp_epoch = np.full(count, -1, np.int32)
        self.r_line = np.full(count, -1, np.int32)
        self.r_level = np.zeros(count, np.int8)  # readers of this epoch: 0 one thread, 1 of one warp, 2 of several
        self.filling = np.zeros(count, np.int16)  # copies under way to here: neither to be read nor to be written
        self.draining = np.zeros(count, np.int16)  # copies and products under way from here: not to be written
        self.flying = 0
        self.unfenced = np.zeros(count, bool) if space == "shared" else None  # written, no proxy fence since
        if space == "global":
            self.w_cta = np.full(count, -1, np.int32)
            self.r_cta = np.full(count, -1, np.int32)  # -2: several
        self.coin: Callable[[], bool] = lambda: False
        self.name_of: Callable[[int], str] = lambda offset: f"byte {offset}"

    def granules(self, at: Any, width: int) -> Any:
        """Granule numbers [width/granule, accesses] of accesses of `width` bytes at byte offsets."""
        first = at // self.granule
        return first[None, :] + np.arange(max(1, width // self.granule))[:, None]

    # -- what the program does ------------------------------------------------------------------------------------

    def load(self, at: Any, element: int, count: int, who: Who, line: int, used_bytes: int = -1) -> Any:
        """[count, accesses] of unsigned integers of `element` bytes."""
        self.note_read(self.granules(at, element * count), who, line, used_bytes)
        return self.views[element][(at // element)[None, :] + np.arange(count)[:, None]]

    def store(self, at: Any, element: int, values: Any, who: Who, line: int, proxy: bool = True) -> None:
        """`values` [count, accesses], unsigned integers of `element` bytes."""
        where = (at // element)[None, :] + np.arange(len(values))[:, None]
        view = self.views[element]
        changes = view[where] != values
        per = element // self.granule
        granules = self.granules(at, element * len(values))
        self.note_write(granules, np.repeat(changes, per, 0) if per > 1 else changes, who, line)
        view[where] = values
        lost = view[where] != values
        if lost.any():
            n, m = np.argwhere(lost)[0]
            pair = view[where[n, m]], values[n, m]
            self._report("lanes disagree", granules[:: max(per, 1)], lost, who, line, more=f"values {words(*pair)}")
            if self.coin():  # which one stays is not defined: now the first, not the last
                view[where[:, ::-1].copy()] = values[:, ::-1].copy()  # copies: a view would be walked forwards
        if self.unfenced is not None and proxy:
            self.unfenced[granules] = True

    # -- the shadow -----------------------------------------------------------------------------------------------

    def note_read(self, g: Any, who: Who, line: int, used_bytes: int = -1, update: bool = True) -> None:
        thread, epoch = who.thread, who.epoch
        recent = self.w_epoch[g] == epoch
        if recent.any():
            recent &= self._unordered(self.w_thread[g], self.w_warp_epoch[g], who)
            self._report("write-read race", g, recent, who, line, self.w_line)
        if self.space == "global":
            cta = self.w_cta[g]
            self._report("race between CTAs", g, (cta != -1) & (cta != who.cta), who, line, self.w_line)
        if self.flying:
            self._report("copy in flight", g, self.filling[g] > 0, who, line)
        missing = ~self.written[g]
        if used_bytes >= 0:
            keep = [(used_bytes >> (i * self.granule)) & ((1 << self.granule) - 1) != 0 for i in range(len(g))]
            missing &= np.array(keep)[:, None]
        self._report(UNINITIALISED, g, missing, who, line)
        if not update:
            return
        fresh = self.r_epoch[g] != epoch
        if fresh.any():
            wide = np.broadcast_to
            f = g[fresh]
            self.r_thread[f] = wide(thread, g.shape)[fresh]
            self.r_epoch[f] = wide(epoch, g.shape)[fresh]
            self.r_warp_epoch[f] = wide(who.warp_epoch, g.shape)[fresh]
            self.r_level[f] = 0
        other = self.r_thread[g] != thread
        if other.any():
            r_thread = self.r_thread[g]
            strangers = other & (r_thread >> 5 != thread >> 5)
            self.r_level[g[strangers]] = 2
            mates = other & ~strangers
            later = mates & (self.r_warp_epoch[g] < who.warp_epoch) & (self.r_level[g] < 2)
            if later.any():
                self.r_thread[g[later]] = np.broadcast_to(thread, g.shape)[later]
                self.r_warp_epoch[g[later]] = np.broadcast_to(who.warp_epoch, g.shape)[later]
                self.r_level[g[later]] = 0
            mates &= (self.r_thread[g] != thread) & (self.r_level[g] < 1)
            self.r_level[g[mates]] = 1
        again = ~other & (self.r_warp_epoch[g] < who.warp_epoch)
        if again.any():
            self.r_warp_epoch[g[again]] = np.broadcast_to(who.warp_epoch, g.shape)[again]
            self.r_level[g[again & (self.r_level[g] == 1)]] = 0
        self.r_line[g] = line
        if self.space == "global":
            cta = self.r_cta[g]
            self.r_cta[g] = np.where((cta == -1) | (cta == who.cta), who.cta, -2)
            if len(who.cta) > 1:  # several CTAs in one access: the last assignment won, the others must show too
                self.r_cta[g[self.r_cta[g] != who.cta]] = -2

    def note_read_by_all(self, g: Any, who: Who, line: int) -> None:
        """A read by all warps of a warpgroup at once (wgmma): whoever wrote in this epoch is a stranger to it."""
        self.note_read(g, who, line, update=False)
        recent = self.w_epoch[g] == who.epoch
        self._report("write-read race", g, recent, who, line, self.w_line)
        self.r_thread[g] = who.thread
        self.r_epoch[g] = who.epoch
        self.r_warp_epoch[g] = who.warp_epoch
        self.r_level[g] = 2
        self.r_line[g] = line

    def note_write(self, g: Any, changes: Any, who: Who, line: int) -> None:
        thread, epoch = who.thread, who.epoch
        recent = self.w_epoch[g] == epoch
        if recent.any():
            recent &= self._unordered(self.w_thread[g], self.w_warp_epoch[g], who) & changes
            self._report("write-write race", g, recent, who, line, self.w_line)
        read = self.r_epoch[g] == epoch
        if read.any():
            level, r_thread = self.r_level[g], self.r_thread[g]
            same_warp = (r_thread >> 5 == thread >> 5) & (level < 2)
            before = same_warp & (self.r_warp_epoch[g] < who.warp_epoch)
            mine = (r_thread == thread) & (level == 0)
            self._report("read-write race", g, read & ~before & ~mine, who, line, self.r_line)
        if self.space == "global":
            for cta, lines in ((self.w_cta[g], self.w_line), (self.r_cta[g], self.r_line)):
                self._report("race between CTAs", g, (cta != -1) & (cta != who.cta), who, line, lines)
            self.w_cta[g] = who.cta
            if len(who.cta) > 1:
                self._report(
                    "race between CTAs", g, self.w_cta[g] != who.cta, who, line, np.full_like(self.w_line, line)
                )
        if self.flying:
            self._report("copy in flight", g, self.filling[g] + self.draining[g] > 0, who, line)
        self.w_thread[g] = thread
        self.w_epoch[g] = epoch
        self.w_warp_epoch[g] = who.warp_epoch
        self.w_line[g] = line
        self.written[g] = True

    def fill(self, g: Any, by: int) -> None:
        """A copy to these granules starts (+1) or lands (-1)."""
        np.add.at(self.filling, g, by)
        self.flying += by * g.size

    def drain(self, g: Any, by: int) -> None:
        """An asynchronous read of these granules starts (+1) or ends (-1)."""
        np.add.at(self.draining, g, by)
        self.flying += by * g.size

    @staticmethod
    def _unordered(thread: Any, warp_epoch: Any, who: Who) -> Any:
        same_warp = thread >> 5 == who.thread >> 5
        return (thread != who.thread) & ~(same_warp & (warp_epoch < who.warp_epoch))

    def _report(self, kind: str, g: Any, bad: Any, who: Who, line: int, lines: Any = None, more: str = "") -> None:
        if not bad.any():
            return
        places = np.argwhere(bad)
        others = np.full(len(places), -1) if lines is None else lines[g[bad]]
        for other in np.unique(others):
            chosen = places[others == other]
            i, j = chosen[0]

            def example(i: int = i, j: int = j) -> str:
                at = int(g[i, j]) * self.granule
                thread = int(np.broadcast_to(who.thread, g.shape)[i, j])
                writer, reader = int(self.w_thread[g[i, j]]), int(self.r_thread[g[i, j]])
                return (
                    f"{self.name_of(at)}, by {self.thread_name(thread)}; last written by {self.thread_name(writer)}, "
                    f"read by {self.thread_name(reader)}{'; ' if more else ''}{more}"
                )

            self.findings.add(kind, self.space, line, int(other), len(chosen), example)

    def thread_name(self, thread: int) -> str:
        return "none" if thread < 0 else f"CTA {thread // self.threads} thread {thread % self.threads}"
