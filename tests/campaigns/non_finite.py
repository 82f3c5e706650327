"""NaN and infinity in every number that a run holds or is given: is one ever saved, or passed over in silence?

    python tests/campaigns/non_finite.py [--count 100] [--seed 0] [--jobs 1]

Every case is a fresh tiny run, or a fresh checkpoint, with one number replaced: in what the simulations give (each
engine, training and evaluation), in the policy's actions and noise, in every tensor that an update changes (parameters,
targets, log alpha, route temperatures, both moments), in the replay and in an update's noise, at a moment of its own;
and in every tensor of a checkpoint that is then resumed and evaluated. A case is

told      one line that names what is not finite; every checkpoint on the disk is finite, the named one too
harmless  the run ended, and whatever it holds and saved is finite, its routes legal: the number was overwritten
silent    anything else

Without --count all of them, with it that many, drawn by the seed. The last line counts; exit status 1 if one was
silent, or a process that tried them died or hung.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny

from d2r_fast.cli import main as d2r
from d2r_fast.config import EnvConfig, EvalConfig, RunConfig
from d2r_fast.envs import EnvPoolEnvs, MixedEnvs, MultiTaskEnvs, make_envs
from d2r_fast.envs.official import OfficialEnvs
from d2r_fast.envs.official_worker import RESET, STEP
from d2r_fast.evaluation import play
from d2r_fast.learning import learner
from d2r_fast.learning.finite import first_not_finite
from d2r_fast.learning.update import Draws
from d2r_fast.nets.d2r import RouteChoice
from d2r_fast.training import trainer
from d2r_fast.training.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint
from d2r_fast.training.trainer import Trainer

VALUES = (np.nan, np.inf, -np.inf)
ENGINES = {"envpool": "reach,drawer-close", "official": "dial-turn", "mixed": "reach,dial-turn"}
GIVEN = ("first obs", "reward", "next_obs", "obs behind an end")
NOISE = ("acting noise", "acting gumbel", "action", "noise", "next_noise", "critics' gumbel", "critics' temperature")
TOLD = re.compile(r"(\bis|the simulation gave|gave the action) .*?\b(nan|inf)\b")
BATCH = 30  # cases a process
SECONDS_A_CASE = 60  # after which it counts as a hang, however slow the machine


class Case(NamedTuple):
    """Where a number goes wrong, and which."""

    kind: str  # engine, noise, learned, replay or checkpoint
    place: str
    value: float

    def __str__(self) -> str:
        return f"{self.kind}: {self.place} becomes {self.value}"


def tensors_of(
    state: dict[str, Any], path: tuple[str | int, ...] = ()
) -> Iterator[tuple[tuple[str | int, ...], Tensor]]:
    """The floating tensors of nested dicts and lists, and where they are."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in items:
        if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 0:
            yield (*path, key), value
        elif isinstance(value, dict | list):
            yield from tensors_of(value, (*path, key))


def all_cases(run_dir: Path) -> list[Case]:
    """Every place, found in a tiny run's own state, with every value."""
    run = Trainer(tiny.RUN, run_dir, show_progress=False)
    run.run()
    saved = load_checkpoint(checkpoint_files(run_dir)[-1])
    places = [
        *(("engine", f"{engine}, {where}, {field}") for engine in ENGINES for where in ("training", "evaluation")
          for field in GIVEN),
        *(("noise", name) for name in NOISE),
        *(("learned", name) for name in run.learner.tensors()),
        *(("replay", name) for name, value in run.replay.tensors().items() if value.is_floating_point()),
        *(("checkpoint", json.dumps(path)) for path, _ in tensors_of(saved)),
    ]  # fmt: skip
    return [Case(kind, place, value) for kind, place in places for value in VALUES]


def poison(tensor: Tensor, value: float, draw: random.Random) -> None:
    """One number of a tensor, or of its filled part."""
    flat = tensor.detach().view(-1)
    flat[draw.randrange(len(flat))] = value


class Given(NamedTuple):
    """A number that a simulation gives wrongly, from its `at_step`-th step on."""

    field: str
    value: float
    at_step: int

    def spoil_first(self, obs: np.ndarray, steps: int) -> None:
        """obs [n,39] begins an episode, `steps` steps after the simulation was made."""
        if self.field == ("first obs" if steps == 0 else "obs behind an end") and steps in (
            0,
            *range(self.at_step, 99),
        ):
            obs[-1, 7] = self.value

    def spoil_step(self, next_obs: np.ndarray, reward: np.ndarray, steps: int) -> None:
        if steps >= self.at_step and self.field == "reward":
            reward[-1] = self.value
        elif steps >= self.at_step and self.field == "next_obs":
            next_obs[-1, 7] = self.value


