"""The network as one operation against the network composed of the other operations, on the reference in float64."""

from dataclasses import replace

import pytest
import torch
from conftest import cpp_backends
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from d2r_fast import NetConfig, RouteChoice, RoutedNetwork
from d2r_fast.nets.d2r import GREEDY
from d2r_fast.ops import routed_network
from d2r_fast.ops.backends import INTERPRETED, availability
from d2r_fast.ops.cpp.library import instruction_sets, use_instruction_set
from d2r_fast.ops.gumbel import gumbel
from d2r_fast.ops.routed_network import backward, forward, saved_shapes

pytestmark = pytest.mark.usefixtures("poisoned_memory")
on_every_instruction_set = pytest.mark.parametrize("backend", cpp_backends(), indirect=True)

N_IN, N_OUT, T = 7, 3, 4


def make_net(e, dtype=torch.float64, **changes):
    """A network away from its initial values: a tiny head and level routes would hide errors."""
    cfg = {"n_modules": 6, "module_width": 20, "base_width": 33, "route_widths": (18, 10)} | changes
    net = RoutedNetwork(N_IN, N_OUT, T, e, NetConfig(**cfg)).to(dtype)
    with torch.no_grad():
        net.head.weight.uniform_(-1, 1)
        net.route[-1].bias.normal_(std=1.5)
        for parameter in net.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return net


def twin(net, backend, **changes):
    """The same parameters on another backend."""
    cfg = replace(net.cfg, backend=backend, **changes)
    other = RoutedNetwork(net.n_in, net.head.weight.shape[1], net.n_tasks, net.n_nets, cfg)
    other.load_state_dict(net.state_dict())
    return other.to(net.module_weight.dtype).train(net.training)


def make_rows(b, dtype=torch.float64):
    return torch.randn(b, N_IN, dtype=dtype), torch.randint(0, T, (b,)).sort().values


def make_choice(mode, e, b, cfg):
    if mode == "greedy":
        return GREEDY
    if mode == "sampled":
        like = torch.zeros((), dtype=torch.float64)
        return RouteChoice.sampled(torch.rand(b, dtype=torch.float64) + 0.5, gumbel((e, b, cfg.n_logits), like))
    index = torch.zeros(e, b, cfg.n_modules, cfg.top_k, dtype=torch.uint8)
    for i in range(1, cfg.n_modules + 1):
        kept = min(cfg.top_k, i)
        index[:, :, i - 1, :kept] = torch.rand(e, b, i).argsort(-1)[..., :kept]
    return RouteChoice.given(index)


def results(net, x, task, choice, frozen=False, through_gates=True):
    """Output, routes, and every gradient of a sum that the gates enter too."""
    net.requires_grad_(not frozen)
    x = x.detach().clone().requires_grad_()
    out, routes = net(x, task, choice)
    loss = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
    if through_gates:
        loss = (
            loss
            + (
                routes.gate
                * torch.linspace(0, 2, routes.gate.numel(), dtype=out.dtype).view_as(out.new_empty(routes.gate.shape))
            ).sum()
        )
    leaves = {"x": x} | ({} if frozen else dict(net.named_parameters()))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {"out": out.detach(), **routes._asdict(), **dict(zip(leaves, grads, strict=True))}


def assert_agree(ours, expected, tolerance=1e-11):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:  # a network of one module does not use its modules' weights
            assert ours[name] is None or not ours[name].numel(), name
        elif value.is_floating_point() and value.numel():
            error = (ours[name] - value).abs().max().item() / max(1.0, value.abs().max().item())
            assert error <= tolerance, f"{name}: {error:.1e}"
        else:
            assert torch.equal(ours[name], value), name


