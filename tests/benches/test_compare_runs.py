"""Two groups of runs held against each other: made-up runs whose areas, intervals and verdicts are known."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compare_runs import compare, compare_groups, main
from finished_runs import area, read_run, row
from tiny import RUN

from d2r_fast.config import RunConfig
from d2r_fast.config_json import config_to_json

STEPS = (50, 70, 100)  # a tiny run ends at step 100
HARD, EASY = 0, 1  # its two tasks


def write_run(path: Path, success, seed: int = 0, steps=STEPS, cfg: RunConfig = RUN, walls=(60, 120, 180)) -> Path:
    """A run directory with an evaluation at every step, `success` [evaluations][T]."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(config_to_json(replace(cfg, seed=seed)))
    with (path / "metrics.jsonl").open("w") as file:
        for step, rates, wall in zip(steps, success, walls, strict=False):
            counts = {"steps": step, "updates": 12 * step, "time": {"wall": wall, "learn": wall / 2, "collect": 10}}
            file.write(json.dumps({"kind": "train"} | counts) + "\n")
            means = {"mean_success": sum(rates) / len(rates), "success": list(rates), "episodes": 4}
            file.write(json.dumps({"kind": "eval"} | counts | means) + "\n")
    return path


def group(folder: Path, finals) -> list:
    """A run a seed: task HARD ends at the given success, task EASY at 1, from none at the start."""
    curves = [[[0, 0], [0, 1], [final, 1]] for final in finals]
    return [read_run(write_run(folder / f"seed{i}", curve, i)) for i, curve in enumerate(curves)]


def test_area_is_that_under_the_curve_over_uneven_steps():
    """20 steps from 0 to 1, then 30 at 1: (10 + 30) / 50; a constant is its own area."""
    success = np.array([[0.0, 0.25], [1.0, 0.25], [1.0, 0.25]])
    np.testing.assert_allclose(area([50, 70, 100], success), [0.8, 0.25], rtol=1e-12)


def test_row(tmp_path):
    run = read_run(write_run(tmp_path / "run", [[0, 0], [0, 1], [0.6, 1]], seed=3))
    got = row(run)
    assert got["success"] == {"reach": 0.6, "drawer-close": 1}
    assert got["area"] == {"mean": 0.49, "reach": 0.18, "drawer-close": 0.8}  # 0.6 x 15 of 50; 40 of 50
    assert (got["seed"], got["updates"], got["wall_minutes"], got["updates_per_s"]) == (3, 1200, 3.0, 6.7)
    assert got["wall_minutes_to_mean_success_0.8"] == 3.0


def test_a_resumed_run_has_no_times(tmp_path):
    run = read_run(write_run(tmp_path / "run", [[0, 0], [0, 1], [1, 1]], walls=(60, 120, 50)))
    got = row(run)
    assert got["wall_minutes"] is got["updates_per_s"] is got["wall_minutes_to_mean_success_0.8"] is None
    assert got["mean_success"] == 1


def test_interval_of_two_runs_is_known():
    """Of two runs, a quarter of the draws are the one twice, a quarter the other: the interval has their ends."""
    table, verdict = compare(np.array([[0.2], [0.6]]), np.array([[0.5], [0.9]]), ("mean",))
    parts = table["mean"]
    assert parts["reference"] == {"mean": 0.4, "low": 0.2, "high": 0.6}
    assert parts["fast"] == {"mean": 0.7, "low": 0.5, "high": 0.9}
    assert parts["difference"] == {"mean": 0.3, "low": -0.1, "high": 0.7}  # its ends have 1/16 of the draws each
    assert verdict == "too few seeds"


def test_interval_of_a_difference_is_as_wide_as_independent_groups_make_it():
    """Large normal groups: 1.96 standard errors to each side, the two groups' variances added."""
    rng = np.random.default_rng(0)
    reference, fast = rng.normal(0, 3, (400, 1)), rng.normal(0, 4, (400, 1))
    parts = compare(reference, fast, ("mean",))[0]["mean"]
    for part, deviation in {"reference": 3, "fast": 4, "difference": 5}.items():
        width = parts[part]["high"] - parts[part]["low"]
        assert width == pytest.approx(2 * 1.96 * deviation / 20, rel=0.1)


