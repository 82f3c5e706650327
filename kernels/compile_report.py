"""Compile every kernel ahead of time for sm_90 and report what came out; needs Triton, but no GPU.

    python -m d2r_fast.kernels.compile_report [--json FILE]

With another release of Triton, from a folder of its own (`benches/results/compile_report/` has three of them):

    pip install --no-deps --target DIR triton==3.6.0
    PYTHONPATH=DIR python -m d2r_fast.kernels.compile_report --json benches/results/compile_report/triton-3.6.0.json

One line a kernel, size and precision. Pointers are marked as 16-byte aligned, as the just-in-time launcher finds them:
otherwise every load would be scalar and the report about a kernel that nobody runs.
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from d2r_fast.kernels.compile_cases import ROWS, cases

TARGET = GPUTarget("cuda", 90, 32)
MAX_STACK = {
    "routed_modules_fwd": 32,
    "routed_modules_bwd": 80,
    **{"weight_gradient": 40, "network_gradient": 32, "ensemble_linear_bwd": 24},
    "split_base": 24,  # of 16 warps: 128 registers at most
}
"""Bytes a thread may spill (others: none), by the version of ptxas, of Triton 3.6 to 3.9. Going back through modules,
few warps hold what a route hands on to through its product: on an H200 as fast as more warps without."""
WARPGROUP = 4
"""Warps that make a wgmma together."""
MAX_SHARED = 227 * 1024
"""Bytes of shared memory that one program can have on sm_90."""

OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")
ALIGNED = ("n_weights", "n_biases", "n", "targets_begin", "n_targets")
"""Whole numbers that the launcher finds to be multiples of 16 at every size here."""
TYPES = {
    "*i32": ("index_ptr", "given_ptr", "active_ptr", "list_ptr", "order_ptr"),
    "*i64": ("size_ptr", "step_ptr", "table_ptr", "place_ptr", "task_place_ptr", "task_ptr"),
    "*u8": ("route_ptr", "routes_ptr"),
    "*i1": ("opened_ptr", "flow_ptr", "ended_ptr"),
    "*fp64": ("share_ptr", "corrections_ptr"),
}
"""What pointers point to, by name; float32 otherwise."""


class Row(NamedTuple):
    """One compiled kernel.

    registers    a thread
    stack        bytes a thread spills, and how many it may
    shared       bytes of shared memory a program
    loads        from global memory to registers, and how many of them are 128 bits wide
    copies       from global straight to shared memory, likewise
    in_flight    groups of copies that are still under way while a product is made: 0 where each is awaited before the
                 product that needs it and the next is issued after it, though there may be room for two
    once, a_pass, a_chunk  barriers of all threads of a program: in no loop; in loops, but for those of a product; in
                 one of these, the mean of them
    late         fences behind the barrier instead of in front of it: see `late_fences`
    uneven       sums that differ between threads: see `uneven_sums`
    product      the instruction of the products
    """

    kernel: str
    size: str
    precision: str
    registers: int
    stack: int
    max_stack: int
    shared: int
    loads: int
    wide_loads: int
    copies: int
    wide_copies: int
    in_flight: int
    once: int
    a_pass: int
    a_chunk: int
    late: int
    uneven: int
    product: str


def compile_kernel(label: str, size: str, precision: str, kernel: Any, launch: dict[str, Any]) -> Row:
    """Compile for sm_90 and read the machine code. `types` within launch: of pointers that are not of their name's."""
    constants = {name: value for name, value in launch.items() if name not in OPTIONS and name != "types"}
    types = {name: _type_of(name) for name in kernel.arg_names} | launch.get("types", {})
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in ALIGNED
    }
    options = {name: launch[name] for name in OPTIONS if launch.get(name) is not None}
    compiled = triton.compile(ASTSource(kernel, signature, constants, aligned), target=TARGET, options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "-res-usage", cubin.name)
        code = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", _run("nvdisasm", "-c", cubin.name))
    loads = [op for op in code if op.startswith("LDG.")]
    copies = [op for op in code if op.startswith("LDGSTS")]
    kinds = [kind for kind in ("HGMMA", "HMMA") if any(op.startswith(kind) for op in code)]
    if not kinds:
        kinds = ["FFMA" if "PRECISION" in constants else "-"]
    return Row(
        label,
        size,
        precision,
        registers=_number(r"REG:(\d+)", usage),
        stack=_number(r"STACK:(\d+)", usage),
        max_stack=MAX_STACK.get(label, 0),
        shared=compiled.metadata.shared,
        loads=len(loads),
        wide_loads=sum(".128" in op for op in loads),
        copies=len(copies),
        wide_copies=sum(".128" in op for op in copies),
        in_flight=copies_in_flight(compiled.asm["ptx"]),
        **barriers_by_loop(compiled.asm["ptx"]),
        late=late_fences(compiled.asm["ptx"]) if launch["num_warps"] > WARPGROUP else 0,
        uneven=uneven_sums(compiled.asm["ptx"]),
        product="+".join(kinds),
    )


