"""How many calls that do work one update makes on the CPU, and would make on a GPU; counted without one.

    python benches/launches.py --json benches/results/launches.json

The update is the learner's own, from the draw of its rows to the sums of its metrics, at the sizes of each preset. On
the CPU it runs, and every call that torch dispatches is counted. For a GPU its tensors say that they are on one and
hold nothing: each call is dispatched as there, an operation of ours to what is registered for a GPU, and a launch of a
Triton kernel is noted instead of made. Views, and memory that is only reserved, are no work. A call of torch's counts
as one, though a GPU may run it as several kernels: a sort, or a product that first copies its bias.
"""

import argparse
import ctypes
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from timing import print_table, write_report
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from update_step import ACTIONS, OBS, make_learner

from d2r_fast.config import RunConfig
from d2r_fast.learning.parameters import FlatParameters
from d2r_fast.nets.agent import Agent
from d2r_fast.ops.backends import INTERPRETED
from d2r_fast.presets import PRESETS

SUITES = {"mt10": "mt10-rand", "mt50": "mt50-rand", "quick": "quick"}
DEVICES = {"cpu": "cpu", "gpu": "cuda:0"}
KINDS = ("ours", "product", "random", "other")
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
_RANDOM = {"rand", "randn", "uniform_", "normal_"}
_RESERVES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}


class CountCalls(TorchDispatchMode):
    """Counts what is dispatched within, in `calls` by kind and name. pretends: within `pretended_gpu`."""

    def __init__(self, pretends: bool) -> None:
        super().__init__()
        self._pretends = pretends
        self.calls: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":  # a question, such as on which device
            return func(*args, **kwargs)
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:  # a name for other calls, which count
                return func.decompose(*args, **kwargs)
        name, ours = func.overloadpacket.__name__, func.namespace.startswith("d2r_fast")
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if ours and any(tensor.is_cuda for tensor in tensors):
            with self:  # what is registered for a GPU; its calls count, not itself
                return func._op_dk(DispatchKey.CUDA, *args, **kwargs)
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        real = bool(tensors) and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if self._pretends and real and not to_gpu:
            with unset_fake_temporarily():  # of the CPU, as a table that is read there
                return func(*args, **kwargs)
        if not (func.is_view or name in _RESERVES):
            kind = "ours" if ours else "product" if name in _PRODUCTS else "random" if name in _RANDOM else "other"
            self.calls[kind, name] += 1
        if name == "_to_copy" and to_gpu:
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        if kwargs.get("generator") is not None and to_gpu:
            kwargs["generator"] = None  # which is of the CPU: see `pretended_gpu`
        return func(*args, **kwargs)


def _guard_pretended_devices() -> None:
    """Where torch was built without CUDA, its device has no guard, which some calls ask for before they are dispatched.
    The CPU's serves: it does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # by type: CPU, CUDA
    guards[1] = guards[1] or guards[0]


@contextmanager
def pretended_gpu(counter: CountCalls) -> Iterator[None]:
    """Tensors made within may be on a GPU that is not there: they have no memory, and Triton launches only count."""
    from triton.runtime.jit import JITFunction

    _guard_pretended_devices()

    def launch(kernel: Any, *args: Any, **kwargs: Any) -> None:
        counter.calls["ours", f"{kernel.fn.__name__} (Triton)"] += 1

    on_cpu = torch.Generator
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        stack.enter_context(mock.patch.object(torch, "Generator", lambda device=None: on_cpu()))
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", nullcontext))
        stack.enter_context(mock.patch.object(torch.cuda, "mem_get_info", lambda device=None: (2**40, 2**40)))
        # An update is captured there: what would wait for the device becomes an assertion on it.
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True))
        stack.enter_context(FakeTensorMode())
        yield


def count_update(cfg: RunConfig, path: str) -> Counter[tuple[str, str]]:
    """The calls of one update that do work, by kind and name."""
    counter = CountCalls(path == "gpu")
    cfg = replace(cfg, net=replace(cfg.net, backend={"cpu": "cpp", "gpu": "triton"}[path]))
    segments = FlatParameters(Agent(OBS, ACTIONS, cfg.n_tasks, cfg.net)).segments
    with ExitStack() as stack:
        if path == "gpu":
            stack.enter_context(pretended_gpu(counter))
        stack.enter_context(counter)
        learner = make_learner(cfg, DEVICES[path])
        learner.update.flat.segments = segments  # of the CPU, and read there
        learner.run(1)  # makes tables that are kept
        counter.calls.clear()
        learner.run(1)
    return counter.calls


def as_row(suite: str, path: str, calls: Counter[tuple[str, str]]) -> dict[str, Any]:
    """One line of the report: calls by kind, their sum, and by name, the most frequent first."""
    row: dict[str, Any] = {"suite": suite, "path": path}
    row |= {kind: sum(n for (of, _), n in calls.items() if of == kind) for kind in KINDS}
    return row | {"total": calls.total(), "calls": {name: n for (_, name), n in calls.most_common()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set, under which no kernel is launched")
    rows = [
        as_row(suite, path, count_update(PRESETS[name][1], path)) for suite, name in SUITES.items() for path in DEVICES
    ]
    print_table(rows, [column for column in rows[0] if column != "calls"])
    write_report(args.json, "python " + " ".join(["benches/launches.py", *sys.argv[1:]]), "cpu", rows)


if __name__ == "__main__":
    main()
