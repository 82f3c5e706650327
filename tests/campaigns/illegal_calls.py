"""Illegal and odd calls of every operation on every backend: none may crash, hang or come back wrong without an error.

    python tests/campaigns/illegal_calls.py --count 10000 [--seed S]

Calls come from make_calls.py and run in processes of their own (run_calls.py). One line a finding, then the counts:
crashes, hangs, and `silent`, which is everything else that should not be: an illegal call accepted, a legal one refused
or wrong, backends that disagree, an error that does not name the argument. `--first N --count 1` repeats call N.
"""

import argparse
import json
import os
import selectors
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("run_calls.py")
BATCH = 400  # calls a process
# Seconds without a sign of life: the process waits for something. A call that computes for too long ends itself.
PATIENCE = 180


@dataclass
class Counts:
    calls: int = 0
    tried: int = 0
    """Calls times the backends they ran on."""
    lost: int = 0
    crashes: int = 0
    hangs: int = 0
    silent: int = 0
    findings: list[str] = field(default_factory=list)

    def add(self, other: "Counts") -> None:
        for name in ("calls", "tried", "lost", "crashes", "hangs", "silent"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.findings += other.findings

    @property
    def clean(self) -> bool:
        return not (self.lost or self.crashes or self.hangs or self.silent)

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, tried {self.tried} with every backend: lost {self.lost}, crashes {self.crashes}, "
            f"hangs {self.hangs}, silent {self.silent}"
        )


def run_batch(seed: int, first: int, count: int) -> Counts:
    """One batch; after a crash or a hang goes on behind it in another process."""
    counts, at, end = Counts(), first, first + count
    skip: dict[int, list[str]] = {}
    while at < end:
        command = [sys.executable, str(WORKER), f"--seed={seed}", f"--first={at}", f"--count={end - at}"]
        worker = subprocess.Popen(
            [*command, f"--skip={json.dumps(skip)}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Of two threads one waits for the other most of the time here: it should not do so at full speed.
            env=os.environ | {"PYTHONWARNINGS": "ignore", "OMP_WAIT_POLICY": "PASSIVE"},
        )
        started, hung = None, False
        for line in lines_of(worker):
            if line is None:
                hung = True
                worker.kill()
                break
            if "start" in line:
                started = line["start"], line["on"], line["call"]
            elif "done" in line:
                at = line["done"] + 1
                counts.calls += 1
                counts.tried += line["tried"]
            else:
                counts.silent += 1
                counts.findings.append(
                    f"{line['kind']} {line['number']} on {line['on']}: {line['message']} | {line['call']}"
                )
        said = worker.stderr.read().decode(errors="replace") if worker.stderr else ""
        code = worker.wait()
        if code == 0:
            break
        if at == end:  # all calls done, and yet
            counts.crashes += 1
            counts.findings.append(f"crash behind {end - 1}: the process ended with {code}: {last_line(said)}")
            break
        if started is None:
            counts.lost += end - at
            counts.findings.append(f"lost {at} and what follows: the process does not start: {last_line(said)}")
            break
        number, on, call = started
        if hung or code == -signal.SIGPROF:
            counts.hangs += 1
            counts.findings.append(f"hang {number} on {on}: does not come to an end | {call}")
        elif code < 0:
            counts.crashes += 1
            counts.findings.append(f"crash {number} on {on}: signal {-code} | {call}")
        else:
            counts.lost += 1
            counts.findings.append(f"lost {number} on {on}: the campaign itself failed: {last_line(said)}")
        if (code > 0 and not hung) or on in skip.get(number, []):
            at = number + 1
        skip.setdefault(number, []).append(on)
    return counts


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["nothing said"])[-1]


def lines_of(worker: subprocess.Popen[bytes]) -> Any:
    """The worker's lines as they come; None once it has been silent for too long."""
    assert worker.stdout is not None
    os.set_blocking(worker.stdout.fileno(), False)
    with selectors.DefaultSelector() as selector:
        selector.register(worker.stdout, selectors.EVENT_READ)
        rest = b""
        while True:
            if not selector.select(PATIENCE):
                yield None
                return
            read = worker.stdout.read()
            if read == b"":
                return
            *whole, rest = (rest + (read or b"")).split(b"\n")
            yield from (json.loads(line) for line in whole)


def campaign(count: int, seed: int = 0, first: int = 0, jobs: int = 1, tell: Any = None) -> Counts:
    """Calls first..first+count-1 of `seed`; `tell` is handed every finding when its batch is done."""
    total = Counts()
    batches = [(seed, at, min(BATCH, first + count - at)) for at in range(first, first + count, BATCH)]
    with ThreadPoolExecutor(jobs) as pool:
        for counts in pool.map(lambda batch: run_batch(*batch), batches):
            total.add(counts)
            for finding in counts.findings if tell else []:
                tell(finding)
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    a = parser.parse_args()
    total = campaign(a.count, a.seed, a.first, a.jobs, lambda finding: print(finding, flush=True))
    if total.findings:
        print("by kind:", dict(Counter(finding.split()[0] for finding in total.findings)))
    print(total)
    return 0 if total.clean else 1


if __name__ == "__main__":
    sys.exit(main())
