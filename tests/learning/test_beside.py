"""Branches of an update, without a GPU: which stream waits for which. What a GPU makes of it: tests/gpu."""

from contextlib import nullcontext

import pytest
import torch

from d2r_fast.learning.beside import Beside


class FakeStream:
    def __init__(self, name):
        self.name, self.waited_for = name, []

    def wait_stream(self, other):
        self.waited_for.append(other.name)


@pytest.fixture
def main_stream(monkeypatch):
    stream = FakeStream("main")
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream("beside"))
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    return stream


def test_a_branch_starts_after_what_came_before_and_is_awaited_once(main_stream):
    beside = Beside(torch.device("cuda"))
    with beside.branch():
        pass
    assert beside._stream.waited_for == ["main"] and main_stream.waited_for == []
    with beside.branch():
        pass
    beside.join()
    beside.join()
    assert main_stream.waited_for == ["beside"]


def test_nobody_waits_for_a_branch_that_was_not_taken(main_stream):
    """In a graph being captured that would be an error: the stream has no part in it."""
    Beside(torch.device("cuda")).join()
    assert main_stream.waited_for == []


def test_on_the_cpu_all_is_made_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_stream", None)  # asked for, it fails
    beside, made = Beside(torch.device("cpu")), []
    with beside.branch():
        made.append(1)
    beside.join()
    assert made == [1]
