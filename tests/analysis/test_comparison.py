"""Groups of runs held against each other: made-up runs whose means, areas, intervals and verdicts are known."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import NETS, RUN

from d2r_fast.analysis.comparison import Group, compare, crossing, group_runs, markdown
from d2r_fast.analysis.comparison_pictures import draw_curves, draw_tasks
from d2r_fast.analysis.finished_runs import area, find_runs, read_run
from d2r_fast.analysis.success_statistics import Drawn, interquartile_mean, probability_of_improvement
from d2r_fast.cli import main
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


def compared(reference: list, fast: list) -> dict:
    """Two groups, whose only pair is the result's."""
    return compare([Group("reference", reference), Group("fast", fast)], thresholds=(0.5,))


def test_intervals_of_two_runs_are_known():
    """Of two runs and one task, a quarter of the draws are the one twice, a quarter the other: the ends."""
    rng = np.random.default_rng(0)
    a, b = (Drawn.of(np.array(values), rng) for values in ([[0.2], [0.6]], [[0.5], [0.9]]))
    assert a.mean() == a.by_task()[0] == (0.4, 0.2, 0.6)
    assert b.better_by(a) == (0.3, -0.1, 0.7)  # its ends have 1/16 of the draws each
    assert b.improves_on(a) == (0.75, 0, 1)


def test_an_interval_is_stratified_by_task_and_a_difference_is_not():
    """400 seeds, two tasks that rise and fall together: independent draws of the tasks are 0.71 times as wide."""
    rng = np.random.default_rng(0)
    a, b = (np.repeat(rng.normal(0, deviation, (400, 1)), 2, 1) for deviation in (3, 4))
    drawn = [Drawn.of(values, rng) for values in (a, b)]
    for estimate, deviation in ((drawn[0].mean(), 3 / 2**0.5), (drawn[1].better_by(drawn[0]), 5)):
        assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * deviation / 20, rel=0.1)


def test_interquartile_mean_is_that_of_the_middle_half():
    values = np.array([[0.0, 1.0], [0.1, 0.4], [0.2, 0.8], [0.3, 1.0]])  # middle: 0.2, 0.3, 0.4, 0.8
    assert interquartile_mean(values) == pytest.approx(0.425)
    assert interquartile_mean(np.stack([values, values + 1])) == pytest.approx([0.425, 1.425])


def test_probability_of_improvement_counts_ties_half():
    """First task: 1 of 4 pairs is better, 1 equal; second: all better."""
    a, b = np.array([[0.5, 0.0], [0.9, 0.1]]), np.array([[0.6, 0.2], [0.4, 0.9]])
    b[1, 0] = 0.5
    assert probability_of_improvement(a, b) == pytest.approx((1.5 / 4 + 1) / 2)


def test_the_same_runs_overlap(tmp_path):
    finals = (0.2, 0.5, 0.3, 0.9, 0.4)
    result = compared(group(tmp_path / "a", finals), group(tmp_path / "b", finals))
    (pair,) = result["pairs"]
    for measure in ("final_success", "area"):
        assert pair[measure]["verdict"] == "overlap"
        assert pair[measure]["b_minus_a"]["value"] == 0
        assert pair[measure]["b_minus_a"]["low"] < 0 < pair[measure]["b_minus_a"]["high"]
        assert pair[measure]["b_beats_a"]["value"] == 0.5
    assert [g["minutes"] for g in result["groups"]] == [3.0, 3.0]
    assert [g["updates_per_s"] for g in result["groups"]] == [6.67, 6.67]


def test_runs_without_any_spread_overlap_whatever_their_number(tmp_path):
    (pair,) = compared(group(tmp_path / "a", [0.3] * 3), group(tmp_path / "b", [0.3] * 5))["pairs"]
    assert [pair[m]["verdict"] for m in ("final_success", "area")] == ["overlap", "overlap"]


