"""`d2r eval`: a saved agent, or the scripted experts, through an evaluation protocol."""

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import tyro

from d2r_fast.commands.output import check_output, write_output
from d2r_fast.config import EvalConfig
from d2r_fast.envs import parse_tasks
from d2r_fast.evaluation.policies import EvalPolicy, GreedyPolicy, expert_agent
from d2r_fast.evaluation.protocols import OFFICIAL, PUBLISHED, ProtocolName, ProtocolSpec, evaluate_protocol
from d2r_fast.training.agents import choose_device, load_agent, make_agent
from d2r_fast.training.checkpoint import located
from d2r_fast.training.saved_run import read_saved_run
from d2r_fast.training.seeds import EVAL_COMMAND, stream_seed


@dataclasses.dataclass(frozen=True)
class EvalArgs:
    """Evaluate a saved agent: greedy routes, mean action, success at any step, with 95% intervals."""

    run: tyro.conf.Positional[Path | None] = None
    """A run directory (its newest checkpoint) or a checkpoint file."""
    experts: str | None = None
    """Instead of a run: the official package's scripted experts of MT10, MT25, MT50 or a list of tasks."""
    protocol: ProtocolName = "fast"
    """fast: the run's own engine, goals and episode length. published: 200 steps, random goals. official: Meta-World's
    own evaluation on its own environments, 500 steps, 50 goals a task."""
    episodes: int | None = None
    """Episodes a task; by default the protocol's: 32, official 50."""
    envs_per_task: int | None = None
    """Environments a task that step together, a divisor of the episodes; by default up to 8. Official has one."""
    seed: int = 0
    """Seeds the goals."""
    json: Path | None = None
    """Write the result here too."""


def run(args: list[str]) -> int:
    """Print the table of a result, write its JSON where asked. ValueError: options that contradict each other.

    OSError: the JSON cannot be written there.
    """
    wanted = tyro.cli(EvalArgs, prog="d2r eval", args=args)
    if (wanted.run is None) == (wanted.experts is None):
        raise ValueError("expected a run directory, a checkpoint or --experts TASKS, one of them")
    if not 0 <= wanted.seed < 2**31 - 50:
        raise ValueError(f"seed: expected 0..2**31-51, got {wanted.seed}")
    policy: EvalPolicy
    about: dict[str, Any]
    if wanted.experts is not None:
        if wanted.protocol == "fast":
            raise ValueError("--experts: expected --protocol published or official; fast takes its settings from a run")
        tasks = parse_tasks(wanted.experts)
        policy = expert_agent(tasks)
        spec = _settings(wanted)
        title, about = "scripted experts", {"policy": "scripted experts"}
    else:
        assert wanted.run is not None
        saved = read_saved_run(wanted.run)
        for error in saved.passed_over.values():
            print(f"d2r eval: {error}; evaluating {saved.path.name}", file=sys.stderr)
        path, state, cfg = saved.path, saved.state, saved.cfg
        device = choose_device("auto")
        cfg.net.check_runs_on(device)
        agent = make_agent(cfg, device)
        with located(path):
            load_agent(agent, state)
        tasks, policy = cfg.task_names, GreedyPolicy(agent.actor)
        own = ProtocolSpec("fast", EvalConfig().episodes, cfg.env.episode_length, cfg.env.engine, cfg.env.goals)
        spec = _settings(wanted, own)
        title = f"{path}: {state['steps']:,} steps a task"
        about = {"checkpoint": str(path), "steps": state["steps"]}

    check_output(wanted.json)
    # The official benchmark's goals are those of the seed itself.
    seed = wanted.seed if spec.name == "official" else stream_seed(wanted.seed, EVAL_COMMAND)
    result = evaluate_protocol(policy, tasks, spec, seed, wanted.envs_per_task, show_progress=True)
    print(f"{title}\n{result.table()}\n{result.seconds:.0f} s")
    if wanted.json is not None:
        record = {"command": shlex.join(["d2r", "eval", *args])} | about | result.as_dict() | {"seed": wanted.seed}
        if isinstance(policy, GreedyPolicy) and spec.name != "official":  # there, copies in other processes acted
            record["module_use"] = policy.module_use()
        write_output(wanted.json, json.dumps(record, indent=2) + "\n")
    return 0


def _settings(wanted: EvalArgs, own: ProtocolSpec | None = None) -> ProtocolSpec:
    """The protocol asked for, `own` being the run's fast one, with the episodes asked for."""
    known = {spec.name: spec for spec in (PUBLISHED, OFFICIAL, *([own] if own else []))}
    spec = known[wanted.protocol]
    return spec if wanted.episodes is None else spec._replace(episodes=wanted.episodes)
