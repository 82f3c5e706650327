"""Each row through the layer of its own task, against one product a row."""

import pytest
import torch
from conftest import cpp_backends
from hypothesis import given
from hypothesis import strategies as st

from d2r_fast.ops.task_linear import task_linear


def row_by_row(x, weight, bias, task, relu=False):
    """The definition."""
    x = x.expand(len(weight), *x.shape[-2:])
    y = [[weight[e, t] @ x[e, b] + bias[e, t] for b, t in enumerate(task.tolist())] for e in range(len(weight))]
    y = torch.stack([torch.stack(of_net) for of_net in y])
    return y.relu() if relu else y


def make(n_nets, n_tasks, rows, n_in=3, n_out=2, shared=False):
    x = torch.randn(*([] if shared else [n_nets]), rows, n_in, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(n_nets, n_tasks, n_out, n_in, dtype=torch.float64, requires_grad=True)
    return x, weight, torch.randn(n_nets, n_tasks, n_out, dtype=torch.float64, requires_grad=True)


def outputs_and_gradients(run, inputs, cotangent):
    out = run(*inputs)
    return [out.detach(), *torch.autograd.grad((out * cotangent).sum(), inputs)]


@pytest.mark.parametrize("runs_on", ["reference", *(["cpp"] if cpp_backends() else [])])
@given(
    n_nets=st.integers(1, 3),
    n_tasks=st.integers(1, 4),
    each=st.integers(1, 5),
    shared=st.booleans(),
    relu=st.booleans(),
    ordered=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_it_is_one_product_a_row(runs_on, n_nets, n_tasks, each, shared, relu, ordered, seed):
    torch.manual_seed(seed)
    rows = n_tasks * each
    inputs = make(n_nets, n_tasks, rows, shared=shared)
    task = torch.arange(n_tasks).repeat_interleave(each) if ordered else torch.randint(n_tasks, (rows,))
    cotangent = torch.randn(n_nets, rows, 2, dtype=torch.float64)
    ours = outputs_and_gradients(
        lambda *a: task_linear(*a, task, in_task_order=ordered, relu=relu, backend=runs_on), inputs, cotangent
    )
    theirs = outputs_and_gradients(lambda *a: row_by_row(*a, task, relu), inputs, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("ordered", [False, True])
def test_gradcheck(ordered):
    task = torch.tensor([0, 0, 1, 1, 2, 2])
    assert torch.autograd.gradcheck(
        lambda *a: task_linear(*a, task, in_task_order=ordered, backend="reference"), make(2, 3, 6)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(2, 2, 3)}, r"expected \[E,T,out,in\] and \[E,T,out\], got \[2, 2, 3\] and"),
        ({"bias": torch.zeros(2, 3, 3)}, r"got \[2, 3, 2, 3\] and \[2, 3, 3\]"),
        ({"task": torch.zeros(5, dtype=torch.int64)}, r"task: expected \[B=6\], got \[5\]"),
        ({"x": torch.zeros(2, 6, 4)}, r"x: expected \[E=.*,3\]"),
    ],
)
def test_wrong_shapes_are_refused(change, message):
    x, weight, bias = (value.detach().float() for value in make(2, 3, 6))
    arguments = {"x": x, "weight": weight, "bias": bias, "task": torch.zeros(6, dtype=torch.int64)} | change
    with pytest.raises(ValueError, match=message):
        task_linear(**arguments)


def test_rows_in_task_order_are_as_many_of_each_task():
    x, weight, bias = make(2, 3, 7)
    with pytest.raises(ValueError, match="as many rows of each of 3 tasks, got 7 rows in task order"):
        task_linear(x, weight, bias, torch.zeros(7, dtype=torch.int64), in_task_order=True)
