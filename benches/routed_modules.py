"""The routed modules: how long, against what, and how far from what the arithmetic alone would take.

    python benches/routed_modules.py --device cpu --json benches/results/routed_modules_cpu.json --plots docs

Sampled random routes as training draws them, and the same network with every module active. Variants take turns in one
run and are checked against the reference first. The floor is the arithmetic of the active modules over the rate that
the library's own matrix product reaches at these sizes in the same run. `plain-autograd` is what a user would write:
gathers and torch's own gradients.
"""

import argparse
import ctypes
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from routed_case import Case, Sizes, make_case, routes_with_active, sampled_routes
from timing import Run, graphed, matmul, matmul_flop, measure, print_table, write_report
from torch import Tensor

from d2r_fast import Routes, count_active, routed_modules
from d2r_fast.ops.backends import availability
from d2r_fast.ops.cpp.library import has_bf16_products

ROWS = (256, 512, 1280, 4096, 16384)
MODULES = (4, 8, 16, 32)


def plain_autograd(h0: Tensor, weight: Tensor, bias: Tensor, routes: Routes) -> Tensor:
    """The equations as a user would write them; ResRouting left out, so gradients differ where flow is off."""
    n_modules, k = routes.index.shape[2:]
    h = h0.unsqueeze(2)  # [E,B,i,D]
    for i in range(1, n_modules + 1):
        kept = min(k, i)
        at = routes.index[:, :, i - 1, :kept, None].long().expand(-1, -1, -1, h.shape[3])
        x = (routes.gate[:, :, i - 1, :kept, None] * h.gather(2, at)).sum(2)
        if i < n_modules:
            out = torch.baddbmm(bias[:, i - 1, None], x, weight[:, i - 1].mT).relu() + x
            h = torch.cat([h, out.unsqueeze(2)], 2)
    return x


def calls(op: Any, case: Case, backward: bool) -> Run:
    """One forward, or forward and backward; gradients are dropped."""
    inputs = (case.h0, case.weight, case.bias, case.routes)
    leaves = (*inputs[:3], case.routes.gate)

    def forward() -> None:
        with torch.no_grad():
            op(*inputs)

    def both() -> None:
        torch.autograd.grad(op(*inputs), leaves, case.cotangent)

    return both if backward else forward


def operations(device: str, fast: str, precisions: list[str], compiled: bool) -> dict[str, Any]:
    """The variants by name, the reference first."""
    reference = partial(routed_modules, backend="reference")
    found: dict[str, Any] = {"reference": reference, "plain-autograd": plain_autograd}
    if compiled:
        found["reference-compiled"] = torch.compile(reference, dynamic=False)
    for precision in precisions:
        found[fast if precision == "float32" else f"{fast}-{precision}"] = partial(
            routed_modules, backend=fast, precision=precision
        )
    return found


def check(ops: dict[str, Any], case: Case) -> None:
    """Every variant agrees with the reference; raises AssertionError with the difference."""
    inputs = (case.h0, case.weight, case.bias, case.routes)
    expected = ops["reference"](*inputs).detach()
    for name, op in ops.items():
        tolerance = 2e-2 if "bf16" in name or "tf32" in name else 1e-4
        error = ((op(*inputs).detach() - expected).abs().max() / expected.abs().max()).item()
        assert error <= tolerance, f"{name}: differs from the reference by {error:.1e}, expected at most {tolerance}"


def table(sizes: Sizes, device: str, fast: str, precisions: list[str], rounds: int) -> list[dict[str, Any]]:
    """Every variant, sampled routes and all modules active, forward and forward + backward."""
    some = make_case(sizes, sampled_routes(sizes, device), device)
    every = make_case(sizes, routes_with_active(sizes, sizes.n, device), device)
    ops = operations(device, fast, precisions, compiled=True)
    check(ops, some)
    variants: dict[str, Run] = {"matmul": matmul(device, sizes.b, sizes.d)}
    for backward in (False, True):
        for active, case in (("sampled", some), ("all", every)):
            for name, op in ops.items():
                run = calls(op, case, backward)
                variants[f"{name}|{active}|{'fwd+bwd' if backward else 'fwd'}"] = run
                if name == "reference" and device == "cuda":
                    variants[f"reference-graphed|{active}|{'fwd+bwd' if backward else 'fwd'}"] = graphed(run)
    samples = measure(variants, device, rounds)
    rate = matmul_flop(sizes.b, sizes.d) / samples["matmul"].median / 1e6  # GFLOP/s
    rows = []
    for key, measured in samples.items():
        if key == "matmul":
            continue
        name, active, direction = key.split("|")
        case = some if active == "sampled" else every
        floor = case.products() * (3 if direction == "fwd+bwd" else 1) / rate / 1e6
        precision = name.rpartition("-")[2] if name.endswith(("bf16", "tf32")) else "float32"
        rows.append(
            {
                "variant": name,
                "suite": sizes.text,
                "device": device,
                "precision": precision,
                "active": active,
                "direction": direction,
                **measured.as_dict(),
                "ratio_to_reference": round(samples[f"reference|{active}|{direction}"].median / measured.median, 2),
                "over_floor": round(measured.median / floor, 2),
                "over_own_all_active": round(measured.median / samples[f"{name}|all|{direction}"].median, 3),
                "matmul_gflops": round(rate, 1),
            }
        )
    return rows


