"""Named run configurations, and a configuration as JSON and back."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cattrs
from cattrs.v import format_exception

from d2r_fast.config import EnvConfig, EvalConfig, NetConfig, RunConfig, SacConfig
from d2r_fast.envs.metaworld import Goals


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
            total_steps=54_000,
            warmup_steps=4_200,
            chunk_steps=600,
            updates_per_step=0.5,
            batch_size=320,
            replay_capacity=240_000,
            checkpoint_every_chunks=25,
        ),
    ),
}


def _make_converter() -> cattrs.Converter:
    """Dataclasses out of JSON, where a wrong type is an error: cattrs alone would turn 1.5 into the integer 1."""
    converter = cattrs.Converter(forbid_extra_keys=True)

    def exactly(*kinds: type) -> Any:
        def structure(value: Any, target: type) -> Any:
            if type(value) not in kinds:
                raise ValueError(f"expected {target.__name__}, got {value!r}")
            return target(value)

        return structure

    converter.register_structure_hook(int, exactly(int))
    converter.register_structure_hook(float, exactly(int, float))
    converter.register_structure_hook(bool, exactly(bool))
    converter.register_structure_hook(str, exactly(str))
    return converter


_converter = _make_converter()


def _explain(error: BaseException, target: type | None) -> str:
    """cattrs would call every ValueError "invalid value"; ours say what was expected and what came."""
    return str(error) if type(error) is ValueError else format_exception(error, target)


def config_to_json(cfg: RunConfig) -> str:
    """The whole configuration, as config.json holds it."""
    return json.dumps(dataclasses.asdict(cfg), indent=2) + "\n"


def config_from_json(text: str, where: str) -> RunConfig:
    """The inverse of `config_to_json`. ValueError, naming `where`: not JSON, an unknown field, or a bad value."""
    try:
        raw: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: not a run configuration: expected a JSON object, got {type(raw).__name__}")
    try:
        return _converter.structure(raw, RunConfig)
    except cattrs.BaseValidationError as error:
        problems = "; ".join(cattrs.transform_error(error, format_exception=_explain))
        raise ValueError(f"{where}: not a run configuration: {problems}") from error


def load_config(name: str) -> RunConfig:
    """A preset by name, or a configuration file by path. ValueError: neither."""
    if name in PRESETS:
        return PRESETS[name][1]
    path = Path(name)
    if path.is_file():
        return config_from_json(path.read_text(encoding="utf-8"), str(path))
    raise ValueError(f"{name!r}: expected a preset ({', '.join(PRESETS)}) or the path of a config.json")
