"""A sweep's folder: a folder a run, `sweep.json`, what each run was told (`configs/`) and what it said (`logs/`).

How far a run has come is read from its own folder. `sweep.json` adds what cannot be seen there: that a run failed, and
that it is finished even if its checkpoints are removed later.
"""

import dataclasses
import json
import uuid
from pathlib import Path
from typing import Any

from d2r_fast.config_json import config_to_json, read_config
from d2r_fast.host.files import whole_file
from d2r_fast.sweeps.plan import PlannedRun
from d2r_fast.training.checkpoint import checkpoint_files, checkpoint_path

FILE = "sweep.json"


@dataclasses.dataclass
class SweepRun:
    """A run as sweep.json holds it; `failure` says why it failed."""

    name: str
    finished: bool = False
    failure: str | None = None


@dataclasses.dataclass
class Sweep:
    """All runs of a sweep, each with `cpus` cores and `gpus` GPUs, which may be a share of one.

    command  what was typed behind `d2r sweep`, for whoever reads the file
    """

    folder: Path
    id: str
    command: list[str]
    cpus: int
    gpus: float
    runs: list[SweepRun]

    def run_dir(self, name: str) -> Path:
        return self.folder / name

    def config(self, name: str) -> Path:
        return self.folder / "configs" / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def save(self) -> None:
        """Write sweep.json, whole or not at all. OSError, naming it."""
        content = {
            "id": self.id,
            "command": self.command,
            "cpus": self.cpus,
            "gpus": self.gpus,
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }
        with whole_file(self.folder / FILE) as file:
            file.write((json.dumps(content, indent=2) + "\n").encode())

    def begun(self, name: str) -> bool:
        """Whether there is something that `d2r train --resume` goes on from, or says why it cannot."""
        run_dir = self.run_dir(name)
        return (run_dir / "config.json").exists() or bool(checkpoint_files(run_dir))

    def train_args(self, name: str) -> list[str]:
        """The arguments of the `d2r` that begins the run, or goes on with it."""
        if self.begun(name):
            return ["train", "--resume", str(self.run_dir(name))]
        return ["train", str(self.config(name)), "--run-dir", str(self.run_dir(name))]

    def has_ended(self, name: str) -> bool:
        """Whether a run's folder has the checkpoint after its last step."""
        cfg = read_config(self.config(name))
        return checkpoint_path(self.run_dir(name), cfg.warmup_steps + cfg.total_steps).exists()

    def note_finished(self) -> None:
        """Take down what has ended since sweep.json was written, as where the sweep itself was killed."""
        for run in self.runs:
            if run.failure is None and self.has_ended(run.name):
                run.finished = True

    def to_do(self, retry_failed: bool) -> list[SweepRun]:
        """Runs to begin or to go on with: none that is finished, those that failed only with `retry_failed`."""
        return [run for run in self.runs if not run.finished and (retry_failed or run.failure is None)]


def require_free(folder: Path) -> None:
    """FileExistsError: there is something in `folder`."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"--out: {folder} exists and is not empty; to go on with a sweep: --resume {folder}")


def create_sweep(folder: Path, command: list[str], cpus: int, gpus: float, planned: list[PlannedRun]) -> Sweep:
    """Make the folder of a new sweep. FileExistsError: it is there and not empty. OSError."""
    require_free(folder)
    sweep = Sweep(folder.resolve(), uuid.uuid4().hex, command, cpus, gpus, [SweepRun(run.name) for run in planned])
    for part in ("configs", "logs"):
        (sweep.folder / part).mkdir(parents=True)
    for run in planned:
        sweep.config(run.name).write_text(config_to_json(run.cfg), encoding="utf-8")
    sweep.save()
    return sweep


def read_sweep(folder: Path) -> Sweep:
    """A sweep to go on with. ValueError: `folder` is none, or its sweep.json or a configuration is damaged. OSError."""
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"--resume: expected the folder of a sweep, got {folder}, which has no {FILE}")
    try:
        sweep = _structure(folder.resolve(), json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: expected what d2r sweep writes, got something else: {error!r:.120}") from error
    for run in sweep.runs:
        read_config(sweep.config(run.name))
    return sweep


def _structure(folder: Path, content: Any) -> Sweep:
    runs = [SweepRun(**run) for run in content["runs"]]
    for run in runs:
        if not isinstance(run.name, str) or Path(run.name).name != run.name or type(run.finished) is not bool:
            raise ValueError(run)
        if run.failure is not None and not isinstance(run.failure, str):
            raise ValueError(run)
    cpus, gpus = content["cpus"], content["gpus"]
    if not runs or not isinstance(content["id"], str) or type(cpus) is not int or type(gpus) not in (int, float):
        raise ValueError(content)
    return Sweep(folder, content["id"], list(content["command"]), cpus, gpus, runs)
