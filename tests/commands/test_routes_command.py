"""`d2r routes` on tiny runs."""

import contextlib
import dataclasses
import io
import json
from pathlib import Path

import pytest
import tiny

from d2r_fast import cli
from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.training.trainer import Trainer


def d2r(*args: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(args))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routes") / "run"
    Trainer(tiny.RUN, path, show_progress=False).run()
    return path


def test_pictures_and_numbers(run_dir):
    code, out, err = d2r("routes", str(run_dir), "--episodes", "2")
    assert (code, err) == (0, "")
    names = {"routes_graphs.png", "routes_modules.png", "routes_cost.png", "routes_similarity.png"}
    written = {path.name for path in run_dir.glob("routes*")}
    assert written == names | {"routes_training.png", "routes.json"}
    assert all(str(run_dir / name) in out for name in written)
    numbers = json.loads((run_dir / "routes.json").read_text())
    assert (numbers["steps"], numbers["episodes"], numbers["tasks"]) == (100, 2, ["reach", "drawer-close"])
    evals = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert numbers["training"]["success"] == [record["success"] for record in evals if record["kind"] == "eval"]
    for k, task in enumerate(numbers["tasks"]):
        (row,) = (line.split() for line in out.splitlines() if line.split()[:1] == [task])
        assert row[1:3] == [f"{numbers['active_modules'][k]:.2f}", f"{numbers['depth'][k]:.2f}"]


def test_elsewhere_from_a_checkpoint_file(run_dir, tmp_path):
    before = sorted(run_dir.rglob("*"))
    file = run_dir / "checkpoints" / "step-0000000100.pt"
    code, *_ = d2r("routes", str(file), "--out", str(tmp_path / "new" / "folder"), "--episodes", "1", "--seed", "1")
    assert code == 0
    assert sorted(run_dir.rglob("*")) == before
    numbers = json.loads((tmp_path / "new" / "folder" / "routes.json").read_text())
    assert (numbers["checkpoint"], numbers["seed"]) == (str(file), 1)
    assert numbers["command"].startswith(f"d2r routes {file} --out ")


def test_a_network_without_routes_is_one_line(tmp_path):
    cfg = dataclasses.replace(tiny.RUN, net=MlpConfig(widths=(6, 5)), total_steps=10)
    Trainer(cfg, tmp_path / "run", show_progress=False).run()
    code, out, err = d2r("routes", str(tmp_path / "run"))
    assert (code, out) == (1, "")
    assert err.endswith(": expected a run of network d2r, got mlp, which has no routes\n") and err.count("\n") == 1
    assert not list((tmp_path / "run").glob("routes*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--episodes", "0"], "episodes: expected a positive multiple of envs_per_task=1, got 0"),
        (["--episodes", "3", "--envs-per-task", "2"], "expected a positive multiple of envs_per_task=2, got 3"),
        (["--seed", "-1"], "seed: expected 0..2**31-51, got -1"),
    ],
)
def test_options_out_of_range(run_dir, options, message):
    code, _, err = d2r("routes", str(run_dir), *options)
    assert code == 1 and message in err
