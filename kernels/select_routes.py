"""Choosing routes in one launch forward and one backward (`d2r_fast.ops.select_routes` is contract and oracle).

All routes of a row are worked on at once, as a [rows,routes,sources] block padded to powers of two, a route a thread:
the k picks are the only dependent steps, and then the walk back from the head, which is on one integer a route.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, check_dtype, packed
from d2r_fast.kernels.tiles import sum_products

WARP_ROUTES = 32  # of the padded block: one a thread
LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def choose(
    logits_ptr, temperature_ptr, noise_ptr, given_ptr, index_ptr, gate_ptr, flow_ptr, active_ptr,
    row, exists_row, own, choice_row, chooses,
    N: tl.constexpr, K: tl.constexpr, RESROUTING: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """All routes of BLOCK_ROWS rows, and their active bits.

    row is a row's number in logits and in what is written, own in the temperatures, choice_row in noise or given
    sources, for the rows that take them: those that choose.
    """
    route = 1 + tl.arange(0, BLOCK_N)[None, :, None]  # [1,routes,1]
    # Backwards by xor, for Triton lays threads along what it sees to be contiguous: so one has all sources of a route,
    # and no maximum or sum over them is one over threads. (Triton 3.9 lays them along the last axis then.)
    source = (BLOCK_N - 1) ^ tl.arange(0, BLOCK_N)[None, None, :]  # [1,1,sources]
    slot = tl.arange(0, BLOCK_SLOTS)[None, None, :]  # [1,1,slots]
    exists = exists_row[:, None, None] & (route <= N)
    used = exists & (slot < K) & (slot < route)
    first_logit = route * (route - 1) // 2
    own_logits = logits_ptr + (row * (N * (N + 1) // 2))[:, None, None] + first_logit  # of a route
    slots = (row * (N * K))[:, None, None] + (route - 1) * K + slot
    is_given = chooses[:, None, None]
    choice = choice_row[:, None, None]

    # Of every route as many, on into the next route's, so that no load waits for a condition of its own.
    free = source < route
    logits = tl.load(own_logits + source, mask=exists & (source < N), other=0.0)
    score = logits
    if noise_ptr is not None:
        # logits / tau + noise in the order of logits + tau * noise: no division, so no overflow at a tiny tau.
        tau = tl.load(temperature_ptr + own, mask=chooses, other=0.0)
        own_noise = noise_ptr + choice * (N * (N + 1) // 2) + first_logit
        noise = tl.load(own_noise + source, mask=exists & (source < N) & chooses[:, None, None], other=0.5)
        score += tau[:, None, None] * noise
    # -inf is of what is taken or does not exist; a score that is counts as the least number, as in the reference.
    score = tl.where(score == score, tl.maximum(score, LOWEST), float("inf"))
    score = tl.where(free, score, -float("inf"))
    logits = tl.where(free, logits, -float("inf"))
    largest = tl.max(logits, 2)[:, :, None]
    total = tl.sum(tl.exp(logits - largest), 2)[:, :, None]

    chosen = tl.zeros((BLOCK_ROWS, BLOCK_N, BLOCK_SLOTS), tl.int32)
    if given_ptr is not None:
        given_slot = choice * (N * K) + (route - 1) * K + slot
        given = tl.load(given_ptr + given_slot, mask=used & is_given, other=0)
        legal = (given >= 0) & (given < route)  # in its own type: 2^32 must not pass for 0
        chosen = tl.where(legal, given, 0).to(tl.int32)
        taken = tl.zeros((BLOCK_ROWS, BLOCK_N, 1), tl.int32)  # bits of the sources in slots before k
    fresh = used  # slots with a source that no slot before them has
    for k in tl.static_range(K):
        best = tl.max(score, 2)[:, :, None]
        pick = tl.min(tl.where(score == best, source, BLOCK_N), 2)[:, :, None]
        if given_ptr is not None:
            pick = tl.where(is_given, tl.sum(tl.where(slot == k, chosen, 0), 2)[:, :, None], pick)
            fresh = fresh & ((slot != k) | (((taken >> pick) & 1) == 0))
            taken |= tl.full(pick.shape, 1, tl.int32) << pick
        score = tl.where(source == pick, -float("inf"), score)
        chosen = tl.where(used & (slot == k), pick, chosen)
    value = tl.load(own_logits + chosen, mask=used, other=-float("inf"))  # read again, at the picks
    if given_ptr is not None:
        value = tl.where(used & ~(fresh & legal), float("nan"), value)
    share = tl.exp(value - tl.max(value, 2)[:, :, None])
    gate = tl.where(used, share / tl.sum(share, 2)[:, :, None], 0.0)
    flow = used
    if RESROUTING:  # the published threshold is 1/(i+1), over all i sources and without the temperature
        flow = used & (tl.exp(value - largest) / total * (route + 1) > 1)
    written = exists & (slot < K)
    tl.store(index_ptr + slots, chosen, mask=written)
    tl.store(gate_ptr + slots, gate, mask=written)
    tl.store(flow_ptr + slots, flow, mask=written)

    # Fresh sources of a route are distinct, so the sum of their bits is their union. A reached module brings its route.
    bits = tl.sum(tl.where(fresh, tl.full(chosen.shape, 1, tl.int32) << chosen, 0), 2)  # [rows,routes]
    at = tl.zeros((BLOCK_ROWS, 1), tl.int32)
    active = tl.gather(bits, at + (N - 1), 1)
    for i in tl.static_range(N - 1, 0, -1):
        active |= tl.where(((active >> i) & 1) != 0, tl.gather(bits, at + (i - 1), 1), 0)
    tl.store(active_ptr + row[:, None], active, mask=exists_row[:, None])


@triton.jit(do_not_specialize=["n_total", "n_rows", "n_chosen", "n_choosing"])
def select_routes_fwd_kernel(
    logits_ptr, temperature_ptr, noise_ptr, given_ptr, index_ptr, gate_ptr, flow_ptr, active_ptr,
    n_total, n_rows, n_chosen, n_choosing,
    N: tl.constexpr, K: tl.constexpr, RESROUTING: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(E*B, BLOCK_ROWS),); a program owns all routes of its rows.

    The first n_chosen rows of each of the first n_choosing networks take noise or given sources, which are
    [n_choosing,n_chosen,...]; the rest is greedy.
    Reads R logits a row (and R of noise, or N*K given sources), writes 9*N*K+4 bytes, each once: bandwidth-bound.
    Invariant: a pick is a source that exists and is not picked yet whatever the logits hold (a NaN counts as largest,
    as in torch), so that whoever indexes by it stays inside memory. Given sources too: one that its route does not have
    becomes source 0, and one given twice counts once in `active`. Such a route's gates are all NaN, so that it shows.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    net, own = (row // n_rows).to(tl.int64), row % n_rows  # in its network
    chooses = (row < n_total) & (own < n_chosen) & (net < n_choosing)
    choose(
        logits_ptr, temperature_ptr, noise_ptr, given_ptr, index_ptr, gate_ptr, flow_ptr, active_ptr,
        row.to(tl.int64), row < n_total, own, net * n_chosen + own, chooses,
        N, K, RESROUTING, BLOCK_N, BLOCK_SLOTS, BLOCK_ROWS,
    )  # fmt: skip


@triton.jit
def unchoose(
    d_gate_ptr, index_ptr, gate_ptr, active_ptr, d_logits_ptr, row, exists_row,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """The gradient of all logits of BLOCK_ROWS rows."""
    route = 1 + tl.arange(0, BLOCK_N)[None, :, None]
    source = tl.arange(0, BLOCK_N)[None, None, :]
    slot = tl.arange(0, BLOCK_SLOTS)[None, None, :]
    exists = exists_row[:, None, None] & (route <= N)
    used = exists & (slot < K) & (slot < route)
    slots = (row * (N * K))[:, None, None] + (route - 1) * K + slot
    index = tl.load(index_ptr + slots, mask=used, other=-1)  # an unused slot is no source's
    gate = tl.load(gate_ptr + slots, mask=used, other=0.0)
    counts = used
    if active_ptr is not None:
        active = tl.load(active_ptr + row, mask=exists_row, other=0)[:, None, None]
        counts = used & ((route == N) | (((active >> route) & 1) != 0))
    d_gate = tl.load(d_gate_ptr + slots, mask=counts, other=0.0)
    d_value = gate * (d_gate - sum_products(gate, d_gate, 2)[:, :, None])

    d_logits = tl.zeros((BLOCK_ROWS, BLOCK_N, BLOCK_N), gate.dtype)
    for k in tl.static_range(K):
        pick = tl.sum(tl.where(slot == k, index, 0), 2)[:, :, None]
        d_logits = tl.where(source == pick, tl.sum(tl.where(slot == k, d_value, 0.0), 2)[:, :, None], d_logits)
    packed = (row * (N * (N + 1) // 2))[:, None, None] + route * (route - 1) // 2 + source
    tl.store(d_logits_ptr + packed, d_logits, mask=exists & (source < route))


@triton.jit(do_not_specialize=["n_total"])
def select_routes_bwd_kernel(
    d_gate_ptr, index_ptr, gate_ptr, active_ptr, d_logits_ptr, n_total,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SLOTS: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(E*B, BLOCK_ROWS),); a program owns all logits of its rows: the gradient of a softmax over the chosen,
    0 elsewhere. Reads 12*N*K bytes a row, writes R gradients, each once: bandwidth-bound. With active: routes of
    modules that are not count as 0, whatever d_gate holds there."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    unchoose(
        d_gate_ptr, index_ptr, gate_ptr, active_ptr, d_logits_ptr, row, row < n_total,
        N, K, BLOCK_N, BLOCK_SLOTS, BLOCK_ROWS,
    )  # fmt: skip


def route_launch(n_modules: int, n_kept: int) -> dict[str, Any]:
    """Constants and options that both kernels share."""
    block_n = triton.next_power_of_2(n_modules)
    return {
        "N": n_modules,
        "K": n_kept,
        "BLOCK_N": block_n,
        "BLOCK_SLOTS": triton.next_power_of_2(n_kept),
        "BLOCK_ROWS": max(1, WARP_ROUTES // block_n),
        "num_warps": 1,
    } | FUSED


def forward(
    logits: Tensor,
    temperature: Tensor | None,
    noise: Tensor | None,
    given: Tensor | None,
    k: int,
    n_modules: int,
    resrouting: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """gate, index [E,B,N,K] int32, flow [E,B,N,K] bool, active [E,B] int32 of `d2r_fast.ops.Routes`.

    The mode follows from the arguments: sampled with temperature [B] and noise [E,B,R], given with `given`
    [E,B,N,K] of any integer type, else greedy. These may have fewer networks and rows: those after theirs are greedy. A
    route that is given a source outside 0..route-1, or one twice, comes with NaN gates, with sources that exist and
    active bits to match. ValueError: a dtype other than float32.
    """
    for name, value in {"logits": logits, "temperature": temperature, "noise": noise}.items():
        if value is not None:
            check_dtype(name, value)
    n_nets, n_rows = logits.shape[:2]
    choice = noise if noise is not None else given
    n_choosing, n_chosen = (0, 0) if choice is None else choice.shape[:2]
    index = torch.empty(n_nets, n_rows, n_modules, k, dtype=torch.int32, device=logits.device)
    gate, flow = torch.empty_like(index, dtype=logits.dtype), torch.empty_like(index, dtype=torch.bool)
    active = torch.empty(n_nets, n_rows, dtype=torch.int32, device=logits.device)
    if active.numel() > 0:
        launch = route_launch(n_modules, k)
        inputs = [None if v is None else packed(v) for v in (logits, temperature, noise, given)]
        select_routes_fwd_kernel[(triton.cdiv(active.numel(), launch["BLOCK_ROWS"]),)](
            *inputs, index, gate, flow, active, active.numel(), n_rows, n_chosen, n_choosing,
            RESROUTING=resrouting, **launch,
        )  # fmt: skip
    return gate, index, flow, active


def backward(d_gate: Tensor, index: Tensor, gate: Tensor) -> Tensor:
    """d_logits [E,B,R] from the gradient of `gate`, [E,B,N,K]; what unused slots of d_gate hold does not matter."""
    n_nets, n_rows, n_modules, _ = d_gate.shape
    d_logits = gate.new_empty(n_nets, n_rows, n_modules * (n_modules + 1) // 2)
    backward_at(packed(d_gate), packed(index), packed(gate), None, d_logits)
    return d_logits


def backward_at(d_gate: Tensor, index: Tensor, gate: Tensor, active: Tensor | None, d_logits: Tensor) -> None:
    """Writes d_logits [E,B,R]. index, gate and active are of these networks or more, of which the first count.

    active [E,B]: routes of modules that are not active count as 0, whatever d_gate holds; None: all count.
    """
    check_dtype("d_gate", d_gate)
    n_nets, n_rows, n_modules, k = d_gate.shape
    if d_logits.numel() > 0:
        launch = route_launch(n_modules, k)
        select_routes_bwd_kernel[(triton.cdiv(n_nets * n_rows, launch["BLOCK_ROWS"]),)](
            d_gate, index, gate, active, d_logits, n_nets * n_rows, **launch
        )
