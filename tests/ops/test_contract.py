"""Every operation's schema stands once, and what runs it hangs behind its name."""

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

import d2r_fast
from d2r_fast.ops import ensemble_linear, routed_modules, routed_network, select_routes
from d2r_fast.ops.backends import INTERPRETED, availability
from d2r_fast.ops.routed_network import backward, forward

PACKAGE = Path(d2r_fast.__file__).parent
for path in (PACKAGE / "ops").glob("*.py"):
    import_module(f"d2r_fast.ops.{path.stem}")
NAMES = sorted(
    name.removeprefix("d2r_fast::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("d2r_fast::")
)
DIFFERENTIABLE = (
    "ensemble_linear",
    "expert_sum",
    "layer_chain",
    "level_gates",
    "module_levels",
    "routed_modules",
    "routed_network",
    "select_routes",
)
ON_GPU = [
    f"{name}{way}" for name in ("ensemble_linear", "routed_modules", "select_routes") for way in ("", "_backward")
]


def has_kernel(name, key):
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"d2r_fast::{name}", key)


def test_all_operations_are_looked_at_here():
    assert {f"{name}{way}" for name in DIFFERENTIABLE for way in ("", "_backward")} < set(NAMES)
    assert not [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("d2r_fast_")]


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_stands_once_and_kernel_and_fake_are_behind_its_name(name):
    source = "\n".join(path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py"))
    assert len(re.findall(rf"\b{name}\(Tensor", source)) == 1
    assert has_kernel(name, "CPU") and has_kernel(name, "Meta")
    kernel = next(line for line in torch._C._dispatch_dump(f"d2r_fast::{name}").splitlines() if line.startswith("CPU:"))
    assert re.search(r"registered at \S+\.cpp:", kernel), "the C++ kernel runs, not the reference"
    assert has_kernel(name, "Autograd") == (name in DIFFERENTIABLE)


@pytest.mark.parametrize("name", ON_GPU)
def test_triton_runs_on_a_gpu(name):
    assert has_kernel(name, "CUDA")


@pytest.mark.parametrize("shared", [False, True], ids=["rows_of_each", "rows_of_all"])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "to_x", "to_weight"])
def test_opcheck_of_the_linear_backward(shared, wanted):
    x = torch.randn(10, 5) if shared else torch.randn(3, 10, 5)
    weight, y, d_y = torch.randn(3, 4, 5), torch.randn(3, 10, 4).relu(), torch.randn(3, 10, 4)
    arguments = (d_y, x, weight, y, True, "float32", *wanted)
    torch.library.opcheck(torch.ops.d2r_fast.ensemble_linear_backward.default, arguments)


def network_arguments():
    """x, task, parameters of two networks with N=3, D=4, two tasks."""
    shapes = [(5, 6), (5, 5), (5, 2), (4, 5), (2, 4, 4), (3, 4), (5, 5), (6, 5)]
    weights = [torch.randn(2, *shape) for shape in shapes]
    parameters = [v.requires_grad_() for w in weights for v in (w, torch.randn(w.shape[:-1]))]
    return torch.randn(7, 6), torch.randint(2, (7,)), parameters


def test_whoever_wants_no_graph_gets_none_and_the_same_numbers():
    x, task, parameters = network_arguments()
    out, routes = routed_network(x, task, parameters, 2)
    cotangent = torch.randn_like(out)
    expected = torch.autograd.grad(out, parameters, cotangent)
    bare, *saved = forward(x, task, None, None, None, 2, True, True, "float32", 7, parameters)
    assert out.requires_grad and not bare.requires_grad and torch.equal(out, bare)
    assert torch.equal(routes.index, saved[1])
    d_parameters = [torch.full_like(p, torch.nan) for p in parameters]
    d_x = backward(cotangent, None, x, task, parameters, *saved, True, "float32", 7, 0, d_parameters)
    assert d_x.shape == x.shape and not d_x.requires_grad
    for ours, theirs in zip(d_parameters, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_the_operation_itself_has_the_gradient_of_the_public_function():
    """What a compiled graph holds, called without a compiler."""
    x, task, parameters = network_arguments()
    logits, h0 = torch.randn(2, 7, 6, requires_grad=True), torch.randn(2, 7, 4, requires_grad=True)
    routes = select_routes(logits.detach(), 2)
    gate = routes.gate.requires_grad_()
    ops = torch.ops.d2r_fast
    pairs = [
        (ensemble_linear(x, *parameters[:2], True, "cpp"), ops.ensemble_linear(x, *parameters[:2], True, "float32")),
        (select_routes(logits, 2).gate, ops.select_routes(logits, None, None, None, 2, 3, True)[0]),
        (
            routed_modules(h0, *parameters[8:10], routes),
            ops.routed_modules(h0, *parameters[8:10], *routes, True, "float32", True)[0],
        ),
        (
            routed_network(x, task, parameters, 2)[0],
            ops.routed_network(x, task, None, None, None, 2, True, True, "float32", 7, parameters)[0],
        ),
    ]
    leaves = [*parameters, logits, h0, gate]
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)
        found = [torch.autograd.grad(v.sum(), leaves, allow_unused=True) for v in (ours, theirs)]
        assert any(v is not None for v in found[0])
        for a, b in zip(*found, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.equal(a, b))


@pytest.mark.skipif(
    not (INTERPRETED and availability()["triton"].startswith("ready")), reason="needs Triton's interpreter"
)
def test_the_interpreter_is_not_quietly_replaced_in_a_compiled_graph():
    logits = torch.randn(1, 3, 6)
    torch.compiler.reset()
    compiled = torch.compile(lambda v: select_routes(v, 2, backend="triton"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="backend triton: its interpreter cannot be compiled"):
        compiled(logits)


def test_without_the_library_an_operation_runs_its_reference_or_says_what_is_missing(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "d2r_fast", ignore=shutil.ignore_patterns("_cpu.so", "__pycache__"))
    code = """
import torch, d2r_fast
from d2r_fast.ops.gumbel import gumbel
assert gumbel((3,), torch.ones(1)).isfinite().all()
from d2r_fast.ops import ensemble_linear, routed_network
linear = torch.zeros(1, 4, 2), torch.zeros(1, 3, 2), torch.zeros(1, 3)
assert ensemble_linear(*linear).shape == (1, 4, 3)
shapes = [(5, 6), (5, 5), (5, 2), (4, 5), (2, 4, 4), (3, 4), (6, 5)]
parameters = [v for shape in shapes for v in (torch.zeros(2, *shape), torch.zeros(2, *shape[:-1]))]
for call in (
    lambda: ensemble_linear(*linear, backend="cpp"),
    lambda: torch.ops.d2r_fast.ensemble_linear(*linear, False, "float32"),
    lambda: routed_network(torch.zeros(7, 6), torch.zeros(7, dtype=torch.int64), parameters, 2),
):
    try:
        call()
    except ValueError as error:
        assert str(error).startswith("backend cpp: not built: install a C++20 compiler"), error
    else:
        raise AssertionError("it ran")
"""
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
