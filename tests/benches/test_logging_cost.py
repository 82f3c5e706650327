"""The benchmark of logging writes what it says it times, in each of its ways."""

import pytest
from logging_cost import WAYS, write

pytest.importorskip("wandb", reason="the wandb extra is not installed")


def test_each_way_writes_what_it_says(tmp_path):
    record = {"kind": "train", "steps": 10, "updates": 5, "episodes": [1, 1], "loss/critic": [0.5, 0.25]}
    rows = write(record, rounds=4, folder=tmp_path)
    assert [row["way"] for row in rows] == list(WAYS)
    assert all(0 < row["wall_ms"] <= row["p90_ms"] for row in rows)
    for i in range(3):
        assert len((tmp_path / str(i) / "metrics.jsonl").read_text().splitlines()) == 4
    event_bytes = [sum(f.stat().st_size for f in (tmp_path / str(i) / "tensorboard").iterdir()) for i in range(3)]
    assert 100 > event_bytes[0] < event_bytes[1] == event_bytes[2]
    assert [len(list((tmp_path / str(i)).glob("wandb/offline-run-*/*.wandb"))) for i in range(3)] == [0, 0, 1]
