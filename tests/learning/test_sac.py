"""The update against its slow transcription, its parts one by one, and a toy task that it must learn."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from slow_sac import SlowSac

from d2r_fast import Actor, Agent, NetConfig, RouteChoice, SacConfig
from d2r_fast.learning.sac import Batch, Draws, clip_grad_norm, draw, losses, make_optimiser, task_weight, update
from d2r_fast.nets.care import CareConfig
from d2r_fast.nets.film import FilmConfig
from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.nets.moore import MooreConfig
from d2r_fast.nets.multi_head import MultiHeadConfig
from d2r_fast.nets.paco import PacoConfig
from d2r_fast.nets.soft_modules import SoftModulesConfig
from d2r_fast.ops.gumbel import gumbel

CFG = NetConfig(n_modules=5, top_k=2, module_width=6, base_width=8, route_widths=(7,))
OBS, A, T, ROWS = 5, 2, 3, 4  # ROWS a task


def make_agent(dtype=torch.float64, cfg=CFG):
    """An agent away from its initial values: heads of order 1, routes that differ, targets unlike critics."""
    agent = Agent(OBS, A, T, cfg).to(dtype)
    with torch.no_grad():
        for part in (agent.actor, agent.critics, agent.target_critics):
            part.net.head.weight.uniform_(-0.5, 0.5)
            part.net.route[-1].bias.normal_(std=1.5)
            for parameter in part.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        agent.log_alpha.copy_(torch.tensor([0.0, -0.5, -1.5]))
        agent.route_temp.copy_(task_weight(agent.log_alpha))
    return agent


def make_batch(dtype=torch.float64, reward=1.0):
    b, n, k = T * ROWS, CFG.n_modules, CFG.top_k
    route = torch.zeros(b, n, k, dtype=torch.uint8)
    for i in range(1, n + 1):
        route[:, i - 1, : min(k, i)] = torch.rand(b, i).argsort(-1)[:, : min(k, i)].to(torch.uint8)
    return Batch(
        obs=torch.randn(b, OBS, dtype=dtype),
        action=torch.rand(b, A, dtype=dtype) * 2 - 1,
        reward=reward * torch.randn(b, dtype=dtype),
        terminal=(torch.rand(b) < 0.3).to(dtype),
        next_obs=torch.randn(b, OBS, dtype=dtype),
        task=torch.arange(T).repeat_interleave(ROWS),
        route=route,
    )


def make_draws(agent, batch):
    noise = torch.randn(2, len(batch.obs), A, dtype=batch.obs.dtype)
    route_noise = gumbel((3, len(batch.obs), CFG.n_logits), batch.obs)
    choice = RouteChoice.sampled(agent.route_temp[batch.task], route_noise[:2])
    return Draws(noise[0], noise[1], choice, route_noise[2:])


def norm_of(tensors):
    return torch.stack([v.square().sum() for v in tensors]).sum().sqrt().item()


def gradients(agent, loss):
    """Every parameter's gradient by name, None where the loss does not depend on it."""
    named = {name: p for name, p in agent.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.autograd.grad(loss, list(named.values()), allow_unused=True), strict=True))


