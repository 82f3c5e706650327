"""The networks that D2R is compared with: sizes, initial values, ensembles, rows in task order, gradients, refusals.

That they are the published functions is shown by the recorded vectors (test_golden.py).
"""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import NETS

from d2r_fast.nets.care import CareConfig
from d2r_fast.nets.d2r import NetConfig
from d2r_fast.nets.film import FilmConfig
from d2r_fast.nets.kinds import NET_CONFIGS
from d2r_fast.nets.mlp import MlpConfig
from d2r_fast.nets.moore import MooreConfig
from d2r_fast.nets.multi_head import MultiHeadConfig
from d2r_fast.nets.paco import PacoConfig, extreme_tasks, leave_out, reset_extreme
from d2r_fast.nets.soft_modules import SoftModulesConfig

N_IN, N_OUT, T = 5, 3, 4
every_network = pytest.mark.parametrize("cfg", NETS, ids=lambda cfg: cfg.kind)


def make_net(cfg, n_nets=2, dtype=torch.float64):
    """Away from its initial values: tiny heads and equal sets would hide errors."""
    net = cfg.make(N_IN, N_OUT, T, n_nets, "critic").to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.4 * torch.randn_like(parameter)
    return net


def outputs_and_gradients(net, x, task, in_task_order=False):
    x = x.clone().requires_grad_()
    out = net(x, task, in_task_order)
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    names = ["x", *(name for name, _ in net.named_parameters())]
    gradients = torch.autograd.grad((out * cotangent).sum(), [x, *net.parameters()])
    return {"out": out.detach(), **dict(zip(names, gradients, strict=True))}


def test_every_network_is_here():
    assert [NetConfig.kind, *(cfg.kind for cfg in NETS)] == list(NET_CONFIGS)


# Sizes: those of the published source code, counted there; multiply-adds of an MT10 actor in millions


PUBLISHED = [
    (MlpConfig(), (344_008, 342_801), (360_008, 358_801), 0.34),
    (MultiHeadConfig(), (372_880, 346_410), (517_200, 378_450), 0.34),
    (
        SoftModulesConfig(n_layers=2, n_modules=2, module_width=256),
        (691_022, 690_823),
        (707_022, 706_823),
        0.68,
    ),
    (SoftModulesConfig(), (792_444, 793_141), (808_444, 809_141), 0.78),
    (PacoConfig(), (1_700_095, 1_694_060), None, 0.34),
    (PacoConfig(n_sets=20), None, (6_801_180, 6_777_040), 0.34),
    (MooreConfig(), (1_379_320, 1_357_650), None, 1.35),
    (MooreConfig(n_experts=6), None, (2_181_500, 2_050_750), 2.02),
    (CareConfig(), (420_564, 418_957), None, 0.40),
    (CareConfig(n_experts=10), None, (451_168, 450_361), 0.43),
    (CareConfig(n_experts=4), (406_262, 404_255), None, 0.39),
    (FilmConfig(), (377_414, 374_807), (379_414, 376_807), 0.37),
]


@pytest.mark.parametrize(("cfg", "mt10", "mt50", "millions"), PUBLISHED, ids=lambda value: getattr(value, "kind", None))
def test_sizes_are_the_published_ones(cfg, mt10, mt50, millions):
    with torch.device("meta"):
        for n_tasks, counts in ((10, mt10), (50, mt50)):
            nets = cfg.make(39, 8, n_tasks, 1, "actor"), cfg.make(43, 1, n_tasks, 1, "critic")
            ours = tuple(sum(p.numel() for p in net.parameters()) for net in nets)
            assert counts is None or ours == counts
        assert round(cfg.make(39, 8, 10, 1, "actor").multiply_adds / 1e6, 2) == millions


@every_network
def test_two_networks_are_twice_one(cfg):
    one, two = (cfg.make(N_IN, N_OUT, T, n, "actor") for n in (1, 2))
    shapes = {name: p.shape for name, p in one.named_parameters()}
    assert {name: (1, *p.shape[1:]) for name, p in two.named_parameters()} == shapes
    assert all(p.shape[0] == 2 for p in two.parameters())
    assert one.multiply_adds == two.multiply_adds


