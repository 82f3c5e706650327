"""The update in a few calls: each operation against its reference, and the whole against `sac.update`."""

import copy
from dataclasses import replace
from math import inf

import pytest
import torch
from check_golden import as_one_step
from conftest import cpp_backends
from tiny import NETS

from d2r_fast import Agent, NetConfig, RouteChoice, SacConfig
from d2r_fast.learning.parameters import ALIGNMENT, FlatParameters
from d2r_fast.learning.sac import Batch, Draws, make_optimiser, update
from d2r_fast.learning.update import Update
from d2r_fast.ops import gumbel as gumbel_op
from d2r_fast.ops import optimiser_step, replay_rows, sac_losses, squashed_normal
from d2r_fast.ops.sac_gradient import sac_gradient

pytestmark = pytest.mark.usefixtures("poisoned_memory")
on_every_instruction_set = pytest.mark.parametrize("backend", cpp_backends(), indirect=True)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
N_OBS, A, T, N, K = 7, 3, 4, 6, 2
LOSSES = ("loss/alpha", "loss/actor", "loss/critic", "loss/left_out", "policy/entropy")


def tolerance(dtype):
    return {"rtol": 1e-12, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 2e-6}


def assert_op_matches(op, reference, make_arguments, changed=()):
    """`op` on the CPU gives what its reference gives, and leaves the same in the arguments that it changes."""
    ours, theirs = make_arguments(), make_arguments()
    results = [op(*ours), reference(*theirs)]
    flat = [[r] if isinstance(r, torch.Tensor) else [] if r is None else list(r) for r in results]
    for a, b in zip(*flat, strict=True):
        torch.testing.assert_close(a, b, **tolerance(b.dtype))
    for i in changed:
        torch.testing.assert_close(
            ours[i], theirs[i], **tolerance(ours[i].dtype) if ours[i].is_floating_point() else {}
        )