def assert_same_parameters(agent, slow, tolerance):
    state = agent.state_dict()
    nets = {("actor.", 0): "actor", ("critics.", 0): "critic0", ("critics.", 1): "critic1"}
    expected = {key: slow.nets[name] for key, name in nets.items()}
    expected |= {("target_critics.", e): slow.targets[e] for e in (0, 1)}
    for (prefix, e), parameters in expected.items():
        for name, value in parameters.items():
            ours = state[f"{prefix}net.{name}"][e]
            assert (ours - value).abs().max() <= tolerance * max(1, value.abs().max()), f"{prefix}{name}[{e}]"
    assert len(state) == len(slow.nets["actor"]) + 2 * len(slow.nets["critic0"]) + 2
    torch.testing.assert_close(state["log_alpha"], slow.log_alpha.detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(state["route_temp"].tolist(), slow.route_temp, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("max_grad_norm", [0.5, 1000.0], ids=["clipped", "free"])
def test_three_updates_match_the_slow_transcription(max_grad_norm):
    # Large steps, so that an error in the second update's start shows; log alpha is driven into its bound.
    cfg = SacConfig(
        actor_lr=0.01, critic_lr=0.02, alpha_lr=0.3, target_rate=0.1, gamma=0.9, max_grad_norm=max_grad_norm
    )
    agent = make_agent()
    with torch.no_grad():
        agent.actor.net.head.bias[:, A:] = -3.0  # too little entropy: log alpha wants to rise
    slow, optimiser = SlowSac.of(agent, cfg), make_optimiser(agent, cfg)
    before = copy.deepcopy(agent.state_dict())
    left_out, clamped = [], False
    for step in range(3):
        batch = make_batch()
        if step == 1:
            batch = batch._replace(reward=torch.where(batch.task == 1, 500.0, batch.reward))  # over max_task_loss
        draws = make_draws(agent, batch)
        metrics = update(agent, optimiser, batch, draws, cfg)
        terms, norms, out = slow.update(batch, draws)
        assert_same_parameters(agent, slow, 1e-9)
        terms = torch.tensor(terms, dtype=torch.float64)
        expected = {
            "loss/alpha": terms[:, 0],
            "loss/actor": terms[:, 1],
            "loss/critic": terms[:, 2] + terms[:, 3],
            "loss/left_out": torch.tensor(out).float(),
            "policy/alpha": slow.log_alpha.detach().exp(),
            "grad_norm/actor": torch.tensor(norms["actor"], dtype=torch.float64),
            "grad_norm/critic": torch.tensor([norms["critic0"], norms["critic1"]], dtype=torch.float64),
            "grad_norm/alpha": torch.tensor(norms["log_alpha"], dtype=torch.float64),
        }
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name], value, rtol=1e-9, atol=1e-12)
        assert not any(value.requires_grad for value in metrics.values())
        left_out.append(out)
        clamped |= bool((agent.log_alpha == 0).any())
    assert left_out == [[False] * 3, [False, True, False], [False] * 3]
    assert clamped
    after = agent.state_dict()
    assert all((after[name] - value).abs().max() > 1e-3 for name, value in before.items())


@pytest.mark.parametrize("actor_routes", ["replayed", "sampled", "greedy"])
@pytest.mark.parametrize("switched", [True, False], ids=["as_published", "fixed_depth_and_temperature"])
def test_ablations_match_the_slow_transcription(actor_routes, switched):
    agent = make_agent(cfg=replace(CFG, dynamic_depth=switched))
    cfg = SacConfig(actor_lr=0.01, critic_lr=0.02, route_balancing=switched, actor_routes=actor_routes)
    slow, optimiser = SlowSac.of(agent, cfg), make_optimiser(agent, cfg)
    before = agent.route_temp.clone()
    for _ in range(2):
        batch = make_batch()
        draws = make_draws(agent, batch)
        update(agent, optimiser, batch, draws, cfg)
        slow.update(batch, draws)
        assert_same_parameters(agent, slow, 1e-9)
    assert torch.equal(agent.route_temp, before) != switched


def test_losses_are_functions_of_their_inputs():
    agent, cfg = make_agent(), SacConfig()
    batch = make_batch()
    draws = make_draws(agent, batch)
    before = [v.clone() for v in (*agent.state_dict().values(), *batch, *draws[:2])]
    first, second = losses(agent, batch, draws, cfg), losses(agent, batch, draws, cfg)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip((*agent.state_dict().values(), *batch, *draws[:2]), before, strict=True)
    )
    assert first.alpha.shape == first.actor.shape == first.total.shape == first.logp.shape == (T,)
    assert first.critic.shape == (2, T)
    torch.testing.assert_close(first.total, first.alpha + first.actor + first.critic.sum(0))


@pytest.mark.parametrize(
    ("term", "reached"),
    [("alpha", "log_alpha"), ("actor", "actor."), ("critic", "critics.")],
    ids=["alpha", "actor", "critic"],
)
def test_each_loss_reaches_its_own_network_only(term, reached):
    agent, batch = make_agent(), make_batch()
    loss = losses(agent, batch, make_draws(agent, batch), SacConfig())
    for name, grad in gradients(agent, getattr(loss, term).sum()).items():
        if name.startswith(reached):
            assert grad is not None and (grad != 0).any(), name
        else:
            assert grad is None or (grad == 0).all(), name
    assert all(p.grad is None for p in agent.target_critics.parameters())


