"""The ring buffer against a list a task: every transition is marked with a number, and all its fields must agree."""

import io

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from d2r_fast.learning.replay import Replay, Staging, Transitions

T, CAP, OBS, A, ROUTE = 3, 10, 4, 2, (5, 2)  # CAP rows a task
CPU = torch.device("cpu")


def make_replay(n_tasks=T, capacity=T * CAP, obs=OBS, action=A, route=ROUTE):
    return Replay(n_tasks, capacity, obs, action, route, CPU)


def marked(start, n_new, n_tasks=T):
    """Transitions start .. start+n_new-1 of every task; all fields tell task and number. Numbers stay below 80."""
    number = torch.arange(start, start + n_new) + 80.0 * torch.arange(n_tasks)[:, None]  # [T,S]
    return Transitions(
        obs=number[..., None] + torch.arange(OBS) / 8,
        action=-number[..., None] - torch.arange(A) / 8,
        reward=number / 4,
        terminal=number % 3 == 0,
        next_obs=number[..., None] + 0.5 + torch.arange(OBS) / 8,
        route=marked_routes(number),
    )


def marked_routes(number):
    """Routes [...,5,2] that can be, a different one for every number: route i has sources number mod i and the next."""
    i = torch.arange(1, ROUTE[0] + 1)
    source = number.long()[..., None] % i
    route = torch.stack([source, (source + 1) % i], -1)
    route[..., 0, 1] = number  # the one slot that no source uses
    return route.to(torch.uint8)


def assert_marked(batch):
    """The fields of every row belong together, and to the row's task; returns the numbers [B] within the task."""
    number = batch.obs[:, 0]
    assert torch.equal(batch.obs, number[:, None] + torch.arange(OBS) / 8)
    assert torch.equal(batch.action, -number[:, None] - torch.arange(A) / 8)
    assert torch.equal(batch.reward, number / 4)
    assert torch.equal(batch.terminal, (number % 3 == 0).float())
    assert torch.equal(batch.next_obs, batch.obs + 0.5)
    assert torch.equal(batch.route, marked_routes(number))
    assert torch.equal(batch.task, (number // 80).long())
    return number - 80 * batch.task


def held(replay, draws=60):
    """The numbers a task that sampling brings up, found by sampling often."""
    batch = replay.sample(T * CAP * draws, torch.Generator().manual_seed(0))
    number = assert_marked(batch)
    return [sorted(set(number[batch.task == t].tolist())) for t in range(T)]


@pytest.mark.parametrize(
    "chunks",
    [(1,), (3, 3), (CAP,), (3, 3, 3, 3), (7, 7), (CAP, CAP), (4, CAP), (9, 1, 1), (3, 9, 9, 2), (1,) * 23],
    ids=lambda c: "-".join(map(str, c)) if len(c) < 9 else f"{len(c)}x1",
)
def test_ring_keeps_the_newest(chunks):
    replay, added = make_replay(), 0
    for n_new in chunks:
        replay.add(marked(added, n_new))
        added += n_new
        assert replay.size == min(added, CAP)
    assert held(replay) == [list(range(max(0, added - CAP), added))] * T


@given(st.lists(st.integers(0, CAP), min_size=1, max_size=6).filter(any))
def test_ring_keeps_the_newest_after_any_chunks(chunks):
    replay, added = make_replay(), 0
    for n_new in chunks:
        replay.add(marked(added, n_new))
        added += n_new
    assert held(replay, draws=30) == [list(range(max(0, added - CAP), added))] * T


def test_a_capacity_that_the_tasks_do_not_divide_is_rounded_down():
    replay = make_replay(capacity=T * CAP + 2)
    assert replay.rows_per_task == CAP
    replay.add(marked(0, CAP))
    replay.add(marked(CAP, 1))
    assert held(replay) == [list(range(1, CAP + 1))] * T


def test_what_is_stored_is_a_copy():
    replay, new = make_replay(), marked(0, 2)
    new = new._replace(route=new.route.clone())
    replay.add(new)
    for value in new:
        value.zero_()
    assert held(replay) == [[0, 1]] * T


def test_sampling_gives_equal_rows_a_task_in_order():
    replay = make_replay()
    replay.add(marked(0, 6))
    batch = replay.sample(12, torch.Generator().manual_seed(0))
    assert torch.equal(batch.task, torch.tensor([0] * 4 + [1] * 4 + [2] * 4))
    assert_marked(batch)
    assert [v.dtype for v in batch] == [torch.float32] * 5 + [torch.int64, torch.uint8]
    assert batch.obs.shape == (12, OBS) and batch.action.shape == (12, A) and batch.route.shape == (12, *ROUTE)
    assert batch.reward.shape == batch.terminal.shape == (12,)


@pytest.mark.parametrize("filled", [4, CAP])
def test_sampling_is_uniform_and_independent_of_the_task(filled):
    replay, per_task = make_replay(), 20_000
    replay.add(marked(0, filled))
    batch = replay.sample(T * per_task, torch.Generator().manual_seed(1))
    number = assert_marked(batch).view(T, per_task).long()
    expected = per_task / filled
    for t in range(T):
        counts = torch.bincount(number[t], minlength=filled).float()
        assert len(counts) == filled
        assert ((counts - expected).square() / expected).sum() < 35  # at most 9 degrees of freedom
    for t in (1, 2):  # one draw a row, not one for all tasks
        agree = (number[0] == number[t]).float().mean().item()
        assert agree == pytest.approx(1 / filled, abs=0.02)


def test_sampling_follows_its_generator():
    replay = make_replay()
    replay.add(marked(0, CAP))
    first, second, other = (replay.sample(30, torch.Generator().manual_seed(s)) for s in (4, 4, 5))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.obs, other.obs)


def test_dev2_n_bytes_counts_one_byte_a_kept_source():
    # obs and next obs, action, reward: float32; terminal and each kept source: one byte.
    assert make_replay().n_bytes == T * CAP * (4 * (OBS + OBS + A + 1) + 1 + 10)
    published = Replay(10, 1000, 39, 4, (16, 2), CPU)
    assert published.n_bytes == 1000 * (4 * (39 + 39 + 4 + 1) + 1 + 32)
    assert published.n_bytes == sum(v.nbytes for v in published._store)


def test_too_much_memory_names_what_is_needed_and_what_is_there():
    with pytest.raises(
        MemoryError,
        match=r"replay_capacity: 1,000,000,000,000 transitions need [\d.]+ GiB, but cpu has [\d.]+ GiB free",
    ):
        Replay(10, 10**12, 39, 4, (16, 2), CPU)


def test_memory_limit_is_what_is_free(monkeypatch):
    needed = make_replay().n_bytes

    class Memory:
        available = needed

    monkeypatch.setattr("psutil.virtual_memory", Memory)
    make_replay()
    Memory.available = needed - 1
    with pytest.raises(MemoryError, match="replay_capacity: 30 transitions"):
        make_replay()


def test_sampling_an_empty_replay_is_an_error():
    with pytest.raises(RuntimeError, match="the replay is empty: collect before sampling"):
        make_replay().sample(T, torch.Generator())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"obs": torch.zeros(T, 2, OBS + 1)}, r"obs: expected \[3, 2, 4\], got \[3, 2, 5\]"),
        ({"action": torch.zeros(T, 3, A)}, r"action: expected \[3, 2, 2\], got \[3, 3, 2\]"),
        ({"reward": torch.zeros(T, 2, 1)}, r"reward: expected \[3, 2\], got \[3, 2, 1\]"),
        ({"terminal": torch.zeros(1, 2).bool()}, r"terminal: expected \[3, 2\], got \[1, 2\]"),
        ({"next_obs": torch.zeros(2, T, OBS)}, r"next_obs: expected \[3, 2, 4\], got \[2, 3, 4\]"),
        ({"route": torch.zeros(T, 2, 5, 3).byte()}, r"route: expected \[3, 2, 5, 2\], got \[3, 2, 5, 3\]"),
    ],
    ids=["obs", "action", "reward", "terminal", "next_obs", "route"],
)
def test_wrong_shapes_are_errors_and_add_nothing(changes, message):
    replay = make_replay()
    replay.add(marked(0, CAP))
    with pytest.raises(ValueError, match=message):
        replay.add(marked(70, 2)._replace(**changes))
    assert replay.size == CAP
    assert held(replay) == [list(range(CAP))] * T


