"""Checkpoint files: whole or not there, the last three, every changed bit found, and never code."""

import os
import pickle
import random
import resource
from pathlib import Path

import pytest
import torch

from d2r_fast.learning.saved_state import check_tensor, count, field
from d2r_fast.training.checkpoint import (
    DamagedCheckpoint,
    checkpoint_files,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
    set_aside_later,
)


def names(run_dir: Path) -> list[str]:
    """Everything in the checkpoints folder, whatever it is called."""
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def contents(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint_files(run_dir)}


def test_what_is_saved_is_what_is_loaded(tmp_path):
    state = {
        "tensors": {"a": torch.randn(3, 2), "b": torch.arange(4, dtype=torch.uint8), "c": torch.tensor(True)},
        "generator": torch.Generator().manual_seed(1).get_state(),
        "numbers": [1, 2.5, float("inf")],
        "text": "x",
        "nothing": None,
    }
    path = save_checkpoint(tmp_path / "run", 20, state)
    assert path == tmp_path / "run" / "checkpoints" / "step-0000000020.pt"
    loaded = load_checkpoint(path)
    assert loaded.pop("format") == 2
    assert {k: v for k, v in loaded.items() if k not in ("tensors", "generator")} == {
        k: v for k, v in state.items() if k not in ("tensors", "generator")
    }
    assert torch.equal(loaded["generator"], state["generator"])
    for name, tensor in state["tensors"].items():
        assert loaded["tensors"][name].dtype == tensor.dtype
        assert torch.equal(loaded["tensors"][name], tensor)


def test_the_last_three_are_kept_in_order_of_steps(tmp_path):
    for steps in (8, 90, 700, 1_000, 20_000):
        save_checkpoint(tmp_path, steps, {"steps": steps})
    assert names(tmp_path) == ["step-0000000700.pt", "step-0000001000.pt", "step-0000020000.pt"]
    assert [load_checkpoint(path)["steps"] for path in checkpoint_files(tmp_path)] == [700, 1_000, 20_000]
    assert load_checkpoint(find_checkpoint(tmp_path))["steps"] == 20_000


def test_the_same_steps_again_replace_the_file(tmp_path):
    save_checkpoint(tmp_path, 5, {"updates": 1})
    save_checkpoint(tmp_path, 5, {"updates": 2})
    assert names(tmp_path) == ["step-0000000005.pt"]
    assert load_checkpoint(find_checkpoint(tmp_path))["updates"] == 2


class Unsaveable:
    def __reduce__(self):
        raise RuntimeError("this cannot be saved")


@pytest.mark.parametrize("n_before", [0, 3])
@pytest.mark.parametrize("failure", ["value that cannot be saved", "disk full"])
def test_a_save_that_fails_half_way_leaves_everything_as_it_was(tmp_path, failure, n_before):
    for steps in range(1, n_before + 1):
        save_checkpoint(tmp_path, steps, {"weights": torch.full((1000,), float(steps))})
    before = contents(tmp_path)
    big = {"weights": torch.ones(1_000_000), "more": torch.ones(1000)}
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    if failure == "disk full":
        # Past this many bytes a write fails, as on a full disk: in the middle of the first tensor.
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limit[1]))
    else:
        big["unsaveable"] = Unsaveable()
    try:
        with pytest.raises((OSError, RuntimeError)):
            save_checkpoint(tmp_path, 9, big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert names(tmp_path) == sorted(before)
    assert contents(tmp_path) == before
    assert len(before) == n_before

    big.pop("unsaveable", None)
    save_checkpoint(tmp_path, 9, big)
    assert torch.equal(load_checkpoint(find_checkpoint(tmp_path))["weights"], big["weights"])


def test_an_old_unfinished_file_is_no_checkpoint(tmp_path):
    """What a power cut in the middle of a save leaves behind; the next save clears it away."""
    save_checkpoint(tmp_path, 1, {"steps": 1})
    for name in ("step-0000000002.pt.tmp", "step-0000000002.tmp"):  # of an earlier version
        (tmp_path / "checkpoints" / name).write_bytes(b"half")
    assert find_checkpoint(tmp_path).name == "step-0000000001.pt"
    save_checkpoint(tmp_path, 3, {"steps": 3})
    assert names(tmp_path) == ["step-0000000001.pt", "step-0000000003.pt"]


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return save_checkpoint(tmp_path, 1, {"weights": torch.randn(20), "numbers": [1, 2.5], "steps": 1})


def test_a_flipped_bit_anywhere_is_found(small):
    whole, draw = small.read_bytes(), random.Random(0)
    for at in [*range(0, len(whole), 7), *range(len(whole) - 48, len(whole))]:
        small.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1 :])
        with pytest.raises(DamagedCheckpoint) as raised:
            load_checkpoint(small)
        assert str(raised.value).startswith(f"{small}: ")
        assert "\n" not in str(raised.value)
    small.write_bytes(whole)
    assert load_checkpoint(small)["steps"] == 1


def test_a_file_cut_off_anywhere_or_made_longer_is_found(small):
    whole = small.read_bytes()
    cut = [whole[:kept] for kept in (*range(0, len(whole), 7), len(whole) - 48, len(whole) - 1)]
    for content in (*cut, whole + b"\0", whole + whole):
        small.write_bytes(content)
        with pytest.raises(DamagedCheckpoint):
            load_checkpoint(small)


def test_torch_load_reads_our_files_too(small):
    state = torch.load(small, weights_only=True)
    assert torch.equal(state["weights"], load_checkpoint(small)["weights"])


