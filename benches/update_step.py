"""One whole update (critics, actor, alpha, clipping, Adam, targets): how long, against what, and over what floor.

    python benches/update_step.py --suite mt10 --device cpu --json benches/results/update_step_mt10_cpu.json
    python benches/update_step.py --net all --backends cpp --json benches/results/update_step_networks_mt10_cpu.json

Published sizes, a replay of random transitions, the learner as training runs it (sampling and noise included). Variants
take turns in one run. The floor is the arithmetic of the update's matrix products (of D2R's modules: the active ones)
over the rate of the library's own products at D2R's sizes, measured in the same run. Memory is what updates add to a
process of their own, at their peak. `--profile FILE` writes a trace and prints the top costs; on a GPU with the graph
and without.
"""

import argparse
import multiprocessing
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from timing import Run, matmul, matmul_flop, measure, print_table, synchronise, write_report
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from d2r_fast.config import RunConfig
from d2r_fast.envs import MultiTaskEnvs
from d2r_fast.learning.learner import Learner
from d2r_fast.learning.replay import Replay, Transitions
from d2r_fast.nets.agent import N_CRITICS, Agent
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.nets.kinds import NET_CONFIGS
from d2r_fast.ops import count_active
from d2r_fast.ops.backends import PRECISIONS, availability
from d2r_fast.presets import PRESETS, with_net

ROWS_PER_TASK = 2000  # in the replay
OBS, ACTIONS = MultiTaskEnvs.obs_size, MultiTaskEnvs.action_size


def random_transitions(cfg: RunConfig, device: str) -> Transitions:
    """Transitions of every task with routes, if the network has any, that each route could have kept."""
    shape, (n_modules, top_k) = (cfg.n_tasks, ROWS_PER_TASK), cfg.net.route_shape
    score = torch.rand(*shape, n_modules, n_modules, device=device)
    below = torch.ones(n_modules, n_modules, device=device).tril()
    route = (score + below).topk(top_k, -1).indices.to(torch.uint8)
    return Transitions(
        obs=torch.randn(*shape, OBS, device=device),
        action=torch.rand(*shape, ACTIONS, device=device) * 2 - 1,
        reward=torch.rand(shape, device=device),
        terminal=torch.zeros(shape, dtype=torch.bool, device=device),
        next_obs=torch.randn(*shape, OBS, device=device),
        route=route,
    )


def make_learner(cfg: RunConfig, device: str) -> Learner:
    torch.manual_seed(0)
    with torch.device(device):
        agent = Agent(OBS, ACTIONS, cfg.n_tasks, cfg.net)
    capacity = cfg.n_tasks * ROWS_PER_TASK
    replay = Replay(cfg.n_tasks, capacity, OBS, ACTIONS, cfg.net.route_shape, torch.device(device))
    replay.add(random_transitions(cfg, device))
    return Learner(agent, replay, cfg, seed=0)


class ProductCounter(TorchDispatchMode):
    """Counts the arithmetic of torch's matrix products, multiply and add apart."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.flop += count(*args, **(kwargs or {}), out_val=out)
        return out


def counted_flop(cfg: RunConfig) -> float:
    """Arithmetic of the products that plain PyTorch makes in one update: of a network that runs whole in every row."""
    learner = make_learner(variant_of(cfg, "reference", "float32"), "cpu")
    with ProductCounter() as counter:
        learner.run(1)
    return float(counter.flop)


def routed_flop(cfg: RunConfig, active: float) -> float:
    """The same of D2R's network, of whose modules 1..N-1 `active` run a row.

    A layer's backward costs one product for its weight and one for its input; a network's first layer needs the second
    only where the gradient goes on to the action, and no product with constant weights needs the first.
    """
    net: NetConfig = cfg.net
    widths = (net.base_width, *net.route_widths, net.n_logits)
    inner = net.base_width**2 + sum(a * b for a, b in pairwise(widths))
    inner += net.base_width * net.module_width + active * net.module_width**2

    def network(n_in: int, n_out: int, forwards: int, to_weight: int, to_inner: int, to_input: int) -> float:
        first, rest = n_in * net.base_width, inner + net.module_width * n_out
        return first * (forwards + to_weight + to_input) + rest * (forwards + to_weight + to_inner)

    # Actor: next action; acted route and its backward. Critics: targets; loss and its backward; inside the actor's loss
    # forward and the gradient to the action.
    actor = network(OBS, 2 * ACTIONS, forwards=2, to_weight=1, to_inner=1, to_input=0)
    critics = N_CRITICS * network(OBS + ACTIONS, 1, forwards=3, to_weight=1, to_inner=2, to_input=1)
    return 2.0 * cfg.batch_size * (actor + critics)


def mean_active(learner: Learner, cfg: RunConfig) -> float:
    """Modules 1..N-1 that a row of a fresh network runs, the mean over actor and critics on a sampled batch."""
    batch = learner._replay.sample(cfg.batch_size, learner.generator)
    agent = learner.agent
    with torch.no_grad():
        _, actor = agent.actor.net(batch.obs, batch.task)
        _, critics = agent.critics.net(torch.cat([batch.obs, batch.action], 1), batch.task)
    counts = [count_active(r.active, cfg.net.n_modules).double().mean().item() for r in (actor, critics)]
    return (4 * counts[0] + 12 * counts[1]) / 16 - 1


def kernels_launched(run: Run) -> int:
    """Kernels of one update on a GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in trace.key_averages() if event.device_type.name == "CUDA")


