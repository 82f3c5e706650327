"""Success, wall time and rates of training runs, one row a run; and whether two groups of them learn the same.

    python benches/compare_runs.py RUN [RUN ...] [--json FILE]
    python benches/compare_runs.py --reference RUN [RUN ...] --fast RUN [RUN ...] [--until STEPS] [--json FILE]
                                    [--plots FOLDER]

A RUN is the directory of a finished run. The groups are seeds of one configuration, run in two ways: other backends,
devices, precisions. Two measures, of the mean over tasks and of every task: success in the last evaluation, and the
area under success over steps, which one lucky or unlucky evaluation hardly moves. `--until` holds runs of different
length against each other over the steps that they share.

Intervals are the percentiles 2.5 and 97.5 of means over runs drawn with replacement, each group by itself for their
difference. With few seeds they are too narrow: of 2,000 simulated groups of five (normal values, or rates near 1 with a
tail) the interval of a mean held the truth in 81 to 84%, that of a difference in 87 to 88%; of groups of ten in 88 to
90% and 91%. So with five seeds one in eight pairs of groups that learn the same "differs" in a measure, with three one
in five, and "overlap" says no more than that the difference may lie anywhere within its interval, zero included. Tasks
get no verdict: among ten, one or another would differ more often than not.

The report names the machine it is written on: write it where the runs were made.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import numpy as np
from finished_runs import Run, check_alike, read_run, row
from timing import print_table, write_report

RESAMPLES = 20_000
SEEDS_FOR_VERDICT = 3  # with two, one in three pairs of groups that learn the same would differ
MEASURES = {"final_success": Run.final_success, "area": Run.area}
TIMES = ("wall_minutes", "updates_per_s")


def resampled_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of the runs drawn with replacement: [S,C] -> [RESAMPLES,C]."""
    return values[rng.integers(len(values), size=(RESAMPLES, len(values)))].mean(1)


def compare(reference: np.ndarray, fast: np.ndarray, names: tuple[str, ...]) -> tuple[dict[str, Any], str]:
    """A measure of two groups, [S,C] each, C named by `names`, the first of them being what the verdict is about.

    returns {name: {"reference" | "fast" | "difference": {"mean", "low", "high"}}} and "overlap" or "differ": the
    interval of fast - reference holds zero or does not. A single run has no interval; "too few seeds" is no verdict.
    """
    rng = np.random.default_rng(0)
    draws = [resampled_means(group, rng) for group in (reference, fast)]
    parts = {
        "reference": (reference.mean(0), draws[0], len(reference)),
        "fast": (fast.mean(0), draws[1], len(fast)),
        "difference": (fast.mean(0) - reference.mean(0), draws[1] - draws[0], min(len(reference), len(fast))),
    }
    table: dict[str, Any] = {name: {} for name in names}
    for part, (mean, drawn, seeds) in parts.items():
        low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
        for i, name in enumerate(names):
            ends = (round(low[i], 4), round(high[i], 4)) if seeds > 1 else (None, None)
            table[name][part] = {"mean": round(mean[i], 4), "low": ends[0], "high": ends[1]}
    if min(len(reference), len(fast)) < SEEDS_FOR_VERDICT:
        return table, "too few seeds"
    difference = table[names[0]]["difference"]
    return table, "overlap" if difference["low"] <= 0 <= difference["high"] else "differ"


def compare_groups(reference: list[Run], fast: list[Run], until: int | None = None) -> dict[str, Any]:
    """Both measures of both groups, times beside them. ValueError: they cannot be compared."""
    for group in (reference, fast):
        paths = [run.path.resolve() for run in group]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice:
            raise ValueError(f"{twice}: named twice in a group, where it would count as two seeds")
    check_alike([*reference, *fast], until)
    groups = {"reference": reference, "fast": fast}
    names = ("mean", *reference[0].cfg.task_names)
    result: dict[str, Any] = {"seeds": {name: [run.cfg.seed for run in group] for name, group in groups.items()}}
    for measure, of_run in MEASURES.items():
        values = {name: np.array([of_run(run) for run in group]) for name, group in groups.items()}  # [S,1+T] each
        table, verdict = compare(values["reference"], values["fast"], names)
        result[measure] = {"verdict": verdict, "table": table}
    for time in TIMES:
        means = {name: [row(run)[time] for run in group] for name, group in groups.items()}
        result[time] = {n: None if None in v else round(statistics.mean(v), 1) for n, v in means.items()}
    return result


