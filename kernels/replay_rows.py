"""The rows of a batch out of the replay's storage, in one launch (contract and oracle: `d2r_fast.ops.replay_rows`)."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from d2r_fast.kernels.settings import FUSED, check_in_place, check_tensor, packed

BLOCK_NUMBERS = 512  # of x: at the published sizes 8 rows a program, 160 programs for 1,280 rows


@triton.jit(do_not_specialize=["n_rows", "per_task", "stored"])
def replay_rows_kernel(
    obs_ptr, action_ptr, reward_ptr, ended_ptr, next_obs_ptr, route_ptr, share_ptr, size_ptr,
    x_ptr, rewards_ptr, terminals_ptr, routes_ptr, n_rows, per_task, stored,
    N_OBS: tl.constexpr, N_ACTIONS: tl.constexpr, ROUTE: tl.constexpr,
    BLOCK_X: tl.constexpr, BLOCK_ROUTE: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Grid (cdiv(B, BLOCK_ROWS),); a program owns all fields of its rows.

    With O = N_OBS and A = N_ACTIONS: reads 4 (2 O + A) + ROUTE + 13 bytes a row from where it lies, writes 12 (O + A) +
    ROUTE + 8 bytes, each once.
    Invariant: a row lies within the storage whatever `share` and `size` hold. int64 places: a replay of 2^26 rows has
    2^31 numbers and more.
    """
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    exists = row < n_rows
    size = tl.load(size_ptr)
    share = tl.load(share_ptr + row, mask=exists, other=0.0)
    drawn = (share * size.to(tl.float64)).to(tl.int64)  # a product may round up to the size
    drawn = tl.maximum(tl.minimum(drawn, tl.minimum(size, stored) - 1), 0)
    source = (row // per_task).to(tl.int64) * stored + drawn
    row = row.to(tl.int64)

    col = tl.arange(0, BLOCK_X)[None, :]
    is_obs = exists[:, None] & (col < N_OBS)
    is_action = exists[:, None] & (col >= N_OBS) & (col < N_OBS + N_ACTIONS)
    obs = tl.load(obs_ptr + (source * N_OBS)[:, None] + col, mask=is_obs, other=0.0)
    action = tl.load(action_ptr + (source * N_ACTIONS)[:, None] + col - N_OBS, mask=is_action, other=0.0)
    next_obs = tl.load(next_obs_ptr + (source * N_OBS)[:, None] + col, mask=is_obs, other=0.0)
    at = (row * (N_OBS + N_ACTIONS))[:, None] + col
    plane = tl.cast(n_rows, tl.int64) * (N_OBS + N_ACTIONS)
    tl.store(x_ptr + at, tl.where(is_obs, obs, action), mask=is_obs | is_action)
    tl.store(x_ptr + plane + at, obs, mask=is_obs | is_action)  # 0 where the actor's action will go
    tl.store(x_ptr + 2 * plane + at, next_obs, mask=is_obs | is_action)

    reward = tl.load(reward_ptr + source, mask=exists, other=0.0)
    ended = tl.load(ended_ptr + source, mask=exists, other=0)
    tl.store(rewards_ptr + row, reward, mask=exists)
    tl.store(terminals_ptr + row, tl.where(ended != 0, 1.0, 0.0), mask=exists)

    slot = tl.arange(0, BLOCK_ROUTE)[None, :]
    is_route = exists[:, None] & (slot < ROUTE)
    route = tl.load(route_ptr + (source * ROUTE)[:, None] + slot, mask=is_route, other=0)
    tl.store(routes_ptr + (row * ROUTE)[:, None] + slot, route, mask=is_route)


def rows_launch(n_obs: int, n_actions: int, route: int) -> dict[str, Any]:
    """Constants and options; `route` is N K, the bytes of a row's routes, 0 where a network has none."""
    block_x = triton.next_power_of_2(n_obs + n_actions)
    return {
        "N_OBS": n_obs,
        "N_ACTIONS": n_actions,
        "ROUTE": route,
        "BLOCK_X": block_x,
        "BLOCK_ROUTE": triton.next_power_of_2(max(1, route)),
        "BLOCK_ROWS": max(1, BLOCK_NUMBERS // block_x),
        "num_warps": 4,
    } | FUSED


def replay_rows(
    obs: Tensor,
    action: Tensor,
    reward: Tensor,
    terminal: Tensor,
    next_obs: Tensor,
    route: Tensor,
    share: Tensor,
    size: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [3,B,O+A], reward [B], terminal [B], route [1,B,N,K]. ValueError: shapes or dtypes disagree.

    `size` is not looked at here, for that would wait for the GPU: one outside 1..S counts as 1 or as S.
    """
    if obs.dim() != 3 or action.dim() != 3 or route.dim() != 4 or share.dim() != 2:
        shapes = ", ".join(str(list(v.shape)) for v in (obs, action, route, share))
        raise ValueError(f"obs, action, route, share: expected [T,S,O], [T,S,A], [T,S,N,K] and [T,n], got {shapes}")
    (n_tasks, stored, n_obs), n_actions, (n_modules, n_kept) = obs.shape, action.shape[2], route.shape[2:]
    per_task = share.shape[1]
    check_in_place("obs", obs, torch.float32, [n_tasks, stored, n_obs])
    check_in_place("action", action, torch.float32, [n_tasks, stored, n_actions])
    check_in_place("reward", reward, torch.float32, [n_tasks, stored])
    check_in_place("terminal", terminal, torch.bool, [n_tasks, stored])
    check_in_place("next_obs", next_obs, torch.float32, [n_tasks, stored, n_obs])
    check_in_place("route", route, torch.uint8, [n_tasks, stored, n_modules, n_kept])
    check_tensor("share", share, torch.float64, [n_tasks, per_task])
    check_tensor("size", size, torch.int64, [])
    n_rows = n_tasks * per_task
    x = obs.new_empty(3, n_rows, n_obs + n_actions)
    rewards, terminals = obs.new_empty(n_rows), obs.new_empty(n_rows)
    given = route.new_empty(1, n_rows, n_modules, n_kept)
    if n_rows > 0 and stored < 1:
        raise ValueError("obs: expected at least one stored row a task, got none")
    if n_rows > 0:
        launch = rows_launch(n_obs, n_actions, n_modules * n_kept)
        replay_rows_kernel[(triton.cdiv(n_rows, launch["BLOCK_ROWS"]),)](
            obs, action, reward, terminal, next_obs, route, packed(share), size, x, rewards, terminals, given,
            n_rows, per_task, stored, **launch,
        )  # fmt: skip
    return x, rewards, terminals, given
