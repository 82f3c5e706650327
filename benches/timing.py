"""Timing variants against each other in one run, and the report that the benchmarks print and write."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], object]


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Samples:
    """Times of one variant in milliseconds."""

    ms: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        if len(self.ms) == 1:  # which Python before 3.13 takes for too few
            return self.ms[0]
        return statistics.quantiles(self.ms, n=100, method="inclusive")[round(100 * q) - 1]

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    def as_dict(self) -> dict[str, float]:
        return {
            "median_ms": round(self.median, 4),
            "p10_ms": round(self.quantile(0.1), 4),
            "p90_ms": round(self.quantile(0.9), 4),
        }


def measure(variants: dict[str, Run], device: str, rounds: int, warmup: int = 3) -> dict[str, Samples]:
    """Call the variants in turn, A B C A B C, so that a busy moment of the machine hits all of them.

    On the CPU a call is timed by the wall clock, on a GPU by events around it.
    """
    samples = {name: Samples() for name in variants}
    for run in variants.values():
        for _ in range(warmup):
            run()
    synchronise(device)
    for _ in range(rounds):
        for name, run in variants.items():
            samples[name].ms.append(_time_on_gpu(run) if device == "cuda" else _time_on_cpu(run))
    return samples


def _time_on_cpu(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - begin)


def _time_on_gpu(run: Run) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def matmul(device: str, rows: int, width: int, dtype: torch.dtype = torch.float32) -> Run:
    """Products like those inside the operation, for the machine's rate: 2 x 15 of [rows,D] x [D,D]."""
    x = torch.randn(2, rows, width, device=device, dtype=dtype)
    weight = torch.randn(15, 2, width, width, device=device, dtype=dtype)
    out = torch.empty_like(x)

    def run() -> None:
        for w in weight:
            torch.bmm(x, w, out=out)

    return run


def matmul_flop(rows: int, width: int) -> float:
    """Arithmetic of one call of `matmul`."""
    return 2.0 * 2 * 15 * rows * width * width


def graphed(run: Run) -> Run:
    """A CUDA graph of `run`, replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be making what `run` reads
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, for a report."""
    versions = {"python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    if device == "cuda":
        return {"versions": versions | {"cuda": torch.version.cuda}, "machine": {"gpu": torch.cuda.get_device_name()}}
    cpu = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {"versions": versions, "machine": {"cpu": names[0] if names else platform.machine(), **cpu}}


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def print_table(rows: list[dict[str, Any]], columns: list[str]) -> None:
    """Rows as an aligned table; a missing value is left out."""
    cells = [columns, *([f"{row.get(c, '')}" for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for line in cells:
        print(
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            )
        )


def write_report(path: Path | None, command: str, device: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """The report as JSON, if a path is given."""
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"command": command, **environment(device), **more, "rows": rows}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")