class SpoiledPool:
    """A pool of EnvPool's, between it and `EnvPoolEnvs`."""

    def __init__(self, pool: Any, given: Given):
        self._pool, self._given, self._steps = pool, given, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def recv(self, reset: bool = False) -> Any:
        obs, *rest = self._pool.recv(reset=reset)
        obs = obs.copy()
        if reset:
            self._given.spoil_first(obs, self._steps)
        else:
            self._steps += 1
            rest[0] = rest[0].copy()
            self._given.spoil_step(obs, rest[0], self._steps)
        return obs, *rest


def spoil_workers(envs: OfficialEnvs, task: int, given: Given) -> None:
    """Change what the workers leave in the memory that they share with `envs`."""
    rows = slice(task * envs.envs_per_task, (task + 1) * envs.envs_per_task)
    wait, command, shared = envs._wait, envs._command, envs._shared
    asked, steps = b"", 0

    def note(what: bytes) -> None:
        nonlocal asked
        asked = what
        command(what)

    def wait_and_spoil() -> None:
        nonlocal steps
        wait()
        if asked == STEP:
            steps += 1
            given.spoil_step(shared.next_obs[rows], shared.reward[rows], steps)
        if asked == RESET or (asked == STEP and shared.truncated[rows].all()):
            given.spoil_first(shared.obs[rows], steps)

    envs._command, envs._wait = note, wait_and_spoil  # type: ignore[method-assign]


def spoil_envs(envs: MultiTaskEnvs, task: str, given: Given) -> MultiTaskEnvs:
    """From here on a simulation gives the number, in the last environment of `task`."""
    parts = [part for part, _ in envs._parts] if isinstance(envs, MixedEnvs) else [envs]
    (part,) = [part for part in parts if task in part.tasks]
    at = part.tasks.index(task)
    if isinstance(part, EnvPoolEnvs):
        part._pools[at] = SpoiledPool(part._pools[at], given)
    else:
        assert isinstance(part, OfficialEnvs)
        spoil_workers(part, at, given)
    return envs


def config_for(case: Case, draw: random.Random) -> RunConfig:
    cfg = dataclasses.replace(tiny.RUN, overlap=draw.random() < 0.5)
    if case.kind != "engine":
        return dataclasses.replace(cfg, eval=EvalConfig(every_chunks=1000, episodes=1, envs_per_task=1))
    engine, where, field = case.place.split(", ")
    tasks = ENGINES[engine]
    return dataclasses.replace(
        cfg,
        env=EnvConfig(tasks=tasks, envs_per_task=2, episode_length=5),
        total_steps=40,
        batch_size=4 * len(tasks.split(",")),
        # Only there a run makes new environments for training, behind a checkpoint.
        deterministic=where == "training" and field == "first obs",
    )


class Spoiled:
    """A trainer with one number to go wrong, at a moment of `draw`; `struck` tells whether it did."""

    def __init__(self, case: Case, run: Trainer, draw: random.Random):
        self.case, self.run, self.draw = case, run, draw
        self.struck = False
        # Calls of `advance`: 4 of the warm-up, then 3 a chunk: take, learn, end. From the 7th on there are moments of
        # Adam's, up to the 19th another chunk is begun, before the 28th another update is made.
        self.moment = draw.randrange(7, 19 if case.place.startswith("act") else 28)
        self.stop = draw.random() < 0.5 and case.kind in ("learned", "replay")
        self._advance, self._calls = run.advance, 0
        run.advance = self.advance  # type: ignore[method-assign]

    def advance(self) -> None:
        self._calls += 1
        if self._calls == self.moment:
            self.strike()
            if self.stop:
                self.run._stop_requested = True
                return
        self._advance()

    def poison(self, tensor: Tensor) -> None:
        poison(tensor, self.case.value, self.draw)
        self.struck = True

    def strike(self) -> None:
        case, run, draw = self.case, self.run, self.draw
        if case.kind == "learned":
            self.poison(run.learner.tensors()[case.place])
        elif case.kind == "replay":
            task = draw.randrange(run.replay.n_tasks)
            self.poison(run.replay.tensors()[case.place][task, : run.replay.size])
        elif case.place.startswith("act"):
            self._spoil_acting()
        elif case.kind == "noise":
            self._spoil_update()

    def _spoil_acting(self) -> None:
        case, actor = self.case, self.run._collector._actor
        sample = actor.sample

        def spoiled(obs: Tensor, task: Tensor, noise: Tensor, choice: RouteChoice) -> Any:
            if case.place == "acting noise":
                self.poison(noise)
            elif case.place == "acting gumbel":
                assert choice.noise is not None
                self.poison(choice.noise)
            result = sample(obs, task, noise, choice)
            if case.place == "action":
                self.poison(result.action)
            return result

        actor.sample = spoiled  # type: ignore[method-assign]

    def _spoil_update(self) -> None:
        update, case = self.run.learner._one_update, self.case
        drawn = learner.draw

        def spoiled(*args: Any) -> Draws:
            draws = drawn(*args)
            noise, next_noise = draws.noise.chunk(2)
            where = {
                "noise": noise,
                "next_noise": next_noise,
                "critics' gumbel": draws.critic_choice.noise,
                "critics' temperature": draws.critic_choice.temperature,
            }[case.place]
            assert where is not None
            self.poison(where)
            return draws

        def once() -> None:
            with mock.patch.object(learner, "draw", spoiled):
                update()
            self.run.learner._one_update = update  # type: ignore[assignment]

        self.run.learner._one_update = once  # type: ignore[assignment]


