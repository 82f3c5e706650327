"""A pytest plugin: tests of the Triton kernels run on the emulated device, and fail if it finds anything.

`check_kernels.py` uses it. What it saw is in `seen`.
"""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from ptx.jit import emulated

# What is not of the device: float64 and Hypothesis's many examples are the interpreter's; a replay past 2^31 bytes.
SKIPPED = ("float64", "any_segments", "more_numbers_than_int32")


class Seen(NamedTuple):
    """All launches of one kernel in one precision."""

    tests: int = 0
    launches: int = 0
    warp_instructions: int = 0
    findings: int = 0


seen: dict[tuple[str, str], Seen] = defaultdict(Seen)
messages: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if not any(word in item.name for word in SKIPPED)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with emulated() as device:
        try:
            yield
        finally:
            found = [f"{ran.kernel} {ran.precision}: {f.example}" for ran in device.ran for f in ran.findings]
            messages.extend(f"{item.name}: {text}" for text in found)
            for ran in device.ran:
                before = seen[ran.kernel, ran.precision]
                seen[ran.kernel, ran.precision] = Seen(
                    before.tests, before.launches + 1, before.warp_instructions + ran.issued,
                    before.findings + len(ran.findings),
                )  # fmt: skip
            for key in {(ran.kernel, ran.precision) for ran in device.ran}:
                seen[key] = seen[key]._replace(tests=seen[key].tests + 1)
    assert not found, "\n".join(found)
