"""Routes that come from outside are looked at where they enter: an illegal one is refused on every backend."""

import pytest
import torch
from conftest import cpp_backends

from d2r_fast import NetConfig, RouteChoice, RoutedNetwork, Routes, make_routes, routed_modules, select_routes
from d2r_fast.ops import count_active, ensemble_linear, unpack_active
from d2r_fast.ops.backends import INTERPRETED, availability

pytestmark = pytest.mark.usefixtures("poisoned_memory")

E, B, N, K, D = 2, 5, 4, 2, 8
HAS_TRITON = availability()["triton"].startswith("ready") and INTERPRETED
on_every_backend = pytest.mark.parametrize(
    "backend",
    [
        "reference",
        *cpp_backends(),
        pytest.param("triton", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton's interpreter")),
    ],
    indirect=True,
)


def legal_index(dtype=torch.int64):
    """Route i reads modules i-1 and i-2; the slot that route 1 does not use holds nonsense, which is ignored."""
    index = torch.tensor([[0, 99], [1, 0], [2, 1], [3, 2]], dtype=dtype)
    return index.expand(E, B, N, K).clone()


def changed(value, route=2, slot=1, dtype=torch.int64):
    """`value` in one slot of route `route` of row 3 of network 1."""
    index = legal_index(dtype)
    index[1, 3, route - 1, slot] = value
    return index


ILLEGAL = [
    (changed(2), r"index\[1,3,1,1\]: route 2 reads distinct modules of 0\.\.1, got 2$"),
    (changed(3, route=3, slot=0), r"index\[1,3,2,0\]: route 3 reads distinct modules of 0\.\.2, got 3$"),
    (changed(-1), r"index\[1,3,1,1\]: .* got -1$"),
    (changed(N, route=4), r"index\[1,3,3,1\]: route 4 .* of 0\.\.3, got 4$"),
    (changed(2**31 - 1, dtype=torch.int32), r"index\[1,3,1,1\]: .* got 2147483647$"),
    (changed(2**32), r"index\[1,3,1,1\]: .* got 4294967296$"),
    (changed(2**32 + 1), r"index\[1,3,1,1\]: .* got 4294967297$"),
    (changed(1), r"index\[1,3,1,1\]: .* got 1 again$"),
    (changed(2, route=3), r"index\[1,3,2,1\]: route 3 .* got 2 again$"),
    (changed(7, dtype=torch.uint8), r"index\[1,3,1,1\]: .* got 7$"),
    (changed(-5, dtype=torch.int8), r"index\[1,3,1,1\]: .* got -5$"),
    (legal_index().bool(), "index: expected an integer dtype, got torch.bool"),
    (legal_index().to(torch.complex64), "index: expected an integer dtype, got torch.complex64"),
]
every_illegal_index = pytest.mark.parametrize(("index", "message"), ILLEGAL, ids=lambda v: str(v)[-24:])


@every_illegal_index
def test_make_routes_refuses_it(index, message):
    with pytest.raises(ValueError, match=message):
        make_routes(index, torch.rand(E, B, N, K))


@on_every_backend
@every_illegal_index
def test_given_routes_are_refused(backend, index, message):
    logits = torch.randn(E, B, N * (N + 1) // 2)
    with pytest.raises(ValueError, match=message):
        select_routes(logits, K, "given", index=index, backend=backend)


@pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)
@every_illegal_index
def test_a_network_refuses_to_replay_it(backend, index, message):
    cfg = NetConfig(n_modules=N, top_k=K, module_width=D, base_width=6, route_widths=(5,), backend=backend)
    net = RoutedNetwork(3, 2, 2, E, cfg)
    with pytest.raises(ValueError, match=message):
        net(torch.randn(B, 3), torch.zeros(B, dtype=torch.int64), RouteChoice.given(index))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
@on_every_backend
def test_a_legal_index_of_any_dtype_is_taken_and_unused_slots_are_ignored(backend, dtype):
    logits = torch.randn(E, B, N * (N + 1) // 2)
    routes = select_routes(logits, K, "given", index=legal_index(dtype), backend=backend)
    expected = legal_index(torch.int32)
    expected[:, :, 0, 1] = 0
    assert torch.equal(routes.index, expected)
    assert torch.equal(make_routes(legal_index(dtype), routes.gate).index, expected)
    assert unpack_active(routes.active, N).all()


def test_an_illegal_route_is_found_among_many_rows_with_many_threads():
    index = torch.zeros(2, 700, N, K, dtype=torch.uint8)
    index[:, :, 1:, 1] = 1
    logits = torch.randn(2, 700, N * (N + 1) // 2)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        select_routes(logits, K, "given", index=index, backend="cpp")
        index[1, 699, 3, 0] = 1
        index[1, 500, 2, 0] = 9
        with pytest.raises(ValueError, match=r"index\[1,500,2,0\]: route 3 reads distinct modules of 0\.\.2, got 9$"):
            select_routes(logits, K, "given", index=index, backend="cpp")
    finally:
        torch.set_num_threads(before)


def inputs(dtype=torch.float32):
    shapes = (E, B, D), (E, N - 1, D, D), (E, N - 1, D)
    return tuple(torch.randn(shape, dtype=dtype) for shape in shapes)


@on_every_backend
def test_routes_made_by_hand_with_a_needed_module_left_out_are_refused(backend):
    routes = make_routes(legal_index(), torch.rand(E, B, N, K))
    for bit in range(N):  # all modules are read here
        active = routes.active.clone()
        active[1, 2] ^= 1 << bit
        with pytest.raises(ValueError, match=r"active\[1,2\]: expected the bits of all modules that the head reaches"):
            routed_modules(*inputs(), routes._replace(active=active), backend=backend)


@on_every_backend
@pytest.mark.parametrize(
    ("index", "message"),
    [(i.to(torch.int32), m) for i, m in ILLEGAL if i.dtype == torch.int64 and i.max() < 2**31],
    ids=lambda v: str(v)[-24:],
)
def test_routes_made_by_hand_that_read_what_they_may_not_are_refused(backend, index, message):
    good = make_routes(legal_index(), torch.rand(E, B, N, K))
    routes = Routes(torch.where(good.index == index, good.index, index), *good[1:])
    with pytest.raises(ValueError, match=message):
        routed_modules(*inputs(), routes, backend=backend)


@on_every_backend
def test_more_active_modules_than_are_read_do_no_harm(backend):
    index = legal_index()
    index[..., 2:, :] = torch.tensor([1, 0])  # the head reads 1 and 0: 2 and 3 are idle
    routes = make_routes(index, torch.rand(E, B, N, K))
    assert count_active(routes.active, N).max() == 2
    every = routes._replace(active=torch.full_like(routes.active, -1))
    tensors = inputs()
    assert torch.equal(
        routed_modules(*tensors, routes, backend=backend), routed_modules(*tensors, every, backend=backend)
    )


@on_every_backend
def test_no_networks_and_no_rows_are_nothing_to_do(backend):
    for e, b in ((0, 3), (2, 0), (0, 0)):
        tensors = [
            t.requires_grad_() for t in (torch.ones(e, b, D), torch.ones(e, N - 1, D, D), torch.ones(e, N - 1, D))
        ]
        gate = torch.ones(e, b, N, K, requires_grad=True)
        index = legal_index()[:1, :1].expand(e, b, N, K)
        out = routed_modules(*tensors, make_routes(index, gate), backend=backend)
        assert out.shape == (e, b, D)
        for leaf, grad in zip((*tensors, gate), torch.autograd.grad(out.sum(), (*tensors, gate)), strict=True):
            assert grad.shape == leaf.shape and not grad.any()


@pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)
@pytest.mark.parametrize(("n_in", "n_out"), [(0, 3), (3, 0), (0, 0)])
def test_a_layer_without_inputs_is_its_bias(backend, n_in, n_out):
    x, weight, bias = (torch.randn(s, requires_grad=True) for s in ((2, 300, n_in), (2, n_out, n_in), (2, n_out)))
    y = ensemble_linear(x, weight, bias, relu=True, backend=backend)
    expected = torch.baddbmm(bias[:, None], x, weight.mT).relu()
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(
        *(torch.autograd.grad(v.sum(), (x, weight, bias)) for v in (y, expected)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["auto", "reference", "cpp"])
def test_autocast_works_with_every_backend(backend):
    cfg = NetConfig(n_modules=N, top_k=K, module_width=D, base_width=16, route_widths=(16,), backend=backend)
    net = RoutedNetwork(3, 2, 2, E, cfg)
    x, task = torch.randn(300, 3), torch.zeros(300, dtype=torch.int64)
    exact, _ = net(x, task)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = net(x, task)
        out.square().sum().backward()
    assert (out - exact).abs().max() <= 0.1 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in net.parameters())


def test_under_autocast_too_shapes_are_looked_at_before_anything_is_cast():
    with torch.autocast("cpu", torch.bfloat16):
        vast = torch.zeros(1, dtype=torch.float64)  # in float32, 2^42 bytes
        with pytest.raises(ValueError, match=r"logits: expected \[E,B,R\]"):
            select_routes(vast.expand(1 << 40, 1, 1, 1), 1)
        weight, bias = torch.zeros(E, N - 1, D, D), torch.zeros(E, N - 1, D)
        routes = make_routes(legal_index(), torch.rand(E, B, N, K))
        with pytest.raises(ValueError, match=r"routes.index: expected \[E="):
            routed_modules(vast.expand(1 << 30, 1 << 10, D), weight, bias, routes)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_routes([[1.0]], 1), "logits: expected a tensor, got list"),
        (lambda: select_routes(torch.zeros(1, 1, 1), 1.5), "k: expected an int, got 1.5"),
        (lambda: select_routes(torch.zeros(1, 1, 1), True), "k: expected an int, got True"),
        (lambda: make_routes(None, torch.zeros(1)), "index: expected a tensor, got NoneType"),
        (lambda: make_routes(legal_index(), torch.rand(E, B, N, K), legal_index()), "flow: expected a bool tensor"),
        (lambda: ensemble_linear(None, torch.zeros(1, 1, 1), torch.zeros(1, 1)), "x: expected a tensor, got NoneType"),
        (
            lambda: ensemble_linear(*(torch.zeros(1, 1, 1),) * 2, torch.zeros(1, 1), "no"),
            "relu: expected True or False",
        ),
        (lambda: routed_modules(*inputs(), None), "routes: expected Routes, got NoneType"),
    ],
)
def test_arguments_of_another_kind_are_named(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("bad", [0, 33, 2**31, 1.5])
def test_more_modules_than_bits_are_refused(bad):
    with pytest.raises(ValueError, match=r"n_modules: expected 1\.\.32, got"):
        unpack_active(torch.zeros(3, dtype=torch.int32), bad)
    with pytest.raises(ValueError, match=r"active: expected an int32 tensor, got torch.float32"):
        count_active(torch.zeros(3), 4)
