"""How long an update should take on a GPU, kernel by kernel, and why; predicted without one, from what it launches.

    python -m d2r_fast.kernels.cost [--suite mt10 ...] [--precision tf32 ...] [--card h200] [--json FILE]

The launches are those that `benches/launches.py` counts (`launches.calls_on_gpu`); what each does is `work.work_of`;
how many of its programs a multiprocessor holds comes from the code that it compiles to for sm_90. A kernel takes as
long as the slowest of four: its bytes from HBM, its bytes from the L2, its arithmetic, and the dependent steps of one
program times the waves of programs; and the launch on top. Nothing in here was measured on a GPU of ours:
`benches/NOTES.md` compares.
"""

import argparse
import json
import sys
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from heapq import heapreplace
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from d2r_fast.kernels.compile_report import OPTIONS, compile_kernel
from d2r_fast.kernels.launches import SUITES, Call, Memory, calls_on_gpu, suite_config
from d2r_fast.kernels.work import Work, products_in, torch_programs, work_of
from d2r_fast.ops.backends import PRECISIONS


@dataclass(frozen=True)
class Card:
    """What a card does. Rates are peaks from its data sheet times the share that well-written code reaches of them."""

    hbm: float
    """Bytes a second from memory."""
    l2: float = 5.5e12
    """Bytes a second from the second-level cache, of all multiprocessors together."""
    l2_port: float = 64.0
    """Bytes a cycle between it and one multiprocessor, which together could take more than it gives."""
    l2_bytes: float = 50e6
    """Its size."""
    multiprocessors: int = 132
    clock: float = 1.75e9
    """Cycles a second under load."""
    ffma: float = 0.6 * 67e12
    """Operations a second of float32 products that Triton makes on the CUDA cores."""
    tensor_tf32: float = 495e12
    tensor_bf16: float = 989e12
    wgmma: float = 0.6
    """Share of the two above that a warpgroup's instruction reaches with operands from shared memory."""
    mma: float = 0.35
    """The same of the older instruction, which by itself reaches about 0.6 of the newer one."""
    library: float = 0.75
    """Share of every peak that torch's own products reach."""
    launch: float = 1.3e-6
    """Seconds from the end of one kernel of a graph to the first work of the next."""
    l2_latency: float = 0.16e-6
    """Seconds of a dependent load from the L2; from HBM it is three times as long."""
    chunk_cycles: float = 120
    """Of one chunk of a product besides the product: its operands through shared memory, converted, and the loop."""
    barrier_cycles: float = 30
    reduction_cycles: float = 150
    """Five exchanges within a warp."""


CARDS = {"h100": Card(hbm=0.9 * 3.35e12), "h200": Card(hbm=0.9 * 4.8e12)}
# Cycles of one term of a sum of products that one program makes: 8 terms a tf32 instruction, 16 a bf16 one, of about
# 33 cycles each; in float32 a thread makes some 8 multiply-adds a term, with their operands from shared memory.
TERM_CYCLES = {"HGMMA": {"tf32": 4.0, "bf16": 2.0}, "HMMA": {"tf32": 4.0, "bf16": 2.0}, "FFMA": {"float32": 16.0}}
# Kernels that one call of torch's becomes, where it is more than one.
TORCH_KERNELS = {"sort": 6, "baddbmm": 2, "addmm": 2}

REGISTERS, SHARED, WARPS, PROGRAMS = 65536, 228 * 1024, 64, 32
"""What a multiprocessor of sm_90 has: registers, bytes of shared memory, of which it takes 1 KiB a program for itself,
and how many warps and programs it can hold."""


