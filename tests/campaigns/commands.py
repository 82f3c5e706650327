"""`d2r` commands in processes of their own, and what a campaign counts.

The processes are forks of one that has imported everything, so that a command starts at once and not after seconds.
"""

import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["d2r_fast.commands.train", "d2r_fast.commands.eval"])

PATIENCE = 900.0
"""Seconds after which a command of a second hangs, also where others use the machine."""


class Outcome(NamedTuple):
    """How a command ended."""

    code: int  # exit status; negative: the signal that ended it
    out: str
    err: list[str]  # lines of standard error, but for progress bars
    seconds: float

    @property
    def fault(self) -> str:
        """What no command may do, whatever it is given: crash, hang, a traceback. "" if it did not."""
        if self.code < 0:
            return f"crash: ended by signal {-self.code}: {' / '.join(self.err[-3:])}"
        if any("Traceback" in line for line in self.err):
            return f"crash: traceback: {self.err[-1]}"
        return ""

    @property
    def refusal(self) -> str:
        """The one line with which the command refused; "" if it did not, or in more or fewer lines."""
        return self.err[0] if self.code == 1 and len(self.err) == 1 else ""


class Command:
    """A `d2r` command under way. before: called in its process first, with `arguments`."""

    def __init__(self, *args: object, before: Callable[..., None] | None = None, arguments: tuple[Any, ...] = ()):
        self._folder = tempfile.TemporaryDirectory()
        self._begin = time.monotonic()
        target = (self._folder.name, [str(arg) for arg in args], before, arguments)
        self._process = _context.Process(target=_run, args=target, daemon=True)
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float = PATIENCE) -> Outcome:
        """TimeoutError, and it is killed: it did not end."""
        self._process.join(seconds)
        if self._process.is_alive():
            self.kill()
            self._process.join()
            raise TimeoutError(f"hang: no end after {seconds:.0f} s")
        out, err = (self._read(name) for name in ("out", "err"))
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
        assert self._process.exitcode is not None
        self._folder.cleanup()
        return Outcome(self._process.exitcode, out, lines, time.monotonic() - self._begin)

    def _read(self, name: str) -> str:
        path = Path(self._folder.name) / name
        return path.read_text(errors="replace") if path.exists() else ""  # killed before it began


def d2r(*args: object) -> Outcome:
    """A whole command. TimeoutError: it hangs."""
    return Command(*args).wait()


def _run(folder: str, args: list[str], before: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    for name, stream in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT, 0o644), stream)
    import torch

    from d2r_fast.cli import main

    torch.set_num_threads(1)
    if before is not None:
        before(*arguments)
    sys.exit(main(args))


@dataclass
class Counts:
    """lost: work or a file gone, or another result; silent: something wrong that no line told of."""

    tried: int = 0
    lost: int = 0
    crashes: int = 0
    hangs: int = 0
    silent: int = 0

    def found(self, kind: str, what: str) -> None:
        """Count a finding and print it."""
        setattr(self, kind, getattr(self, kind) + 1)
        print(f"{kind}: {what}", flush=True)

    def fault(self, outcome: Outcome, what: str) -> bool:
        """Whether a command did what none may do; counts it."""
        if outcome.fault:
            self.found("crashes", f"{what}: {outcome.fault}")
        return outcome.fault != ""

    @property
    def clean(self) -> bool:
        return not (self.lost or self.crashes or self.hangs or self.silent)

    def __str__(self) -> str:
        return f"tried {self.tried}, lost {self.lost}, crashes {self.crashes}, hangs {self.hangs}, silent {self.silent}"


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """All records without their clock."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "time"} for record in records]


def same_run(run_dir: Path, other: Path) -> bool:
    """Whether two runs ended with the same agent, bit for bit, and told the same but for their clocks."""
    import torch

    from d2r_fast.training.checkpoint import checkpoint_files, load_checkpoint

    mine, theirs = (load_checkpoint(checkpoint_files(d)[-1])["agent"] for d in (run_dir, other))
    return metrics(run_dir) == metrics(other) and all(torch.equal(mine[name], v) for name, v in theirs.items())
