"""The campaign of kills in short."""

from campaigns import kills


def test_killed_runs_end_as_the_undisturbed_one(tmp_path):
    found = kills.campaign(2, seed=1, folder=tmp_path)
    assert found.counts.tried == 2
    assert found.finished >= 1
    assert found.counts.clean