def test_the_same_runs_overlap(tmp_path):
    finals = (0.2, 0.5, 0.3, 0.9, 0.4)
    result = compare_groups(group(tmp_path / "a", finals), group(tmp_path / "b", finals))
    for measure in ("final_success", "area"):
        assert result[measure]["verdict"] == "overlap"
        difference = result[measure]["table"]["mean"]["difference"]
        assert difference["mean"] == 0
        assert difference["low"] < 0 < difference["high"]
    assert result["wall_minutes"] == {"reference": 3.0, "fast": 3.0}


def test_runs_without_any_spread_overlap_whatever_their_number(tmp_path):
    result = compare_groups(group(tmp_path / "a", [0.3] * 3), group(tmp_path / "b", [0.3] * 5))
    assert [result[m]["verdict"] for m in ("final_success", "area")] == ["overlap", "overlap"]


def test_groups_that_learn_different_things_differ(tmp_path):
    reference, fast = (0.2, 0.25, 0.3, 0.2, 0.35), (0.7, 0.6, 0.65, 0.8, 0.7)
    result = compare_groups(group(tmp_path / "a", reference), group(tmp_path / "b", fast))
    assert [result[m]["verdict"] for m in ("final_success", "area")] == ["differ", "differ"]
    final, under = result["final_success"]["table"], result["area"]["table"]
    assert final["mean"]["difference"]["mean"] == pytest.approx(0.43 / 2)
    assert final["reach"]["difference"]["mean"] == pytest.approx(0.43)
    assert final["drawer-close"]["difference"] == {"mean": 0, "low": 0, "high": 0}
    assert under["reach"]["difference"]["mean"] == pytest.approx(0.43 * 0.3, abs=1e-4)


def test_a_late_fall_moves_the_final_success_more_than_the_area(tmp_path):
    """The verdicts are of different things: here every run learns as fast, and the second group forgets at the end."""
    steps, noise = (20, 40, 60, 80, 90, 100), (0.0, 0.1, -0.1, 0.05, -0.05)
    groups = []
    for name, last in (("a", 0.8), ("b", 0.6)):
        curves = [[[0, 0]] + [[0.8 + n] * 2] * 4 + [[last + n] * 2] for n in noise]
        runs = [
            write_run(tmp_path / name / str(i), curve, i, steps, walls=range(60, 66)) for i, curve in enumerate(curves)
        ]
        groups.append([read_run(run) for run in runs])
    result = compare_groups(*groups)
    assert (result["final_success"]["verdict"], result["area"]["verdict"]) == ("differ", "overlap")


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    result = compare_groups(group(tmp_path / "a", (0.2, 0.3)), group(tmp_path / "b", (0.9,)))
    parts = result["final_success"]["table"]["mean"]
    assert result["final_success"]["verdict"] == "too few seeds"
    assert parts["fast"]["low"] is parts["difference"]["low"] is None
    assert parts["reference"]["low"] == 0.6


CURVE = [[0, 0], [0, 1], [1, 1]]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 16}, "batch_size 8 and 16"),
        ({"sac": replace(RUN.sac, gamma=0.9)}, "sac.gamma 0.99 and 0.9"),
        ({"replay_capacity": 50}, "replay_capacity 60 and 50"),
        (
            {"env": replace(RUN.env, tasks="reach,push", reward_scale=1.0), "chunk_steps": 20, "batch_size": 4},
            r"env.tasks .*; env.reward_scale .*; chunk_steps 10 and 20; batch_size 8 and 4$",
        ),
    ],
    ids=["batch", "gamma", "replay", "many"],
)
def test_runs_of_other_settings_are_refused(tmp_path, change, message):
    runs = [write_run(tmp_path / "a", CURVE), write_run(tmp_path / "b", CURVE, cfg=replace(RUN, **change))]
    with pytest.raises(ValueError, match=message) as error:
        compare_groups(*([read_run(run)] for run in runs))
    assert all(str(run) in str(error.value) for run in runs)


