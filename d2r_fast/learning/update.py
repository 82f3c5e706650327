"""The update that training makes: the equations of `sac.py` in a few calls, with gradients by hand instead of autograd.

One pass through each network forward, one through actor and critics back, and between them one call each for the
batch's rows, the policy's actions, all losses with their gradients, and the step of everything that is trained. Where
each pass is one call, as D2R's on the CPU, all of this but rows and step is one, too: `sac_gradient`.
`tests/learning/test_update.py` holds it against `sac.py`.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from d2r_fast.config import SacConfig
from d2r_fast.learning.beside import Beside
from d2r_fast.learning.in_turn import InTurn
from d2r_fast.learning.parameters import FlatParameters
from d2r_fast.learning.passes import Network
from d2r_fast.learning.sac import actor_choice, draw_reset, draw_route_noise, reset_extreme_tasks
from d2r_fast.learning.saved_state import check_tensor, check_tensors, count, describe, field
from d2r_fast.learning.shares import Shares
from d2r_fast.nets.agent import N_CRITICS, Agent
from d2r_fast.nets.d2r import RouteChoice
from d2r_fast.ops.optimiser_step import optimiser_step
from d2r_fast.ops.replay_rows import ReplayRows
from d2r_fast.ops.sac_gradient import sac_gradient
from d2r_fast.ops.sac_losses import LossGradients, sac_losses
from d2r_fast.ops.squashed_normal import squash, squash_backward

BETA1, BETA2 = 0.9, 0.999


class Draws(NamedTuple):
    """The random numbers of one update, drawn outside so that an update is a function of its inputs.

    noise          [2B,A] standard normal, for the actions at obs and then at next_obs
    critic_choice  how the critics choose routes in their loss: sampled
    actor_noise    [1,B,R] standard Gumbel, where the actor's routes are sampled
    reset          [T,T] in [0, 1), where extreme tasks are reset
    """

    noise: Tensor
    critic_choice: RouteChoice
    actor_noise: Tensor | None = None
    reset: Tensor | None = None


def draw(agent: Agent, rows: ReplayRows, task: Tensor, generator: torch.Generator, cfg: SacConfig) -> Draws:
    """Fresh random numbers for `Update.step`, in one call a kind; `generator` lives on the agent's device."""
    n_rows, like = len(rows.reward), rows.reward
    shape = (2 * n_rows, agent.actor.action_size)
    noise = torch.randn(shape, dtype=like.dtype, device=like.device, generator=generator)
    actor_noise, critic_noise = draw_route_noise(agent, n_rows, like, generator, cfg)
    critic_choice = RouteChoice.sampled(agent.route_temp[task[:n_rows]], critic_noise)
    return Draws(noise, critic_choice, actor_noise, draw_reset(agent, like, generator, cfg))


class Metrics(NamedTuple):
    """What an update tells, on the device.

    losses  [6,T] as `sac_losses` gives them: alpha's, actor's and critics' loss, whether left out, entropy, alpha
    norms   [2+E] gradient norms before clipping: actor, each critic, log alpha
    """

    losses: Tensor
    norms: Tensor


