"""Runs the calls of make_calls.py in this process and judges what comes of them; illegal_calls.py starts it.

Prints JSON lines: which call is about to run on which backend, so that whoever reads knows what killed the process;
what is wrong; and which call is done.
"""

import argparse
import copy
import dataclasses
import json
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when the kernels are defined

import torch
from judge_calls import Outcome, judge
from make_calls import make_call
from odd_calls import ILLEGAL, UNSAID, Call, as_choice, describe
from torch import Tensor

from d2r_fast import ops
from d2r_fast.ops import Routes, ensemble_linear, make_routes, routed_modules, routed_network, select_routes
from d2r_fast.ops.backends import availability
from d2r_fast.ops.cpp.library import instruction_sets, use_instruction_set
from d2r_fast.ops.expert_sum import expert_sum
from d2r_fast.ops.layer_chain import layer_chain
from d2r_fast.ops.module_levels import level_gates, module_levels
from d2r_fast.ops.task_linear import task_linear

OF_LAYERS: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (ensemble_linear, layer_chain, expert_sum, module_levels, level_gates, task_linear)
}
MEMORY = 3 << 30  # bytes of address space for calls: who wants more has copied what should have been refused
CPU_SECONDS = 20  # of processor time for one call on one backend
TRITON_CALLS, TRITON_MODULES = 25, 8  # its interpreter is slow: every so many calls, up to so many modules


def backends_of(call: Call, number: int) -> list[str]:
    """Backends to run the call on, `cpp` once for every instruction set."""
    cpp = [f"cpp:{name}" for name in instruction_sets()]
    if call.operation in ("unpack_active", "count_active"):
        return ["reference"]
    if call.operation == "routed_network":
        return cpp
    if "backend" in call.arguments:
        return ["auto"]
    triton = number % TRITON_CALLS == 0 and call.n_modules <= TRITON_MODULES
    triton = triton and availability()["triton"].startswith("ready")
    return ["reference", "auto", *cpp, *(["triton"] if triton else [])]


@contextmanager
def instruction_set(backend: str) -> Iterator[str]:
    """The backend's name without its instruction set, which runs meanwhile."""
    name, _, isa = backend.partition(":")
    if isa:
        use_instruction_set(isa)
    yield name
    if isa:
        use_instruction_set(instruction_sets()[0])


def perform(call: Call, backend: str, plainly: bool = False) -> Outcome:
    """plainly: contiguous, in float64, nothing done before backward: what a legal call is held against. Products of
    bf16 stay in float32, for which they are defined."""
    arguments = dict(call.arguments)
    if plainly:
        dtype = torch.float32 if arguments.get("precision") == "bf16" else torch.float64
        arguments = {name: plain(v, dtype) for name, v in arguments.items()}
        undefined = call.cotangent in ("wrong shape", "sparse")
        call = dataclasses.replace(call, context="grad", twist="", cotangent="plain" if undefined else call.cotangent)
    if "net" in arguments:
        arguments["net"] = on_backend(arguments["net"], arguments.pop("backend", backend))
    try:
        with in_context(call.context):
            arguments, leaves = with_leaves(call, arguments)
            outputs = invoke(call.operation, arguments, backend)
            results: dict[str, Tensor | None] = {name: v.detach() for name, v in outputs.items()}
        if call.context in ("grad", "autocast"):
            results |= gradients(call, outputs, leaves)
        return Outcome(results)
    except Exception as error:  # the judge's matter
        return Outcome(error=error)


def plain(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Routes):
        return Routes(*(plain(v, dtype) for v in value))
    if isinstance(value, Tensor):
        return (value.to(dtype) if value.is_floating_point() else value).clone(memory_format=torch.contiguous_format)
    if isinstance(value, list | tuple) and value and all(isinstance(v, Tensor) for v in value):
        return [plain(v, dtype) for v in value]
    return copy.deepcopy(value).to(dtype) if isinstance(value, torch.nn.Module) else value


def on_backend(net: Any, backend: str) -> Any:
    """A copy of the network that runs on `backend`."""
    net = copy.deepcopy(net)
    net.cfg = dataclasses.replace(net.cfg, backend=backend)
    for layer in net.modules():
        if hasattr(layer, "_cfg"):
            layer._cfg = net.cfg
    return net


