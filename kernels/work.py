"""What one call of an update does on a GPU: bytes, arithmetic and dependent steps, from its sizes (`launches.Call`).

Where the data decides, it is random routes over rows as they come, or as `row_order` sorts them: `route_shares`. What a
call does not say by its sizes is rounded up. ValueError: a call that nothing is known of.
"""

from collections.abc import Callable
from functools import cache
from math import ceil, prod
from typing import Any, NamedTuple

import torch

from d2r_fast.kernels.launches import Call, Memory
from d2r_fast.kernels.network_gradient import SUM_ROWS
from d2r_fast.ops.layer_gradients import Product

FLOAT = 4  # bytes


class Access(NamedTuple):
    """What is touched of one tensor: different bytes, and those that go to or from the L2 as tiles read them anew."""

    memory: Memory
    n_bytes: float
    traffic: float
    written: bool
    scattered: bool = False
    """Rows anywhere in a buffer that is much larger than a cache."""


class Work(NamedTuple):
    """What a call does.

    flop       products, with what tiles compute beyond a matrix's edge, or for rows that do not need it
    loads      dependent loads of one program, besides those of its chunks
    chunks     products of one program, one after the other
    depth      terms of the longest sum of products in one program
    passes     times that it goes through its longest loop around products, such as that of modules
    reductions sums or extremes over threads, one after the other
    programs   what each takes of the longest's time, in the order in which they start; empty: all alike
    """

    accesses: list[Access]
    flop: float = 0.0
    loads: int = 1
    chunks: float = 0
    depth: float = 0
    passes: float = 0
    reductions: float = 0
    programs: tuple[float, ...] = ()


def work_of(call: Call) -> Work:
    """What the call does."""
    if call.kernel is None:
        return _of_torch(call)
    name = call.name.removesuffix("_kernel (Triton)")
    if name in _SPECIAL:
        return _SPECIAL[name](call)
    if name in _ONCE:
        written, loads, reductions = _ONCE[name]
        return Work(_once(call, written), loads=loads, reductions=reductions)
    raise ValueError(f"work: expected a kernel that {__name__} knows, got {call.name}")


# Kernels that touch each tensor once: what they write, dependent loads, sums over threads.
_ONCE: dict[str, tuple[tuple[str, ...], int, int]] = {
    "gumbel": (("noise_ptr",), 1, 0),
    "squashed_normal_fwd": (("action_ptr", "logp_ptr"), 1, 1),
    "squashed_normal_bwd": (("d_out_ptr",), 1, 0),
    "select_routes_fwd": (("index_ptr", "gate_ptr", "flow_ptr", "active_ptr"), 3, 1),
    "select_routes_bwd": (("d_logits_ptr",), 2, 4),
    "sac_losses": (("losses_ptr", "d_q_ptr", "d_logp_ptr", "d_log_alpha_ptr"), 4, 5),
    "optimiser_squares": (("squares_ptr", "corrections_ptr"), 2, 1),
    "optimiser_tasks": (("log_alpha_ptr", "route_temp_ptr", "step_ptr"), 1, 2),
}
# Read as well, though written.
_CHANGED = {"noise_ptr", "values_ptr", "first_ptr", "second_ptr", "targets_ptr", "log_alpha_ptr", "step_ptr"}


def _once(call: Call, written: tuple[str, ...]) -> list[Access]:
    """Every tensor once; of the flat parameters only what a place in them says, which is little."""
    accesses = []
    for name, memory in call.arguments.items():
        if isinstance(memory, Memory):
            n_bytes = 0.0 if name == "parameters_ptr" else memory.n_bytes
            if name not in written or name in _CHANGED:
                accesses.append(Access(memory, n_bytes, n_bytes, False))
            if name in written:
                accesses.append(Access(memory, n_bytes, n_bytes, True))
    return accesses


def _part(memory: Memory | None, n_bytes: float, times: float = 1, written: bool = False) -> list[Access]:
    return [] if memory is None else [Access(memory, n_bytes, n_bytes * times, written)]


def _numbers(memory: Memory | None, n: float, times: float = 1, written: bool = False) -> list[Access]:
    return [] if memory is None else _part(memory, n * memory.dtype.itemsize, times, written)


def _blocks(n: int, block: int) -> int:
    return ceil(n / block) * block


