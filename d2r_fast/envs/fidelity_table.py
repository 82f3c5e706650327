"""How EnvPool's simulation of each task compares with the official package's, and which of the two serves it.

Measured on envpool 1.2.5 against metaworld 3.1.1: the package's scripted experts, 500 steps, consecutive episodes.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from d2r_fast.envs.metaworld import Goals, check_tasks

Engine = Literal["envpool", "official"]
EngineChoice = Literal["auto", "envpool", "official"]


class Fidelity(NamedTuple):
    """One task's row."""

    engine: Engine
    """What simulates the task under engine="auto"."""
    correction: Literal["goal_in_world", "open_gripper_reward", "first_handle"] | None
    """What is mended wherever EnvPool runs the task: `scenes.hammer_base_path`, `corrections.open_gripper_reward`,
    `corrections.first_handle`."""
    reason: str
    """What EnvPool does unlike the official package, corrections left out."""
    measured: str
    """The figures behind it; empty where every figure agrees."""


_SAME = Fidelity("envpool", None, "agrees", "")
_QUATERNION = Fidelity(
    "envpool", None, "first observation or a quaternion's sign differs slightly", "expert success and return agree"
)


def _margin(measured: str, engine: Engine = "official") -> Fidelity:
    # The official shaping compares with `init_left_pad`, which is a live view of the simulation; EnvPool keeps a copy.
    return Fidelity(engine, None, "reward shaped with another margin", measured)


def _physics(measured: str) -> Fidelity:
    # EnvPool carries MuJoCo 3.6.0. The package's own stick tasks, put on it instead of on 3.3.0, depart as far.
    return Fidelity("envpool", None, "another MuJoCo version", measured)


_MARGIN_ONLY = _margin("expert success agrees, rewards differ")

FIDELITY: dict[str, Fidelity] = {
    "assembly": _SAME,
    "basketball": _SAME,
    "bin-picking": _SAME,
    "box-close": _QUATERNION,
    "button-press-topdown": _SAME,
    "button-press-topdown-wall": Fidelity(
        "envpool",
        "open_gripper_reward",
        "reward of Meta-World 3.0.0",
        "expert return 0.5 against 2,114; corrected, off by less than 1e-6",
    ),
    "button-press": _SAME,
    "button-press-wall": _SAME,
    "coffee-button": _SAME,
    "coffee-pull": _SAME,
    "coffee-push": _QUATERNION,
    "dial-turn": Fidelity("official", None, "dial far too stiff", "expert success 0% against 100%"),
    "disassemble": Fidelity(
        "official", None, "nut displaced after the first episode", "nut up to 7 cm out of place from episode 2 on"
    ),
    "door-close": _SAME,
    "door-lock": _margin("expert return 4,218 against 3,477, success agrees"),
    "door-open": _SAME,
    "door-unlock": _QUATERNION,
    "hand-insert": _SAME,
    "drawer-close": _SAME,
    "drawer-open": _SAME,
    "faucet-open": _SAME,
    "faucet-close": _SAME,
    "hammer": Fidelity(
        "envpool",
        "goal_in_world",
        "goal drifts at every reset",
        "goal moves by 0.24 m, 0.85 m in x, y at every reset; corrected, it stays",
    ),
    "handle-press-side": _QUATERNION,
    "handle-press": _QUATERNION,
    "handle-pull-side": _QUATERNION,
    "handle-pull": _QUATERNION,
    "lever-pull": _SAME,
    "pick-place-wall": _SAME,
    "pick-out-of-hole": _SAME,
    "pick-place": _margin("rewards differ under random actions only, expert success and return agree", "envpool"),
    "plate-slide": _SAME,
    "plate-slide-side": _SAME,
    "plate-slide-back": _SAME,
    "plate-slide-back-side": _SAME,
    "peg-insert-side": _physics("expert return 3,719 against 4,066: within the noise of learning"),
    "peg-unplug-side": _QUATERNION,
    "soccer": _MARGIN_ONLY,
    "stick-push": _physics("expert return 996 against 1,093, success agrees"),
    "stick-pull": _physics("expert return 626 against 841, success agrees"),
    "push": _SAME,
    "push-wall": _SAME,
    "push-back": _MARGIN_ONLY,
    "reach": _SAME,
    "reach-wall": _SAME,
    "shelf-place": Fidelity("official", None, "goal drifts at every reset", "further away at each of three resets"),
    "sweep-into": _MARGIN_ONLY,
    "sweep": _MARGIN_ONLY,
    "window-open": _SAME,
    "window-close": Fidelity(
        "envpool",
        "first_handle",
        "first observation shows the window open, the official one shut",
        "handle 0.2 m apart in the first observation alone; corrected, less than 1e-4 m apart",
    ),
}
"""All 50 tasks. Figures are EnvPool's against the official package's."""


def choose_engines(tasks: Sequence[str], engine: EngineChoice, goals: Goals) -> tuple[Engine, ...]:
    """The engine of each task: the table's under engine="auto" unless only the official one has such goals.

    ValueError: unknown task, engine or goals.
    """
    check_tasks(tasks)
    for name, value, known in [
        ("engine", engine, ("auto", "envpool", "official")),
        ("goals", goals, ("random", "official", "fixed")),
    ]:
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    if engine == "auto" and goals == "official":
        engine = "official"
    return tuple(FIDELITY[task].engine if engine == "auto" else engine for task in tasks)


def describe_engines(tasks: Sequence[str], engine: EngineChoice, goals: Goals) -> str:
    """One line for the start of a run: which tasks run where, what is corrected, and why some run elsewhere.

    ValueError as `choose_engines`.
    """
    engines = choose_engines(tasks, engine, goals)
    envpool = [task for task, its in zip(tasks, engines, strict=True) if its == "envpool"]
    official = [task for task, its in zip(tasks, engines, strict=True) if its == "official"]
    parts = []
    if envpool:
        corrected = [f"{task} ({FIDELITY[task].reason})" for task in envpool if FIDELITY[task].correction]
        departing = [task for task in envpool if FIDELITY[task].engine == "official"]
        part = f"{_count(envpool)} on EnvPool"
        if corrected:
            part += f", corrected: {', '.join(corrected)}"
        if departing:
            part += f", unlike the official: {_by_reason(departing)}"
        parts.append(part)
    if official:
        why = f": {_by_reason(official)}" if envpool else ""  # all of them were asked for, so there is no more to say
        parts.append(f"{_count(official)} on the official package{why}")
    return f"{'; '.join(parts)}; goals: {goals}"


def departures(tasks: Sequence[str]) -> str:
    """Those of `tasks` that EnvPool simulates too differently, with the reasons; empty if there is none."""
    return _by_reason([task for task in tasks if FIDELITY[task].engine == "official"])


def _count(tasks: Sequence[str]) -> str:
    return "1 task" if len(tasks) == 1 else f"{len(tasks)} tasks"


def _by_reason(tasks: Sequence[str]) -> str:
    """ "door-lock, sweep (one reason), dial-turn (another)"."""
    together: dict[str, list[str]] = {}
    for task in tasks:
        together.setdefault(FIDELITY[task].reason, []).append(task)
    return ", ".join(f"{', '.join(names)} ({reason})" for reason, names in together.items())
