"""The network and its ensemble: initial values, sizes, a slow oracle, modes, dtypes, and published parameters."""

import dataclasses

import pytest
import slow_sac
import torch

from d2r_fast import Agent, Critics, NetConfig, RouteChoice, RoutedNetwork, load_published
from d2r_fast.nets.d2r import GREEDY
from d2r_fast.nets.layers import EnsembleLinear
from d2r_fast.ops import backends
from d2r_fast.ops.backends import BACKENDS, PRECISIONS
from d2r_fast.ops.gumbel import gumbel

CFG = NetConfig(n_modules=5, top_k=2, module_width=8, base_width=12, route_widths=(10, 9))
N_IN, N_OUT, T = 7, 3, 4


def make_net(n_nets=2, cfg=CFG, dtype=torch.float64):
    """A network away from its initial values: a tiny head and level routes would hide errors."""
    net = RoutedNetwork(N_IN, N_OUT, T, n_nets, cfg).to(dtype)
    with torch.no_grad():
        net.head.weight.uniform_(-1, 1)
        net.route[-1].bias.normal_(std=1.5)
        net.route[-1].weight.normal_()
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def make_rows(rows=20, dtype=torch.float64):
    return torch.randn(rows, N_IN, dtype=dtype), torch.arange(rows) % T


def random_index(e, b, n, k):
    index = torch.zeros(e, b, n, k, dtype=torch.int64)
    for i in range(1, n + 1):
        index[:, :, i - 1, : min(k, i)] = torch.rand(e, b, i).argsort(-1)[..., : min(k, i)]
    return index


def choices(e, b, cfg):
    """One choice a mode, with the oracle's `choose` for a row."""
    tau, noise = torch.rand(b, dtype=torch.float64) + 0.5, gumbel((e, b, cfg.n_logits), torch.zeros(()).double())
    index = random_index(e, b, cfg.n_modules, cfg.top_k)
    return {
        "greedy": (GREEDY, lambda net, row: slow_sac.greedy(cfg.top_k)),
        "sampled": (
            RouteChoice.sampled(tau, noise),
            lambda net, row: slow_sac.sampled(cfg.top_k, tau[row].item(), noise[net, row].tolist()),
        ),
        "given": (RouteChoice.given(index), lambda net, row: slow_sac.given(index[net, row].tolist())),
    }


def loss_grads(net, x, task, choice=GREEDY):
    """Output and all gradients of sum(out * fixed cotangent)."""
    x = x.clone().requires_grad_()
    out, _ = net(x, task, choice)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names = [name for name, _ in net.named_parameters()]
    grads = torch.autograd.grad((out * cotangent).sum(), [x, *net.parameters()])
    return out.detach(), dict(zip(["x", *names], grads, strict=True))


# Initial values and sizes


def assert_uniform(value, bound):
    """Uniform in +-bound, every network's own draw; the limits hold in all but 1 of 1e5 seeds for 100 numbers."""
    assert value.abs().max() <= bound
    assert value.abs().max() > 0.85 * bound
    assert value.mean().abs() < 5 * bound / (3 * value.numel()) ** 0.5
    assert not torch.equal(value[0], value[1])


def test_initial_values_are_the_published_ones():
    cfg = NetConfig()
    net = RoutedNetwork(39, 8, 10, 2, cfg)
    for layer, n_in, n_out in (
        (net.base[0], 39, 400),
        (net.base[1], 400, 400),
        (net.task, 10, 400),
        (net.route[0], 400, 256),
        (net.route[1], 256, 256),
        (net.route[2], 256, 136),
        (net.module0, 400, 128),
    ):
        assert layer.weight.shape == (2, n_out, n_in) and layer.bias.shape == (2, n_out)
        assert_uniform(layer.weight, n_out**-0.5)
        assert (layer.bias == 0.1).all()
    assert net.module_weight.shape == (2, 15, 128, 128) and net.module_bias.shape == (2, 15, 128)
    assert_uniform(net.module_weight, 128**-0.5)
    assert_uniform(net.module_weight.transpose(0, 1), 128**-0.5)  # modules differ too
    assert (net.module_bias == 0.1).all()
    assert net.head.weight.shape == (2, 8, 128) and net.head.bias.shape == (2, 8)
    assert_uniform(net.head.weight, 3e-3)
    assert net.head.bias.abs().max() <= 3e-3 and net.head.bias.unique().numel() > 8


