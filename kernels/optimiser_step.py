"""One step of all networks in three launches: norms, Adam with the targets' step, route temperatures
(`d2r_fast.ops.optimiser_step` is contract and oracle)."""

import math
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, check_in_place, check_real, check_tensor
from d2r_fast.kernels.tiles import sum_products

PIECE = 2048  # numbers of one program
N_COLUMNS = tl.constexpr(5)  # of the table
SQUARES_LAUNCH = {"BLOCK": PIECE, "num_warps": 8} | FUSED
ADAM_LAUNCH = {"BLOCK": PIECE, "BLOCK_PIECES": 1024, "num_warps": 8} | FUSED


@triton.jit
def optimiser_squares_kernel(
    gradient_ptr, table_ptr, step_ptr, squares_ptr, corrections_ptr,
    LOG_BETA1: tl.constexpr, LOG_BETA2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (pieces,); a program sums the squares of one piece of one network's gradient, so that sums of these in order
    are the same in every run. Reads the gradient once: bandwidth-bound.

    The first program also leaves Adam's corrections for the step that is being made, 1 / (1 - beta1^step) and
    1 / sqrt(1 - beta2^step): in float64, for 1 - 0.999 in float32 is off by 5e-5.
    """
    piece = tl.program_id(0)
    begin = tl.load(table_ptr + piece * N_COLUMNS)
    end = tl.load(table_ptr + piece * N_COLUMNS + 1)
    if (begin % 16 == 0) & (end % 16 == 0):
        _sum_squares(gradient_ptr, squares_ptr, piece, begin // 16 * 16, end // 16 * 16, BLOCK)
    else:
        _sum_squares(gradient_ptr, squares_ptr, piece, begin, end, BLOCK)
    if piece == 0:
        step = (tl.load(step_ptr) + 1).to(tl.float64)
        tl.store(corrections_ptr, 1 / (1 - tl.exp(step * LOG_BETA1)))
        tl.store(corrections_ptr + 1, 1 / tl.sqrt(1 - tl.exp(step * LOG_BETA2)))


@triton.jit
def optimiser_adam_kernel(
    values_ptr, gradient_ptr, first_ptr, second_ptr, targets_ptr, table_ptr, squares_ptr, corrections_ptr, norms_ptr,
    targets_begin, n_targets,
    LEARNING_RATES: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, MAX_NORM: tl.constexpr,
    TARGET_RATE: tl.constexpr, MOST_PIECES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PIECES: tl.constexpr,
):  # fmt: skip
    """Grid (pieces,); a program owns one piece of one network: its values, moments and targets.

    Every program sums its network's squares again, in the same order: some hundred numbers in L2 against a launch of
    their own. Reads 4 numbers and writes 3 a parameter, and 1 each of a target: bandwidth-bound.
    """
    piece = tl.program_id(0)
    begin = tl.load(table_ptr + piece * N_COLUMNS)
    end = tl.load(table_ptr + piece * N_COLUMNS + 1)
    network = tl.load(table_ptr + piece * N_COLUMNS + 2)
    first_piece = tl.load(table_ptr + piece * N_COLUMNS + 3).to(tl.int32)
    last_piece = tl.load(table_ptr + piece * N_COLUMNS + 4).to(tl.int32)
    squares = tl.zeros((BLOCK_PIECES,), values_ptr.dtype.element_ty)
    for start in range(0, MOST_PIECES, BLOCK_PIECES):
        at = first_piece + start + tl.arange(0, BLOCK_PIECES)
        squares += tl.load(squares_ptr + at, mask=at < last_piece, other=0.0)
    norm = tl.sqrt(tl.sum(squares, 0))
    if piece == first_piece:
        tl.store(norms_ptr + network, norm)
    scale = MAX_NORM / (norm + 1e-6)
    scale = tl.where(scale > 1, 1.0, scale)  # a NaN stays one
    rate = tl.zeros((), tl.float64)
    for i in tl.static_range(len(LEARNING_RATES)):
        rate = tl.where(network == i, LEARNING_RATES[i], rate)
    step_size = (rate * tl.load(corrections_ptr)).to(norm.dtype)
    second_scale = tl.load(corrections_ptr + 1).to(norm.dtype)
    if (begin % 16 == 0) & (end % 16 == 0):
        _adam(
            values_ptr, gradient_ptr, first_ptr, second_ptr, targets_ptr, begin // 16 * 16, end // 16 * 16,
            targets_begin, n_targets, scale, step_size, second_scale, BETA1, BETA2, EPS, TARGET_RATE, BLOCK,
        )  # fmt: skip
    else:
        _adam(
            values_ptr, gradient_ptr, first_ptr, second_ptr, targets_ptr, begin, end,
            targets_begin, n_targets, scale, step_size, second_scale, BETA1, BETA2, EPS, TARGET_RATE, BLOCK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n_tasks"])
def optimiser_tasks_kernel(
    log_alpha_ptr, route_temp_ptr, step_ptr, n_tasks, MAX_LOG_ALPHA: tl.constexpr, BLOCK_TASKS: tl.constexpr
):
    """Grid (1,): log alpha is at most MAX_LOG_ALPHA, the route temperatures follow it, and the step is made."""
    task = tl.arange(0, BLOCK_TASKS)
    exists = task < n_tasks
    step = tl.load(step_ptr)
    log_alpha = tl.load(log_alpha_ptr + task, mask=exists, other=0.0)
    log_alpha = tl.where(log_alpha > MAX_LOG_ALPHA, MAX_LOG_ALPHA, log_alpha)  # a NaN stays one
    least = tl.min(log_alpha, 0)
    share = tl.where(exists, tl.exp(least - log_alpha), 0.0)
    route_temp = n_tasks * (share / tl.sum(share, 0))
    tl.debug_barrier()  # several threads read a number that one of them writes
    tl.store(log_alpha_ptr + task, log_alpha, mask=exists)
    tl.store(route_temp_ptr + task, route_temp, mask=exists)
    tl.store(step_ptr, step + 1)


@triton.jit
def _places(begin, end, BLOCK: tl.constexpr):
    """A piece's places, from a multiple of BLOCK on, so that accesses are aligned where begin and end are."""
    at = begin // BLOCK * BLOCK + tl.arange(0, BLOCK)
    return at, (at >= begin) & (at < end)


@triton.jit
def _sum_squares(gradient_ptr, squares_ptr, piece, begin, end, BLOCK: tl.constexpr):
    at, inside = _places(begin, end, BLOCK)
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0)
    tl.store(squares_ptr + piece, sum_products(g, g, 0))


