"""The command line: finds the command, and turns what is wrong with its input into one line."""

import os
import select
import signal
import sys
from importlib import import_module

from d2r_fast.envs import WorkerError

USAGE = """usage: d2r COMMAND ...

  d2r train PRESET [--net KIND] [--FIELD VALUE ...] [--run-dir DIR]
                                                         train; PRESET may be a run's config.json, KIND is d2r, mlp,
                                                         multi-head, soft-modules, paco, moore, care or film
  d2r train --resume RUN [--FIELD VALUE ...]             go on from a run directory's newest good checkpoint, or from
                                                         the one of its checkpoints that RUN is
  d2r sweep PRESET [--seeds 0-7] [--set FIELD=V1,V2 ...] [--nets KINDS] [--FIELD VALUE ...]
                                                         train every combination, several runs at a time
  d2r sweep --resume DIR [--retry-failed]                go on with a sweep
  d2r eval RUN_OR_CHECKPOINT [--protocol fast|published|official] [--json FILE]
                                                         success per task of a saved agent
  d2r routes RUN_OR_CHECKPOINT [--out DIR] [--episodes N]
                                                         which modules its episodes ran through, drawn for every task
  d2r report RUN ... [--out FILE]                        one HTML file of one or more runs: curves, routes, settings
  d2r compare RUN ... [--by FIELD ...] [--until STEPS] [--out DIR]
                                                         finished runs, grouped by setting: success with intervals over
                                                         seeds, chance of improvement, time to a success, every task
  d2r video RUN_OR_CHECKPOINT [--tasks TASKS] [--episodes N] [--out FILE]
                                                         its episodes on the official environments, as mp4 or GIF
  d2r import ACTOR.pth [CRITIC.pth CRITIC.pth]           published checkpoints of D2R as a run directory
  d2r export RUN_OR_CHECKPOINT [--out PREFIX] [--published]
                                                         its policy as safetensors and JSON, or as published .pth
  d2r fidelity [--tasks TASKS] [--json FILE] [--markdown FILE]
                                                         our environments against the official package
  d2r presets                                            the presets and what they are for
  d2r info                                               versions, devices, backends and networks

d2r COMMAND --help lists every option of a command that has some (of train with a PRESET).
"""

# Modules of d2r_fast.commands, each with `run(args)`; only the one asked for is imported.
COMMANDS = (
    *("train", "sweep", "eval", "routes", "report", "compare", "video"),
    *("import", "export", "fidelity", "presets", "info"),
)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status. What is wrong with the input is one line on standard error."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    if args[0] not in COMMANDS:
        print(f"d2r: unknown command {args[0]!r}: expected {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        command = import_module(f"d2r_fast.commands.{args[0]}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "d2r_fast":
            raise
        extra = f"d2r {args[0]} needs the training extra ({error.name} is not installed): pip install 'd2r_fast[train]'"
        print(extra, file=sys.stderr)
        return 1
    try:
        status: int = command.run(args[1:])
        sys.stdout.flush()
    except (ValueError, OSError, MemoryError, ImportError, FloatingPointError, WorkerError) as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE  # what a shell says of a program that ends so
        # Notes say whose error it is, where several processes make one run.
        print(": ".join([f"d2r {args[0]}", *getattr(error, "__notes__", []), str(error)]), file=sys.stderr)
        return 1
    return status


def _nobody_reads() -> bool:
    """Whether standard output's reader has left, as `head` does when it has enough; what is left for it is dropped."""
    pipe, poll = sys.stdout.fileno(), select.poll()
    poll.register(pipe, 0)  # that nobody is at the other end is told always
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), pipe)
    return True
