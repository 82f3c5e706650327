"""Pictures of `route_numbers`: each task's graph, what the tasks share, what routing costs, how it came about."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram

from d2r_fast.analysis.pictures import draw_module_use, new_figure, task_colours
from d2r_fast.analysis.routes import merges

MODULE, HEAD = "#2b6cb0", "#c05621"
# Routes that carry less of a step's weight than this on average are left out of the graphs.
LEAST_WEIGHT = 0.02


def draw_routes(title: str, numbers: dict[str, Any]) -> dict[str, Figure]:
    """Figures by the name of their file."""
    figures = {
        "routes_graphs.png": _graphs(title, numbers),
        "routes_modules.png": draw_module_use(title, numbers["tasks"], numbers["module_use"]),
        "routes_cost.png": _cost(title, numbers),
    }
    if len(numbers["tasks"]) > 1:
        figures["routes_similarity.png"] = _similarity(title, numbers)
    if numbers["training"]["steps"]:
        figures["routes_training.png"] = _training(title, numbers)
    return figures


def _graphs(title: str, numbers: dict[str, Any]) -> Figure:
    tasks, n = numbers["tasks"], numbers["n_modules"]
    columns = min(len(tasks), 2 if len(tasks) <= 12 else 5)
    rows = math.ceil(len(tasks) / columns)
    wide, high = (6.5, 2.2) if columns <= 2 else (4.2, 1.7)
    figure = new_figure(max(6.5, columns * wide), 1.0 + rows * high)
    axes = figure.subplots()  # one for all tasks: fifty would take a minute to lay out
    axes.set_axis_off()
    across, down = n + 1.6, n + 1.0 + 0.16 * n  # of a task's place, in modules
    for k in range(len(tasks)):
        _graph(axes, numbers, k, k % columns * across, -(k // columns) * down)
    axes.set(xlim=(-0.7, columns * across - 0.7), ylim=(-rows * down + n / 2 + 0.5 + 0.16 * n, n / 2 + 0.5 + 0.16 * n))
    figure.suptitle(f"{title}: routes of greedy episodes, depth from left to right", fontsize=11)
    figure.supxlabel(
        "circle: a module, by the share of steps that run it (hollow: none); arc: what it reads, by weight; "
        f"blue into a module, orange into the head{chr(10) if columns == 1 else ' '}(square); under "
        f"{LEAST_WEIGHT:.0%} of a step: not drawn",
        fontsize=8 if columns > 1 else 6,
    )
    return figure


def _graph(axes: Axes, numbers: dict[str, Any], k: int, x: float, y: float) -> None:
    """A task's graph with module 0 at (x, y) and one module to the right of the other."""
    n, use = numbers["n_modules"], np.array(numbers["module_use"][k])
    half = np.linspace(0, np.pi, 25)
    arcs, weights, colours = [], [], []
    for i, sources in enumerate(numbers["weight"][k], start=1):
        for j, w in enumerate(sources):
            if w >= LEAST_WEIGHT:
                # Down into the head, up into modules, straight into the next one.
                bend = -1 if i == n else 0 if i == j + 1 else 1
                along = (i + j) / 2 - (i - j) / 2 * np.cos(half)
                arcs.append(np.stack([x + along, y + bend * (i - j) / 2 * np.sin(half)], 1))
                weights.append(w)
                colours.append((*to_rgb(HEAD if i == n else MODULE), 0.35 + 0.5 * min(1, w)))
    lines = LineCollection(arcs, linewidths=0.4 + 4 * np.array(weights), colors=colours, zorder=1)
    axes.add_collection(lines, autolim=False)
    size, room = (240, 0.3) if n <= 8 else (130, 0.6)  # room: the share from which a number fits into its circle
    faces, edges = np.where(use > 0, MODULE, "white"), np.where(use > 0, "white", "#999999")
    axes.scatter(
        x + np.arange(n), np.full(n, y), s=20 + size * use, color=faces.tolist(), edgecolors=edges.tolist(), zorder=3
    )
    axes.scatter(x + n, y, s=60, marker="s", color=HEAD, zorder=3)
    for j, share in enumerate(use):
        axes.annotate(
            str(j),
            (x + j, y),
            ha="center",
            va="center",
            fontsize=6 if share > room else 5,
            color="white" if share > room else "#333333",
            xytext=(0, 0) if share > room else (0, -8),
            textcoords="offset points",
            zorder=4,
        )
    what = (
        f"{numbers['active_modules'][k]:.1f} modules, {numbers['depth'][k]:.1f} deep, success "
        f"{numbers['success'][k]:.2f}"
    )
    axes.text(x + n / 2, y + n / 2 + 0.15, f"{numbers['tasks'][k]}: {what}", fontsize=9, ha="center", va="bottom")