@contextlib.contextmanager
def spoiled_engine(case: Case, task: str, draw: random.Random) -> Iterator[None]:
    """Environments made here for training, or for evaluation, give the number; in those of training, the first ones
    made start well."""
    _, where, field = case.place.split(", ")
    later = field == "first obs" and where == "training"
    given = Given(field, case.value, draw.randrange(1, 5) + (draw.randrange(15) if where == "training" else 0))
    module, made = (trainer if where == "training" else play), 0

    def make(*args: Any, **kwargs: Any) -> MultiTaskEnvs:
        nonlocal made
        made += 1
        envs = make_envs(*args, **kwargs)
        return envs if later and made == 1 else spoil_envs(envs, task, given)

    with mock.patch.object(module, "make_envs", make):
        yield


def legal(routes: Tensor) -> bool:
    """Whether every used slot [...,N,K] has a source below its route, none twice."""
    n_modules, k = routes.shape[-2:]
    for i in range(1, n_modules + 1):
        used = routes[..., i - 1, : min(k, i)].long()
        if (used >= i).any() or (used.sort(-1).values.diff(dim=-1) == 0).any():
            return False
    return True


def saved_badly(run_dir: Path) -> str | None:
    """What is not finite, or not legal, in a run's checkpoints."""
    for path in checkpoint_files(run_dir):
        state = load_checkpoint(path)
        bad = first_not_finite({str(at): value for at, value in tensors_of(state)})
        if bad is None and not legal(state["replay"]["rows"]["route"]):
            bad = "an illegal route"
        if bad is not None:
            return f"{path.name}: {bad}"
    return None


def try_run(case: Case, run_dir: Path, draw: random.Random) -> tuple[str, str]:
    """Train with the number going wrong at some moment; "told", "harmless" or "silent", and what happened."""
    cfg = config_for(case, draw)
    task = draw.choice(cfg.task_names)
    named = ""
    spoiling: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if case.kind == "engine":
        named = f"task {task}, environment {0 if 'evaluation' in case.place else 1}: the simulation gave {case.value}"
        spoiling = spoiled_engine(case, task, draw)
    try:
        with spoiling:
            run = Trainer(cfg, run_dir, show_progress=False)
            spoiled = Spoiled(case, run, draw)
            run.run()
    except FloatingPointError as error:
        message, files = str(error), checkpoint_files(run_dir)
        kept = f"{files[-1]} was saved before it" if files else "no checkpoint was saved before it"
        if (bad := saved_badly(run_dir)) is not None:
            return "silent", f"{message}, but saved: {bad}"
        if "\n" in message or not (TOLD.search(message) and named in message and message.endswith(kept)):
            return "silent", f"not a clear message: {message!r}"
        return "told", message
    bad = saved_badly(run_dir) or first_not_finite({**run.learner.tensors(), **run.replay.tensors()})
    if bad is not None:
        return "silent", f"the run ended, with {bad}"
    if case.kind == "engine" or not spoiled.struck:
        return "silent", "the number was not found, or never put there"
    return "harmless", "overwritten"


@lru_cache(maxsize=1)
def sound_run() -> tempfile.TemporaryDirectory[str]:
    """The directory of a short run, for as long as this process lives."""
    folder = tempfile.TemporaryDirectory(prefix="d2r-non-finite-")
    Trainer(dataclasses.replace(tiny.RUN, total_steps=20), Path(folder.name), show_progress=False).run()
    return folder


