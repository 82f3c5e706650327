"""What a call of an operation of the C++ library leaves behind: nothing."""

import ctypes
import gc

import pytest
import torch
from conftest import cpp_backends

from d2r_fast import NetConfig, RoutedNetwork
from d2r_fast.ops.ensemble_linear import ensemble_linear
from d2r_fast.ops.select_routes import select_routes

CALLS = 300
LIMIT = 16  # bytes a call, where glibc rounds the least that can be left to 32

LIBC = ctypes.CDLL(None)
pytestmark = [
    pytest.mark.skipif(not cpp_backends(), reason="needs the C++ library"),
    pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="needs the mallinfo2 of glibc 2.33"),
]


class MallocInfo(ctypes.Structure):
    """The struct of mallinfo2(3); `uordblks`: bytes in use."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def in_use() -> int:
    gc.collect()
    LIBC.mallinfo2.restype = MallocInfo
    return LIBC.mallinfo2().uordblks


def linear():
    layer = [torch.randn(2, 5, 4), torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, requires_grad=True)]
    return lambda: ensemble_linear(*layer, backend="cpp").sum().backward()


def network():
    cfg = NetConfig(n_modules=3, module_width=8, base_width=8, route_widths=(8,), backend="cpp")
    net, x, task = RoutedNetwork(5, 2, 3, 1, cfg), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    return lambda: net(x, task)[0].sum().backward()


def layer_by_layer():
    cfg = NetConfig(n_modules=3, module_width=8, base_width=8, route_widths=(8,), backend="cpp")
    net, x, task = RoutedNetwork(5, 2, 3, 1, cfg), torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    net.head.register_forward_hook(lambda *_: None)
    return lambda: net(x, task)[0].sum().backward()


def routes():
    logits = torch.randn(1, 4, 6)
    return lambda: select_routes(logits, 2, backend="cpp")


@pytest.mark.parametrize("make", [linear, network, layer_by_layer, routes])
def test_a_call_leaves_nothing_behind(make):
    call = make()
    for _ in range(CALLS // 10):
        call()
    before = in_use()
    for _ in range(CALLS):
        call()
    assert (in_use() - before) / CALLS < LIMIT
