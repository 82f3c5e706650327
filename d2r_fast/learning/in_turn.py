"""The update's networks one after the other, as the methods do that D2R is compared with: who comes later sees what
those before have become. `sac.py` has the equations, `SacConfig.order` says who does what."""

from collections.abc import Callable

import torch
from torch import Tensor

from d2r_fast.config import SacConfig
from d2r_fast.learning.beside import Beside
from d2r_fast.learning.passes import Network, Pass
from d2r_fast.nets.agent import Agent
from d2r_fast.nets.d2r import GREEDY, RouteChoice
from d2r_fast.ops.replay_rows import ReplayRows
from d2r_fast.ops.sac_losses import LossGradients, sac_losses
from d2r_fast.ops.squashed_normal import squash, squash_backward


class InTurn:
    """One update's rows and what its passes gave, for either order of actor and critics.

    alpha_gradient  [T] where the gradient of log alpha goes
    step            makes the step of "actor", "critics" or "alpha", whose gradient is there
    beside          of the networks
    """

    def __init__(
        self,
        agent: Agent,
        cfg: SacConfig,
        networks: tuple[Network, Network, Network],
        alpha_gradient: Tensor,
        step: Callable[[str], None],
        beside: Beside,
    ):
        self._agent, self._cfg, self._step, self._alpha_gradient = agent, cfg, step, alpha_gradient
        self._beside = beside
        self._actor, self._critics, self._targets = networks

    def critics_first(
        self, rows: ReplayRows, task: Tensor, noise: Tensor, actor_choice: RouteChoice, critic_choice: RouteChoice
    ) -> Tensor:
        """Critics; then actor and log alpha, the actor by the new critics. Returns the losses [6,T]."""
        n, n_obs = len(rows.reward), self._agent.actor.net.n_in
        acted, now, after = rows.x
        now_and_after = rows.x[1:].flatten(0, 1)
        policy = self._actor.forward(now_and_after[:, :n_obs], task, actor_choice, n_back=n)
        logp = squash(policy.out[0], noise, now_and_after[:, n_obs:])
        value, target_q = self._critics.forward_beside(acted, task[:n], critic_choice, n, self._targets, after)
        q, target_q = value.out[..., 0], target_q[..., 0]
        value.backward(self._losses(rows, q, torch.zeros_like(q), target_q, logp).d_q[:, :n, None])
        self._beside.join()
        self._step("critics")

        best = self._critics.forward(now, task[:n], GREEDY, n_back=n)
        loss = self._losses(rows, q, best.out[..., 0], target_q, logp)
        self._to_actor(rows, noise, policy, best, loss)
        self._step("actor")
        self._step("alpha")
        return loss.losses

    def actor_first(
        self, rows: ReplayRows, task: Tensor, noise: Tensor, actor_choice: RouteChoice, critic_choice: RouteChoice
    ) -> Tensor:
        """Actor and log alpha; then the critics, whose targets are the new actor's, with the new alpha."""
        n, n_obs = len(rows.reward), self._agent.actor.net.n_in
        acted, now, after = rows.x
        policy = self._actor.forward(now[:, :n_obs], task[:n], actor_choice, n_back=n)
        logp = squash(policy.out[0], noise[:n], now[:, n_obs:])
        best = self._critics.forward(now, task[:n], GREEDY, n_back=n)
        of_now, nothing = best.out[..., 0], torch.zeros_like(best.out[..., 0])
        loss = self._losses(rows, nothing, of_now, nothing, torch.cat([logp, torch.zeros_like(logp)]))
        self._to_actor(rows, noise, policy, best, loss)
        self._step("actor")
        self._step("alpha")

        next_policy = self._actor.forward(after[:, :n_obs], task[:n], GREEDY)
        next_logp = squash(next_policy.out[0], noise[n:], after[:, n_obs:])
        value, target_q = self._critics.forward_beside(acted, task[:n], critic_choice, n, self._targets, after)
        later = self._losses(rows, value.out[..., 0], of_now, target_q[..., 0], torch.cat([logp, next_logp]))
        value.backward(later.d_q[:, :n, None])
        self._beside.join()
        self._step("critics")
        loss.losses[2] = later.losses[2]
        return loss.losses

    def _losses(self, rows: ReplayRows, q: Tensor, of_now: Tensor, target_q: Tensor, logp: Tensor) -> LossGradients:
        """All losses, with gradients, of which the caller takes those whose turn it is; log alpha's is in its place."""
        agent, cfg = self._agent, self._cfg
        return LossGradients(
            *sac_losses(
                *(torch.cat([q, of_now], 1), target_q, logp, rows.reward, rows.terminal, agent.log_alpha),
                *(cfg.gamma, -float(agent.actor.action_size), cfg.loss_limit, cfg.task_weights, self._alpha_gradient),
            )
        )

    def _to_actor(self, rows: ReplayRows, noise: Tensor, policy: Pass, best: Pass, loss: LossGradients) -> None:
        """The actor's gradient, by way of the critics' value of its actions."""
        n, n_obs = len(rows.reward), self._agent.actor.net.n_in
        d_now = best.backward(loss.d_q[:, n:, None])
        assert d_now is not None
        actions = rows.x[1][:, n_obs:]
        d_policy = squash_backward(d_now[:, n_obs:], loss.d_logp, policy.out[0, :n], noise[:n], actions)
        policy.backward(d_policy[None])
        self._beside.join()
