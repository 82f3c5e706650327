"""Global memory of a launch, and the CTAs that run together with their registers and shared memory."""

from typing import Any

import numpy as np
from ptx.memory import Findings, Memory, Who

SHARED_BASE = 0x400  # where dynamic shared memory starts on sm_90: the first KiB is the system's
GLOBAL_BASE = 0x7_3000_0000
PARAMETER_BASE = 0x210  # in a space of their own
GUARD = 1 << 16  # bytes between two allocations that belong to neither


class Arena:
    """The emulated global memory: what is put in lies apart from the rest, 512-byte aligned, with guards around."""

    def __init__(self) -> None:
        self.blocks: list[tuple[str, int, np.ndarray, np.ndarray]] = []  # name, offset, bytes, which were written
        self.end = GUARD

    def add(self, name: str, data: np.ndarray, written: np.ndarray) -> int:
        """The address at which these bytes will lie."""
        offset = -(-self.end // 512) * 512
        self.blocks.append((name, offset, data, written))
        self.end = offset + data.size + max(GUARD, data.size)
        return GLOBAL_BASE + offset

    def build(self, granule: int, findings: Findings, threads: int) -> Memory:
        memory = Memory("global", self.end, granule, findings, threads)
        memory.owner = np.zeros(memory.size, np.int16)
        memory.written[:] = False
        for i, (_, offset, data, written) in enumerate(self.blocks):
            memory.bytes[offset : offset + data.size] = data
            memory.owner[offset : offset + data.size] = i + 1
            padded = np.zeros(-(-data.size // granule) * granule, bool)
            padded[: data.size] = written
            memory.written[offset // granule : offset // granule + padded.size // granule] = padded.reshape(
                -1, granule
            ).any(1)
        memory.name_of = self.name_of
        return memory

    def name_of(self, offset: int) -> str:
        for name, start, data, _ in self.blocks:
            if start <= offset < start + data.size:
                return f"{name}+{offset - start}"
            if start - GUARD // 2 <= offset < start + data.size + GUARD:
                return f"{name}{offset - start:+d} (outside its {data.size} bytes)"
        return f"address {GLOBAL_BASE + offset:#x}"


class Batch:
    """The CTAs that run together: registers, shared memory, and where every thread is."""

    def __init__(self, launch: Any, ctas: np.ndarray, rng: np.random.Generator):
        program, threads = launch.program, launch.program.threads
        unit = min(threads, 128 if launch.has_wgmma else 32)
        units = threads // unit
        group = rng.integers(launch.groups, size=(len(ctas), units)).ravel()
        order = np.argsort(group, kind="stable")
        where = order.repeat(unit) * unit + np.tile(np.arange(unit), len(order))
        self.launch, self.size = launch, len(where)
        self.local, self.tid = where // threads, where % threads
        self.cta = ctas[self.local].astype(np.int32)
        self.thread = (self.cta.astype(np.int64) * threads + self.tid).astype(np.int32)
        self.group = group[order].repeat(unit)
        self.starts = np.searchsorted(self.group, np.arange(launch.groups + 1))
        self.position = np.arange(self.size)
        self.registers = {}
        for kind, (width, count) in program.registers.items():
            raw = np.zeros((count, self.size), bool if width == 0 else f"u{width}")
            self.registers[kind] = {raw.dtype: raw}
            for code in () if width == 0 else (f"i{width}", *((f"f{width}",) if width > 2 else ())):
                self.registers[kind][np.dtype(code)] = raw.view(code)
        self.shared_bytes = -(-launch.shared_bytes // 16) * 16
        self.shared = Memory(
            "shared", self.shared_bytes * len(ctas), launch.shared_granule, launch.findings, threads,
        )  # fmt: skip
        size = self.shared_bytes
        self.shared.coin = launch.memory.coin
        self.shared.name_of = lambda offset: f"byte {offset % size if size else 0}"
        self.shared_start = self.local.astype(np.int64) * size - SHARED_BASE
        self.epoch = launch.new_epochs(len(ctas))[self.local]
        self.warp_epoch = np.zeros(self.size, np.int32)
        grid = launch.grid
        self.special = {
            ("tid", "x"): self.tid,
            ("laneid", ""): self.tid % 32,
            ("ctaid", "x"): self.cta % grid[0],
            ("ctaid", "y"): self.cta // grid[0] % grid[1],
            ("ctaid", "z"): self.cta // (grid[0] * grid[1]),
        }
        self.special = {key: value.astype(np.uint32) for key, value in self.special.items()}
        constants = {("ntid", "x"): threads, ("nctaid", "x"): grid[0], ("nctaid", "y"): grid[1]}
        for key, value in (constants | {("nctaid", "z"): grid[2]}).items():
            self.special[key] = np.full(self.size, value, np.uint32)
        for axis in "yz":
            self.special["tid", axis] = np.zeros(self.size, np.uint32)
            self.special["ntid", axis] = np.ones(self.size, np.uint32)
        self.copies: list[tuple[np.ndarray, ...]] = []
        self.copy_groups = np.zeros(self.size, np.int32)
        self.products: list[dict[str, Any]] = []
        self.product_groups = np.zeros(self.size, np.int32)

    def who(self, at: Any) -> Who:
        return Who(self.thread[at], self.cta[at], self.epoch[at], self.warp_epoch[at])
