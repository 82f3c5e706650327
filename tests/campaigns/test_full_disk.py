"""The campaign of the full disk in short."""

import subprocess

import pytest
from campaigns import full_disk


def test_a_full_disk_is_told_and_the_run_goes_on():
    try:
        command = full_disk.in_a_namespace("--count", "2", "--seed", "1")
    except OSError as reason:
        pytest.skip(str(reason))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("tried 2, lost 0, crashes 0, hangs 0, silent 0\n")