@triton.jit
def _adam(
    values_ptr, gradient_ptr, first_ptr, second_ptr, targets_ptr, begin, end, targets_begin, n_targets,
    scale, step_size, second_scale,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, TARGET_RATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, inside = _places(begin, end, BLOCK)
    g = tl.load(gradient_ptr + at, mask=inside, other=0.0) * scale
    first = tl.load(first_ptr + at, mask=inside, other=0.0)
    first += (g - first) * (1 - BETA1)
    second = tl.load(second_ptr + at, mask=inside, other=0.0) * BETA2 + g * g * (1 - BETA2)
    value = tl.load(values_ptr + at, mask=inside, other=0.0)
    value -= step_size * first / (tl.sqrt(second) * second_scale + EPS)
    tl.store(first_ptr + at, first, mask=inside)
    tl.store(second_ptr + at, second, mask=inside)
    tl.store(values_ptr + at, value, mask=inside)
    to = at - targets_begin
    followed = inside & (to >= 0) & (to < n_targets)
    target = tl.load(targets_ptr + to, mask=followed, other=0.0)
    tl.store(targets_ptr + to, target + (value - target) * TARGET_RATE, mask=followed)


class Plan(NamedTuple):
    """How the networks' parameters are cut into pieces, one a program.

    most_pieces  of any one network
    table        [pieces,5] int64: begin, end, network, first piece and last + 1 of that network; pieces lie between
                 multiples of PIECE, and those of a network stand together
    """

    n_pieces: int
    most_pieces: int
    table: Tensor


# By what the segments hold, and for good: a captured graph goes on reading the table.
@cache
def _plan(segments: bytes, n: int, n_networks: int, device: torch.device) -> Plan:
    """ValueError: a segment that lies outside 0..n, or is of no network."""
    of_networks: list[list[tuple[int, int]]] = [[] for _ in range(n_networks)]
    numbers = torch.frombuffer(bytearray(segments), dtype=torch.int64).view(-1, 3).tolist() if segments else []
    for i, (begin, end, network) in enumerate(numbers):
        if not (0 <= begin <= end <= n and 0 <= network < n_networks):
            raise ValueError(f"segments[{i}]: expected begin, end within 0..{n} and a network below {n_networks}")
        cuts = [begin, *range((begin // PIECE + 1) * PIECE, end, PIECE), end]
        of_networks[network] += [piece for piece in pairwise(cuts) if piece[0] < piece[1]]
    rows: list[tuple[int, ...]] = []
    for network, pieces in enumerate(of_networks):
        pieces = pieces or [(0, 0)]  # a network without parameters still has a norm, 0
        rows += [(*piece, network, len(rows), len(rows) + len(pieces)) for piece in pieces]
    most = max((last - first for *_, first, last in rows), default=0)
    return Plan(len(rows), most, torch.tensor(rows, dtype=torch.int64).to(device))


def adam_launch(
    most_pieces: int,
    learning_rates: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float,
    target_rate: float,
) -> dict[str, Any]:
    """Constants and options of the kernel that makes the step: what stays as it is for a whole run is compiled in."""
    numbers = {"BETA1": beta1, "BETA2": beta2, "EPS": eps, "MAX_NORM": max_norm, "TARGET_RATE": target_rate}
    return {"LEARNING_RATES": tuple(learning_rates), "MOST_PIECES": most_pieces} | numbers | ADAM_LAUNCH


def squares_launch(beta1: float, beta2: float) -> dict[str, Any]:
    """Constants and options of the kernel that comes before it."""
    return {"LOG_BETA1": _log(beta1), "LOG_BETA2": _log(beta2)} | SQUARES_LAUNCH


def tasks_launch(n_tasks: int, max_log_alpha: float) -> dict[str, Any]:
    """Constants and options of the kernel that comes after it; of one warp, for there is little to do."""
    n_block = triton.next_power_of_2(max(1, n_tasks))
    return {"MAX_LOG_ALPHA": max_log_alpha, "BLOCK_TASKS": n_block, "num_warps": 1} | FUSED


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -math.inf


def optimiser_step(
    values: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    targets: Tensor,
    step: Tensor,
    log_alpha: Tensor,
    route_temp: Tensor,
    segments: Tensor,
    targets_begin: int,
    learning_rates: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float,
    target_rate: float,
    max_log_alpha: float,
) -> Tensor:
    """Changes what the reference changes; returns each network's gradient norm before clipping [networks].

    The first call with some segments copies a table to the GPU; others only launch, and can be captured.
    ValueError: shapes or dtypes disagree, or a segment lies outside the values.
    """
    dtype, n, n_targets = check_real("values", values), values.numel(), targets.numel()
    for name, value in {"values": values, "gradient": gradient, "first": first, "second": second}.items():
        check_in_place(name, value, dtype, [n])
    check_in_place("targets", targets, dtype, [n_targets])
    check_in_place("step", step, torch.int64, [])
    check_in_place("log_alpha", log_alpha, dtype, [log_alpha.numel()])
    check_in_place("route_temp", route_temp, dtype, [log_alpha.numel()])
    check_tensor("segments", segments, torch.int64, [segments.numel() // 3, 3])
    if targets_begin < 0 or targets_begin + n_targets > n:
        raise ValueError(f"targets_begin: expected 0..{n - n_targets}, got {targets_begin}")
    n_networks, n_tasks = len(learning_rates), log_alpha.numel()
    plan = _plan(segments.numpy().tobytes(), n, n_networks, values.device)
    norms = values.new_empty(n_networks)
    squares = values.new_empty(plan.n_pieces)
    corrections = values.new_empty(2, dtype=torch.float64)
    if plan.n_pieces > 0:
        grid = (plan.n_pieces,)
        optimiser_squares_kernel[grid](gradient, plan.table, step, squares, corrections, **squares_launch(beta1, beta2))
        optimiser_adam_kernel[grid](
            values, gradient, first, second, targets, plan.table, squares, corrections, norms, targets_begin, n_targets,
            **adam_launch(plan.most_pieces, learning_rates, beta1, beta2, eps, max_norm, target_rate),
        )  # fmt: skip
    optimiser_tasks_kernel[(1,)](log_alpha, route_temp, step, n_tasks, **tasks_launch(n_tasks, max_log_alpha))
    return norms
