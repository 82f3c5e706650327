"""The campaign of killed ranks in short."""

from campaigns import rank_kills


def test_a_killed_rank_ends_all_and_the_run_goes_on(tmp_path):
    found = rank_kills.campaign(1, 2, seed=2, folder=tmp_path)
    assert found.counts.tried == 1
    assert found.finished >= 1
    assert found.counts.clean
