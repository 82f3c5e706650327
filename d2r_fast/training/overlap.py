"""Where the trainer gets its chunks: collected while the learner is at work, or when they are asked for.

The collector runs in a thread, not in a process: environments step in C++ threads or worker processes, torch's
operations run in C++ too, and each gives the interpreter's lock away meanwhile. On two cores, with both sides running
freely, a collector in a process of its own made no measurable difference to either's rate at the published MT10 size.
It did where operations are tiny (the quick preset, the learner on one thread): there the lock's hand-overs cost the
learner about a third of its updates while a chunk is being collected, which is a sixth of the time. In return a thread
needs no second CUDA context and no shared parameters, and what goes wrong in it is raised where it is waited for.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from d2r_fast.training.collector import Chunk, Collector


class ChunkFeed:
    """Hands over chunks of `n_steps` steps in every environment, one after another.

    With `ahead`, a thread collects the next chunk while the caller makes the updates that the last one paid for. At
    most one chunk is under way or waiting to be taken: whoever is ahead waits for the other. The actor is copied when a
    chunk is begun, so it lacks the updates of the chunk before: it is one chunk older than when they take turns.
    Without `ahead`, a chunk is collected within `take`.

    All methods are for one thread, the one that updates the agent and the replay.
    """

    def __init__(self, collector: Collector, n_steps: int, ahead: bool):
        self._collector, self._n_steps = collector, n_steps
        self._stopped = False
        self._under_way: Future[Chunk | None] | None = None
        self._noise_before: Tensor | None = None
        self._thread: ThreadPoolExecutor | None = None
        if ahead:
            # torch's number of threads is each thread's own, but a thread that has not asked for it yet would take over
            # what the collector's thread sets.
            torch.get_num_threads()
            # A few rows need one thread. The learner keeps all cores (torch's default): where cores are few, the
            # collector is idle most of the time, and a core kept free for it measured far slower.
            self._thread = ThreadPoolExecutor(1, "collector", torch.set_num_threads, (1,))

    def take(self, another: bool, all_have: Callable[[bool], bool] = bool) -> Chunk | None:
        """The next chunk, waiting for it if need be; None after `stop`, which leaves it unfinished.

        another: begin the one after it, with the agent's parameters as they are now.
        all_have: asked once, with whether there is a chunk, also where collecting failed; if it says False, the chunk
        is dropped as one that a stop left unfinished, since others who step their share of it have none.
        Whatever went wrong in collecting is raised here.
        """
        try:
            chunk = self._next()
        except BaseException:
            all_have(False)
            raise
        if not all_have(chunk is not None):
            chunk = None
        if chunk is not None:
            self._noise_before = None
            if another and self._thread is not None:
                self._begin(self._thread)
        return chunk

    def _next(self) -> Chunk | None:
        if self._thread is None:
            self._prepare()
            return self._collector.collect(self._n_steps, self._is_stopped)
        if self._under_way is None:
            self._begin(self._thread)
        assert self._under_way is not None
        chunk, self._under_way = self._under_way.result(), None
        return chunk

    def _prepare(self) -> None:
        self._collector.take_parameters()
        self._noise_before = self._collector.generator_state()

    def _begin(self, thread: ThreadPoolExecutor) -> None:
        self._prepare()
        self._under_way = thread.submit(self._collector.collect, self._n_steps, self._is_stopped)

    def _is_stopped(self) -> bool:
        return self._stopped

    def raise_if_failed(self) -> None:
        """Raise now what `take` would raise: the caller need not finish its updates first."""
        if self._under_way is not None and self._under_way.done():
            self._under_way.result()

    def settle(self) -> None:
        """Wait until the chunk under way, if any, is whole: nothing runs beside the caller before the next `take`."""
        if self._under_way is not None:
            self._under_way.result()

    def generator_state(self) -> Tensor:
        """Where the stream of noise is, without what a chunk that was not taken drew from it."""
        return self._collector.generator_state() if self._noise_before is None else self._noise_before

    def stop(self) -> None:
        """Leave the chunk under way unfinished, after its present step. Only sets a flag, as a signal handler may."""
        self._stopped = True

    def close(self) -> None:
        """Stop, wait for the thread to end, and close the environments."""
        self.stop()
        if self._thread is not None:
            self._thread.shutdown()
        self._collector.close()
