"""How far outputs and gradients of the routed modules are from float64, by backend and by the products' precision.

    python benches/precision_error.py --device cpu --json benches/results/precision_error_cpu.json

Published sizes, sampled random routes; the truth is the reference in float64 on the same inputs. An error is the norm
of the difference over the norm of the truth; `largest`, in the JSON, is the largest difference over the largest
magnitude. A unit that rounding moves over its ReLU's kink changes its gradient by all of it, which is why gradients are
worse than outputs, and float32 is good or bad by luck. With TRITON_INTERPRET=1 the Triton kernels run on the CPU, its
tf32 as float32, and few `--rows` for it to end soon.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from routed_case import Case, Sizes, make_case, sampled_routes
from timing import print_table, write_report
from torch import Tensor

from d2r_fast import routed_modules
from d2r_fast.ops.backends import INTERPRETED, PRECISIONS, availability

QUANTITIES = ("output", "d_h0", "d_weight", "d_bias", "d_gate")


def results(case: Case, backend: str, precision: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and gradients, in the order of QUANTITIES."""
    h0, weight, bias, gate = (v.detach().to(dtype).requires_grad_() for v in (*case[:3], case.routes.gate))
    out = routed_modules(h0, weight, bias, case.routes._replace(gate=gate), backend=backend, precision=precision)
    return [out, *torch.autograd.grad(out, (h0, weight, bias, gate), case.cotangent.to(dtype))]


def with_tf32(run: Any) -> Any:
    """`run` while torch's own float32 products may round to tf32."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return run()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def variants(case: Case, device: str) -> dict[tuple[str, str], Any]:
    """What to compare, by backend and precision."""
    found: dict[tuple[str, str], Any] = {("reference", "float32"): partial(results, case, "reference", "float32")}
    if device == "cuda":
        found["reference", "tf32"] = partial(with_tf32, found["reference", "float32"])
    ready = {name for name, state in availability().items() if state.startswith("ready")}
    if "cpp" in ready and device == "cpu" and not INTERPRETED:
        for precision in ("float32", "bf16"):
            found["cpp", precision] = partial(results, case, "cpp", precision)
    if "triton" in ready and (device == "cuda" or INTERPRETED):
        for precision in PRECISIONS:
            found["triton", precision] = partial(results, case, "triton", precision)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=Sizes().b, help="B")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    torch.manual_seed(0)
    sizes = Sizes(b=args.rows)
    case = make_case(sizes, sampled_routes(sizes, args.device), args.device)
    truth = results(case, "reference", "float32", torch.float64)
    rows: list[dict[str, Any]] = []
    for (backend, precision), run in variants(case, args.device).items():
        row: dict[str, Any] = {"variant": backend, "suite": sizes.text, "device": args.device, "precision": precision}
        for name, value, exact in zip(QUANTITIES, run(), truth, strict=True):
            difference = value.double() - exact
            row[name] = float(f"{difference.norm() / exact.norm():.2e}")
            row[f"{name}_largest"] = float(f"{difference.abs().max() / exact.abs().max():.2e}")
        rows.append(row)
    print(f"{sizes.text}, {args.device}: norm of the error over the norm of the truth")
    print_table(rows, ["variant", "precision", *QUANTITIES])
    write_report(args.json, "python " + " ".join(["benches/precision_error.py", *sys.argv[1:]]), args.device, rows)


if __name__ == "__main__":
    main()
