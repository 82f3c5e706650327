"""Choosing routes against a slow oracle: one row, one route, one source at a time, in Python numbers."""

import math
from functools import partial

import pytest
import torch
from conftest import cpp_backends
from route_cases import n_logits, random_index, random_logits

import d2r_fast
from d2r_fast import count_active, unpack_active
from d2r_fast.ops.gumbel import gumbel
from d2r_fast.ops.select_routes import MAX_MODULES, modules_for

pytestmark = pytest.mark.usefixtures("poisoned_memory")

SHAPES = [
    (1, 1, 1, 1),
    (2, 63, 2, 1),
    (2, 7, 5, 2),
    (1, 63, 5, 5),
    (2, 63, 16, 2),
    (3, 5, 16, 3),
    (1, 9, 32, 2),
    (1, 4, 32, 32),
]
shapes = pytest.mark.parametrize(("e", "b", "n", "k"), SHAPES, ids=["E{}-B{}-N{}-K{}".format(*s) for s in SHAPES])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


on_every_backend = pytest.mark.parametrize("backend", ["reference", "cpp"], indirect=True)
on_every_instruction_set = pytest.mark.parametrize("backend", ["reference", *cpp_backends()], indirect=True)


@pytest.fixture
def select_routes(backend):
    """The operation on the backend of the test's parameter."""
    return partial(d2r_fast.select_routes, backend=backend)


def slow_routes(logits, k, choose):
    """One row's packed logits (a list) -> for every route {source: (gate, flow)}; `choose(i, group)` picks k of i."""
    routes, start, i = [], 0, 1
    while start < len(logits):
        group = logits[start : start + i]
        chosen = choose(i, group)
        assert len(set(chosen)) == min(k, i)
        share = [math.exp(v - max(group)) for v in group]
        share = [v / sum(share) for v in share]
        total = sum(share[s] for s in chosen)
        routes.append({s: (share[s] / total, share[s] > 1 / (i + 1)) for s in chosen})
        start, i = start + i, i + 1
    return routes


def slow_active(picked):
    """Modules reachable from the head, a set: `picked[i-1]` holds the sources of route i."""
    reached, open_routes = set(), [len(picked)]
    while open_routes:
        for source in picked[open_routes.pop() - 1]:
            if source not in reached:
                reached.add(source)
                open_routes += [source] if source > 0 else []
    return reached


def bits(value):
    return {j for j in range(32) if value & 0xFFFFFFFF & (1 << j)}


def largest(k):
    return lambda i, group: sorted(range(i), key=lambda s: -group[s])[:k]


def assert_routes(routes, logits, k, chooser):
    """`chooser(e, b)` is the oracle's `choose` for a row."""
    e_nets, rows, n, _ = routes.index.shape
    tolerance = 1e-12 if logits.dtype == torch.float64 else 2e-6
    assert [v.dtype for v in routes] == [torch.int32, logits.dtype, torch.bool, torch.int32]
    index, gate, flow, active = (v.tolist() for v in routes)
    for e in range(e_nets):
        for b in range(rows):
            expected = slow_routes(logits[e, b].tolist(), k, chooser(e, b))
            for i in range(1, n + 1):
                kept = min(k, i)
                slots = list(zip(index[e][b][i - 1], gate[e][b][i - 1], flow[e][b][i - 1], strict=True))
                assert slots[kept:] == [(0, 0.0, False)] * (k - kept)
                assert len({s for s, _, _ in slots[:kept]}) == kept
                assert {s: f for s, _, f in slots[:kept]} == {s: f for s, (_, f) in expected[i - 1].items()}
                assert max(abs(g - expected[i - 1][s][0]) for s, g, _ in slots[:kept]) <= tolerance
                assert abs(sum(g for _, g, _ in slots) - 1) <= tolerance
            assert bits(active[e][b]) == slow_active([set(route) for route in expected])


@on_every_instruction_set
@shapes
@dtypes
def test_greedy_matches_the_oracle(select_routes, e, b, n, k, dtype):
    logits = random_logits(e, b, n, dtype)
    assert_routes(select_routes(logits, k), logits, k, lambda *row: largest(k))


@on_every_instruction_set
@shapes
@dtypes
def test_sampled_matches_the_oracle(select_routes, e, b, n, k, dtype):
    logits, temperature = random_logits(e, b, n, dtype), torch.rand(b, dtype=dtype) * 3 + 0.1
    noise = gumbel(tuple(logits.shape), logits)

    def chooser(net, row):
        tau, drawn = temperature[row].item(), noise[net, row].tolist()

        def choose(i, group):
            start = i * (i - 1) // 2
            return largest(k)(i, [v / tau + drawn[start + s] for s, v in enumerate(group)])

        return choose

    assert_routes(select_routes(logits, k, "sampled", temperature, noise), logits, k, chooser)