def test_task_weights_weigh_the_actors_and_critics_losses_alone():
    agent, batch = make_agent(), make_batch()
    draws = make_draws(agent, batch)
    weighed, plain = (losses(agent, batch, draws, SacConfig(task_weights=switch)) for switch in (True, False))
    weight = task_weight(agent.log_alpha)
    assert weight.max() > 1.5 and weight.min() < 0.7
    torch.testing.assert_close(weighed.actor, weight * plain.actor)
    torch.testing.assert_close(weighed.critic, weight * plain.critic)
    assert torch.equal(weighed.alpha, plain.alpha)


def sgd(agent):
    """One plain step of size 1: the change of a parameter is its clipped gradient."""
    return torch.optim.SGD([p for p in agent.parameters() if p.requires_grad], lr=1.0)


def test_gradients_are_clipped_after_backward_and_stepped_with():
    agent, cfg = make_agent(), SacConfig()
    batch = make_batch(reward=30.0)
    draws = make_draws(agent, batch)
    with torch.no_grad():
        agent.actor.net.head.weight.mul_(8)
    before = copy.deepcopy(agent)
    unclipped = gradients(agent, losses(agent, batch, draws, cfg).total.mean())
    metrics = update(agent, sgd(agent), batch, draws, cfg)
    after = dict(agent.named_parameters())

    def moved(prefix, e=slice(None)):
        return {
            name: (p.detach() - after[name].detach())[e]
            for name, p in before.named_parameters()
            if name.startswith(prefix)
        }

    for prefix, e, norm in (
        ("actor.", slice(None), metrics["grad_norm/actor"]),
        ("critics.", 0, metrics["grad_norm/critic"][0]),
        ("critics.", 1, metrics["grad_norm/critic"][1]),
    ):
        steps = moved(prefix, e)
        assert norm > 1  # there was something to clip
        assert norm.item() == pytest.approx(norm_of(unclipped[name][e] for name in steps), rel=1e-9)
        assert 0.999 < norm_of(steps.values()) <= 1
        for name, step in steps.items():  # the direction stays
            torch.testing.assert_close(step, unclipped[name][e] / norm, rtol=1e-5, atol=1e-12)
        assert norm_of(after[name].grad[e] for name in steps) <= 1
    log_alpha = unclipped["log_alpha"]
    scale = min(1, 1 / (norm_of([log_alpha]) + 1e-6))
    torch.testing.assert_close(agent.log_alpha.detach(), (before.log_alpha - log_alpha * scale).clamp(max=0).detach())
    assert metrics["grad_norm/alpha"].item() == pytest.approx(norm_of([log_alpha]))


def test_each_critic_is_clipped_separately():
    agent, cfg = make_agent(), SacConfig()
    batch = make_batch(reward=0.01)
    with torch.no_grad():
        for part in (agent.critics, agent.target_critics):
            part.net.head.weight.mul_(1e-3)
            part.net.head.bias.mul_(1e-3)
        agent.critics.net.head.bias[1] = 100.0
        agent.log_alpha.fill_(-12.0)  # keeps the entropy out of the targets
    draws = make_draws(agent, batch)
    unclipped = gradients(agent, losses(agent, batch, draws, cfg).critic.sum(0).mean())
    critics = {name: grad for name, grad in unclipped.items() if name.startswith("critics.")}
    small, large = (norm_of(grad[e] for grad in critics.values()) for e in (0, 1))
    assert small < 0.5 and large > 10
    update(agent, sgd(agent), batch, draws, SacConfig(max_task_loss=1e9))
    kept = {name: p.grad for name, p in agent.named_parameters() if name in critics}
    assert all(torch.equal(grad[0], critics[name][0]) for name, grad in kept.items())
    assert 0.999 < norm_of(grad[1] for grad in kept.values()) <= 1


