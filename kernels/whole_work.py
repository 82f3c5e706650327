"""What a launch of whole networks does on a GPU (`d2r_fast.kernels.whole_network`); `work.py` has the other kernels."""

from collections.abc import Sequence
from math import ceil
from typing import Any, NamedTuple

from d2r_fast.kernels.launches import Call, Memory
from d2r_fast.kernels.work import FLOAT, Access, Shares, Work, route_shares
from d2r_fast.learning.whole import BACK, N_MEMBERS

_PLACE = 8  # bytes of a number in a member's line


class Layer(NamedTuple):
    """One product of a tile, of BLOCK_ROWS rows: what it reads and gives, and how it is cut."""

    n_in: int
    n_out: int
    block_out: int
    block_depth: int

    @property
    def chunks(self) -> int:
        return ceil(self.n_out / self.block_out) * ceil(self.n_in / self.block_depth)

    @property
    def depth(self) -> int:
        """Terms that a program sums for it, one after the other."""
        return self.chunks * self.block_depth

    @property
    def row_flop(self) -> float:
        return 2.0 * self.chunks * self.block_out * self.block_depth

    @property
    def row_traffic(self) -> float:
        """Bytes that a row is read as: once for every block of outputs."""
        return FLOAT * self.n_in * ceil(self.n_out / self.block_out)


def _sizes(call: Call) -> tuple[int, int, int, int]:
    """Rows of a member, tiles of them, the first member of the launch and how many it has."""
    n_tiles, n_members = call.grid
    first = call.arguments["line_ptr"].begin // (_PLACE * call.arguments["COLUMNS"])
    return call.arguments["n_rows"], n_tiles, first, n_members


def _of_members(memory: Memory, first: int, n: int, of: int = N_MEMBERS) -> Memory:
    """The part of a tensor that some members have, all of which have as much of it."""
    size, begin = memory.n_bytes // of, memory.begin + memory.n_bytes // of * first
    return memory._replace(begin=begin, end=begin + size * n, n_bytes=size * n)


def _linear(
    layers: Sequence[Layer], parameters: Memory, n_rows: int, n_tiles: int, n: int
) -> tuple[list[Access], float]:
    """Weights, once a tile of a member, and the flop; what the layers read and write of activations is not here."""
    n_bytes = FLOAT * sum(layer.n_in * layer.n_out for layer in layers) * n
    flop = sum(layer.row_flop for layer in layers) * ceil(n_rows / n_tiles) * n_tiles * n
    return [Access(parameters, min(n_bytes, parameters.n_bytes), float(n_bytes * n_tiles), False)], flop


def _work(
    accesses: list[Access], flop: float, layers: Sequence[Layer], modules: Shares, a: dict[str, Any], of_module: int
) -> Work:
    """of_module: dependent loads, and sums over threads, of a module's sources."""
    most, per_module = modules.most_touched, a["BLOCK_D"] // min(a["BLOCK_DEPTH"], a["BLOCK_D"])
    chunks = sum(layer.chunks for layer in layers) + most * per_module
    depth = sum(layer.depth for layer in layers) + most * a["BLOCK_D"]
    choosing = 30.0 * a["BLOCK_ROWS"] / a["BLOCK_CHOOSING"]
    return Work(
        accesses,
        flop,
        loads=ceil(2 * len(layers) + of_module * most + 6),
        chunks=chunks,
        depth=depth,
        passes=most,
        reductions=choosing + of_module * most,
    )


