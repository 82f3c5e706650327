"""Pictures and tables of a run, from its metrics.jsonl alone."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure

from d2r_fast.host.files import whole_file
from d2r_fast.training.metrics import read_metrics


def success_table(tasks: tuple[str, ...], success: list[float], episode_return: list[float], episodes: int) -> str:
    """One line a task and the mean."""
    width = max(len(task) for task in (*tasks, "mean"))
    lines = [f"{'task':<{width}}  success  return   ({episodes} episodes a task)"]
    for task, s, r in zip(tasks, success, episode_return, strict=True):
        lines.append(f"{task:<{width}}  {s:7.2f}  {r:6.0f}")
    lines.append(f"{'mean':<{width}}  {sum(success) / len(success):7.2f}  {sum(episode_return) / len(tasks):6.0f}")
    return "\n".join(lines)


def write_pictures(run_dir: Path, tasks: tuple[str, ...]) -> list[Path]:
    """Draw `learning_curve.png` and, for a network with routes, `module_use.png` into the run directory; returns the
    files.

    Without an evaluation so far there is nothing to draw, and the list is empty.
    """
    evals = read_metrics(run_dir, "eval")
    if not evals:
        return []
    pictures = {"learning_curve.png": _learning_curve(run_dir.name, tasks, evals)}
    if evals[-1]["module_use"][0]:
        pictures["module_use.png"] = draw_module_use(run_dir.name, tasks, evals[-1]["module_use"])
    return save_pictures(run_dir, pictures)


def save_pictures(directory: Path, pictures: dict[str, Figure]) -> list[Path]:
    """Write figures as PNGs under their names, each whole or not at all; returns the files. OSError, naming one."""
    for name, figure in pictures.items():
        with whole_file(directory / name) as file:
            figure.savefig(file, format="png", dpi=120)
    return [directory / name for name in pictures]


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches. It belongs to no window, so that nobody has to close it."""
    return Figure(figsize=(width, height), layout="constrained")


def task_colours(n_tasks: int) -> list[tuple[float, float, float, float]]:
    """A colour a task."""
    colours = colormaps["tab10" if n_tasks <= 10 else "nipy_spectral"]
    return [colours(i if n_tasks <= 10 else i / n_tasks) for i in range(n_tasks)]


def _learning_curve(title: str, tasks: tuple[str, ...], evals: list[dict]) -> Figure:
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    steps = [record["steps"] / 1000 for record in evals]
    for i, (task, colour) in enumerate(zip(tasks, task_colours(len(tasks)), strict=True)):
        axes.plot(steps, [record["success"][i] for record in evals], "o-", ms=3, lw=1, label=task, color=colour)
    axes.plot(steps, [record["mean_success"] for record in evals], "k-", lw=2.5, label="mean")
    axes.set(
        title=f"{title}: greedy evaluation, {evals[-1]['episodes']} episodes a task",
        xlabel="environment steps a task (thousands)",
        ylabel="success rate",
        ylim=(-0.03, 1.03),
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, ncols=1 + len(tasks) // 26)
    return figure


def draw_module_use(title: str, tasks: Sequence[str], use: list[list[float]]) -> Figure:
    """use [T][N]: share of steps in which a task's actor runs a module, a cell each."""
    n_modules = len(use[0])
    height = 1.8 + 0.32 * len(tasks)
    figure = new_figure(max(6.0, 2.5 + 0.5 * n_modules), height)
    axes = figure.subplots()
    image = axes.imshow(use, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    labels = [f"{task} ({sum(row):.1f})" for task, row in zip(tasks, use, strict=True)]
    axes.set_yticks(range(len(tasks)), labels)
    axes.set_xticks(range(n_modules))
    axes.set(title=f"{title}\nshare of steps in which the actor runs a module", xlabel="module")
    axes.set_ylabel("task (modules a step)")
    for i, row in enumerate(use):
        for j, share in enumerate(row):
            axes.text(
                j,
                i,
                f"{share:.2f}"[1:] if share < 0.995 else "1",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if share < 0.6 else "black",
            )
    figure.colorbar(image, ax=axes, fraction=0.03)
    return figure