def test_groups_that_learn_different_things_differ(tmp_path):
    reference, fast = (0.2, 0.25, 0.3, 0.2, 0.35), (0.7, 0.6, 0.65, 0.8, 0.7)
    result = compared(group(tmp_path / "a", reference), group(tmp_path / "b", fast))
    (pair,) = result["pairs"]
    assert [pair[m]["verdict"] for m in ("final_success", "area")] == ["differ", "differ"]
    assert pair["final_success"]["b_minus_a"]["value"] == pytest.approx(0.43 / 2)
    assert pair["final_success"]["b_beats_a"]["value"] == 0.75  # always in one task, half in the other
    assert pair["area"]["b_minus_a"]["value"] == pytest.approx(0.43 * 0.3 / 2, abs=1e-4)
    mine = result["groups"][0]
    assert mine["final_success"]["value"] == pytest.approx(0.63)
    assert mine["by_task"]["reach"]["value"] == pytest.approx(0.26)
    assert mine["by_task"]["drawer-close"] == {"value": 1, "low": 1, "high": 1}
    assert mine["interquartile_mean"]["value"] == pytest.approx((0.25 + 0.3 + 0.35 + 3) / 6)  # 2 of 10 off each end


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
    (pair,) = compared(*groups)["pairs"]
    assert (pair["final_success"]["verdict"], pair["area"]["verdict"]) == ("differ", "overlap")


def test_one_seed_has_no_interval_and_no_verdict(tmp_path):
    result = compared(group(tmp_path / "a", (0.2, 0.3)), group(tmp_path / "b", (0.9,)))
    (pair,) = result["pairs"]
    assert pair["final_success"]["verdict"] == "too few seeds"
    assert pair["final_success"]["b_minus_a"]["low"] is result["groups"][1]["final_success"]["low"] is None
    assert result["groups"][0]["final_success"] == {"value": 0.625, "low": 0.6, "high": 0.65}


def test_the_first_crossing_of_a_success_is_timed(tmp_path):
    """Means 0, 0.5 and half the final one: the second run crosses 0.7 never."""
    mine = Group("", group(tmp_path / "a", (0.5, 0.3, 0.6)))
    assert crossing(mine, 0.5) == {"reached": 3, "of": 3, "steps": 70, "minutes": 2}
    assert crossing(mine, 0.7) == {"reached": 2, "of": 3, "steps": 100, "minutes": 3}
    assert crossing(mine, 0.9) == {"reached": 0, "of": 3, "steps": None, "minutes": None}


@pytest.mark.parametrize("kept", ["train eval", "eval"], ids=["all", "evaluations alone"])
def test_a_resumed_run_counts_the_minutes_of_all_its_sessions(tmp_path, kept):
    path = write_run(tmp_path / "run", [[0, 0], [0, 1], [1, 1]], walls=(60, 120, 30))
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (path / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["kind"] in kept))
    mine = compare([Group("", [read_run(path)])], thresholds=(0.8,))["groups"][0]
    assert mine["minutes"] == 2.5
    assert mine["thresholds"]["0.8"] == {"reached": 1, "of": 1, "steps": 100, "minutes": 2.5}
    assert mine["final_success"]["value"] == 1


CURVE = [[0, 0], [0, 1], [1, 1]]


def groups_of(*paths: Path, by: tuple[str, ...] = (), until: int | None = None) -> dict[str, list[int]]:
    """Seeds of each group, by its label."""
    runs = [read_run(path, until) for path in paths]
    return {found.label: found.seeds() for found in group_runs(runs, by, until)}


def test_what_decides_what_is_learnt_makes_groups(tmp_path):
    gamma = replace(RUN, sac=replace(RUN.sac, gamma=0.9))
    other = replace(RUN, net=NETS[0])
    paths = [
        write_run(tmp_path / f"{i}-{seed}", CURVE, seed, cfg=cfg)
        for i, cfg in enumerate((RUN, gamma, other))
        for seed in (0, 1)
    ]
    expected = {"d2r, sac.gamma 0.99": [0, 1], "d2r, sac.gamma 0.9": [0, 1], "mlp": [0, 1]}
    assert groups_of(*paths) == expected
    assert groups_of(*paths[:4]) == {"sac.gamma 0.99": [0, 1], "sac.gamma 0.9": [0, 1]}
    assert groups_of(*paths[:2]) == {"d2r": [0, 1]}


