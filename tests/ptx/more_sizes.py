"""Tests of the kernels that only `check_kernels.py` runs: every precision at sizes where the interpreter, which has one
thread and one precision, would tell nothing new; and the kernels of other networks than D2R's."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
import test_linear_kernels as linear
import test_triton_kernels as modules

from d2r_fast.kernels import expert_sum, module_levels
from d2r_fast.ops.reference import expert_sum as expert_sum_reference
from d2r_fast.ops.reference import module_levels as levels_reference

every_precision = pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
ROUNDING = {"float32": 1e-5, "tf32": 4 * 2.0**-10, "bf16": 4 * 2.0**-8}
"""Largest error by the largest value: rounding of the operands, a few times over."""

SIZES = [
    (2, 20, 16, 2, 128, "random", True, False),  # as published
    (1, 20, 16, 2, 128, "alternating", False, True),
    (1, 17, 3, 2, 33, "highest", True, False),  # rows that are no multiple of 16 bytes
    (1, 18, 6, 6, 40, "random", True, True),  # more than 4 slots: the loops over them are not unrolled
    (1, 20, 4, 2, 256, "random", True, False),  # the settings of widths past 128
    (1, 300, 3, 2, 16, "alternating", True, False),  # three splits: the reduction runs
    (1, 20, 16, 2, 20, "lowest", True, False),  # hardly any module is active
    (2, 130, 4, 1, 64, "single", True, False),
    (2, 37, 5, 2, 24, "random", False, True),
]


def assert_near(ours, truth, precision):
    for name, value in truth.items():
        error = modules.largest(ours[name].double() - value)
        assert error <= ROUNDING[precision] * max(1.0, modules.largest(value)), (name, error)


@every_precision
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "E{}-B{}-N{}-K{}-D{}-{}".format(*size))
def test_modules(size, precision):
    *shape, kind, residual, sort_rows = size
    case = modules.make_modules(*shape, kind)
    cotangent = torch.randn(case[0].shape).bfloat16().float()
    ours = modules.run_triton(case, cotangent, residual, precision, sort_rows)
    assert_near(ours, modules.truth_of(case, cotangent, residual), precision)


@every_precision
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("size", linear.SIZES, ids=lambda size: "E{}-B{}-{}to{}".format(*size))
def test_linear_layers(size, shared, precision):
    case = linear.make_case(*size, shared)
    assert_near(linear.run(case, True, precision), linear.truth_of(case, True), precision)


@pytest.mark.parametrize("orthogonal", [False, True], ids=["plain", "orthogonal"])
@pytest.mark.parametrize(("n", "width"), [(1, 3), (3, 12), (4, 40), (6, 400)])
def test_sums_of_experts(n, width, orthogonal):
    v, weight, d_y = torch.randn(2, 3, n, width), torch.randn(2, 3, n), torch.randn(2, 3, width)
    leaves = [x.double().requires_grad_() for x in (v, weight)]
    y = expert_sum_reference.expert_sum(*leaves, orthogonal, 0.0)
    truth = dict(zip(("y", "v", "weight"), (y.detach(), *torch.autograd.grad(y, leaves, d_y.double())), strict=True))
    gradients = expert_sum.backward(d_y, v, weight, orthogonal, 0.0)
    ours = dict(zip(("y", "v", "weight"), (expert_sum.forward(v, weight, orthogonal, 0.0), *gradients), strict=True))
    assert_near(ours, truth, "float32")


@pytest.mark.parametrize(("n_levels", "n", "width"), [(2, 4, 128), (3, 2, 33)])
def test_levels_of_modules(n_levels, n, width):
    e, b, n_in = 2, 19, 20
    parameters = []
    for level in range(n_levels):
        n_before = n_in if level == 0 else width
        parameters += [torch.randn(e, n, width, n_before) / n_before**0.5, torch.randn(e, n, width)]
    u, gate, d_y = torch.randn(e, b, n_in), torch.randn(e, b, (n_levels - 1) * n * n + n), torch.randn(e, b, width)
    leaves = [x.double().requires_grad_() for x in (u, gate, *parameters)]
    y = levels_reference.module_levels(leaves[0], leaves[1], leaves[2:], "float32")
    truth = dict(enumerate([y.detach(), *torch.autograd.grad(y, leaves, d_y.double())]))
    own, kept = module_levels.forward(u, gate, "float32", True, parameters)
    d_parameters = [torch.zeros_like(x) for x in parameters]
    d_u, d_gate = module_levels.backward(d_y, u, gate, own, kept, "float32", parameters, d_parameters)
    assert_near(dict(enumerate([own, d_u, d_gate, *d_parameters])), truth, "float32")