# Initial values


def assert_uniform(value, bound):
    assert value.abs().max() <= bound
    assert value.abs().max() > 0.85 * bound
    assert value.mean().abs() < 5 * bound / (3 * value.numel()) ** 0.5


def assert_independent(*values):
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[:i])


def test_initial_values_of_soft_modules_code():
    soft = SoftModulesConfig().make(39, 8, 10, 2, "actor")
    mlp, heads = (c().make(39, 8, 10, 2, "actor") for c in (MlpConfig, MultiHeadConfig))
    hidden = [*soft.base, soft.task, *soft.gating, *soft.gate_cond.values(), *soft.layers, *mlp.layers, *heads.layers]
    for layer in hidden:
        assert_uniform(layer.weight, layer.weight.shape[-2] ** -0.5)
        assert (layer.bias == 0.1).all()
        assert_independent(*layer.weight)
    for layer in (*soft.gate, soft.head, mlp.head, heads.heads):
        assert_uniform(layer.weight, 3e-3)
        assert layer.bias.abs().max() <= 3e-3 and layer.bias.unique().numel() > 1
    assert_independent(*soft.layers[1].weight[0])
    assert_independent(*heads.heads.weight[0])


def test_initial_values_of_paco():
    for role, n_in, n_out in (("actor", 39, 8), ("critic", 43, 1)):
        net = PacoConfig().make(n_in, n_out, 10, 2, role)
        assert abs(net.task.weight.std() - 1) < 0.3 and (net.task.bias == 0).all()
        assert_independent(*net.task.weight)
        for layer in net.layers:
            inputs = layer.weight.shape[-1]
            assert_uniform(layer.weight[:, 0], (6 / (inputs + 400)) ** 0.5 if role == "actor" else inputs**-0.5)
        assert_uniform(net.head.weight[:, 0], 0.3 * (6 / 404) ** 0.5 if role == "actor" else 3e-3)
        for layer in (*net.layers, net.head):
            assert (layer.bias == 0).all()
            assert (layer.weight == layer.weight[:, :1]).all()  # the sets start equal, the networks do not
            assert_independent(*layer.weight)


def test_initial_values_of_moore():
    net = MooreConfig().make(39, 8, 10, 2, "actor")
    assert_uniform(net.task.weight, (6 / 14) ** 0.5)
    for layer in net.experts:
        for value in (layer.weight, layer.bias):
            assert_uniform(value, layer.weight.shape[-1] ** -0.5)
        assert_independent(*layer.weight.flatten(0, 1))
    assert_uniform(net.heads.weight, (6 / 408) ** 0.5)
    assert_uniform(net.heads.bias, 400**-0.5)


@pytest.mark.parametrize("config", [CareConfig, FilmConfig])
def test_initial_values_of_mtrl(config):
    net = config().make(39, 8, 10, 2, "actor")
    assert abs(net.embedding.weight.std() - 1) < 0.15
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif name != "embedding.weight":
            assert_uniform(parameter, (6 / sum(parameter.shape[-2:])) ** 0.5)
            assert_independent(*parameter)


# Ensembles, rows, orders


@every_network
def test_networks_share_rows_and_nothing_else(cfg):
    net = make_net(cfg, 2)
    x, task = torch.randn(7, N_IN, dtype=torch.float64), torch.arange(7) % T
    for e in range(2):
        alone = cfg.make(N_IN, N_OUT, T, 1, "critic").double()
        alone.load_state_dict({name: value[e : e + 1] for name, value in net.state_dict().items()})
        torch.testing.assert_close(net(x, task)[e], alone(x, task)[0], rtol=1e-12, atol=1e-14)
        for parameter in torch.autograd.grad(net(x, task)[e].sum(), list(net.parameters())):
            assert (parameter[1 - e] == 0).all()


