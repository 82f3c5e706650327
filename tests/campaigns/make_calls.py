"""Which call has which number: an operation, a change or none, and the circumstances."""

import random

import torch
from odd_calls import (
    UNSAID,
    Call,
    active_call,
    draw_sizes,
    expanded,
    linear_call,
    make_routes_call,
    network_forward_call,
    odd_layout,
    routed_modules_call,
    routed_network_call,
    select_call,
)
from odd_layers import chain_call, expert_sum_call, gates_call, levels_call, task_linear_call
from torch import Tensor

from d2r_fast.ops import Routes

OPERATIONS = {
    select_call: 5,
    make_routes_call: 4,
    routed_modules_call: 6,
    linear_call: 4,
    network_forward_call: 4,
    routed_network_call: 5,
    active_call: 1,
    chain_call: 4,
    expert_sum_call: 3,
    levels_call: 3,
    gates_call: 2,
    task_linear_call: 3,
}
COTANGENTS = ["plain"] * 6 + ["transposed", "expanded", "zero strides", "offset", "negative bit", "float32", "sparse"]
COTANGENTS += ["wrong shape", "one output only", "sum of squares"]
TWISTS = [""] * 12 + ["second backward", "differentiated twice", "input changed in place"]
CONTEXTS = ["grad"] * 8 + ["no_grad", "inference", "autocast"]


def make_call(seed: int, number: int) -> Call:
    """Call `number` of `seed`: the same in every process."""
    rng = random.Random(f"{seed}:{number}")
    torch.default_generator.manual_seed(rng.randrange(2**31))
    sizes = draw_sizes(rng)
    make = rng.choices(list(OPERATIONS), list(OPERATIONS.values()))[0]
    call, changes = make(sizes)
    faulty = rng.random() < 0.6
    if faulty:
        change = rng.choice(changes)
        change.apply(call.arguments)
        call.verdict, call.change, call.names, call.poisoned = (
            change.verdict,
            change.label,
            change.names,
            change.poisoned,
        )
    call.context, call.n_modules = rng.choice(CONTEXTS), sizes.n
    if call.context == "autocast" and "float" in call.change:
        call.verdict = UNSAID  # it brings some dtypes together
    if not faulty:
        for name, value in call.arguments.items():
            if isinstance(value, Tensor) and rng.random() < 0.3:
                call.arguments[name] = odd_layout(value, rng)
            elif isinstance(value, Tensor) and name != "flow" and rng.random() < 0.1:
                call.arguments[name] = expanded(value, rng)
            elif name == "routes" and rng.random() < 0.3:
                call.arguments[name] = Routes(*(odd_layout(v, rng) for v in value))
            elif name == "parameters" and rng.random() < 0.3:
                call.arguments[name] = [odd_layout(v, rng) for v in value]
        call.cotangent, call.twist = rng.choice(COTANGENTS), rng.choice(TWISTS)
        call.needs = tuple(name for name in call.needs if rng.random() < 0.8)
    return call