def sweep(sizes: Sizes, device: str, fast: str, rounds: int) -> list[dict[str, Any]]:
    """Forward + backward of the fast backend against the reference over active modules, rows and modules."""
    points: list[tuple[str, float, Case]] = []
    for n_active in range(sizes.k, sizes.n + 1, 2):
        case = make_case(sizes, routes_with_active(sizes, n_active, device), device)
        points.append(("active modules", n_active, case))
    for b in ROWS:
        at = sizes._replace(b=b)
        points.append(("rows", b, make_case(at, sampled_routes(at, device), device)))
    for n in MODULES:
        at = sizes._replace(n=n)
        points.append(("modules", n, make_case(at, sampled_routes(at, device), device)))
    rows = []
    for axis, value, case in points:
        ops = {name: partial(routed_modules, backend=name) for name in (fast, "reference")}
        # A median of few small calls would be the machine's mood; the reference takes seconds where rows are many.
        few = max(3, rounds // 3 if case.h0.shape[1] <= 4096 else rounds // 6)
        count = {fast: max(10, rounds, rounds * sizes.b // case.h0.shape[1]), "reference": few}
        # One after the other: the reference's gigabytes of temporaries would make the other's fresh memory slow.
        samples = {
            name: measure({name: calls(op, case, True)}, device, count[name], warmup=max(3, count[name] // 5))[name]
            for name, op in ops.items()
        }
        for name, measured in samples.items():
            ratio = round(samples["reference"].median / measured.median, 2)
            rows.append(
                {"variant": name, "axis": axis, "value": value, "device": device, "precision": "float32"}
                | {"direction": "fwd+bwd", **measured.as_dict(), "ratio_to_reference": ratio}
                | {"us_per_row": round(1e3 * measured.median / case.h0.shape[1], 3)}
            )
    return rows


def spread(swept: list[dict[str, Any]], fast: str) -> float:
    """The dearest row count's time a row over the cheapest's: 1 where time is linear in rows."""
    us = [row["us_per_row"] for row in swept if row["axis"] == "rows" and row["variant"] == fast]
    return max(us) / min(us)


def extra_memory_mib(op: Any, case: Case) -> float:
    """Peak of this process above where it stood before a forward + backward, in MiB (Linux, CPU)."""
    run = calls(op, case, True)
    run()
    ctypes.CDLL(None).malloc_trim(0)  # what the C library keeps for later would hide what the call needs
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = psutil.Process().memory_info().rss
    run()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return (peak - before) / 2**20


def plot(rows: list[dict[str, Any]], folder: Path, device: str) -> None:
    """Time against active modules, rows and modules, one picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes_names = ("active modules", "rows", "modules")
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 3.8))
    for axis, name in zip(axes, axes_names, strict=True):
        for variant in dict.fromkeys(row["variant"] for row in rows):
            mine = [row for row in rows if row["axis"] == name and row["variant"] == variant]
            axis.plot([r["value"] for r in mine], [r["median_ms"] for r in mine], "o-", label=variant)
        axis.set(xlabel=name, ylabel="forward + backward, ms")
        if name == "rows":
            axis.set(xscale="log", yscale="log")
        else:
            axis.set(ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"routed_modules_{device}.png", dpi=120)
    print(f"picture    {folder / f'routed_modules_{device}.png'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30, help="times that each variant is measured")
    parser.add_argument("--rows", type=int, default=Sizes().b, help="B")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--plots", type=Path, help="folder for the picture")
    args = parser.parse_args()
    fast = "cpp" if args.device == "cpu" else "triton"
    if not availability()[fast].startswith("ready"):
        parser.error(f"backend {fast}: {availability()[fast]}")
    torch.manual_seed(0)
    sizes = Sizes(b=args.rows)
    precisions = ["float32", "bf16"] if fast == "cpp" else ["float32", "tf32", "bf16"]
    if fast == "cpp" and not has_bf16_products():
        precisions = ["float32"]
        print("no cpp-bf16: this processor has no bf16 products, so it would be the float32 variant again")
    rows = table(sizes, args.device, fast, precisions, args.rounds)
    print(f"\n{sizes.text}, {args.device}, matrix products alone {rows[0]['matmul_gflops']} GFLOP/s")
    columns = ["variant", "active", "direction", "median_ms", "p10_ms", "p90_ms", "ratio_to_reference", "over_floor"]
    print_table(rows, [*columns, "over_own_all_active"])
    swept = sweep(sizes, args.device, fast, args.rounds)
    print()
    print_table(swept, ["variant", "axis", "value", "median_ms", "ratio_to_reference", "us_per_row"])
    linear = spread(swept, fast)
    print(f"\n{fast}, us_per_row over {ROWS[0]} to {ROWS[-1]} rows: max / min {linear:.3f}")
    memory = {}
    if args.device == "cpu":
        case = make_case(sizes, sampled_routes(sizes, "cpu"), "cpu")
        kept = int(count_active(case.routes.active, sizes.n).sum()) * sizes.d * (4 + 1) / 2**20
        extra = extra_memory_mib(partial(routed_modules, backend=fast), case)
        memory = {"extra_memory_mib": round(extra, 1), "saved_activations_mib": round(kept, 1)}
        print(f"\npeak above rest {extra:.0f} MiB, of which saved for backward {kept:.0f} MiB")
    if args.plots:
        plot(swept, args.plots, args.device)
    command = "python " + " ".join(["benches/routed_modules.py", *sys.argv[1:]])
    write_report(args.json, command, args.device, [*rows, *swept], us_per_row_max_over_min=round(linear, 3), **memory)


if __name__ == "__main__":
    main()
