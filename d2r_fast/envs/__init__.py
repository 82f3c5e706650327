"""Meta-World's tasks, stepped many at a time. `make_envs` is the way in."""

import warnings
from collections.abc import Sequence

from d2r_fast.envs.envpool import EnvPoolEnvs
from d2r_fast.envs.fidelity_table import FIDELITY, EngineChoice, choose_engines, departures, describe_engines
from d2r_fast.envs.metaworld import ALL_TASKS, MT10, MT25, MT50, Goals, MultiTaskEnvs, Step, WorkerError, parse_tasks
from d2r_fast.envs.mixed import MixedEnvs

__all__ = [
    "ALL_TASKS",
    "FIDELITY",
    "MT10",
    "MT25",
    "MT50",
    "EnvPoolEnvs",
    "MixedEnvs",
    "MultiTaskEnvs",
    "Step",
    "WorkerError",
    "choose_engines",
    "describe_engines",
    "make_envs",
    "parse_tasks",
]


def make_envs(
    tasks: Sequence[str],
    envs_per_task: int,
    episode_length: int,
    seed: int,
    reward_scale: float = 1.0,
    engine: EngineChoice = "auto",
    goals: Goals = "random",
    n_workers: int | None = None,
) -> MultiTaskEnvs:
    """Environments for `tasks`. Close them, or use them in a `with` block.

    engine: "auto", as `choose_engines` says for each task; "envpool" or "official" for all.
    goals: "random", drawn anew at every reset from the continuous range; "official", the package's 50 of a seed, of
    which a reset picks one; "fixed", one a task, the same in every run whatever `seed`, so that training and
    evaluation agree.
    n_workers: processes of the tasks on the official package, by default as many as there are usable cores.
    Warns once of the tasks that engine="envpool" simulates unlike the official package, with the reasons.
    ValueError: an argument is unknown or out of range, or goals="official" meets engine="envpool".
    Other errors as `EnvPoolEnvs` and `OfficialEnvs` raise them.

    Callers make environments here and nowhere else, so that the choice of an engine stays in one place.
    """
    engines = choose_engines(tasks, engine, goals)
    on_envpool = [k for k, its in enumerate(engines) if its == "envpool"]
    on_official = [k for k, its in enumerate(engines) if its == "official"]
    if engine == "envpool" and (told := departures(tasks)):
        warnings.warn(f"EnvPool differs from the official package: {told}", stacklevel=2)
    arguments = (envs_per_task, episode_length, 0 if goals == "fixed" else seed, reward_scale, goals)

    if not on_official:
        return EnvPoolEnvs(tasks, *arguments)
    from d2r_fast.envs.official import OfficialEnvs  # late, as few runs need its processes

    # It seeds by the position among its own tasks; its generator is another than EnvPool's, so equal seeds do no harm.
    official = OfficialEnvs([tasks[k] for k in on_official], *arguments, n_workers)
    if not on_envpool:
        return official
    try:
        return MixedEnvs(tasks, [EnvPoolEnvs([tasks[k] for k in on_envpool], *arguments, on_envpool), official])
    except BaseException:
        official.close()
        raise
