"""The multi-task SAC update with automatic route balancing: the paper's equations, top to bottom."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from d2r_fast.config import SacConfig
from d2r_fast.nets.agent import N_CRITICS, Agent
from d2r_fast.nets.d2r import RouteChoice
from d2r_fast.nets.paco import reset_extreme
from d2r_fast.ops.gumbel import gumbel


class Batch(NamedTuple):
    """B rows, B/T of every task; rows of a task stand together, tasks in order."""

    obs: Tensor  # [B,O]
    action: Tensor  # [B,A]
    reward: Tensor  # [B], scaled
    terminal: Tensor  # [B], 1 where no value follows
    next_obs: Tensor  # [B,O]
    task: Tensor  # [B] int64
    route: Tensor  # [B,N,K] integer: the sources the actor's routes kept when the row was collected; N = K = 0 without


class Draws(NamedTuple):
    """The random numbers of one update, drawn outside so that an update is a function of its inputs."""

    noise: Tensor  # [B,A] standard normal, for the action at obs
    next_noise: Tensor  # [B,A] standard normal, for the action at next_obs
    critic_choice: RouteChoice  # how the critics choose routes in their loss: sampled
    actor_noise: Tensor | None = None  # [1,B,R] standard Gumbel, where the actor's routes are sampled
    reset: Tensor | None = None  # [T,T] in [0,1), where extreme tasks are reset


class Losses(NamedTuple):
    """Loss terms, one number a task [T]; critic [E,T]; total is their sum over the critics."""

    alpha: Tensor
    actor: Tensor
    critic: Tensor
    total: Tensor
    logp: Tensor  # mean log probability of the actions at obs, no gradient


def task_weight(log_alpha: Tensor) -> Tensor:
    """T softmax(-log alpha) [T]: the weight of a task's losses, and its route temperature. No gradient."""
    return log_alpha.numel() * torch.softmax(-log_alpha.detach(), 0)


def draw(agent: Agent, batch: Batch, generator: torch.Generator, cfg: SacConfig) -> Draws:
    """Fresh random numbers for `update`; `generator` lives on the agent's device."""
    rows, like = len(batch.obs), batch.obs
    noise = torch.randn(2, rows, agent.actor.action_size, generator=generator, device=like.device)
    actor_noise, critic_noise = draw_route_noise(agent, rows, like, generator, cfg)
    critic_choice = RouteChoice.sampled(agent.route_temp[batch.task], critic_noise)
    return Draws(noise[0], noise[1], critic_choice, actor_noise, draw_reset(agent, like, generator, cfg))


def draw_reset(agent: Agent, like: Tensor, generator: torch.Generator, cfg: SacConfig) -> Tensor | None:
    """Shares for `reset_extreme_tasks` [T,T], if it is made."""
    if not cfg.reset_extreme:
        return None
    shape = agent.n_tasks, agent.n_tasks
    return torch.rand(shape, dtype=like.dtype, device=like.device, generator=generator)


def draw_route_noise(
    agent: Agent, n_rows: int, like: Tensor, generator: torch.Generator, cfg: SacConfig
) -> tuple[Tensor | None, Tensor]:
    """Standard Gumbel noise for the actor's routes [1,B,R], if they are sampled, and the critics' [E,B,R]; one call."""
    n_logits, sampled = agent.critics.net.cfg.n_logits, cfg.actor_routes == "sampled"
    noise = gumbel((N_CRITICS + sampled, n_rows, n_logits), like, generator)
    return noise[N_CRITICS:] if sampled else None, noise[:N_CRITICS]


def actor_choice(agent: Agent, replayed: Tensor, noise: Tensor | None, task: Tensor, cfg: SacConfig) -> RouteChoice:
    """How the actor chooses routes in its loss.

    replayed  [1,B,N,K] those that it acted on
    noise     [1,B,R] as drawn, if they are sampled
    task      [B]
    """
    if cfg.actor_routes == "replayed":
        return RouteChoice.given(replayed)
    temperature = agent.route_temp[task]
    if cfg.actor_routes == "greedy":  # said as a sample without noise: a choice, like the others, for these rows
        temperature = torch.ones_like(temperature)
        noise = temperature.new_zeros(1, len(task), agent.actor.net.cfg.n_logits)
    assert noise is not None
    return RouteChoice.sampled(temperature, noise)


def losses(agent: Agent, batch: Batch, draws: Draws, cfg: SacConfig) -> Losses:
    """Every loss term of every task, from the parameters as they are."""
    n_tasks, n_actions = agent.n_tasks, batch.action.shape[1]
    target_entropy = -float(n_actions)
    obs, task = batch.obs, batch.task
    alpha = agent.log_alpha.detach().exp()[task]  # [B]
    weight = task_weight(agent.log_alpha)[task] if cfg.task_weights else torch.ones_like(alpha)  # [B]

    def task_mean(value: Tensor) -> Tensor:  # [...,B] -> [...,T]
        return value.view(*value.shape[:-1], n_tasks, -1).mean(-1)

    # The actor learns along the routes that it acted on, unless told to choose anew.
    choice = actor_choice(agent, batch.route[None], draws.actor_noise, task, cfg)
    now = agent.actor.sample(obs, task, draws.noise, choice)
    alpha_loss = -agent.log_alpha * (task_mean(now.logp.detach()) + target_entropy)  # [T]

    # Constant parameters: the actor's loss must reach the action through the critics, not the critics. They stay in
    # training mode, so ResRouting masks this gradient too.
    constant = {name: p.detach() for name, p in agent.critics.named_parameters()}
    q_now = functional_call(agent.critics, constant, (obs, now.action, task)).amin(0)  # [B]
    actor_loss = task_mean(weight * (alpha * now.logp - q_now))  # [T]

    with torch.no_grad():
        after = agent.actor.sample(batch.next_obs, task, draws.next_noise)
        next_q = agent.target_critics(batch.next_obs, after.action, task).amin(0)  # [B]
        target = batch.reward + cfg.gamma * (1 - batch.terminal) * (next_q - alpha * after.logp)  # [B]
    q = agent.critics(obs, batch.action, task, draws.critic_choice)  # [E,B]
    critic_loss = task_mean(weight * (q - target).square())  # [E,T]

    total = alpha_loss + actor_loss + critic_loss.sum(0)  # [T]
    return Losses(alpha_loss, actor_loss, critic_loss, total, task_mean(now.logp.detach()))