def test_agent_starts_with_targets_equal_to_critics_and_temperatures_of_1():
    agent = Agent(7, 2, T, CFG, init_alpha=0.25)
    target = agent.target_critics.state_dict()
    assert all(torch.equal(value, target[name]) for name, value in agent.critics.state_dict().items())
    assert not any(p.requires_grad for p in agent.target_critics.parameters())
    assert torch.equal(agent.route_temp, torch.ones(T))
    torch.testing.assert_close(agent.log_alpha.exp(), torch.full((T,), 0.25))


def test_actor_of_the_published_size_has_684_250_parameters():
    actor = Agent(39, 4, 10, NetConfig())
    n_parameters = sum(p.numel() for p in actor.actor.parameters())
    # The published count includes the 10 route temperatures, which are a buffer here.
    assert n_parameters + actor.route_temp.numel() == 684_250


@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 2), (5, 2), (16, 2), (32, 3)])
def test_shapes(n, k):
    cfg = NetConfig(n_modules=n, top_k=k, module_width=8, base_width=12, route_widths=(10,))
    net = RoutedNetwork(N_IN, N_OUT, T, 2, cfg)
    out, routes = net(*make_rows(dtype=torch.float32))
    assert out.shape == (2, 20, N_OUT)
    assert routes.index.shape == routes.gate.shape == routes.flow.shape == (2, 20, n, k)
    assert routes.active.shape == (2, 20)
    assert len(net.route) == 2
    q = Critics(N_IN, 2, T, cfg)(*make_rows(dtype=torch.float32)[:1], torch.zeros(20, 2), torch.arange(20) % T)
    assert q.shape == (2, 20)


# The function


