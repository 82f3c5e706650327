"""Run recorded vectors through the public networks and update.

    python tests/check_golden.py DIR [--backend NAME] [--dtype float64|float32] [--device cpu|cuda]

DIR is tests/golden (D2R) or tests/golden_baselines (the networks it is compared with). Prints file, quantity and worst
relative error (largest difference over the largest recorded magnitude), then `N files, M quantities, worst X`. Exits
with 1 above the limit of the dtype or the file, or where DIR holds no vector.
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from d2r_fast import Agent, NetConfig, RouteChoice, RoutedNetwork, SacConfig, load_published
from d2r_fast.learning import update as one_step
from d2r_fast.learning.sac import Batch, Draws, losses, make_optimiser, update
from d2r_fast.nets.care import CareConfig
from d2r_fast.nets.film import FilmConfig
from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.nets.moore import MooreConfig
from d2r_fast.nets.multi_head import MultiHeadConfig
from d2r_fast.nets.paco import PacoConfig, extreme_tasks, leave_out, reset_extreme
from d2r_fast.nets.settings import NetConfigBase
from d2r_fast.nets.soft_modules import SoftModules, SoftModulesConfig
from d2r_fast.ops.backends import BACKENDS
from d2r_fast.ops.expert_sum import expert_sum
from d2r_fast.ops.replay_rows import ReplayRows
from d2r_fast.ops.select_routes import Routes

LIMIT = {"float64": 1e-9, "float32": 1e-4}
# Of files whose names begin so: its norms with and without their epsilon differ by 3e-9.
CLOSER = {"moore": {"float64": 1e-10}}
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


def as_one_step(batch: Batch, draws: Draws) -> tuple[ReplayRows, Tensor, one_step.Draws]:
    """A batch and its noise as `Update.step` takes them."""
    room = torch.zeros_like(batch.action)
    pairs = (batch.obs, batch.action), (batch.obs, room), (batch.next_obs, room)
    x = torch.stack([torch.cat(pair, 1) for pair in pairs])
    rows = ReplayRows(x, batch.reward, batch.terminal, batch.route[None])
    noise = torch.cat([draws.noise, draws.next_noise])
    return rows, batch.task.repeat(2), one_step.Draws(noise, draws.critic_choice, draws.actor_noise, draws.reset)


def recorded_update(v: Vector) -> tuple[Agent, Batch, Draws, SacConfig]:
    """The agent before the update, what it was given, and its settings."""
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
    return agent, batch, draws, sac


def recorded_norms(v: Vector) -> Tensor:
    """[4] gradient norms of actor, critics and log alpha."""
    return torch.stack([v[f"grad_norm/{name}"] for name in ("actor", "critic1", "critic2", "log_alpha")])


def check_update(v: Vector) -> Iterator[Quantity]:
    agent, batch, draws, sac = recorded_update(v)
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
    norms = recorded_norms(v)
    named = [metrics[f"grad_norm/{name}"].reshape(-1) for name in ("actor", "critic", "alpha")]
    yield "grad_norm", torch.cat(named), norms
    yield from check_after(v, agent, "after/")

    rows, task, noise = as_one_step(batch, draws)
    told = one_step.Update(by_calls, sac).step(rows, task, noise)
    yield "update/task_loss", told.losses[:3].sum(0), v["task_loss"]
    yield "update/grad_norm", told.norms, norms
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


def baseline_config(v: Vector) -> NetConfigBase:
    m, backend = v.meta, v.backend
    if m["network"] == "soft_modules":
        return SoftModulesConfig(
            n_layers=m["num_layers"],
            n_modules=m["num_modules"],
            module_width=m["module_width"],
            base_widths=tuple(m["base_hidden"]),
            gating_widths=(m["gating_hidden"],) * m["num_gating_layers"],
            backend=backend,
        )
    widths = (m["width"],) * m["num_layers"]
    if m["network"] == "mlp":
        return MlpConfig(widths=widths, backend=backend)
    if m["network"] == "multi_head":
        return MultiHeadConfig(widths=widths, backend=backend)
    if m["network"] == "paco":
        return PacoConfig(n_sets=m["num_parameter_sets"], widths=widths, backend=backend)
    if m["network"] == "moore":
        return MooreConfig(n_experts=m["num_experts"], widths=widths, norm_epsilon=m["norm_epsilon"], backend=backend)
    encoder_widths, embedding = (m["encoder_width"],) * m["encoder_layers"], m["embedding_width"]
    if m["network"] == "film":
        return FilmConfig(embedding_width=embedding, encoder_widths=encoder_widths, widths=widths, backend=backend)
    return CareConfig(
        n_experts=m["num_experts"],
        embedding_width=embedding,
        encoder_widths=encoder_widths,
        widths=widths,
        temperature=m["attention_temperature"],
        backend=backend,
    )


class TaskOrder(NamedTuple):
    """Rows as a batch has them, as many of each task, tasks in order: recorded rows, and between them such as count for
    nothing."""

    row: Tensor  # [B'] the recorded row in each place, the first where none belongs
    counts: Tensor  # [B'] 1 or 0
    task: Tensor  # [B']


def in_task_order(task: Tensor, n_tasks: int) -> TaskOrder:
    rows = [[int(i) for i in (task == t).nonzero()] for t in range(n_tasks)]
    most = max(map(len, rows))
    padded = [(own[i], 1, t) if i < len(own) else (0, 0, t) for t, own in enumerate(rows) for i in range(most)]
    return TaskOrder(*torch.tensor(padded, device=task.device).T)


def check_baseline(v: Vector) -> Iterator[Quantity]:
    """A network, of critics in either place of the ensemble, over the rows as recorded and in task order."""
    m, task = v.meta, v["task_id"]
    n_nets, role = (2, "critic") if m["out_dim"] == 1 else (1, "actor")
    order = in_task_order(task, m["num_tasks"])
    recorded_name = {"layers": "modules"} if m["network"] == "soft_modules" else {}
    for e in range(n_nets):
        net = baseline_config(v).make(m["obs_dim"], m["out_dim"], m["num_tasks"], n_nets, role)
        net = net.to(v.device, v.dtype)
        named = {}
        for name, parameter in net.named_parameters():
            first, _, rest = name.partition(".")
            named[f"{recorded_name.get(first, first)}.{rest}"] = parameter
        recorded = v.under("param/")
        if recorded.keys() != named.keys():
            raise ValueError(f"{v.path}: expected parameters {sorted(named)}, got {sorted(recorded)}")
        for name, parameter in named.items():
            parameter.data[e] = recorded[name]
        for rows in (None, order):
            net.zero_grad()
            obs = v["obs"].requires_grad_()
            if rows is None:
                out, cotangent = net(obs, task)[e], v["cotangent"]
            else:
                cotangent = v["cotangent"][rows.row] * rows.counts[:, None]
                out = net(obs[rows.row], rows.task, in_task_order=True)[e]
            where = ("" if n_nets == 1 else f"network {e}: ") + ("" if rows is None else "in task order: ")
            (out * cotangent).sum().backward()
            real = slice(None) if rows is None else rows.counts.bool()
            yield f"{where}out", out[real], v["out"] if rows is None else v["out"][rows.row[real]]
            yield f"{where}grad_obs", obs.grad, v["grad_obs"]
            for name, parameter in named.items():
                yield f"{where}grad/{name}", parameter.grad[e], v[f"grad/{name}"]
                for other in range(n_nets):
                    if other != e:
                        of_other = parameter.grad[other]
                        yield f"{where}grad/{name} of network {other}", of_other, torch.zeros_like(of_other)
        if m["network"] == "soft_modules":
            yield from check_gates(v, net, e)
    if m["network"] == "moore":
        features = v["aux/expert_features"][None]  # [1,B,N,D]
        for k in range(features.shape[2]):  # one after another
            alone = torch.zeros_like(features[..., 0])
            alone[..., k] = 1
            ours = expert_sum(features, alone, True, m["norm_epsilon"], v.backend)[0]
            yield f"orthogonal_features.{k}", ours, v["aux/orthogonal_features"][:, k]


def check_gates(v: Vector, net: SoftModules, e: int) -> Iterator[Quantity]:
    recorded = [v[f"aux/gates.{i}"] for i in range(net.cfg.n_layers)]
    with mock.patch.object(net, "gates", wraps=net.gates) as gates:
        net(v["obs"], v["task_id"])
    found = net.gates(*gates.call_args.args)[e].split([p[0].numel() for p in recorded], -1)
    for i, (ours, theirs) in enumerate(zip(found, recorded, strict=True)):
        yield f"network {e}: gates.{i}", ours.view(theirs.shape), theirs


def check_reset(v: Vector) -> Iterator[Quantity]:
    """PaCo's way with tasks whose loss explodes."""
    task_loss, extreme = extreme_tasks(v["row_loss"], v["task_id"], v.meta["num_tasks"], v.meta["threshold"])
    yield "task_loss", task_loss, v["task_loss"]
    yield "extreme", extreme, v["extreme"]
    yield "row_loss_masked", leave_out(v["row_loss"], v["task_id"], extreme), v["row_loss_masked"]
    uniform = v["uniform"].new_zeros(len(extreme), len(extreme))
    uniform[extreme[:, None] & ~extreme] = v["uniform"].flatten()
    yield "weight_after", reset_extreme(v["weight_before"], extreme, uniform), v["weight_after"]


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