@on_every_backend
@shapes
@pytest.mark.parametrize("index_dtype", [torch.uint8, torch.int32, torch.int64], ids=["u8", "i32", "i64"])
def test_given_matches_the_oracle_and_keeps_the_order(select_routes, e, b, n, k, index_dtype):
    logits, index = random_logits(e, b, n), random_index(e, b, n, k).to(index_dtype)
    routes = select_routes(logits, k, "given", index=index)
    assert_routes(routes, logits, k, lambda net, row: lambda i, group: index[net, row, i - 1, : min(k, i)].tolist())
    used = index != 99
    assert torch.equal(routes.index, torch.where(used, index, 0).int())


@on_every_backend
def test_all_sources_is_a_dense_softmax(select_routes):
    n = 5
    logits = random_logits(2, 7, n)
    routes = select_routes(logits, n)
    dense = torch.zeros(2, 7, n, n, dtype=logits.dtype).scatter_add_(3, routes.index.long(), routes.gate)
    for i, group in enumerate(logits.split(list(range(1, n + 1)), -1), start=1):
        torch.testing.assert_close(dense[:, :, i - 1, :i], group.softmax(-1), rtol=1e-12, atol=1e-12)
        assert (dense[:, :, i - 1, i:] == 0).all()
    assert (unpack_active(routes.active, n)).all()


def route_of(*shares):
    """Logits of one row, N = len(shares), whose last route has these softmax shares; the others are level."""
    n = len(shares)
    level = torch.zeros(n_logits(n) - n, dtype=torch.float64)
    return torch.cat([level, torch.tensor(shares, dtype=torch.float64).log()])[None, None]


@on_every_backend
@pytest.mark.parametrize("shift", [-30.0, 0.0, 30.0])
@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_dev3_flow_threshold_is_one_over_i_plus_1_without_the_temperature(select_routes, temperature, shift):
    # i = 4: the threshold is 0.2, not 0.25; 0.22 passes and 0.19 does not.
    logits = route_of(0.4, 0.22, 0.19, 0.19) + shift
    index = random_index(1, 1, 4, 2)
    index[0, 0, 3] = torch.tensor([1, 2])
    assert select_routes(logits, 2, "given", index=index).flow[0, 0, 3].tolist() == [True, False]

    tau, noise = torch.full((1,), temperature, dtype=torch.float64), torch.zeros_like(logits)
    noise[0, 0, -4:] = torch.tensor([0.0, 0.0, 1e4, 1e6])  # forces sources 3 and 2, whatever the temperature
    routes = select_routes(logits, 2, "sampled", tau, noise)
    assert set(routes.index[0, 0, 3].tolist()) == {2, 3}
    assert not routes.flow[0, 0, 3].any()


@on_every_backend
def test_dev3_level_routes_let_every_gradient_flow(select_routes):
    logits = torch.zeros(1, 1, n_logits(16))
    routes = select_routes(logits, 2)
    used = torch.arange(2) < torch.arange(1, 17)[:, None]
    assert torch.equal(routes.flow[0, 0], used)  # a share of 1/i is more than 1/(i+1)


@on_every_backend
def test_without_resrouting_flow_is_true_in_every_used_slot(select_routes):
    logits = random_logits(2, 63, 16)
    masked, free = select_routes(logits, 2), select_routes(logits, 2, resrouting=False)
    used = torch.arange(2) < torch.arange(1, 17)[:, None]
    assert torch.equal(free.flow, used.expand_as(free.flow))
    assert not torch.equal(masked.flow, free.flow)
    assert all(torch.equal(a, b) for a, b in zip(masked._replace(flow=free.flow), free, strict=True))


def pair_counts(index, n):
    """How often route N kept each unordered pair of sources: index [1,B,N,2] -> [N,N], upper triangle."""
    pair = index[0, :, n - 1].long().sort(-1).values
    return torch.zeros(n * n).index_add_(0, pair[:, 0] * n + pair[:, 1], torch.ones(len(pair))).view(n, n)


def pair_shares(p):
    """The same without replacement from probabilities p: either of the two may come first."""
    n = len(p)
    shares = torch.zeros(n, n)
    for a in range(n):
        for b in range(a + 1, n):
            shares[a, b] = p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])
    return shares