def test_what_computes_and_what_is_saved_may_differ(tmp_path):
    net = replace(RUN.net, backend="reference", precision="bf16")
    large = replace(RUN, replay_capacity=300)  # never full, as one of 200 rows is not
    other = replace(large, name="other", net=net, overlap=False, deterministic=True, checkpoint_every_chunks=9)
    other = replace(other, replay_capacity=200, cuda_graph=False, checkpoint_replay=False)
    runs = [write_run(tmp_path / "a", CURVE, 0, cfg=large), write_run(tmp_path / "b", CURVE, 1, cfg=other)]
    result = compare_groups(*([read_run(run)] for run in runs))
    assert result["seeds"] == {"reference": [0], "fast": [1]}


def test_runs_evaluated_at_other_steps_are_refused(tmp_path):
    runs = [write_run(tmp_path / "a", CURVE), write_run(tmp_path / "b", CURVE, steps=(50, 80, 100))]
    with pytest.raises(ValueError, match=r"other steps: \[50, 70, 100\] and \[50, 80, 100\]"):
        compare_groups(*([read_run(run)] for run in runs))


def test_runs_of_other_lengths_are_compared_over_what_they_share(tmp_path):
    longer = replace(RUN, total_steps=RUN.total_steps + 50)
    curve = [*CURVE, [1, 1]]
    run = write_run(tmp_path / "longer", curve, steps=(*STEPS, 150), cfg=longer, walls=(60, 120, 180, 240))
    short, long = read_run(write_run(tmp_path / "short", CURVE)), read_run(run, until=STEPS[-1])
    with pytest.raises(ValueError, match="total_steps 80 and 130"):
        compare_groups([short], [long])
    difference = compare_groups([short], [long], until=STEPS[-1])["area"]["table"]["mean"]["difference"]
    assert difference["mean"] == 0
    with pytest.raises(ValueError, match="no evaluation within its first 49 steps"):
        read_run(run, until=49)


def test_a_run_named_twice_is_refused(tmp_path):
    run = read_run(write_run(tmp_path / "a", CURVE))
    with pytest.raises(ValueError, match="named twice"):
        compare_groups([run, run], [run])


def test_what_is_not_a_finished_run_is_refused(tmp_path):
    cases = {
        "not finished: last evaluation at step 70 of 100": write_run(tmp_path / "unfinished", CURVE[:2]),
        "no evaluation": write_run(tmp_path / "none", []),
        "one evaluation alone": write_run(tmp_path / "one", CURVE[2:], steps=[100]),
        "expected a preset": tmp_path,
    }
    cut = write_run(tmp_path / "cut", CURVE)
    text = (cut / "metrics.jsonl").read_text()
    (cut / "metrics.jsonl").write_text(text[:-20])
    cases["cannot be read"] = cut
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            read_run(path)
        assert str(path) in str(error.value)


def test_command(tmp_path, monkeypatch, capsys):
    """Rows, comparison, report and picture; and one line where the runs cannot be compared."""
    a = [str(write_run(tmp_path / "a" / str(i), [[0, 0], [0, 1], [0.1 * i, 1]], i)) for i in range(3)]
    b = [str(write_run(tmp_path / "b" / str(i), [[0, 0], [1, 1], [0.9, 1]], i)) for i in range(3)]
    report, folder = tmp_path / "report.json", tmp_path / "plots"
    names = ["--reference", *a, "--fast", *b, "--json", str(report), "--plots", str(folder)]
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", *names])
    main()
    printed = capsys.readouterr().out
    assert "final_success: differ" in printed
    assert "area: differ" in printed
    written = json.loads(report.read_text())
    assert [r["group"] for r in written["rows"]] == ["reference"] * 3 + ["fast"] * 3
    assert written["comparison"]["final_success"]["table"]["reach"]["fast"]["mean"] == 0.9
    assert (folder / "compare_runs.png").read_bytes().startswith(b"\x89PNG")

    other = write_run(tmp_path / "other", CURVE, cfg=replace(RUN, batch_size=16))
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", "--reference", *a, "--fast", str(other)])
    with pytest.raises(SystemExit, match="batch_size 8 and 16"):
        main()
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", "--reference", *a])
    with pytest.raises(SystemExit):
        main()
    assert "both --reference and --fast" in capsys.readouterr().err
