"""Damaged files of a run: is each refused in one line that names it, or passed over with a warning and nothing lost?

    python tests/campaigns/damaged_files.py [--count 300] [--seed 0]

A case damages one file of a tiny run that was stopped half way: bits flipped, cut off, blocks of zeros, noise or
bytes twice, emptied, removed, swapped for another run's or another file of this run; and in checkpoints also fields
of wrong types behind a right checksum. Then a command reads it: `train --resume` of the run or of the checkpoint,
`eval` of either, or `train` from the configuration. It must either refuse with one line that names the file and leave
everything as it was, or go on with a line that names it and come to the undisturbed run's records and agent. A damage
that the command does not read, or that makes a configuration into another one, may pass. The last line counts; exit
status 1 if anything was found.
"""

import argparse
import dataclasses
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from campaigns.commands import Counts, Outcome, d2r, metrics

from d2r_fast.config_json import config_to_json, read_config
from d2r_fast.training.checkpoint import checkpoint_files, load_checkpoint, save_checkpoint

RUN = dataclasses.replace(tiny.RUN, deterministic=True, total_steps=40)
STOPPED = 40  # of 60 steps: the newest checkpoint; metrics.jsonl goes on to 60, as after a kill


class Case(NamedTuple):
    file: str  # within the run directory
    damage: str
    command: str
    where: str


COMMANDS = {
    "newest": ("resume run", "resume file", "eval run", "eval file"),
    "earlier": ("resume file", "eval file"),
    "metrics.jsonl": ("resume run",),
    "config.json": ("resume run", "train"),
    "run_id": ("resume run", "eval run"),
}
DAMAGES = ("bit", "bits", "cut", "zeros", "noise", "repeat", "longer", "empty", "missing", "other run", "other file")
WRONG = (None, "x", 1.5, -1, 10**30, [], {}, [{}], torch.ones(3), torch.ones(2, 2, dtype=torch.int16))


