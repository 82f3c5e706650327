"""The campaign of two processes in one run directory in short."""

from campaigns import two_at_once


def test_one_of_two_processes_trains(tmp_path):
    found = two_at_once.campaign(3, seed=3, folder=tmp_path)
    assert found.counts.tried == 3
    assert sum(found.said.values()) == 3
    assert found.counts.clean