@on_every_instruction_set
@pytest.mark.parametrize("mode", ["greedy", "sampled", "given"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("e", "b", "changes"),
    [
        (2, 131, {}),
        (1, 1, {}),
        (3, 65, {"residual": False, "top_k": 3}),
        (2, 40, {"resrouting": False, "n_modules": 16, "top_k": 16}),
        (2, 70, {"n_modules": 1, "top_k": 1}),
        (1, 64, {"n_modules": 32, "route_widths": (5,), "module_width": 128, "base_width": 96}),
        (1, 200, {"route_widths": (9, 8, 7, 6)}),
    ],
    ids=["plain", "one_row", "nores-K3", "noresrouting-dense", "N1", "N32", "four_route_layers"],
)
def test_matches_the_composed_network(backend, e, b, changes, training, mode):
    net = make_net(e, **changes).train(training)
    rows, choice = make_rows(b), make_choice(mode, e, b, net.cfg)
    assert_agree(results(twin(net, "cpp"), *rows, choice), results(twin(net, "reference"), *rows, choice))


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the backend holds no state
@given(
    e=st.integers(1, 3),
    b=st.integers(0, 80),
    n=st.integers(1, 10),
    k=st.integers(1, 10),
    widths=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
    mode=st.sampled_from(["greedy", "sampled", "given"]),
    seed=st.integers(0, 2**20),
)
def test_matches_the_composed_network_at_any_shape(backend, e, b, n, k, widths, mode, seed):
    torch.manual_seed(seed)
    module, base, route = widths
    net = make_net(e, n_modules=n, top_k=min(k, n), module_width=module, base_width=base, route_widths=(route,))
    rows, choice = make_rows(b), make_choice(mode, e, b, net.cfg)
    assert_agree(results(twin(net, "cpp"), *rows, choice), results(twin(net, "reference"), *rows, choice))


def test_any_number_of_threads_gives_the_same_to_rounding_and_one_number_the_same_bits():
    net = twin(make_net(2, n_modules=16, module_width=64), "cpp")
    rows = make_rows(700)
    one = results(net, *rows, GREEDY)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        three, again = results(net, *rows, GREEDY), results(net, *rows, GREEDY)
    finally:
        torch.set_num_threads(before)
    assert_agree(three, one)
    assert all(torch.equal(value, again[name]) for name, value in three.items())


def test_constant_parameters_get_no_gradient_and_x_the_same():
    net = make_net(2)
    rows = make_rows(90)
    frozen, free = (results(twin(net, "cpp"), *rows, GREEDY, frozen=f) for f in (True, False))
    assert set(free) - set(frozen) == set(dict(net.named_parameters()))
    assert torch.equal(frozen["x"], free["x"])


def test_output_alone_and_gates_alone_carry_gradients():
    net = twin(make_net(2), "cpp")
    x, task = make_rows(50)
    reference = twin(net, "reference")
    assert_agree(*(results(n, x, task, GREEDY, through_gates=False) for n in (net, reference)))
    through_gates = []
    for n in (net, reference):
        _, routes = n(x, task)
        through_gates.append(torch.autograd.grad(routes.gate.square().sum(), [n.route[0].weight, n.base[0].weight]))
    for ours, expected in zip(*through_gates, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_a_task_outside_the_range_adds_nothing_to_the_bias():
    net = make_net(2)
    x, task = make_rows(30)
    task[::7], task[3::7] = -1, T + 5
    assert_agree(*(results(twin(net, b), x, task, GREEDY) for b in ("cpp", "reference")))


def test_without_gradients_the_result_is_the_same_and_nothing_is_kept():
    net = twin(make_net(2), "cpp")
    x, task = make_rows(130)
    with torch.no_grad():
        out, routes = net(x, task)
    kept, _ = net(x, task)
    assert torch.equal(out, kept.detach()) and not out.requires_grad and not routes.gate.requires_grad
    assert saved_shapes(x, net.in_order(), keep=False) == (0, (0,))


def test_float32_is_as_accurate_as_the_composed_network():
    net = make_net(2, n_modules=16, module_width=128, base_width=200).float()
    x, task = make_rows(300, torch.float32)
    choice = make_choice("given", 2, 300, net.cfg)
    truth = results(twin(net, "reference").double(), x.double(), task, choice)
    ours, theirs = (results(twin(net, b), x, task, choice) for b in ("cpp", "reference"))
    for name, exact in truth.items():
        if exact.is_floating_point():
            scale = exact.abs().max()
            error, reference_error = ((r[name].double() - exact).abs().max() / scale for r in (ours, theirs))
            assert error <= 2 * reference_error + 8 * torch.finfo(torch.float32).eps, name


@on_every_instruction_set
def test_bf16_products_round_as_the_reference_does(backend):
    """Both round the same operands, so that ReLUs open alike and what is left is the rounding of float32 sums. Where
    that moves an operand over the edge between two bf16 numbers, its row is off by a part of bf16's error: few rows
    are. Without rounding alike the gradient to x is off by 7% in the 2-norm, and by 1% in half of its rows."""
    net = make_net(2, n_modules=16, module_width=128, precision="bf16").float()
    x, task = make_rows(300, torch.float32)
    choice = make_choice("given", 2, 300, net.cfg)
    expected = results(twin(net, "reference"), x, task, choice, through_gates=False)
    ours = results(twin(net, "cpp"), x, task, choice, through_gates=False)
    for name, value in expected.items():
        if value.is_floating_point():
            error = ours[name] - value
            assert error.norm() <= 2e-3 * value.norm() and error.abs().max() <= 5e-3 * value.abs().max(), name
    row_error = (ours["x"] - expected["x"]).norm(dim=-1) / expected["x"].norm(dim=-1)
    assert (row_error < 1e-5).float().mean() > 0.7
    exact = results(twin(net, "cpp", precision="float32"), x, task, choice, through_gates=False)
    assert (exact["x"] - expected["x"]).norm() > 0.02 * expected["x"].norm()  # they really were bf16 products


def test_bf16_products_are_the_same_on_every_instruction_set():
    """A product of two bf16 numbers is exact in float32 and sums have one order, so nothing is left to differ but what
    surrounds the products, where a processor without fused multiply-add rounds once more."""
    net = twin(make_net(2, n_modules=16, module_width=128, precision="bf16").float(), "cpp")
    x, task = make_rows(300, torch.float32)
    outs = {}
    for name in instruction_sets():
        use_instruction_set(name)
        outs[name] = net(x, task, make_choice("greedy", 2, 300, net.cfg))[0].detach()
    use_instruction_set(instruction_sets()[0])
    fused = [out for name, out in outs.items() if name != "baseline"]
    assert all(torch.equal(out, fused[0]) for out in fused)
    assert (outs["baseline"] - fused[0]).norm() <= 2e-3 * fused[0].norm() if fused else True


@pytest.mark.parametrize("mode", ["greedy", "sampled", "given"])
def test_opcheck(mode):
    net = twin(make_net(2, top_k=6), "cpp")  # every module active: the rows of others are not written, and here NaN
    x, task = make_rows(20)
    _, temperature, noise, index = make_choice(mode, 2, 20, net.cfg)
    parameters = [p.detach().clone().requires_grad_() for p in net.in_order()]
    arguments = (x.requires_grad_(), task, temperature, noise, index, 6, True, True, "float32", 20, parameters)
    torch.library.opcheck(torch.ops.d2r_fast.routed_network.default, arguments)
    x, parameters = x.detach(), [p.detach() for p in parameters]
    out, *saved = torch.ops.d2r_fast.routed_network(x, task, temperature, noise, index, *arguments[5:-1], parameters)
    for d_parameters in ([torch.empty_like(p) for p in parameters], []):
        wanted = (20, 20, d_parameters) if d_parameters else (0, 0, d_parameters)
        arguments = (out, None, x, task, parameters, *saved, True, "float32", *wanted)
        torch.library.opcheck(torch.ops.d2r_fast.routed_network_backward.default, arguments)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("backend", cpp_backends(), indirect=True)
@pytest.mark.parametrize("mode", ["sampled", "given"])
@pytest.mark.parametrize("n_rows", [190, 90], ids=["some_greedy", "all_chosen"])
def test_two_kinds_of_rows_in_one_call(backend, mode, n_rows, threads):
    """The first 90 rows go the chosen routes and give the parameters their gradient; it passes the rest on to x."""
    net = twin(make_net(2), backend)
    x, task = make_rows(n_rows)
    _, *choice = make_choice(mode, 2, 90, net.cfg)
    parameters = [p.detach() for p in net.in_order()]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)

    def run(rows, choice, n_back):
        settings = (net.cfg.top_k, True, True, "float32", n_back, parameters)
        return forward(x[rows], task[rows], *choice, *settings)

    def back(d_out, rows, saved, n_learning, first_to_x, gradients):
        settings = (True, "float32", n_learning, first_to_x, gradients)
        return backward(d_out, None, x[rows], task[rows], parameters, *saved, *settings)

    nothing, every, first, rest = (None, None, None), slice(None), slice(90), slice(90, None)
    out, *saved = run(every, choice, n_rows)
    parts = [run(first, choice, 90), run(rest, nothing, n_rows - 90)]
    for ours, *theirs in zip([out, *saved[:4]], *parts, strict=False):
        assert torch.equal(ours, torch.cat(theirs, 1))
    d_out = torch.randn_like(out)
    ours, theirs = ([torch.full_like(p, torch.nan) for p in parameters] for _ in range(2))
    d_x = back(d_out, every, saved, 90, 90, ours)
    back(d_out[:, :90], first, parts[0][1:], 90, 90, theirs)
    expected = back(d_out[:, 90:], rest, parts[1][1:], 0, 0, [])
    only_first = [torch.full_like(p, torch.nan) for p in parameters]
    nowhere = back(d_out[:, :90], every, run(every, choice, 90)[1:], 90, 90, only_first)
    torch.set_num_threads(before)
    assert torch.equal(d_x, expected) and nowhere.shape == (0, x.shape[1])
    for gradients in (ours, only_first):
        for a, b in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_compiles_without_a_graph_break():
    net = twin(make_net(2), "cpp")
    x, task = make_rows(40)
    eager = results(net, x, task, GREEDY)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True)
    leaf = x.clone().requires_grad_()
    out, routes = compiled(leaf, task)
    torch.testing.assert_close(out, eager["out"], rtol=1e-12, atol=1e-13)
    assert torch.equal(routes.index, eager["index"])
    out.square().sum().backward()
    reference = twin(net, "reference")
    other = x.clone().requires_grad_()
    reference(other, task)[0].square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-12)
    for ours, expected in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad, rtol=1e-10, atol=1e-12)


