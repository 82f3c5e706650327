"""How many calls an update may make; and that the counter counts work, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from d2r_fast.kernels.launches import KINDS, SUITES, RecordCalls
from d2r_fast.ops.backends import PRECISIONS

CEILING = {"cpu": 10, "gpu": 60}
BENCH = Path(__file__).parents[2] / "benches" / "launches.py"


def test_views_and_memory_are_no_work():
    x = torch.randn(4, 6)
    with RecordCalls(pretends=False) as recorder:
        y = torch.empty(6, 4).copy_(x.mT.detach()[:])
        torch.bmm(x[None], y.expand(1, 6, 4)).squeeze(0).add_(torch.rand(4))
    assert [(call.kind, call.name) for call in recorder.calls] == [
        ("other", "copy_"),
        ("product", "bmm"),
        ("random", "rand"),
        ("other", "add_"),
    ]


def test_memory_is_told_by_what_it_holds():
    x = torch.randn(4, 6)
    with RecordCalls(pretends=False) as recorder:
        x[1:, :2].add_(x.view(-1)[:2])
    (call,) = recorder.calls
    part, row = call.arguments["self"], call.arguments["other"]
    assert (part.begin, part.end, part.n_bytes) == (6 * 4, (18 + 2) * 4, 6 * 4)
    assert (row.storage, row.begin, row.end) == (part.storage, 0, 8)
    assert call.results == [part]


@pytest.mark.skipif(torch.cuda.is_available(), reason="counts what a GPU would do where there is none")
def test_an_update_is_few_calls(tmp_path):
    """In a process of its own: in this one Triton's kernels are interpreted."""
    pytest.importorskip("triton")
    path = tmp_path / "launches.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, BENCH, "--json", path], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    made = [("cpu", "float32"), *(("gpu", precision) for precision in PRECISIONS)]
    assert [(row["suite"], row["path"], row["precision"]) for row in rows] == [(s, *of) for s in SUITES for of in made]
    for row in rows:
        assert row["total"] == sum(row[kind] for kind in KINDS) == sum(row["calls"].values())
        assert row["total"] <= CEILING[row["path"]], row
        expected = {"cpu": "replay_rows", "gpu": "routed_modules_bwd_kernel (Triton)"}
        assert row["calls"][expected[row["path"]]] >= 1
