"""One step of all networks: clipping, Adam, the targets' step, the route temperatures (algorithm: "the update")."""

from collections.abc import Sequence

import torch
from torch import Tensor

from d2r_fast.ops.contract import define, launcher


def reference(
    values: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    targets: Tensor,
    step: Tensor,
    log_alpha: Tensor,
    route_temp: Tensor,
    segments: Tensor,
    targets_begin: int,
    learning_rates: Sequence[float],
    beta1: float,
    beta2: float,
    eps: float,
    max_norm: float,
    target_rate: float,
    max_log_alpha: float,
) -> Tensor:
    """Everything an update changes, changed in place; returns each network's gradient norm before clipping [networks].

    values, gradient, first, second  [n] every parameter that is trained, its gradient and Adam's two moments
    targets         [m] what follows values[targets_begin : targets_begin + m] at `target_rate` a step
    step            []  int64, steps made so far
    log_alpha       [T] a view of `values`; at most `max_log_alpha` after the step
    route_temp      [T] becomes T softmax(-log alpha)
    segments        [S,3] int64 on the CPU: begin, end and network of each run of one network's parameters; all four
                    buffers hold zeros between them
    learning_rates  of each network
    max_norm        each network's gradient is scaled to this norm at most

        g = gradient min(1, max_norm / (norm + 1e-6));  m += (1 - beta1) (g - m);  v = beta2 v + (1 - beta2) g^2
        value -= rate / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
    """

    def of_networks(buffer: Tensor) -> list[list[Tensor]]:
        own: list[list[Tensor]] = [[] for _ in learning_rates]
        for begin, end, network in segments.tolist():
            own[network].append(buffer[begin:end])
        return own

    step += 1
    count = step.to(torch.float64)
    g = gradient.clone()
    norms = []
    for runs in of_networks(g):
        norm = torch.stack(torch._foreach_norm(runs)).norm()
        torch._foreach_mul_(runs, (max_norm / (norm + 1e-6)).clamp(max=1))
        norms.append(norm)
    first.lerp_(g, 1 - beta1)
    second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    root = (1 - beta2**count).sqrt().to(values.dtype)
    change = first / (second.sqrt() / root + eps)
    for runs, rate in zip(of_networks(change), learning_rates, strict=True):
        torch._foreach_mul_(runs, (rate / (1 - beta1**count)).to(values.dtype))
    values -= change
    targets.lerp_(values[targets_begin : targets_begin + len(targets)], target_rate)
    log_alpha.clamp_(max=max_log_alpha)
    route_temp.copy_(len(log_alpha) * torch.softmax(-log_alpha, 0))
    return torch.stack(norms)


optimiser_step = define(
    "optimiser_step(Tensor(a!) values, Tensor gradient, Tensor(b!) first, Tensor(c!) second, Tensor(d!) targets, "
    "Tensor(e!) step, Tensor(f!) log_alpha, Tensor(g!) route_temp, Tensor segments, int targets_begin, "
    "float[] learning_rates, float beta1, float beta2, float eps, float max_norm, float target_rate, "
    "float max_log_alpha) -> Tensor",
    reference,
    lambda values, *rest: values.new_empty(len(rest[9])),
    launcher("optimiser_step", "optimiser_step", reference),
)
