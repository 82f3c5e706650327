"""The linear layers around the routed modules: our Triton kernels against torch's products, on a GPU.

    python benches/linear_layers.py --json benches/results/CARD/linear_layers.json

Per layer of the published critics: y = ReLU(x W^T + b), and the gradients of x, W and b. Variants take turns in one
run, each as a CUDA graph, so that launches do not count; `again` is the first variant once more, for the noise. `error`
is the largest difference from float64 over the largest magnitude, of all four. The Triton kernels are what
`ensemble_linear` and an update run on a GPU in every precision; whether torch's should, this and the whole update say.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import graphed, measure, print_table, write_report
from torch import Tensor

from d2r_fast.kernels import ensemble_linear as linear
from d2r_fast.ops.backends import PRECISIONS
from d2r_fast.ops.reference.products import product

LAYERS = ((43, 400), (400, 400), (400, 256), (256, 256), (256, 136), (400, 128), (128, 1))
Results = tuple[Tensor, ...]


def make_case(n_nets: int, n_rows: int, n_in: int, n_out: int, device: str) -> Results:
    """x, W, b and the gradient of y. No output is near the kink of its ReLU, where rounding would decide."""
    shapes = (n_rows, n_in), (n_out, n_in), (n_out,), (n_rows, n_out)
    x, weight, bias, d_y = (torch.randn(n_nets, *shape, device=device) for shape in shapes)
    return x, weight / n_in**0.5, torch.where(bias > 0, 9.0, -9.0), d_y


def by_torch(case: Results, precision: str) -> Results:
    """As the layers run on a GPU without our kernels."""
    x, weight, bias, d_y = case
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    y = product(x, weight.mT, precision, bias[:, None]).relu_()
    d_z = torch.ops.aten.threshold_backward(d_y, y, 0)
    results = y, product(d_z, weight, precision), product(d_z.mT, x, precision), d_z.sum(1)
    torch.backends.cuda.matmul.allow_tf32 = before
    return results


def by_triton(case: Results, precision: str) -> Results:
    x, weight, bias, d_y = case
    y = linear.forward(x, weight, bias, True, precision)
    return y, *linear.backward(d_y, x, weight, y, True, precision, True, True)


VARIANTS: dict[str, Callable[[Results, str], Results]] = {"torch": by_torch, "triton": by_triton, "again": by_torch}


def error(ours: Results, truth: Results) -> float:
    """Largest difference over the largest magnitude of each, the worst of them."""
    relative = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(ours, truth, strict=True)]
    return float(f"{torch.stack(relative).max().item():.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1280, help="B")
    parser.add_argument("--networks", type=int, default=2, help="E")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    for n_in, n_out in LAYERS:
        case = make_case(args.networks, args.rows, n_in, n_out, "cuda")
        truth = by_torch(tuple(v.double() for v in case), "float32")
        for precision in PRECISIONS:
            runs = {name: graphed(partial(run, case, precision)) for name, run in VARIANTS.items()}
            row: dict[str, Any] = {"layer": f"{n_in} to {n_out}", "precision": precision}
            for name, samples in measure(runs, "cuda", args.rounds).items():
                row[f"{name}_us"] = round(1e3 * samples.median, 1)
            row["ratio"] = round(row["torch_us"] / row["triton_us"], 2)
            for name in ("torch", "triton"):
                row[f"{name}_error"] = error(VARIANTS[name](case, precision), truth)
            rows.append(row)
    print(f"E={args.networks}, B={args.rows}, ReLU; forward and all gradients, {torch.cuda.get_device_name()}")
    print_table(rows, list(rows[0]))
    write_report(args.json, "python " + " ".join(["benches/linear_layers.py", *sys.argv[1:]]), "cuda", rows)


if __name__ == "__main__":
    main()
