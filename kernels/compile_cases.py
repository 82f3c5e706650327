"""The kernels as they are launched at published sizes, the largest and the narrowest, for `compile_report`."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import triton

from d2r_fast.kernels import ensemble_linear, network_gradient, optimiser_step
from d2r_fast.kernels.expert_sum import expert_sum_bwd_kernel, expert_sum_fwd_kernel, sum_launch
from d2r_fast.kernels.gumbel import LAUNCH as GUMBEL_LAUNCH
from d2r_fast.kernels.gumbel import gumbel_kernel
from d2r_fast.kernels.layers import base_launch, split_base_bwd_kernel, split_base_kernel
from d2r_fast.kernels.module_levels import mix_bwd_kernel, mix_fwd_kernel, mix_launch
from d2r_fast.kernels.replay_rows import replay_rows_kernel, rows_launch
from d2r_fast.kernels.routed_modules import SORT_FROM_ROWS, routed_modules_bwd_kernel, routed_modules_fwd_kernel
from d2r_fast.kernels.row_order import LAUNCH as ORDER_LAUNCH
from d2r_fast.kernels.row_order import row_order_kernel
from d2r_fast.kernels.sac_losses import losses_launch, sac_losses_kernel
from d2r_fast.kernels.select_routes import route_launch, select_routes_bwd_kernel, select_routes_fwd_kernel
from d2r_fast.kernels.settings import gradient_launch, walk_launch
from d2r_fast.kernels.squashed_normal import (
    policy_launch,
    squashed_normal_bwd_kernel,
    squashed_normal_fwd_kernel,
)
from d2r_fast.kernels.weight_gradient import REDUCE_LAUNCH, weight_gradient_kernel, weight_gradient_reduce_kernel
from d2r_fast.ops.backends import PRECISIONS
from d2r_fast.ops.layer_gradients import Product, Rows

SIZES = ((16, 2, 128), (32, 4, 256))  # N, K, D: as published; and the largest that the tile sizes are chosen for
NARROW = ((5, 2, 16), (5, 2, 17))  # so narrow, or odd, that a thread holds one feature of a row: see `uneven_sums`
ROWS, MANY_ROWS = 1280, 6400  # per network, as published for MT10 and MT50
N_OBS, N_ACTIONS = 39, 4  # Meta-World's
LAYERS = ((N_OBS + N_ACTIONS, 400), (400, 400), (256, 136), (128, 1))
"""Inputs and outputs: the first layer, whose rows are not 16-byte aligned, the largest, the logits, the value."""


_WALKS = {"routed_modules_fwd": routed_modules_fwd_kernel, "routed_modules_bwd": routed_modules_bwd_kernel}
_WALK_FLAGS = {"RESIDUAL": True}
_BACK_FLAGS = _WALK_FLAGS | {"FIRST_RELU": True}


def kept_in(precision: str, *names: str) -> dict[str, dict[str, str]]:
    """These pointers as an update has them: what products in bf16 read lies in memory as that."""
    return {"types": dict.fromkeys(names, "*bf16") if precision == "bf16" else {}}


def _walk_case(kernel: str, precision: str, n: int, k: int, d: int, n_rows: int, n_nets: int) -> dict[str, Any]:
    """`walk_launch`, and whether rows come sorted."""
    order = {} if n_rows * n_nets > SORT_FROM_ROWS else {"order_ptr": None}
    return walk_launch(kernel, precision, n, k, d, n_rows, n_nets) | order


def _of_networks(
    launch_of: Callable[[int, int], dict[str, Any]], rows: Sequence[int] = (ROWS,)
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each launch (of as many rows and networks) that differs for one to six networks, as many as an update has in one,
    and what to call it."""
    seen: list[dict[str, Any]] = []
    for n_rows in rows:
        for n_nets in (1, 2, 4, 6):
            launch = launch_of(n_rows, n_nets)
            if launch not in seen:
                seen.append(launch)
                of_rows = "" if n_rows == ROWS else f"-B{n_rows}"
                yield f"-E{n_nets}{of_rows}" if len(seen) > 1 else "", launch


