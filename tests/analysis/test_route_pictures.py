"""Numbers and pictures of routes."""

import json

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from tiny import NET

from d2r_fast.analysis.pictures import save_pictures
from d2r_fast.analysis.route_pictures import draw_routes
from d2r_fast.analysis.routes import difference, order, route_numbers, task_entropy
from d2r_fast.envs import ALL_TASKS
from d2r_fast.evaluation.routes import RouteUse
from d2r_fast.nets.d2r import NetConfig, RoutedNetwork


def routes_of(n_tasks: int, n: int, seed: int = 0) -> RouteUse:
    """Weights such as recording gives, every module run always."""
    rng = np.random.default_rng(seed)
    weight = np.tril(rng.uniform(0, 1, (n_tasks, n, n)))
    weight /= weight.sum(2, keepdims=True)
    tasks = np.ones(n_tasks)
    return RouteUse(np.ones((n_tasks, n)), weight, 0 * tasks, n * tasks, 0.5 * tasks, episodes=4)


def network(cfg: NetConfig, n_tasks: int) -> RoutedNetwork:
    with torch.device("meta"):
        return RoutedNetwork(39, 8, n_tasks, 1, cfg)


def test_difference():
    """Nothing in common, everything, and half of it: 1, 0, and 1 - 0.5 / 1.5."""
    one, other, both = np.zeros((3, 2, 2))
    one[1, 0] = other[1, 1] = 1
    both[1] = 0.5
    found = difference(np.stack([one, other, both, one]))
    np.testing.assert_allclose(found[0], [0, 1, 2 / 3, 0], atol=1e-12)
    np.testing.assert_array_equal(found, found.T)


def test_tasks_of_like_routes_stand_together():
    use = [routes_of(1, 4, seed).weight[0] for seed in (0, 1)]
    weight = np.stack([use[0], use[1], 0.99 * use[0], 0.99 * use[1], use[0]])
    kinds = [k % 2 if k < 4 else 0 for k in order(difference(weight))]
    assert kinds in ([0, 0, 0, 1, 1], [1, 1, 0, 0, 0])
    assert order(np.zeros((1, 1))) == [0]


def test_entropy_of_a_task():
    """A route that reads both sources alike has one bit; one that reads a single source none; by how often they run."""
    weight = np.zeros((2, 2, 2))
    weight[:, 1] = 0.5  # the head reads modules 0 and 1
    weight[0, 0, 0] = 1.0  # module 1 runs always, and reads module 0
    weight[1, 0, 0] = 0.25  # or every fourth step
    np.testing.assert_allclose(task_entropy(weight), [1 / 2, 1 / 1.25])


def test_arithmetic_saved_is_that_of_the_modules_left_out():
    use = routes_of(2, 4)
    use.module_use[1] = [1, 0.5, 0, 0]
    numbers = route_numbers(("reach", "push"), network(NET, 2), use, [])
    D = NET.module_width
    whole = network(NET, 2).multiply_adds
    counts = numbers["multiply_adds"]
    assert (counts["with_all_modules"], counts["a_module"]) == (whole, D * D)
    assert counts["of_a_step"] == [whole, whole - 2.5 * D * D]
    np.testing.assert_allclose(counts["share_of_modules_saved"], [0, 2.5 / 3])
    np.testing.assert_allclose(counts["share_saved"], [0, 2.5 * D * D / whole])
    assert [len(row) for row in numbers["weight"][0]] == [1, 2, 3, 4]
    assert numbers["active_modules"] == [4, 1.5]
    assert json.loads(json.dumps(numbers)) == numbers


@pytest.mark.parametrize(("n_tasks", "n", "n_evals"), [(1, 1, 0), (4, 6, 1), (50, 16, 2)])
def test_pictures(tmp_path, n_tasks, n, n_evals):
    tasks = ALL_TASKS[:n_tasks]
    cfg = NetConfig(n_modules=n, top_k=1, module_width=8, base_width=8, route_widths=(8,))
    use = routes_of(n_tasks, n)
    evals = [
        {"steps": 100 * i, "module_use": use.module_use.tolist(), "success": [0.1 * i] * n_tasks}
        for i in range(1, n_evals + 1)
    ]
    numbers = route_numbers(tasks, network(cfg, n_tasks), use, evals)
    figures = draw_routes("run", numbers)
    expected = {"routes_graphs.png", "routes_modules.png", "routes_cost.png"}
    assert set(figures) == expected | ({"routes_similarity.png", "routes_training.png"} if n_tasks > 1 else set[str]())
    (axes,) = figures["routes_graphs.png"].axes
    titles = [text.get_text().partition(":")[0] for text in axes.texts if ":" in text.get_text()]
    assert titles == list(tasks)
    # An arc for every route that is worth drawing.
    arcs = [len(c.get_segments()) for c in axes.collections if isinstance(c, LineCollection)]
    assert arcs == [(weight >= 0.02).sum() for weight in use.weight]
    for path in save_pictures(tmp_path, figures):
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
