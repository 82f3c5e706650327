"""A run configuration as JSON and back, and by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import cattrs
from cattrs.v import format_exception

from d2r_fast.config import RunConfig
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.nets.kinds import NET_CONFIGS
from d2r_fast.nets.settings import NetConfigBase
from d2r_fast.presets import PRESETS


def _make_converter() -> cattrs.Converter:
    """Dataclasses out of JSON, where a wrong type is an error: cattrs alone would turn 1.5 into the integer 1."""
    converter = cattrs.Converter(forbid_extra_keys=True)

    def exactly(*kinds: type) -> Any:
        def structure(value: Any, target: type) -> Any:
            if type(value) not in kinds:
                raise ValueError(f"expected {target.__name__}, got {value!r}")
            return target(value)

        return structure

    def network(value: Any, target: type) -> NetConfigBase:
        if not isinstance(value, dict):
            raise ValueError(f"expected a JSON object, got {value!r}")
        settings = dict(value)
        kind = settings.pop("kind", NetConfig.kind)  # runs from before there was a choice are D2R's
        if not isinstance(kind, str) or kind not in NET_CONFIGS:
            raise ValueError(f"net.kind: expected {', '.join(NET_CONFIGS)}, got {kind!r}")
        return converter.structure(settings, NET_CONFIGS[kind])

    converter.register_structure_hook_func(lambda target: target is NetConfigBase, network)
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
    raw = dataclasses.asdict(cfg)
    raw["net"] = {"kind": cfg.net.kind, **raw["net"]}
    return json.dumps(raw, indent=2) + "\n"


def config_from_json(text: str, where: str) -> RunConfig:
    """The inverse of `config_to_json`. ValueError, naming `where`: not JSON, an unknown field, or a bad value."""
    try:
        raw: Any = json.loads(text)
    except RecursionError:
        raise ValueError(f"{where}: not a run configuration: nested too deeply") from None
    except ValueError as error:  # also an integer of thousands of digits
        raise ValueError(f"{where}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{where}: not a run configuration: expected a JSON object, got {type(raw).__name__}")
    try:
        return _converter.structure(raw, RunConfig)
    except cattrs.BaseValidationError as error:
        problems = "; ".join(cattrs.transform_error(error, format_exception=_explain))
        raise ValueError(f"{where}: not a run configuration: {problems}") from error


def read_config(path: Path) -> RunConfig:
    """The configuration in a file. ValueError, naming it: it holds none. OSError: it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    return config_from_json(text, str(path))


def load_config(name: str) -> RunConfig:
    """A preset by name, or a configuration file by path. ValueError: neither."""
    if name in PRESETS:
        return PRESETS[name][1]
    path = Path(name)
    if path.is_file():
        return read_config(path)
    raise ValueError(f"{name!r}: expected a preset ({', '.join(PRESETS)}) or the path of a config.json")
