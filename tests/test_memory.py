"""What the C library does with freed memory, seen in the pages that the system has to hand out again."""

import platform
import subprocess
import sys

import pytest

FAULTS_OF_A_LATER_ROUND = """
import resource, sys
import torch
from d2r_fast.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.zeros(2**23) for _ in range(8)]  # 32 MiB each
    del pieces
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):  # small pieces that end up among the large ones make the heap grow once more
    faults()
print(faults())
"""


def faults(policy):
    command = [sys.executable, "-c", FAULTS_OF_A_LATER_ROUND, policy]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, whose settings these are")
def test_freed_memory_is_kept_for_what_comes_next():
    # 128 pages where the system hands out large ones of 2 MiB, 65,536 small ones.
    assert faults("leave") >= 128
    assert faults("keep") < 32
