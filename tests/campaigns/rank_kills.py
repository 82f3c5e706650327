"""SIGKILL to random ranks of a run at random moments: do all others end in time, and does the run go on from there?

    python tests/campaigns/rank_kills.py [--count 20] [--ranks 2] [--seed 0]

A tiny deterministic run of several ranks is killed and resumed until it ends, again and again. After a kill the other
ranks must end within 30 seconds, with one line that names the one that is gone; every checkpoint that there is must be
whole, with all ranks' shares; the run that goes on must end with the metrics and the agent of one that was never
killed. The last line counts; exit status 1 if anything was found.
"""

import argparse
import dataclasses
import os
import random
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from campaigns.commands import PATIENCE, Command, Counts, Outcome, same_run

from d2r_fast.config_json import config_to_json
from d2r_fast.training.checkpoint import checkpoint_files
from d2r_fast.training.saved_run import read_saved_run

RUN = dataclasses.replace(
    tiny.RUN,
    deterministic=True,
    total_steps=400,
    checkpoint_every_chunks=5,
    eval=dataclasses.replace(tiny.RUN.eval, every_chunks=20),
)
ENDED_WITHIN = 30.0  # seconds


def be_rank(rank: int, count: int, port: int) -> None:
    """What a launcher sets."""
    os.environ |= {"RANK": f"{rank}", "WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": f"{port}"}


def start_ranks(count: int, *args: object, before: Callable[[int, int, int], None] = be_rank) -> list[Command]:
    """`d2r` with these arguments as each of `count` ranks."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return [Command(*args, before=before, arguments=(rank, count, port)) for rank in range(count)]


def end_of(ranks: list[Command]) -> list[Outcome]:
    """How they ended. TimeoutError: they did not."""
    return [rank.wait(PATIENCE) for rank in ranks]


class RankKills:
    def __init__(self, folder: Path, n_ranks: int, seed: int):
        self.counts, self.finished, self.longest = Counts(), 0, 0.0
        self._draw, self._n_ranks, self._folder = random.Random(seed), n_ranks, folder
        self._config = folder / "config.json"
        self._config.write_text(config_to_json(RUN))
        self._whole = folder / "whole"
        outcomes = end_of(start_ranks(n_ranks, "train", self._config, "--run-dir", self._whole))
        assert [o.code for o in outcomes] == [0] * n_ranks, outcomes
        self._seconds = outcomes[0].seconds

    def try_run(self, n_kills: int) -> None:
        """Begin a run, kill it up to `n_kills` times, and let it end."""
        run_dir = self._folder / f"run-{self.finished}"
        for left in range(n_kills, -1, -1):
            begun = (run_dir / "config.json").exists()
            go_on = ("--resume", run_dir) if begun else (self._config, "--run-dir", run_dir)
            ranks = start_ranks(self._n_ranks, "train", *go_on)
            killed = self._kill(ranks) if left > 0 else None
            begin = time.monotonic()
            try:
                outcomes = end_of(ranks)
            except TimeoutError as error:
                self.counts.found("hangs", f"{run_dir.name}: {error}")
                return
            if killed is None:
                self._check_end(run_dir, outcomes)
                return
            self.counts.tried += 1
            self._check_kill(run_dir, outcomes, killed, time.monotonic() - begin)

    def _kill(self, ranks: list[Command]) -> int | None:
        """Kill one at its moment, returning which; None if all had ended before."""
        moment = time.monotonic() + self._draw.uniform(0, self._seconds)
        while ranks[0].running and time.monotonic() < moment:
            time.sleep(0.001)
        which = self._draw.randrange(self._n_ranks)
        if not all(rank.running for rank in ranks):
            return None
        ranks[which].kill()
        return which

    def _check_kill(self, run_dir: Path, outcomes: list[Outcome], killed: int, seconds: float) -> None:
        what = f"kill {self.counts.tried}, of rank {killed}"
        self.longest = max(self.longest, seconds)
        if seconds > ENDED_WITHIN:
            self.counts.found("hangs", f"{what}: the others ended after {seconds:.0f} s")
        others = [outcome for rank, outcome in enumerate(outcomes) if rank != killed]
        if any(outcome.code == 0 for outcome in others):
            return  # the run was at its end
        name = f"rank {killed} of {self._n_ranks}"
        told = [line for outcome in others for line in outcome.err if line.startswith("d2r train: ") and name in line]
        if len(told) != 1:
            self.counts.found("silent", f"{what}: expected one line that names it, got {[o.err for o in others]}")
        if checkpoint_files(run_dir):
            try:
                found = read_saved_run(run_dir, with_shares=True)
                if found.passed_over:
                    self.counts.found("lost", f"{what}: {found.passed_over}")
            except ValueError as error:
                self.counts.found("lost", f"{what}: {error}")

    def _check_end(self, run_dir: Path, outcomes: list[Outcome]) -> None:
        what = f"{run_dir.name} after {self.counts.tried} kills"
        if any([self.counts.fault(outcome, what) for outcome in outcomes]):
            return
        if any(outcome.code != 0 for outcome in outcomes):
            self.counts.found("lost", f"{what}: {outcomes}")
            return
        if not same_run(run_dir, self._whole):
            self.counts.found("lost", f"{what}: not the run that was never killed")
        self.finished += 1


def campaign(count: int, n_ranks: int, seed: int, folder: Path) -> RankKills:
    kills = RankKills(folder, n_ranks, seed)
    while kills.counts.tried < count and kills.counts.clean:
        kills.try_run(min(count - kills.counts.tried, 4))
    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="kills")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills = campaign(args.count, args.ranks, args.seed, Path(folder))
    print(f"{kills.finished} runs ended as the undisturbed one")
    print(f"all other ranks ended within {kills.longest:.1f} s of a kill")
    print(kills.counts)
    return 0 if kills.counts.clean else 1


if __name__ == "__main__":
    sys.exit(main())