def write_profiles(learner: Learner, path: Path, device: str) -> None:
    """A trace of ten updates; on a GPU, where kernels of a graph belong to no call of torch's, and follow each other
    without gaps, another beside it of updates made call by call."""
    write_profile(lambda: learner.run(1), path, device)
    if device == "cuda":
        learner = make_learner(replace(learner._cfg, cuda_graph=False), device)
        learner.run(3)  # compiles nothing later, and has its tables
        write_profile(lambda: learner.run(1), path.with_name(f"no_graph_{path.name}"), device)


def write_profile(run: Run, path: Path, device: str) -> None:
    """A trace of ten updates for chrome://tracing, and the top costs on the terminal."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as trace:
        for _ in range(10):
            run()
        synchronise(device)
    trace.export_chrome_trace(str(path))
    by = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(trace.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60))
    print(f"trace of 10 updates: {path}")


def memory_of_updates(cfg: RunConfig, device: str) -> float:
    """MiB that updates add at their peak, on the CPU to a process of their own, on a GPU to what torch allocated."""
    if device == "cuda":
        learner = make_learner(cfg, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        learner.run(3)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_growth_of_this_process, (cfg, torch.get_num_threads()))


def _growth_of_this_process(cfg: RunConfig, n_threads: int) -> float:
    torch.set_num_threads(n_threads)
    learner = make_learner(cfg, "cpu")
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    learner.run(3)
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].removesuffix("kB")) / 2**10 - before / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=("mt10", "mt50", "quick"), default="mt10")
    parser.add_argument("--net", default="d2r", help=f"comma separated, of {', '.join(NET_CONFIGS)}; or all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--backends", help="comma separated; default: all that work on the device")
    parser.add_argument("--precisions", default="float32", help=f"comma separated, of {', '.join(PRECISIONS)}")
    parser.add_argument("--rounds", type=int, default=15, help="updates measured of each variant")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--profile", type=Path, help="write a trace of the last variant here")
    args = parser.parse_args()
    fast = "triton" if args.device == "cuda" else "cpp"
    ready = [name for name in ("reference", fast) if availability()[name].startswith("ready")]
    backends = args.backends.split(",") if args.backends else ready
    nets = list(NET_CONFIGS) if args.net == "all" else args.net.split(",")
    _, preset = PRESETS["quick" if args.suite == "quick" else f"{args.suite}-rand"]
    rate_like: NetConfig = preset.net  # D2R's

    learners: dict[tuple[str, str, str], Learner] = {}
    for net in nets:
        for backend in backends:
            for precision in args.precisions.split(",") if backend != "reference" else ["float32"]:
                cfg = variant_of(with_net(preset, net), backend, precision)
                learners[net, backend, precision] = make_learner(cfg, args.device)
    variants: dict[str, Run] = {"matmul": matmul(args.device, preset.batch_size, rate_like.module_width)}
    for name, learner in learners.items():
        variants["|".join(name)] = lambda learner=learner: learner.run(1)
    samples = measure(variants, args.device, args.rounds, warmup=2)
    rate = matmul_flop(preset.batch_size, rate_like.module_width) / samples["matmul"].median / 1e6
    print(f"{args.suite}: {preset.batch_size} rows; matrix products alone {rate:.1f} GFLOP/s")
    flop, facts = {}, {"matmul_gflops": round(rate, 1)}
    for net in nets:
        cfg = with_net(preset, net)
        if isinstance(cfg.net, NetConfig):
            active = mean_active(next(learner for (kind, *_), learner in learners.items() if kind == net), cfg)
            print(f"{net}: {active:.2f} of {cfg.net.n_modules - 1} routed modules run a row")
            facts["active_modules"] = round(active, 2)
            flop[net] = routed_flop(cfg, active)
        else:
            flop[net] = counted_flop(cfg)
    rows: list[dict[str, Any]] = []
    first = samples["|".join(next(iter(learners)))].median
    for (net, backend, precision), learner in learners.items():
        measured = samples["|".join((net, backend, precision))]
        floor = flop[net] / rate / 1e6
        row = {"net": net, "variant": backend, "suite": args.suite, "device": args.device, "precision": precision}
        row |= measured.as_dict()
        # Of the first row to this one: how many times as fast it is.
        row |= {"ratio_to_reference": round(first / measured.median, 2)}
        row |= {"gflop": round(flop[net] / 1e9, 2), "floor_ms": round(floor, 2)}
        row |= {"over_floor": round(measured.median / floor, 2)}
        row["memory_mib"] = round(memory_of_updates(learner._cfg, args.device))
        if args.device == "cuda":
            row["kernels"] = kernels_launched(variants["|".join((net, backend, precision))])
        rows.append(row)
    print_table(rows, [k for k in rows[0] if k not in ("suite", "device")])
    if args.profile:
        write_profiles(list(learners.values())[-1], args.profile, args.device)
    command = "python " + " ".join(["benches/update_step.py", *sys.argv[1:]])
    facts["rss_mib"] = round(psutil.Process().memory_info().rss / 2**20)
    write_report(args.json, command, args.device, rows, **facts)


def variant_of(cfg: RunConfig, backend: str, precision: str) -> RunConfig:
    return replace(cfg, net=replace(cfg.net, backend=backend, precision=precision))


if __name__ == "__main__":
    main()