def chi_square(counts, shares):
    expected = shares * counts.sum()
    cells = shares > 0
    assert (counts[~cells] == 0).all()
    return ((counts - expected).square() / expected)[cells].sum().item()


@on_every_backend
@dtypes
@pytest.mark.parametrize("temperature", [0.4, 1.0, 5.0])
def test_dev4_sampled_routes_are_softmax_draws_without_replacement(select_routes, temperature, dtype):
    n, rows = 4, 40_000
    logits = torch.tensor([0.0, 0.3, -0.5, 0.2, 0.0, 1.0, 0.8, -0.4, 0.0, 0.5], dtype=dtype).expand(1, rows, -1)
    generator = torch.Generator().manual_seed(5)
    noise = gumbel(tuple(logits.shape), logits, generator)
    index = select_routes(logits, 2, "sampled", torch.full((rows,), temperature, dtype=dtype), noise).index
    counts, last = pair_counts(index, n), logits[0, 0, -n:].double()
    # 5 degrees of freedom: chance exceeds 25 in 1 of 7,000 seeds, and this seed is fixed.
    assert chi_square(counts, pair_shares((last / temperature).softmax(0))) < 25
    # The test has the power to tell: twice the temperature, or draws that ignore the logits, are far off.
    assert chi_square(counts, pair_shares((last / temperature / 2).softmax(0))) > 50
    assert chi_square(counts, pair_shares(torch.full((n,), 0.25))) > 50


@on_every_backend
@dtypes
def test_dev4_extreme_temperatures(select_routes, dtype):
    n, rows = 4, 20_000
    logits = 3 * torch.randn(1, 1, n_logits(n), dtype=dtype).expand(1, rows, -1)
    generator = torch.Generator().manual_seed(6)
    noise = gumbel(tuple(logits.shape), logits, generator)
    greedy = select_routes(logits, 2)
    cold = select_routes(logits, 2, "sampled", torch.full((rows,), 1e-30, dtype=dtype), noise)
    assert torch.equal(cold.index, greedy.index)
    hot = select_routes(logits, 2, "sampled", torch.full((rows,), 1e30, dtype=dtype), noise)
    assert chi_square(pair_counts(hot.index, n), pair_shares(torch.full((n,), 0.25))) < 25
    for routes in (cold, hot):
        assert routes.gate.isfinite().all()
        torch.testing.assert_close(routes.gate.sum(-1), torch.ones(1, rows, n, dtype=dtype), rtol=1e-6, atol=0)


@on_every_backend
def test_each_row_has_its_own_temperature(select_routes):
    logits, noise = random_logits(2, 40, 5), gumbel((2, 40, 15), torch.zeros((), dtype=torch.float64))
    temperature = torch.where(torch.arange(40) % 2 == 0, 1e-30, 1e30).double()
    index = select_routes(logits, 2, "sampled", temperature, noise).index
    cold, hot = select_routes(logits, 2).index, select_routes(noise, 2).index
    assert torch.equal(index[:, ::2], cold[:, ::2])
    assert torch.equal(index[:, 1::2], hot[:, 1::2])
    assert not torch.equal(cold, hot)


@on_every_backend
@pytest.mark.parametrize(("n", "k"), [(1, 1), (2, 1), (5, 1), (5, 3), (16, 2), (31, 2), (32, 1), (32, 2), (32, 5)])
def test_active_bits_match_a_walk_from_the_head(select_routes, n, k):
    index = random_index(2, 40, n, k)
    routes = select_routes(random_logits(2, 40, n), k, "given", index=index)
    mask, count = unpack_active(routes.active, n), count_active(routes.active, n)
    assert mask.shape == (2, 40, n) and mask.dtype == torch.bool and count.shape == (2, 40)
    for e in range(2):
        for b in range(40):
            reached = slow_active([set(index[e, b, i - 1, : min(k, i)].tolist()) for i in range(1, n + 1)])
            assert bits(routes.active[e, b].item()) == reached
            assert mask[e, b].nonzero().flatten().tolist() == sorted(reached)
            assert count[e, b] == len(reached)


@on_every_backend
def test_random_routes_reach_7_37_of_16_modules(select_routes):
    routes = select_routes(random_logits(1, 20_000, 16, torch.float32), 2)
    mask = unpack_active(routes.active, 16)[0].double().mean(0)
    assert mask[0] == mask[1] == 1
    assert abs(mask[15].item() - 0.125) < 0.01
    assert abs(count_active(routes.active, 16).double().mean().item() - 7.37) < 0.1