def test_clip_grad_norm_is_torchs_for_one_network():
    for scale in (0.01, 10.0):
        ours, theirs = ([torch.zeros(1, 4, 3).double(), torch.zeros(1, 5).double()] for _ in range(2))
        for a, b in zip(ours, theirs, strict=True):
            a.grad = scale * torch.randn_like(a)
            b.grad = a.grad.clone()
        norm = clip_grad_norm(ours, 1.0, 1)
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        torch.testing.assert_close(norm[0], expected)
        assert all(torch.allclose(a.grad, b.grad, rtol=1e-12, atol=0) for a, b in zip(ours, theirs, strict=True))


def test_a_task_over_max_task_loss_gets_no_gradient():
    agent, cfg = make_agent(), SacConfig(max_grad_norm=1e9)
    batch = make_batch()
    batch = batch._replace(reward=torch.where(batch.task == 1, 1e4, batch.reward))
    draws = make_draws(agent, batch)
    loss = losses(agent, batch, draws, cfg)
    assert (loss.total > 3000).tolist() == [False, True, False]
    rest = gradients(agent, (loss.total[0] + loss.total[2]) / T)
    metrics = update(agent, sgd(agent), batch, draws, cfg)
    assert metrics["loss/left_out"].tolist() == [0, 1, 0]
    for name, p in agent.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, rest[name], rtol=1e-9, atol=1e-12)
    assert agent.log_alpha.grad[1] == 0 and agent.log_alpha.grad[0] != 0 and agent.log_alpha.grad[2] != 0
    for part in (agent.actor, agent.critics):
        by_task = part.net.task.weight.grad.abs().sum((0, 1))  # a task's rows alone reach its column
        assert by_task[1] == 0 and by_task[0] > 0 and by_task[2] > 0


def test_targets_move_by_the_target_rate():
    agent, cfg = make_agent(), SacConfig(critic_lr=0.01)
    before = copy.deepcopy(agent.target_critics.state_dict())
    batch = make_batch()
    update(agent, make_optimiser(agent, cfg), batch, make_draws(agent, batch), cfg)
    online = agent.critics.state_dict()
    for name, value in agent.target_critics.state_dict().items():
        torch.testing.assert_close(value, before[name] + 0.005 * (online[name] - before[name]), rtol=1e-12, atol=1e-14)
        assert not torch.equal(value, before[name])


def test_log_alpha_stays_below_0_and_sets_the_route_temperatures():
    agent, cfg = make_agent(), SacConfig(alpha_lr=0.5)
    with torch.no_grad():
        # A policy of hardly any noise has far too little entropy, so its log alpha wants to rise.
        agent.actor.net.head.bias[:, A:] = -15.0
    optimiser = make_optimiser(agent, cfg)
    for _ in range(4):
        batch = make_batch()
        metrics = update(agent, optimiser, batch, make_draws(agent, batch), cfg)
        assert (agent.log_alpha <= 0).all()
        inverse = (-agent.log_alpha.detach()).exp()
        torch.testing.assert_close(agent.route_temp, T * inverse / inverse.sum(), rtol=1e-12, atol=0)
        assert agent.route_temp.sum().item() == pytest.approx(T)
        assert torch.equal(metrics["policy/alpha"], agent.log_alpha.detach().exp())
    assert (agent.log_alpha == 0).all()
    assert torch.equal(agent.route_temp, torch.ones(T).double())


def test_terminal_stops_bootstrapping():
    agent, cfg = make_agent(), SacConfig()
    batch = make_batch()
    draws = make_draws(agent, batch)
    elsewhere = torch.randn_like(batch.next_obs)

    def critic(terminal, next_obs):
        changed = batch._replace(terminal=torch.full_like(batch.terminal, terminal), next_obs=next_obs)
        return losses(agent, changed, draws, cfg).critic.detach()

    assert torch.equal(critic(1, batch.next_obs), critic(1, elsewhere))
    assert not torch.isclose(critic(0, batch.next_obs), critic(0, elsewhere)).any()
    q = agent.critics(batch.obs, batch.action, batch.task, draws.critic_choice).detach()
    weight = task_weight(agent.log_alpha)[batch.task]
    expected = (weight * (q - batch.reward).square()).view(2, T, ROWS).mean(-1)
    torch.testing.assert_close(critic(1, batch.next_obs), expected, rtol=1e-12, atol=0)


