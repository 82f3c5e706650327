"""The verdict of the memory benchmark, on samples whose growth is known, and on a few real updates."""

import numpy as np
import pytest
from update_memory import EVERY, growth, record
from update_step import make_learner, variant_of

from d2r_fast.presets import PRESETS

MIB = 2**20
UPDATES = EVERY * np.arange(101)  # 2,000


def held(mib) -> list[int]:
    return [round(value * MIB) for value in mib]


def test_a_leak_grows_and_is_carried_on_to_the_end_of_the_run():
    got = growth(held(1000 + 0.02 * UPDATES), run_updates=1_500_000)  # 20 MiB in 1,000 updates
    assert got["verdict"] == "grows"
    assert got["slope_kib_per_update"] == pytest.approx(20.48, abs=0.01)
    assert got["grown_in_second_half_mib"] == pytest.approx(20, abs=0.01)
    assert got["gib_over_the_run"] == pytest.approx(29.3, abs=0.1)
    assert (got["start_mib"], got["end_mib"]) == (1000, 1040)


def test_what_fills_up_in_the_first_half_is_no_leak():
    got = growth(held(1000 + np.minimum(UPDATES, 900) * 0.5), run_updates=1_500_000)
    assert got["verdict"] == "flat"
    assert got["slope_kib_per_update"] == pytest.approx(0, abs=1e-6)


def test_noise_has_a_slope_within_its_error():
    noise = np.random.default_rng(0).normal(0, 2, len(UPDATES))
    got = growth(held(1000 + noise), run_updates=1_500_000)
    assert got["verdict"] == "flat"
    assert abs(got["slope_kib_per_update"]) < 3 * got["slope_error"]
    # Of least squares: the noise over the spread of 51 evenly spaced updates.
    assert got["slope_error"] == pytest.approx(2048 / (np.std(UPDATES[50:]) * 51**0.5), rel=0.25)


def test_samples_of_real_updates():
    learner = make_learner(variant_of(PRESETS["quick"][1], "reference", "float32"), "cpu")
    samples = record(learner, 2 * EVERY, "cpu")
    assert learner.updates == 2 * EVERY
    assert list(samples) == ["rss"]
    assert len(samples["rss"]) == 3
    assert min(samples["rss"]) > 50 * MIB  # torch alone needs more