class DamagedFiles:
    def __init__(self, folder: Path, seed: int):
        self.counts, self.ended = Counts(), Counter[str]()
        self._draw, self._folder = random.Random(seed), folder
        self._whole, self._other = (self._train(name, s) for name, s in (("whole", 0), ("other", 1)))
        self._results = {path.name: self._evaluate(path).read_text() for path in checkpoint_files(self._whole)}
        self._stopped = shutil.copytree(self._whole, folder / "stopped")
        checkpoint_files(self._stopped)[-1].unlink()

    def _train(self, name: str, seed: int) -> Path:
        config = self._folder / f"{name}.json"
        config.write_text(config_to_json(dataclasses.replace(RUN, seed=seed)))
        outcome = d2r("train", config, "--run-dir", self._folder / name)
        assert outcome.code == 0, outcome
        return self._folder / name

    def _evaluate(self, path: Path) -> Path:
        result = self._folder / "result.json"
        outcome = d2r("eval", path, "--episodes", 1, "--envs-per-task", 1, "--json", result)
        assert outcome.code == 0, outcome
        return result

    def try_case(self, number: int) -> None:
        file = self._draw.choice([*COMMANDS, "newest", "earlier"])  # checkpoints are most of it
        command = self._draw.choice(COMMANDS[file])
        damage = self._draw.choice([*DAMAGES, "field", "field", "field"] if file in ("newest", "earlier") else DAMAGES)
        run_dir = shutil.copytree(self._stopped, self._folder / f"case-{number}")
        earlier, newest = checkpoint_files(run_dir)
        path = {"newest": newest, "earlier": earlier}.get(file, run_dir / file)
        what = f"case {number}: {command} after {damage} in {file}"
        self.counts.tried += 1
        where = self._damage(path, damage)
        what += where
        before = self._contents(run_dir)
        try:
            outcome = self._run(command, run_dir, path)
        except TimeoutError as error:
            self.counts.found("hangs", f"{what}: {error}")
            return
        if not self.counts.fault(outcome, what):
            kind, problem = self._judge(Case(file, damage, command, where), outcome, run_dir, path, before)
            if problem:
                self.counts.found(kind, f"{what}: {problem}")
            else:
                self.ended[kind] += 1
        shutil.rmtree(run_dir)

    def _run(self, command: str, run_dir: Path, path: Path) -> Outcome:
        if command == "train":
            return d2r("train", path, "--run-dir", run_dir / "again")
        what = run_dir if command.endswith("run") else path
        if command.startswith("resume"):
            return d2r("train", "--resume", what)
        return d2r("eval", what, "--episodes", 1, "--envs-per-task", 1, "--json", self._folder / "result.json")

    def _judge(self, case: Case, outcome: Outcome, run_dir: Path, path: Path, before: dict) -> tuple[str, str]:
        """How it ended, and what is wrong with that; or which of the counts it goes to, and why."""
        told = [line for line in outcome.err if path.name in line or str(path) in line]
        if outcome.code != 0:
            if not outcome.refusal or not told:
                return "silent", f"exit status {outcome.code}, not one line that names {path.name}: {outcome.err}"
            same = self._contents(run_dir) == before
            return ("refused", "") if same else ("lost", "refused, but the directory has changed")
        if case.command == "train":
            same = read_config(run_dir / "again" / "config.json") == read_config(path)
            return ("another configuration", "") if same else ("silent", "not the configuration in the file")
        if case.command.startswith("eval"):
            result = json.loads((self._folder / "result.json").read_text())
            name = Path(result["checkpoint"]).name
            known = json.loads(self._results[name])
            same = all(result[key] == known[key] for key in ("steps", "success", "episode_return"))
            if not same:
                return "lost", f"another result than that of {name}"
        elif problem := self._unlike_whole(
            run_dir, from_steps=STOPPED if case[:2] == ("metrics.jsonl", "missing") else 0
        ):
            return "lost", problem
        if told:
            return "went on with a warning", ""
        if case[:2] == ("newest", "missing"):
            return "went on from the checkpoint before", ""  # as a run that was killed before it saved this one
        if case.command.startswith("eval") and self._unread(case):
            return "not read", ""
        return "silent", "went on without a word"

    def _unread(self, case: Case) -> bool:
        """Whether an evaluation does without what was damaged: all of a checkpoint but these, and a lost identity."""
        if case.damage == "field":
            return not case.where.startswith((", config", ", steps", ", agent", ", run_id", ", format"))
        return case.file == "run_id" and case.damage in ("empty", "missing")

    def _unlike_whole(self, run_dir: Path, from_steps: int) -> str:
        if metrics(run_dir) != [record for record in metrics(self._whole) if record["steps"] > from_steps]:
            return "other records than the undisturbed run's"
        mine, whole = (load_checkpoint(checkpoint_files(d)[-1])["agent"] for d in (run_dir, self._whole))
        same = all(torch.equal(mine[name], value) for name, value in whole.items())
        return "" if same else "another agent than the undisturbed run's"

    def _contents(self, run_dir: Path) -> dict[str, bytes]:
        return {str(path.relative_to(run_dir)): path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}

    def _damage(self, path: Path, damage: str) -> str:
        """Do it; returns where, for the message."""
        draw = self._draw
        if damage == "field":
            return self._damage_field(path)
        if damage == "missing":
            path.unlink()
            return ""
        if damage == "other run":
            shutil.copy(self._other / path.relative_to(path.parents[1] if path.suffix == ".pt" else path.parent), path)
            return ""
        data = bytearray(path.read_bytes())
        # Of metrics.jsonl only what the checkpoint knows: the rest is dropped by a resume anyway.
        size = (
            load_checkpoint(checkpoint_files(path.parent)[-1])["metrics_length"]
            if path.suffix == ".jsonl"
            else len(data)
        )
        if path.name == "run_id":
            size = 32  # behind the identity stands who holds the directory, which nobody relies on
        at, length = draw.randrange(size), draw.choice((1, 16, 512, 4096))
        end = min(at + length, size)
        if damage in ("bit", "bits"):
            for _ in range(1 if damage == "bit" else 8):
                data[draw.randrange(size)] ^= 1 << draw.randrange(8)
        elif damage == "cut":
            del data[at:]
        elif damage == "zeros":
            data[at:end] = bytes(end - at)
        elif damage == "noise":
            data[at:end] = draw.randbytes(end - at)
        elif damage == "repeat":
            data[:0] = data[at:end]
        elif damage == "longer":
            data += draw.randbytes(length) if path.suffix == ".pt" else b""
            data[:0] = b"" if path.suffix == ".pt" else draw.randbytes(length)
        elif damage == "empty":
            data.clear()
        elif damage == "other file":
            others = [p for p in path.parent.iterdir() if p.is_file() and p != path]
            data = bytearray(draw.choice(others).read_bytes())
        if data == path.read_bytes():
            return self._damage(path, "bit")  # it was like that before
        path.write_bytes(data)
        return f" at byte {at}"

    def _damage_field(self, path: Path) -> str:
        """A value of another type somewhere in a checkpoint, or none, and a right checksum."""
        state = load_checkpoint(path)
        steps, places = state["steps"], list(_places(state))
        keys, container = self._draw.choice(places)
        key, old = keys[-1], container[keys[-1]]
        value = self._draw.choice([value for value in WRONG if type(value) is not type(old)])
        if isinstance(container, dict) and self._draw.random() < 0.3:
            del container[key]
            value = "missing"
        else:
            container[key] = value
        save_checkpoint(path.parents[1], steps, state)
        return f", {'.'.join(map(str, keys))} = {value}"


def _places(state: Any, keys: tuple = ()) -> Any:
    """(keys that lead to it, what holds it) of every value that a checkpoint's reader reads."""
    items = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in list(items):
        here = (*keys, key)
        if here != ("format",) and here[0] != "collected":
            yield here, state
        if isinstance(value, dict | list) and here[0] != "collected":
            yield from _places(value, here)


def campaign(count: int, seed: int, folder: Path) -> DamagedFiles:
    damaged = DamagedFiles(folder, seed)
    for number in range(count):
        damaged.try_case(number)
    return damaged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        damaged = campaign(args.count, args.seed, Path(folder))
    print(", ".join(f"{kind} {count}" for kind, count in damaged.ended.most_common()))
    print(damaged.counts)
    return 0 if damaged.counts.clean else 1


if __name__ == "__main__":
    sys.exit(main())
