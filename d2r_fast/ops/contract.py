"""Where an operation's schema stands, once; what runs it hangs behind its name, by device.

The C++ library registers its kernels for the CPU under the same names, each at the end of its file in csrc/. On a GPU
the launchers of d2r_fast.kernels run, or the reference in plain PyTorch where an operation has no kernel of ours.
"""

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch._ops import OpOverload
from torch.autograd.function import once_differentiable

from d2r_fast.ops.backends import STATE
from d2r_fast.ops.cpp import library

LIBRARY = torch.library.Library("d2r_fast", "FRAGMENT")
Run = Callable[..., Any]


def define(schema: str, reference: Run | None, fake: Run, cuda: Run | None = None) -> OpOverload:
    """Define `schema` in namespace d2r_fast; returns the operation.

    reference  runs where nothing faster does, on any device; None: its public function runs the reference by itself
    fake       the results' shapes and dtypes, without computing
    cuda       what runs on a GPU instead of the reference
    """
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if not library.is_ready():
        LIBRARY.impl(name, reference or _refuse, "CPU")
    on_gpu = cuda or reference
    if on_gpu is not None:
        LIBRARY.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(f"d2r_fast::{name}", fake, lib=LIBRARY)
    operation: OpOverload = getattr(torch.ops.d2r_fast, name).default
    return operation


def _refuse(*_: Any) -> None:
    library.require()


def launcher(op: str, function: str, reference: Run | None = None) -> Run:
    """`function` of d2r_fast.kernels.`op`; Triton is imported only where it runs, on the device of the first argument.

    reference  runs where Triton is not installed; None: nothing calls this there
    """

    def run(*args: Any) -> Any:
        if reference is not None and STATE["triton"] != "ready":
            return reference(*args)
        with torch.cuda.device_of(args[0]):
            return getattr(import_module(f"d2r_fast.kernels.{op}"), function)(*args)

    return run


def without_autograd(operation: OpOverload) -> Run:
    """`operation` without a graph: to ask in every call whether one is wanted costs more than a small call."""

    def run(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operation(*args)

    return run


def differentiable(
    forward: OpOverload,
    backward: OpOverload,
    save: Callable[..., None],
    differentiate: Run,
    launchers: tuple[Run, Run] | None = None,
) -> Run:
    """Give the operation `forward` its gradient; returns run(backend, *arguments of the operation).

    save(ctx, inputs, output)                 keeps for the backward what it needs
    differentiate(backward, ctx, *gradients)  a gradient or None for each input, computed by calling `backward`
    launchers                                 Triton's forward and backward, with the operations' arguments

    A list of tensors among the arguments comes last. Differentiable once.
    """
    torch.library.register_autograd(forward.name(), partial(differentiate, backward), setup_context=save, lib=LIBRARY)
    *single, last = forward._schema.arguments
    n_single = len(single) if str(last.type) == "List[Tensor]" else None
    on_cpu = _eager(without_autograd(forward), backward, save, differentiate, n_single)
    by_triton = _eager(*launchers, save, differentiate, n_single) if launchers else None

    def run(backend: str, *args: Any) -> Any:
        # A graph that is compiled holds the operation. An eager call goes past the bookkeeping of torch.library, which
        # costs 0.1 ms, to what runs it.
        if torch.compiler.is_compiling():
            return forward(*args)
        return (by_triton if backend == "triton" and by_triton else on_cpu)(*args)

    return run


def _eager(run: Run, run_backward: Run, save: Callable[..., None], differentiate: Run, n_single: int | None) -> Run:
    """All of it as one call; `n_single` arguments before a list of tensors, which autograd wants one by one."""

    class Eager(torch.autograd.Function):
        # Without `setup_context`, for which torch inspects the signature of `forward` in every call.
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            inputs = args if n_single is None else (*args[:n_single], list(args[n_single:]))
            output = run(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            found = differentiate(run_backward, ctx, *gradients)
            return found if n_single is None else (*found[:-1], *found[-1])

    def apply(*args: Any) -> Any:
        return Eager.apply(*args) if n_single is None else Eager.apply(*args[:-1], *args[-1])

    return apply
