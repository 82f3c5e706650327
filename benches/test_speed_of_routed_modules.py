"""The routed modules under pytest-benchmark, each size beside the reference, eager and compiled.

python -m pytest benches/test_routed_modules.py --benchmark-group-by=param:size,param:direction
"""

from functools import partial

import pytest
import torch
from routed_case import Case, Sizes, make_case, routes_with_active, sampled_routes
from routed_modules import calls
from timing import graphed, synchronise

from d2r_fast import routed_modules
from d2r_fast.ops.backends import availability

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PUBLISHED = Sizes()
SIZES = [
    PUBLISHED,
    PUBLISHED._replace(e=1),
    PUBLISHED._replace(b=256),
    PUBLISHED._replace(b=6400),
    PUBLISHED._replace(n=4),
    PUBLISHED._replace(n=32),
    PUBLISHED._replace(k=4),
    PUBLISHED._replace(n=8, k=8),
    PUBLISHED._replace(d=64),
    PUBLISHED._replace(d=256),
]
CASES = [(sizes, "sampled") for sizes in SIZES] + [(PUBLISHED, n) for n in (2, 4, 8, 12, 16)]
BACKENDS = [name for name, state in availability().items() if state.startswith("ready")]
VARIANTS = [*BACKENDS, "reference-compiled", *(["reference-graphed"] if DEVICE == "cuda" else [])]


def case_of(sizes: Sizes, active: str | int) -> Case:
    torch.manual_seed(0)
    routes = sampled_routes(sizes, DEVICE) if active == "sampled" else routes_with_active(sizes, active, DEVICE)
    return make_case(sizes, routes, DEVICE)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("size", CASES, ids=[f"{sizes.text}-active_{active}" for sizes, active in CASES])
def test_routed_modules(benchmark, size, direction, variant):
    if variant == "reference-compiled" and size != (PUBLISHED, "sampled"):
        pytest.skip("compiling takes minutes: at the published sizes only")
    op = partial(routed_modules, backend=variant.partition("-")[0])
    if variant == "reference-compiled":
        op = torch.compile(op, dynamic=False)
    run = calls(op, case_of(*size), direction == "fwd+bwd")
    if variant == "reference-graphed":
        run = graphed(run)
    run()

    def timed() -> None:
        run()
        synchronise(DEVICE)

    benchmark.pedantic(timed, rounds=10, warmup_rounds=2)