def in_context(name: str) -> Any:
    if name == "autocast":
        return torch.autocast("cpu", torch.bfloat16)
    return {"grad": nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}[name]()


def with_leaves(call: Call, arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The arguments with those in `needs` as leaves, and the leaves by name."""
    leaves: dict[str, Any] = {}
    for name in call.needs:
        if name == "parameters" and "net" in arguments:
            leaves |= dict(arguments["net"].named_parameters())
        elif name == "parameters" and isinstance(arguments[name], list | tuple):
            arguments[name] = [leaf(v) for v in arguments[name]]
            leaves |= {f"parameters[{i}]": v for i, v in enumerate(arguments[name])}
        elif name == "gate" and isinstance(arguments.get("routes"), Routes):
            leaves[name] = leaf(arguments["routes"].gate)
            arguments["routes"] = arguments["routes"]._replace(gate=leaves[name])
        elif name in arguments:
            arguments[name] = leaves[name] = leaf(arguments[name])
    if "net" in arguments and "parameters" not in call.needs:
        arguments["net"].requires_grad_(False)
    return arguments, {name: v for name, v in leaves.items() if isinstance(v, Tensor) and v.requires_grad}


def leaf(value: Any) -> Any:
    return value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def invoke(operation: str, a: dict[str, Any], backend: str) -> dict[str, Tensor]:
    """Outputs by name."""
    if operation == "select_routes":
        return select_routes(**{"backend": backend} | a)._asdict()
    if operation == "make_routes":
        routes = make_routes(a["index"], a["gate"], a["flow"])
        return {"out": routed_modules(a["h0"], a["weight"], a["bias"], routes, backend=backend)} | routes._asdict()
    if operation == "routed_modules":
        return {"out": routed_modules(**{"backend": backend} | a)}
    if operation in OF_LAYERS:
        return {"out": OF_LAYERS[operation](**{"backend": backend} | a)}
    if operation == "RoutedNetwork.forward":
        out, routes = a["net"](a["x"], a["task"], as_choice(a))
        return {"out": out} | routes._asdict()
    if operation == "routed_network":
        out, routes = routed_network(**a) if backend == "cpp" else composed_network(**a)
        return {"out": out} | routes._asdict()
    return {"out": getattr(ops, operation)(**a)}


def composed_network(
    x: Tensor, task: Tensor, parameters: list[Tensor], k: int, mode: Any, temperature: Tensor, noise: Tensor,
    index: Tensor, residual: bool, resrouting: bool, precision: str,
) -> tuple[Tensor, Routes]:  # fmt: skip
    """`routed_network` as the other operations on the reference."""
    base0, base1, of_task, module0, modules, head, *route = zip(parameters[::2], parameters[1::2], strict=True)

    def layer(of: tuple[Tensor, Tensor], v: Tensor, relu: bool = False) -> Tensor:
        return ensemble_linear(v, *of, relu, "reference", precision)

    onehot = (task[:, None] == torch.arange(of_task[0].shape[-1])).to(x.dtype)
    f = layer(base1, layer(base0, x, True))
    logits = f * layer(of_task, onehot)
    for of in route:
        logits = layer(of, logits, of is not route[-1])
    routes = select_routes(logits, k, mode, temperature, noise, index, bool(resrouting), backend="reference")
    mixed = routed_modules(layer(module0, f.relu(), True), *modules, routes, bool(residual), "reference", precision)
    return layer(head, mixed), routes


def gradients(call: Call, outputs: dict[str, Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Of every leaf, as d_name."""
    heads = [v for v in outputs.values() if v.requires_grad]
    if call.cotangent == "one output only":
        heads = heads[-1:]
    if not heads or not leaves:
        return {}
    names, of = list(leaves), list(leaves.values())
    if call.twist == "input changed in place":
        with torch.no_grad():
            of[0] += 1
    cotangents: list[Tensor] | None = [cotangent(call.cotangent, v) for v in heads]
    if call.cotangent == "sum of squares":
        heads, cotangents = [sum((v.square().sum() for v in heads), torch.zeros(()))], None
    if call.twist == "second backward":
        torch.autograd.grad(heads, of, cotangents, retain_graph=True, allow_unused=True)
    twice = call.twist == "differentiated twice"
    found = torch.autograd.grad(heads, of, cotangents, allow_unused=True, create_graph=twice)
    again = [v.square().sum() for v in found if v is not None and v.requires_grad]
    if twice and again:
        torch.autograd.grad(again, of, allow_unused=True)
    return {f"d_{name}": None if v is None else dense(v.detach()) for name, v in zip(names, found, strict=True)}


def dense(value: Tensor) -> Tensor:
    return value.to_dense() if value.layout == torch.sparse_coo else value


def cotangent(kind: str, like: Tensor) -> Tensor:
    """The same numbers for every dtype and backend, in the layout of `kind`."""
    value = torch.linspace(-1, 1, like.numel(), dtype=torch.float64).view(like.shape).to(like.dtype)
    if kind == "transposed" and like.dim() > 1:
        return value.transpose(0, 1).contiguous().transpose(0, 1)
    if kind == "expanded":
        return torch.full((), 0.5, dtype=like.dtype).expand(like.shape)
    if kind == "zero strides" and like.dim() > 1:
        return torch.full((like.shape[-1],), 0.25, dtype=like.dtype).expand(like.shape)
    if kind == "offset":
        return torch.cat([value.new_zeros(1), value.flatten()])[1:].view(like.shape)
    if kind == "negative bit" and like.dtype in (torch.float32, torch.float64):
        return torch.complex(torch.zeros_like(value), -value).conj().imag
    if kind == "float32":
        return value.float()
    if kind == "sparse":
        return value.to_sparse()
    return value[None] if kind == "wrong shape" else value


def run_and_judge(seed: int, number: int, skipped: set[str], tell: Callable[..., None]) -> None:
    call = make_call(seed, number)
    words = in_words(call)

    def begin(backend: str) -> None:
        tell(start=number, on=backend, call=words)
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process

    truth = None
    # Autocast has its own numbers, and what a network does with an unsaid argument is not for us to compose.
    known = call.verdict != ILLEGAL and call.context != "autocast"
    known &= not (call.operation == "RoutedNetwork.forward" and call.verdict == UNSAID)
    if known and "backend" not in call.arguments and "truth" not in skipped:
        begin("truth")
        truth = perform(call, "reference", plainly=True)
    outcomes = {}
    changed = False
    for backend in (b for b in backends_of(call, number) if b not in skipped):
        begin(backend)
        own = make_call(seed, number) if call.twist == "input changed in place" else call
        before = small_tensors(own)
        with instruction_set(backend) as name:
            outcomes[backend] = perform(own, name)
        same = all(torch.equal(a, b) for a, b in zip(before, small_tensors(own), strict=True))
        changed |= not same and own is call
    found: dict[tuple[str, str], list[str]] = {}
    for backend, kind, message in judge(call, outcomes, truth):
        found.setdefault((kind, message), []).append(backend)
    if changed:
        found["garbage", "an argument was changed"] = list(outcomes)
    for (kind, message), on in found.items():
        tell(number=number, on=" ".join(on), kind=kind, message=message, call=words)
    tell(done=number, tried=len(outcomes))


def small_tensors(call: Call) -> list[Tensor]:
    """Copies of the arguments that can be looked at for a change, as bytes, for NaN equals nothing."""
    found = []
    for value in call.arguments.values():
        plain = isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided
        if plain and value.numel() < 1 << 20 and not value.is_complex() and not value.is_neg():
            found.append(value.detach().clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8))
    return found


def in_words(call: Call) -> str:
    arguments = ", ".join(f"{name}={describe(v)}" for name, v in call.arguments.items() if v is not None)
    plain_ones = ("grad", "plain", "")
    how = [call.verdict, call.change, *(v for v in (call.context, call.cotangent, call.twist) if v not in plain_ones)]
    return f"{call.operation}({arguments}) [{'; '.join(v for v in how if v)}] gradients: {' '.join(call.needs)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("seed", "first", "count"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--skip", default="{}", help="JSON: for a call's number the backends to pass over")
    a = parser.parse_args()
    skip = {int(number): set(on) for number, on in json.loads(a.skip).items()}

    def tell(**line: Any) -> None:
        print(json.dumps(line), flush=True)

    torch.set_num_threads(1 + a.first // 400 % 2)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN: reading it shows
    with open("/proc/self/statm") as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))
    for number in range(a.first, a.first + a.count):
        run_and_judge(a.seed, number, skip.get(number, set()), tell)


if __name__ == "__main__":
    main()