@pytest.mark.parametrize("mode", ["greedy", "sampled", "given"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"residual": False},
        {"resrouting": False},
        {"top_k": 5},
        {"n_modules": 1, "top_k": 1},
        {"route_widths": (6,)},
    ],
    ids=["plain", "nores", "noresrouting", "K5", "N1", "one_route_layer"],
)
def test_matches_the_slow_network(changes, training, mode):
    cfg = dataclasses.replace(CFG, **changes)
    net = make_net(2, cfg).train(training)
    x, task = make_rows(8)
    choice, choose = choices(2, 8, cfg)[mode]
    out, grads = loss_grads(net, x, task, choice)

    params = [{name: value[e].clone().requires_grad_() for name, value in net.state_dict().items()} for e in range(2)]
    rows = x.clone().requires_grad_()
    slow = torch.stack(
        [
            torch.stack(
                [
                    slow_sac.network(
                        params[e], rows[b], int(task[b]), choose(e, b), training, cfg.resrouting, cfg.residual
                    )
                    for b in range(8)
                ]
            )
            for e in range(2)
        ]
    )
    torch.testing.assert_close(out, slow.detach(), rtol=1e-11, atol=1e-12)
    (slow * torch.linspace(-1, 1, slow.numel(), dtype=slow.dtype).view_as(slow)).sum().backward()
    torch.testing.assert_close(grads.pop("x"), rows.grad, rtol=1e-9, atol=1e-11)
    for name, grad in grads.items():
        slow_grad = torch.stack([torch.zeros_like(p[name]) if p[name].grad is None else p[name].grad for p in params])
        torch.testing.assert_close(grad, slow_grad, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


def test_ensemble_members_equal_each_network_alone():
    net = make_net(3)
    x, task = make_rows()
    choice, _ = choices(3, 20, CFG)["sampled"]
    out, routes = net(x, task, choice)
    for e in range(3):
        alone = RoutedNetwork(N_IN, N_OUT, T, 1, CFG).double()
        alone.load_state_dict({name: value[e : e + 1] for name, value in net.state_dict().items()})
        own, own_routes = alone(x, task, choice._replace(noise=choice.noise[e : e + 1]))
        torch.testing.assert_close(own[0], out[e], rtol=1e-12, atol=1e-13)
        for field in ("index", "flow", "active"):
            assert torch.equal(getattr(own_routes, field)[0], getattr(routes, field)[e])
    assert largest_difference(out[0], out[1]) > 0.01


def largest_difference(a, b):
    return (a - b).abs().max().item()


def test_ensemble_members_share_no_gradient():
    net = make_net(2)
    out, _ = net(*make_rows())
    for name, grad in zip(
        dict(net.named_parameters()), torch.autograd.grad(out[0].sum(), list(net.parameters())), strict=True
    ):
        assert (grad[1] == 0).all(), name
        assert (grad[0] != 0).any(), name


def test_dev3_modes_agree_in_value_and_differ_in_gradient():
    net = make_net(2, NetConfig(n_modules=16, top_k=2, module_width=8, base_width=12, route_widths=(10,)))
    rows = make_rows()
    training, train_grads = loss_grads(net.train(), *rows)
    assert not net(*rows)[1].flow[:, :, 1:].all()
    evaluating, eval_grads = loss_grads(net.eval(), *rows)
    assert net(*rows)[1].flow[:, :, 1:].all()
    assert torch.equal(training, evaluating)
    for name in ("x", "module_weight", "module0.weight", "base.1.weight"):
        assert largest_difference(train_grads[name], eval_grads[name]) > 1e-4 * eval_grads[name].abs().max(), name
    assert torch.equal(train_grads["head.weight"], eval_grads["head.weight"])  # no source lies beyond the head


def test_without_resrouting_the_modes_agree_in_gradient_too():
    net = make_net(2, NetConfig(n_modules=16, module_width=8, base_width=12, route_widths=(10,), resrouting=False))
    rows = make_rows()
    _, train_grads = loss_grads(net.train(), *rows)
    _, eval_grads = loss_grads(net.eval(), *rows)
    assert all(torch.equal(grad, eval_grads[name]) for name, grad in train_grads.items())


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_without_dynamic_depth_every_row_runs_all_modules(backend, k):
    cfg = dataclasses.replace(CFG, top_k=k, dynamic_depth=False, backend=backend)
    net, (x, task) = make_net(cfg=cfg, dtype=torch.float32), make_rows(600, torch.float32)
    noise = gumbel((2, len(x), cfg.n_logits), x)
    for tau in (1e-30, 1.0, 1e30):
        for choice in (GREEDY, RouteChoice.sampled(torch.full((len(x),), tau), noise.clamp(max=10))):
            out, routes = net(x, task, choice)
            assert out.isfinite().all() and (routes.active == 2**cfg.n_modules - 1).all()
            assert (routes.index[..., 0] == torch.arange(cfg.n_modules)).all()
    if k == cfg.n_modules:  # all of them anyway
        whole = RoutedNetwork(N_IN, N_OUT, T, 2, dataclasses.replace(cfg, dynamic_depth=True))
        whole.load_state_dict(net.state_dict())
        torch.testing.assert_close(net(x, task)[0], whole(x, task)[0])


def test_dev1_task_layer_is_a_row_of_its_weight():
    net = make_net(2)
    x, task = make_rows()
    caught = []
    hook = net.task.register_forward_hook(lambda *args: caught.append(args[-1]))
    net(x, task)
    hook.remove()
    assert torch.equal(caught[0], net.task.weight.mT[:, task] + net.task.bias[:, None])
    # A task without a row gets no gradient.
    present = task[task != 2]
    out, _ = net(x[task != 2], present)
    (grad,) = torch.autograd.grad(out.square().sum(), net.task.weight)
    assert (grad[:, :, 2] == 0).all()
    assert all((grad[:, :, t] != 0).any() for t in (0, 1, 3))


def test_dev1_a_task_outside_the_range_adds_nothing_to_the_bias():
    net = make_net(2)
    x, _ = make_rows(3)
    caught = []
    hook = net.task.register_forward_hook(lambda *args: caught.append(args[-1]))
    net(x, torch.tensor([-1, T, 100]))
    hook.remove()
    assert torch.equal(caught[0], net.task.bias[:, None].expand_as(caught[0]))


@pytest.mark.parametrize("task_dtype", [torch.int64, torch.int32, torch.uint8], ids=["i64", "i32", "u8"])
def test_task_dtypes(task_dtype):
    net = make_net(2)
    x, task = make_rows()
    assert torch.equal(net(x, task.to(task_dtype))[0], net(x, task)[0])


def test_dtypes():
    net = make_net(2)
    x, task = make_rows(63)
    choice = RouteChoice.given(random_index(2, 63, CFG.n_modules, CFG.top_k))  # the same routes, whatever the rounding
    exact, _ = net(x, task, choice)
    for dtype, limit in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        out, routes = net.to(dtype)(x.to(dtype), task, choice)
        assert out.dtype == routes.gate.dtype == dtype
        assert largest_difference(out.double(), exact) < limit * exact.abs().max()
        assert all(grad.isfinite().all() for grad in loss_grads(net, x.to(dtype), task, choice)[1].values())


def test_forward_twice_is_identical_and_changes_nothing():
    net = make_net(2)
    x, task = make_rows()
    before = {name: value.clone() for name, value in net.state_dict().items()} | {"x": x.clone(), "task": task.clone()}
    first, second = loss_grads(net, x, task), loss_grads(net, x, task)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(grad, second[1][name]) for name, grad in first[1].items())
    after = net.state_dict() | {"x": x, "task": task}
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_ensemble_linear_takes_shared_and_own_inputs():
    layer = EnsembleLinear(2, 4, 3, NetConfig()).double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    expected = torch.stack([x[e] @ layer.weight[e].T + layer.bias[e] for e in range(2)])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(layer(x[0])[1], x[0] @ layer.weight[1].T + layer.bias[1], rtol=1e-12, atol=1e-14)


