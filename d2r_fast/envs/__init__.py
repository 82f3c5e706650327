"""Meta-World's tasks, stepped many at a time. `make_envs` is the way in."""

from collections.abc import Sequence

from d2r_fast.envs.envpool import EnvPoolEnvs
from d2r_fast.envs.metaworld import (
    ALL_TASKS,
    ENVPOOL_DEPARTURES,
    MT10,
    MultiTaskEnvs,
    Step,
    parse_tasks,
)

__all__ = [
    "ALL_TASKS",
    "ENVPOOL_DEPARTURES",
    "MT10",
    "EnvPoolEnvs",
    "MultiTaskEnvs",
    "Step",
    "make_envs",
    "parse_tasks",
]


def make_envs(
    tasks: Sequence[str], envs_per_task: int, episode_length: int, seed: int, reward_scale: float = 1.0
) -> MultiTaskEnvs:
    """Environments for `tasks`; arguments and errors as `EnvPoolEnvs`. Close them, or use them in a `with` block.

    Callers make environments here and nowhere else, so that the choice of an engine stays in one place.
    """
    return EnvPoolEnvs(tasks, envs_per_task, episode_length, seed, reward_scale)