@every_network
def test_a_row_is_its_own(cfg):
    """The output of a row is the same alone, among others, and in another order."""
    net = make_net(cfg)
    x, task = torch.randn(9, N_IN, dtype=torch.float64), torch.randint(T, (9,))
    together = net(x, task)
    order = torch.randperm(9)
    torch.testing.assert_close(net(x[order], task[order]), together[:, order], rtol=1e-12, atol=1e-14)
    for i in range(9):
        torch.testing.assert_close(net(x[i : i + 1], task[i : i + 1]), together[:, i : i + 1], rtol=1e-12, atol=1e-14)
    assert net(x[:0], task[:0]).shape == (2, 0, N_OUT)


@every_network
@given(each=st.integers(1, 6), n_nets=st.integers(1, 3), seed=st.integers(0, 2**16))
def test_task_order_changes_nothing_but_rounding(cfg, each, n_nets, seed):
    torch.manual_seed(seed)
    net = make_net(cfg, n_nets)
    x, task = torch.randn(T * each, N_IN, dtype=torch.float64), torch.arange(T).repeat_interleave(each)
    told, untold = (outputs_and_gradients(net, x, task, in_task_order) for in_task_order in (True, False))
    for name, value in untold.items():
        torch.testing.assert_close(told[name], value, rtol=1e-9, atol=1e-10, msg=name)


@every_network
def test_a_task_without_rows_gets_no_gradient(cfg):
    net = make_net(cfg)
    x, task = torch.randn(6, N_IN, dtype=torch.float64), torch.tensor([0, 1, 3, 3, 0, 1])
    before = net(x, task)
    by_task = {"task.weight": -1, "heads.weight": 1, "heads.bias": 1, "embedding.weight": 1}
    grads = outputs_and_gradients(net, x, task)
    found = [name for name in by_task if name in grads]
    assert found or isinstance(cfg, MlpConfig)
    for name in found:
        axis = by_task[name]
        assert (grads[name].select(axis, 2) == 0).all(), name
        assert all((grads[name].select(axis, t) != 0).any() for t in (0, 1, 3)), name
        with torch.no_grad():
            net.get_parameter(name).select(axis, 2).fill_(1e3)
    assert torch.equal(net(x, task), before)


@every_network
@pytest.mark.parametrize("in_task_order", [False, True])
def test_gradcheck(cfg, in_task_order):
    net = make_net(cfg)
    names, values = zip(*net.named_parameters(), strict=True)
    x, task = torch.randn(T, N_IN, dtype=torch.float64, requires_grad=True), torch.arange(T)

    def run(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(net, named, (x, task, in_task_order))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)


@every_network
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_task_dtypes(cfg, dtype):
    net = make_net(cfg)
    x, task = torch.randn(5, N_IN, dtype=torch.float64), torch.tensor([1, 0, 3, 1, 2])
    assert torch.equal(net(x, task.to(dtype)), net(x, task))


@every_network
def test_bf16_products_and_autocast_stay_close(cfg):
    exact = make_net(cfg, dtype=torch.float32)
    rounded = dataclasses.replace(cfg, precision="bf16").make(N_IN, N_OUT, T, 2, "critic")
    rounded.load_state_dict(exact.state_dict())
    x, task = torch.randn(T * 3, N_IN), torch.arange(T).repeat_interleave(3)
    expected = exact(x, task)
    scale = expected.abs().max()
    for in_task_order in (False, True):
        out = rounded(x, task, in_task_order)
        assert 0 < (out - expected).abs().max() < 0.1 * scale
        with torch.autocast("cpu", torch.bfloat16):
            out = exact(x, task, in_task_order)
        assert 0 < (out.float() - expected).abs().max() < 0.1 * scale


