"""SIGKILL at random moments, most of them while a checkpoint is written: is the run that goes on the one undisturbed?

    python tests/campaigns/kills.py [--count 200] [--seed 0]

A tiny deterministic run is killed and resumed until it ends, again and again. Every second kill comes at a random
moment; the others as soon as an unfinished checkpoint is seen. After a kill every checkpoint that there is must be
whole; the resumed run must begin without a complaint; the finished one must have the undisturbed run's metrics and its
agent, bit for bit. The last line counts; exit status 1 if anything was found.
"""

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from campaigns.commands import PATIENCE, Command, Counts, d2r, same_run

from d2r_fast.config_json import config_to_json
from d2r_fast.training.checkpoint import checkpoint_files, load_checkpoint

RUN = dataclasses.replace(tiny.RUN, deterministic=True, total_steps=120, checkpoint_every_chunks=1)


class Kills:
    def __init__(self, folder: Path, seed: int):
        self.counts, self.in_a_write, self.finished = Counts(), 0, 0
        self._draw = random.Random(seed)
        self._folder, self._config = folder, folder / "config.json"
        self._config.write_text(config_to_json(RUN))
        self._whole = folder / "whole"
        outcome = d2r("train", self._config, "--run-dir", self._whole)
        assert outcome.code == 0, outcome
        self._seconds = outcome.seconds

    def try_run(self, n_kills: int) -> None:
        """Begin a run, kill it up to `n_kills` times, and let it end."""
        run_dir = self._folder / f"run-{self.finished}"
        for left in range(n_kills, -1, -1):
            begun = (run_dir / "config.json").exists()
            go_on = ("--resume", run_dir) if begun else (self._config, "--run-dir", run_dir)
            command = Command("train", *go_on)
            killed = left > 0 and self._kill(command, run_dir)
            try:
                outcome = command.wait(PATIENCE)
            except TimeoutError as error:
                self.counts.found("hangs", f"{run_dir.name}: {error}")
                return
            if not killed:
                self._check_end(run_dir, outcome)
                return
            self.counts.tried += 1
            self._check_files(run_dir)

    def _kill(self, command: Command, run_dir: Path) -> bool:
        """Kill the command at its moment; False if it ended before."""
        begin = time.monotonic()
        if self._draw.random() < 0.5:
            moment = begin + self._draw.uniform(0, self._seconds)
            while command.running and time.monotonic() < moment:
                time.sleep(0.001)
        else:
            writes, seen = self._draw.randrange(1, 8), False
            while command.running:
                unfinished = any((run_dir / "checkpoints").glob("*.tmp"))
                writes -= unfinished and not seen
                seen = unfinished
                if unfinished and writes == 0:
                    break
        if not command.running:
            return False
        command.kill()
        command_ended = time.monotonic() + PATIENCE
        while command.running and time.monotonic() < command_ended:
            time.sleep(0.001)
        self.in_a_write += any((run_dir / "checkpoints").glob("*.tmp"))
        return True

    def _check_files(self, run_dir: Path) -> None:
        for path in checkpoint_files(run_dir):
            try:
                load_checkpoint(path)
            except ValueError as error:
                self.counts.found("lost", f"kill {self.counts.tried}: {error}")

    def _check_end(self, run_dir: Path, outcome) -> None:
        what = f"{run_dir.name} after {self.counts.tried} kills"
        if self.counts.fault(outcome, what):
            return
        complaints = [line for line in outcome.err if "training begins again" not in line]
        if outcome.code != 0 or complaints:
            self.counts.found("lost", f"{what}: exit status {outcome.code}: {' / '.join(complaints)}")
            return
        if not same_run(run_dir, self._whole):
            self.counts.found("lost", f"{what}: not the run that was never killed")
        self.finished += 1


def campaign(count: int, seed: int, folder: Path) -> Kills:
    kills = Kills(folder, seed)
    while kills.counts.tried < count and kills.counts.clean:
        kills.try_run(min(count - kills.counts.tried, 8))
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=200, help="kills")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills = campaign(args.count, args.seed, Path(folder))
    print(f"{kills.finished} runs ended as the undisturbed one; {kills.in_a_write} kills in a checkpoint's write")
    print(kills.counts)
    return 0 if kills.counts.clean else 1


if __name__ == "__main__":
    sys.exit(main())
