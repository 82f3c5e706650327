"""Fixtures that every test file shares."""

import os
import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

# Read when a kernel is defined, so before anything imports triton: without a GPU its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from d2r_fast.ops.cpp.library import instruction_sets, use_instruction_set

# Examples are drawn from a fixed seed and kept nowhere: a failure repeats by itself.
settings.register_profile("d2r_fast", derandomize=True, database=None, deadline=None, max_examples=40)
settings.load_profile("d2r_fast")
# Test tensors are so small that a second thread costs more than it gives, and the cores are often shared.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 (libraries under test may draw from the global state)
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def poisoned_memory() -> Iterator[None]:
    """Fill fresh memory (`torch.empty`, `new_empty`) with NaN or the largest integer: reading it shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def cpp_backends() -> list[str]:
    """Backend `cpp` once for every instruction set of this processor: "cpp:avx2" and so on."""
    return [f"cpp:{name}" for name in instruction_sets()]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend named by the parameter; with an instruction set behind a colon, that one runs meanwhile."""
    name, _, isa = request.param.partition(":")
    if isa:
        use_instruction_set(isa)
    yield name
    if isa:
        use_instruction_set(instruction_sets()[0])


@pytest.fixture(scope="module")
def restore_torch_switches() -> Iterator[None]:
    """A deterministic run switches torch over for its whole process, which here belongs to other tests too."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
    torch.utils.deterministic.fill_uninitialized_memory = fill
