"""`d2r fidelity`: our environments against the official package."""

import dataclasses
import json
import shlex
from pathlib import Path

import tyro

from d2r_fast.commands.output import check_output, write_output
from d2r_fast.envs import parse_tasks
from d2r_fast.envs.fidelity_table import EngineChoice
from d2r_fast.evaluation.fidelity import run_fidelity


@dataclasses.dataclass(frozen=True)
class FidelityArgs:
    """Compare our environments with the official package: scripted experts, consecutive episodes, paired starts.

    All 50 tasks take six to ten minutes on two cores. The exit status is 0 if every task agrees.
    """

    tasks: str = "MT50"
    """MT10, MT25, MT50, MT1-<task>, or a comma-separated list."""
    episodes: int = 3
    """Consecutive episodes in each environment; at least 2, since drift shows from the second on."""
    engine: EngineChoice = "auto"
    """What to compare: the engine that the fidelity table names for each task, or one for all."""
    envs_per_task: int = 6
    """Environments a task: with the episodes, the pairs that a verdict rests on."""
    seed: int = 0
    """Seeds the goals."""
    json: Path | None = None
    """Write the report here as JSON."""
    markdown: Path | None = None
    """Write the printed table here."""


def run(args: list[str]) -> int:
    """Print the report, write it where asked; 0 if every task agrees. ValueError, OSError: as `d2r eval`."""
    wanted = tyro.cli(FidelityArgs, prog="d2r fidelity", args=args)
    check_output(wanted.json)
    check_output(wanted.markdown)
    report = run_fidelity(
        parse_tasks(wanted.tasks),
        wanted.episodes,
        wanted.engine,
        wanted.envs_per_task,
        seed=wanted.seed,
        show_progress=True,
    )
    command = shlex.join(["d2r", "fidelity", *args])
    text = f"{report.markdown()}\nMade by `{command}`.\n"
    print(text)
    if wanted.json is not None:
        record = {"command": command} | report.as_dict()
        write_output(wanted.json, json.dumps(record, indent=2) + "\n")
    if wanted.markdown is not None:
        write_output(wanted.markdown, text)
    return 0 if report.ok else 1
