"""Runs the project's own launches, `kernel[grid](...)`, in the emulator instead of on a device.

A launch is compiled as the just-in-time compiler would for sm_90: same specialisation of the arguments (divisibility
by 16, integers equal to 1, `do_not_specialize`), same options; the tensors are CPU tensors, whose bytes travel to the
emulated memory and back. Within `emulated()` what torch allocates without a value is poisoned and counts as unwritten.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
from ptx.emulator import Arena, Launch, parse
from ptx.memory import POISON, Finding
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGET = GPUTarget("cuda", 90, 32)
_PROGRAMS: dict[str, Any] = {}  # parsed, by their text


@dataclass
class Ran:
    """One launch that was emulated; `issued` counts instructions of a warp."""

    kernel: str
    precision: str
    grid: tuple[int, ...]
    issued: int
    findings: list[Finding]


@dataclass
class Device:
    """What stays between launches: which bytes of every storage were ever written.

    seed, groups  of the schedule: see `emulator`
    edit          (kernel, PTX) to PTX: for tests that break it
    """

    seed: int = 0
    groups: int = 2
    edit: Callable[[str, str], str] | None = None
    ran: list[Ran] = field(default_factory=list)
    _storages: dict[int, tuple[Any, np.ndarray, np.ndarray]] = field(default_factory=dict)

    def launch(self, kernel: JITFunction, grid: Any, *args: Any, **kwargs: Any) -> None:
        text, shared, values = _compiled(kernel, *args, **kwargs)
        if self.edit is not None:
            text = self.edit(kernel.__name__, text)
        key = hashlib.sha256(text.encode()).hexdigest()
        if key not in _PROGRAMS:
            _PROGRAMS[key] = parse(text)
        arena, addresses = Arena(), {}
        for name, value in values.items():
            if isinstance(value, Tensor):
                start = value.untyped_storage().data_ptr()
                if start not in addresses:
                    addresses[start] = arena.add(name, *self._bytes(value)), value
        arguments = [
            addresses[v.untyped_storage().data_ptr()][0] + v.storage_offset() * v.element_size()
            if isinstance(v, Tensor)
            else int(v)
            for v in values.values()
        ]
        grid = tuple(grid(values) if callable(grid) else grid)
        launch = Launch(
            _PROGRAMS[key], (*grid, 1, 1)[:3], [*arguments, 0, 0], arena, shared, self.seed + len(self.ran), self.groups
        )
        ran = Ran(kernel.__name__, kwargs.get("PRECISION", "float32"), grid, 0, [])
        self.ran.append(ran)
        try:
            launch.run()
        finally:
            ran.issued, ran.findings = launch.issued, list(launch.findings.entries.values())
        granule = launch.memory.granule
        for (_, offset, data, _), (_, value) in zip(arena.blocks, addresses.values(), strict=True):
            new = launch.memory.bytes[offset : offset + data.size]
            covered = launch.memory.written[offset // granule : -(-(offset + data.size) // granule)]
            _, written, known = self._storages[value.untyped_storage().data_ptr()]
            written |= covered.repeat(granule)[: data.size]
            _host(value)[:] = new
            known[:] = new

    def allocated(self, value: Tensor) -> Tensor:
        """Note a fresh tensor without values."""
        if value.device.type == "cpu" and value.untyped_storage().nbytes():
            host = _host(value)
            host[:] = POISON
            self._note(value, np.zeros(host.size, bool))
        return value

    def _bytes(self, value: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """A storage's bytes, and which of them hold a value: what the host changed since the last look does."""
        start, host = value.untyped_storage().data_ptr(), _host(value)
        known = self._storages.get(start)
        if known is None or len(known[1]) != host.size:
            self._note(value, np.ones(host.size, bool))
        else:
            known[1][host != known[2]] = True
            known[2][:] = host
        return host.copy(), self._storages[start][1]

    def _note(self, value: Tensor, written: np.ndarray) -> None:
        storage = value.untyped_storage()  # kept, so that its address is not used again
        self._storages[storage.data_ptr()] = (storage, written, _host(value).copy())


def _compiled(kernel: JITFunction, *args: Any, **kwargs: Any) -> tuple[str, int, dict[str, Any]]:
    """PTX, bytes of shared memory, and the arguments that the compiled kernel takes, by name."""
    backend = make_backend(TARGET)
    kwargs = {"debug": False} | kwargs
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = kernel._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton_compile(source, target=TARGET, options=options.__dict__)
    passed = {name: value for name, value in bound.items() if signature[name] != "constexpr"}
    return compiled.asm["ptx"], compiled.metadata.shared, passed


def _host(value: Tensor) -> np.ndarray:
    """All bytes of the tensor's storage."""
    return torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage()).numpy()


@contextmanager
def emulated(**options: Any) -> Iterator[Device]:
    """Every Triton launch inside runs in the emulator; options as `Device`."""
    device = Device(**options)

    def launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        device.launch(kernel, grid, *args, **kwargs)

    def noted(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, **kwargs: device.allocated(allocate(*args, **kwargs))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", launch))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, noted(getattr(owner, name))))
        yield device
