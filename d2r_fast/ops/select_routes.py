"""Choosing sources: packed routing logits -> `Routes` (algorithm: dynamic depth routing, "choosing sources")."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from d2r_fast.ops.arguments import require_flag, require_tensor, under_autocast
from d2r_fast.ops.backends import Backend, choose_backend
from d2r_fast.ops.contract import Run, define, differentiable, launcher
from d2r_fast.ops.reference import select_routes as reference
from d2r_fast.ops.route_checks import require_legal_index

MAX_MODULES = 32  # a row's active modules are the bits of one int32
RouteMode = Literal["greedy", "sampled", "given"]


class Routes(NamedTuple):
    """The sources every row of every network kept. Route i (1..N) is slot i-1; it chooses among modules 0..i-1.

    index  [E,B,N,K] int32   the kept sources; 0 in an unused slot (route i has min(K, i) used ones)
    gate   [E,B,N,K] float   their weights, summing to 1 over the used slots; 0 in an unused slot
    flow   [E,B,N,K] bool    ResRouting: may the gradient enter the source's ReLU layer? False in an unused slot
    active [E,B]     int32   bit j: module j is reachable from the head
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    gate: Tensor
    flow: Tensor
    active: Tensor


def modules_for(n_logits: int) -> int:
    """N such that N(N+1)/2 == n_logits. ValueError where there is none, or N is over 32."""
    n_modules = int(((8 * n_logits + 1) ** 0.5 - 1) / 2)
    if n_modules < 1 or n_modules * (n_modules + 1) // 2 != n_logits:
        raise ValueError(f"logits: expected a last axis of N(N+1)/2 (1, 3, 6, 10, ...), got {n_logits}")
    if n_modules > MAX_MODULES:
        raise ValueError(f"logits: expected at most {MAX_MODULES} modules, got N={n_modules}")
    return n_modules


def select_routes(
    logits: Tensor,
    k: int,
    mode: RouteMode = "greedy",
    temperature: Tensor | None = None,
    noise: Tensor | None = None,
    index: Tensor | None = None,
    resrouting: bool = True,
    backend: Backend = "auto",
) -> Routes:
    """Choose min(k, i) of the i sources of every route i, and weight them by softmax over the chosen *unscaled* logits.

    logits      [E,B,R] float, R = N(N+1)/2: route i's i logits follow those of route i-1; N at most 32
    mode        "greedy": the k largest. "sampled": k without replacement from softmax(logits / temperature), drawn as
                the k largest of logits / temperature + noise. "given": the sources in `index`.
    temperature [B] float, positive, each row's route temperature ("sampled" only)
    noise       [E,B,R] float, standard Gumbel ("sampled" only)
    index       [E,B,N,K] integer ("given" only), each used slot a distinct source below i; unused slots are ignored
    resrouting  False: gradients flow everywhere (flow is True in every used slot)
    backend     "auto": the fastest that can run here; see `d2r_fast.ops.backends`

    Returns `Routes`; `gate` carries the gradient to the chosen logits (once differentiable except on the reference),
    the rest is constant. Under autocast it runs in float32.
    ValueError: k outside 1..N, a shape, dtype, device or argument that does not fit the mode, a source in `index` that
    its route may not read, or a backend that cannot run. TypeError: an argument of another kind. In a CUDA graph being
    captured, and under torch.compile unless on `cpp`, an illegal source is an assertion on the device.
    """
    require_tensor("logits", logits, "float")
    if logits.dim() != 3:
        raise ValueError(f"logits: expected [E,B,R], got {list(logits.shape)}")
    require_flag("resrouting", resrouting)
    n_modules = check_select_arguments(tuple(logits.shape), logits.device, k, mode, temperature, noise, index)
    if under_autocast(logits):
        with torch.autocast(logits.device.type, enabled=False):
            return select_routes(logits.float(), k, mode, temperature, noise, index, resrouting, backend)
    chosen = choose_backend(backend, logits)
    if index is not None and chosen != "cpp":  # whose kernels look themselves
        require_legal_index(index)
    if chosen == "reference":
        return Routes(*reference.forward(logits, temperature, noise, index, k, n_modules, resrouting))
    gate, index, flow, active = _run(chosen, logits, temperature, noise, index, k, n_modules, resrouting)
    return Routes(index, gate, flow, active)