def test_more_than_fits_at_once_is_an_error():
    with pytest.raises(ValueError, match="expected at most 10 transitions a task at once, got 11"):
        make_replay().add(marked(0, CAP + 1))


@pytest.mark.parametrize("added", [0, 4, CAP, 13], ids=["empty", "part", "full", "wrapped"])
def test_state_dict_roundtrip(added):
    replay = make_replay()
    for start in range(0, added, 4):
        replay.add(marked(start, min(4, added - start)))
    state = replay.state_dict()
    assert all(v.shape[:2] == (T, min(added, CAP)) for v in state["rows"].values())
    copy = make_replay()
    copy.add(marked(60, 3))  # what it held is gone
    copy.load_state_dict(state)
    assert copy.size == replay.size
    for both in (replay, copy):  # the next row goes to the same place
        both.add(marked(added, 3))
    assert held(copy) == held(replay) == [list(range(max(0, added + 3 - CAP), added + 3))] * T
    first, second = (r.sample(30, torch.Generator().manual_seed(4)) for r in (replay, copy))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_part_filled_replay_is_saved_without_its_empty_part():
    replay, file = make_replay(capacity=T * 1000), io.BytesIO()
    replay.add(marked(0, 60))
    torch.save(replay.state_dict(), file)
    assert file.tell() < 0.2 * replay.n_bytes


@pytest.mark.parametrize(
    "sizes",
    [
        {"capacity": T * 9},
        {"capacity": T * 12},
        {"n_tasks": 2, "capacity": 2 * CAP},
        {"obs": OBS + 1},
        {"action": A + 1},
        {"route": (5, 3)},
    ],
    ids=["smaller", "larger", "tasks", "obs", "action", "route"],
)
def test_a_saved_replay_of_other_sizes_is_refused_and_changes_nothing(sizes):
    saved = make_replay()
    saved.add(marked(0, CAP))
    saved.add(marked(CAP, 3))
    other = make_replay(**sizes)
    with pytest.raises(ValueError, match=r"saved replay: .* does not fit"):
        other.load_state_dict(saved.state_dict())
    assert other.size == 0
    assert all(not v.any() for v in other._store)


@pytest.mark.parametrize("n_rows", [1, 7])
def test_staged_rows_are_one_piece_of_memory_without_overlap(n_rows):
    staging = Staging(T, n_rows, 39, 4, (5, 3))
    assert [(list(x.shape), x.dtype) for x in staging.rows] == [
        ([T, n_rows, 39], torch.float32),
        ([T, n_rows, 4], torch.float32),
        ([T, n_rows], torch.float32),
        ([T, n_rows], torch.bool),
        ([T, n_rows, 39], torch.float32),
        ([T, n_rows, 5, 3], torch.uint8),
    ]
    assert len({x.untyped_storage().data_ptr() for x in staging.rows}) == 1
    for i, field in enumerate(staging.rows):
        field.fill_(i)
    for i, field in enumerate(staging.rows):
        assert (field == bool(i) if field.dtype == torch.bool else field == i).all()
    assert staging.rows_on(torch.device("cpu")) is staging.rows