def copies_in_flight(ptx: str) -> int:
    """The most groups of copies that are under way at a product, from one product to the next.

    The code is read once from top to bottom: a loop stands below the copies that are issued ahead of it. A wgmma is
    under way until it is awaited, other products where they stand.
    """
    pending = most = 0
    steps = r"cp\.async\.(commit_group)|cp\.async\.wait_group\s+(\d+)|(wgmma\.wait_group|mma\.sync|fma\.rn\.f32)"
    for commit, left, _ in re.findall(steps, ptx):
        if commit:
            pending += 1
        elif left:
            pending = min(pending, int(left))
        else:
            most = max(most, pending)
    return most


def barriers_by_loop(ptx: str) -> dict[str, int]:
    """How many barriers stand where, as `Row` has them. A loop is what lies between a label and a branch back to it;
    one of a product makes some, and no loop within it does."""
    lines = ptx.splitlines()
    label = {found[1]: at for at, line in enumerate(lines) if (found := re.match(r"(\$L\w+):", line))}
    jumps = [(at, found[1]) for at, line in enumerate(lines) if (found := re.search(r"\sbra\S*\s+(\$L\w+);", line))]
    loops = [(label[to], at) for at, to in jumps if label[to] <= at]
    tensor_cores = [at for at, line in enumerate(lines) if "mma.sync" in line or "wgmma.mma_async" in line]
    products = tensor_cores or [at for at, line in enumerate(lines) if "fma.rn.f32" in line]
    making = [(first, last) for first, last in loops if sum(first <= at <= last for at in products) >= 4]
    innermost = [
        (first, last)
        for first, last in making
        if not any(first <= a and b <= last for a, b in making if (a, b) != (first, last))
    ]
    counts = {"once": 0, "a_pass": 0, "a_chunk": 0}
    for at in (at for at, line in enumerate(lines) if "bar.sync" in line or "barrier.sync" in line):
        of_product = any(first <= at <= last for first, last in innermost)
        in_loop = any(first <= at <= last for first, last in loops)
        counts["a_chunk" if of_product else "a_pass" if in_loop else "once"] += 1
    return counts | {"a_chunk": -(-counts["a_chunk"] // max(1, len(innermost)))}


def late_fences(ptx: str) -> int:
    """Products that wgmma makes of what threads put into shared memory, with a barrier and then a fence in between.

    Each thread's fence is for what it wrote itself. With a barrier behind it all are past theirs when a product starts;
    with none, those of the warpgroup that makes it.
    """
    late, written, behind, alone = 0, False, False, False
    for step in re.findall(r"st\.shared|bar\.sync|fence\.proxy\.async|wgmma\.mma_async", ptx):
        if step == "st.shared":
            written = True
        elif step == "bar.sync":
            behind, alone = written, False
        elif step == "fence.proxy.async":
            written, alone = False, behind
        else:
            late, alone = late + alone, False
    return late


def uneven_sums(ptx: str) -> int:
    """Additions between threads that leave them with different sums, though each may store its own to the same word.

    Two threads swap values, and each adds its own to the other's: one sum, unless its own is a product contracted into
    the addition, so that each rounds the other's only. Counted where the PTX has it (fma), and where ptxas may still
    do it: to a mul and an add that both leave it the rounding (no .rn).
    """
    own = dict(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+)(?:\|%\w+)?,\s*(%\w+)", ptx))
    products = set(re.findall(r"mul(?:\.ftz)?\.f32\s+(%\w+)", ptx))
    uneven = 0
    for op, operands in re.findall(r"(fma\.rn|add)(?:\.ftz)?\.f32\s+%\w+,([^;]+);", ptx):
        swapped = [own[register] for register in re.findall(r"%\w+", operands) if register in own]
        uneven += len(swapped) > 0 and (op == "fma.rn" or not products.isdisjoint(swapped))
    return uneven


def _type_of(name: str) -> str:
    if not name.endswith("_ptr"):
        return "i32"
    return next((kind for kind, names in TYPES.items() if name in names), "*fp32")


def _run(tool: str, *arguments: str) -> str:
    """A CUDA binary tool's output: Triton's own copy, else the one on the path."""
    own = Path(triton.__file__).parent / "backends/nvidia/bin" / tool
    path = str(own) if own.exists() else shutil.which(tool)
    if path is None:
        raise FileNotFoundError(f"{tool}: neither in {own.parent} nor on the path")
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"cuobjdump: expected {pattern} in its output, got {text!r}")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    parser.add_argument("--short", action="store_true", help="without what compiles longest")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: an interpreted kernel is not compiled; unset it")
    print(f"triton {triton.__version__}, sm_90, B={ROWS}; shared memory is at most {MAX_SHARED}")
    line = "{:26} {:12} {:9} {:>9} {:>5} {:>9} {:>6} {:>5} {:>10} {:>6} {:>11} {:>9} {:>4} {:>6} {:>7} {:>4} {:>6} {}"
    print(line.format(*Row._fields))
    rows = []
    for case in cases(arguments.short):
        rows.append(compile_kernel(*case))
        print(line.format(*rows[-1]), flush=True)
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row._asdict()) for row in rows)
        head = f'"triton": "{triton.__version__}", "command": "python -m d2r_fast.kernels.compile_report"'
        arguments.json.write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
