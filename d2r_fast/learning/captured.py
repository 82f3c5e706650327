"""A call captured once as a CUDA graph and replayed: the processor then launches one graph instead of hundreds of
kernels that take a few microseconds each."""

import threading
import warnings
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

T = TypeVar("T")

# Allocations, compiled kernels and library handles must exist before a capture.
EAGER_BEFORE_CAPTURE = 3

# A capture begins by synchronising the device and freeing its cached memory, either of which breaks another one.
_one_at_a_time = threading.Lock()


class Captured(Generic[T]):
    """`run` on a GPU: a few calls as they come, then captured as a graph, from then on replayed.

    run        reads and writes tensors that stay where they are, draws from `generator` alone, never waits for the GPU
    generator  its device decides: on the CPU nothing is captured
    what       what a call is, for the warning where a capture fails; calls then go on as they come
    enabled    False: nothing is captured on a GPU either

    A replay returns the tensors that the capture made, overwritten. Calls stay on one stream; while another thread
    captures, this one may do anything but synchronise the whole device.
    """

    def __init__(self, run: Callable[[], T], generator: torch.Generator, what: str, enabled: bool = True):
        self._run, self._generator, self._what = run, generator, what
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: T
        self._until_capture = EAGER_BEFORE_CAPTURE if enabled and generator.device.type == "cuda" else -1

    @property
    def is_captured(self) -> bool:
        return self._graph is not None

    def __call__(self) -> T:
        if self._until_capture == 0:
            self._capture()
        if self._graph is not None:
            self._graph.replay()
            return self._result
        if self._until_capture > 0:
            self._until_capture -= 1
        return self._run()

    def forget(self) -> None:
        """Something that `run` reads or writes has moved: drop a graph that knows the old addresses, make another."""
        if self._graph is not None:
            self._graph, self._until_capture = None, EAGER_BEFORE_CAPTURE
            del self._result

    def _capture(self) -> None:
        """Record one call without running it."""
        self._until_capture = -1
        before, here = self._generator.get_state(), torch.cuda.current_stream()
        # On the calls' own stream, for its priority and its libraries' workspaces; the default one cannot capture.
        stream = None if here == torch.cuda.default_stream() else here
        graph = torch.cuda.CUDAGraph()
        try:
            with _one_at_a_time:
                graph.register_generator_state(self._generator)
                # The other threads may use the GPU meanwhile.
                with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                    self._result = self._run()
        except RuntimeError as error:
            # What a failed capture leaves: its own stream as the present one, and a generator that waits for its end.
            torch.cuda.set_stream(here)
            fresh = torch.Generator(self._generator.device)
            fresh.set_state(before)
            self._generator.graphsafe_set_state(fresh)
            first: BaseException = error
            while first.__context__ is not None:  # the end of the capture complains too, of nothing in particular
                first = first.__context__
            reason = str(first).splitlines()[0]
            warnings.warn(f"{self._what}: not as a CUDA graph, {reason}", RuntimeWarning, stacklevel=3)
            return
        self._graph = graph
