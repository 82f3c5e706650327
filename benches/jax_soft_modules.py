"""One whole update of Soft Modules, ours against the same equations in JAX, compiled (jit), in one run.

    pip install jax
    python benches/jax_soft_modules.py --size deep --json benches/results/jax_soft_modules_deep_cpu.json

Both start from the same parameters at the published sizes. First each makes an update of the same rows with the same
noise, and the losses must agree. Then updates take turns. Ours draws its rows from a replay and makes its noise, as
training does; JAX's batch lies ready, which is in its favour. How many threads JAX takes is its own choice. Floors are
`update_step.py`'s to tell: torch's products are slow in a process where JAX computes.
"""

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax
from timing import measure, print_table, write_report
from update_step import make_learner, variant_of

from d2r_fast.config import RunConfig, SacConfig
from d2r_fast.learning.update import Draws
from d2r_fast.nets.agent import N_CRITICS, Agent
from d2r_fast.nets.d2r import RouteChoice
from d2r_fast.nets.soft_modules import SoftModulesConfig
from d2r_fast.presets import PRESETS

SIZES = {"shallow": SoftModulesConfig(n_layers=2, n_modules=2, module_width=256), "deep": SoftModulesConfig()}
Parameters = dict[str, Any]


def network(p: Parameters, x: Any, task: Any, n: int) -> Any:
    """One of the E networks: x [B,n_in], task [B] -> out [B,n_out]; parameters by their names in `SoftModules`."""

    def layer(name: str, v: Any) -> Any:
        return v @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def count(name: str) -> int:
        return sum(key.startswith(f"{name}.") and key.endswith(".weight") for key in p)

    f = x
    for i in range(count("base")):
        f = layer(f"base.{i}", jax.nn.relu(f) if i else f)
    c = jax.nn.relu(f * (p["task.weight"].T + p["task.bias"])[task])
    for i in range(count("gating")):
        c = layer(f"gating.{i}", jax.nn.relu(c) if i else c)
    gates: list[Any] = []
    for level in range(count("gate")):
        scale = layer(f"gate_cond.{level}", jnp.concatenate([g.reshape(len(x), -1) for g in gates], 1)) if level else 1
        logits = layer(f"gate.{level}", jax.nn.relu(scale * c))
        gates.append(jax.nn.softmax(logits.reshape(len(x), -1, n), -1))  # [B,targets,N]
    m = jnp.einsum("bi,noi->nbo", jax.nn.relu(f), p["layers.0.weight"]) + p["layers.0.bias"][:, None]
    for level in range(1, count("layers")):
        mixed = jax.nn.relu(jnp.einsum("bjk,kbd->jbd", gates[level - 1], m))
        m = jnp.einsum("nbi,noi->nbo", mixed, p[f"layers.{level}.weight"]) + p[f"layers.{level}.bias"][:, None]
    return layer("head", jax.nn.relu(jnp.einsum("bjk,kbd->bd", gates[-1], m)))


def sample(actor: Parameters, obs: Any, task: Any, noise: Any, n: int) -> tuple[Any, Any]:
    """Action and its log probability."""
    out = network({name: v[0] for name, v in actor.items()}, obs, task, n)
    mean, log_std = jnp.split(out, 2, -1)
    log_std = jnp.clip(log_std, -20, 2)
    action = jnp.tanh(mean + jnp.exp(log_std) * noise)
    log_normal = -0.5 * noise**2 - log_std - 0.5 * jnp.log(2 * jnp.pi)
    return action, (log_normal - jnp.log(1 - action**2 + 1e-6)).sum(-1)


def values(critics: Parameters, obs: Any, action: Any, task: Any, n: int) -> Any:
    """q [E,B]."""
    x = jnp.concatenate([obs, action], 1)
    return jax.vmap(lambda p: network(p, x, task, n))(critics)[..., 0]


def gradients(state: Parameters, batch: Parameters, noise: Any, n: int, cfg: SacConfig) -> tuple[Parameters, Any]:
    """Of actor, critics and log alpha, and the losses [3,T]; every loss sees the parameters from before the step."""
    obs, next_obs, task, log_alpha = batch["obs"], batch["next_obs"], batch["task"], state["log_alpha"]
    n_tasks, target_entropy = len(log_alpha), -float(batch["action"].shape[1])
    alpha, weight = jnp.exp(log_alpha)[task], (n_tasks * jax.nn.softmax(-log_alpha))[task]

    def by_task(value: Any) -> Any:
        return value.reshape(*value.shape[:-1], n_tasks, -1).mean(-1)

    def actor_loss(actor: Parameters) -> Any:
        action, logp = sample(actor, obs, task, noise[0], n)
        loss = by_task(weight * (alpha * logp - values(state["critics"], obs, action, task, n).min(0)))
        return loss, by_task(logp)

    next_action, next_logp = sample(state["actor"], next_obs, task, noise[1], n)
    next_q = values(state["targets"], next_obs, next_action, task, n).min(0)
    y = batch["reward"] + cfg.gamma * (1 - batch["terminal"]) * (next_q - alpha * next_logp)

    def critic_loss(critics: Parameters) -> Any:
        return by_task(weight * (values(critics, obs, batch["action"], task, n) - y) ** 2).sum(0)

    of_actor, to_actor, logp = jax.vjp(actor_loss, state["actor"], has_aux=True)
    of_critics, to_critics = jax.vjp(critic_loss, state["critics"])
    of_alpha = -log_alpha * (logp + target_entropy)
    kept = (of_alpha + of_actor + of_critics <= cfg.loss_limit) / n_tasks
    found = {"actor": to_actor(kept)[0], "critics": to_critics(kept)[0]}
    return found | {"log_alpha": -kept * (logp + target_entropy)}, jnp.stack([of_alpha, of_actor, of_critics])


