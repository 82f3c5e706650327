"""`d2r routes`: plays a saved agent's greedy episodes and draws the routes that they took."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path

import tyro

from d2r_fast.analysis.pictures import save_pictures
from d2r_fast.analysis.route_pictures import draw_routes
from d2r_fast.analysis.routes import play_routes
from d2r_fast.commands.output import write_output
from d2r_fast.training.saved_run import read_saved_run


@dataclasses.dataclass(frozen=True)
class RoutesArgs:
    """Play a saved agent's greedy episodes and draw, for every task, the graph of modules that they ran through; what
    tasks share; active modules over training; entropy; arithmetic saved. Writes routes_*.png and routes.json."""

    run: tyro.conf.Positional[Path]
    """A run directory (its newest checkpoint) or a checkpoint file."""
    out: Path | None = None
    """Directory to write into; by default the run's own, or the checkpoint file's."""
    episodes: int = 8
    """Episodes a task."""
    envs_per_task: int | None = None
    """Environments a task that step together, a divisor of the episodes; by default up to 8."""
    seed: int = 0
    """Seeds the goals."""


def run(args: list[str]) -> int:
    """Write the files and print where they are. ValueError: the run's network has no routes, or as `d2r eval`."""
    wanted = tyro.cli(RoutesArgs, prog="d2r routes", args=args)
    if not 0 <= wanted.seed < 2**31 - 50:
        raise ValueError(f"seed: expected 0..2**31-51, got {wanted.seed}")
    saved = read_saved_run(wanted.run)
    for error in saved.passed_over.values():
        print(f"d2r routes: {error}; playing {saved.path.name}", file=sys.stderr)
    out = wanted.out or (wanted.run if wanted.run.is_dir() else wanted.run.parent)
    numbers = play_routes(saved, wanted.episodes, wanted.envs_per_task, wanted.seed)
    numbers = {"command": shlex.join(["d2r", "routes", *args])} | numbers
    title = f"{(saved.run_dir or saved.path).resolve().name}, {numbers['steps']:,} steps a task"
    out.mkdir(parents=True, exist_ok=True)
    pictures = save_pictures(out, draw_routes(title, numbers))
    write_output(out / "routes.json", json.dumps(numbers) + "\n")

    tasks, width = numbers["tasks"], max(len(task) for task in (*numbers["tasks"], "mean"))
    print(f"{saved.path}: {numbers['steps']:,} steps a task, {numbers['episodes']} greedy episodes a task")
    print(f"{'task':<{width}}  modules  depth  entropy  multiply-adds saved  success")
    entropy, saving = numbers["entropy_bits"]["of_the_task"], numbers["multiply_adds"]["share_saved"]
    for k, task in enumerate(tasks):
        print(
            f"{task:<{width}}  {numbers['active_modules'][k]:7.2f}  {numbers['depth'][k]:5.2f}  {entropy[k]:7.2f}"
            f"  {saving[k]:19.0%}  {numbers['success'][k]:7.2f}"
        )
    for path in (*pictures, out / "routes.json"):
        print(f"{'picture' if path.suffix == '.png' else 'numbers'}    {path}")
    return 0