@on_every_backend
@pytest.mark.parametrize("mode", ["greedy", "sampled", "given"])
def test_gradient_reaches_the_chosen_logits_only(select_routes, mode):
    e, b, n, k = 2, 7, 5, 2
    logits = random_logits(e, b, n).requires_grad_()
    extra = {
        "greedy": {},
        "sampled": {
            "temperature": torch.full((b,), 2.0, dtype=torch.float64),
            "noise": gumbel((e, b, 15), logits.detach()),
        },
        "given": {"index": random_index(e, b, n, k)},
    }[mode]
    routes = select_routes(logits, k, mode, **extra)
    cotangent = torch.randn(e, b, n, k, dtype=torch.float64)
    (grad,) = torch.autograd.grad((routes.gate * cotangent).sum(), logits)

    chosen = torch.zeros(e, b, n_logits(n), dtype=torch.bool)
    expected = torch.zeros_like(grad)
    for i in range(1, n + 1):
        at = i * (i - 1) // 2 + routes.index[:, :, i - 1, : min(k, i)].long()  # [E,B,<=K]
        chosen.scatter_(2, at, True)
        gate, c = routes.gate[:, :, i - 1, : min(k, i)].detach(), cotangent[:, :, i - 1, : min(k, i)]
        expected.scatter_(2, at, gate * (c - (gate * c).sum(-1, keepdim=True)))  # d softmax
    assert (grad[~chosen] == 0).all()
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)
    assert (grad[chosen] != 0).any()
    assert [v.requires_grad for v in routes] == [False, True, False, False]


@on_every_backend
@pytest.mark.parametrize("mode", ["greedy", "sampled", "given"])
def test_inputs_stay_as_they_are_and_a_second_call_is_identical(select_routes, mode):
    logits, temperature = random_logits(2, 7, 5), torch.rand(7, dtype=torch.float64) + 0.5
    extra = {
        "greedy": {},
        "sampled": {"temperature": temperature, "noise": gumbel((2, 7, 15), logits)},
        "given": {"index": random_index(2, 7, 5, 2)},
    }[mode]
    inputs = [logits, *extra.values()]
    before = [v.clone() for v in inputs]
    first = select_routes(logits, 2, mode, **extra)
    second = select_routes(logits, 2, mode, **extra)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    storages = {v.untyped_storage().data_ptr() for v in inputs}
    assert not storages & {v.untyped_storage().data_ptr() for v in first}


@on_every_backend
def test_noncontiguous_logits(select_routes):
    wide = random_logits(2, 7, 6)
    logits = wide[:, ::2, :15]
    assert not logits.is_contiguous()
    for strided, packed in zip(select_routes(logits, 2), select_routes(logits.contiguous(), 2), strict=True):
        assert torch.equal(strided, packed)


def test_modules_for_inverts_the_number_of_logits():
    assert [modules_for(n_logits(n)) for n in range(1, MAX_MODULES + 1)] == list(range(1, MAX_MODULES + 1))


E, B, N, K, R = 2, 4, 5, 2, 15
LOGITS, TEMPERATURE, NOISE = torch.zeros(E, B, R), torch.ones(B), torch.zeros(E, B, R)
INDEX = torch.zeros(E, B, N, K, dtype=torch.int32)


