"""Meta-World's tasks by name, and what every engine that steps them must offer.

Letters: T tasks, n environments a task, O = 39 numbers of an observation, A = 4 numbers of an action.
"""

import difflib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

OBS_SIZE = 39
"""O: 18 numbers now, the same 18 one step before, the goal's 3. Task ids are not part of it."""
ACTION_SIZE = 4
"""A: the gripper's displacement in x, y, z and its closing effort, each clipped to [-1, 1] by the simulation."""

Goals = Literal["random", "official", "fixed"]
"""Drawn anew at every reset from the continuous range; drawn from the package's 50 of a seed; one a task."""

MT10 = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
)
"""The ten tasks in the order of the official benchmark: an index into it is the official task id."""

# A literal, for importing metaworld loads MuJoCo and takes seconds; the tests hold it against the installed package.
ALL_TASKS = (
    "assembly",
    "basketball",
    "bin-picking",
    "box-close",
    "button-press-topdown",
    "button-press-topdown-wall",
    "button-press",
    "button-press-wall",
    "coffee-button",
    "coffee-pull",
    "coffee-push",
    "dial-turn",
    "disassemble",
    "door-close",
    "door-lock",
    "door-open",
    "door-unlock",
    "hand-insert",
    "drawer-close",
    "drawer-open",
    "faucet-open",
    "faucet-close",
    "hammer",
    "handle-press-side",
    "handle-press",
    "handle-pull-side",
    "handle-pull",
    "lever-pull",
    "pick-place-wall",
    "pick-out-of-hole",
    "pick-place",
    "plate-slide",
    "plate-slide-side",
    "plate-slide-back",
    "plate-slide-back-side",
    "peg-insert-side",
    "peg-unplug-side",
    "soccer",
    "stick-push",
    "stick-pull",
    "push",
    "push-wall",
    "push-back",
    "reach",
    "reach-wall",
    "shelf-place",
    "sweep-into",
    "sweep",
    "window-open",
    "window-close",
)
"""All 50 tasks, in the official MT50 order."""

MT25 = (
    *MT10,
    "coffee-pull",
    "pick-out-of-hole",
    "disassemble",
    "pick-place-wall",
    "basketball",
    "stick-pull",
    "button-press-wall",
    "faucet-open",
    "door-lock",
    "lever-pull",
    "sweep-into",
    "faucet-close",
    "coffee-button",
    "button-press-topdown-wall",
    "dial-turn",
)
"""MT10's tasks and fifteen more, in the official order."""

MT50 = ALL_TASKS

_BENCHMARKS = {"MT10": MT10, "MT25": MT25, "MT50": MT50}


def parse_tasks(spec: str) -> tuple[str, ...]:
    """Task names out of a command line's `spec`: "MT10", "MT25" or "MT50" in the official order, "MT1-reach" for one
    task, or names separated by commas, in the order given.

    Case, spaces and a trailing "-v3" of a name do not matter.
    ValueError: no name, an empty, an unknown or a repeated one.
    """
    benchmark = spec.strip().upper()
    if benchmark in _BENCHMARKS:
        return _BENCHMARKS[benchmark]
    expected = 'expected MT10, MT25, MT50, MT1-<task> or task names separated by commas, such as "reach,drawer-close"'
    if not spec.strip():
        raise ValueError(f"no task named: {expected}")
    listed = spec.strip()[len("MT1-") :] if benchmark.startswith("MT1-") else spec
    names = tuple(name.strip().lower().removesuffix("-v3") for name in listed.split(","))
    check_tasks(names, expected)
    if listed != spec and len(names) > 1:
        raise ValueError(f'"MT1-" takes one task, got "{spec}"; {expected}')
    return names


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def check_tasks(names: Sequence[str], expected: str = "expected names out of ALL_TASKS") -> None:
    """ValueError unless `names` holds at least one name, all of them in ALL_TASKS, none twice."""
    if isinstance(names, str) or not names:
        raise ValueError(f"no list of tasks: {names!r}; {expected}")
    for at, name in enumerate(names):
        if name not in ALL_TASKS:
            close = difflib.get_close_matches(name, ALL_TASKS, n=1)
            hint = f', did you mean "{close[0]}"?' if close else ""
            raise ValueError(f'unknown task "{name}" at position {at + 1}{hint} ({expected})')
        if name in names[:at]:
            raise ValueError(f'task "{name}" is named twice; {expected}')


