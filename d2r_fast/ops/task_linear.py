"""Each row through the linear layer of its own task: a head a task, or weights composed by task."""

import torch
from torch import Tensor

from d2r_fast.ops.arguments import require_flag, require_tensor
from d2r_fast.ops.backends import Backend, Precision
from d2r_fast.ops.ensemble_linear import ensemble_linear


def task_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    task: Tensor,
    in_task_order: bool = False,
    relu: bool = False,
    backend: Backend = "auto",
    precision: Precision = "float32",
) -> Tensor:
    """y_b = W_t x_b + b_t with t = task_b, for each of E networks, with a ReLU behind it if `relu`.

    x              [E,B,in] float, or [B,in] for all networks alike
    weight, bias   [E,T,out,in] and [E,T,out]; dtype and device of x
    task           [B] integer in [0,T)
    in_task_order  the caller's word that the rows of a task stand together, B/T of each, tasks in order. Then a task's
                   layer multiplies its own rows alone; otherwise every layer runs for every row and the row's own
                   result is kept: the same values for T times the arithmetic.
    backend, precision  as in `ensemble_linear`

    Returns [E,B,out].
    ValueError: shapes, dtypes or devices disagree, or B is no multiple of T in task order. TypeError: an argument of
    another kind.
    """
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        require_tensor(name, value, "float")
    require_tensor("task", task, "integer")
    require_flag("in_task_order", in_task_order)
    if weight.dim() != 4 or bias.shape != weight.shape[:3]:
        raise ValueError(
            f"weight, bias: expected [E,T,out,in] and [E,T,out], got {list(weight.shape)} and {list(bias.shape)}"
        )
    n_nets, n_tasks, n_out, n_in = weight.shape
    if x.dim() not in (2, 3) or x.shape[-1] != n_in or (x.dim() == 3 and x.shape[0] != n_nets):
        raise ValueError(f"x: expected [E={n_nets},B,{n_in}] or [B,{n_in}], got {list(x.shape)}")
    rows = x.shape[-2]
    if task.shape != (rows,):
        raise ValueError(f"task: expected [B={rows}], got {list(task.shape)}")
    if task.device != x.device:
        raise ValueError(f"task: expected device {x.device} like x, got {task.device}")
    if in_task_order:
        if rows % n_tasks:
            raise ValueError(f"x: expected as many rows of each of {n_tasks} tasks, got {rows} rows in task order")
        own = x.expand(n_nets, rows, n_in).reshape(n_nets * n_tasks, rows // n_tasks, n_in)
        y = ensemble_linear(own, weight.flatten(0, 1), bias.flatten(0, 1), relu, backend, precision)
        return y.view(n_nets, rows, n_out)
    of_every_task = ensemble_linear(x, weight.flatten(1, 2), bias.flatten(1, 2), relu, backend, precision)
    by_task = of_every_task.unflatten(-1, (n_tasks, n_out))  # [E,B,T,out]
    return by_task[:, torch.arange(rows, device=task.device), task.to(torch.int64)]
