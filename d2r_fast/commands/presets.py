"""`d2r presets`: the named configurations."""

from d2r_fast.commands.arguments import require_no_arguments
from d2r_fast.presets import PRESETS


def run(args: list[str]) -> int:
    """Print them. ValueError: there are arguments."""
    require_no_arguments(args)
    for name, (purpose, cfg) in PRESETS.items():
        print(f"{name:<10} {purpose}")
        print(
            f"{'':<10} {cfg.n_tasks} tasks, N={cfg.net.n_modules} K={cfg.net.top_k} D={cfg.net.module_width} "
            f"H={cfg.net.base_width}, {cfg.batch_size} rows an update, {cfg.total_steps:,} steps a task"
        )
    return 0
