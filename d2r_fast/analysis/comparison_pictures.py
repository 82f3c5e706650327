"""A comparison drawn: curves over steps and over time, and the tasks' success at the end."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from d2r_fast.analysis.comparison import Group
from d2r_fast.analysis.pictures import new_figure
from d2r_fast.analysis.success_statistics import Drawn


def draw_curves(groups: Sequence[Group], over_minutes: bool = True) -> Figure:
    """Mean success with 95% intervals over steps and, unless the runs' minutes do not compare, over minutes."""
    figure = new_figure(11 if over_minutes else 7, 4.2)
    all_axes = figure.subplots(1, 1 + over_minutes, squeeze=False)[0]
    cfg, rng = groups[0].runs[0].cfg, np.random.default_rng(0)
    for group in groups:
        success = group.success()[..., 1:]  # [S,evaluations,T]
        mean = success.mean((0, 2))
        name = f"{group.label}, {len(group.runs)} seed{'s' if len(group.runs) > 1 else ''}"
        bounds = [Drawn.of(success[:, i], rng).mean() for i in range(success.shape[1])] if len(success) > 1 else []
        places = [np.array(groups[0].runs[0].steps) / 1000, np.mean([run.minutes for run in group.runs], 0)]
        for axes, x in zip(all_axes, places, strict=False):
            (line,) = axes.plot(x, mean, "o-", ms=3, lw=1.8, label=name)
            if bounds:
                axes.fill_between(
                    x, [b.low for b in bounds], [b.high for b in bounds], color=line.get_color(), alpha=0.18, lw=0
                )
    titles = ["environment steps a task (thousands)", "minutes (mean of the seeds)"]
    for axes, title in zip(all_axes, titles, strict=False):
        axes.set(xlabel=title, ylabel="success rate", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    figure.suptitle(f"{cfg.n_tasks} tasks: mean success with 95% intervals over seeds", fontsize=11)
    _legend(figure, *all_axes[0].get_legend_handles_labels())
    return figure


def draw_tasks(result: dict[str, Any]) -> Figure:
    """Each task's success at the end, a bar a group, with its interval; the mean first."""
    groups, names = result["groups"], ["mean", *result["tasks"]]
    height = 0.8 / len(groups)
    figure = new_figure(7, 1.2 + len(names) * (0.14 + 0.16 * len(groups)))
    axes = figure.subplots()
    for i, group in enumerate(groups):
        estimates = [group["final_success"], *group["by_task"].values()]
        y = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * height
        values = np.array([e["value"] for e in estimates])
        (colour,) = axes.plot([], [])
        axes.barh(y, values, height * 0.9, color=colour.get_color(), label=group["label"])
        for at, e in zip(y, estimates, strict=True):
            if e["low"] is not None:
                axes.plot([e["low"], e["high"]], [at, at], color="0.25", lw=1)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.02), xlabel=f"success rate after {result['steps_a_task']:,} steps a task")
    axes.axhline(0.5, color="0.6", lw=0.8)
    axes.grid(axis="x", alpha=0.3)
    _legend(figure, *axes.get_legend_handles_labels())
    return figure


def _legend(figure: Figure, handles: list[Any], labels: list[str]) -> None:
    """Below the axes, in as many columns as fit: a letter takes about 0.06 inches, a line and its gaps 0.6."""
    fit = int(figure.get_figwidth() / (0.06 * max(map(len, labels)) + 0.6))
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(fit, len(labels), 4)), fontsize=8)
