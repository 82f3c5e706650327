"""Products of a warpgroup, which read shared memory by themselves."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from ptx.batch import SHARED_BASE, Batch
from ptx.memory import EmulationError
from ptx.parser import Group, Instruction
from ptx.values import LANES, canonical, full, left_operand, tf32_of
from ptx.warps import Warps


class Warpgroups(Warps):
    """`wgmma` and the fence before it."""

    def op_wgmma(self, i: Instruction, parts: list[str]) -> Callable | None:
        name = parts[1]
        if name == "fence":
            return lambda s, at: self.warps(i, s, at, 128) and None
        if name == "commit_group":

            def commit(s: Batch, at: Any) -> None:
                self.warps(i, s, at, 128)
                s.product_groups[at] += 1

            return commit
        if name == "wait_group":
            pending = i.operands[0].bits
            return lambda s, at: self._finish_products(i, s, at, pending)
        shape = re.match(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(8|16)\.f32\.(tf32|bf16)\.\3$", i.opcode)
        if shape is None or (shape[2], shape[3]) not in (("8", "tf32"), ("16", "bf16")):
            return None
        width, depth, kind = int(shape[1]), int(shape[2]), shape[3]
        d, a, b, scale_d, *rest = i.operands
        flags = [o.bits for o in rest]
        from_registers = isinstance(a, Group)
        expected = 2 if kind == "tf32" else 3 if from_registers else 4
        if len(flags) != expected or any(f not in (1, -1) for f in flags[:2]) or len(d.parts) != width // 2:
            return None
        signs = flags[0] * flags[1]
        transposed_a = bool(flags[2]) if expected == 4 else False
        transposed_b = bool(flags[-1]) if kind == "bf16" else False
        keep, read_b = self.read(scale_d, "pred"), self.read(b, "b64")
        read_a = [self.read(o, "b32") for o in a.parts] if from_registers else [self.read(a, "b64")]

        def issue(s: Batch, at: Any) -> None:
            n = self.warps(i, s, at, 128)
            descriptor_b = full(read_b(s, at), n, 128)[:, 0].copy()
            kept = np.broadcast_to(np.asarray(keep(s, at)), (n * 128,)).reshape(n, 128)[:, 0].copy()
            first = s.position[at][::128]
            product = {
                "line": i.line,
                "first": first,
                "group": s.product_groups[first].copy(),
                "kept": kept,
                "signs": signs,
            }
            values = [np.broadcast_to(read(s, at), (n * 128,)).copy() for read in read_a]
            where_b = self._tile(s, first, descriptor_b, width, depth, kind, transposed_b, i)
            product |= {
                "a": values,
                "b": where_b,
                "where_a": None,
                "kind": kind,
                "d": d.parts,
                "width": width,
                "depth": depth,
            }
            if not from_registers:
                descriptor_a = values[0].reshape(n, 128)[:, 0]
                product["where_a"] = self._tile(s, first, descriptor_a, 64, depth, kind, transposed_a, i)
            for where in (product["b"], product["where_a"]):
                if where is not None:
                    self._read_tile(s, first, where, i.line)
                    for one in where:
                        s.shared.drain(np.unique(one // s.shared.granule), 1)
            s.products.append(product)

        return issue

    def _tile(
        self, s: Batch, first: Any, descriptor: Any, width: int, depth: int, kind: str, transposed: bool, i: Instruction
    ) -> Any:
        """Byte offsets of an operand's elements in shared memory, [warpgroups, width (m or n), depth (k)]."""
        element = 4 if kind == "tf32" else 2
        fields = [
            (descriptor >> np.uint64(shift)) & np.uint64(mask)
            for shift, mask in ((0, 0x3FFF), (16, 0x3FFF), (32, 0x3FFF), (49, 7), (62, 3))
        ]
        start, leading, stride, base_offset, mode = (f.astype(np.int64)[:, None, None] for f in fields)
        if base_offset.any() or len(np.unique(mode)) != 1:
            raise EmulationError(f"matrix descriptor with a base offset: {self.program.describe(i.line)}")
        span = {0: 16, 1: 128, 2: 64, 3: 32}[int(mode[0, 0, 0])]
        start, leading, stride = start * 16, leading * 16, stride * 16
        mn, k = np.arange(width)[None, :, None], np.arange(depth)[None, None, :]
        if not transposed:  # k is contiguous: rows of `span` bytes, eight to an atom
            inside = k * element
            if span == 16:
                at = start + mn % 8 * 16 + mn // 8 * stride + inside // 16 * leading + inside % 16
            else:
                at = start + mn % 8 * span + mn // 8 * stride + inside
                if depth * element > span:
                    raise EmulationError(f"an operand wider than its swizzle: {self.program.describe(i.line)}")
        else:  # m or n is contiguous
            per_row = span // element
            at = start + mn % per_row * element + k % 8 * span
            at = at + (
                mn // per_row * (stride if span == 16 else leading) + k // 8 * (leading if span == 16 else stride)
            )
        if span > 16:
            at = at ^ ((at >> 7 & (span // 16 - 1)) << 4)
        inside_window = (at >= SHARED_BASE) & (at + element <= SHARED_BASE + self.launch.shared_bytes)
        if not inside_window.all():
            raise EmulationError(
                f"out of bounds: a matrix operand leaves shared memory: {self.program.describe(i.line)}"
            )
        return at + s.shared_start[first][:, None, None]

    def _read_tile(self, s: Batch, first: Any, where: Any, line: int) -> None:
        memory = s.shared
        for n, at in enumerate(where):
            who = s.who(first[n : n + 1])
            g = np.unique(at.reshape(-1) // memory.granule)[None, :]
            memory.note_read_by_all(g, who, line)
            memory._report("proxy", g, memory.unfenced[g], who, line, memory.w_line)

    def _finish_products(self, i: Instruction, s: Batch, at: Any, pending: int) -> None:
        self.warps(i, s, at, 128)
        chosen = np.zeros(s.size, bool)
        chosen[at] = True
        left = []
        for product in s.products:
            first = product["first"]
            done = chosen[first] & (product["group"] < s.product_groups[first] - pending)
            if done.any():
                self._land_product(s, product, done)
            if not done.all():
                left.append(self._rest(product, ~done))
        s.products = left

    @staticmethod
    def _rest(product: dict[str, Any], keep: Any) -> dict[str, Any]:
        rest = dict(product)
        for name in ("first", "group", "kept", "b", "where_a"):
            rest[name] = None if product[name] is None else product[name][keep]
        rest["a"] = [v.reshape(-1, 128)[keep].reshape(-1) for v in product["a"]]
        return rest

    def _land_product(self, s: Batch, product: dict[str, Any], done: Any) -> None:
        p = self._rest(product, done)
        first, memory, kind = p["first"], s.shared, p["kind"]
        n = len(first)
        for where in (p["b"], p["where_a"]):
            if where is not None:
                for one in where:
                    memory.drain(np.unique(one // memory.granule), -1)
                self._read_tile(s, first, where, p["line"])

        def fetch(where: Any) -> Any:
            if kind == "tf32":
                return tf32_of(memory.views[4][where // 4])
            return (memory.views[2][where // 2].astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)

        right = fetch(p["b"]).transpose(0, 2, 1)  # [warpgroups, k, n]
        if p["where_a"] is None:
            a = left_operand(p["a"], n * 4, kind).reshape(n, 64, p["depth"])
        else:
            a = fetch(p["where_a"])
        total = p["signs"] * (a @ right)  # [warpgroups, 64, n]
        row, pair = LANES // 4, LANES % 4
        at = (first[:, None] + np.arange(128)).reshape(-1)
        warp = np.arange(4)[:, None] * 16
        for r, register in enumerate(p["d"]):
            values = s.registers[register.kind][np.dtype("f4")][register.number]
            part = total[:, warp + row + 8 * (r // 2 % 2), r // 4 * 8 + pair * 2 + r % 2]  # [warpgroups, 4, 32]
            old = np.where(p["kept"].repeat(128), values[at], np.float32(0))
            values[at] = canonical(part.reshape(-1) + old.astype(np.float64))

    def op_fence(self, i: Instruction, parts: list[str]) -> Callable | None:
        if i.opcode not in ("fence.proxy.async.shared::cta", "fence.proxy.async"):
            return None

        def fence(s: Batch, at: Any) -> None:
            memory = s.shared
            g = np.flatnonzero(memory.unfenced)
            memory.unfenced[g[np.isin(memory.w_thread[g], s.thread[at])]] = False

        return fence
