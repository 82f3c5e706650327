"""Named run configurations."""

from d2r_fast.config import EnvConfig, EvalConfig, RunConfig, SacConfig
from d2r_fast.envs.metaworld import Goals
from d2r_fast.nets.d2r import NetConfig


def _like_mt50(name: str, tasks: str, n_tasks: int, goals: Goals = "random") -> RunConfig:
    """The published MT50 settings, for as many tasks: 128 rows and 200,000 transitions kept of each."""
    return RunConfig(
        name=name,
        env=EnvConfig(tasks=tasks, goals=goals),
        total_steps=1_000_000,
        batch_size=128 * n_tasks,
        replay_capacity=200_000 * n_tasks,
    )


PRESETS: dict[str, tuple[str, RunConfig]] = {
    "mt10-rand": (
        "MT10 with random goals, the published settings: 1.5 M steps a task",
        RunConfig(name="mt10-rand"),
    ),
    "mt10-fixed": (
        "MT10 with one goal a task, the published settings",
        RunConfig(name="mt10-fixed", env=EnvConfig(goals="fixed")),
    ),
    "mt25-rand": ("MT25 with random goals, sized as MT50", _like_mt50("mt25-rand", "MT25", 25)),
    "mt50-rand": (
        "MT50 with random goals, the published settings: 1 M steps a task",
        _like_mt50("mt50-rand", "MT50", 50),
    ),
    "mt50-fixed": ("MT50 with one goal a task, the published settings", _like_mt50("mt50-fixed", "MT50", 50, "fixed")),
    "mt1": (
        "one task with random goals; another task: --env.tasks MT1-<task>",
        RunConfig(name="mt1", env=EnvConfig(tasks="MT1-reach"), batch_size=128),
    ),
    # Chosen by trial. Alpha starts low: at 1, as published, its bonus drowns these tasks' first rewards for longer than
    # the whole run; its rate is high, so that a task whose entropy falls early gets its exploration back.
    "quick": (
        "four easier tasks at a size that two CPU cores learn",
        RunConfig(
            name="quick",
            env=EnvConfig(
                tasks="drawer-close,handle-press,handle-press-side,coffee-button",
                envs_per_task=4,
                episode_length=150,
            ),
            net=NetConfig(n_modules=6, module_width=64, base_width=128, route_widths=(64,)),
            sac=SacConfig(gamma=0.98, actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3, init_alpha=0.003),
            eval=EvalConfig(every_chunks=10),
            total_steps=60_000,
            warmup_steps=4_200,
            chunk_steps=600,
            updates_per_step=0.5,
            batch_size=320,
            replay_capacity=260_000,
            checkpoint_every_chunks=25,
        ),
    ),
}
