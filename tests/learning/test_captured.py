"""When a call is captured, replayed or neither, with a CUDA that only keeps count; `test_gpu.py` does it for real."""

import threading
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from d2r_fast.learning.captured import EAGER_BEFORE_CAPTURE, Captured

DEFAULT, OWN = "default stream", "own stream"


class FakeGenerator:
    """A stream of numbers 0, 1, 2, ... that a capture begun and not ended makes unusable."""

    def __init__(self, device: torch.device):
        self.device, self.at, self.waits = device, 0, False

    def draw(self) -> int:
        assert not self.waits
        self.at += 1
        return self.at - 1

    def get_state(self) -> int:
        return self.at

    def set_state(self, state: int) -> None:
        self.at = state

    def graphsafe_set_state(self, other: "FakeGenerator") -> None:
        self.at, self.waits = other.at, other.waits


class FakeCuda:
    """What `Captured` uses of torch.cuda. A graph replayed does nothing but count."""

    def __init__(self) -> None:
        self.stream, self.graphs, self.refuse = DEFAULT, [], False
        self.captured_on: list[str | None] = []

    def make_graph(self) -> SimpleNamespace:
        graph = SimpleNamespace(replays=0, generators=[])
        graph.register_generator_state = graph.generators.append

        def replay() -> None:
            graph.replays += 1

        graph.replay = replay
        self.graphs.append(graph)
        return graph

    @contextmanager
    def capture(self, graph: SimpleNamespace, stream: str | None, capture_error_mode: str):
        assert capture_error_mode == "thread_local"  # any other would forbid what another thread does
        self.captured_on.append(stream)
        before, self.stream = self.stream, stream or "capture stream"
        for generator in graph.generators:
            generator.waits = True
        try:
            yield
        finally:
            if self.refuse:  # leaves stream and generators as they are, as torch does
                raise RuntimeError("capture failed due to a previous error")
        self.stream = before
        for generator in graph.generators:
            generator.waits = False

    def set_stream(self, stream: str) -> None:
        self.stream = stream


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "Generator", FakeGenerator)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", fake.make_graph)
    monkeypatch.setattr(torch.cuda, "graph", fake.capture)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: fake.stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: DEFAULT)
    monkeypatch.setattr(torch.cuda, "set_stream", fake.set_stream)
    return fake


def counted(device: str, run: Callable[[], object] = object, enabled: bool = True) -> tuple[Captured, list[object]]:
    """A captured call, and what every run of it returned."""
    results: list[object] = []

    def run_and_note() -> object:
        results.append(run())
        return results[-1]

    return Captured(run_and_note, torch.Generator(torch.device(device)), "counting", enabled), results


@pytest.mark.parametrize(("device", "enabled"), [("cpu", True), ("cuda", False)])
def test_without_a_gpu_or_without_leave_every_call_runs(cuda, device, enabled):
    call, results = counted(device, enabled=enabled)
    assert [call() for _ in range(10)] == results and len(results) == 10
    assert not call.is_captured and not cuda.graphs


def test_calls_run_then_one_is_recorded_and_replayed(cuda):
    call, results = counted("cuda")
    eager = [call() for _ in range(EAGER_BEFORE_CAPTURE)]
    assert eager == results and not call.is_captured
    replayed = [call() for _ in range(5)]
    assert call.is_captured and len(results) == EAGER_BEFORE_CAPTURE + 1  # the recording ran `run` once
    assert replayed == [results[-1]] * 5
    (graph,) = cuda.graphs
    assert graph.replays == 5 and graph.generators == [call._generator]


def test_a_forgotten_graph_is_made_again(cuda):
    call, results = counted("cuda")
    call()
    call.forget()  # nothing to forget yet, so the count goes on
    for _ in range(EAGER_BEFORE_CAPTURE):
        call()
    assert call.is_captured
    call.forget()
    assert not call.is_captured
    before = len(results)
    eager = [call() for _ in range(EAGER_BEFORE_CAPTURE)]
    assert eager == results[before:] and not call.is_captured
    assert call() is results[-1] and call.is_captured
    assert [graph.replays for graph in cuda.graphs] == [1, 1]


@pytest.mark.parametrize(("stream", "expected"), [(DEFAULT, None), (OWN, OWN)])
def test_a_capture_is_on_the_stream_of_the_calls_where_that_can_be(cuda, stream, expected):
    cuda.stream = stream
    call, _ = counted("cuda")
    for _ in range(EAGER_BEFORE_CAPTURE + 1):
        call()
    assert cuda.captured_on == [expected] and cuda.stream == stream


def test_a_capture_that_fails_warns_once_and_changes_nothing(cuda):
    def draw() -> int:
        if cuda.captured_on:
            cuda.refuse = True
            if cuda.stream != DEFAULT or call._generator.waits:
                raise RuntimeError("this operation waits for the device\nand more lines")
        return call._generator.draw()

    call, _ = counted("cuda", draw)
    drawn = [call() for _ in range(EAGER_BEFORE_CAPTURE)]
    with pytest.warns(RuntimeWarning, match=r"^counting: not as a CUDA graph, this operation waits for the device$"):
        drawn.append(call())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call.forget()
        drawn += [call() for _ in range(2 * EAGER_BEFORE_CAPTURE)]
    assert drawn == list(range(len(drawn)))  # the random stream goes on as if nobody had tried
    assert cuda.stream == DEFAULT and not call.is_captured and len(cuda.captured_on) == 1


def test_two_threads_never_capture_at_once(cuda):
    inside, second_inside = threading.Event(), threading.Event()

    def first() -> None:
        if cuda.captured_on:
            inside.set()
            assert not second_inside.wait(0.2)  # long enough for a second thread that nothing holds up

    def second() -> None:
        if len(cuda.captured_on) > 1:
            second_inside.set()

    calls = [counted("cuda", run)[0] for run in (first, second)]
    for call in calls:
        for _ in range(EAGER_BEFORE_CAPTURE):
            call()
    thread = threading.Thread(target=lambda: (inside.wait(), calls[1]()))
    thread.start()
    calls[0]()
    thread.join()
    assert second_inside.is_set() and all(call.is_captured for call in calls)
