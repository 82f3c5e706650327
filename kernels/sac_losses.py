"""Every loss of multi-task SAC and its gradient at the networks' outputs, in one launch
(`d2r_fast.ops.sac_losses` is contract and oracle)."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, check_in_place, check_real, check_tensor, packed

MOST_ROWS = 512  # of a task at once: 4 a thread


@triton.jit
def sac_losses_kernel(
    q_ptr, target_q_ptr, logp_ptr, reward_ptr, terminal_ptr, log_alpha_ptr,
    losses_ptr, d_q_ptr, d_logp_ptr, d_log_alpha_ptr, n_tasks,
    E: tl.constexpr, PER_TASK: tl.constexpr, GAMMA: tl.constexpr, TARGET_ENTROPY: tl.constexpr,
    MAX_TASK_LOSS: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_TASKS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (T,); a program owns the rows of one task, and looks at log alpha of all for its weight.

    Two passes over the rows: the losses say whether the task counts, the gradients are 0 where it does not. The second
    finds in the cache what the first has read: 3 E + 4 numbers a row; it writes 2 E + 1. Sums are taken in one order,
    whatever the device does meanwhile.
    """
    task = tl.program_id(0)
    n_rows = tl.cast(n_tasks, tl.int64) * PER_TASK
    first = task.to(tl.int64) * PER_TASK
    # Values and log probabilities at obs come first, then those at the other actions, or at next_obs.
    frozen_q_ptr, d_frozen_q_ptr, next_logp_ptr = q_ptr + n_rows, d_q_ptr + n_rows, logp_ptr + n_rows
    log_alpha = tl.load(log_alpha_ptr + task)
    alpha = tl.exp(log_alpha)
    if WEIGHTED:
        weight = _task_weight(log_alpha_ptr, log_alpha, n_tasks, BLOCK_TASKS)
    else:
        weight = tl.full((), 1.0, log_alpha.dtype)

    n = tl.full((), PER_TASK, log_alpha.dtype)  # a number to divide by: the mean of no rows is NaN, not an error
    sum_logp = tl.zeros((BLOCK_ROWS,), log_alpha.dtype)
    actor, critic = sum_logp, sum_logp
    for start in range(0, PER_TASK, BLOCK_ROWS):
        row, inside = _rows(first, start, PER_TASK, BLOCK_ROWS)
        logp = tl.load(logp_ptr + row, mask=inside, other=0.0)
        best = _lowest(frozen_q_ptr, row, inside, 2 * n_rows, E)
        y = _target(target_q_ptr, next_logp_ptr, reward_ptr, terminal_ptr, row, inside, n_rows, alpha, E, GAMMA)
        sum_logp += logp
        actor += tl.where(inside, alpha * logp - best, 0.0)
        for e in tl.static_range(E):
            error = tl.where(inside, tl.load(q_ptr + 2 * e * n_rows + row, mask=inside, other=0.0) - y, 0.0)
            critic = tl.fma(error, error, critic)
    mean_logp = tl.sum(sum_logp, 0) / n
    alpha_loss = -log_alpha * (mean_logp + TARGET_ENTROPY)
    actor_loss = weight * (tl.sum(actor, 0) / n)
    critic_loss = weight * (tl.sum(critic, 0) / n)
    kept = alpha_loss + actor_loss + critic_loss <= MAX_TASK_LOSS

    tl.store(losses_ptr + task, alpha_loss)
    tl.store(losses_ptr + n_tasks + task, actor_loss)
    tl.store(losses_ptr + 2 * n_tasks + task, critic_loss)
    tl.store(losses_ptr + 3 * n_tasks + task, tl.where(kept, 0.0, 1.0))
    tl.store(losses_ptr + 4 * n_tasks + task, -mean_logp)
    tl.store(losses_ptr + 5 * n_tasks + task, alpha)
    # The mean over tasks divides by all of them; what is left out counts as zero.
    tl.store(d_log_alpha_ptr + task, tl.where(kept, -(mean_logp + TARGET_ENTROPY) / n_tasks, 0.0))

    share = tl.where(kept, weight / n / n_tasks, 0.0)  # of a row in the mean over rows and tasks
    d_logp = tl.where(kept, share * alpha, 0.0)
    for start in range(0, PER_TASK, BLOCK_ROWS):
        row, inside = _rows(first, start, PER_TASK, BLOCK_ROWS)
        tl.store(d_logp_ptr + row, d_logp, mask=inside)
        y = _target(target_q_ptr, next_logp_ptr, reward_ptr, terminal_ptr, row, inside, n_rows, alpha, E, GAMMA)
        best = _lowest(frozen_q_ptr, row, inside, 2 * n_rows, E)
        n_best = tl.zeros((BLOCK_ROWS,), log_alpha.dtype)
        for e in tl.static_range(E):
            error = tl.load(q_ptr + 2 * e * n_rows + row, mask=inside, other=0.0) - y
            tl.store(d_q_ptr + 2 * e * n_rows + row, tl.where(kept, 2 * share * error, 0.0), mask=inside)
            frozen_q = tl.load(frozen_q_ptr + 2 * e * n_rows + row, mask=inside, other=0.0)
            n_best += tl.where(frozen_q == best, 1.0, 0.0)
        for e in tl.static_range(E):  # equal ones share the gradient
            frozen_q = tl.load(frozen_q_ptr + 2 * e * n_rows + row, mask=inside, other=0.0)
            tl.store(
                d_frozen_q_ptr + 2 * e * n_rows + row, tl.where(frozen_q == best, -share / n_best, 0.0), mask=inside
            )


