"""Kernels that are broken on purpose, each of which must be caught: without a barrier, a wait, a fence, a sum. Run by
`test_kernels.py` in a process of its own, where kernels are not interpreted.

`python tests/ptx/mutants.py` breaks every kernel in every such place."""

import re

import pytest
import torch
from ptx.jit import emulated
from ptx.memory import EmulationError
from ptx.more_sizes import linear, modules

FWD, BWD, WEIGHT = "routed_modules_fwd_kernel", "routed_modules_bwd_kernel", "weight_gradient_kernel"
SMALL, PIPED = (1, 20, 4, 2, 24), (1, 20, 3, 2, 128)  # the latter with copies ahead of the products
BARRIER = r"bar\.sync \t0;"


def run_modules(size, precision, edit):
    """Results, expected ones, and the kinds of what was found."""
    case = modules.make_modules(*size)
    cotangent = torch.randn(case[0].shape)
    with emulated(edit=edit) as device:
        ours = modules.run_triton(case, cotangent, True, precision)
    return ours, modules.truth_of(case, cotangent), {f.kind for ran in device.ran for f in ran.findings}


def editor(kernel, change):
    """Changes the text of one kernel; an error where there was nothing to change."""

    def edit(name, text):
        if name != kernel:
            return text
        changed = change(text)
        assert changed != text
        return changed

    return edit


def without(pattern):
    """Changes a text so that nothing matches; lines keep their numbers."""
    return lambda text: re.sub(pattern, lambda match: " " * len(match[0]), text)


def without_barrier_after_global_stores(text):
    """Every barrier that follows a store to global memory before anything is stored to shared memory."""
    lines, stored = text.split("\n"), False
    for i, line in enumerate(lines):
        if "st.global" in line:
            stored = True
        elif re.search(r"st\.shared|cp\.async\.c", line):
            stored = False
        elif re.search(BARRIER, line) and stored:
            lines[i] = ""
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("kernel", "precision", "size", "change", "expected"),
    [
        (FWD, "float32", SMALL, without_barrier_after_global_stores, "write-read race"),
        (BWD, "tf32", SMALL, without_barrier_after_global_stores, "write-read race"),
        (WEIGHT, "float32", SMALL, without_barrier_after_global_stores, "write-read race"),
        (FWD, "tf32", PIPED, without(r"cp\.async\.wait_group \t\d;"), "copy in flight"),
        (WEIGHT, "bf16", PIPED, without(r"wgmma\.wait_group\.sync\.aligned 0;"), "copy in flight"),
        (WEIGHT, "tf32", PIPED, without(r"fence\.proxy\.async\.shared::cta;"), "proxy"),
        (FWD, "float32", SMALL, lambda text: text.replace("%ctaid.y;", "%ctaid.x;"), "race between CTAs"),
    ],
)  # fmt: skip
def test_what_orders_threads_is_missed(kernel, precision, size, change, expected):
    assert expected in run_modules(size, precision, editor(kernel, change))[2]


def test_an_address_outside_an_allocation_is_told():
    change = lambda text: re.sub(r"(st\.global\.\S*b32 \[ %rd\d+ \+ )0", r"\g<1>16384", text)  # noqa: E731
    with pytest.raises(EmulationError, match="out of bounds"):
        run_modules(SMALL, "float32", editor(FWD, change))


def test_a_wrong_product_shows():
    """Without the sum in the forward's products the result is off."""
    change = lambda text: re.sub(r"fma\.rn\.f32( \t%r\d+, %r\d+, %r\d+), %r\d+;", r"mul.f32\1;", text)  # noqa: E731
    ours, truth, _ = run_modules(SMALL, "float32", editor(FWD, change))
    assert (ours["out"] - truth["out"]).abs().max() > 1e-2


def test_results_do_not_depend_on_the_schedule():
    case = linear.make_case(1, 70, 40, 70)
    results = []
    for seed, groups in ((0, 1), (1, 2), (2, 8)):
        with emulated(seed=seed, groups=groups):
            results.append(linear.run(case, True, "bf16"))
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)