@every_network
def test_networks_compile_without_graph_breaks(cfg):
    torch._dynamo.reset()
    net = make_net(cfg, dtype=torch.float32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, task = torch.randn(T * 2, N_IN), torch.arange(T).repeat_interleave(2)
    ours, theirs = (outputs_and_gradients(run, x, task, in_task_order=True) for run in (compiled, net))
    for (name, a), b in zip(ours.items(), theirs.values(), strict=True):
        torch.testing.assert_close(a, b, msg=name)


@every_network
def test_wrong_rows_are_refused(cfg):
    net = make_net(cfg)
    x, task = torch.zeros(6, N_IN, dtype=torch.float64), torch.zeros(6, dtype=torch.int64)
    for wrong_x, wrong_task, message in (
        (torch.zeros(6, N_IN + 1, dtype=torch.float64), task, r"x: expected \[B,5\], got \[6, 6\]"),
        (x, task[:5], r"task: expected \[B=6\], got \[5\]"),
        (x.float(), task, r"x: expected torch\.float64 like the parameters, got torch\.float32"),
        (x.to("meta"), task, "x: expected device cpu like the parameters, got meta"),
    ):
        with pytest.raises(ValueError, match=message):
            net(wrong_x, wrong_task)
    with pytest.raises(ValueError, match="as many rows of each of 4 tasks, got 6 in task order"):
        net(x, task, in_task_order=True)


@pytest.mark.parametrize("config", [c for c in NET_CONFIGS.values() if c is not NetConfig])
def test_configurations_are_refused_by_name(config):
    sizes = [f.name for f in dataclasses.fields(config) if "width" in f.name or f.name.startswith("n_")]
    for name in sizes:
        wrong = ((), (8, 0)) if isinstance(getattr(config(), name), tuple) else (0, -1)
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^net\.{name}: expected .*, got "):
                config(**{name: value})


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (SoftModulesConfig, {"n_layers": 1}, "net.n_layers: expected at least 2, got 1"),
        (MooreConfig, {"n_experts": 9, "widths": (40, 8)}, r"net.n_experts: expected at most the last of widths="),
        (MooreConfig, {"norm_epsilon": -1e-8}, "net.norm_epsilon: expected a finite number of at least 0"),
        (CareConfig, {"temperature": 0.0}, "net.temperature: expected a finite number over 0, got 0.0"),
    ],
)
def test_what_a_method_does_not_allow_is_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


@every_network
def test_a_backend_that_cannot_run_is_refused(cfg):
    wide = {"widths": (1025,)} if hasattr(cfg, "widths") else {"base_widths": (1025,)}
    with pytest.raises(ValueError, match=r"^net\.backend cpp: expected a width of at most 1024, got 1025$"):
        dataclasses.replace(cfg, backend="cpp", **wide).check_runs_on(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"^net\.backend cpp: expected tensors on cpu, got meta$"):
        dataclasses.replace(cfg, backend="cpp").check_runs_on(torch.device("meta"))
    cfg.check_runs_on(torch.device("cpu"))


# PaCo's own


def test_extreme_tasks_are_left_out_and_reset():
    """Beyond the recorded vector: no rows, no extreme task, an ensemble, and what is refused."""
    loss, task = torch.tensor([1.0, 5000.0, 3.0, 2000.0]), torch.tensor([0, 1, 0, 1])
    task_loss, extreme = extreme_tasks(loss, task, 3)
    assert task_loss.tolist() == [2.0, 3500.0, 0.0] and extreme.tolist() == [False, True, False]
    assert extreme_tasks(loss, task, 3, threshold=3500.0)[1].tolist() == [False, False, False]
    assert leave_out(loss, task, extreme).tolist() == [1.0, 0.0, 3.0, 0.0]
    weight = torch.arange(12.0).view(2, 2, 3)
    uniform = torch.full((3, 3), 7.0)
    uniform[1] = torch.tensor([0.2, 9.0, 0.6])
    after = reset_extreme(weight, extreme, uniform)
    assert torch.equal(after[..., 0::2], weight[..., 0::2])
    torch.testing.assert_close(after[..., 1], 0.25 * weight[..., 0] + 0.75 * weight[..., 2])
    none = torch.zeros(3, dtype=torch.bool)
    assert torch.equal(reset_extreme(weight, none, uniform), weight)
    assert torch.equal(reset_extreme(weight, ~none, uniform), weight)
    with pytest.raises(ValueError, match=r"uniform: expected \[T=3,T=3\], got \[2, 1\]"):
        reset_extreme(weight, extreme, torch.zeros(2, 1))
