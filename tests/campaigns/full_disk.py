"""A disk that fills up at any moment of a run: is it told in one line with the file, and is the run still there?

    python tests/campaigns/full_disk.py [--count 40] [--seed 0]

A tiny deterministic run writes to a disk (a tmpfs of its own, in a mount namespace: no privileges are needed where
users may make namespaces) on which a random number of bytes is free, or of files. It must end, or stop with one line
that says "No space left on device" and names a file of the run. Then space is made and the run goes on: it must come to
the undisturbed run's records and agent. An evaluation's JSON goes to the full disk too. The last line counts; exit
status 1 if anything was found, 2 if there can be no such disk here.
"""

import argparse
import dataclasses
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from campaigns.commands import Counts, Outcome, d2r, metrics

from d2r_fast.config_json import config_to_json
from d2r_fast.training.checkpoint import checkpoint_files, load_checkpoint

RUN = dataclasses.replace(tiny.RUN, deterministic=True, total_steps=40)
SIZE = 16 * 2**20  # bytes of the disk
PAGE = 4096


class FullDisk:
    def __init__(self, folder: Path, seed: int):
        self.counts, self.named = Counts(), Counter[str]()
        self._draw, self._disk = random.Random(seed), folder / "disk"
        self._config, self._whole = folder / "config.json", folder / "whole"
        self._config.write_text(config_to_json(RUN))
        assert d2r("train", self._config, "--run-dir", self._whole).code == 0
        files = [path for path in self._whole.rglob("*") if path.is_file()]
        # One checkpoint more is there while it replaces the oldest.
        largest = max(path.stat().st_size for path in files)
        self._needed = sum(-(-path.stat().st_size // PAGE) * PAGE for path in files) + largest
        self._files = len(files)
        self._disk.mkdir()

    def try_case(self, number: int) -> None:
        run_dir, what = self._disk / "run", f"case {number}"
        self.counts.tried += 1
        few_files = self._draw.random() < 0.2
        inodes = self._draw.randrange(3, self._files + 6) if few_files else 1000
        mount = ("mount", "-t", "tmpfs", "-o", f"size={SIZE},nr_inodes={inodes}", "tmpfs", str(self._disk))
        subprocess.run(mount, check=True)
        try:
            if not few_files:
                self._leave(self._draw.randrange(self._needed // PAGE) * PAGE)
            self._try_run(run_dir, what + (f", {inodes} files" if few_files else ""), few_files)
        except TimeoutError as error:
            self.counts.found("hangs", f"{what}: {error}")
        finally:
            subprocess.run(["umount", str(self._disk)], check=True)

    def _leave(self, n_bytes: int) -> None:
        """Fill the disk up but for so many bytes."""
        with (self._disk / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(self._disk).free - n_bytes)

    def _try_run(self, run_dir: Path, what: str, few_files: bool) -> None:
        outcome = d2r("train", self._config, "--run-dir", run_dir)
        if not self._told(outcome, what):
            return
        if checkpoint_files(run_dir) and not few_files:
            self._leave(0)
            result = self._disk / "result.json"
            told = d2r("eval", run_dir, "--episodes", 1, "--envs-per-task", 1, "--json", result)
            lines = [line for line in told.err if line.startswith("d2r ")]
            if not self._told(told._replace(err=lines), f"{what}, eval --json"):
                return
        subprocess.run(["mount", "-o", f"remount,size={2 * SIZE},nr_inodes=1000", str(self._disk)], check=True)
        (self._disk / "filler").unlink(missing_ok=True)
        begun = (run_dir / "config.json").exists()
        go_on = ("--resume", run_dir) if begun else (self._config, "--run-dir", run_dir)
        outcome = d2r("train", *go_on)
        if self.counts.fault(outcome, what):
            return
        if outcome.code != 0:
            self.counts.found("lost", f"{what}: with space again: {outcome.err}")
            return
        mine, whole = (load_checkpoint(checkpoint_files(d)[-1])["agent"] for d in (run_dir, self._whole))
        if metrics(run_dir) != metrics(self._whole) or not all(torch.equal(mine[n], v) for n, v in whole.items()):
            self.counts.found("lost", f"{what}: other records or another agent than the undisturbed run's")
        if list(run_dir.rglob("*.tmp")):
            self.counts.found("lost", f"{what}: unfinished files are left: {list(run_dir.rglob('*.tmp'))}")

    def _told(self, outcome: Outcome, what: str) -> bool:
        """Whether a command ended, or stopped with the one line that it should."""
        if self.counts.fault(outcome, what):
            return False
        if outcome.code == 0:
            self.named["no file: there was space enough"] += 1
            return True
        line = re.search(rf"No space left on device: '{self._disk}/(.*)'$", outcome.refusal)
        if line is None:
            self.counts.found(
                "silent", f"{what}: exit status {outcome.code}, not one line with the file: {outcome.err}"
            )
            return False
        self.named[re.sub(r"\d{3,}.*", "*", line[1])] += 1
        return True


def campaign(count: int, seed: int, folder: Path) -> FullDisk:
    """In a mount namespace; see `in_a_namespace`."""
    full = FullDisk(folder, seed)
    for number in range(count):
        full.try_case(number)
    return full


def in_a_namespace(*args: str) -> list[str]:
    """This program as a command that may mount. OSError: that cannot be here; the reason."""
    try:
        probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
        subprocess.run(probe, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        raise OSError(f"no disk of its own in a mount namespace here: {error.stderr.strip()}") from error
    return ["unshare", "-rm", sys.executable, __file__, "--inside", *args]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40, help="cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        try:
            return subprocess.run(in_a_namespace("--count", str(args.count), "--seed", str(args.seed))).returncode
        except OSError as error:
            print(f"full_disk: {error}", file=sys.stderr)
            return 2
    with tempfile.TemporaryDirectory() as folder:
        full = campaign(args.count, args.seed, Path(folder))
    print("named: " + ", ".join(f"{name} {count}" for name, count in full.named.most_common()))
    print(full.counts)
    return 0 if full.counts.clean else 1


if __name__ == "__main__":
    sys.exit(main())
