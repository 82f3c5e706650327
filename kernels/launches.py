"""What one update launches on a GPU, found without one: for `benches/launches.py`, which counts it, and for
`d2r_fast.kernels.cost`, which predicts its time.

The update is the learner's own, from the draw of its rows to the sums of its metrics. Its tensors say that they are on
a GPU and hold nothing: each call is dispatched as there, an operation of ours to what is registered for a GPU, and a
launch of a Triton kernel is noted instead of made. Views, and memory that is only reserved, are no work. A call of
torch's is one, though a GPU may run it as several kernels: a sort, or a product that first copies its bias.
"""

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from d2r_fast.config import RunConfig
from d2r_fast.envs import MultiTaskEnvs
from d2r_fast.kernels import network_gradient
from d2r_fast.learning.learner import Learner
from d2r_fast.learning.parameters import FlatParameters
from d2r_fast.learning.replay import Replay
from d2r_fast.nets.agent import Agent
from d2r_fast.ops.backends import Precision
from d2r_fast.presets import PRESETS

SUITES = {"mt10": "mt10-rand", "mt50": "mt50-rand", "quick": "quick"}
KINDS = ("ours", "product", "random", "other")
_PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}
_RANDOM = {"rand", "randn", "uniform_", "normal_"}
_RESERVES = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
_ROWS_PER_TASK = 2000  # in the replay


class Memory(NamedTuple):
    """A tensor that a launch reads or writes.

    storage      number of its allocation
    begin, end   bytes of that allocation between which it lies
    n_bytes      of what it holds; numbers that an expanded tensor repeats count once
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    storage: int
    begin: int
    end: int
    n_bytes: int


class Call(NamedTuple):
    """One call that does work.

    kind       of KINDS
    name       of torch's call or of the operation; "NAME_kernel (Triton)" of a launch
    kernel     the Triton kernel; None: a call of torch's
    arguments  by name, a launch's constants included; a tensor as `Memory`; "of_table": what `gradient_table` was given
    results    tensors that a call of torch's returns; a kernel's are among its arguments
    grid       of a launch
    freed      allocations that were given back since the call before
    """

    kind: str
    name: str
    kernel: Any
    arguments: dict[str, Any]
    results: list[Memory]
    grid: tuple[int, ...]
    freed: list[int]


class RecordCalls(TorchDispatchMode):
    """Notes what is dispatched within, in `calls`. pretends: within `pretended_gpu`."""

    def __init__(self, pretends: bool) -> None:
        super().__init__()
        self._pretends = pretends
        self.calls: list[Call] = []
        self._storages: dict[int, tuple[int, StorageWeakRef]] = {}  # by address, which a reference to it keeps
        self._n_storages = 0
        self._tables: dict[int, list[Any]] = {}  # what each table of gradients says, by its storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "prim":  # a question, such as on which device
            return func(*args, **kwargs)
        if func.has_kernel_for_dispatch_key(DispatchKey.CompositeImplicitAutograd):
            with self:  # a name for other calls, which count
                return func.decompose(*args, **kwargs)
        name, ours = func.overloadpacket.__name__, func.namespace.startswith("d2r_fast")
        tensors = [value for value in args if isinstance(value, Tensor)]
        if ours and any(tensor.is_cuda for tensor in tensors):
            with self:  # what is registered for a GPU; its calls count, not itself
                return func._op_dk(DispatchKey.CUDA, *args, **kwargs)
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        real = bool(tensors) and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if self._pretends and real and not to_gpu:
            with unset_fake_temporarily():  # of the CPU, as a table that is read there
                return func(*args, **kwargs)
        result = self._run(func, name, to_gpu, args, kwargs)
        if not (func.is_view or name in _RESERVES):
            kind = "ours" if ours else "product" if name in _PRODUCTS else "random" if name in _RANDOM else "other"
            names = [argument.name for argument in func._schema.arguments]
            results = [self._noted(value) for value in tree_leaves(result) if isinstance(value, Tensor)]
            self._note(kind, name, None, dict(zip(names, args, strict=False)) | kwargs, results, ())
        return result

    @staticmethod
    def _run(func: Any, name: str, to_gpu: bool, args: Any, kwargs: dict[str, Any]) -> Any:
        if name == "_to_copy" and to_gpu:
            return torch.empty(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device=kwargs["device"])
        if kwargs.get("generator") is not None and to_gpu:
            kwargs = kwargs | {"generator": None}  # which is of the CPU: see `pretended_gpu`
        return func(*args, **kwargs)

    def launch(self, kernel: Any, grid: tuple[int, ...], args: Any, kwargs: dict[str, Any]) -> None:
        """Note a launch of a Triton kernel, instead of making it."""
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        if "table_ptr" in arguments:
            arguments["of_table"] = self._tables.get(self._noted(arguments["table_ptr"]).storage)
        self._note("ours", f"{kernel.fn.__name__} (Triton)", kernel, arguments, [], tuple(grid))

    def keep_table(self, table: Tensor, gradients: list[Any]) -> None:
        """Note of what a table is, whose tensor holds nothing."""
        self._tables[self._noted(table).storage] = gradients

    def _note(
        self, kind: str, name: str, kernel: Any, arguments: dict[str, Any], results: list[Memory], grid: tuple[int, ...]
    ) -> None:
        freed = [at for at, (_, reference) in self._storages.items() if reference.expired()]
        numbers = [self._storages.pop(at)[0] for at in freed]
        noted = {
            key: [self._noted(v) for v in value if isinstance(v, Tensor)]
            if isinstance(value, list | tuple) and any(isinstance(v, Tensor) for v in value)
            else self._noted(value)
            if isinstance(value, Tensor)
            else value
            for key, value in arguments.items()
        }
        self.calls.append(Call(kind, name, kernel, noted, results, grid, numbers))

    def _noted(self, value: Tensor) -> Memory:
        storage = value.untyped_storage()
        if storage._cdata not in self._storages:
            self._storages[storage._cdata] = self._n_storages, StorageWeakRef(storage)
            self._n_storages += 1
        size = value.element_size()
        sizes = [(n, stride) for n, stride in zip(value.shape, value.stride(), strict=True) if stride != 0]
        n_bytes = size if value.numel() > 0 else 0
        for n, _ in sizes:
            n_bytes *= n
        begin = int(value.storage_offset()) * size
        end = begin + (sum((n - 1) * stride for n, stride in sizes) + 1) * size if n_bytes > 0 else begin
        return Memory(tuple(value.shape), value.dtype, self._storages[storage._cdata][0], begin, end, n_bytes)


def _guard_pretended_devices() -> None:
    """Where torch was built without CUDA, its device has no guard, which some calls ask for before they are dispatched.
    The CPU's serves: it does nothing."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")  # by type: CPU, CUDA
    guards[1] = guards[1] or guards[0]


