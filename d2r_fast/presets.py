"""Named run configurations, and the sizes that each network comes in."""

from dataclasses import replace

from d2r_fast.config import EnvConfig, EvalConfig, RunConfig, SacConfig
from d2r_fast.envs.metaworld import Goals
from d2r_fast.nets.care import CareConfig
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.nets.film import FilmConfig
from d2r_fast.nets.kinds import NET_CONFIGS
from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.nets.moore import MooreConfig
from d2r_fast.nets.multi_head import MultiHeadConfig
from d2r_fast.nets.paco import PacoConfig
from d2r_fast.nets.settings import NetConfigBase
from d2r_fast.nets.soft_modules import SoftModulesConfig

# Where a method's sizes for MT50 are other than its defaults, which are those for MT10. CARE's are the JAX port's.
_FOR_MT50: dict[str, NetConfigBase] = {
    cfg.kind: cfg for cfg in (PacoConfig(n_sets=20), MooreConfig(n_experts=6), CareConfig(n_experts=10))
}
# Of about 70,000 parameters an actor, for two CPU cores.
_QUICK_NETS: dict[str, NetConfigBase] = {
    cfg.kind: cfg
    for cfg in (
        NetConfig(n_modules=6, module_width=64, base_width=128, route_widths=(64,)),
        MlpConfig(widths=(160, 160, 160)),
        MultiHeadConfig(widths=(160, 160, 160)),
        SoftModulesConfig(n_layers=2, n_modules=2, module_width=64, base_widths=(128, 128), gating_widths=(64,)),
        PacoConfig(n_sets=2, widths=(112, 112, 112)),
        MooreConfig(n_experts=2, widths=(112, 112, 112)),
        CareConfig(n_experts=4, embedding_width=32, encoder_widths=(32, 32), widths=(144, 144, 144)),
        FilmConfig(embedding_width=32, encoder_widths=(32, 32), widths=(160, 160, 160)),
    )
}
# Of about 82,000 parameters an actor of MT10, for two CPU cores.
_SMALL_NETS: dict[str, NetConfigBase] = {
    cfg.kind: cfg
    for cfg in (
        NetConfig(n_modules=8, module_width=64, base_width=128, route_widths=(128,)),
        MlpConfig(widths=(188, 188, 188)),
        MultiHeadConfig(widths=(172, 172, 172)),
        SoftModulesConfig(n_layers=2, n_modules=2, module_width=64, base_widths=(172, 172), gating_widths=(64,)),
        PacoConfig(n_sets=2, widths=(131, 131, 131)),
        MooreConfig(n_experts=2, widths=(124, 124, 124)),
        CareConfig(n_experts=4, embedding_width=32, encoder_widths=(32, 32), widths=(160, 160, 160)),
        FilmConfig(embedding_width=32, encoder_widths=(32, 32), widths=(177, 177, 177)),
    )
}
_SIZED_NETS = {"quick": _QUICK_NETS, "mt10-small": _SMALL_NETS}

# How a method's own code trains, as far as settings go; what it names stands at the settings.
_SAC: dict[str, SacConfig] = {
    NetConfig.kind: SacConfig(),
    SoftModulesConfig.kind: SacConfig(
        alpha_lr=3e-4, max_alpha=None, clip_alpha=False, max_task_loss=None, order="alpha_first"
    ),
    PacoConfig.kind: SacConfig(adam_eps=1e-7, task_weights=False, max_grad_norm=None, reset_extreme=True),
    MooreConfig.kind: SacConfig(
        max_alpha=None, task_weights=False, max_grad_norm=None, max_task_loss=None, order="actor_first"
    ),
}
_SAC |= dict.fromkeys((MlpConfig.kind, MultiHeadConfig.kind), replace(_SAC[SoftModulesConfig.kind], task_weights=False))
_SAC |= dict.fromkeys(
    (CareConfig.kind, FilmConfig.kind),
    replace(_SAC[MooreConfig.kind], alpha_lr=3e-4, order="critics_first"),
)


def with_net(cfg: RunConfig, kind: str) -> RunConfig:
    """A run with another network, in the sizes that suit it: those of `quick` and `mt10-small` for a run that is called
    so, else the published ones, for MT50 beyond ten tasks. ValueError: no such network.
    """
    if kind not in NET_CONFIGS:
        raise ValueError(f"--net: expected one of {', '.join(NET_CONFIGS)}, got {kind!r}")
    if kind == cfg.net.kind:
        return cfg
    published = _FOR_MT50.get(kind) if cfg.n_tasks > 10 else None
    sized = _SIZED_NETS.get(cfg.name, {}).get(kind)
    return replace(cfg, net=sized or published or NET_CONFIGS[kind]())


def _compared(suite: str, kind: str) -> RunConfig:
    """A method that D2R is compared with, as its own code has it; environments and steps as D2R's."""
    base = RunConfig(name=f"mt10-{kind}") if suite == "mt10" else _like_mt50(f"mt50-{kind}", "MT50", 50)
    return replace(with_net(base, kind), sac=_SAC[kind])


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
            net=_QUICK_NETS[NetConfig.kind],
            sac=SacConfig(gamma=0.98, actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3, init_alpha=0.003),
            eval=EvalConfig(every_chunks=10),
            total_steps=72_000,
            warmup_steps=4_200,
            chunk_steps=600,
            updates_per_step=0.5,
            batch_size=320,
            replay_capacity=260_000,
            checkpoint_every_chunks=25,
        ),
    ),
    # Alpha as in `quick`. docs/learning.md has what was tried.
    "mt10-small": (
        "MT10 with random goals, at a size that two CPU cores train in an evening",
        RunConfig(
            name="mt10-small",
            env=EnvConfig(envs_per_task=4),
            net=_SMALL_NETS[NetConfig.kind],
            sac=SacConfig(actor_lr=5e-4, critic_lr=5e-4, alpha_lr=5e-4, init_alpha=0.01),
            total_steps=600_000,
            chunk_steps=400,
            updates_per_step=0.5,
            batch_size=640,
            checkpoint_every_chunks=100,
        ),
    ),
}
_METHODS = {
    MlpConfig.kind: "MT-SAC",
    MultiHeadConfig.kind: "MT-SAC with a head a task",
    SoftModulesConfig.kind: "Soft Modules (deep)",
    PacoConfig.kind: "PaCo",
    MooreConfig.kind: "MOORE",
    CareConfig.kind: "CARE",
    FilmConfig.kind: "FiLM",
}
PRESETS |= {
    f"{suite}-{kind}": (
        f"{method}: network and update as in its code, the rest as {suite}-rand",
        _compared(suite, kind),
    )
    for kind, method in _METHODS.items()
    for suite in ("mt10", "mt50")
}