def test_a_second_backward_gives_the_same():
    net = twin(make_net(1), "cpp")
    out, _ = net(*make_rows(30))
    first = torch.autograd.grad(out.sum(), list(net.parameters()), retain_graph=True)
    second = torch.autograd.grad(out.sum(), list(net.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_row_does_not_depend_on_the_others():
    net = twin(make_net(2), "cpp")
    x, task = make_rows(150)
    out, _ = net(x, task)
    poisoned = x.clone()
    poisoned[::2] = float("nan")
    again, _ = net(poisoned, task)
    assert torch.equal(again[:, 1::2], out[:, 1::2])
    assert again[:, ::2].isnan().all()


def test_hooks_see_every_layer():
    net = twin(make_net(2), "cpp")
    x, task = make_rows(300)
    plain, _ = net(x, task)
    seen = []
    hooks = [layer.register_forward_hook(lambda *_: seen.append(1)) for layer in (*net.base, *net.route, net.head)]
    hooked, _ = net(x, task)
    assert len(seen) == len(hooks)
    torch.testing.assert_close(hooked, plain, rtol=1e-12, atol=1e-13)


def test_few_rows_run_layer_by_layer_unless_the_backend_is_named(monkeypatch):
    ran = []

    def spy(*args, **kwargs):
        ran.append(len(args[0]))
        return routed_network(*args, **kwargs)

    monkeypatch.setattr("d2r_fast.nets.d2r.routed_network", spy)
    net = make_net(2)
    net(*make_rows(20))
    assert ran == []
    net(*make_rows(200))
    twin(net, "cpp")(*make_rows(20))
    assert ran == [200, 20]


def test_a_base_wider_than_triton_takes_is_no_matter_of_the_modules():
    if not availability()["triton"].startswith("ready"):
        pytest.skip(f"triton {availability()['triton']}")
    device = "cpu" if INTERPRETED else "cuda"
    net = make_net(1, n_modules=2, module_width=16, base_width=300, dtype=torch.float32).to(device)
    x, task = (v.to(device) for v in make_rows(4, torch.float32))
    out, _ = twin(net, "triton").to(device)(x, task)
    torch.testing.assert_close(out, twin(net, "reference").to(device)(x, task)[0], rtol=1e-4, atol=1e-4)


def test_errors_say_what_was_expected():
    net = twin(make_net(2), "cpp")
    x, task = make_rows(20)
    with pytest.raises(ValueError, match=r"x: expected torch.float64 like the parameters, got torch.float32"):
        net(x.float(), task)
    with pytest.raises(ValueError, match=r"noise: mode 'sampled' expects shape \[2, 20, 21\]"):
        net(x, task, RouteChoice.sampled(torch.ones(20), torch.zeros(1, 20, 21)))
    parameters = net.in_order()

    def with_parameter(at, value):
        return [*parameters[:at], value, *parameters[at + 1 :]]

    for message, wrong in (
        (r"x, task: expected \[B,n_in\] and \[B\], got \[20, 1, 7\] and \[20\]", (x[:, None], task, parameters)),
        (r"x, task: expected \[B,n_in\] and \[B\], got \[20, 7\] and \[20, 1\]", (x, task[:, None], parameters)),
        (r"task: expected an integer dtype, got torch.float64", (x, task.double(), parameters)),
        (r"task: expected an integer dtype, got torch.complex64", (x, task.to(torch.complex64), parameters)),
        (
            r"parameters\[2\], a weight: expected shape \[2, 33, 33\], got \[2, 33, 32\]",
            (x, task, with_parameter(2, parameters[2][:, :, 1:])),
        ),
        (
            r"parameters\[6\], a weight: expected shape \[2, 20, 33\], got \[2, 33, 20\]",
            (x, task, with_parameter(6, parameters[6].mT)),
        ),
        (
            r"parameters\[3\], a bias: expected shape \[2, 33\], got \[2, 33, 1\]",
            (x, task, with_parameter(3, parameters[3][..., None])),
        ),
        (
            r"parameters\[2\], a weight: expected a tensor of Double, got Float",
            (x, task, with_parameter(2, parameters[2].float())),
        ),
        (
            r"parameters\[4\]: expected a dense tensor on cpu, got torch.strided on meta",
            (x, task, with_parameter(4, parameters[4].to("meta"))),
        ),
        (r"parameters: expected weights .* 14 tensors or more", (x, task, parameters[:12])),
    ):
        with pytest.raises(ValueError, match=message):
            routed_network(*wrong, 2)
    with pytest.raises(TypeError, match=r"parameters\[1\]: expected a tensor, got NoneType"):
        routed_network(x, task, with_parameter(1, None), 2)