@on_every_instruction_set
@dtypes
@pytest.mark.parametrize("n", [0, 1, 15, 1000, 40_000])
def test_gumbel_noise_is_the_double_logarithm(backend, dtype, n):
    uniform = torch.rand(n, dtype=dtype)
    edges = torch.tensor([0.0, torch.finfo(dtype).tiny, 1e-30, 0.5, 1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    uniform[: min(n, 5)] = edges[:n]
    noise, exact = uniform.clone(), uniform.double()
    torch.ops.d2r_fast.gumbel_(noise)
    gumbel_op.reference(exact := exact.clamp(min=torch.finfo(dtype).tiny))
    torch.testing.assert_close(noise.double(), exact, rtol=1e-6, atol=1e-6)
    assert noise.isfinite().all()


@on_every_instruction_set
@dtypes
@pytest.mark.parametrize("b", [0, 1, 300])
def test_squashed_normal_matches_its_reference_and_autograd(backend, dtype, b):
    out = torch.randn(b, 2 * A, dtype=dtype) * 0.4
    out[: b // 2, A:] = torch.tensor([-25.0, 3.0, 1.9], dtype=dtype)[:A]  # clamped below, above, not
    noise = torch.randn(b, A, dtype=dtype) * 0.1  # where the tanh is saturated, 1 - tanh^2 is all rounding
    wide = torch.zeros(b, N_OBS + A, dtype=dtype)
    assert_op_matches(
        squashed_normal.squash, squashed_normal.reference, lambda: (out, noise, wide.clone()[:, N_OBS:]), changed=[2]
    )
    leaf = out.clone().requires_grad_()
    action, logp = squashed_normal.squashed_normal(leaf, noise)
    mean, log_std = leaf.chunk(2, -1)
    log_std = log_std.clamp(-20, 2)
    plain = torch.tanh(mean + log_std.exp() * noise)
    normal = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean)).log_prob(noise) - log_std
    plain_logp = (normal - torch.log(1 - plain.square() + 1e-6)).sum(-1)
    torch.testing.assert_close(action, plain, **tolerance(dtype))
    torch.testing.assert_close(logp, plain_logp, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-3)
    d_action, d_logp = torch.randn_like(action), torch.randn_like(logp)
    ours, theirs = (
        torch.autograd.grad(values, leaf, (d_action, d_logp)) for values in ((action, logp), (plain, plain_logp))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3 if dtype == torch.float32 else 1e-9, atol=1e-3)
    if b:
        saved = (d_action, d_logp, out, noise, action.detach())
        assert_op_matches(squashed_normal.squash_backward, squashed_normal.reference_backward, lambda: saved)


def loss_arguments(dtype, e=2, limit=3000.0, weighted=True, b=4 * 33):
    q, target_q = torch.randn(e, 2 * b, dtype=dtype), torch.randn(e, b, dtype=dtype)
    q[:, b : b + 5] = 0.25  # equal ones share the gradient
    logp = torch.randn(2 * b, dtype=dtype)
    terminal = (torch.rand(b) < 0.3).to(dtype)
    log_alpha = -torch.rand(T, dtype=dtype)
    rewards, settings = torch.randn(b, dtype=dtype), (0.99, -3.0, limit, weighted)
    return q, target_q, logp, rewards, terminal, log_alpha, *settings, torch.empty_like(log_alpha)


@dtypes
@pytest.mark.parametrize(
    ("e", "limit", "weighted"), [(2, 3000.0, True), (1, 3000.0, False), (3, 4.0, True), (2, inf, False)]
)
def test_losses_match_their_reference(dtype, e, limit, weighted):
    arguments = loss_arguments(dtype, e, limit, weighted)
    assert_op_matches(
        sac_losses.sac_losses, sac_losses.reference, lambda: (*arguments[:-1], arguments[-1].clone()), changed=[10]
    )


def test_a_task_whose_loss_is_not_finite_is_left_out_and_shows():
    arguments = list(loss_arguments(torch.float64))
    arguments[0][0, 4 * 33 + 40] = torch.nan
    for run in (sac_losses.sac_losses, sac_losses.reference):
        losses, *gradients = run(*arguments)
        assert losses[1, 1].isnan() and losses[3].tolist() == [0, 1, 0, 0]
        assert all(g.isfinite().all() and not g.view(-1, T, 33)[:, 1].any() for g in gradients)
        assert arguments[-1][1] == 0 and arguments[-1].isfinite().all()


def step_arguments(dtype, seed=0, max_norm=1.0, max_log_alpha=0.0):
    torch.manual_seed(seed)
    n = 70_000  # several pieces a segment
    segments = torch.tensor([[0, 40_001, 0], [40_016, 50_000, 1], [50_000, 69_000, 2], [69_008, 69_012, 3]])
    values = torch.randn(n, dtype=dtype)
    targets = values[40_016:69_000] + 0.1
    values[69_008:69_012] = torch.tensor([-0.5, -1e-5, -0.1, 0.0], dtype=dtype)
    first, second = torch.randn(n, dtype=dtype), torch.rand(n, dtype=dtype)
    gradient = torch.randn(n, dtype=dtype) * 1e-3
    gradient[:40_001] *= 100  # one network is clipped, the others are not
    for buffer in (values, gradient, first, second):  # nothing lies between the networks
        for begin, end in ((40_001, 40_016), (69_000, 69_008), (69_012, n)):
            buffer[begin:end] = 0
    log_alpha = values[69_008:69_012]
    buffers = (
        values,
        gradient,
        first,
        second,
        targets,
        torch.tensor(6),
        log_alpha,
        torch.ones(4, dtype=dtype),
        segments,
    )
    return (*buffers, 40_016, [3e-4, 1e-3, 1e-3, 1e-2], 0.9, 0.999, 1e-8, max_norm, 0.005, max_log_alpha)


@on_every_instruction_set
@dtypes
@pytest.mark.parametrize(("max_norm", "max_log_alpha"), [(1.0, 0.0), (inf, inf), (0.5, -0.2)])
def test_the_step_matches_its_reference(backend, dtype, max_norm, max_log_alpha):
    def make():
        return step_arguments(dtype, max_norm=max_norm, max_log_alpha=max_log_alpha)

    assert_op_matches(optimiser_step.optimiser_step, optimiser_step.reference, make, changed=[0, 2, 3, 4, 5, 6, 7])
    arguments = make()
    optimiser_step.optimiser_step(*arguments)
    log_alpha, route_temp = arguments[6:8]
    assert log_alpha.max() > 0 if max_log_alpha == inf else log_alpha.max() == log_alpha.new_tensor(max_log_alpha)
    assert torch.equal(log_alpha, arguments[0][69_008:69_012])
    torch.testing.assert_close(route_temp, 4 * torch.softmax(-log_alpha, 0))


def test_any_number_of_threads_makes_the_same_step():
    results = []
    before = torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        arguments = step_arguments(torch.float32)
        results.append([optimiser_step.optimiser_step(*arguments), *arguments[:8]])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rows_match_their_reference():
    stored = 50
    fields = (
        torch.randn(T, stored, N_OBS),
        torch.randn(T, stored, A),
        torch.randn(T, stored),
        torch.rand(T, stored) < 0.5,
        torch.randn(T, stored, N_OBS),
        torch.randint(0, N, (T, stored, N, K), dtype=torch.uint8),
    )
    share = torch.rand(T, 90, dtype=torch.float64)
    share[0, :3] = torch.tensor([0.0, 1 - 2**-53, 0.5])
    for filled in (1, 7, stored):
        size = torch.tensor(filled)
        ours, theirs = (run(*fields, share, size) for run in (replay_rows.replay_rows, replay_rows.reference))
        for a, b in zip(ours, theirs, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (torch.ops.d2r_fast.gumbel_.default, lambda: (torch.rand(50),)),
        (squashed_normal.squash, lambda: (torch.randn(9, 2 * A), torch.randn(9, A), torch.zeros(9, A))),
        (
            squashed_normal.squash_backward,
            lambda: (torch.randn(9, A), torch.randn(9), torch.randn(9, 2 * A), torch.randn(9, A), torch.rand(9, A)),
        ),
        (torch.ops.d2r_fast.sac_losses.default, lambda: loss_arguments(torch.float32)),
        (torch.ops.d2r_fast.sac_gradient.default, lambda: one_call_arguments()),
        (torch.ops.d2r_fast.optimiser_step.default, lambda: without_shared_memory(step_arguments(torch.float32))),
    ],
    ids=["gumbel", "squash", "squash_backward", "losses", "one_call", "step"],
)  # fmt: skip
def test_schemas_say_what_is_changed(op, arguments):
    torch.library.opcheck(op, arguments(), test_utils=("test_schema", "test_faketensor"))