class Resources(NamedTuple):
    """What one program of a compiled kernel takes, and how its products are made; see `compile_report.Row`."""

    registers: int
    shared: int
    once: int
    a_pass: int
    a_chunk: int
    in_flight: int
    product: str

    def resident(self, num_warps: int) -> int:
        """Programs that a multiprocessor holds at once."""
        of_warp = ceil(self.registers * 32 / 256) * 256  # given out in pieces of 256
        by_shared = SHARED // (self.shared + 1024)
        return max(1, min(REGISTERS // (of_warp * num_warps), by_shared, WARPS // num_warps, PROGRAMS))


class Line(NamedTuple):
    """The prediction for one call."""

    kernel: str
    grid: str
    kernels: int
    programs: int
    resident: int
    waves: float
    hbm_mb: float
    l2_mb: float
    gflop: float
    steps: int
    us: float
    bound: str


class Cache:
    """The L2 as pages, the one not used for longest leaving first; a page that was written goes to HBM when it leaves,
    unless its allocation was given back before."""

    PAGE = 1 << 16

    def __init__(self, n_bytes: float):
        self._n_pages = int(n_bytes) // self.PAGE
        self._pages: OrderedDict[tuple[int, int], bool] = OrderedDict()  # to whether it was written

    def free(self, storages: Iterable[int]) -> None:
        gone = set(storages)
        for page in [page for page in self._pages if page[0] in gone] if gone else []:
            del self._pages[page]

    def touch(self, memory: Memory, n_bytes: float, written: bool) -> float:
        """Bytes to and from HBM of an access to `n_bytes` of this memory."""
        if n_bytes == 0 or memory.end == memory.begin:
            return 0.0
        pages = range(memory.begin // self.PAGE, (memory.end - 1) // self.PAGE + 1)
        if n_bytes < memory.n_bytes:  # spread over it
            pages = range(pages.start, pages.start + ceil(len(pages) * n_bytes / memory.n_bytes))
        missing = sum((memory.storage, page) not in self._pages for page in pages)
        moved = 0.0 if written else n_bytes * missing / len(pages)
        for page in pages:
            was_written = self._pages.pop((memory.storage, page), False)
            self._pages[memory.storage, page] = written or was_written
        while len(self._pages) > self._n_pages:
            moved += self.PAGE * self._pages.popitem(last=False)[1]
        return moved


@cache
def _compiled(kernel: Any, launch: tuple[tuple[str, Any], ...], in_bf16: tuple[str, ...]) -> Resources:
    row = compile_kernel("", "", "", kernel, dict(launch) | {"types": dict.fromkeys(in_bf16, "*bf16")})
    return Resources(*(getattr(row, name) for name in Resources._fields))


def resources_of(call: Call) -> Resources:
    """What a launch's kernel compiles to. Names that start with an uppercase letter are its constants."""
    launch = {
        name: value
        for name, value in call.arguments.items()
        if name[0].isupper() or name in OPTIONS or (value is None and name.endswith("_ptr"))
    }
    memories = {name: value for name, value in call.arguments.items() if isinstance(value, Memory)}
    in_bf16 = tuple(name for name, memory in memories.items() if memory.dtype == torch.bfloat16)
    return _compiled(call.kernel, tuple(launch.items()), in_bf16)


def predict(call: Call, card: Card, cached: Cache, resources: Resources | None) -> Line:
    """One call's time. resources: of a Triton kernel."""
    cached.free(call.freed)
    work, precision = work_of(call), products_in(call)
    hbm = sum(a.n_bytes if a.scattered else cached.touch(a.memory, a.n_bytes, a.written) for a in work.accesses)
    traffic = sum(access.traffic for access in work.accesses)
    n_kernels = TORCH_KERNELS.get(call.name, 1)
    programs = prod(call.grid) if resources is not None else torch_programs(call)
    resident, waves, steps, chain = 1, 1.0, 0, card.l2_latency
    if resources is not None:
        resident = resources.resident(call.arguments["num_warps"])
        waves = waves_of(work, programs, resident * card.multiprocessors)
        steps, chain = _chain(work, programs, resources, precision, card)
    # The busiest multiprocessor decides, where programs do not divide among them.
    one_each = waves_of(work, programs, card.multiprocessors)
    uneven = one_each * card.multiprocessors / _as_many_longest(work, programs) if programs else 1.0
    times = {
        "HBM": hbm / card.hbm,
        "L2": traffic * max(1 / card.l2, uneven / (card.multiprocessors * card.l2_port * card.clock)),
        "arithmetic": work.flop / _rate(precision, resources, card) * uneven,
        "steps": chain * waves,
    }
    bound = max(times, key=lambda name: times[name])
    launch = n_kernels * card.launch
    return Line(
        kernel=call.name.removesuffix("_kernel (Triton)"),
        grid="x".join(map(str, call.grid or (call.results[0].shape if call.results else ()))),
        kernels=n_kernels,
        programs=programs,
        resident=resident,
        waves=waves,
        hbm_mb=hbm / 1e6,
        l2_mb=traffic / 1e6,
        gflop=work.flop / 1e9,
        steps=steps,
        us=1e6 * (times[bound] + launch),
        bound=bound if times[bound] > launch else "launch",
    )


def waves_of(work: Work, programs: int, places: int) -> float:
    """How many times the longest program's time all take, each starting where one before it has ended."""
    if len(work.programs) <= places:
        return ceil(programs / places)
    ends = [0.0] * places
    for program in work.programs:
        heapreplace(ends, ends[0] + program)
    return max(ends)


def _as_many_longest(work: Work, programs: int) -> float:
    """How many programs that take as long as the longest would do as much."""
    return sum(work.programs) or programs


def _rate(precision: str, resources: Resources | None, card: Card) -> float:
    """Operations a second."""
    of_tensor_cores = {"tf32": card.tensor_tf32, "bf16": card.tensor_bf16}
    if resources is None:
        return card.library * of_tensor_cores.get(precision, 67e12)
    if precision == "float32":
        return card.ffma
    return of_tensor_cores[precision] * (card.wgmma if "HGMMA" in resources.product else card.mma)


def _chain(work: Work, programs: int, resources: Resources, precision: str, card: Card) -> tuple[int, float]:
    """Dependent steps of one program, and the seconds that they take."""
    # Copies that are under way during a product hide their latency behind it.
    loads = work.loads + (0 if resources.in_flight > 0 else work.chunks)
    barriers = resources.once + work.passes * resources.a_pass + work.chunks * resources.a_chunk
    instruction = resources.product.split("+")[0]
    terms = work.depth * TERM_CYCLES.get(instruction, {}).get(precision, 0.0)
    # A wide tile waits for the units that make its products, of which it has a multiprocessor's, not for each result.
    of_longest = work.flop / _as_many_longest(work, programs)
    of_units = of_longest / (_rate(precision, resources, card) / card.multiprocessors) * card.clock
    cycles = work.chunks * card.chunk_cycles + max(terms, of_units)
    cycles += barriers * card.barrier_cycles + work.reductions * card.reduction_cycles
    steps = loads + work.chunks + barriers + work.reductions
    return round(steps), loads * card.l2_latency + cycles / card.clock


def predicted_update(calls: list[Call], card: Card, resources: Any = resources_of) -> list[Line]:
    """A line for each call. The cache is as the update before left it: the first of two rounds is not told."""
    cached = Cache(card.l2_bytes)
    for call in calls:
        predict(call, card, cached, None if call.kernel is None else resources(call))
    return [predict(call, card, cached, None if call.kernel is None else resources(call)) for call in calls]


def print_lines(lines: list[Line]) -> None:
    form = "{:22} {:>14} {:>8} {:>8} {:>5} {:>7} {:>7} {:>7} {:>6} {:>7}  {}"
    print(form.format(*(name for name in Line._fields if name != "kernels")))
    for line in lines:
        waves = f"{line.waves:.3g}"
        numbers = [waves, *(f"{value:.1f}" for value in (line.hbm_mb, line.l2_mb, line.gflop))]
        print(form.format(*line[:2], *line[3:5], *numbers, line.steps, f"{line.us:.1f}", line.bound))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", nargs="+", choices=tuple(SUITES), default=["mt10", "mt50"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--card", choices=tuple(CARDS), default="h200")
    parser.add_argument("--json", type=Path, help="write the lines here as well")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set, under which no kernel is launched")
    card, rows = CARDS[args.card], []
    for suite, precision in product(args.suite, args.precision):
        lines = predicted_update(calls_on_gpu(suite_config(suite, precision)), card)
        print(f"\n{suite}, {precision}, {args.card}")
        print_lines(lines)
        total, n_kernels = sum(line.us for line in lines), sum(line.kernels for line in lines)
        by_bound: dict[str, float] = {}
        for line in lines:
            by_bound[line.bound] = by_bound.get(line.bound, 0) + round(line.us, 1)
        most_first = sorted(by_bound.items(), key=lambda pair: -pair[1])
        shares = ", ".join(f"{bound} {us:.0f}" for bound, us in most_first)
        launches = 1e6 * card.launch * n_kernels
        print(f"{total:.0f} us predicted, {launches:.0f} of them {n_kernels} launches; by what bounds it: {shares}")
        row = {"suite": suite, "precision": precision, "card": args.card, "us": round(total, 1)}
        launched = [{"kernel": n.kernel, "grid": n.grid, "us": round(n.us, 1), "bound": n.bound} for n in lines]
        rows.append(row | {"kernels": n_kernels, "bounds": by_bound, "lines": launched})
    if args.json is not None:
        command = " ".join(["python -m d2r_fast.kernels.cost", *sys.argv[1:]])
        args.json.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