def test_a_whole_file_that_cannot_be_read_is_not_called_damaged(small, monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 9 bytes\nat line 1")

    monkeypatch.setattr("torch.load", fail)
    with pytest.raises(ValueError, match=r"whole, but could not be read: not enough memory: .* 9 bytes$") as raised:
        load_checkpoint(small)
    assert not isinstance(raised.value, DamagedCheckpoint)


def test_files_without_a_checksum_of_format_1_load(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"format": 1, "weights": torch.ones(3)}, path)
    assert load_checkpoint(path)["weights"].sum() == 3


def test_a_file_that_is_no_checkpoint_is_damaged(tmp_path):
    path = save_checkpoint(tmp_path, 1, {})
    path.write_bytes(b"not a zip archive")
    with pytest.raises(DamagedCheckpoint, match=r"step-0000000001\.pt: not a readable checkpoint \(\w+\)$"):
        load_checkpoint(path)


def test_a_full_disk_is_named_with_its_file(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*/checkpoints/step-0000000009\.pt'$"):
            save_checkpoint(tmp_path, 9, {"weights": torch.ones(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_later_checkpoints_are_set_aside_whole(tmp_path):
    for steps in (1, 2, 3):
        save_checkpoint(tmp_path, steps, {"steps": steps})
    before = contents(tmp_path)
    set_aside_later(tmp_path, 1)
    assert names(tmp_path) == ["step-0000000001.pt", *(f"step-000000000{n}.pt.discarded" for n in (2, 3))]
    for path in (tmp_path / "checkpoints").iterdir():
        assert path.read_bytes() == before[path.name.removesuffix(".discarded")]
    assert find_checkpoint(tmp_path).name == "step-0000000001.pt"
    set_aside_later(tmp_path, 1)
    assert len(names(tmp_path)) == 3


@pytest.mark.parametrize(
    "state, name, message",
    [
        ({}, "steps", "steps: expected int, but it is missing"),
        ({"steps": "x" * 100}, "steps", r"steps: expected int, got str 'x+\.\.\.x+'"),
        ({"steps": True}, "steps", "steps: expected int, got bool True"),
        ({"steps": torch.ones(2, 3)}, "steps", r"steps: expected int, got float32 \[2, 3\]"),
        ({"steps": -1}, "steps", "steps: expected a count from 0 on, got -1"),
        ({"steps": 10**30}, "steps", "steps: expected a count from 0 on, got 1000"),
    ],
)
def test_a_count_that_is_none_is_told(state, name, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        count(state, name)


def test_a_field_may_have_several_types():
    assert field({"replay": None}, "replay", dict, type(None)) is None
    with pytest.raises(ValueError, match=r"^replay: expected dict or nothing, got int 3$"):
        field({"replay": 3}, "replay", dict, type(None))


@pytest.mark.parametrize(
    "value, message",
    [
        (torch.ones(2, 4), r"w: expected float32 \[2, 3\], got float32 \[2, 4\]"),
        (torch.ones(2, 3).double(), r"w: expected float32 \[2, 3\], got float64 \[2, 3\]"),
        (torch.ones(2, 3).to_sparse(), r"w: expected float32 \[2, 3\], got"),
        ([1.0], r"w: expected float32 \[2, 3\], got list \[1.0\]"),
    ],
)
def test_a_tensor_of_another_kind_is_told(value, message):
    check_tensor(torch.zeros(2, 3), "w", like=torch.ones(2, 3))
    with pytest.raises(ValueError, match=message):
        check_tensor(value, "w", like=torch.ones(2, 3))


class Attack:
    """Unpickling this without care runs a command, which leaves a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch '{self.trace}'",)


@pytest.mark.parametrize("written_by", ["torch", "pickle"])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, written_by):
    trace = tmp_path / "it ran"
    state = {"format": 1, "agent": Attack(trace)}
    path = tmp_path / "checkpoints" / "step-0000000001.pt"
    path.parent.mkdir()
    if written_by == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state, protocol=2))
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        load_checkpoint(path)
    assert not trace.exists()

    # The file is a working attack: a loader that trusts it leaves the trace.
    if written_by == "torch":
        torch.load(path, weights_only=False)
    else:
        pickle.loads(path.read_bytes())
    assert trace.exists()


@pytest.mark.parametrize(
    "state, message",
    [
        ({"format": 3, "steps": 1}, "expected checkpoint format 1 or 2, got int 3"),
        ({"format": "1", "steps": 1}, "expected checkpoint format 1 or 2, got str '1'"),
        ({"steps": 1}, "not a d2r_fast checkpoint"),
        ({"weight": torch.ones(2)}, "not a d2r_fast checkpoint"),
        (torch.ones(2), "not a d2r_fast checkpoint"),
        ([1, 2], "not a d2r_fast checkpoint"),
    ],
    ids=["other format", "text", "no format", "state dict", "tensor", "list"],
)
def test_files_of_other_kinds(tmp_path, state, message):
    path = tmp_path / "other.pt"
    torch.save(state, path)
    with pytest.raises(ValueError, match=message) as raised:
        load_checkpoint(path)
    assert str(raised.value).startswith(f"{path}: ")


def test_find_checkpoint(tmp_path):
    run = tmp_path / "run"
    for missing in (run, tmp_path / "run" / "checkpoints" / "step-0000000009.pt"):
        with pytest.raises(FileNotFoundError, match=r"expected a checkpoint file, or a run directory") as raised:
            find_checkpoint(missing)
        assert str(missing) in str(raised.value)
    (run / "checkpoints").mkdir(parents=True)
    (run / "checkpoints" / "notes.txt").write_text("no checkpoint")
    with pytest.raises(FileNotFoundError, match=r"with checkpoints/step-\*\.pt"):
        find_checkpoint(run)
    save_checkpoint(run, 1, {})
    newest = save_checkpoint(run, 2, {})
    assert find_checkpoint(run) == newest
    older = checkpoint_files(run)[0]
    assert find_checkpoint(older) == older
