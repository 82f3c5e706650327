"""The multi-task SAC update written slowly: one task, one row, one module, one source at a time, in float64.

A transcription of the algorithm page that shares no formula, no shape and no tensor with d2r_fast: networks are plain
dicts of parameters, ResRouting keeps two versions of every module's output, Adam and clipping are spelled out.
"""

import math
from dataclasses import dataclass, field

import torch


def one_net(state, prefix, e):
    """Network e's parameters out of an agent's `state_dict`, names without the prefix; float64 leaves of their own."""
    start = prefix + "net."
    return {
        name[len(start) :]: value[e].detach().double().clone().requires_grad_()
        for name, value in state.items()
        if name.startswith(start)
    }


def linear(p, name, x):
    return p[name + ".weight"] @ x + p[name + ".bias"]


def relu(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def greedy(k):
    def choose(i, group):
        return sorted(range(i), key=lambda s: group[s], reverse=True)[:k]

    return choose


def given(index):
    """index [N][K]: what route i kept in its first min(K, i) slots."""

    def choose(i, group):
        return [int(s) for s in index[i - 1][:i]]

    return choose


def sampled(k, tau, noise):
    """Gumbel top-k over packed noise [R]."""

    def choose(i, group):
        start = i * (i - 1) // 2
        keys = [group[s] / tau + float(noise[start + s]) for s in range(i)]
        return sorted(range(i), key=lambda s: keys[s], reverse=True)[:k]

    return choose


def through_all(k, choose):
    """Without dynamic depth: the module below, and the first k-1 others of all that the choice would take in order."""

    def with_module_below(i, group):
        others = [s for s in choose(i, group) if s != i - 1]
        return [i - 1, *others][:k]

    return with_module_below


def network(p, x, t, choose, training=True, resrouting=True, residual=True):
    """One row through one network: x [n_in], task number t -> out [n_out]."""
    f = linear(p, "base.1", relu(linear(p, "base.0", x)))
    g = p["task.weight"][:, t] + p["task.bias"]
    r, depth = f * g, 0
    while f"route.{depth + 1}.weight" in p:
        r, depth = relu(linear(p, f"route.{depth}", r)), depth + 1
    r = linear(p, f"route.{depth}", r)
    n = p["module_weight"].shape[0] + 1

    h0 = relu(linear(p, "module0", relu(f)))
    full, masked = [h0], [h0.detach()]  # equal values; `masked` stops what would enter the ReLU layer
    start = 0
    for i in range(1, n + 1):
        group = r[start : start + i]
        start += i
        values = group.tolist()
        chosen = choose(i, values)
        share = [math.exp(v - max(values)) for v in values]
        total = sum((group[s] - max(values)).exp() for s in chosen)
        through_layer = through_residual = 0
        for s in chosen:
            w = (group[s] - max(values)).exp() / total
            flows = share[s] / sum(share) > 1 / (i + 1) or not (training and resrouting)
            through_layer = through_layer + w * (full[s] if flows else masked[s])
            through_residual = through_residual + w * full[s]
        if i == n:
            return linear(p, "head", through_layer)
        layer = relu(p["module_weight"][i - 1] @ through_layer + p["module_bias"][i - 1])
        if not residual:
            through_residual = torch.zeros_like(layer)
        full.append(layer + through_residual)
        masked.append(layer.detach() + through_residual)
    raise AssertionError("unreachable")


def policy(p, obs, t, noise, choose):
    """Action [A] and its log probability, differentiable."""
    out = network(p, obs, t, choose)
    a = len(noise)
    action, logp = [], 0
    for j in range(a):
        mean, std = out[j], out[a + j].clamp(-20, 2).exp()
        z = mean + std * noise[j]
        action.append(torch.tanh(z))
        logp = logp + torch.distributions.Normal(mean, std).log_prob(z) - torch.log(1 - torch.tanh(z) ** 2 + 1e-6)
    return torch.stack(action), logp


@dataclass
class Adam:
    """One parameter's moments."""

    m: torch.Tensor | float = 0.0
    v: torch.Tensor | float = 0.0
    steps: int = 0

    def step(self, p, grad, lr):
        self.steps += 1
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad**2
        m_hat, v_hat = self.m / (1 - 0.9**self.steps), self.v / (1 - 0.999**self.steps)
        with torch.no_grad():
            p -= lr * m_hat / (v_hat**0.5 + 1e-8)


@dataclass
class SlowSac:
    """Holds float64 copies of an agent's parameters and updates them; never touches the agent."""

    nets: dict
    targets: list
    log_alpha: torch.Tensor
    route_temp: list
    k: int
    dynamic_depth: bool
    cfg: object
    moments: dict = field(default_factory=dict)

    @classmethod
    def of(cls, agent, cfg):
        state = agent.state_dict()
        return cls(
            nets={
                "actor": one_net(state, "actor.", 0),
                "critic0": one_net(state, "critics.", 0),
                "critic1": one_net(state, "critics.", 1),
            },
            targets=[one_net(state, "target_critics.", e) for e in (0, 1)],
            log_alpha=state["log_alpha"].detach().double().clone().requires_grad_(),
            route_temp=state["route_temp"].tolist(),
            k=agent.actor.net.cfg.top_k,
            dynamic_depth=agent.actor.net.cfg.dynamic_depth,
            cfg=cfg,
        )

    def weights(self):
        inverse = [1 / math.exp(v) for v in self.log_alpha.tolist()]
        return [len(inverse) * v / sum(inverse) for v in inverse]

    def greedy(self):
        return greedy(self.k) if self.dynamic_depth else through_all(self.k, greedy(self.k))

    def sampled(self, t, noise):
        choose = sampled(self.k, self.route_temp[t], noise.tolist())
        return choose if self.dynamic_depth else through_all(self.k, choose)

    def actor_routes(self, batch, draws, b, t):
        if self.cfg.actor_routes == "replayed":
            return given(batch.route[b].tolist())
        return self.greedy() if self.cfg.actor_routes == "greedy" else self.sampled(t, draws.actor_noise[0, b])

    def q(self, net, obs, action, t, choose):
        return network(net, torch.cat([obs, action]), t, choose)[0]

    def losses(self, batch, draws):
        """Per task: the alpha term, the actor's, each critic's."""
        n_tasks, n_actions = len(self.log_alpha), batch.action.shape[1]
        route_noise = draws.critic_choice.noise
        weights, terms = self.weights(), []
        for t in range(n_tasks):
            rows = [b for b in range(len(batch.task)) if int(batch.task[b]) == t]
            alpha = math.exp(self.log_alpha[t].item())
            alpha_term, actor_term, critic_terms = 0, 0, [0, 0]
            for b in rows:
                obs = batch.obs[b]
                action, logp = policy(self.nets["actor"], obs, t, draws.noise[b], self.actor_routes(batch, draws, b, t))
                alpha_term = alpha_term - self.log_alpha[t] * (logp.item() - n_actions) / len(rows)
                qs = [self.q(self.nets[f"critic{e}"], obs, action, t, self.greedy()) for e in (0, 1)]
                lowest = qs[0] if qs[0] < qs[1] else qs[1]
                actor_term = actor_term + weights[t] * (alpha * logp - lowest) / len(rows)

                with torch.no_grad():
                    after = batch.next_obs[b]
                    action, logp = policy(self.nets["actor"], after, t, draws.next_noise[b], self.greedy())
                    value = min(self.q(net, after, action, t, self.greedy()).item() for net in self.targets)
                    value -= alpha * logp.item()
                y = batch.reward[b].item() + (0.0 if batch.terminal[b] else self.cfg.gamma * value)
                for e in (0, 1):
                    q = self.q(self.nets[f"critic{e}"], obs, batch.action[b], t, self.sampled(t, route_noise[e, b]))
                    critic_terms[e] = critic_terms[e] + weights[t] * (q - y) ** 2 / len(rows)
            terms.append((alpha_term, actor_term, *critic_terms))
        return terms

    def update(self, batch, draws):
        """One update in place; returns per-task terms [T][4], norms before clipping by name, tasks left out."""
        n_tasks = len(self.log_alpha)
        terms = self.losses(batch, draws)
        kept = [float(sum(term).detach()) <= self.cfg.max_task_loss for term in terms]
        grads = {}
        for column, name in ((1, "actor"), (2, "critic0"), (3, "critic1")):
            loss = sum(terms[t][column] * kept[t] for t in range(n_tasks)) / n_tasks
            named = self.nets[name]
            got = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            zero_if_none = [torch.zeros_like(p) if g is None else g for p, g in zip(named.values(), got, strict=True)]
            grads[name] = dict(zip(named, zero_if_none, strict=True))
        alpha_loss = sum(terms[t][0] * kept[t] for t in range(n_tasks)) / n_tasks
        grads["log_alpha"] = {"": torch.autograd.grad(alpha_loss, self.log_alpha)[0]}

        norms = {}
        for name, lr in (
            ("actor", self.cfg.actor_lr),
            ("critic0", self.cfg.critic_lr),
            ("critic1", self.cfg.critic_lr),
            ("log_alpha", self.cfg.alpha_lr),
        ):
            norms[name] = math.sqrt(sum(float((g * g).sum()) for g in grads[name].values()))
            # torch's clipping divides by norm + 1e-6; the published code uses it.
            factor = min(1.0, self.cfg.max_grad_norm / (norms[name] + 1e-6))
            parameters = {"": self.log_alpha} if name == "log_alpha" else self.nets[name]
            for key, p in parameters.items():
                self.moments.setdefault((name, key), Adam()).step(p, grads[name][key] * factor, lr)

        rate = self.cfg.target_rate
        with torch.no_grad():
            for t in range(n_tasks):
                self.log_alpha[t] = min(0.0, self.log_alpha[t].item())
            for e in (0, 1):
                for key, p in self.targets[e].items():
                    p.copy_((1 - rate) * p + rate * self.nets[f"critic{e}"][key])
        if self.cfg.route_balancing:
            self.route_temp = self.weights()
        return [[float(v.detach()) for v in term] for term in terms], norms, [not v for v in kept]
