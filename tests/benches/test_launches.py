"""How many calls an update may make; and that the counter counts work, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launches import KINDS, SUITES, CountCalls

CEILING = {"cpu": 10, "gpu": 130}
BENCH = Path(__file__).parents[2] / "benches" / "launches.py"


def test_views_and_memory_are_no_work():
    x = torch.randn(4, 6)
    with CountCalls(pretends=False) as counter:
        y = torch.empty(6, 4).copy_(x.mT.detach()[:])
        torch.bmm(x[None], y.expand(1, 6, 4)).squeeze(0).add_(torch.rand(4))
    assert dict(counter.calls) == {
        ("other", "copy_"): 1,
        ("product", "bmm"): 1,
        ("other", "add_"): 1,
        ("random", "rand"): 1,
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a GPU would do where there is none")
def test_an_update_is_few_calls(tmp_path):
    """In a process of its own: in this one Triton's kernels are interpreted."""
    pytest.importorskip("triton")
    path = tmp_path / "launches.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, BENCH, "--json", path], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert [(row["suite"], row["path"]) for row in rows] == [(suite, path) for suite in SUITES for path in CEILING]
    for row in rows:
        assert row["total"] == sum(row[kind] for kind in KINDS) == sum(row["calls"].values())
        assert row["total"] <= CEILING[row["path"]], row
        assert row["calls"]["replay_rows" if row["path"] == "cpu" else "routed_modules_bwd_kernel (Triton)"] >= 1
