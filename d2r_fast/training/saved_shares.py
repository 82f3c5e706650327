"""What each rank but the first saves of a checkpoint, in a file of its own beside it: its share of the replay, and its
random streams. The checkpoint itself appears only once all shares are on the disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from d2r_fast.learning.replay import Replay, Transitions
from d2r_fast.learning.saved_state import count, field
from d2r_fast.training.checkpoint import DamagedCheckpoint, load_checkpoint, located, share_files, write_checkpoint


def ranks_of(state: dict[str, Any]) -> int:
    """How many ranks made a checkpoint; those before there were any say nothing."""
    return count(state, "ranks") if "ranks" in state else 1


def share_path(run_dir: Path, state: dict[str, Any], rank: int) -> Path:
    """Where rank's share of the checkpoint `state` lies. Its name tells two apart that one and the same number of steps
    was saved with, so that one is never written over while another checkpoint needs it."""
    updates = count(field(state, "learner", dict), "updates")
    return run_dir / "checkpoints" / f"share-{state['steps']:010d}-{updates}-{rank}-of-{ranks_of(state)}.pt"


def save_share(run_dir: Path, state: dict[str, Any], rank: int) -> None:
    """Write a rank's share of the checkpoint `state`, of which it holds what is its own. OSError: it could not be."""
    path = share_path(run_dir, state, rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = ("run_id", "steps", "replay", "acting_generator")
    write_checkpoint(path, {name: state[name] for name in kept} | {"generator": state["learner"]["generator"]})


def load_share(run_dir: Path, state: dict[str, Any], rank: int) -> dict[str, Any]:
    """A rank's share of the checkpoint `state`. DamagedCheckpoint: it is missing, damaged or of another run."""
    path = share_path(run_dir, state, rank)
    try:
        share = load_checkpoint(path)
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: missing; it is a part of the checkpoint beside it") from None
    if (share.get("run_id"), share.get("steps")) != (state["run_id"], state["steps"]):
        raise DamagedCheckpoint(f"{path}: of another run, or of other steps, than the checkpoint beside it")
    return share


def remove_old_shares(run_dir: Path, state: dict[str, Any], kept: list[Path]) -> None:
    """Remove the shares of checkpoints that are no longer among those `kept`, the last of which `state` is."""
    steps = {path.stem.removeprefix("step-") for path in kept}
    own = {share_path(run_dir, state, rank) for rank in range(1, ranks_of(state))}
    for path in share_files(run_dir):
        of = path.name.split("-")[1]
        if of not in steps or (of == f"{state['steps']:010d}" and path not in own):
            path.unlink()


def load_replay(replay: Replay, run_dir: Path, state: dict[str, Any], rank: int, n_ranks: int) -> None:
    """Fill a rank's replay, of `n_ranks`, from the checkpoint `state`, whoever made it: as it was where they were as
    many, else dealt anew, so that old and young transitions of all are with each.

    ValueError, DamagedCheckpoint: the shares are not what they should be.
    """

    def share_of(other: int) -> dict[str, Any]:
        return field(state if other == 0 else load_share(run_dir, state, other), "replay", dict)

    if ranks_of(state) == n_ranks:
        saved = share_of(rank)
    else:
        saved = _dealt(share_of, ranks_of(state), rank, n_ranks, replay.rows_per_task)
    with located(share_path(run_dir, state, rank)):
        replay.load_state_dict(saved)


def _dealt(
    share_of: Callable[[int], dict[str, Any]], had: int, rank: int, n_ranks: int, capacity: int
) -> dict[str, Any]:
    """The i-th oldest row of old share r goes to rank (i had + r) mod n_ranks; of those the youngest that fit."""
    size = count(share_of(0), "size")
    dealt = torch.arange(size * had)[rank::n_ranks][-capacity:]  # i had + r of what comes here, oldest first
    rows: dict[str, torch.Tensor] = {}
    for r in range(had):
        share = share_of(r)
        n, saved = count(share, "size"), field(share, "rows", dict)
        if n != size:
            raise ValueError(f"saved replay: expected {size} transitions a task in the share of rank {r}, got {n}")
        mine = dealt % had == r
        # The oldest row lies where the next one would go.
        index = (count(share, "head") + dealt[mine] // had) % max(size, 1)
        for name in Transitions._fields:
            value = field(saved, name, torch.Tensor)
            into = rows.setdefault(name, value.new_empty((value.shape[0], len(dealt), *value.shape[2:])))
            into[:, mine] = value[:, index]
    return {"size": len(dealt), "head": len(dealt) % capacity, "rows": rows}
