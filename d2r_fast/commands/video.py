"""`d2r video`: a saved agent's greedy episodes on the official environments, as an mp4 or a GIF."""

import dataclasses
import sys
from pathlib import Path

import torch
import tyro
from tqdm import tqdm

from d2r_fast.analysis.video import check_encoder, frames, picture_size, write_video
from d2r_fast.commands.output import check_output
from d2r_fast.envs.metaworld import parse_tasks, usable_cores
from d2r_fast.evaluation.film import Camera, WatchedPolicy, choose_renderer, film
from d2r_fast.training.agents import load_agent, make_agent
from d2r_fast.training.checkpoint import located
from d2r_fast.training.saved_run import read_saved_run
from d2r_fast.training.seeds import EVAL_COMMAND, stream_seed


@dataclasses.dataclass(frozen=True)
class VideoArgs:
    """Film a saved agent on Meta-World's own environments: greedy routes, mean action, a grid of tasks, each with its
    step, whether it has succeeded, and a square a module, filled while the module runs. Needs no display."""

    run: tyro.conf.Positional[Path]
    """A run directory (its newest checkpoint) or a checkpoint file."""
    tasks: str | None = None
    """Some of the run's tasks, as a comma-separated list; by default all."""
    episodes: int = 1
    """Episodes of each task, one after the other."""
    steps: int | None = None
    """Steps an episode, at most 500; by default the run's."""
    every: int = 2
    """Steps a picture."""
    fps: float = 20.0
    """Pictures a second; 20 of every second step is half the pace of the simulated time."""
    size: int | None = None
    """Pixels a side of a task's picture, 64 to 480; by default what suits their number."""
    camera: Camera = "corner4"
    """The scenes' camera."""
    seed: int = 0
    """Seeds the goals."""
    out: Path | None = None
    """An .mp4 or .gif; by default RUN/video.mp4, or beside the checkpoint file."""


def run(args: list[str]) -> int:
    """Write the video and print where it is. ValueError: options out of range. ImportError: no renderer or encoder."""
    wanted = tyro.cli(VideoArgs, prog="d2r video", args=args)
    for name, low, high in (("episodes", 1, 1000), ("steps", 1, 500), ("every", 1, 500), ("size", 64, 480)):
        value = getattr(wanted, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name}: expected {low}..{high}, got {value}")
    if not 1 <= wanted.fps <= 120:
        raise ValueError(f"--fps: expected 1..120, got {wanted.fps}")
    if not 0 <= wanted.seed < 2**31 - 50:
        raise ValueError(f"--seed: expected 0..2**31-51, got {wanted.seed}")
    saved = read_saved_run(wanted.run)
    for error in saved.passed_over.values():
        print(f"d2r video: {error}; filming {saved.path.name}", file=sys.stderr)
    cfg, known = saved.cfg, saved.cfg.task_names
    tasks = known if wanted.tasks is None else parse_tasks(wanted.tasks)
    if unknown := [task for task in tasks if task not in known]:
        raise ValueError(f"--tasks: expected tasks of the run ({', '.join(known)}), got {', '.join(unknown)}")
    out = wanted.out or (wanted.run if wanted.run.is_dir() else wanted.run.parent) / "video.mp4"
    check_encoder(out)
    check_output(out)
    choose_renderer()
    agent = make_agent(cfg, torch.device("cpu"))
    with located(saved.path):
        load_agent(agent, saved.state)
    with tqdm(total=len(tasks), unit="task", desc="film", mininterval=0.5 if sys.stderr.isatty() else 30) as bar:
        shots = film(
            WatchedPolicy(agent.actor),
            known,
            [known.index(task) for task in tasks],
            wanted.episodes,
            wanted.steps or cfg.env.episode_length,
            cfg.env.goals,
            stream_seed(wanted.seed, EVAL_COMMAND),
            wanted.size or picture_size(len(tasks)),
            wanted.every,
            wanted.camera,
            usable_cores(),
            bar.update,
        )
    write_video(out, frames(tasks, shots), wanted.fps)
    length = wanted.steps or cfg.env.episode_length
    for task, shot in zip(tasks, shots, strict=True):
        print(f"{task:<26} {shot.success[shot.step == length].sum()} of {wanted.episodes} episodes succeed")
    seconds = len(shots[0].picture) / wanted.fps
    print(f"video      {out} ({seconds:.1f} s, {out.stat().st_size / 2**20:.1f} MiB)")
    return 0