def forward(call: Call) -> Work:
    a, (n_rows, n_tiles, first, n) = call.arguments, _sizes(call)
    hidden, width, n_modules, k = a["H"], a["D"], a["N"], a["K"]
    block, depth = a["BLOCK_OUT"], a["BLOCK_DEPTH"]
    pairs = [(a["MOST_IN"], hidden), (hidden, hidden), *zip(a["WIDTHS"], a["WIDTHS"][1:], strict=False)]
    layers = [Layer(n_in, n_out, block, depth) for n_in, n_out in pairs]
    layers += [Layer(hidden, width, a["BLOCK_D"], depth)]
    layers += [Layer(width, a["BLOCK_HEAD"], a["BLOCK_HEAD"], min(depth, a["BLOCK_D"]))]
    accesses, flop = _linear(layers, a["parameters_ptr"], n_rows, n_tiles, n)
    read = sum(layer.row_traffic for layer in layers) * n_rows * n
    kept = _of_members(a["kept_ptr"], first, n)
    accesses += [Access(kept, 0.0, read, False), Access(kept, kept.n_bytes, kept.n_bytes, True)]
    accesses += [Access(a["x_ptr"], a["x_ptr"].n_bytes, 0.0, False)]
    for name in ("index_ptr", "gate_ptr", "flow_ptr", "active_ptr"):
        part = _of_members(a[name], first, n)
        accesses.append(Access(part, part.n_bytes, part.n_bytes, True))
    if a["noise_ptr"] is not None:
        accesses.append(Access(a["noise_ptr"], a["noise_ptr"].n_bytes, a["noise_ptr"].n_bytes, False))
    # The modules, as `work._routed_fwd` has them, of rows in task order.
    shares = route_shares(n_modules, k, n_rows, a["BLOCK_ROWS"], False)
    row = FLOAT * n * n_rows * width
    runs, h = shares.active * row, _of_members(a["h_ptr"], first, n)
    opened = _of_members(a["opened_ptr"], first, n)
    weights = FLOAT * n * (n_modules - 1) * width * width
    accesses += [Access(a["parameters_ptr"], 0.0, weights * n_tiles * shares.touched / (n_modules - 1), False)]
    accesses += [Access(h, 0.0, (runs + row) * k, False), Access(h, runs + row, runs + row, True)]
    accesses += [Access(opened, runs / FLOAT, runs / FLOAT, True)]
    flop += 2.0 * n_tiles * n * shares.touched * a["BLOCK_ROWS"] * a["BLOCK_D"] ** 2
    return _work(accesses, flop, layers, shares, a, of_module=2)


def backward(call: Call) -> Work:
    a, (n_rows, n_tiles, at, n) = call.arguments, _sizes(call)
    hidden, width, n_modules, k = a["H"], a["D"], a["N"], a["K"]
    block, depth = a["BLOCK_OUT"], a["BLOCK_DEPTH"]
    narrow = min(depth, a["BLOCK_D"])
    # Each from its output's gradient to its input's.
    layers = [Layer(a["BLOCK_HEAD"], width, a["BLOCK_D"], a["BLOCK_HEAD"])]
    layers += [Layer(n_out, n_in, block, depth) for n_in, n_out in zip(a["WIDTHS"], a["WIDTHS"][1:], strict=False)]
    layers += [Layer(width, hidden, block, narrow), Layer(hidden, hidden, block, depth)]
    if a["normal_ptr"] is None:  # critics at the actor's actions, which go on to these
        layers += [Layer(hidden, a["BLOCK_IN"], a["BLOCK_IN"], depth)]
    accesses, flop = _linear(layers, a["parameters_ptr"], n_rows, n_tiles, n)
    read = sum(layer.row_traffic for layer in layers) * n_rows
    shares = route_shares(n_modules, k, n_rows, a["BLOCK_ROWS"], False)
    row = FLOAT * n_rows * width  # of one member
    runs, pushed = shares.active * row, (shares.active + 1) * row * k
    for number in BACK[at : at + n]:
        kept, h, opened = (_of_members(a[name], number, 1) for name in ("kept_ptr", "h_ptr", "opened_ptr"))
        routes = [_of_members(a[name], number, 1) for name in ("index_ptr", "gate_ptr", "flow_ptr", "active_ptr")]
        accesses += [Access(kept, kept.n_bytes, read, False), Access(h, runs + row, pushed, False)]
        accesses += [Access(opened, runs / FLOAT, runs / FLOAT, False)]
        accesses += [Access(part, part.n_bytes, part.n_bytes, False) for part in routes]
    d_z = _of_members(a["d_z_ptr"], at, n, len(BACK))
    accesses += [Access(d_z, 0.0, read * n, False), Access(d_z, d_z.n_bytes, d_z.n_bytes, True)]
    # The modules, as `work._routed_bwd` has them.
    weights = FLOAT * n * (n_modules - 1) * width * width
    accesses += [Access(a["parameters_ptr"], 0.0, weights * n_tiles * shares.touched / (n_modules - 1), False)]
    for name in ("to_relu_ptr", "to_residual_ptr")[: 2 if a["RESIDUAL"] else 1]:
        part = _of_members(a[name], at, n, len(BACK))
        accesses += [Access(part, 0.0, n * pushed, False), Access(part, n * (runs + row), n * pushed, True)]
    flop += 2.0 * n_tiles * n * shares.touched * a["BLOCK_ROWS"] * a["BLOCK_D"] ** 2
    return _work(accesses, flop, layers, shares, a, of_module=k + 2)