def print_comparison(result: dict[str, Any]) -> None:
    def text(part: dict[str, float | None], sign: str = "") -> str:
        inside = "" if part["low"] is None else f" ({part['low']:{sign}.3f} to {part['high']:{sign}.3f})"
        return f"{part['mean']:{sign}.3f}{inside}"

    for measure in MEASURES:
        lines = [
            {measure: name} | {part: text(value, "+" if part == "difference" else "") for part, value in parts.items()}
            for name, parts in result[measure]["table"].items()
        ]
        print()
        print_table(lines, list(lines[0]))
        print(f"{measure}: {result[measure]['verdict']}")
    print()
    for time in TIMES:
        print(f"{time}, mean of the runs: reference {result[time]['reference']}, fast {result[time]['fast']}")


def plot(groups: dict[str, list[Run]], path: Path) -> None:
    """Mean success over steps: a line for every group, with a band from its worst seed to its best."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, runs in groups.items():
        steps = np.array(runs[0].steps) / 1000
        curves = np.stack([run.success()[:, 0] for run in runs])  # [S,evaluations]
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        (line,) = axes.plot(steps, curves.mean(0), "o-", ms=3, lw=2, label=f"{name}, {seeds}")
        axes.fill_between(steps, curves.min(0), curves.max(0), color=line.get_color(), alpha=0.2, lw=0)
    cfg = next(iter(groups.values()))[0].cfg
    axes.set(
        title=f"{cfg.name}: success, mean over {cfg.n_tasks} tasks; bands from the worst seed to the best",
        xlabel="environment steps a task (thousands)",
        ylabel="success rate",
        ylim=(-0.03, 1.03),
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"picture    {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--reference", nargs="+", type=Path, default=[], metavar="RUN", help="one group of runs")
    parser.add_argument("--fast", nargs="+", type=Path, default=[], metavar="RUN", help="the group to hold against it")
    parser.add_argument("--until", type=int, metavar="STEPS", help="look at the first so many steps a task of each run")
    parser.add_argument("--json", type=Path, help="write rows and comparison here")
    parser.add_argument("--plots", type=Path, help="folder for the picture of the two groups")
    args = parser.parse_args()
    two = bool(args.reference and args.fast)
    if two == bool(args.runs) or bool(args.reference) != bool(args.fast):
        parser.error("expected either runs, or both --reference and --fast")
    if args.plots and not two:
        parser.error("--plots: expected two groups")
    paths = {"reference": args.reference, "fast": args.fast} if two else {"": args.runs}
    try:
        groups = {name: [read_run(path, args.until) for path in group] for name, group in paths.items()}
        comparison = {"comparison": compare_groups(groups["reference"], groups["fast"], args.until)} if two else {}
    except ValueError as error:
        sys.exit(str(error))
    rows = [({"group": name} if two else {}) | row(run) for name, group in groups.items() for run in group]
    columns = ["variant", *(["group"] if two else []), "seed", "mean", *rows[0]["success"], *TIMES]
    print_table([r | {"mean": round(r["mean_success"], 3)} | r["success"] for r in rows], columns)
    if two:
        print_comparison(comparison["comparison"])
    if args.plots:
        plot(groups, args.plots / "compare_runs.png")
    write_report(args.json, " ".join(["python benches/compare_runs.py", *sys.argv[1:]]), "cpu", rows, **comparison)


if __name__ == "__main__":
    main()
