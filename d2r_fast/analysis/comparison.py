"""Groups of finished runs held against each other: who learns what, how surely, how soon."""

from collections.abc import Sequence
from itertools import combinations
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from d2r_fast.analysis.finished_runs import Run, flat_settings, learning_settings
from d2r_fast.analysis.success_statistics import Drawn, Estimate, verdict

# What runs must have in common to be compared: what they are asked to do, and how that is judged.
COMMON = ("env.", "eval.", "bootstrap_at_time_limit", "total_steps", "warmup_steps")
SETTINGS_IN_A_LABEL = 3
GROUPS_IN_ALL_PAIRS = 4  # beyond, tables show the pairs with the first group alone; the JSON has all


class Group(NamedTuple):
    """Runs of one setting, which differ in their seeds."""

    label: str
    runs: list[Run]

    def success(self) -> np.ndarray:
        """[S,evaluations,1+T]: the mean over tasks, then every task."""
        return np.array([run.success() for run in self.runs])

    def area(self) -> np.ndarray:
        """[S,1+T] under success over steps."""
        return np.array([run.area() for run in self.runs])

    def seeds(self) -> list[int]:
        return [run.cfg.seed for run in self.runs]


def group_runs(runs: Sequence[Run], by: Sequence[str] = (), until: int | None = None) -> list[Group]:
    """Runs by what decides what they learn, and by the settings `by`, which else decide nothing (`name`,
    `net.backend`). Labels say what sets a group apart; a network of which others are ablations comes first.

    ValueError: two runs were asked to do different things, or evaluated at other steps; or no setting is called so.
    """
    for name in by:
        if name not in flat_settings(runs[0].cfg):
            raise ValueError(f"--by: expected a setting such as name, net.backend or seed, got {name!r}")
    first = runs[0]
    groups: dict[str, tuple[dict[str, Any], list[Run]]] = {}
    for run in runs:
        settings = learning_settings(run.cfg, until)
        _check_common(first, run, until)
        settings |= {name: flat_settings(run.cfg)[name] for name in by}
        groups.setdefault(repr(sorted(settings.items())), (settings, []))[1].append(run)
    for _, members in groups.values():
        seeds = [run.cfg.seed for run in members]
        twice = next((run for run in members if seeds.count(run.cfg.seed) > 1), None)
        if twice is not None and "seed" not in by:
            same = [str(run.path) for run in members if run.cfg.seed == twice.cfg.seed]
            raise ValueError(
                f"{' and '.join(same)}: expected one run a seed of a setting, got several of seed {twice.cfg.seed}; "
                "--by name, or another setting, tells them apart"
            )
    labels = _labels([settings for settings, _ in groups.values()])
    found = [Group(label, members) for label, (_, members) in zip(labels, groups.values(), strict=True)]
    # What ablations are held against comes first.
    return sorted(found, key=lambda group: group.label != group.runs[0].cfg.net.kind)


def _check_common(first: Run, run: Run, until: int | None) -> None:
    ours, theirs = (
        {name: value for name, value in learning_settings(r.cfg, until).items() if name.startswith(COMMON)}
        for r in (first, run)
    )
    others = [f"{name} {value} and {theirs[name]}" for name, value in ours.items() if value != theirs[name]]
    if others:
        more = f", and {len(others) - 4} more" if len(others) > 4 else ""
        raise ValueError(f"{first.path} and {run.path} are not comparable: {'; '.join(others[:4])}{more}")
    if run.steps != first.steps:
        raise ValueError(f"{first.path} and {run.path} were evaluated at other steps: {first.steps} and {run.steps}")


def _labels(groups: list[dict[str, Any]]) -> list[str]:
    """What sets each group apart from the others: its network, and what differs among those of that network.

    Where several settings do, in three groups or more: what differs from the group that is nearest to all. Of a network
    and its ablations that is the network itself, which is called by its kind alone.
    """
    kinds = {settings["net.kind"] for settings in groups}
    labels: list[str] = []
    for settings in groups:
        alike = [other for other in groups if other["net.kind"] == settings["net.kind"]]
        names = [n for n in settings if n != "net.kind" and any(other.get(n) != settings[n] for other in alike)]
        if len(names) > 1 and len(alike) > 2:
            centre = min(alike, key=lambda c: sum(c.get(n) != other.get(n) for other in alike for n in names))
            names = [n for n in names if centre.get(n) != settings[n]]
        parts = [settings["net.kind"]] if len(kinds) > 1 or not names else []
        parts += [f"{name} {settings[name]}" for name in names[:SETTINGS_IN_A_LABEL]]
        if len(names) > SETTINGS_IN_A_LABEL:
            parts.append(f"and {len(names) - SETTINGS_IN_A_LABEL} more")
        label, n = ", ".join(parts), 2
        while label in labels:
            label, n = f"{', '.join(parts)} ({n})", n + 1
        labels.append(label)
    return labels