def test_gumbel_is_standard_and_follows_its_generator():
    like = torch.zeros((), dtype=torch.float64)
    drawn = gumbel((100_000,), like, torch.Generator().manual_seed(3))
    assert drawn.dtype == torch.float64
    assert abs(drawn.mean().item() - 0.5772) < 0.02  # Euler's constant
    assert abs(drawn.var().item() - torch.pi**2 / 6) < 0.05
    assert torch.equal(drawn, gumbel((100_000,), like, torch.Generator().manual_seed(3)))


@pytest.mark.parametrize(
    ("x", "task", "choice", "message"),
    [
        ((4, N_IN + 1), (4,), GREEDY, r"x: expected \[B,7\], got \[4, 8\]"),
        ((1, 4, N_IN), (4,), GREEDY, r"x: expected \[B,7\], got \[1, 4, 7\]"),
        ((4, N_IN), (3,), GREEDY, r"task: expected \[B=4\], got \[3\]"),
        ((4, N_IN), (4, 1), GREEDY, r"task: expected \[B=4\], got \[4, 1\]"),
        ((4, N_IN), (4,), RouteChoice("sampled"), r"temperature: mode 'sampled' expects shape \[4\], got None"),
        (
            (4, N_IN),
            (4,),
            RouteChoice.given(torch.zeros(1, 4, 5, 2).long()),
            r"index: .* \[2, 4, 5, 2\], got \[1, 4, 5, 2\]",
        ),
    ],
)
def test_value_errors(x, task, choice, message):
    with pytest.raises(ValueError, match=message):
        make_net(2)(torch.zeros(x, dtype=torch.float64), torch.zeros(task, dtype=torch.int64), choice)


# Published parameters

PUBLISHED = {
    "base.0": "base.fc0",
    "base.1": "base.fc1",
    "task": "em_base.fc0",
    "module0": "depth_route_net.module_fcs.0",
    "head": "last",
}


def published(net, e):
    """Network e's parameters under the published names."""
    named = {"gumbel_temperature": torch.ones(T)}
    for name, value in net.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if name in ("module_weight", "module_bias"):
            for i, module in enumerate(value[e], start=1):
                named[f"depth_route_net.module_fcs.{i}.{name.removeprefix('module_')}"] = module
        elif layer.startswith("route."):
            named[f"depth_route_net.gates.{layer.removeprefix('route.')}.{kind}"] = value[e]
        else:
            named[f"{PUBLISHED[layer]}.{kind}"] = value[e]
    return named


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_load_published_of_two_critics(n):
    cfg = NetConfig(n_modules=n, top_k=1, module_width=8, base_width=12, route_widths=(10, 9))
    net, other = make_net(2, cfg), make_net(2, cfg)
    loaded = load_published(published(net, 0), published(net, 1))
    other.load_state_dict(loaded)
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in net.state_dict().items())
    assert {value.dtype for value in loaded.values()} == {torch.float64}