def cases(short: bool = False) -> Iterator[tuple[str, str, str, Any, dict[str, Any]]]:
    """Label, size, precision, kernel, and what the launcher passes besides tensors and row counts (None: no tensor).
    short: without those that compile longest, see `_in_short`."""
    for case in (*_of_modules(), *cases_of_linear_layers(), *cases_of_the_update()):
        if not short or _in_short(*case[:2]):
            yield case


def _in_short(label: str, size: str) -> bool:
    """Not what compiles longest and is much like another: weight gradients of other numbers of networks, the widest
    modules over rows in order, and the second of two layers with rows of 16 bytes."""
    widest = "N{}-K{}-D{}".format(*SIZES[-1])
    left_out = label == "weight_gradient" and "-E" in size, size.startswith(f"{widest}-E"), size.startswith("256to136")
    return not any(left_out)


def _of_modules() -> Iterator[tuple[str, str, str, Any, dict[str, Any]]]:
    for n, k, d in SIZES:
        size = f"N{n}-K{k}-D{d}"
        for precision in PRECISIONS:
            for name, kernel in _WALKS.items():
                for which, launch in _of_networks(partial(_walk_case, name, precision, n, k, d), (ROWS, MANY_ROWS)):
                    in_bf16 = kept_in(precision, "weight_ptr", "mixed_ptr", "d_h0_ptr")
                    flags = _BACK_FLAGS if name == "routed_modules_bwd" else _WALK_FLAGS
                    yield name, size + which, precision, kernel, launch | flags | in_bf16
            for which, launch in _of_networks(partial(gradient_launch, precision, n, k, d)):
                yield "weight_gradient", size + which, precision, weight_gradient_kernel, launch | {"STEP": 2}
        shared = route_launch(n, k)
        unused: dict[str, dict[str, Any]] = {
            "greedy": {"temperature_ptr": None, "noise_ptr": None, "given_ptr": None},
            "sampled": {"given_ptr": None},
            "given": {"temperature_ptr": None, "noise_ptr": None},
        }
        for mode, absent in unused.items():
            launch = shared | {"RESROUTING": True} | absent
            yield f"select_routes_fwd {mode}", size, "float32", select_routes_fwd_kernel, launch
        yield "select_routes_bwd", size, "float32", select_routes_bwd_kernel, shared
    for n, k, d in NARROW:
        for precision in PRECISIONS:
            backward = _walk_case("routed_modules_bwd", precision, n, k, d, ROWS, 1) | _BACK_FLAGS
            yield "routed_modules_bwd", f"N{n}-K{k}-D{d}", precision, routed_modules_bwd_kernel, backward
    n_splits = triton.cdiv(ROWS, gradient_launch("float32", 16, 2, 128, ROWS, 2)["SPLIT_ROWS"])
    reduce = {"N_SPLITS": n_splits} | REDUCE_LAUNCH
    yield "weight_gradient_reduce", "any", "float32", weight_gradient_reduce_kernel, reduce
    yield "row_order", "B1280", "float32", row_order_kernel, {"N_ROWS": ROWS} | ORDER_LAUNCH
    for n, d in ((4, 128), (2, 256)):
        for targets in (n, 1):
            yield "mix_fwd", f"N{n}-J{targets}-D{d}", "float32", mix_fwd_kernel, mix_launch(n, targets, d)
            yield "mix_bwd", f"N{n}-J{targets}-D{d}", "float32", mix_bwd_kernel, mix_launch(n, targets, d)
    for n, d, orthogonal in ((4, 400, True), (6, 400, True), (6, 50, False)):
        size, launch = f"N{n}-D{d}", sum_launch(n, d, orthogonal, 0.0)
        yield "expert_sum_fwd", size, "float32", expert_sum_fwd_kernel, launch
        yield "expert_sum_bwd", size, "float32", expert_sum_bwd_kernel, launch