@contextmanager
def pretended_gpu(recorder: RecordCalls) -> Iterator[None]:
    """Tensors made within may be on a GPU that is not there: they hold nothing, and Triton launches are only noted."""
    from triton.runtime.jit import JITFunction

    _guard_pretended_devices()

    def launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        recorder.launch(kernel, grid, args, kwargs)

    make_table = network_gradient.gradient_table

    def table(like: Tensor, gradients: Sequence[Any], precision: str, n_rows: int) -> network_gradient.Table:
        made = make_table(like, gradients, precision, n_rows)
        recorder.keep_table(made.lines, list(gradients))
        return made

    on_cpu, fake = torch.Generator, FakeTensorMode()  # which imports much that must see torch as it is
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        stack.enter_context(mock.patch.object(network_gradient, "gradient_table", table))
        stack.enter_context(mock.patch.object(torch, "Generator", lambda device=None: on_cpu()))
        stack.enter_context(mock.patch.object(torch.cuda, "device_of", nullcontext))
        stack.enter_context(mock.patch.object(torch.cuda, "Event", mock.Mock))
        # Branches are noted where they begin: what runs beside what is not told.
        stack.enter_context(mock.patch.object(torch.cuda, "Stream", lambda device: mock.Mock()))
        stack.enter_context(mock.patch.object(torch.cuda, "stream", nullcontext))
        stack.enter_context(mock.patch.object(torch.cuda, "current_stream", mock.Mock()))
        stack.enter_context(mock.patch.object(torch.cuda, "mem_get_info", lambda device=None: (2**40, 2**40)))
        # An update is captured there: what would wait for the device becomes an assertion on it.
        stack.enter_context(mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True))
        stack.enter_context(fake)
        yield


def calls_on_gpu(cfg: RunConfig) -> list[Call]:
    """The calls of one update that do work on a GPU, in their order, at `cfg`'s sizes and precision."""
    recorder = RecordCalls(pretends=True)
    cfg = replace(cfg, net=replace(cfg.net, backend="triton"))
    sizes = MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size
    segments = FlatParameters(Agent(*sizes, cfg.n_tasks, cfg.net)).segments
    with pretended_gpu(recorder), recorder:
        with torch.device("cuda:0"):
            agent = Agent(*sizes, cfg.n_tasks, cfg.net)
        capacity = cfg.n_tasks * _ROWS_PER_TASK
        replay = Replay(cfg.n_tasks, capacity, *sizes, cfg.net.route_shape, torch.device("cuda:0"))
        replay._set_size(_ROWS_PER_TASK)
        learner = Learner(agent, replay, cfg, seed=0)
        learner.update.flat.segments = segments  # of the CPU, and read there
        learner.run(1)  # makes tables that are kept
        recorder.calls.clear()
        learner.run(1)
    return recorder.calls


def suite_config(suite: str, precision: Precision) -> RunConfig:
    """The settings of a suite's published run with products in a precision."""
    cfg = PRESETS[SUITES[suite]][1]
    return replace(cfg, net=replace(cfg.net, precision=precision))
