"""A run configuration from what stands on a command line."""

import tyro

from d2r_fast.config import RunConfig
from d2r_fast.config_json import load_config
from d2r_fast.presets import with_net


def config_from_args(name: str, kind: str | None, overrides: list[str], prog: str) -> RunConfig:
    """The preset or configuration file `name`, with a network of `kind` if one is given, and `overrides`, which are
    `--FIELD VALUE ...`, on top.

    ValueError: no such preset, file or network. SystemExit: tyro, as the program `prog`, has told on standard error
    what it cannot read, or has helped.
    """
    default = load_config(name)
    if kind is not None:
        default = with_net(default, kind)
    return tyro.cli(RunConfig, prog=prog, default=default, args=overrides)