def make_routes(index: Tensor, gate: Tensor, flow: Tensor | None = None) -> Routes:
    """Routes of one's own making: any lower-triangular graph over the modules, with any weights.

    index [E,B,N,K] integer   route i (slot i-1) reads min(K, i) distinct modules below i; other slots are ignored
    gate  [E,B,N,K] float     their weights; may carry a gradient
    flow  [E,B,N,K] bool      where the gradient may enter the source's ReLU layer; None: everywhere

    With K = N and index[..., k] = k this is dense routing, as in soft modularization.
    ValueError: shapes, dtypes or devices disagree, or a route reads a module that it may not. TypeError: no tensors. On
    a GPU this waits for it, to look at `index`; in a graph being captured or compiled it asserts on the device instead.
    """
    require_tensor("index", index, "integer")
    require_tensor("gate", gate, "float")
    if index.dim() != 4 or not 1 <= index.shape[3] <= index.shape[2] <= MAX_MODULES:
        raise ValueError(f"index: expected [E,B,N,K], K <= N <= {MAX_MODULES}, got {list(index.shape)}")
    if flow is not None and not (isinstance(flow, Tensor) and flow.dtype == torch.bool):
        raise TypeError(f"flow: expected a bool tensor, got {getattr(flow, 'dtype', type(flow).__name__)}")
    if flow is not None and flow.layout is not torch.strided:
        raise ValueError(f"flow: expected a dense tensor, got {flow.layout}")
    for name, value in (("gate", gate), ("flow", flow)):
        if value is not None and value.shape != index.shape:
            raise ValueError(f"{name}: expected shape {list(index.shape)} like index, got {list(value.shape)}")
        if value is not None and value.device != index.device:
            raise ValueError(f"{name}: expected device {index.device} like index, got {value.device}")
    require_legal_index(index)
    n_modules, k = index.shape[2:]
    route = torch.arange(1, n_modules + 1, device=index.device)
    used = torch.arange(k, device=index.device) < route[:, None]  # [N,K]
    flow = used.expand(index.shape) if flow is None else flow & used
    # By way of int64: torch 2.11 compares and chooses few unsigned dtypes.
    index = torch.where(used, index.to(torch.int64), 0).to(torch.int32)
    return Routes(index, torch.where(used, gate, 0), flow.contiguous(), reference.active_bits(index))


def _shapes(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    k, n_modules = rest[3:5]
    rows = logits.shape[:2]
    shape = (*rows, n_modules, k)
    index, active = logits.new_empty(shape, dtype=torch.int32), logits.new_empty(rows, dtype=torch.int32)
    return logits.new_empty(shape), index, logits.new_empty(shape, dtype=torch.bool), active


def _gradient_shape(d_gate: Tensor, index: Tensor, gate: Tensor) -> Tensor:
    n_modules = index.shape[2]
    return gate.new_empty(*index.shape[:2], n_modules * (n_modules + 1) // 2)


_launchers = launcher("select_routes", "forward"), launcher("select_routes", "backward")
# What has a gradient comes first, as opcheck wants it.
_forward = define(
    "select_routes(Tensor logits, Tensor? temperature, Tensor? noise, Tensor? given, int k, int n_modules, "
    "bool resrouting) -> (Tensor gate, Tensor index, Tensor flow, Tensor active)",
    None,
    _shapes,
    _launchers[0],
)
_backward = define(
    "select_routes_backward(Tensor d_gate, Tensor index, Tensor gate) -> Tensor", None, _gradient_shape, _launchers[1]
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    gate, index, flow, active = output
    ctx.mark_non_differentiable(index, flow, active)
    ctx.save_for_backward(index, gate)


def _differentiate(backward: Run, ctx: Any, d_gate: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    return backward(d_gate, *ctx.saved_tensors), *(None,) * 6


_run = differentiable(_forward, _backward, _save, _differentiate, _launchers)


def check_select_arguments(
    logits_shape: tuple[int, ...],
    device: torch.device,
    k: int,
    mode: str,
    temperature: Tensor | None,
    noise: Tensor | None,
    index: Tensor | None,
) -> int:
    """ValueError unless the arguments fit logits [E,B,R] on `device`, as `select_routes` says; returns N."""
    n_nets, rows, n_logits = logits_shape
    n_modules = modules_for(n_logits)
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"k: expected an int, got {k!r}")
    if not 1 <= k <= n_modules:
        raise ValueError(f"k: expected 1..N={n_modules} sources a route, got {k}")
    wanted = {
        "greedy": {},
        "sampled": {"temperature": (temperature, [rows]), "noise": (noise, [n_nets, rows, n_logits])},
        "given": {"index": (index, [n_nets, rows, n_modules, k])},
    }
    if not isinstance(mode, str) or mode not in wanted:
        raise ValueError(f"mode: expected one of {', '.join(wanted)}, got {mode!r}")
    for name, value in {"temperature": temperature, "noise": noise, "index": index}.items():
        if name not in wanted[mode]:
            if value is not None:
                raise ValueError(f"{name}: not used by mode {mode!r}, so expected None")
            continue
        shape = wanted[mode][name][1]
        if value is None:
            raise ValueError(f"{name}: mode {mode!r} expects shape {shape}, got None")
        require_tensor(name, value, "integer" if name == "index" else "float")
        if list(value.shape) != shape:
            raise ValueError(f"{name}: mode {mode!r} expects shape {shape}, got {list(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name}: expected device {device} like logits, got {value.device}")
    return n_modules


def unpack_active(active: Tensor, n_modules: int) -> Tensor:
    """The active bits as a mask: [...] int32 -> [...,N] bool. ValueError: another dtype, or N outside 1..32."""
    if not isinstance(active, Tensor) or active.dtype != torch.int32:
        raise ValueError(f"active: expected an int32 tensor, got {getattr(active, 'dtype', type(active).__name__)}")
    if not isinstance(n_modules, int) or not 1 <= n_modules <= MAX_MODULES:
        raise ValueError(f"n_modules: expected 1..{MAX_MODULES}, got {n_modules!r}")
    module = torch.arange(n_modules, dtype=torch.int32, device=active.device)
    return active[..., None].bitwise_right_shift(module).bitwise_and(1).bool()


def count_active(active: Tensor, n_modules: int) -> Tensor:
    """How many modules each row runs: [...] int32 bits -> [...] int64."""
    return unpack_active(active, n_modules).sum(-1)