def without(*names):
    return lambda p: {name: value for name, value in p.items() if name not in names}


def renamed(old, new):
    return lambda p: {new if name == old else name: value for name, value in p.items()}


M = "depth_route_net.module_fcs"
G = "depth_route_net.gates"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p | {"pi.weight": torch.zeros(1)}, r"not a parameter of the published network: 'pi\.weight'"),
        (renamed("last.weight", "lasting.weight"), r"not a parameter of the published network: 'lasting\.weight'"),
        (renamed("last.weight", "last.scale"), r"last\.scale"),
        (lambda p: p | {f"{M}.x.weight": torch.zeros(8, 8)}, rf"not a parameter .* '{M}\.x\.weight'"),
        (without("base.fc1.weight"), r"nothing given for base\.1\.weight"),
        (without("base.fc1.bias"), r"base\.1\.bias"),
        (without("last.weight", "last.bias"), r"nothing given for .*head\.weight"),
        (without("em_base.fc0.weight"), r"nothing given for task\.weight"),
        (without(f"{M}.0.weight"), r"nothing given for module0\.weight"),
        (without(f"{M}.2.weight"), r"module_fcs\.\*\.weight: expected modules 1.*, got \[1, 3, 4\]"),
        (without(f"{M}.1.bias"), r"module_fcs\.\*\.bias: expected modules 1.*, got \[2, 3, 4\]"),
        (without(f"{M}.4.bias"), r"module"),
        (without(f"{G}.1.weight"), r"route"),
        (without(f"{G}.2.bias"), r"route"),
        (without(*(f"{G}.{i}.{kind}" for i in range(3) for kind in ("weight", "bias"))), r"route"),
        (lambda p: p | {f"{M}.2.weight": torch.zeros(9, 9, dtype=torch.float64)}, r"module"),
    ],
    ids=[
        "unknown",
        "prefix_of_a_name",
        "unknown_kind",
        "module_x",
        "no_base_weight",
        "no_base_bias",
        "no_head",
        "no_task",
        "no_module_0",
        "gap_in_weights",
        "gap_in_biases",
        "fewer_biases",
        "no_gate_weight",
        "no_gate_bias",
        "no_gates",
        "modules_of_two_sizes",
    ],
)
def test_load_published_errors(change, message):
    with pytest.raises(ValueError, match=message):
        load_published(change(published(make_net(2), 0)))


def test_load_published_takes_networks_of_one_shape():
    wide = NetConfig(n_modules=5, module_width=9, base_width=12, route_widths=(10, 9))
    with pytest.raises(ValueError, match="the networks differ in names or shapes"):
        load_published(published(make_net(2), 0), published(make_net(2, wide), 0))
    with pytest.raises(ValueError, match="expected at least one state dict, got none"):
        load_published()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("widths", [(8, 16, 8), (257, 16, 8), (1025, 16, 8), (8, 1025, 8), (8, 16, 1025)])
def test_a_configuration_is_refused_if_and_only_if_its_network_cannot_run(monkeypatch, backend, precision, widths):
    monkeypatch.setattr(backends, "INTERPRETED", False)
    width, hidden, route = widths
    sizes = {"module_width": width, "base_width": hidden, "route_widths": (route,)}
    cfg = NetConfig(n_modules=3, backend=backend, precision=precision, **sizes)
    x, task = make_rows(2, torch.float32)
    refusals = []
    for attempt in (lambda: cfg.check_runs_on(x.device), lambda: RoutedNetwork(N_IN, N_OUT, T, 1, cfg)(x, task)):
        try:
            attempt()
            refusals.append(None)
        except ValueError as error:
            refusals.append(str(error).removeprefix("net."))
    assert (refusals[0] is None) == (refusals[1] is None), refusals
    if backend == "triton" or (backend == "cpp" and max(widths) > 1024):
        assert refusals[0] is not None


def test_cpp_is_refused_on_a_device_other_than_the_cpu():
    with pytest.raises(ValueError, match=r"^net\.backend cpp: expected tensors on cpu, got meta$"):
        NetConfig(backend="cpp").check_runs_on(torch.device("meta"))  # as on a GPU
    NetConfig(backend="reference").check_runs_on(torch.device("meta"))