class Update:
    """Adam's state and the buffers of one agent, and the update that changes them in place.

    shares: the others that make the same update of the same agent, each with its share of the batch's rows, as many of
    every task. What all rows decide together is then averaged over all shares: which tasks are left out, and gradients
    before they are clipped. What follows is the same everywhere, bit by bit.

    first, second  [n] Adam's moments, laid out as `flat.values`
    step_count     []  int64, steps made
    """

    def __init__(self, agent: Agent, cfg: SacConfig, shares: Shares | None = None):
        self.agent, self._cfg, self._shares = agent, cfg, shares
        self.flat = FlatParameters(agent)
        self.first, self.second = torch.zeros_like(self.flat.values), torch.zeros_like(self.flat.values)
        self.step_count = torch.zeros((), dtype=torch.int64, device=self.first.device)
        self._beside = Beside(self.first.device)
        self._actor, self._critics = (
            Network(owner.net, self.flat, self._beside) for owner in (agent.actor, agent.critics)
        )
        self._targets = Network(agent.target_critics.net, self.flat, self._beside, trained=False)
        self._as_one: bool | None = None
        # Without route balancing what the step says goes nowhere.
        self._route_temp = agent.route_temp if cfg.route_balancing else torch.empty_like(agent.route_temp)
        (self._alpha_gradient,) = self.flat.gradients([agent.log_alpha])
        self._learning_rates = [cfg.actor_lr, *[cfg.critic_lr] * N_CRITICS, cfg.alpha_lr]
        in_turn = InTurn(
            *(agent, cfg, (self._actor, self._critics, self._targets)),
            *(self._alpha_gradient, self._step_of_part, self._beside),
        )
        self._one_by_one = {"critics_first": in_turn.critics_first, "actor_first": in_turn.actor_first}.get(cfg.order)
        self._norms: dict[str, Tensor] = {}  # of the parts that have made their step

    @torch.no_grad()
    def step(self, rows: ReplayRows, task: Tensor, draws: Draws) -> Metrics:
        """One update of actor, critics, log alpha, targets and route temperatures; task [2B] of the rows, twice over.

        Every loss sees the parameters from before the step, but for those that made theirs in an earlier turn.
        """
        cfg, flat = self._cfg, self.flat
        if self._one_by_one is not None:
            choice = self._actor_choice(rows, task, draws)
            losses = self._one_by_one(rows, task, draws.noise, choice, draws.critic_choice)
        else:
            fill = self._fill_gradient_in_one if self._runs_as_one(rows.x) else self._fill_gradient
            losses = fill(rows, task, draws)
        if cfg.order == "joint" and cfg.clip_alpha:
            self._average(flat.gradient)
            norms = optimiser_step(
                *(flat.values, flat.gradient, self.first, self.second, flat.targets, self.step_count),
                *(self.agent.log_alpha, self._route_temp, flat.segments, flat.targets_begin, self._learning_rates),
                *(BETA1, BETA2, cfg.adam_eps, cfg.norm_limit, cfg.target_rate, cfg.max_log_alpha),
            )
        else:
            norms = self._end_of_turns()
        if cfg.reset_extreme:
            assert draws.reset is not None
            if self._shares is not None:
                self._shares.from_first(draws.reset)
            reset_extreme_tasks(self.agent, losses[3] > 0, draws.reset)
        return Metrics(losses, norms)

    def _step_of_part(self, name: str) -> None:
        """The step of "actor", "critics" or "alpha", which are parts of the buffers, for itself."""
        cfg, flat, part = self._cfg, self.flat, self.flat.parts[name]
        own = slice(part.begin, part.end)
        self._average(flat.gradient[own])
        targets = flat.targets if name == "critics" else flat.targets[:0]
        count = self.step_count.clone()  # which all parts share
        temperature = self._route_temp if name == "alpha" else torch.empty_like(self._route_temp)
        self._norms[name] = optimiser_step(
            *(flat.values[own], flat.gradient[own], self.first[own], self.second[own], targets, count),
            *(self.agent.log_alpha, temperature, part.segments, 0, [self._learning_rates[i] for i in part.networks]),
            *(BETA1, BETA2, cfg.adam_eps, math.inf if name == "alpha" and not cfg.clip_alpha else cfg.norm_limit),
            *(cfg.target_rate, cfg.max_log_alpha),
        )

    def _end_of_turns(self) -> Tensor:
        """The step of who has made none, and the norms of all [2+E]."""
        for name in self.flat.parts:
            if name not in self._norms:
                self._step_of_part(name)
        norms = torch.cat([self._norms[name] for name in self.flat.parts])
        self._norms.clear()
        self.step_count += 1
        return norms

    def _fill_gradient(self, rows: ReplayRows, task: Tensor, draws: Draws) -> Tensor:
        """The gradient of all that is trained, to `flat.gradient`; returns the losses [6,T]."""
        agent, cfg = self.agent, self._cfg
        n, n_obs = len(rows.reward), agent.actor.net.n_in
        acted_and_now, now_and_after = rows.x[:2].flatten(0, 1), rows.x[1:].flatten(0, 1)  # [2B,O+A]

        # The actor learns along the routes that it acted on, or chooses anew; at next_obs it goes the greedy ones.
        choice = self._actor_choice(rows, task, draws)
        policy = self._actor.forward(now_and_after[:, :n_obs], task, choice, n_back=n)
        actions = now_and_after[:, n_obs:]  # written here, read by the critics
        logp = squash(policy.out[0], draws.noise, actions)  # [2B]
        alpha_loss = self._step_alpha(logp[:n]) if cfg.order == "alpha_first" else None

        # The critics learn from the actions in the batch; at the actor's they are constant.
        value, target_q = self._critics.forward_beside(
            acted_and_now, task, draws.critic_choice, 2 * n, self._targets, rows.x[2]
        )
        loss = self._losses(value.out[..., 0], target_q[..., 0], logp, rows)
        d_now = value.backward(loss.d_q[..., None])  # [B,O+A]
        assert d_now is not None
        d_policy = squash_backward(d_now[:, n_obs:], loss.d_logp, policy.out[0, :n], draws.noise[:n], actions[:n])
        policy.backward(d_policy[None])
        self._beside.join()
        if alpha_loss is not None:
            loss.losses[0] = alpha_loss
        return loss.losses

    def _losses(self, q: Tensor, target_q: Tensor, logp: Tensor, rows: ReplayRows) -> LossGradients:
        """`sac_losses`; a task is left out by its loss over the rows of all shares."""
        agent, cfg = self.agent, self._cfg
        together = self._shares is not None and cfg.loss_limit < math.inf
        limit = math.inf if together else cfg.loss_limit
        loss = LossGradients(
            *sac_losses(
                *(q, target_q, logp, rows.reward, rows.terminal, agent.log_alpha),
                *(cfg.gamma, -float(agent.actor.action_size), limit, cfg.task_weights, self._alpha_gradient),
            )
        )
        if together:
            self._average(loss.losses)
            kept = loss.losses[:3].sum(0) <= cfg.loss_limit  # [T]; a loss that is no number is not
            loss.losses[3] = ~kept
            of_row = kept.repeat_interleave(len(rows.reward) // len(kept))  # [B]
            loss.d_q.masked_fill_(~of_row.repeat(2), 0)
            loss.d_logp.masked_fill_(~of_row, 0)
            self._alpha_gradient.masked_fill_(~kept, 0)
        return loss

    def _average(self, tensor: Tensor) -> None:
        if self._shares is not None:
            self._shares.average(tensor)

    def _actor_choice(self, rows: ReplayRows, task: Tensor, draws: Draws) -> RouteChoice:
        return actor_choice(self.agent, rows.route, draws.actor_noise, task[: len(rows.reward)], self._cfg)

    def _step_alpha(self, logp: Tensor) -> Tensor:
        """Log alpha's step before the others', by the log probabilities [B] at obs; returns its loss [T]."""
        log_alpha = self.agent.log_alpha
        to_go = logp.view(len(log_alpha), -1).mean(1) - self.agent.actor.action_size
        loss = -log_alpha * to_go
        self._alpha_gradient.copy_(-to_go / len(log_alpha))
        self._step_of_part("alpha")
        return loss

    def _runs_as_one(self, x: Tensor) -> bool:
        """Whether each pass is one call, and so the update's gradient can be one."""
        if self._as_one is None:  # who hooks a layer later is not seen, as in `Network`
            networks = (self._actor, self._critics, self._targets)
            like_that = self._cfg.actor_routes == "replayed" and self._cfg.order == "joint"
            # Shares talk about losses between the passes forward and back.
            like_that &= self._shares is None or self._cfg.loss_limit == math.inf
            self._as_one = like_that and all(network.runs_as_one(x[0]) for network in networks)
        return self._as_one

    def _fill_gradient_in_one(self, rows: ReplayRows, task: Tensor, draws: Draws) -> Tensor:
        """The same by one call: at small sizes to make the calls takes as long as a tenth of what they do."""
        agent, cfg, choice = self.agent, self._cfg, draws.critic_choice
        net: Any = agent.actor.net  # a `RoutedNetwork`, with settings like the critics'
        return sac_gradient(
            *(rows.x, rows.reward, rows.terminal, rows.route, task, draws.noise),
            *(choice.temperature, choice.noise, choice.index, agent.log_alpha),
            *(net.cfg.top_k, net.cfg.residual, net.cfg.resrouting and net.training, net.cfg.precision),
            *(cfg.gamma, -float(agent.actor.action_size), cfg.loss_limit, cfg.task_weights, self._alpha_gradient),
            *(self._actor.parameters, self._critics.parameters, self._targets.parameters),
            *(self._actor.gradients, self._critics.gradients),
        )

    def state_dict(self) -> dict[str, object]:
        """Adam's state; moments by the parameters' names."""
        named = self._named_parameters()
        first, second = (
            {name: self.flat.view(moment, parameter) for name, parameter in named.items()}
            for moment in (self.first, self.second)
        )
        return {"step": int(self.step_count), "first": first, "second": second}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave, or the state_dict of torch's Adam over actor, critics and log alpha, which
        earlier checkpoints hold. ValueError: it is of another agent."""
        named = self._named_parameters()
        if "param_groups" in state:
            state = _from_torchs_adam(state, named)
        step = count(state, "step")
        for which in ("first", "second"):
            check_tensors(state.get(which), f"optimiser.{which}", named)
        for moment, saved in ((self.first, state["first"]), (self.second, state["second"])):
            for name, value in saved.items():
                self.flat.view(moment, named[name]).copy_(value)
        self.step_count.fill_(step)

    def moments(self) -> dict[str, Tensor]:
        """Adam's moments, views by what they are of."""
        return {
            f"{name}: Adam's {which} moment": self.flat.view(moment, parameter)
            for name, parameter in self._named_parameters().items()
            for which, moment in (("first", self.first), ("second", self.second))
        }

    def _named_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What Adam moves: actor, critics and log alpha, in the order of `flat.values`."""
        agent = self.agent
        named = {f"actor.{name}": p for name, p in agent.actor.named_parameters()}
        named |= {f"critics.{name}": p for name, p in agent.critics.named_parameters()}
        return named | {"log_alpha": agent.log_alpha}


def _from_torchs_adam(state: dict, named: dict[str, torch.nn.Parameter]) -> dict[str, Any]:
    """What torch.optim.Adam saved of these parameters, as `Update.state_dict` has it. ValueError: it is damaged."""
    of_each = field(state, "state", dict)
    if not of_each:  # before the first update there is none
        zeros = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
        return {"step": 0, "first": zeros, "second": zeros}
    if list(of_each) != list(range(len(named))):
        raise ValueError(f"optimiser.state: expected one for each of {len(named)} parameters, got {len(of_each)}")
    steps = torch.zeros(())
    for i, one in of_each.items():
        if not isinstance(one, dict):
            raise ValueError(f"optimiser.state[{i}]: expected dict, got {describe(one)}")
        check_tensor(one.get("step"), f"optimiser.state[{i}]['step']", steps)
    first, second = (
        {name: of_each[i].get(which) for i, name in enumerate(named)} for which in ("exp_avg", "exp_avg_sq")
    )
    return {"step": int(of_each[0]["step"]), "first": first, "second": second}