@partial(jax.jit, static_argnames=("n", "cfg"), donate_argnums=0)
def update(state: Parameters, batch: Parameters, noise: Any, n: int, cfg: SacConfig) -> tuple[Parameters, Any]:
    """One update; noise [2,B,A], or None: drawn here."""
    key, own = jax.random.split(state["key"])
    if noise is None:
        noise = jax.random.normal(own, (2, *batch["action"].shape))
    found, losses = gradients(state, batch, noise, n, cfg)
    count = state["count"] + 1
    after: Parameters = {"key": key, "count": count, "first": {}, "second": {}}

    def step(name: str, n_nets: int, rate: float) -> None:
        """Clipping of each network for itself, and Adam."""
        squares = [(g**2).reshape(n_nets, -1).sum(1) for g in jax.tree.leaves(found[name])]
        scale = jnp.minimum(1, cfg.norm_limit / (jnp.sqrt(sum(squares)) + 1e-6))
        g = jax.tree.map(lambda g: g * scale.reshape(-1, *[1] * (g.ndim - 1)), found[name])
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["first"][name], g)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state["second"][name], g)
        size, root = rate / (1 - 0.9**count), jnp.sqrt(1 - 0.999**count)
        after[name] = jax.tree.map(
            lambda p, m, v: p - size * m / (jnp.sqrt(v) / root + cfg.adam_eps), state[name], first, second
        )
        after["first"][name], after["second"][name] = first, second

    step("actor", 1, cfg.actor_lr)
    step("critics", N_CRITICS, cfg.critic_lr)
    step("log_alpha", 1, cfg.alpha_lr)
    after["log_alpha"] = jnp.minimum(after["log_alpha"], cfg.max_log_alpha)
    after["targets"] = jax.tree.map(lambda t, p: t + cfg.target_rate * (p - t), state["targets"], after["critics"])
    return after, lax.stop_gradient(losses)


def in_jax(value: torch.Tensor) -> Any:
    return jnp.array(value.detach().numpy())


def state_of(agent: Agent) -> Parameters:
    owners = {"actor": agent.actor, "critics": agent.critics, "targets": agent.target_critics}
    found: Parameters = {
        name: {of: in_jax(p) for of, p in owner.net.named_parameters()} for name, owner in owners.items()
    }
    found["log_alpha"] = in_jax(agent.log_alpha)
    trained = {name: found[name] for name in ("actor", "critics", "log_alpha")}
    zeros = [jax.tree.map(jnp.zeros_like, trained) for _ in range(2)]
    return found | {"first": zeros[0], "second": zeros[1], "count": jnp.array(0), "key": jax.random.key(0)}


def compare(cfg: RunConfig) -> tuple[dict[str, Any], float]:
    """Both variants, ready to be timed; and how far their losses of one update are apart, of the largest."""
    learner = make_learner(cfg, "cpu")
    rows = learner._replay.sample_rows(cfg.batch_size, learner.generator)
    task, n_actions = learner._task, learner.agent.actor.action_size
    n, n_obs = len(rows.reward), rows.x.shape[-1] - n_actions
    noise = torch.randn(2, n, n_actions)
    state = state_of(learner.agent)
    batch = {
        "obs": in_jax(rows.x[0, :, :n_obs]),
        "action": in_jax(rows.x[0, :, n_obs:]),
        "next_obs": in_jax(rows.x[2, :, :n_obs]),
        "reward": in_jax(rows.reward),
        "terminal": in_jax(rows.terminal),
        "task": in_jax(task[:n]),
    }
    nothing = torch.zeros(N_CRITICS, n, 0)  # the noise of routes that there are none of
    draws = Draws(noise.flatten(0, 1), RouteChoice.sampled(learner.agent.route_temp[task[:n]], nothing))
    ours = in_jax(learner.update.step(rows, task, draws).losses[:3])
    n_modules = cfg.net.n_modules  # type: ignore[attr-defined]  # of Soft Modules
    state, theirs = update(state, batch, in_jax(noise), n_modules, cfg.sac)
    apart = float(abs(ours - theirs).max() / abs(theirs).max())
    after = {f"{owner}.net.{name}": v for owner in ("actor", "critics") for name, v in state[owner].items()}
    moved = max(float(abs(in_jax(learner.agent.state_dict()[name]) - v).max()) for name, v in after.items())
    print(f"losses of one update differ by {apart:.1e} of the largest, parameters after it by {moved:.1e} at most")

    def jax_update() -> None:
        nonlocal state
        state, losses = update(state, batch, None, n_modules, cfg.sac)
        jax.block_until_ready((state, losses))

    return {"d2r_fast": lambda: learner.run(1), "jax": jax_update}, apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="deep", help="of the published two")
    parser.add_argument("--rounds", type=int, default=15, help="updates measured of each variant")
    parser.add_argument("--json", type=Path, help="write the rows here")
    args = parser.parse_args()
    cfg = variant_of(replace(PRESETS["mt10-rand"][1], net=SIZES[args.size]), "auto", "float32")
    variants, apart = compare(cfg)
    if not apart < 1e-4:
        raise SystemExit("the two are not the same update")
    samples = measure(variants, "cpu", args.rounds, warmup=2)
    rows: list[dict[str, Any]] = []
    for variant, measured in samples.items():
        row = {"net": f"soft-modules {args.size}", "variant": variant, **measured.as_dict()}
        rows.append(row | {"times_d2r_fast": round(measured.median / samples["d2r_fast"].median, 2)})
    print_table(rows, list(rows[0]))
    command = "python " + " ".join(["benches/jax_soft_modules.py", *sys.argv[1:]])
    write_report(args.json, command, "cpu", rows, jax=jax.__version__)


if __name__ == "__main__":
    main()
