"""Updates that several ranks make together, each with its share of the rows, against the recorded ones.

    torchrun --nproc-per-node R tests/check_ranks.py [--updates N] [--device cpu|cuda]

Every rank takes each R-th row of every task of tests/golden/update_*.npz (each row twice, so that R = 1, 2, 3, 4 divide
them: means do not change), in float64. The first prints the worst relative error of a file's quantities, and whether
parameters, moments, log alpha and route temperatures are the same bits on all ranks; then the same of N updates as each
method makes them, against a rank alone with all rows. Exits with 1 above 1e-9, or where a bit differs.
"""

import argparse
import copy
import functools
import sys
from dataclasses import replace
from pathlib import Path

import tiny
import torch
from check_golden import LIMIT, Vector, as_one_step, check_after, recorded_norms, recorded_update, relative_error
from torch import Tensor

from d2r_fast import Agent, RouteChoice
from d2r_fast.config import RunConfig
from d2r_fast.learning.sac import Batch, Draws
from d2r_fast.learning.update import Update
from d2r_fast.nets.agent import N_CRITICS
from d2r_fast.presets import PRESETS
from d2r_fast.training.ranks import Alone, join

GOLDEN_UPDATES = sorted((Path(__file__).parent / "golden").glob("update_*.npz"))


def share_of_rows(batch: Batch, draws: Draws, n_tasks: int, ranks: Alone) -> tuple[Batch, Draws]:
    """A rank's rows of a batch whose tasks stand together; each row is there twice."""

    def mine(value: Tensor, dim: int = 0) -> Tensor:
        by_task = value.unflatten(dim, (n_tasks, -1)).repeat_interleave(2, dim + 1)
        index = torch.arange(ranks.rank, by_task.shape[dim + 1], ranks.count, device=value.device)
        return by_task.index_select(dim + 1, index).flatten(dim, dim + 1)

    assert draws.critic_choice.index is not None
    choice = RouteChoice.given(mine(draws.critic_choice.index, 1))
    return Batch(*map(mine, batch)), Draws(mine(draws.noise), mine(draws.next_noise), choice, reset=draws.reset)


def same_bits(update: Update, ranks: Alone) -> bool:
    """Whether all that an update changes is the same on every rank."""
    held = {**update.agent.state_dict(), **update.moments()}
    mine = [value.flatten().double().cpu().numpy().tobytes() for value in held.values()]
    return all(theirs == mine for theirs in ranks.gather(mine))


def check_file(path: Path, device: str, ranks: Alone) -> tuple[float, bool]:
    """Worst relative error of what one update gave, and whether it gave all ranks the same."""
    v = Vector(path, torch.float64, device, "auto")
    agent, batch, draws, sac = recorded_update(v)
    update = Update(agent, sac, ranks.shares)
    metrics = update.step(*as_one_step(*share_of_rows(batch, draws, agent.n_tasks, ranks)))
    quantities = [
        ("task_loss", metrics.losses[:3].sum(0), v["task_loss"]),
        ("grad_norm", metrics.norms, recorded_norms(v)),
        *check_after(v, agent, "after/"),
    ]
    return max(relative_error(ours, recorded) for _, ours, recorded in quantities), same_bits(update, ranks)


def random_rows(agent: Agent, per_task: int, generator: torch.Generator) -> tuple[Batch, Draws]:
    """A batch in float64, tasks together, with routes and noise; the same on every device."""
    device = agent.log_alpha.device
    n_tasks, n_obs, n_act = agent.n_tasks, agent.actor.net.n_in, agent.actor.action_size
    task = torch.arange(n_tasks).repeat_interleave(per_task)
    n, (n_modules, k) = len(task), agent.actor.net.cfg.route_shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    def routes(n_nets: int) -> Tensor:  # module i keeps the first min(k, i) of its i sources, rotated by chance
        first = torch.randint(1000, (n_nets, n, n_modules, 1), generator=generator)
        i, slot = torch.arange(1, n_modules + 1)[:, None], torch.arange(k)
        return torch.where(slot < i, (first + slot) % i, 0)

    acted = normal(n, n_obs), normal(n, n_act).tanh(), normal(n), (normal(n) > 1).double()
    batch = Batch(*(value.to(device) for value in (*acted, normal(n, n_obs), task, routes(1)[0])))
    reset = torch.rand(n_tasks, n_tasks, dtype=torch.float64, generator=generator).to(device)
    noise, next_noise = normal(n, n_act).to(device), normal(n, n_act).to(device)
    return batch, Draws(noise, next_noise, RouteChoice.given(routes(N_CRITICS).to(device)), reset=reset)


def check_method(cfg: RunConfig, n_updates: int, device: str, ranks: Alone) -> tuple[float, bool]:
    """Updates as a method makes them: by all ranks, and by this one alone with all rows. Returns how far apart they end
    (float64, relative), and whether all ranks end with the same bits."""
    torch.manual_seed(0)
    together = Agent(7, 2, 3, cfg.net).to(device, torch.float64)
    alone = copy.deepcopy(together)
    shared, lone = Update(together, cfg.sac, ranks.shares), Update(alone, cfg.sac)
    generator = torch.Generator().manual_seed(1)
    left_out = 0.0
    for _ in range(n_updates):
        batch, draws = random_rows(together, 6, generator)
        metrics = shared.step(*as_one_step(*share_of_rows(batch, draws, 3, ranks)))
        lone.step(*as_one_step(*share_of_rows(batch, draws, 3, Alone())))
        left_out += float(metrics.losses[3].sum())
    theirs = lone.agent.state_dict()
    error = max(relative_error(value, theirs[name]) for name, value in together.state_dict().items())
    if cfg.sac.reset_extreme and not left_out:
        raise RuntimeError("expected a task that is left out, so that its weights are reset, got none")
    return error, same_bits(shared, ranks)


def methods() -> dict[str, RunConfig]:
    """Every order of the losses, at sizes of no weight. A low limit leaves tasks out."""
    chosen = {}
    for net in (tiny.NET, *tiny.NETS):
        cfg = PRESETS["mt10-rand" if net.kind == "d2r" else f"mt10-{net.kind}"][1]
        low = {} if cfg.sac.max_task_loss is None else {"max_task_loss": 4.0}
        chosen[net.kind] = replace(cfg, net=net, sac=replace(cfg.sac, actor_lr=1e-3, critic_lr=1e-3, **low))
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20, help="of each method (default: 20)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    ranks = join()
    good = True
    checks = [(path.stem, functools.partial(check_file, path, args.device, ranks)) for path in GOLDEN_UPDATES]
    checks += [
        (f"{kind}, {args.updates} updates", functools.partial(check_method, cfg, args.updates, args.device, ranks))
        for kind, cfg in methods().items()
    ]
    for name, check in checks:
        error, same = check()
        within = error <= LIMIT["float64"]
        good &= same and within
        if ranks.first:
            print(f"R={ranks.count} {name}: {error:.1e}, {'the same bits' if same else 'other bits'}", flush=True)
    ranks.close()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
