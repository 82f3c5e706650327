"""Breaks kernels in every place that orders their threads, and counts how many breaks show.

    python tests/ptx/mutants.py [WORD]      kernels with WORD in their name; all take ten minutes

A mutant is a kernel's PTX without one barrier, wait, commit or proxy fence. It is caught if the emulator reports
something, or the result changes. What is not caught is printed: either the instruction is not needed at that size,
because another barrier orders the same accesses or they are a thread's own, or the emulator cannot see that it is.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}  # as `check_kernels` does
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from ptx.jit import emulated
from ptx.memory import EmulationError
from ptx.more_sizes import linear, modules
from torch import Tensor

from d2r_fast.kernels import expert_sum

ORDERING = re.compile(
    r"\s*(bar\.sync|bar\.warp\.sync|cp\.async\.wait_group|cp\.async\.commit_group|fence\.proxy|wgmma\.wait_group|"
    r"wgmma\.commit_group)"
)
Call = Callable[[], dict[str, Tensor]]


def calls() -> Iterator[tuple[str, Call]]:
    """What is run, by a name; each launches some kernels."""
    for size in ((1, 20, 4, 2, 24), (1, 20, 3, 2, 128)):
        case = modules.make_modules(*size)
        cotangent = torch.randn(case[0].shape)
        for precision in ("float32", "tf32", "bf16"):
            yield f"D{size[4]} {precision}", lambda c=case, g=cotangent, p=precision: modules.run_triton(c, g, True, p)
    layer = linear.make_case(1, 70, 70, 40)
    for precision in ("float32", "tf32", "bf16"):
        yield f"70to40 {precision}", lambda p=precision: linear.run(layer, True, p)
    for width in (12, 300):  # of several threads that hold a number, and of several warps
        v, weight, d_y = torch.randn(1, 2, 3, width), torch.randn(1, 2, 3), torch.randn(1, 2, width)
        experts = partial(expert_sum.backward, d_y, v, weight, True, 0.0)
        yield f"N3-D{width}", lambda run=experts: dict(zip("vw", run(), strict=True))


def without(text: str, line: int) -> str:
    """The text with one line (from 0) made empty, so that all others keep their numbers."""
    lines = text.split("\n")
    lines[line] = ""
    return "\n".join(lines)


def verdict(call: Call, name: str, line: int, expected: dict[str, Tensor]) -> str:
    """How a mutant was caught: the kinds of what was reported, an error, a wrong result; empty if it was not."""
    with emulated(edit=lambda kernel, text: without(text, line) if kernel == name else text) as device:
        try:
            result = call()
        except EmulationError as error:
            return str(error).split(":")[0]
    kinds = sorted({f.kind for ran in device.ran for f in ran.findings})
    same = all(value.numpy().tobytes() == expected[key].numpy().tobytes() for key, value in result.items())
    return ", ".join(kinds + ([] if same else ["wrong result"]))


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    ways = Counter[str]()
    for label, call in calls():
        texts: dict[str, str] = {}
        with emulated(edit=lambda kernel, text, texts=texts: texts.setdefault(kernel, text)):
            expected = call()
        for name, text in texts.items():
            places = [i for i, line in enumerate(text.split("\n")) if ORDERING.match(line)] if word in name else []
            print(f"{name} {label}: {len(places)} mutants", flush=True)
            for place in places:
                how = verdict(call, name, place, expected)
                ways[how] += 1
                if not how:
                    what = text.split("\n")[place].strip()
                    print(f"   not caught: without line {place + 1} `{what}`", flush=True)
    print(f"{ways.total() - ways['']} of {ways.total()} mutants caught")
    for how, count in ways.most_common():
        print(f"{count:>6} {how or 'not caught'}")


if __name__ == "__main__":
    main()