def compare(groups: Sequence[Group], thresholds: Sequence[float]) -> dict[str, Any]:
    """All that a comparison tells, as JSON.

    thresholds: of mean success, whose first crossing is timed
    """
    first = groups[0].runs[0]
    rng = np.random.default_rng(0)
    final = [Drawn.of(group.success()[:, -1, 1:], rng) for group in groups]
    area = [Drawn.of(group.area()[:, 1:], rng) for group in groups]
    return {
        "tasks": list(first.cfg.task_names),
        "steps_a_task": first.steps[-1],
        "episodes_a_task": first.evals[-1]["episodes"],
        "groups": [
            _describe(group, group_final, group_area, thresholds)
            for group, group_final, group_area in zip(groups, final, area, strict=True)
        ],
        "pairs": [
            {"a": groups[i].label, "b": groups[j].label, "final_success": _pair(final[i], final[j])}
            | {"area": _pair(area[i], area[j])}
            for i, j in combinations(range(len(groups)), 2)
        ],
    }


def _describe(group: Group, final: Drawn, area: Drawn, thresholds: Sequence[float]) -> dict[str, Any]:
    tasks = group.runs[0].cfg.task_names
    return {
        "label": group.label,
        "seeds": group.seeds(),
        "runs": [str(run.path) for run in group.runs],
        "final_success": final.mean()._asdict(),
        "interquartile_mean": final.interquartile_mean()._asdict(),
        "area": area.mean()._asdict(),
        "by_task": {name: e._asdict() for name, e in zip(tasks, final.by_task(), strict=True)},
        "by_run": [[round(float(v), 4) for v in run.success()[-1]] for run in group.runs],
        "thresholds": {str(threshold): crossing(group, threshold) for threshold in thresholds},
        "updates": group.runs[0].evals[-1]["updates"],
        "updates_per_s": _median([run.updates_per_s for run in group.runs]),
        "minutes": _median([run.minutes[-1] for run in group.runs]),
    }


def crossing(group: Group, threshold: float) -> dict[str, Any]:
    """How many runs' mean success ever reached it, and the median step and minute of those that did."""
    steps, minutes = [], []
    for run in group.runs:
        at = next((i for i, record in enumerate(run.evals) if record["mean_success"] >= threshold), None)
        if at is not None:
            steps.append(float(run.steps[at]))
            minutes.append(run.minutes[at])
    return {"reached": len(steps), "of": len(group.runs), "steps": _median(steps), "minutes": _median(minutes)}


def _median(values: list[float]) -> float | None:
    return round(median(values), 2) if values else None


def _pair(a: Drawn, b: Drawn) -> dict[str, Any]:
    difference = b.better_by(a)
    return {
        "b_minus_a": difference._asdict(),
        "verdict": verdict(difference, min(a.n_seeds, b.n_seeds)),
        "b_beats_a": b.improves_on(a)._asdict(),
    }


def markdown(result: dict[str, Any]) -> str:
    """The tables of a comparison."""

    def text(estimate: dict[str, Any], sign: str = "") -> str:
        return Estimate(**estimate).text(sign)

    groups, tasks = result["groups"], result["tasks"]
    thresholds = list(groups[0]["thresholds"])
    lines = [
        f"Success over {result['episodes_a_task']} episodes a task after {result['steps_a_task']:,} steps a task, with "
        "95% intervals over seeds (bootstrap, stratified by task).",
        "",
        *_table(
            ["", "seeds", "mean", "interquartile mean", "area under the curve"]
            + [f"steps to {t} (minutes; runs)" for t in thresholds]
            + ["updates/s", "minutes"],
            [
                [g["label"], len(g["seeds"]), text(g["final_success"]), text(g["interquartile_mean"]), text(g["area"])]
                + [_crossing_text(g["thresholds"][t]) for t in thresholds]
                + [f"{g['updates_per_s']:.1f}", f"{g['minutes']:.1f}"]
                for g in groups
            ],
        ),
        "",
        *_table(
            ["task", *(g["label"] for g in groups)],
            [[task, *(text(g["by_task"][task]) for g in groups)] for task in tasks],
        ),
    ]
    pairs = result["pairs"]
    if len(groups) > GROUPS_IN_ALL_PAIRS:
        pairs = [pair for pair in pairs if pair["a"] == groups[0]["label"]]
    if pairs:
        lines += [
            "",
            *_table(
                ["a", "b", "mean of b minus a", "", "area of b minus a", "", "chance that b beats a in a task"],
                [
                    [p["a"], p["b"]]
                    + [
                        part
                        for measure in ("final_success", "area")
                        for part in (text(p[measure]["b_minus_a"], "+"), p[measure]["verdict"])
                    ]
                    + [text(p["final_success"]["b_beats_a"])]
                    for p in pairs
                ],
            ),
        ]
    return "\n".join(lines) + "\n"


def _crossing_text(crossed: dict[str, Any]) -> str:
    if not crossed["reached"]:
        return "never"
    return f"{crossed['steps']:,.0f} ({crossed['minutes']:.0f} min; {crossed['reached']} of {crossed['of']})"


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    cells = [head, *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(head))]
    padded = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [padded[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *padded[1:]]