# By how a file's name begins; the first that fits.
CHECKS: Mapping[str, Callable[[Vector], Iterator[Quantity]]] = {
    "network": check_network,
    "update": check_update,
    "paco_reset": check_reset,
    **dict.fromkeys(("mlp", "multi_head", "soft_modules", "paco", "moore", "care", "film"), check_baseline),
}


class Checked(NamedTuple):
    n_files: int
    n_quantities: int
    worst: float  # relative error
    beyond: list[str]  # what is further from its record than allowed


def check_directory(
    directory: Path,
    dtype: str,
    report: Callable[[str], None] = print,
    device: str = "cpu",
    backend: str = "reference",
) -> Checked:
    """Check every vector of a directory."""
    files = sorted(directory.glob("*.npz"))
    n_quantities, worst, beyond = 0, 0.0, []
    for path in files:
        begins = next((name for name in CHECKS if path.name.startswith(f"{name}_")), None)
        if begins is None:
            raise ValueError(f"{path}: expected a name that starts with {' or '.join(f'{c}_' for c in CHECKS)}")
        limit = CLOSER.get(begins, LIMIT).get(dtype, LIMIT[dtype])
        for name, ours, recorded in CHECKS[begins](Vector(path, getattr(torch, dtype), device, backend)):
            error = relative_error(ours, recorded)
            line = f"{path.name}  {name}  {error:.2e}"
            report(line)
            n_quantities, worst = n_quantities + 1, max(worst, error)
            if error > limit:
                beyond.append(line)
    return Checked(len(files), n_quantities, worst, beyond)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--backend", default="reference", choices=BACKENDS)
    parser.add_argument("--dtype", default="float64", choices=tuple(LIMIT))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    args = parser.parse_args()
    if not args.directory.is_dir():
        parser.error(f"{args.directory} is not a directory")
    done = check_directory(args.directory, args.dtype, device=args.device, backend=args.backend)
    print(f"{done.n_files} files, {done.n_quantities} quantities, worst {done.worst:.2e}")
    return 0 if done.n_files and not done.beyond else 1


if __name__ == "__main__":
    sys.exit(main())