@on_every_backend
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(B, R)}, r"logits: expected \[E,B,R\], got \[4, 15\]"),
        ({"logits": torch.zeros(E, B, R, dtype=torch.int64)}, "logits: expected a float dtype, got torch.int64"),
        ({"logits": torch.zeros(E, B, 14)}, r"logits: expected a last axis of N\(N\+1\)/2 .* got 14"),
        ({"logits": torch.zeros(E, B, 0)}, r"logits: expected a last axis of N\(N\+1\)/2 .* got 0"),
        ({"logits": torch.zeros(E, B, 561)}, r"logits: expected at most 32 modules, got N=33"),
        ({"k": 0}, r"k: expected 1\.\.N=5 sources a route, got 0"),
        ({"k": 6}, r"k: expected 1\.\.N=5 sources a route, got 6"),
        ({"mode": "random"}, r"mode: expected one of greedy, sampled, given, got 'random'"),
        ({"temperature": TEMPERATURE}, r"temperature: not used by mode 'greedy'"),
        ({"noise": NOISE}, r"noise: not used by mode 'greedy'"),
        ({"index": INDEX}, r"index: not used by mode 'greedy'"),
        ({"mode": "sampled", "temperature": TEMPERATURE, "noise": NOISE, "index": INDEX}, r"index: not used by mode"),
        ({"mode": "sampled", "noise": NOISE}, r"temperature: mode 'sampled' expects shape \[4\], got None"),
        (
            {"mode": "sampled", "temperature": TEMPERATURE},
            r"noise: mode 'sampled' expects shape \[2, 4, 15\], got None",
        ),
        ({"mode": "sampled", "temperature": torch.ones(3), "noise": NOISE}, r"temperature: .* \[4\], got \[3\]"),
        ({"mode": "sampled", "temperature": torch.ones(()), "noise": NOISE}, r"temperature: .* \[4\], got \[\]"),
        ({"mode": "sampled", "temperature": TEMPERATURE.long(), "noise": NOISE}, r"temperature: .* float dtype, got"),
        ({"mode": "sampled", "temperature": TEMPERATURE, "noise": NOISE[:1]}, r"noise: .* got \[1, 4, 15\]"),
        ({"mode": "sampled", "temperature": TEMPERATURE, "noise": NOISE.int()}, r"noise: expected a float dtype"),
        (
            {"mode": "sampled", "temperature": TEMPERATURE.to("meta"), "noise": NOISE},
            r"temperature: .* cpu .* got meta",
        ),
        ({"mode": "sampled", "temperature": TEMPERATURE, "noise": NOISE.to("meta")}, r"noise: .* cpu .* got meta"),
        ({"mode": "given"}, r"index: mode 'given' expects shape \[2, 4, 5, 2\], got None"),
        ({"mode": "given", "index": INDEX[..., :1]}, r"index: .* \[2, 4, 5, 2\], got \[2, 4, 5, 1\]"),
        ({"mode": "given", "index": INDEX.float()}, r"index: expected an integer dtype, got torch.float32"),
        ({"mode": "given", "index": INDEX.to("meta")}, r"index: expected device cpu like logits, got meta"),
        ({"mode": "given", "index": INDEX, "noise": NOISE}, r"noise: not used by mode 'given'"),
    ],
)
def test_value_errors(select_routes, changes, message):
    with pytest.raises(ValueError, match=message):
        select_routes(**{"logits": LOGITS, "k": K} | changes)


def test_make_routes_of_a_dense_graph_is_a_weighted_sum_of_all_sources():
    n, width = 5, 8
    index = torch.arange(n).expand(2, 7, n, n)
    weight = torch.rand(2, 7, n, n, dtype=torch.float64)
    routes = d2r_fast.make_routes(index, weight)
    lower = torch.ones(n, n).tril().bool()
    assert torch.equal(routes.gate, torch.where(lower, weight, 0)) and torch.equal(routes.flow[0, 0], lower)
    assert unpack_active(routes.active, n).all()
    h = [torch.rand(2, 7, width, dtype=torch.float64)]
    matrix, bias = torch.randn(2, n - 1, width, width).double(), torch.randn(2, n - 1, width).double()
    for i in range(1, n + 1):
        x = sum(weight[:, :, i - 1, s, None] * h[s] for s in range(i))
        if i < n:
            h.append((x @ matrix[:, i - 1].mT + bias[:, i - 1, None]).relu() + x)
    torch.testing.assert_close(d2r_fast.routed_modules(h[0], matrix, bias, routes), x, rtol=1e-12, atol=1e-12)


def test_make_routes_agrees_with_selected_ones():
    selected = d2r_fast.select_routes(random_logits(2, 40, 16), 2)
    made = d2r_fast.make_routes(selected.index, selected.gate, selected.flow)
    assert all(torch.equal(a, b) for a, b in zip(made, selected, strict=True))


@pytest.mark.parametrize(
    ("index", "gate", "message"),
    [
        (INDEX[0], NOISE, r"index: expected \[E,B,N,K\], K <= N <= 32, got \[4, 5, 2\]"),
        (INDEX.float(), NOISE, "index: expected an integer dtype, got torch.float32"),
        (INDEX[:, :, :1], NOISE, r"index: .* K <= N .* got \[2, 4, 1, 2\]"),
        (INDEX, NOISE, r"gate: expected shape \[2, 4, 5, 2\] like index, got \[2, 4, 15\]"),
    ],
)
def test_make_routes_value_errors(index, gate, message):
    with pytest.raises(ValueError, match=message):
        d2r_fast.make_routes(index, gate)
