"""Modules for networks of one's own: what they compute, and that a mistake in a route is told as such."""

import copy

import pytest
import torch
from conftest import cpp_backends

from d2r_fast import make_routes, select_routes
from d2r_fast.nn import RoutedModules

E, B, N, K, D = 2, 7, 5, 3, 6


def any_graph(n_nets=E):
    """For every row a graph of its own: route i reads min(K, i) modules below it, in any order, with any weights."""
    index = torch.zeros(n_nets, B, N, K, dtype=torch.int64)
    for i in range(1, N + 1):
        kept = min(K, i)
        index[:, :, i - 1, :kept] = torch.rand(n_nets, B, i).argsort(-1)[..., :kept]
    return index, torch.randn(n_nets, B, N, K)


def plainly(modules, h0, index, gate):
    """One row of one network after the other."""
    out = []
    for e in range(len(h0)):
        for b in range(B):
            h = [h0[e, b]]
            for i in range(1, N + 1):
                x = sum(gate[e, b, i - 1, k] * h[int(index[e, b, i - 1, k])] for k in range(min(K, i)))
                if i < N:
                    layer = (modules.weight[e, i - 1] @ x + modules.bias[e, i - 1]).relu()
                    h.append(layer + x if modules.residual else layer)
            out.append(x)
    return torch.stack(out).view(h0.shape)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)
def test_any_graph_is_what_it_says(backend, residual):
    index, gate = any_graph()
    modules = RoutedModules(N, D, E, residual, backend).double()
    h0, gate = torch.randn(E, B, D).double().requires_grad_(), gate.double().requires_grad_()
    inputs = (h0, gate, modules.weight, modules.bias)
    ours, theirs = modules(h0, make_routes(index, gate)), plainly(modules, h0, index, gate)
    torch.testing.assert_close(ours, theirs)
    cotangent = torch.randn(E, B, D).double()
    got, expected = (torch.autograd.grad(y, inputs, cotangent) for y in (ours, theirs))
    used = torch.arange(K) < torch.arange(1, N + 1)[:, None]
    assert all(g.abs().max() > 0 for g in expected)
    torch.testing.assert_close(got, expected)
    assert not expected[1][:, :, ~used].any()


def test_one_network_needs_no_axis_for_itself():
    index, gate = any_graph(1)
    modules = RoutedModules(N, D)
    h0, routes = torch.randn(B, D), make_routes(index, gate)
    assert modules(h0, routes).shape == (B, D)
    assert torch.equal(modules(h0, routes), modules(h0[None], routes)[0])


def test_it_learns_with_a_learnt_choice_beside_plain_layers():
    def loss():
        y = modules(first(x).relu(), select_routes(choose(x)[None], k=2))
        return (y - target).square().mean()

    x = torch.randn(64, 4)
    target = x.abs().repeat(1, 2)[:, :D]
    first, choose, modules = torch.nn.Linear(4, D), torch.nn.Linear(4, N * (N + 1) // 2), RoutedModules(N, D)
    before = copy.deepcopy(modules.state_dict())
    parameters = [p for layer in (first, choose, modules) for p in layer.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=1e-2)
    begin = loss().item()
    for _ in range(100):
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()
    assert loss().item() < 0.3 * begin
    assert all(not torch.equal(value, before[name]) for name, value in modules.state_dict().items())


def wrong(place, value):
    index, _ = any_graph(1)
    index[(0, 3, *place)] = value
    return index


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (wrong((3, 1), N), r"index\[0,3,3,1\]: route 4 reads distinct modules of 0\.\.3, got 5"),
        (wrong((3, 1), -1), r"index\[0,3,3,1\]: route 4 reads distinct modules of 0\.\.3, got -1"),
        (wrong((3, 0), 4), r"index\[0,3,3,0\]: route 4 reads distinct modules of 0\.\.3, got 4"),  # not below its route
        (
            wrong((4,), torch.tensor([2, 1, 2])),
            r"index\[0,3,4,2\]: route 5 reads distinct modules of 0\.\.4, got 2 again",
        ),
    ],
    ids=["out of range", "negative", "not below its route", "twice"],
)
def test_a_graph_that_cannot_be_is_refused(index, message):
    with pytest.raises(ValueError, match=message):
        make_routes(index, torch.rand(index.shape))


def test_gates_that_do_not_fit_are_refused():
    index, gate = any_graph()
    with pytest.raises(ValueError, match=r"gate: expected shape \[2, 7, 5, 3\] like index, got \[2, 7, 5, 2\]"):
        make_routes(index, gate[..., :2])
    with pytest.raises(ValueError, match=r"routes.gate: expected torch.float32, got torch.float64"):
        RoutedModules(N, D, E)(torch.randn(E, B, D), make_routes(index, gate.double()))


def test_what_does_not_fit_the_modules_is_refused():
    index, gate = any_graph()
    routes, modules, h0 = make_routes(index, gate), RoutedModules(N, D, E), torch.randn(E, B, D)
    for shape in ((B, D), (1, B, D), (E, B, D + 1), (E, B, 1, D)):
        with pytest.raises(ValueError, match=r"h0: expected \[E=2,B,D=6\], got"):
            modules(torch.randn(shape), routes)
    with pytest.raises(ValueError, match=r"routes: expected routes of N=4 modules, got 5"):
        RoutedModules(N - 1, D, E)(h0, routes)
    with pytest.raises(ValueError, match=r"routes.index: expected \[E=2,B=6,N,K\]"):
        modules(h0[:, :6], routes)
    with pytest.raises(TypeError, match="routes: expected what select_routes or make_routes give, got tuple"):
        modules(h0, tuple(routes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_modules": 33}, r"n_modules: expected 1\.\.32, got 33"),
        ({"n_modules": 0}, "n_modules: expected"),
        ({"width": 0}, "width: expected at least 1, got 0"),
        ({"n_nets": 0}, "n_nets: expected at least 1, got 0"),
        ({"precision": "half"}, "precision: expected one of"),
    ],
)
def test_sizes_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        RoutedModules(**{"n_modules": N, "width": D, **arguments})