def _similarity(title: str, numbers: dict[str, Any]) -> Figure:
    tasks, apart, order = numbers["tasks"], np.array(numbers["difference"]), numbers["order"]
    figure = new_figure(max(9.5, 5.0 + 0.26 * len(tasks)), max(4.4, 2.2 + 0.22 * len(tasks)))
    tree_axes, axes = figure.subplots(1, 2, width_ratios=(1, max(1.6, 0.07 * len(tasks))))
    dendrogram(
        merges(apart), orientation="left", ax=tree_axes, no_labels=True, color_threshold=0, above_threshold_color="k"
    )
    # scipy draws leaf k at 5 + 10k from below; the matrix has its first row on top.
    tree_axes.set_ylim(10 * len(tasks), 0)
    tree_axes.set_xlim(max(tree_axes.get_xlim()), 0)
    tree_axes.set(xlabel="difference")
    tree_axes.spines[["top", "right", "left"]].set_visible(False)
    shared = 1 - apart[np.ix_(order, order)]
    image = axes.imshow(shared, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    names = [tasks[k] for k in order]
    axes.set_yticks(range(len(tasks)), names, fontsize=8)
    axes.set_xticks(range(len(tasks)), names, rotation=90, fontsize=8)
    if len(tasks) <= 12:
        for (i, j), share in np.ndenumerate(shared):
            colour = "white" if share < 0.6 else "black"
            axes.text(j, i, f"{share:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes, fraction=0.03)
    figure.suptitle(f"{title}: share of the weight of their routes that two tasks have in common", fontsize=11)
    return figure


def _cost(title: str, numbers: dict[str, Any]) -> Figure:
    tasks = numbers["tasks"]
    figure = new_figure(11, 1.7 + 0.26 * len(tasks))
    entropy_axes, saved_axes = figure.subplots(1, 2, sharey=True)
    saved_axes.tick_params(left=False)
    at = np.arange(len(tasks))
    within, whole = (np.array(numbers["entropy_bits"][name]) for name in ("within_a_step", "of_the_task"))
    entropy_axes.barh(at, within, color=MODULE, label="within a step")
    entropy_axes.barh(at, whole - within, left=within, color="#90cdf4", label="by change from step to step")
    entropy_axes.set_xlabel("entropy of a route's sources (bits)")
    saved = numbers["multiply_adds"]
    of_modules, of_all = np.array(saved["share_of_modules_saved"]), np.array(saved["share_saved"])
    saved_axes.barh(at - 0.2, of_modules, 0.4, color=HEAD, label="of the modules")
    saved_axes.barh(at + 0.2, of_all, 0.4, color="#fbd38d", label="of the whole actor")
    saved_axes.set(xlim=(0, 1), xlabel="share of multiply-adds saved, against running every module")
    entropy_axes.set_yticks(at, tasks, fontsize=8)
    entropy_axes.set_ylim(len(tasks) - 0.4, -0.6)
    for axes in (entropy_axes, saved_axes):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=8, frameon=False)
    figure.suptitle(f"{title}: how spread the routes are, and what they save", fontsize=11)
    return figure


def _training(title: str, numbers: dict[str, Any]) -> Figure:
    tasks, training = numbers["tasks"], numbers["training"]
    steps = np.array(training["steps"]) / 1000
    active, success = np.array(training["active_modules"]), np.array(training["success"])  # [evaluations,T]
    many = len(tasks) > 12
    figure = new_figure(12, 2.0 + 0.17 * len(tasks) if many else 4.6)
    over_steps, against = figure.subplots(1, 2)
    if many:  # lines would hide each other
        image = over_steps.imshow(active.T, aspect="auto", cmap="viridis", interpolation="nearest")
        over_steps.set_yticks(range(len(tasks)), tasks, fontsize=7)
        shown = np.unique(np.linspace(0, len(steps) - 1, 8).astype(int))
        over_steps.set_xticks(shown, [f"{steps[i]:g}" for i in shown])
        figure.colorbar(image, ax=over_steps, fraction=0.05, label="modules that a step runs")
        dots = against.scatter(success, active, c=np.repeat(steps, len(tasks)), s=14, alpha=0.7, cmap="plasma")
        figure.colorbar(dots, ax=against, fraction=0.05, label="environment steps a task (thousands)")
        against.set_xlabel("success rate; a dot: a task in an evaluation")
    else:
        for k, (task, colour) in enumerate(zip(tasks, task_colours(len(tasks)), strict=True)):
            over_steps.plot(steps, active[:, k], "o-", ms=3, lw=1, color=colour, label=task)
            against.scatter(success[:, k], active[:, k], s=6 + 50 * steps / steps[-1], color=colour, alpha=0.6)
        over_steps.plot(steps, active.mean(1), "k-", lw=2.5, label="mean")
        over_steps.set_ylabel("modules that a step runs")
        over_steps.grid(alpha=0.3)
        figure.legend(*over_steps.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
        against.set_xlabel("success rate; a dot: a task in an evaluation, larger if later")
    over_steps.set_xlabel("environment steps a task (thousands)")
    against.set(ylabel="modules that a step runs", xlim=(-0.04, 1.04))
    against.grid(alpha=0.3)
    figure.suptitle(f"{title}: active modules in greedy evaluations", fontsize=11)
    return figure