def try_checkpoint(case: Case, run_dir: Path, draw: random.Random) -> tuple[str, str]:
    """Resume and evaluate a checkpoint that holds the number: both must say so in a line."""
    shutil.copytree(sound_run().name, run_dir)
    state = load_checkpoint(checkpoint_files(run_dir)[-1])
    path = json.loads(case.place)
    ((_, tensor),) = [(at, value) for at, value in tensors_of(state) if list(at) == path]
    poison(tensor, case.value, draw)
    file = save_checkpoint(run_dir, state["steps"], state)
    commands = [["train", "--resume", str(run_dir), "--total-steps", "40"]]
    if path[0] == "agent":
        commands.append(["eval", str(file), "--episodes", "1", "--envs-per-task", "1"])
    for command in commands:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = d2r(command)
        lines = err.getvalue().splitlines()
        if status != 1 or len(lines) != 1 or not TOLD.search(lines[0]):
            return "silent", f"d2r {command[0]}: status {status}, {err.getvalue()!r}"
    return "told", lines[0]


def try_case(case: Case, seed: int) -> tuple[str, str]:
    """ "told", "harmless" or "silent", and the message or what went wrong."""
    draw = random.Random(f"{seed} {case}")
    with tempfile.TemporaryDirectory(prefix="d2r-non-finite-") as folder:
        try:
            run = try_checkpoint if case.kind == "checkpoint" else try_run
            return run(case, Path(folder) / "run", draw)
        except Exception:
            return "silent", traceback.format_exc()


def choose(count: int | None, seed: int) -> list[Case]:
    """All cases, or `count` of them; every kind is among them from 5 on."""
    with tempfile.TemporaryDirectory(prefix="d2r-non-finite-") as folder:
        cases = all_cases(Path(folder) / "run")
    if count is None:
        return cases
    random.Random(seed).shuffle(cases)
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    turns = (case for turn in zip_longest(*kinds.values()) for case in turn if case is not None)
    return list(islice(turns, count))


def try_batch(options: list[str], batch: tuple[int, int]) -> tuple[list[list[str]], tuple[str, str] | None]:
    """Some of the cases in a process of their own: case, outcome and what, of each; and how the process failed."""
    command = [sys.executable, __file__, *options, "--range", *map(str, batch)]
    failed = None
    with tempfile.TemporaryFile("w+") as output:  # a pipe's would be lost in a hang
        try:
            timeout = SECONDS_A_CASE * (batch[1] - batch[0])
            done = subprocess.run(command, stdout=output, stderr=subprocess.PIPE, text=True, timeout=timeout)
            if done.returncode != 0:
                failed = "crashes", f"exit status {done.returncode}: {done.stderr[-2000:]}"
        except subprocess.TimeoutExpired:
            failed = "hangs", f"over {timeout} s"
        output.seek(0)
        return [json.loads(line) for line in output if line.endswith("\n")], failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--range", type=int, nargs=2, help=argparse.SUPPRESS)  # of a process of its own
    args = parser.parse_args()
    torch.set_num_threads(1)
    cases = choose(args.count, args.seed)
    if args.range is not None:
        for case in cases[slice(*args.range)]:
            outcome, what = try_case(case, args.seed)
            print(json.dumps([str(case), outcome, what]), flush=True)
        return 0

    counts: Counter[str] = Counter()
    told: Counter[str] = Counter()
    options = ["--seed", str(args.seed), *([] if args.count is None else ["--count", str(args.count)])]
    batches = [(begin, min(begin + BATCH, len(cases))) for begin in range(0, len(cases), BATCH)]
    with ThreadPoolExecutor(args.jobs) as pool:
        for batch, (answers, ended) in zip(batches, pool.map(partial(try_batch, options), batches), strict=True):
            for case, outcome, what in answers:
                counts[outcome] += 1
                told[case.partition(":")[0] + " " + outcome] += 1
                if outcome == "silent":
                    print(f"{case}: {what}", flush=True)
            if ended is not None:
                counts[ended[0]] += 1
                print(f"{ended[0]}: case {batch[0] + len(answers)}: {ended[1]}", flush=True)
    for what, n in sorted(told.items()):
        print(f"{what}: {n}")
    bad = counts["silent"] + counts["crashes"] + counts["hangs"]
    print(
        f"tried {len(cases)}: told {counts['told']}, harmless {counts['harmless']}, silent {counts['silent']}, "
        f"crashes {counts['crashes']}, hangs {counts['hangs']}"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
