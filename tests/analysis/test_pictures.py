"""Pictures and tables: written, readable again, and about what the metrics say."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.image import imread

from d2r_fast.analysis.pictures import success_table, write_pictures
from d2r_fast.envs import ALL_TASKS


def write_metrics(run_dir: Path, n_tasks: int, n_modules: int, n_evals: int, seed: int = 0) -> Path:
    """A metrics.jsonl such as the trainer writes."""
    rng = np.random.default_rng(seed)
    run_dir.mkdir()
    with (run_dir / "metrics.jsonl").open("w") as file:
        for i in range(1, n_evals + 1):
            success = rng.uniform(0, 1, n_tasks)
            use = rng.uniform(0, 1, (n_tasks, n_modules))
            use[:, :1] = 1
            counts = {"steps": 1000 * i, "updates": 500 * i}
            record = {"mean_success": success.mean(), "success": success.tolist(), "module_use": use.tolist()}
            record |= {"episode_return": (100 * success).tolist(), "episodes": 32, "time": {"wall": 1.0}}
            file.write(json.dumps({"kind": "train", **counts}) + "\n")
            file.write(json.dumps({"kind": "eval", **counts, **record}) + "\n")
    return run_dir


def read(picture: Path) -> np.ndarray:
    """A PNG as [height,width,3] bytes."""
    assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    return (imread(picture)[..., :3] * 255).round().astype(np.uint8)


def colours(pixels: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, np.unique(pixels.reshape(-1, 3), axis=0).tolist()))


@pytest.mark.parametrize(
    "n_tasks, n_modules, n_evals",
    [(1, 1, 2), (2, 4, 1), (50, 16, 3)],
    ids=["T1-N1", "T2-one-evaluation", "T50"],
)
def test_pictures(tmp_path, n_tasks, n_modules, n_evals):
    run_dir, tasks = tmp_path / "run", ALL_TASKS[:n_tasks]
    write_metrics(run_dir, n_tasks, n_modules, n_evals)
    pictures = write_pictures(run_dir, tasks)
    assert pictures == [run_dir / "learning_curve.png", run_dir / "module_use.png"]
    assert plt.get_fignums() == []  # no figure is left open

    curve = read(pictures[0])
    assert curve.shape[:2] == (540, 960)
    # A line of its own colour for each task, the mean's black, and the shades of smoothed edges.
    assert len(colours(curve)) > 30 + 3 * n_tasks
    assert (0, 0, 0) in colours(curve)

    use = read(pictures[1])
    assert use.shape[0] == pytest.approx(120 * (1.8 + 0.32 * n_tasks), abs=1)
    assert use.shape[1] >= 120 * 6
    # The colour scale of the bar alone has this many shades; the text adds more.
    assert len(colours(use)) > 100


def test_a_network_without_routes_has_no_picture_of_its_modules(tmp_path):
    write_metrics(tmp_path / "run", 2, 0, 1)
    assert write_pictures(tmp_path / "run", ALL_TASKS[:2]) == [tmp_path / "run" / "learning_curve.png"]


def test_module_use_is_drawn_cell_by_cell_from_the_last_evaluation(tmp_path):
    """A module that never ran and one that always ran have the two ends of the colour scale."""
    run_dir = write_metrics(tmp_path / "run", 2, 2, 2)
    *earlier, last = (run_dir / "metrics.jsonl").read_text().splitlines()
    last = json.loads(last) | {"module_use": [[1.0, 0.0], [1.0, 0.0]]}
    (run_dir / "metrics.jsonl").write_text("\n".join([*earlier, json.dumps(last)]) + "\n")
    use = read(write_pictures(run_dir, ("reach", "push"))[1])
    never, always = ((np.array(plt.get_cmap("viridis")(x)[:3]) * 255).round() for x in (0.0, 1.0))
    share = [(np.abs(use - colour).max(-1) <= 1).mean() for colour in (never, always)]
    assert min(share) > 0.1  # two cells of each
    assert share[0] == pytest.approx(share[1], rel=0.1)


def test_pictures_follow_the_numbers(tmp_path):
    one, other = (write_metrics(tmp_path / f"run{i}", 2, 4, 3, seed) for i, seed in enumerate((0, 1)))
    (tmp_path / "again").mkdir()
    same = write_metrics(tmp_path / "again" / "run0", 2, 4, 3, seed=0)
    tasks = ("reach", "push")
    first, second, third = (write_pictures(run, tasks) for run in (one, other, same))
    for a, b, c in zip(first, second, third, strict=True):
        assert read(a).shape != read(b).shape or (read(a) != read(b)).any()
        np.testing.assert_array_equal(read(a), read(c))


def test_without_an_evaluation_there_is_nothing_to_draw(tmp_path):
    run_dir = write_metrics(tmp_path / "run", 2, 4, 0)
    (run_dir / "metrics.jsonl").write_text('{"kind": "train", "steps": 10, "updates": 5}\n')
    assert write_pictures(run_dir, ("reach", "push")) == []
    assert [path.name for path in run_dir.iterdir()] == ["metrics.jsonl"]


def test_without_metrics(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_pictures(tmp_path, ("reach",))


def test_success_table():
    table = success_table(("reach", "drawer-close"), [0.25, 1.0], [12.4, 1234.6], 32)
    assert table == (
        "task          success  return   (32 episodes a task)\n"
        "reach            0.25      12\n"
        "drawer-close     1.00    1235\n"
        "mean             0.62     624"
    )
    assert success_table(("a",), [0.5], [-3.0], 1).splitlines()[1:] == [
        "a        0.50      -3",
        "mean     0.50      -3",
    ]
    with pytest.raises(ValueError, match="argument"):
        success_table(("reach", "push"), [1.0], [1.0, 2.0], 32)
