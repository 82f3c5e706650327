"""What recorded routes say about a run: numbers, as `d2r routes` draws them and routes.json holds them."""

from typing import Any

import numpy as np
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from d2r_fast.evaluation.protocols import most_that_divide
from d2r_fast.evaluation.routes import RouteUse, record_routes
from d2r_fast.nets.d2r import NetConfig, RoutedNetwork
from d2r_fast.training.agents import choose_device, load_agent, make_agent
from d2r_fast.training.checkpoint import located
from d2r_fast.training.metrics import read_metrics
from d2r_fast.training.saved_run import SavedRun
from d2r_fast.training.seeds import EVAL_COMMAND, stream_seed


def play_routes(saved: SavedRun, episodes: int, envs_per_task: int | None = None, seed: int = 0) -> dict[str, Any]:
    """The `route_numbers` of a saved agent over `episodes` greedy episodes a task, played as the run plays.

    envs_per_task: that step together, a divisor of the episodes; by default up to 8 and about 80 of all tasks.
    ValueError: the network has no routes, or an argument is out of range.
    """
    cfg, tasks = saved.cfg, saved.cfg.task_names
    if not isinstance(cfg.net, NetConfig):
        raise ValueError(
            f"{saved.path}: expected a run of network {NetConfig.kind}, got {cfg.net.kind}, which has no routes"
        )
    if envs_per_task is None:
        envs_per_task = most_that_divide(episodes, min(8, 80 // len(tasks)))
    device = choose_device("auto")
    cfg.net.check_runs_on(device)
    agent = make_agent(cfg, device)
    assert isinstance(agent.actor.net, RoutedNetwork)
    with located(saved.path):
        load_agent(agent, saved.state)
    env = cfg.env
    goals_seed = stream_seed(seed, EVAL_COMMAND)
    use = record_routes(agent, tasks, env.episode_length, episodes, envs_per_task, goals_seed, env.engine, env.goals)
    has_metrics = saved.run_dir is not None and (saved.run_dir / "metrics.jsonl").exists()
    evals = read_metrics(saved.run_dir, "eval") if has_metrics and saved.run_dir is not None else []
    about = {"checkpoint": str(saved.path), "steps": saved.state["steps"], "seed": seed}
    return about | route_numbers(tasks, agent.actor.net, use, evals)


def route_numbers(tasks: tuple[str, ...], net: RoutedNetwork, use: RouteUse, evals: list[dict[str, Any]]) -> dict:
    """Plain values for JSON; T tasks, N modules.

    net    the actor's network, whose arithmetic is counted
    evals  the run's evaluations so far, as metrics.jsonl has them
    """
    weight, active = use.weight, use.module_use.sum(1)
    module = net.cfg.module_width**2  # multiply-adds of a module but the first, which is always run
    all_of_them = net.multiply_adds
    saved = module * (net.cfg.n_modules - active)  # [T]
    apart = difference(weight)
    return {
        "tasks": list(tasks),
        "n_modules": net.cfg.n_modules,
        "top_k": net.cfg.top_k,
        "episodes": use.episodes,
        "success": use.success.tolist(),
        "module_use": use.module_use.tolist(),
        "active_modules": active.tolist(),
        "depth": use.depth.tolist(),
        # [T][N][i]: route i, from 1, has i sources; route N leads into the head.
        "weight": [[row[: i + 1].tolist() for i, row in enumerate(task)] for task in weight],
        "entropy_bits": {"within_a_step": use.entropy.tolist(), "of_the_task": task_entropy(weight).tolist()},
        "multiply_adds": {
            "with_all_modules": all_of_them,
            "a_module": module,
            "of_a_step": (all_of_them - saved).tolist(),
            "share_saved": (saved / all_of_them).tolist(),
            "share_of_modules_saved": (saved / max(1, module * (net.cfg.n_modules - 1))).tolist(),
        },
        "difference": apart.tolist(),
        "order": order(apart),
        "training": {
            "steps": [record["steps"] for record in evals],
            "active_modules": [[sum(row) for row in record["module_use"]] for record in evals],
            "success": [record["success"] for record in evals],
        },
    }


def difference(weight: np.ndarray) -> np.ndarray:
    """[T,T] how unlike two tasks' routes are, 0 (the same weights everywhere) to 1 (no route in common): one less the
    weight that both have over the weight that either has (Ruzicka). weight [T,N,N]."""
    flat = weight.reshape(len(weight), -1)
    both = np.minimum(flat[:, None], flat[None]).sum(2)
    either = np.maximum(flat[:, None], flat[None]).sum(2)
    return 1 - both / either


def merges(apart: np.ndarray) -> np.ndarray:
    """The dendrogram of tasks that are `apart` [T,T], T at least 2: scipy's linkage, by the average between groups."""
    return linkage(squareform(apart, checks=False), method="average", optimal_ordering=True)


def order(apart: np.ndarray) -> list[int]:
    """The tasks so that those of like routes stand together."""
    return leaves_list(merges(apart)).tolist() if len(apart) > 1 else [0]


def task_entropy(weight: np.ndarray) -> np.ndarray:
    """[T] bits: how spread a route's sources are over all of a task's steps, a mean over routes by how often they ran.

    At least the entropy within a step: what is above it is how much the routes change from step to step.
    """
    runs = weight.sum(2)  # [T,N]
    share = weight / np.where(runs > 0, runs, 1)[..., None]
    bits = -(share * np.log2(np.where(share > 0, share, 1))).sum(2)  # [T,N]
    return (bits * runs).sum(1) / runs.sum(1)
