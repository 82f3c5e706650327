"""What the C library does with freed memory, seen in what the process holds and in the pages it is handed again."""

import platform
import subprocess
import sys

import pytest

FAULTS_OF_A_LATER_ROUND = """
import resource, sys
import torch
from d2r_fast.host.memory import keep_freed_memory

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


CLOSED_ENVIRONMENTS = """
import os
from d2r_fast.envs import make_envs
from d2r_fast.host.memory import keep_freed_memory

def resident_mib():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20

def use(n):
    with make_envs(("reach", "drawer-close"), n, 10, seed=0) as envs:
        envs.reset()
        return resident_mib()

keep_freed_memory()
use(1)  # what the simulation keeps once it has been used
print(resident_mib(), use(8), resident_mib(), use(8), resident_mib())
"""

needs_glibc = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc, whose settings these are"
)


@needs_glibc
def test_freed_memory_is_kept_for_what_comes_next():
    # 128 pages where the system hands out large ones of 2 MiB, 65,536 small ones.
    assert faults("leave") >= 128
    assert faults("keep") < 32


@needs_glibc
def test_closed_environments_give_their_memory_back():
    """... which the C library would keep in the heaps of threads that are gone, 1 GiB more in an hour of training."""
    command = [sys.executable, "-c", CLOSED_ENVIRONMENTS]
    before, *uses = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    for during, after in (uses[:2], uses[2:]):
        assert during - before > 200
        assert after - before < 100


@needs_glibc
def test_freed_memory_is_kept_again_after_environments_were_closed():
    code = FAULTS_OF_A_LATER_ROUND.replace(
        "def faults", "from d2r_fast.host.memory import giving_back_memory\n\ndef faults"
    )
    code = code.replace("for _ in range(3)", "with giving_back_memory():\n    faults()\nfor _ in range(3)")
    assert code.count("giving_back_memory") == 2
    command = [sys.executable, "-c", code, "keep"]
    assert int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) < 32
