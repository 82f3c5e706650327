"""Route selection under pytest-benchmark, each size beside the reference.

python -m pytest benches/test_select_routes.py --benchmark-group-by=param:size,param:mode,param:direction
"""

from functools import partial

import pytest
import torch
from routed_case import Sizes
from timing import synchronise

from d2r_fast import select_routes
from d2r_fast.ops.backends import availability
from d2r_fast.ops.gumbel import gumbel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PUBLISHED = Sizes()
SIZES = [
    PUBLISHED,
    PUBLISHED._replace(b=6400),
    PUBLISHED._replace(n=32),
    PUBLISHED._replace(k=4),
    PUBLISHED._replace(k=16),
]
BACKENDS = [name for name, state in availability().items() if state.startswith("ready")]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("mode", ["greedy", "sampled", "given"])
@pytest.mark.parametrize("size", SIZES, ids=[sizes.text for sizes in SIZES])
def test_select_routes(benchmark, size, mode, direction, backend):
    torch.manual_seed(0)
    logits = torch.randn(size.e, size.b, size.n * (size.n + 1) // 2, device=DEVICE)
    extra = {
        "greedy": {},
        "sampled": {"temperature": torch.ones(size.b, device=DEVICE), "noise": gumbel(tuple(logits.shape), logits)},
        "given": {"index": select_routes(logits, size.k).index},
    }[mode]
    choose = partial(select_routes, k=size.k, mode=mode, backend=backend, **extra)
    leaf, cotangent = logits.clone().requires_grad_(), torch.randn_like(choose(logits).gate)

    def run() -> None:
        if direction == "fwd":
            choose(logits)
        else:
            torch.autograd.grad(choose(leaf).gate, leaf, cotangent)
        synchronise(DEVICE)

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
