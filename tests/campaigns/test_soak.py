"""The soak's verdict on samples whose growth is known, and on a few real chunks with an evaluation each."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from campaigns import soak

MINUTES = np.arange(0, 60, 1 / 6)


def samples(resident=1000.0, in_use=600.0, **changes):
    """An hour of them, 10 seconds apart; arguments are numbers or one number a sample."""
    values = {"minutes": MINUTES, "updates": 0, "in_use": in_use, "resident": resident}
    values |= {"peak": 1900, "threads": 13, "files": 9, "mappings": 740} | changes
    columns = [np.broadcast_to(values[name], len(MINUTES)).tolist() for name in soak.Sample._fields]
    return [soak.Sample(*row) for row in zip(*columns, strict=True)]


def test_a_slope_is_found_with_its_interval():
    steps = np.random.default_rng(0).normal(0, 10, 12).repeat(30)  # what evaluations leave, for minutes at a time
    fit = soak.slope(MINUTES.tolist(), (1000 + 15 * MINUTES + steps).tolist())
    assert fit.low < 15 < fit.high
    assert 0.1 < fit.high - fit.value < 1


def test_a_flat_hour_is_told_from_growth_in_any_column():
    noise = np.random.default_rng(0).normal(0, 10, len(MINUTES))
    said, grown = soak.verdict(samples(resident=1000 + noise), bound=1.0)
    assert grown == []
    assert len(said) == 6
    for column, values in [
        ("in_use", 600 + 2 * MINUTES),
        ("resident", 1000 + noise + 2 * MINUTES),
        ("peak", 1900 + 5 * MINUTES),
        ("threads", 13 + (MINUTES > 40)),
        ("files", 9 + (MINUTES > 40)),
        ("mappings", 740 + 5 * MINUTES),
    ]:
        (line,) = soak.verdict(samples(**{column: values}), bound=1.0)[1]
        assert line.startswith(f"{column}: ")


def test_a_run_too_short_or_too_noisy_to_tell_does_not_pass():
    noise = np.random.default_rng(0).normal(0, 300, len(MINUTES))
    (line,) = soak.verdict(samples(resident=1000 + noise), bound=1.0)[1]
    assert line.startswith("resident: ")
    with pytest.raises(ValueError, match="expected samples in at least 3 spans of time, got 2 in 2"):
        soak.slope([0.0, 1.0], [5.0, 5.0])


RUN = """
import dataclasses, json, sys, tempfile
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
import tiny
from campaigns import soak
from d2r_fast.evaluation import play
from d2r_fast.config import EvalConfig

kept, make_envs = [], play.make_envs
if sys.argv[2] == "leak":
    def make_and_keep(*args, **kwargs):
        kept.append(make_envs(*args, **kwargs))
        kept[-1].close = lambda: None
        return kept[-1]
    play.make_envs = make_and_keep
torch.set_num_threads(1)
cfg = dataclasses.replace(
    tiny.RUN, total_steps=int(sys.argv[3]), eval=EvalConfig(every_chunks=1, episodes=1, envs_per_task=1)
)
with tempfile.TemporaryDirectory() as folder:
    samples = soak.soak(cfg, Path(folder) / "run", minutes=10, every=0)
print(json.dumps([s._asdict() for s in samples]))
"""


def growth(what, chunks):
    """What the second half of so many chunks adds, with an evaluation each and a checkpoint at every other."""
    steps = 10 * (chunks - 2)  # without the warm-up's
    command = [sys.executable, "-c", RUN, str(Path(__file__).parents[1]), what, str(steps)]
    taken = [soak.Sample(**s) for s in json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)]
    assert len(taken) == chunks
    first, last = taken[chunks // 2], taken[-1]
    return {name: getattr(last, name) - getattr(first, name) for name in soak.Sample._fields}


def test_twice_as_many_chunks_hold_no_more():
    grown = growth("flat", chunks=24)
    assert np.isnan(grown["in_use"]) or grown["in_use"] < 0.5  # MiB; a leaked environment is over 10
    assert grown["resident"] < 50
    assert (grown["threads"], grown["files"]) == (0, 0)


def test_environments_that_nobody_closes_show():
    grown = growth("leak", chunks=8)
    assert np.isnan(grown["in_use"]) or grown["in_use"] > 50
    assert grown["resident"] > 50
    assert grown["threads"] >= 6
