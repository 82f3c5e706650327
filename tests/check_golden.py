"""Run recorded vectors through the public network and update.

    python tests/check_golden.py DIR [--backend NAME] [--dtype float64|float32] [--device cpu|cuda]

Prints file, quantity and worst relative error (largest difference over the largest recorded magnitude), then
`N files, M quantities, worst X`. Exits with 1 above the dtype's limit, or where DIR holds no vector.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from d2r_fast import Agent, NetConfig, RouteChoice, RoutedNetwork, SacConfig, load_published
from d2r_fast.learning.sac import Batch, Draws, losses, make_optimiser, update
from d2r_fast.learning.update import Update
from d2r_fast.ops.backends import BACKENDS
from d2r_fast.ops.replay_rows import ReplayRows
from d2r_fast.ops.select_routes import Routes

LIMIT = {"float64": 1e-9, "float32": 1e-4}
Quantity = tuple[str, Tensor, Tensor]  # name, ours, recorded


class Vector:
    """One file of recorded vectors; floats arrive in the dtype under test, everything on the device under test."""

    def __init__(self, path: Path, dtype: torch.dtype, device: str, backend: str):
        self.path, self.dtype, self.device, self.backend = path, dtype, device, backend
        with np.load(path, allow_pickle=False) as archive:
            self.arrays = {name: archive[name] for name in archive.files}
        self.meta = json.loads(str(self.arrays.pop("meta")))

    def __getitem__(self, name: str) -> Tensor:
        value = torch.from_numpy(np.asarray(self.arrays[name])).to(self.device)
        return value.to(self.dtype) if value.is_floating_point() else value

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: self[name] for name in self.arrays if name.startswith(prefix)}

    def net_config(self) -> NetConfig:
        m = self.meta
        hidden = m["base_hidden"][0]
        if m["base_hidden"] != [hidden, hidden] or m["task_hidden"] != [hidden]:
            raise ValueError(f"{self.path}: base {m['base_hidden']} and task {m['task_hidden']} must have one width")
        return NetConfig(
            n_modules=m["num_modules"],
            top_k=m["top_k"] or m["num_modules"],
            module_width=m["module_width"],
            base_width=hidden,
            route_widths=tuple(m["routing_hidden"]),
            residual=m.get("residual", True),
            resrouting=m.get("resrouting", True),
            backend=self.backend,
        )


def route_groups(packed: Tensor, n_modules: int) -> list[Tensor]:
    """Packed routes [B,R] as one tensor [B,i] a route i."""
    return list(packed.split(list(range(1, n_modules + 1)), dim=-1))


def index_of(onehot: Tensor, n_modules: int, k: int) -> Tensor:
    """0/1 routes [B,R] -> kept sources [1,B,N,K], 0 in unused slots."""
    index = torch.zeros(1, len(onehot), n_modules, k, dtype=torch.int64, device=onehot.device)
    for i, group in enumerate(route_groups(onehot, n_modules), start=1):
        kept = min(k, i)
        if not bool((group.sum(-1) == kept).all()):
            raise ValueError(f"route {i}: expected {kept} sources in every row")
        index[0, :, i - 1, :kept] = group.topk(kept).indices
    return index


def packed_gates(routes: Routes, values: Tensor) -> Tensor:
    """A per-source quantity [1,B,N,K] of chosen sources -> packed [B,R], 0 where a source was not chosen."""
    n_modules = values.shape[2]
    return torch.cat(
        [
            values.new_zeros(values.shape[1], i).scatter_add_(
                1,
                routes.index[0, :, i - 1, : min(i, values.shape[3])].long(),
                values[0, :, i - 1, : min(i, values.shape[3])],
            )
            for i in range(1, n_modules + 1)
        ],
        dim=-1,
    )


def check_network(v: Vector) -> Iterator[Quantity]:
    m, cfg = v.meta, v.net_config()
    net = RoutedNetwork(m["obs_dim"], m["out_dim"], m["num_tasks"], 1, cfg).to(v.device, v.dtype)
    net.load_state_dict(load_published(v.under("param/")))
    net.train(m["training"])
    obs = v["obs_and_task"][:, : m["obs_dim"]].clone().requires_grad_()
    given = m["routes"] == "given"
    choice = RouteChoice.given(index_of(v["routes_in"], cfg.n_modules, cfg.top_k)) if given else RouteChoice()

    # The hook shows the logits, and makes the network run layer by layer.
    logits: list[Tensor] = []
    hook = net.route[-1].register_forward_hook(lambda *args: logits.append(args[-1][0]))
    out, routes = net(obs, v["task_index"], choice)
    hook.remove()
    if cfg.backend in ("auto", "cpp"):
        yield "out by layer", out[0], v["out"]
        out, routes = net(obs, v["task_index"], choice)
    yield "out", out[0], v["out"]
    yield "gate_weights", packed_gates(routes, routes.gate), v["gate_weights"]
    kept = (routes.gate > 0).to(v.dtype)
    yield "routes_onehot", packed_gates(routes, kept), v["routes_onehot"]
    probabilities = torch.cat([g.softmax(-1) for g in route_groups(logits[0], cfg.n_modules)], -1)
    yield "route_probs", probabilities, v["route_probs"]

    (out[0] * v["cotangent"]).sum().backward()
    yield "grad_obs", obs.grad, v["grad_obs_and_task"][:, : m["obs_dim"]]
    recorded = load_published(v.under("grad/"))
    for name, parameter in net.named_parameters():
        yield f"grad/{name}", parameter.grad, recorded[name]


def flat_rows(value: Tensor) -> Tensor:
    """(rows a task, T, ...) -> [B,...] with the rows of a task together."""
    return value.transpose(0, 1).flatten(0, 1)


def rows_of(batch: Batch) -> ReplayRows:
    """A batch as the replay lays it out for `Update`."""
    room = torch.zeros_like(batch.action)
    pairs = (batch.obs, batch.action), (batch.obs, room), (batch.next_obs, room)
    x = torch.stack([torch.cat(pair, 1) for pair in pairs])
    return ReplayRows(x, batch.reward, batch.terminal, batch.route[None])


def check_update(v: Vector) -> Iterator[Quantity]:
    m, cfg = v.meta, v.net_config()
    sac = SacConfig(
        gamma=m["discount"],
        target_rate=m["tau"],
        actor_lr=m["actor_lr"],
        critic_lr=m["critic_lr"],
        alpha_lr=m["alpha_lr"],
        max_grad_norm=m["grad_clip_norm"],
        max_task_loss=m["task_loss_threshold"],
    )
    agent = Agent(m["obs_dim"], m["act_dim"], m["num_tasks"], cfg).to(v.device, v.dtype)
    agent.actor.net.load_state_dict(load_published(v.under("before/actor/")))
    for ours, theirs in ((agent.critics, "critic"), (agent.target_critics, "target")):
        ours.net.load_state_dict(load_published(v.under(f"before/{theirs}1/"), v.under(f"before/{theirs}2/")))
    with torch.no_grad():
        agent.log_alpha.copy_(v["before/log_alpha"])
        agent.route_temp.copy_(v["before/actor/gumbel_temperature"])

    onehot = torch.cat([index_of(flat_rows(v[f"critic_routes/critic{e}"]), cfg.n_modules, cfg.top_k) for e in (1, 2)])
    batch = Batch(
        obs=flat_rows(v["batch/obs"])[:, : m["obs_dim"]],
        action=flat_rows(v["batch/acts"]),
        reward=flat_rows(v["batch/rewards"])[:, 0],
        terminal=flat_rows(v["batch/terminals"])[:, 0],
        next_obs=flat_rows(v["batch/next_obs"])[:, : m["obs_dim"]],
        task=flat_rows(v["batch/task_idxs"])[:, 0],
        route=index_of(flat_rows(v["batch/gates_onehot"]), cfg.n_modules, cfg.top_k)[0],
    )
    draws = Draws(flat_rows(v["noise/obs"]), flat_rows(v["noise/next_obs"]), RouteChoice.given(onehot))

    loss = losses(agent, batch, draws, sac)
    yield "task_loss", loss.total, v["task_loss"]
    agent.zero_grad()
    kept = loss.total.detach() <= sac.max_task_loss
    torch.where(kept, loss.total, 0).mean().backward()
    recorded = {
        "actor.net.": load_published(v.under("grad/actor/")),
        "critics.net.": load_published(v.under("grad/critic1/"), v.under("grad/critic2/")),
    }
    for prefix, grads in recorded.items():
        for name, grad in grads.items():
            yield f"grad/{prefix}{name}", agent.get_parameter(prefix + name).grad.clone(), grad
    yield "grad/log_alpha", agent.log_alpha.grad.clone(), v["grad/log_alpha"]

    by_calls = copy.deepcopy(agent)
    metrics = update(agent, make_optimiser(agent, sac), batch, draws, sac)
    norms = torch.stack([v[f"grad_norm/{name}"] for name in ("actor", "critic1", "critic2", "log_alpha")])
    named = [metrics[f"grad_norm/{name}"].reshape(-1) for name in ("actor", "critic", "alpha")]
    yield "grad_norm", torch.cat(named), norms
    yield from check_after(v, agent, "after/")

    step = Update(by_calls, sac)
    in_one_call = step.step(rows_of(batch), batch.task, draws)
    yield "update/task_loss", in_one_call.losses[:3].sum(0), v["task_loss"]
    yield "update/grad_norm", in_one_call.norms, norms
    yield from check_after(v, by_calls, "update/after/")


def check_after(v: Vector, agent: Agent, prefix: str) -> Iterator[Quantity]:
    """Everything that an update changes."""
    after = agent.state_dict()
    recorded = {
        "actor.net.": load_published(v.under("after/actor/")),
        "critics.net.": load_published(v.under("after/critic1/"), v.under("after/critic2/")),
        "target_critics.net.": load_published(v.under("after/target1/"), v.under("after/target2/")),
    }
    for network, parameters in recorded.items():
        for name, parameter in parameters.items():
            yield f"{prefix}{network}{name}", after[network + name], parameter
    yield f"{prefix}log_alpha", after["log_alpha"], v["after/log_alpha"]
    yield f"{prefix}route_temp", after["route_temp"], v["after/route_temperature"]


def relative_error(ours: Tensor, recorded: Tensor) -> float:
    """Largest difference over the largest recorded magnitude; infinite for a wrong shape or a NaN."""
    if ours.shape != recorded.shape:
        return float("inf")
    if recorded.numel() == 0:
        return 0.0
    difference = (ours.detach().double() - recorded.double()).abs().max().item()
    scale = recorded.double().abs().max().item()
    error = difference / scale if scale > 0 else difference
    return error if np.isfinite(error) else float("inf")


CHECKS: Mapping[str, Callable[[Vector], Iterator[Quantity]]] = {"network": check_network, "update": check_update}


def check_directory(
    directory: Path,
    dtype: str,
    report: Callable[[str], None] = print,
    device: str = "cpu",
    backend: str = "reference",
) -> tuple[int, int, float]:
    """Check every vector of a directory; returns files, quantities and the worst relative error."""
    files = sorted(directory.glob("*.npz"))
    n_quantities, worst = 0, 0.0
    for path in files:
        check = CHECKS.get(path.name.split("_")[0])
        if check is None:
            raise ValueError(f"{path}: expected a name that starts with {' or '.join(f'{c}_' for c in CHECKS)}")
        for name, ours, recorded in check(Vector(path, getattr(torch, dtype), device, backend)):
            error = relative_error(ours, recorded)
            report(f"{path.name}  {name}  {error:.2e}")
            n_quantities, worst = n_quantities + 1, max(worst, error)
    return len(files), n_quantities, worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--backend", default="reference", choices=BACKENDS)
    parser.add_argument("--dtype", default="float64", choices=tuple(LIMIT))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    if not args.directory.is_dir():
        parser.error(f"{args.directory} is not a directory")
    n_files, n_quantities, worst = check_directory(args.directory, args.dtype, device=args.device, backend=args.backend)
    print(f"{n_files} files, {n_quantities} quantities, worst {worst:.2e}")
    return 0 if n_files and worst <= LIMIT[args.dtype] else 1


if __name__ == "__main__":
    sys.exit(main())
