"""Two processes in one run directory: does one of them train and the other leave at once, whatever the moment?

    python tests/campaigns/two_at_once.py [--count 30] [--seed 0]

Each case is one of three. "begin": two that begin a run in one directory. "resume": two that go on with one. "killed":
while one trains another is refused, the first is killed, and the next goes on. The one that is left must come to the
undisturbed run's records, and every other must end with one line that says why. The last line counts; exit status 1 if
anything was found.
"""

import argparse
import dataclasses
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from campaigns.commands import PATIENCE, Command, Counts, d2r, metrics

from d2r_fast.config_json import config_to_json
from d2r_fast.training.checkpoint import checkpoint_files

RUN = dataclasses.replace(tiny.RUN, deterministic=True, total_steps=80)
# What the one that leaves may say.
REFUSALS = (
    "trains here",
    "exists and is not empty; to go on from it",
    "has the checkpoints of a run; to go on from it",
)


class TwoAtOnce:
    def __init__(self, folder: Path, seed: int):
        self.counts, self.said = Counts(), Counter[str]()
        self._draw, self._folder = random.Random(seed), folder
        self._config, self._whole = folder / "config.json", folder / "whole"
        self._config.write_text(config_to_json(RUN))
        assert d2r("train", self._config, "--run-dir", self._whole).code == 0
        self._stopped = shutil.copytree(self._whole, folder / "stopped")
        for path in checkpoint_files(self._stopped)[1:]:
            path.unlink()

    def try_case(self, number: int) -> None:
        kind = self._draw.choice(("begin", "resume", "killed"))
        run_dir, what = self._folder / f"case-{number}", f"case {number}, {kind}"
        self.counts.tried += 1
        command: tuple[object, ...] = ("train", self._config, "--run-dir", run_dir)
        if kind != "begin":
            shutil.copytree(self._stopped, run_dir)
            command = ("train", "--resume", run_dir)
        try:
            if kind == "killed":
                self._kill_the_first(command, run_dir, what)
            else:
                first = Command(*command)
                time.sleep(self._draw.choice((0, self._draw.uniform(0, 0.3))))
                self._one_trains([first, Command(*command)], what)
        except TimeoutError as error:
            self.counts.found("hangs", f"{what}: {error}")
            return
        if metrics(run_dir) != metrics(self._whole):
            self.counts.found("lost", f"{what}: other records than the undisturbed run's")
        shutil.rmtree(run_dir)

    def _one_trains(self, commands: list[Command], what: str) -> None:
        outcomes = [command.wait() for command in commands]
        if any([self.counts.fault(outcome, what) for outcome in outcomes]):
            return
        ended = [outcome for outcome in outcomes if outcome.code == 0]
        refused = [reason for outcome in outcomes for reason in REFUSALS if reason in outcome.refusal]
        self.said.update(refused)
        if (len(ended), len(refused)) != (1, 1):
            self.counts.found("silent", f"{what}: {[(outcome.code, outcome.err) for outcome in outcomes]}")

    def _kill_the_first(self, command: tuple[object, ...], run_dir: Path, what: str) -> None:
        first, deadline = Command(*command), time.monotonic() + PATIENCE
        while f"process {first.pid} on" not in (run_dir / "run_id").read_text():
            if time.monotonic() > deadline:
                raise TimeoutError("hang: the directory is not held")
            time.sleep(0.001)
        second = d2r(*command)
        first.kill()
        first.wait()
        if not self.counts.fault(second, what):
            if f"process {first.pid} on" not in second.refusal:
                self.counts.found("silent", f"{what}: expected a line that names process {first.pid}: {second.err}")
            self.said["trains here"] += 1
        third = d2r(*command)
        if not self.counts.fault(third, what) and third.code != 0:
            self.counts.found("lost", f"{what}: after the kill: {third.err}")


def campaign(count: int, seed: int, folder: Path) -> TwoAtOnce:
    two = TwoAtOnce(folder, seed)
    for number in range(count):
        two.try_case(number)
    return two


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=30, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        two = campaign(args.count, args.seed, Path(folder))
    print("refused: " + ", ".join(f"{count} with {reason!r}" for reason, count in two.said.most_common()))
    print(two.counts)
    return 0 if two.counts.clean else 1


if __name__ == "__main__":
    sys.exit(main())