def test_ablations_are_called_by_what_they_change_and_stand_behind_the_network(tmp_path):
    whole, other = RUN.net, replace(RUN, net=NETS[0])
    changed = [
        replace(whole, resrouting=False),
        replace(whole, top_k=1),
        whole,
        replace(whole, resrouting=False, top_k=1),
    ]
    cfgs = [*(replace(RUN, net=net) for net in changed), replace(RUN, sac=replace(RUN.sac, gamma=0.9)), other]
    paths = [write_run(tmp_path / str(i), CURVE, cfg=cfg) for i, cfg in enumerate(cfgs)]
    expected = ["d2r", "mlp"]
    expected += [f"d2r, {change}" for change in ("net.resrouting False", "net.top_k 1")]
    expected += ["d2r, net.top_k 1, net.resrouting False", "d2r, sac.gamma 0.9"]
    assert list(groups_of(*paths)) == expected
    assert list(groups_of(*paths[:3])) == ["d2r", "net.resrouting False", "net.top_k 1"]
    assert list(groups_of(*paths[2:4])) == [
        "net.top_k 2, net.resrouting True",
        "net.top_k 1, net.resrouting False",
    ]


def test_what_computes_and_what_is_saved_makes_none_unless_asked(tmp_path):
    net = replace(RUN.net, backend="reference", precision="bf16")
    large = replace(RUN, replay_capacity=300)  # never full, as one of 200 rows is not
    other = replace(large, name="other", net=net, overlap=False, deterministic=True, checkpoint_every_chunks=9)
    other = replace(other, replay_capacity=200, cuda_graph=False, checkpoint_replay=False)
    paths = [write_run(tmp_path / "a", CURVE, 0, cfg=large), write_run(tmp_path / "b", CURVE, 1, cfg=other)]
    assert groups_of(*paths) == {"d2r": [0, 1]}
    assert groups_of(*paths, by=("net.backend",)) == {"net.backend auto": [0], "net.backend reference": [1]}
    with pytest.raises(ValueError, match=r"--by: expected a setting .*, got 'backend'"):
        groups_of(*paths, by=("backend",))


def test_two_runs_of_one_seed_and_setting_are_refused(tmp_path):
    paths = [write_run(tmp_path / "a", CURVE), write_run(tmp_path / "b", CURVE, cfg=replace(RUN, name="other"))]
    with pytest.raises(ValueError, match=r"/a and .*/b: expected one run a seed of a setting, got several of seed 0"):
        groups_of(*paths)
    assert groups_of(*paths, by=("name",)) == {"name tiny": [0], "name other": [0]}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"total_steps": 130}, "total_steps 80 and 130"),
        ({"env": replace(RUN.env, tasks="reach,push", reward_scale=1.0)}, r"env.tasks .*; env.reward_scale 0.1 and"),
    ],
    ids=["length", "many"],
)
def test_runs_that_were_asked_other_things_are_refused(tmp_path, change, message):
    steps = (50, 70, 150) if "total_steps" in change else STEPS
    cfg = replace(RUN, **change)
    paths = [write_run(tmp_path / "a", CURVE), write_run(tmp_path / "b", CURVE, steps=steps, cfg=cfg)]
    with pytest.raises(ValueError, match=message) as error:
        groups_of(*paths)
    assert all(str(path) in str(error.value) for path in paths)


def test_runs_evaluated_at_other_steps_are_refused(tmp_path):
    paths = [write_run(tmp_path / "a", CURVE), write_run(tmp_path / "b", CURVE, steps=(50, 80, 100))]
    with pytest.raises(ValueError, match=r"other steps: \[50, 70, 100\] and \[50, 80, 100\]"):
        groups_of(*paths)


def test_runs_of_other_lengths_are_compared_over_what_they_share(tmp_path):
    longer = replace(RUN, total_steps=RUN.total_steps + 50)
    curve = [*CURVE, [1, 1]]
    run = write_run(tmp_path / "longer", curve, 1, steps=(*STEPS, 150), cfg=longer, walls=(60, 120, 180, 240))
    short = write_run(tmp_path / "short", CURVE)
    assert groups_of(short, run, until=STEPS[-1]) == {"d2r": [0, 1]}
    with pytest.raises(ValueError, match="no evaluation within its first 49 steps"):
        read_run(run, until=49)
    unfinished = write_run(tmp_path / "unfinished", CURVE[:2], 2)
    assert groups_of(short, unfinished, until=70) == {"d2r": [0, 2]}
    with pytest.raises(ValueError, match="not finished: last evaluation at step 70 of 100"):
        read_run(unfinished, until=71)