# Who makes its step when; those in one group at once.
TURNS = {
    "joint": (("actor", "critic", "alpha"),),
    "alpha_first": (("alpha",), ("actor", "critic")),
    "critics_first": (("critic",), ("actor", "alpha")),
    "actor_first": (("actor", "alpha"), ("critic",)),
}


def clip_grad_norm(parameters: list[Tensor], max_norm: float, n_nets: int) -> Tensor:
    """Scale the gradients of each of E networks, in place, to norm `max_norm` at most; returns the norms before [E].

    Axis 0 of every parameter is the network; n_nets=1 takes each whole.
    """
    # One list a network, each one call over all of its parameters.
    grads = [[p.grad[e] if n_nets > 1 else p.grad for p in parameters if p.grad is not None] for e in range(n_nets)]
    norm = torch.stack([torch.stack(torch._foreach_norm(of_net)).norm() for of_net in grads])  # [E]
    scale = (max_norm / (norm + 1e-6)).clamp(max=1)
    for e, of_net in enumerate(grads):
        torch._foreach_mul_(of_net, scale[e])
    return norm


def make_optimiser(agent: Agent, cfg: SacConfig) -> torch.optim.Adam:
    """One Adam over three groups: actor, critics, log alpha. Adam is element-wise, so this is one Adam a network."""
    groups = [
        {"params": list(agent.actor.parameters()), "lr": cfg.actor_lr},
        {"params": list(agent.critics.parameters()), "lr": cfg.critic_lr},
        {"params": [agent.log_alpha], "lr": cfg.alpha_lr},
    ]
    # Capturable: its step count lives on the GPU, where a captured update can raise it.
    on_gpu = agent.log_alpha.is_cuda
    return torch.optim.Adam(groups, betas=(0.9, 0.999), eps=cfg.adam_eps, fused=True, capturable=on_gpu)


def update(
    agent: Agent, optimiser: torch.optim.Optimizer, batch: Batch, draws: Draws, cfg: SacConfig
) -> dict[str, Tensor]:
    """One update of actor, critics, log alpha, targets and route temperatures, in place.

    Every loss sees the parameters from before the step, but for those that made theirs in an earlier turn. Returns
    detached metrics on the device, [T] each, but for the gradient norms: [] of the actor and of log alpha, [E] of the
    critics.
    """
    clipped: dict[str, tuple[list[Tensor], float, int]] = {
        "actor": (list(agent.actor.parameters()), cfg.norm_limit, 1),
        "critic": (list(agent.critics.parameters()), cfg.norm_limit, N_CRITICS),
        "alpha": ([agent.log_alpha], cfg.norm_limit if cfg.clip_alpha else math.inf, 1),
    }
    told: dict[str, Tensor] = {}
    norms: dict[str, Tensor] = {}
    for turn in TURNS[cfg.order]:
        loss = losses(agent, batch, draws, cfg)
        of_each = {"actor": loss.actor, "critic": loss.critic.sum(0), "alpha": loss.alpha}
        kept = loss.total.detach() <= cfg.loss_limit  # [T]; the mean still divides by T
        optimiser.zero_grad(set_to_none=True)
        torch.where(kept, sum(of_each[name] for name in turn), 0).mean().backward()
        for name in turn:
            norms[name] = clip_grad_norm(*clipped[name])
            told[f"loss/{name}"] = of_each[name].detach()
        if "actor" in turn:
            told["policy/entropy"] = -loss.logp
        optimiser.step()  # of who has a gradient
        with torch.no_grad():
            agent.log_alpha.clamp_(max=cfg.max_log_alpha)

    with torch.no_grad():
        if cfg.route_balancing:
            agent.route_temp.copy_(task_weight(agent.log_alpha))
        online: list[Tensor] = list(agent.critics.parameters())
        target: list[Tensor] = list(agent.target_critics.parameters())
        torch._foreach_lerp_(target, online, cfg.target_rate)
        if cfg.reset_extreme:
            assert draws.reset is not None
            reset_extreme_tasks(agent, ~kept, draws.reset)
    return {
        **told,
        "loss/left_out": (~kept).float(),
        "policy/alpha": agent.log_alpha.detach().exp(),
        "grad_norm/actor": norms["actor"][0],
        "grad_norm/critic": norms["critic"],
        "grad_norm/alpha": norms["alpha"][0],
    }


@torch.no_grad()
def reset_extreme_tasks(agent: Agent, extreme: Tensor, shares: Tensor) -> None:
    """PaCo's way with tasks [T] that were left out: `nets.paco.reset_extreme` of actor and critics, in place."""
    for owner in (agent.actor, agent.critics):
        weight = owner.net.get_parameter("task.weight")
        weight.copy_(reset_extreme(weight, extreme, shares))