def check_sizes(seed: int, n_seeds: int, **counts: int) -> None:
    """ValueError unless every count is at least 1 and the seeds seed, ..., seed + n_seeds - 1 fit in 31 bits."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}={count} must be at least 1")
    if not 0 <= seed <= 2**31 - n_seeds:
        raise ValueError(
            f"seed={seed} must lie in 0..{2**31 - n_seeds}: {n_seeds} seeds from it on must fit in 31 bits"
        )


def check_action(action: np.ndarray, tasks: Sequence[str], envs_per_task: int) -> None:
    """ValueError unless `action` is [T,n,4] float32 and finite."""
    shape = (len(tasks), envs_per_task, ACTION_SIZE)
    if not isinstance(action, np.ndarray) or action.shape != shape or action.dtype != np.float32:
        got = f"{action.dtype} {action.shape}" if isinstance(action, np.ndarray) else type(action).__name__
        raise ValueError(f"action: expected a numpy array, float32 {shape}, got {got}")
    if not np.isfinite(action).all():
        k, i, _ = np.argwhere(~np.isfinite(action))[0]
        raise ValueError(f"action: not finite for task {tasks[k]}, environment {i}: {action[k, i]}")


class WorkerError(RuntimeError):
    """A process that simulates failed, or was killed; the environments it belonged to are of no more use."""


class CallOrder:
    """Where environments stand between `reset`, `send`, `recv` and `close`.

    An engine sets `state` to "broken" before it starts what may fail half way, and so it stays if that happens: another
    `recv` would wait for what never comes.
    """

    def __init__(self) -> None:
        self.state = "made"  # then "ready" <-> "stepping", at last "closed"

    def expect(self, call: str, *states: str) -> None:
        """RuntimeError, saying why `call` cannot be now, unless the state is one of `states`."""
        if self.state not in states:
            why = {
                "made": "call reset() first",
                "ready": "nothing was sent: call send() first",
                "stepping": "a step is under way: call recv() first",
                "broken": "an earlier call failed half way: make the environments anew",
                "closed": "the environments are closed",
            }
            raise RuntimeError(f"{call}(): {why[self.state]}")


class Step(NamedTuple):
    """What one action in every environment led to. The arrays are the caller's to keep and to change."""

    obs: np.ndarray
    """[T,n,39] float32: what to act on next; after an episode's end, the first observation of the next episode."""
    next_obs: np.ndarray
    """[T,n,39] float32: what the action led to; at an episode's end, that episode's last observation."""
    reward: np.ndarray
    """[T,n] float32, times reward_scale."""
    terminated: np.ndarray
    """[T,n] bool: the task ended the episode. Always False: Meta-World's episodes end by time alone."""
    truncated: np.ndarray
    """[T,n] bool: time ended the episode; `next_obs` still has a future, so its value counts."""
    success: np.ndarray
    """[T,n] bool: the task is solved at this very step. An episode succeeds if any of its steps does."""


class NumberCheck:
    """Lets no number of a simulation pass that is not finite, and counts the steps of the episode, to name the one.

    FloatingPointError, from both methods: the first such number's task, environment, field and step.
    """

    def __init__(self, tasks: Sequence[str]):
        self._tasks = tuple(tasks)
        self.at_step = 0  # of the episode that is under way everywhere; 0 is its first observation

    def first(self, obs: np.ndarray) -> None:
        """Every environment begins an episode, with `obs` [T,n,39]."""
        self.at_step = 0
        self._require_finite(obs=obs)

    def step(self, step: Step) -> None:
        """Every environment made a step."""
        self.at_step += 1
        self._require_finite(reward=step.reward, next_obs=step.next_obs)
        if step.truncated.any():
            self.first(step.obs)

    def _require_finite(self, **fields: np.ndarray) -> None:
        for name, value in fields.items():
            if not np.isfinite(value).all():
                k, i, *at = np.argwhere(~np.isfinite(value))[0]
                place = "".join(f"[{j}]" for j in at)
                raise FloatingPointError(
                    f"task {self._tasks[k]}, environment {i}: the simulation gave {value[k, i, *at]} as {name}{place} "
                    f"at step {self.at_step} of the episode"
                )


class MultiTaskEnvs(ABC):
    """n environments of each of T tasks. An episode's end asks nothing of the caller: `recv` begins the next one."""

    obs_size = OBS_SIZE
    action_size = ACTION_SIZE
    tasks: tuple[str, ...]
    """T names; first axis of every array."""
    envs_per_task: int
    """n; second axis of every array."""
    episode_length: int
    """Steps until an episode is truncated."""

    @property
    def n_tasks(self) -> int:
        return len(self.tasks)

    @abstractmethod
    def reset(self) -> np.ndarray:
        """Begin an episode everywhere, with goals drawn anew; returns obs [T,n,39] float32, finite.

        Needed before the first `send`, allowed at any time after it, but not between `send` and `recv` (RuntimeError).
        FloatingPointError: as `recv`.
        """

    @abstractmethod
    def send(self, action: np.ndarray) -> None:
        """Start one step everywhere and return while it runs.

        action [T,n,4] float32; numbers outside [-1, 1] act as the nearer bound.
        ValueError: another shape or dtype, or a number that is not finite; nothing is stepped then.
        RuntimeError: before `reset`, twice without `recv`, or after `close`.
        """

    @abstractmethod
    def recv(self) -> Step:
        """Wait for the step that `send` started; its numbers are finite.

        RuntimeError: none was started, or after `close`. FloatingPointError: a simulation gave NaN or infinity; the
        message names task, environment, step and field, and the environments take no further step.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the simulations. Everything but `close` raises RuntimeError from here on."""

    def step(self, action: np.ndarray) -> Step:
        """`send` and `recv` in one."""
        self.send(action)
        return self.recv()

    def __enter__(self) -> "MultiTaskEnvs":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