def test_runs_are_found_in_a_directory_of_them(tmp_path):
    runs = [write_run(tmp_path / "sweep" / name, CURVE, i) for i, name in enumerate("ab")]
    (tmp_path / "sweep" / "logs").mkdir()
    assert find_runs([tmp_path / "sweep"]) == find_runs(runs) == runs
    with pytest.raises(ValueError, match="named twice, where it would count as two seeds"):
        find_runs([tmp_path / "sweep", runs[1]])
    for path in (tmp_path / "sweep" / "logs", tmp_path / "nothing"):
        with pytest.raises(ValueError, match=f"{path}: expected a run directory"):
            find_runs([path])


def test_what_is_not_a_finished_run_is_refused(tmp_path):
    cases = {
        "not finished: last evaluation at step 70 of 100": write_run(tmp_path / "unfinished", CURVE[:2]),
        "no evaluation": write_run(tmp_path / "none", []),
        "one evaluation alone": write_run(tmp_path / "one", CURVE[2:], steps=[100]),
    }
    cut = write_run(tmp_path / "cut", CURVE)
    text = (cut / "metrics.jsonl").read_text()
    (cut / "metrics.jsonl").write_text(text[:-20])
    cases["cannot be read"] = cut
    for message, path in cases.items():
        with pytest.raises(ValueError, match=message):
            read_run(path)


def test_the_command_prints_tables_and_leaves_them_with_pictures(tmp_path, capsys):
    for name, finals in (("low", (0.2, 0.3, 0.1)), ("high", (0.8, 0.9, 0.7))):
        cfg = replace(RUN, sac=replace(RUN.sac, gamma=0.9)) if name == "low" else RUN
        for seed, final in enumerate(finals):
            write_run(tmp_path / f"{name}{seed}", [[0, 0], [0, 1], [final, 1]], seed, cfg=cfg)
    runs, out = [str(path) for path in sorted(tmp_path.iterdir())], tmp_path / "out"
    assert main(["compare", *runs, "--out", str(out), "--thresholds", "0.85"]) == 0
    printed = capsys.readouterr().out
    for text in ("| sac.gamma 0.99 | 3     | 0.90 (", "differ", "100 (3 min; 3 of 3)", "never"):
        assert text in printed
    report = json.loads((out / "compare.json").read_text())
    assert report["command"].startswith("d2r compare ")
    assert [g["by_run"] for g in report["groups"]] == [
        [[0.9, 0.8, 1], [0.95, 0.9, 1], [0.85, 0.7, 1]],
        [[0.6, 0.2, 1], [0.65, 0.3, 1], [0.55, 0.1, 1]],
    ]
    assert (out / "compare.md").read_text() == markdown(report)
    assert printed.startswith(markdown(report))
    for picture in ("compare.png", "compare_tasks.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")


def test_pictures_show_groups_and_intervals(tmp_path):
    groups = [Group("three", group(tmp_path / "a", (0.2, 0.3, 0.1))), Group("one", group(tmp_path / "b", (0.9,)))]
    curves, tasks = draw_curves(groups), draw_tasks(compare(groups, ()))
    assert len(curves.axes) == 2
    assert curves.axes[0].lines[0].get_ydata()[-1] == pytest.approx(0.6)
    assert curves.axes[1].lines[1].get_xdata().tolist() == [1, 2, 3]
    assert [len(axes.collections) for axes in curves.axes] == [1, 1]  # a single seed has no band
    (alone,) = draw_curves(groups, over_minutes=False).axes
    assert alone.lines[1].get_xdata().tolist() == [step / 1000 for step in STEPS]
    assert [bar.get_width() for bar in tasks.axes[0].patches] == pytest.approx([0.6, 0.2, 1, 0.95, 0.9, 1])


@pytest.mark.parametrize(
    "args, message",
    [
        ([], "expected at least one run directory"),
        (["nowhere"], "nowhere: expected a run directory"),
        (["nowhere", "--thresholds", "1.5"], "--thresholds: expected rates within (0, 1], got (1.5,)"),
    ],
)
def test_bad_input_is_one_line(args, message, capsys):
    assert main(["compare", *args]) == 1
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
