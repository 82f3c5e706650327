"""`d2r presets`: the named configurations."""

from d2r_fast.commands.arguments import require_no_arguments
from d2r_fast.commands.networks import describe, sizes
from d2r_fast.presets import PRESETS


def run(args: list[str]) -> int:
    """Print them. ValueError: there are arguments."""
    require_no_arguments(args)
    width = max(map(len, PRESETS))
    for name, (purpose, cfg) in PRESETS.items():
        print(f"{name:<{width}} {purpose}")
        print(
            f"{'':<{width}} {cfg.n_tasks} tasks, {cfg.batch_size} rows an update, {cfg.total_steps:,} steps a task; "
            f"{sizes(cfg.net)}"
        )
        print(f"{'':<{width}} {describe(cfg.net, cfg.n_tasks)}")
    return 0
