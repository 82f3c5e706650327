"""`routed_modules` with weights: modules that any routes connect."""

import torch
from torch import Tensor, nn

from d2r_fast.ops import Routes, routed_modules
from d2r_fast.ops.backends import Backend, Precision, check_precision
from d2r_fast.ops.select_routes import MAX_MODULES


class RoutedModules(nn.Module):
    """N modules of width D, wired anew for every row, in a network of your own:

        modules = RoutedModules(n_modules=16, width=128)
        h0 = first(x).relu()                      # [B,128]: module 0 is whatever gives this
        routes = select_routes(logits[None], k=2)  # a learnt choice; or make_routes(index, gate): a graph of yours
        y = modules(h0, routes)                   # [B,128]

    Modules 1..N-1 compute h_i = ReLU(W_i x_i + b_i) + x_i, where x_i is what route i mixes of the modules below i; y is
    what route N mixes. A module runs for the rows that reach it from y, forward and backward.

    n_modules  N, module 0 among them; at most 32
    width      D
    n_nets     E, such networks side by side, with weights of their own
    residual   False: h_i = ReLU(W_i x_i + b_i)
    backend, precision  as in `d2r_fast.ops.routed_modules`

    Parameters: weight [E,N-1,D,D] and bias [E,N-1,D], of modules 1..N-1. They start as D2R's: uniform in +-1/sqrt(D),
    and 0.1. ValueError: a size out of range.
    """

    def __init__(
        self,
        n_modules: int,
        width: int,
        n_nets: int = 1,
        residual: bool = True,
        backend: Backend = "auto",
        precision: Precision = "float32",
    ):
        super().__init__()
        if not 1 <= n_modules <= MAX_MODULES:
            raise ValueError(f"n_modules: expected 1..{MAX_MODULES}, got {n_modules}")
        for name, size in (("width", width), ("n_nets", n_nets)):
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        check_precision(precision)
        self.n_modules, self.width, self.n_nets = n_modules, width, n_nets
        self.residual, self.backend, self.precision = residual, backend, precision
        self.weight = nn.Parameter(torch.empty(n_nets, n_modules - 1, width, width))
        self.bias = nn.Parameter(torch.empty(n_nets, n_modules - 1, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.width**-0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.constant_(self.bias, 0.1)

    def forward(self, h0: Tensor, routes: Routes) -> Tensor:
        """h0 [E,B,D], routes for its rows, from `select_routes` or `make_routes` -> [E,B,D]. E = 1 may be left out of
        h0, and is then of what is returned.

        ValueError: h0 or the routes are of another size than the modules, or as in `d2r_fast.ops.routed_modules`.
        """
        if not isinstance(routes, Routes):
            raise TypeError(f"routes: expected what select_routes or make_routes give, got {type(routes).__name__}")
        one = h0.dim() == 2 and self.n_nets == 1
        h0 = h0[None] if one else h0
        if h0.dim() != 3 or h0.shape[0] != self.n_nets or h0.shape[2] != self.width:
            raise ValueError(f"h0: expected [E={self.n_nets},B,D={self.width}], got {list(h0.shape)}")
        if routes.index.shape[2] != self.n_modules:
            raise ValueError(f"routes: expected routes of N={self.n_modules} modules, got {routes.index.shape[2]}")
        y = routed_modules(h0, self.weight, self.bias, routes, self.residual, self.backend, self.precision)
        return y[0] if one else y

    def extra_repr(self) -> str:
        return f"n_modules={self.n_modules}, width={self.width}, n_nets={self.n_nets}, residual={self.residual}"
