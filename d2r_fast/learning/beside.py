"""Work that the steps after it do not wait for: on a GPU, on a stream of its own."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Beside:
    """A second stream of a GPU, for launches that leave room on it and that nobody reads for a while; on the CPU
    everything is made at once. Within a graph that is being captured it becomes a branch of the graph.

    What is read in `branch` must live until `join`: its memory counts as free for the main stream as soon as nobody
    holds it.
    """

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._branched = False  # since the last `join`

    @contextmanager
    def branch(self) -> Iterator[None]:
        """What is launched within starts after all that was launched before."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        self._branched = True
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """What is launched from here on starts after all branches."""
        if self._stream is not None and self._branched:  # a capture may wait for a stream only if it has work there
            torch.cuda.current_stream().wait_stream(self._stream)
            self._branched = False