def without_shared_memory(arguments):
    """log alpha apart from the values that hold it: the check of a schema wants every change in one argument."""
    return (*arguments[:6], arguments[6].clone() - 1, *arguments[7:])


def make_agent(backend, dtype, **settings):
    torch.manual_seed(0)
    sizes = {"n_modules": N, "top_k": K, "module_width": 20, "base_width": 33, "route_widths": (18,)}
    cfg = NetConfig(**(sizes | settings), backend=backend)
    agent = Agent(N_OBS, A, T, cfg, init_alpha=0.3).to(dtype)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return agent


def make_batch(dtype, agent, per_task=70):
    b = T * per_task
    task = torch.arange(T).repeat_interleave(per_task)
    n_modules, k = agent.actor.net.cfg.route_shape
    route = torch.zeros(b, n_modules, k, dtype=torch.uint8)
    for i in range(1, n_modules + 1):
        kept = min(k, i)
        route[:, i - 1, :kept] = torch.rand(b, i).argsort(-1)[:, :kept].to(torch.uint8)
    batch = Batch(
        obs=torch.randn(b, N_OBS, dtype=dtype),
        action=torch.rand(b, A, dtype=dtype) * 2 - 1,
        reward=torch.randn(b, dtype=dtype) * (1 + 3 * task),  # so that losses differ by task
        terminal=(torch.rand(b) < 0.2).to(dtype),
        next_obs=torch.randn(b, N_OBS, dtype=dtype),
        task=task,
        route=route,
    )
    noise = torch.randn(2, b, A, dtype=dtype)
    like = torch.zeros((), dtype=dtype)
    routes = gumbel_op.gumbel((2, b, agent.critics.net.cfg.n_logits), like)
    choice = RouteChoice.sampled(agent.route_temp[task], routes)
    reset = torch.rand(T, T, dtype=dtype)
    return batch, Draws(*noise, choice, gumbel_op.gumbel((1, *routes.shape[1:]), like), reset)


@pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)
@dtypes
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_task_loss": 50.0},
        {
            "max_task_loss": None,
            "max_grad_norm": None,
            "max_alpha": None,
            "task_weights": False,
            "adam_eps": 1e-4,
        },
    ],
    ids=["all_tasks", "some_left_out", "no_limits"],
)
def test_five_updates_are_those_of_the_equations(backend, dtype, settings):
    theirs = make_agent(backend, dtype)
    theirs.log_alpha.data.fill_(0.1)
    ours = copy.deepcopy(theirs)
    cfg = SacConfig(**{"actor_lr": 1e-3} | settings)
    left_out = assert_same_updates(ours, theirs, cfg, n_updates=5)
    assert 0 < left_out < 5 * T if cfg.max_task_loss == 50 else left_out == 0
    assert (ours.log_alpha.max() > 0) == (cfg.max_alpha is None)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize(
    ("of_net", "of_sac"),
    [
        ({"resrouting": False}, {}),
        ({"residual": False}, {}),
        ({"dynamic_depth": False}, {}),
        ({}, {"route_balancing": False}),
        ({}, {"actor_routes": "sampled"}),
        ({"dynamic_depth": False}, {"actor_routes": "greedy"}),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "whole",
)
def test_updates_with_a_part_of_d2r_switched_off_are_those_of_the_equations(backend, of_net, of_sac):
    theirs, ours = (make_agent(of, torch.float64, **of_net) for of in ("reference", backend))
    assert_same_updates(ours, theirs, SacConfig(actor_lr=1e-3, **of_sac), n_updates=2)
    assert (ours.route_temp == 1).all() == (not of_sac.get("route_balancing", True))


@pytest.mark.parametrize(("n_modules", "top_k"), [(4, 1), (8, 2), (16, 4), (4, 4), (32, 2), (32, 32)])
def test_any_number_of_modules_and_sources_trains(n_modules, top_k):
    theirs, ours = (make_agent(of, torch.float64, n_modules=n_modules, top_k=top_k) for of in ("reference", "cpp"))
    assert_same_updates(ours, theirs, SacConfig(actor_lr=1e-3), n_updates=1, per_task=20)


@pytest.mark.parametrize("net", NETS, ids=lambda net: net.kind)
def test_updates_of_the_networks_without_routes_are_those_of_the_equations(net):
    torch.manual_seed(0)
    theirs = Agent(N_OBS, A, T, net, init_alpha=0.3).double()
    ours = copy.deepcopy(theirs)
    assert_same_updates(ours, theirs, SacConfig(actor_lr=1e-3), n_updates=3, per_task=5)


NO_LIMITS = {"max_task_loss": None, "max_grad_norm": None, "max_alpha": None}


@pytest.mark.parametrize("order", ["alpha_first", "critics_first", "actor_first"])
@pytest.mark.parametrize(
    "net", ["reference", "cpp", NETS[1], NETS[2], NETS[4]], ids=lambda net: getattr(net, "kind", net)
)
def test_updates_in_turn_are_those_of_the_equations(order, net):
    torch.manual_seed(0)
    if isinstance(net, str):
        theirs, ours = (make_agent(backend, torch.float64) for backend in ("reference", net))
    else:
        theirs = Agent(N_OBS, A, T, net, init_alpha=0.3).double()
        ours = copy.deepcopy(theirs)
    # Of an eps that makes no step of note out of a gradient that is all rounding.
    cfg = SacConfig(actor_lr=1e-2, critic_lr=1e-2, alpha_lr=0.1, adam_eps=1e-4, **NO_LIMITS, order=order)
    joint = copy.deepcopy(theirs)
    assert_same_updates(ours, theirs, cfg, n_updates=3)
    torch.manual_seed(1)  # and it is another update than all at once
    batch, draws = make_batch(torch.float64, joint)
    others = [copy.deepcopy(joint) for _ in range(2)]
    for agent, each in zip(others, (cfg, replace(cfg, order="joint")), strict=True):
        Update(agent, each).step(*as_one_step(batch, draws))
    differs = {name for name, a in others[0].state_dict().items() if not torch.equal(a, others[1].state_dict()[name])}
    changed = {"alpha_first": "critics.", "critics_first": "actor.", "actor_first": "critics."}[order]
    assert any(name.startswith(changed) for name in differs)


@pytest.mark.parametrize("order", ["joint", "alpha_first"])
def test_log_alpha_may_be_left_unclipped(order):
    theirs = make_agent("reference", torch.float64)
    ours = copy.deepcopy(theirs)
    cfg = SacConfig(max_grad_norm=0.01, max_task_loss=None, clip_alpha=False, order=order)
    assert_same_updates(ours, theirs, cfg, n_updates=2, per_task=5)


def test_extreme_tasks_of_paco_are_reset_by_both_forms():
    torch.manual_seed(0)
    theirs = Agent(N_OBS, A, T, NETS[3], init_alpha=0.3).double()
    ours = copy.deepcopy(theirs)
    cfg = SacConfig(max_task_loss=50.0, reset_extreme=True)
    before = theirs.actor.net.task.weight.detach().clone()
    left_out = assert_same_updates(ours, theirs, cfg, n_updates=3, per_task=5)
    moved = (ours.actor.net.task.weight - before).abs().amax((0, 1))
    assert 0 < left_out < 3 * T and moved.max() > 0.1 and moved.min() < 0.01


def test_a_state_saved_between_updates_in_turn_goes_on_the_same():
    torch.manual_seed(0)
    agent = Agent(N_OBS, A, T, NETS[4])
    cfg = SacConfig(**NO_LIMITS, order="actor_first")
    step = Update(agent, cfg)
    steps = [as_one_step(*make_batch(torch.float32, agent, 5)) for _ in range(4)]
    for one in steps[:2]:
        step.step(*one)
    again = copy.deepcopy(agent)
    resumed = Update(again, cfg)
    resumed.load_state_dict(copy.deepcopy(step.state_dict()))
    assert resumed.step_count == 2
    for one in steps[2:]:
        step.step(*one)
        resumed.step(*one)
    assert all(torch.equal(a, b) for a, b in zip(agent.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels run on the GPU here: tests/gpu")
@pytest.mark.parametrize("order", ["critics_first", "actor_first"])
def test_updates_in_turn_layer_by_layer_are_those_of_the_equations(order):
    pytest.importorskip("triton")
    theirs, ours = (make_agent(of, torch.float64, n_modules=4) for of in ("reference", "triton"))
    cfg = SacConfig(actor_lr=1e-2, critic_lr=1e-2, **NO_LIMITS, order=order)
    assert_same_updates(ours, theirs, cfg, n_updates=1, per_task=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels run on the GPU here: tests/gpu")
def test_an_actor_that_chooses_anew_layer_by_layer_is_that_of_the_equations():
    pytest.importorskip("triton")
    theirs, ours = (make_agent(of, torch.float64, n_modules=4) for of in ("reference", "triton"))
    cfg = SacConfig(actor_lr=1e-3, actor_routes="sampled", route_balancing=False)
    assert_same_updates(ours, theirs, cfg, n_updates=1, per_task=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels run on the GPU here: tests/gpu")
@pytest.mark.parametrize("depth", [1, 2], ids=["one_route_layer", "two_route_layers"])
def test_updates_layer_by_layer_are_those_of_the_equations(depth):
    """As on a GPU, but with Triton's kernels in the interpreter."""
    pytest.importorskip("triton")
    theirs = make_agent("reference", torch.float64, route_widths=(18, 10)[:depth])
    ours = make_agent("triton", torch.float64, route_widths=(18, 10)[:depth])
    assert_same_updates(ours, theirs, SacConfig(actor_lr=1e-3), n_updates=2, per_task=5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's kernels run on the GPU here: tests/gpu")
def test_bf16_reaches_the_layers_around_the_modules():
    """Of networks with one module, which is a layer like others: nothing else has products."""
    pytest.importorskip("triton")
    norms = {}
    for backend, precision in (("reference", "float32"), ("triton", "float32"), ("triton", "bf16")):
        torch.manual_seed(0)
        widths = {"module_width": 20, "base_width": 33, "route_widths": (18,)}
        cfg = NetConfig(n_modules=1, top_k=1, **widths, backend=backend, precision=precision)
        agent = Agent(N_OBS, A, T, cfg)
        norms[backend, precision] = Update(agent, SacConfig()).step(
            *as_one_step(*make_batch(torch.float32, agent, per_task=5))
        )[1]
    truth = norms["reference", "float32"]
    torch.testing.assert_close(norms["triton", "float32"], truth, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(norms["triton", "bf16"], truth, rtol=0.2, atol=1e-2)
    assert (norms["triton", "bf16"][:3] / truth[:3] - 1).abs().max() > 1e-4


def assert_same_updates(ours, theirs, cfg, n_updates, per_task=70):
    """Updates of one agent by `Update`, of an equal one by `sac.update`; returns how many losses were left out."""
    optimiser, step = make_optimiser(theirs, cfg), Update(ours, cfg)
    dtype, left_out = theirs.log_alpha.dtype, 0
    for _ in range(n_updates):
        batch, draws = make_batch(dtype, theirs, per_task)
        expected = update(theirs, optimiser, batch, draws, cfg)
        metrics = step.step(*as_one_step(batch, draws))
        norms = [expected[f"grad_norm/{name}"].reshape(-1) for name in ("actor", "critic", "alpha")]
        close = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-4}
        torch.testing.assert_close(metrics.norms, torch.cat(norms), **close)
        for row, name in zip(metrics.losses, LOSSES, strict=False):
            torch.testing.assert_close(row, expected[name].to(dtype), **close)
        for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b, msg=name, **close)
        left_out += int(metrics.losses[3].sum())
    return left_out


def test_parameters_live_in_one_buffer_and_keep_their_names_and_values():
    agent = make_agent("auto", torch.float32)
    before = {name: value.clone() for name, value in agent.state_dict().items()}
    flat = FlatParameters(agent)
    after = agent.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    storage = flat.all.untyped_storage().data_ptr()
    for owner in (agent.actor, agent.critics, agent.target_critics):
        assert {p.untyped_storage().data_ptr() for p in owner.parameters()} == {storage}
        assert all(p.storage_offset() % ALIGNMENT == 0 for p in owner.parameters())
    for online, target in zip(agent.critics.parameters(), agent.target_critics.parameters(), strict=True):
        assert online.storage_offset() - flat.targets_begin == target.storage_offset() - flat.targets.storage_offset()
    sizes = [int((end - begin).sum()) for begin, end in ((s[:, 0], s[:, 1]) for s in by_network(flat))]
    per_critic = sum(p.numel() for p in agent.critics.parameters()) // 2
    assert sizes == [sum(p.numel() for p in agent.actor.parameters()), per_critic, per_critic, T]
    agent.load_state_dict({name: value + 1 for name, value in before.items()})
    weight, followed = agent.actor.net.base[0].weight, agent.target_critics.net.head.bias
    place = followed.storage_offset() - flat.targets.storage_offset()
    assert torch.equal(flat.targets[place:][:2], before["target_critics.net.head.bias"].flatten() + 1)
    assert torch.equal(flat.view(flat.values, weight), before["actor.net.base.0.weight"] + 1)


def by_network(flat):
    return [flat.segments[flat.segments[:, 2] == network] for network in range(flat.n_networks)]


def test_the_state_of_torchs_adam_is_taken_over():
    """As checkpoints from before the flat buffers hold it."""
    theirs = make_agent("reference", torch.float64)
    ours = copy.deepcopy(theirs)
    cfg = SacConfig()
    optimiser = make_optimiser(theirs, cfg)
    batch, draws = make_batch(torch.float64, theirs)
    for _ in range(3):
        update(theirs, optimiser, batch, draws, cfg)
    step = Update(ours, cfg)
    ours.load_state_dict(theirs.state_dict())
    step.load_state_dict(optimiser.state_dict())
    assert step.step_count.item() == 3
    saved = copy.deepcopy(step.state_dict())
    update(theirs, optimiser, batch, draws, cfg)
    step.step(*as_one_step(batch, draws))
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13, msg=name)
    again = Update(make_agent("reference", torch.float64), cfg)
    again.load_state_dict(saved)
    assert again.step_count.item() == 3
    assert all(
        torch.equal(m, saved[key][name]) for key in ("first", "second") for name, m in again.state_dict()[key].items()
    )


def test_few_rows_take_the_composed_network_and_give_the_same():
    theirs = make_agent("auto", torch.float64)
    ours = copy.deepcopy(theirs)
    assert not ours.actor.net.runs_as_one(torch.zeros(8, N_OBS, dtype=torch.float64))
    whole = make_agent("cpp", torch.float64)
    batch, draws = make_batch(torch.float64, theirs, per_task=2)
    for agent in (ours, whole):
        agent.load_state_dict(theirs.state_dict())
        Update(agent, SacConfig()).step(*as_one_step(batch, draws))
    for (name, a), b in zip(ours.state_dict().items(), whole.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


@on_every_instruction_set
@dtypes
def test_the_gradient_in_one_call_is_that_of_the_single_calls(backend, dtype):
    agent = make_agent(backend, dtype)
    batch, draws = make_batch(dtype, agent)
    rows, task, draws = as_one_step(batch, draws)
    step = Update(agent, SacConfig())
    results = []
    for fill in (step._fill_gradient, step._fill_gradient_in_one):
        step.flat.gradient.fill_(float("nan"))
        own = rows._replace(x=rows.x.clone())
        losses = fill(own, task, draws)
        results.append([losses, own.x, *(g for net in (step._actor, step._critics) for g in net.gradients)])
        results[-1] += [step._alpha_gradient]
        results[-1] = [tensor.clone() for tensor in results[-1]]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert step._runs_as_one(rows.x) and all(t.isfinite().all() for t in results[0])


def one_call_arguments():
    agent = make_agent("cpp", torch.float32)
    batch, draws = make_batch(torch.float32, agent, per_task=20)
    rows, task, draws = as_one_step(batch, draws)
    nets = [
        [parameter.detach().clone() for parameter in owner.net.in_order()]
        for owner in (agent.actor, agent.critics, agent.target_critics)
    ]
    return (
        *(rows.x, rows.reward, rows.terminal, rows.route, task, draws.noise),
        *(draws.critic_choice.temperature, draws.critic_choice.noise, None, agent.log_alpha.detach().clone()),
        *(K, True, True, "float32", 0.99, -3.0, 1e6, True, torch.zeros(T), *nets),
        *([torch.zeros_like(parameter) for parameter in net] for net in nets[:2]),
    )


def test_bad_arguments_are_named():
    values, *rest = step_arguments(torch.float32)
    with pytest.raises(ValueError, match=r"first: expected shape \[70000\], got \[3\]"):
        optimiser_step.optimiser_step(values, rest[0], torch.zeros(3), *rest[2:])
    with pytest.raises(ValueError, match=r"segments\[0\]: expected begin, end within 0\.\.70000 and a network below 4"):
        optimiser_step.optimiser_step(values, *rest[:7], torch.tensor([[0, 80_000, 0]]), *rest[8:])
    with pytest.raises(ValueError, match=r"out, noise: expected \[B,2A\] and \[B,A\], got \[5, 6\] and \[5, 2\]"):
        squashed_normal.squashed_normal(torch.zeros(5, 6), torch.zeros(5, 2))
    q, *others = loss_arguments(torch.float32)
    with pytest.raises(ValueError, match=r"target_q: expected .* with B a multiple of 4 tasks"):
        sac_losses.sac_losses(q, others[0][:, :-1], *others[1:])
    x, *rest = one_call_arguments()
    b = len(rest[0])
    with pytest.raises(ValueError, match=rf"x: expected shape \[3, {b}, {N_OBS + A}\], got \[4, {b}, {N_OBS + A}\]"):
        sac_gradient(torch.cat([x, x[:1]]), *rest)
    with pytest.raises(ValueError, match=rf"task: expected shape \[{2 * b}\], got \[{b}\]"):
        sac_gradient(x, *rest[:3], rest[3][:b], *rest[4:])
    with pytest.raises(ValueError, match=rf"reward: expected shape \[{b}\], got \[{b - 1}\]"):
        sac_gradient(x, rest[0][1:], *rest[1:])
    with pytest.raises(ValueError, match=r"d_parameters: expected 16 tensors, got 15"):
        sac_gradient(x, *rest[:-1], rest[-1][:-1])


def test_a_bf16_agent_runs():
    agent = make_agent("cpp", torch.float32)
    rounded = Agent(N_OBS, A, T, replace(agent.actor.net.cfg, precision="bf16"))
    rounded.load_state_dict(agent.state_dict())
    batch, draws = make_batch(torch.float32, agent)
    exact = Update(agent, SacConfig()).step(*as_one_step(batch, draws))
    metrics = Update(rounded, SacConfig()).step(*as_one_step(batch, draws))
    assert not torch.equal(metrics.norms, exact.norms)
    torch.testing.assert_close(metrics.norms, exact.norms, rtol=0.2, atol=1e-3)