def test_task_weight():
    log_alpha = torch.tensor([0.0, -1.0, -2.0], dtype=torch.float64, requires_grad=True)
    weight = task_weight(log_alpha)
    assert not weight.requires_grad
    total = 1 + math.e + math.e**2
    torch.testing.assert_close(weight.tolist(), [3 / total, 3 * math.e / total, 3 * math.e**2 / total])


def test_dev5_optimiser_holds_neither_route_temperatures_nor_targets():
    agent, cfg = make_agent(), SacConfig(actor_lr=0.1, critic_lr=0.2, alpha_lr=0.3)
    groups = make_optimiser(agent, cfg).param_groups
    assert [g["lr"] for g in groups] == [0.1, 0.2, 0.3]
    assert {(g["betas"], g["eps"], g["weight_decay"]) for g in groups} == {((0.9, 0.999), 1e-8, 0)}
    held = {id(p) for g in groups for p in g["params"]}
    assert held == {id(p) for p in agent.parameters() if p.requires_grad}
    assert not held & {id(p) for p in (agent.route_temp, *agent.target_critics.parameters())}
    assert "route_temp" in dict(agent.named_buffers())


def test_draw_follows_its_generator_and_the_route_temperatures():
    agent, batch = make_agent(torch.float32), make_batch(torch.float32)
    first, second = (draw(agent, batch, torch.Generator().manual_seed(9), SacConfig()) for _ in range(2))
    assert first.noise.shape == first.next_noise.shape == (T * ROWS, A)
    assert not torch.equal(first.noise, first.next_noise)
    choice = first.critic_choice
    assert choice.mode == "sampled" and choice.index is None
    assert torch.equal(choice.temperature, agent.route_temp.repeat_interleave(ROWS))
    assert choice.noise.shape == (2, T * ROWS, CFG.n_logits)
    assert not torch.equal(choice.noise[0], choice.noise[1])
    for a, b in (
        (first.noise, second.noise),
        (first.next_noise, second.next_noise),
        (choice.noise, second.critic_choice.noise),
    ):
        assert torch.equal(a, b)
    assert not torch.equal(first.noise, draw(agent, batch, torch.Generator().manual_seed(10), SacConfig()).noise)


# The policy


def test_log_probability_is_the_density_of_the_squashed_normal():
    actor = make_agent().actor
    obs, task, noise = torch.randn(60, OBS).double(), torch.arange(60) % T, torch.randn(60, A).double()
    mean, log_std, _ = actor(obs, task)
    sample = actor.sample(obs, task, noise)
    torch.testing.assert_close(sample.action, torch.tanh(mean + log_std.exp() * noise), rtol=1e-12, atol=0)
    squashed = torch.distributions.TransformedDistribution(
        torch.distributions.Normal(mean, log_std.exp()), torch.distributions.TanhTransform()
    )
    inside = (sample.action.abs() < 0.95).all(-1)  # the 1e-6 of the published formula shows near the edge only
    assert inside.sum() > 20
    density = squashed.log_prob(sample.action).sum(-1)
    torch.testing.assert_close(sample.logp[inside], density[inside], rtol=0, atol=1e-4)


def test_log_std_is_clamped_and_the_density_stays_finite():
    actor = Actor(OBS, A, T, CFG)
    obs, task = torch.randn(6, OBS), torch.arange(6) % T
    for bias, limit in ((100.0, 2.0), (-100.0, -20.0)):
        with torch.no_grad():
            actor.net.head.bias[:, A:] = bias
        assert (actor(obs, task)[1] == limit).all()
        sample = actor.sample(obs, task, 3 * torch.randn(6, A))
        assert sample.action.abs().max() <= 1 and sample.logp.isfinite().all()


def test_greedy_action_is_the_mean_along_greedy_routes():
    actor = make_agent().actor
    obs, task = torch.randn(6, OBS).double(), torch.arange(6) % T
    action, routes = actor.act_greedily(obs, task)
    mean, _, greedy = actor(obs, task)
    assert torch.equal(action, mean.tanh())
    assert torch.equal(routes.index, greedy.index)
    silent = actor.sample(obs, task, torch.zeros(6, A).double())
    assert torch.equal(silent.action, action)