def _linear_fwd(call: Call) -> Work:
    a, (n_row_tiles, n_out_tiles, n_nets) = call.arguments, call.grid
    n_in, n_out, n_rows, depth = a["N_IN"], a["N_OUT"], a["n_rows"], _blocks(a["N_IN"], a["BLOCK_DEPTH"])
    accesses = _numbers(a["x_ptr"], (1 if a["SHARED"] else n_nets) * n_rows * n_in, n_out_tiles)
    accesses += _numbers(a["weight_ptr"], n_nets * n_in * n_out, n_row_tiles)
    accesses += _numbers(a["y_ptr"], n_nets * n_rows * n_out, written=True)
    flop = 2.0 * prod(call.grid) * a["BLOCK_ROWS"] * a["BLOCK_OUT"] * depth
    chunks = depth // a["BLOCK_DEPTH"]
    return Work(accesses, flop, loads=2, chunks=chunks, depth=depth)


def _linear_bwd(call: Call) -> Work:
    a, (n_row_tiles, n_in_tiles, n_own) = call.arguments, call.grid
    n_nets = a["E"] if a["SHARED"] else n_own
    n_in, n_out, n_rows = a["N_IN"], a["N_OUT"], a["n_rows"]
    depth = _blocks(n_out, a["BLOCK_DEPTH"]) * (n_nets // n_own)
    gradient = n_nets * n_rows * n_out
    accesses = _numbers(a["d_y_ptr"], gradient, n_in_tiles)
    accesses += _numbers(a["y_ptr"], gradient, n_in_tiles)
    accesses += _numbers(a["weight_ptr"], n_nets * n_in * n_out, n_row_tiles)
    accesses += _numbers(a["x_ptr"], n_own * n_rows * n_in)
    accesses += _numbers(a["d_x_ptr"], n_own * n_rows * n_in, written=True)
    flop = 2.0 * prod(call.grid) * a["BLOCK_ROWS"] * a["BLOCK_IN"] * depth
    chunks = depth // a["BLOCK_DEPTH"]
    return Work(accesses, flop, loads=2, chunks=chunks, depth=depth)


def _split_base(call: Call) -> Work:
    """A linear layer that also writes its product with g and its ReLU; g's own weights are few."""
    a = call.arguments
    linear = a | {"SHARED": False, "weight_ptr": a["weights_ptr"], "y_ptr": a["f_ptr"]}
    work = _linear_fwd(call._replace(arguments=linear))
    others = [
        access for name in ("scaled_ptr", "positive_ptr") for access in _part(a[name], a[name].n_bytes, written=True)
    ]
    return work._replace(accesses=work.accesses + others, loads=work.loads + 2)


def _split_base_bwd(call: Call) -> Work:
    """The gradient through a linear layer, which stays in registers, and what it meets."""
    a = call.arguments
    linear = a | {"SHARED": False, "weight_ptr": a["weights_ptr"], "d_x_ptr": a["d_f_ptr"]}
    linear |= {"y_ptr": None, "x_ptr": None}
    work, n_bytes = _linear_bwd(call._replace(arguments=linear)), a["d_g_ptr"].n_bytes
    others = _part(a["d_scaled_ptr"], n_bytes) + _part(a["f_ptr"], n_bytes) + _part(a["d_g_ptr"], n_bytes, written=True)
    return work._replace(accesses=work.accesses + others, loads=work.loads + 2)


def _network_gradient(call: Call) -> Work:
    """Tiles of products, and sums."""
    a = call.arguments
    depth, n_tiles = _blocks(a["N_ROWS"], a["BLOCK_DEPTH"]), 0
    of_act, of_d_z = (a[name].dtype.itemsize for name in ("act_ptr", "d_z_ptr"))
    accesses, written, sums = [], 0.0, []
    d_z = act = d_z_traffic = act_traffic = 0.0
    for g in a["of_table"]:
        is_product = isinstance(g, Product)
        n_rows, width = (a["N_ROWS"], g.n_in) if is_product else (g.n_rows, 0)
        gradient, read = g.d_z.width * n_rows * of_d_z, width * n_rows * of_act
        times = ceil(width / a["BLOCK_IN"]) if is_product else 1
        d_z_traffic += gradient * times
        act_traffic += read * ceil(g.d_z.width / a["BLOCK_OUT"])
        written += g.d_z.width * max(width, 1) * FLOAT
        if is_product:  # what a product reads, the sums of its rows read as well
            d_z, act = d_z + gradient, act + read
            n_tiles += ceil(g.d_z.width / a["BLOCK_OUT"]) * times
        else:
            sums += [1 + n_rows / SUM_ROWS.value] * ceil(g.d_z.width / a["BLOCK_OUT"])
    for name, n_bytes, traffic in (("d_z_ptr", d_z, d_z_traffic), ("act_ptr", act, act_traffic)):
        accesses.append(Access(a[name], min(n_bytes, a[name].n_bytes), traffic, False))
    accesses += _part(a["gradient_ptr"], written, written=True)
    flop = 2.0 * n_tiles * a["BLOCK_OUT"] * a["BLOCK_IN"] * depth
    chunks = depth // a["BLOCK_DEPTH"]
    # A step of a sum, which waits for what it loads, takes about as long as a chunk of a product.
    programs = [1.0] * n_tiles + [n_steps / (1 + chunks) for n_steps in sums]
    return Work(accesses, flop, loads=3, chunks=chunks, depth=depth, programs=tuple(programs))


class Shares(NamedTuple):
    """Of the modules 1..N-1: how many a row runs, how many a tile of rows touches, and the tile that touches most; and
    how many each tile of some networks touches, in order."""

    active: float
    touched: float
    most_touched: float
    of_tiles: tuple[tuple[float, ...], ...]

    def of_programs(self, n_tiles: int, n_nets: int) -> tuple[float, ...]:
        """What each program takes of the longest's time, in the order in which they start: all networks' first tiles
        first. A tile's beginning and end take about as long as a module."""
        nets = [self.of_tiles[net % len(self.of_tiles)] for net in range(n_nets)]
        whole = 1 + self.most_touched
        return tuple((1 + nets[net][tile % len(nets[net])]) / whole for tile in range(n_tiles) for net in range(n_nets))


@cache
def route_shares(n_modules: int, n_kept: int, n_rows: int, block_rows: int, in_order: bool) -> Shares:
    """Of random routes, of some networks of `n_rows` rows each."""
    n_nets = ceil(4096 / n_rows)
    generator, route = torch.Generator().manual_seed(0), torch.arange(n_modules)
    score = torch.rand(n_nets * n_rows, n_modules, n_modules, generator=generator)
    score = score.masked_fill(route[None, :] > route[:, None], -1.0)  # route i+1 has i+1 sources
    index = score.topk(n_kept, -1).indices
    bits = torch.where(torch.arange(n_kept) <= route[:, None], 1 << index, 0).sum(-1)  # sources of a row's route i+1
    active = bits[:, -1]
    for i in range(n_modules - 1, 0, -1):
        active = active | torch.where((active >> i) & 1 != 0, bits[:, i - 1], 0)
    if in_order:
        active = active.view(n_nets, n_rows).sort(1, descending=True).values.flatten()
    runs = (active[:, None] >> torch.arange(1, n_modules)) & 1 != 0  # [rows,modules]
    n_tiles = n_rows // block_rows
    tiles = runs.view(n_nets, n_rows, -1)[:, : n_tiles * block_rows].reshape(n_nets, n_tiles, block_rows, n_modules - 1)
    touched = tiles.any(2).sum(2).double()
    of_tiles = tuple(tuple(of_net) for of_net in touched.tolist())
    return Shares(runs.sum(1).double().mean().item(), touched.mean().item(), touched.max().item(), of_tiles)


def _routed_fwd(call: Call) -> Work:
    a, (n_nets, n_programs, _) = call.arguments, call.grid
    n_rows, n, k, d, of_program = a["n_rows"], a["N"], a["K"], a["D"], a["BLOCK_ROWS"]
    shares = route_shares(n, k, n_rows, of_program, a["order_ptr"] is not None)
    row = n_nets * n_rows * d * FLOAT
    runs = shares.active * row
    accesses = _once(call._replace(arguments={x: a[x] for x in ("index_ptr", "gate_ptr", "active_ptr")}), ())
    accesses += _part(a["h0_ptr"], row) + _numbers(a["mixed_ptr"], row / FLOAT, written=True)
    accesses += _numbers(a["weight_ptr"], n_nets * (n - 1) * d * d, n_programs * shares.touched / (n - 1))
    # Sources are what this very launch wrote: traffic, but nothing to fetch. They are read again for the residual at
    # once, some 32 KB of a tile, which the first-level cache still has.
    accesses += [Access(a["h_ptr"], 0.0, (runs + row) * k, False), Access(a["h_ptr"], runs + row, runs + row, True)]
    accesses += _part(a["opened_ptr"], runs / FLOAT, written=True)
    flop = 2.0 * n_programs * n_nets * shares.touched * of_program * a["BLOCK_D"] ** 2
    most, chunks = shares.most_touched, a["BLOCK_D"] // a["BLOCK_K"]
    # Of a module: its sources' numbers, and the sources.
    chain = ceil(most * 2) + 3, most * chunks, most * a["BLOCK_D"], most, 1
    return Work(accesses, flop, *chain, shares.of_programs(n_programs, n_nets))


def _routed_bwd(call: Call) -> Work:
    a, (n_nets, n_programs, _) = call.arguments, call.grid
    n_rows, n, k, d, of_program = a["n_rows"], a["N"], a["K"], a["D"], a["BLOCK_ROWS"]
    shares = route_shares(n, k, n_rows, of_program, a["order_ptr"] is not None)
    row = n_nets * n_rows * d * FLOAT
    runs = shares.active * row
    pushed, n_adjoints = (runs + row) * k, 2 if a["RESIDUAL"] else 1
    few = ("index_ptr", "gate_ptr", "flow_ptr", "active_ptr")
    accesses = _once(call._replace(arguments={x: a[x] for x in few}), ())
    accesses += _part(a["d_mixed_ptr"], row) + _part(a["d_h0_ptr"], row, written=True)
    accesses += _numbers(a["weight_ptr"], n_nets * (n - 1) * d * d, n_programs * shares.touched / (n - 1))
    accesses += [Access(a["h_ptr"], runs + row, pushed, False), *_part(a["opened_ptr"], runs / FLOAT)]
    # The first gradient that reaches an adjoint is stored, later ones are added; then its module reads it, or d_h0.
    for name in ("to_relu_ptr", "to_residual_ptr")[:n_adjoints]:
        accesses += [Access(a[name], 0.0, pushed, False), Access(a[name], runs + row, pushed, True)]
    flop = 2.0 * n_programs * n_nets * shares.touched * of_program * a["BLOCK_D"] ** 2
    most, chunks = shares.most_touched, a["BLOCK_D"] // a["BLOCK_K"]
    # Of a module: its sources' numbers, and what is there of all K of them.
    chain = ceil(most * 3) + 3, most * chunks, most * a["BLOCK_D"], most, 1 + most * k
    return Work(accesses, flop, *chain, shares.of_programs(n_programs, n_nets))


def _weight_gradient(call: Call) -> Work:
    a, (n_modules, n_splits, n_tiles) = call.arguments, call.grid
    n_rows, n, k, d = a["n_rows"], a["N"], a["K"], a["D"]
    active = route_shares(n, k, n_rows, 16, False).active / (n - 1)  # of a split's rows
    split = min(a["SPLIT_ROWS"], n_rows)
    listed = _blocks(ceil(split * active), a["BLOCK_ROWS"])
    rows = n_modules * n_splits * n_tiles * listed
    different = n_modules * n_rows * active * d * FLOAT
    accesses = [
        Access(a["to_relu_ptr"], different, rows * a["BLOCK_OUT"] * FLOAT, False),
        Access(a["opened_ptr"], different / FLOAT, rows * a["BLOCK_OUT"], False),
        Access(a["h_ptr"], different, rows * k * a["BLOCK_IN"] * FLOAT, False),
        Access(a["d_weight_ptr"], a["d_weight_ptr"].n_bytes, a["d_weight_ptr"].n_bytes, True),
    ]
    flop = 2.0 * rows * a["BLOCK_OUT"] * a["BLOCK_IN"]
    chunks = listed // a["BLOCK_ROWS"]
    # Of a chunk: the list, sources' numbers, sources; nothing of the next chunk is asked for before.
    return Work(accesses, flop, 2 + 2 * chunks, chunks, listed, chunks, 2 + chunks)


def _weight_gradient_reduce(call: Call) -> Work:
    """Sums of all splits' parts; what is written may lie in a larger buffer."""
    a = call.arguments
    parts = [(a["weight_part_ptr"], a["d_weight_ptr"]), (a["bias_part_ptr"], a["d_bias_ptr"])]
    accesses = []
    for part, whole in parts:
        written = min(whole.n_bytes, part.n_bytes / a["N_SPLITS"])
        accesses += _part(part, part.n_bytes) + _part(whole, written, written=True)
    return Work(accesses)


def _row_order(call: Call) -> Work:
    a = call.arguments
    n_bytes = a["active_ptr"].n_bytes
    accesses = _part(a["active_ptr"], n_bytes, call.grid[0])
    accesses += _part(a["order_ptr"], a["order_ptr"].n_bytes, written=True)
    n_chunks = ceil(a["N_ROWS"] / a["BLOCK_OTHERS"])
    return Work(accesses, loads=1 + n_chunks, reductions=2)


def _replay_rows(call: Call) -> Work:
    """Rows anywhere in a storage of millions."""
    a = call.arguments
    n_rows, width = a["n_rows"], a["N_OBS"] + a["N_ACTIONS"]
    n_bytes = n_rows * (FLOAT * (2 * a["N_OBS"] + a["N_ACTIONS"]) + a["ROUTE"] + 13.0)
    accesses = [Access(a["obs_ptr"], n_bytes, n_bytes, False, scattered=True)]
    accesses += _part(a["x_ptr"], 3.0 * n_rows * width * FLOAT, written=True)
    return Work(accesses + _part(a["routes_ptr"], n_rows * a["ROUTE"], written=True), loads=2)


def _adam(call: Call) -> Work:
    written = ("values_ptr", "first_ptr", "second_ptr", "targets_ptr", "norms_ptr")
    return Work(_once(call, written), loads=3, reductions=1)


_SPECIAL: dict[str, Callable[[Call], Work]] = {
    "ensemble_linear_fwd": _linear_fwd,
    "ensemble_linear_bwd": _linear_bwd,
    "split_base": _split_base,
    "split_base_bwd": _split_base_bwd,
    "network_gradient": _network_gradient,
    "routed_modules_fwd": _routed_fwd,
    "routed_modules_bwd": _routed_bwd,
    "weight_gradient": _weight_gradient,
    "weight_gradient_reduce": _weight_gradient_reduce,
    "row_order": _row_order,
    "replay_rows": _replay_rows,
    "optimiser_adam": _adam,
}

TORCH_TILE = 128
"""Rows and columns that one program of torch's products makes."""
_TORCH_CALLS = {
    "rand", "randn", "index", "relu_", "threshold_backward", "copy_", "_to_copy", "add", "add_", "mul", "sum", "zero_",
    "new_zeros", "zeros_like", "fill_", "sort", "cat", "_foreach_add_",
}  # fmt: skip


def torch_programs(call: Call) -> int:
    """Programs of one of torch's products; 0 of its other calls, which fill the device or are over at once."""
    if call.kind != "product":
        return 0
    *batch, n_rows, n_columns = call.results[0].shape
    return prod(batch) * ceil(n_rows / TORCH_TILE) * ceil(n_columns / TORCH_TILE)


def _of_torch(call: Call) -> Work:
    if call.kind == "product":
        return _torch_product(call)
    if call.name not in _TORCH_CALLS:
        raise ValueError(f"work: expected a call of torch's that {__name__} knows, got {call.name}")
    accesses = []
    for value in call.arguments.values():
        for memory in value if isinstance(value, list) else [value]:
            if isinstance(memory, Memory) and call.name not in ("new_zeros", "zero_", "zeros_like"):
                accesses.append(Access(memory, memory.n_bytes, memory.n_bytes, False))
    changed = call.results or call.arguments["self"]  # a list of tensors changed in place comes back as nothing
    return Work(accesses + [Access(m, m.n_bytes, m.n_bytes, True) for m in changed])


def _torch_product(call: Call) -> Work:
    operands = [m for name, m in call.arguments.items() if isinstance(m, Memory) and name != "out"]
    *start, left, right = operands
    *batch, n_rows, n_columns = call.results[0].shape
    depth, size = left.shape[-1], left.dtype.itemsize
    n_nets, row_tiles, column_tiles = prod(batch), ceil(n_rows / TORCH_TILE), ceil(n_columns / TORCH_TILE)
    accesses = _part(left, n_nets * n_rows * depth * size, column_tiles)
    accesses += _part(right, n_nets * n_columns * depth * size, row_tiles)
    out = call.results[0]
    accesses += _part(out, out.n_bytes, 2 if start else 1) + _part(out, out.n_bytes, 2 if start else 1, written=True)
    flop = 2.0 * n_nets * row_tiles * column_tiles * TORCH_TILE**2 * depth
    return Work(accesses, flop, loads=2, chunks=ceil(depth / 32), depth=depth)


def products_in(call: Call) -> str | Any:
    """The precision of a call's products: float32, tf32 or bf16."""
    if call.kernel is not None:
        return call.arguments.get("PRECISION", "float32")
    operands = [m for m in call.arguments.values() if isinstance(m, Memory)]
    return "bf16" if operands and operands[-1].dtype == torch.bfloat16 else "float32"