def cases_of_linear_layers() -> Iterator[tuple[str, str, str, Any, dict[str, Any]]]:
    """As `cases`: the linear layers around the modules, of the critics as published; and one of a single output. The
    first layer as the operation runs it, whose networks share x, the others as an update does."""
    kernels = {
        "fwd": ensemble_linear.ensemble_linear_fwd_kernel,
        "bwd": ensemble_linear.ensemble_linear_bwd_kernel,
        "gradient": ensemble_linear.ensemble_linear_gradient_kernel,
    }
    for n_in, n_out in LAYERS:
        for precision in PRECISIONS:
            for name, kernel in kernels.items():
                shared = n_in == N_OBS + N_ACTIONS
                flags: dict[str, Any] = {"SHARED": shared}
                flags |= {"place_ptr": None} if shared and name != "gradient" else {}
                if name == "fwd":
                    flags |= {"X_STRIDE": n_in, "RELU": n_out > 1}
                if name == "bwd":
                    flags |= {"E": 2, "FIRST": 0, "STEP": 1} | ({"x_ptr": None} if shared else {"y_ptr": None})
                if name != "gradient" and not shared:
                    flags |= kept_in(precision, "x_ptr", "weight_ptr", "y_ptr", "d_y_ptr", "d_x_ptr")
                launch_of = partial(ensemble_linear.linear_launch, name, precision, n_in, n_out)
                for which, launch in _of_networks(launch_of):
                    yield f"ensemble_linear_{name}", f"{n_in}to{n_out}{which}", precision, kernel, launch | flags
    for precision in PRECISIONS:
        for name, kernel, way, n_out in (
            ("split_base", split_base_kernel, "fwd", 400),
            ("split_base_bwd", split_base_bwd_kernel, "bwd", 128),
        ):
            for which, launch in _of_networks(partial(base_launch, way, precision, 400, n_out)):
                in_bf16 = kept_in(
                    precision, "x_ptr", "weights_ptr", "scaled_ptr", "positive_ptr", "d_y_ptr", "d_f_ptr", "d_g_ptr"
                )
                yield name, f"H400{which}", precision, kernel, launch | {"T": 10} | in_bf16
    for precision in PRECISIONS:
        for which, launch in _of_networks(partial(_largest_gradients, precision)):
            in_bf16 = kept_in(precision, "act_ptr", "d_z_ptr")
            yield (
                "network_gradient",
                f"any{which}",
                precision,
                network_gradient.network_gradient_kernel,
                launch | in_bf16,
            )


def _largest_gradients(precision: str, n_rows: int, n_nets: int) -> dict[str, Any]:
    """The launch of two layers' gradients a network."""
    of_layer = Product(Rows(0, 400), False, 0, 400, 400, 0)
    return network_gradient.gradient_launch([of_layer] * 2 * n_nets, precision, n_rows)


def cases_of_the_update() -> Iterator[tuple[str, str, str, Any, dict[str, Any]]]:
    """As `cases`: the update's own operations, between and after the networks."""
    yield "gumbel", "any", "float32", gumbel_kernel, {"TINY": 1.1754943508222875e-38} | GUMBEL_LAUNCH
    for a in (1, N_ACTIONS, 7):
        yield "squashed_normal_fwd", f"A{a}", "float32", squashed_normal_fwd_kernel, policy_launch(a)
        yield "squashed_normal_bwd", f"A{a}", "float32", squashed_normal_bwd_kernel, policy_launch(a)
    for n, k in ((16, 2), (32, 4)):
        launch = rows_launch(N_OBS, N_ACTIONS, n * k)
        yield "replay_rows", f"N{n}-K{k}", "float32", replay_rows_kernel, launch
    settings = {"GAMMA": 0.99, "TARGET_ENTROPY": -4.0, "MAX_TASK_LOSS": 3000.0, "WEIGHTED": True}
    for n_tasks, per_task in ((10, 128), (50, 128), (10, 4), (1, 5000)):
        launch = losses_launch(2, n_tasks, per_task) | settings
        yield "sac_losses", f"T{n_tasks}-n{per_task}", "float32", sac_losses_kernel, launch
    squares, adam = optimiser_step.optimiser_squares_kernel, optimiser_step.optimiser_adam_kernel
    yield "optimiser_squares", "any", "float32", squares, optimiser_step.squares_launch(0.9, 0.999)
    launch = optimiser_step.adam_launch(400, [3e-4] * 4, 0.9, 0.999, 1e-8, 1.0, 0.005)
    yield "optimiser_adam", "any", "float32", adam, launch
    for n_tasks in (10, 50):
        launch = optimiser_step.tasks_launch(n_tasks, 0.0)
        yield "optimiser_tasks", f"T{n_tasks}", "float32", optimiser_step.optimiser_tasks_kernel, launch
