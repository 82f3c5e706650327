"""The losses of multi-task SAC and their gradients at the networks' outputs, in one call (algorithm: "the update")."""

from typing import NamedTuple

import torch
from torch import Tensor

from d2r_fast.ops.contract import define, launcher


class LossGradients(NamedTuple):
    """What `sac_losses` returns, as a tuple; the gradient of log alpha goes where it was told.

    losses      [6,T] each task's loss of alpha, actor and (summed) critics; 1 where their sum was too large to count,
                else 0; the policy's entropy; alpha
    d_q         [E,2B] gradient at the critics' values
    d_logp      [B]    at the actor's log probabilities at obs
    """

    losses: Tensor
    d_q: Tensor
    d_logp: Tensor


def reference(
    q: Tensor,
    target_q: Tensor,
    logp: Tensor,
    reward: Tensor,
    terminal: Tensor,
    log_alpha: Tensor,
    gamma: float,
    target_entropy: float,
    max_task_loss: float,
    weighted: bool,
    d_log_alpha: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every loss and its gradient; rows of a task stand together, B/T of each, tasks in order.

    q                 [E,2B] values of the batch's actions at obs; then, by the critics as constants, of the actor's
                      there: frozen_q
    target_q          [E,B]  the target critics' values of the actor's actions at next_obs
    logp              [2B]   of the actor's actions at obs, and then at next_obs: next_logp
    reward, terminal  [B]
    log_alpha         [T]
    d_log_alpha       [T]    is written: the gradient of log alpha

        w = T softmax(-log alpha), or 1 unless `weighted`
        y = reward + gamma (1 - terminal) (min_e target_q - alpha next_logp)
        L_alpha = -log alpha (mean logp + H),  H the target entropy
        L_actor = mean w (alpha logp - min_e frozen_q)
        L_critic_e = mean w (q_e - y)^2
        L = 1/T sum of (L_alpha + L_actor + sum_e L_critic_e) over the tasks where that is at most max_task_loss
    """
    n_tasks, n_rows = len(log_alpha), len(reward)
    q, frozen_q, logp, next_logp = q[:, :n_rows], q[:, n_rows:], logp[:n_rows], logp[n_rows:]

    def by_task(value: Tensor) -> Tensor:  # [...,B] -> [...,T,n]
        return value.view(*value.shape[:-1], n_tasks, -1)

    alpha = log_alpha.exp()[:, None]  # [T,1]
    weight = n_tasks * torch.softmax(-log_alpha, 0)[:, None] if weighted else torch.ones_like(alpha)  # [T,1]
    next_value = by_task(target_q.amin(0)) - alpha * by_task(next_logp)
    y = by_task(reward) + gamma * (1 - by_task(terminal)) * next_value  # [T,n]
    error, best = by_task(q) - y, frozen_q.amin(0)
    mean_logp = by_task(logp).mean(-1)
    alpha_loss = -log_alpha * (mean_logp + target_entropy)
    actor_loss = (weight * (alpha * by_task(logp) - by_task(best))).mean(-1)
    critic_loss = (weight * error.square()).mean(-1).sum(0)
    kept = (alpha_loss + actor_loss + critic_loss <= max_task_loss)[:, None]  # [T,1]

    share = torch.where(kept, weight, 0) / len(logp)  # of a row in the mean over rows and tasks
    d_q = torch.where(kept, 2 * share * error, 0).flatten(-2)
    is_best = frozen_q == best
    d_best = -share.expand(error.shape[1:]).flatten() / is_best.sum(0)  # equal ones share the gradient
    d_frozen_q = torch.where(is_best, d_best, 0)
    d_logp = (share * alpha).expand(error.shape[1:]).flatten()
    d_log_alpha.copy_(torch.where(kept[:, 0], -(mean_logp + target_entropy) / n_tasks, 0))
    left_out = 1 - kept[:, 0].to(q.dtype)
    return (
        torch.stack([alpha_loss, actor_loss, critic_loss, left_out, -mean_logp, alpha[:, 0]]),
        torch.cat([d_q, d_frozen_q], 1),
        d_logp,
    )


sac_losses = define(
    "sac_losses(Tensor q, Tensor target_q, Tensor logp, Tensor reward, Tensor terminal, Tensor log_alpha, float gamma, "
    "float target_entropy, float max_task_loss, bool weighted, Tensor(a!) d_log_alpha) -> (Tensor, Tensor, Tensor)",
    reference,
    lambda q, target_q, logp, reward, terminal, log_alpha, *_: (
        q.new_empty(6, len(log_alpha)),
        q.new_empty(q.shape),
        q.new_empty(reward.shape),
    ),
    launcher("sac_losses", "sac_losses", reference),
)