# Learning

TOY = NetConfig(n_modules=4, top_k=2, module_width=16, base_width=32, route_widths=(16,))
ENCODER = {"embedding_width": 8, "encoder_widths": (16,), "widths": (32, 32)}
TOYS = [
    TOY,
    MlpConfig(widths=(32, 32)),
    MultiHeadConfig(widths=(32, 32)),
    SoftModulesConfig(n_layers=2, n_modules=2, module_width=16, base_widths=(32, 32), gating_widths=(16,)),
    PacoConfig(n_sets=3, widths=(32, 32)),
    MooreConfig(n_experts=3, widths=(32, 32)),
    CareConfig(n_experts=3, **ENCODER),
    FilmConfig(**ENCODER),
]
TOY_SAC = SacConfig(actor_lr=5e-3, critic_lr=5e-3, alpha_lr=1e-3, init_alpha=0.3)


def toy_target(obs, task):
    """Where each task wants the action: along the observation, on its own side of it."""
    return 0.5 * obs + torch.where(task[:, None] == 0, 0.3, -0.3)


def toy_reward(obs, action, task):
    return -(action - toy_target(obs, task)).square().sum(-1)


def run_toy(n_updates, seed, rows=64, net=TOY):
    """A contextual bandit of two tasks, collected with the policy as it is; returns the agent and its last metrics."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    agent = Agent(2, 2, 2, net, init_alpha=TOY_SAC.init_alpha)
    optimiser, task = make_optimiser(agent, TOY_SAC), torch.arange(2).repeat_interleave(rows)
    metrics = {}
    for _ in range(n_updates):
        obs = torch.rand(2 * rows, 2, generator=generator) * 2 - 1
        with torch.no_grad():
            noise = torch.randn(2 * rows, 2, generator=generator)
            route_noise = gumbel((1, 2 * rows, net.n_logits), obs, generator)
            sample = agent.actor.sample(obs, task, noise, RouteChoice.sampled(agent.route_temp[task], route_noise))
        batch = Batch(
            obs=obs,
            action=sample.action,
            reward=5 * toy_reward(obs, sample.action, task),
            terminal=torch.ones(2 * rows),
            next_obs=obs,
            task=task,
            route=sample.routes.index[0] if sample.routes else torch.zeros(2 * rows, 0, 0, dtype=torch.uint8),
        )
        metrics = update(agent, optimiser, batch, draw(agent, batch, generator, TOY_SAC), TOY_SAC)
    return agent, metrics


def mean_reward(agent):
    """Of the greedy action, a number a task, on observations of its own."""
    obs = torch.rand(400, 2, generator=torch.Generator().manual_seed(99)) * 2 - 1
    task = torch.arange(2).repeat_interleave(200)
    with torch.no_grad():
        action, _ = agent.actor.act_greedily(obs, task)
    return toy_reward(obs, action, task).view(2, 200).mean(1)


@pytest.mark.parametrize("net", TOYS, ids=lambda net: net.kind)
def test_two_toy_tasks_are_learned(net):
    untrained = mean_reward(run_toy(0, seed=1, net=net)[0])
    assert (untrained < -0.2).all()
    agent, _ = run_toy(400, seed=1, net=net)
    reward = mean_reward(agent)
    print(f"mean reward {untrained.tolist()} -> {reward.tolist()}")
    # Whoever ignores the task gets 2 x 0.3^2 = 0.18 less, whoever ignores the observation 2 x 0.25 / 3 = 0.17.
    assert (reward > -0.03).all()


def test_same_seed_twice_is_bitwise_identical():
    (first, first_metrics), (second, second_metrics) = run_toy(8, seed=2), run_toy(8, seed=2)
    other, _ = run_toy(8, seed=3)
    state, again, elsewhere = first.state_dict(), second.state_dict(), other.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert all(torch.equal(value, second_metrics[name]) for name, value in first_metrics.items())
    assert not torch.equal(state["log_alpha"], elsewhere["log_alpha"])