@triton.jit
def _task_weight(log_alpha_ptr, log_alpha, n_tasks, BLOCK_TASKS: tl.constexpr):
    """T softmax(-log alpha) of the task with this log alpha; every program sums all tasks in the same order."""
    task = tl.arange(0, BLOCK_TASKS)
    of_all = tl.load(log_alpha_ptr + task, mask=task < n_tasks, other=float("inf"))
    least = tl.min(of_all, 0)
    return n_tasks * (tl.exp(least - log_alpha) / tl.sum(tl.exp(least - of_all), 0))


@triton.jit
def _rows(first, start, PER_TASK: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    at = start + tl.arange(0, BLOCK_ROWS)
    return first + at, at < PER_TASK


@triton.jit
def _lowest(q_ptr, row, inside, n_rows, E: tl.constexpr):
    """min_e q [E,B] of some rows; a NaN wins, as in torch's amin."""
    lowest = tl.load(q_ptr + row, mask=inside, other=0.0)
    for e in tl.static_range(1, E):
        q = tl.load(q_ptr + e * n_rows + row, mask=inside, other=0.0)
        lowest = tl.where((q < lowest) | (q != q), q, lowest)
    return lowest


@triton.jit
def _target(
    target_q_ptr, next_logp_ptr, reward_ptr, terminal_ptr, row, inside, n_rows, alpha,
    E: tl.constexpr, GAMMA: tl.constexpr,
):  # fmt: skip
    """y = reward + gamma (1 - terminal) (min_e target_q - alpha next_logp)."""
    next_logp = tl.load(next_logp_ptr + row, mask=inside, other=0.0)
    next_value = _lowest(target_q_ptr, row, inside, n_rows, E) - alpha * next_logp
    terminal = tl.load(terminal_ptr + row, mask=inside, other=0.0)
    return tl.load(reward_ptr + row, mask=inside, other=0.0) + GAMMA * (1 - terminal) * next_value


def losses_launch(n_nets: int, n_tasks: int, per_task: int) -> dict[str, Any]:
    """Constants and options that do not depend on the settings of SAC."""
    block_rows = min(MOST_ROWS, max(32, triton.next_power_of_2(per_task)))
    return {
        "E": n_nets,
        "PER_TASK": per_task,
        "BLOCK_TASKS": triton.next_power_of_2(n_tasks),
        "BLOCK_ROWS": block_rows,
        "num_warps": min(4, block_rows // 32),
    } | FUSED


def sac_losses(
    q: Tensor,
    target_q: Tensor,
    logp: Tensor,
    reward: Tensor,
    terminal: Tensor,
    log_alpha: Tensor,
    gamma: float,
    target_entropy: float,
    max_task_loss: float,
    weighted: bool,
    d_log_alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """losses [6,T], d_q [E,2B], d_logp [B]; d_log_alpha [T] is written.

    ValueError: shapes or dtypes disagree, or B is no multiple of T.
    """
    dtype = check_real("target_q", target_q)
    if target_q.dim() != 2 or log_alpha.dim() != 1:
        shapes = f"{list(target_q.shape)} and {list(log_alpha.shape)}"
        raise ValueError(f"target_q, log_alpha: expected [E,B] and [T], got {shapes}")
    (n_nets, n_rows), n_tasks = target_q.shape, len(log_alpha)
    if n_nets < 1 or n_tasks < 1 or n_rows % n_tasks != 0:
        raise ValueError(f"target_q: expected [E,B] with B a multiple of {n_tasks} tasks, got {list(target_q.shape)}")
    check_tensor("q", q, dtype, [n_nets, 2 * n_rows])
    check_tensor("logp", logp, dtype, [2 * n_rows])
    for name, value in {"reward": reward, "terminal": terminal}.items():
        check_tensor(name, value, dtype, [n_rows])
    check_tensor("log_alpha", log_alpha, dtype, [n_tasks])
    check_in_place("d_log_alpha", d_log_alpha, dtype, [n_tasks])
    losses, d_q, d_logp = q.new_empty(6, n_tasks), q.new_empty(n_nets, 2 * n_rows), q.new_empty(n_rows)
    inputs = (q, target_q, logp, reward, terminal, log_alpha)
    sac_losses_kernel[(n_tasks,)](
        *map(packed, inputs), losses, d_q, d_logp, d_log_alpha, n_tasks,
        GAMMA=gamma, TARGET_ENTROPY=target_entropy, MAX_TASK_LOSS=max_task_loss, WEIGHTED=weighted,
        **losses_launch(n_nets, n_tasks, n_rows // n_tasks),
    )  # fmt: skip
    return losses, d_q, d_logp
