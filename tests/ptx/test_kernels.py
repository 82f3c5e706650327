"""The Triton kernels on the emulated device, in short: every kernel once, and what is broken is caught.

In processes of their own: in this one kernels are interpreted. All sizes: `python tests/ptx/check_kernels.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

HERE = Path(__file__).parent
SHORT = (
    "E1-B17-N3-K2-D33-highest-tf32",
    "test_linear_layers and E1-B67-64to136-own",
    "test_networks_whose_parameters and bf16 and unaligned",
    "test_what_is_kept_in_bfloat16 and unaligned",
    "test_gradients_of_all_layers and tf32",
    "test_the_base_goes_on",
    "test_sums_of_experts and 3-12-orthogonal",
    "test_levels_of_modules and 3-2-33",
    "test_routes_match_the_reference and E2-B7-N5-K2-sampled",
    "test_the_order_of_rows and 2-31",
    "test_gumbel_noise and 1025",
    "test_squashed_normal and 33-4",
    "test_losses and T7-n65-E5",
    "test_rows_are_those and T4",
    "test_the_step and an_empty_network",
    "E1-B300-N3-K2-D16-alternating-bf16",
    "update_layer_by_layer and tf32",
)


def run(*command):
    env = os.environ | {
        "TRITON_INTERPRET": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path]),
    }
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, check=False)


def test_every_kernel_is_clean(tmp_path):
    path = tmp_path / "table.json"
    words = " or ".join(f"({word})" for word in SHORT)
    done = run(HERE / "check_kernels.py", "--json", path, "--", "-k", words)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(path.read_text())["rows"]
    from d2r_fast.kernels.compile_cases import cases

    assert {row["kernel"] for row in rows} == {f"{label.split()[0]}_kernel" for label, *_ in cases()}
    assert all(row["findings"] == 0 and row["warp_instructions"] > 0 for row in rows)


def test_broken_kernels_are_caught():
    done = run("-m", "pytest", "-q", "-p", "no:cacheprovider", HERE / "broken_kernels.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "10 passed" in done.stdout
