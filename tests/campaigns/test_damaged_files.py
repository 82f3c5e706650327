"""The campaign of damaged files in short, and that it would tell what passes."""

from pathlib import Path

import pytest
from campaigns import damaged_files
from campaigns.commands import Outcome
from campaigns.damaged_files import Case


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> damaged_files.DamagedFiles:
    return damaged_files.campaign(6, seed=2, folder=tmp_path_factory.mktemp("damaged"))


def test_damaged_files_are_refused_or_told(damaged):
    assert damaged.counts.tried == sum(damaged.ended.values()) == 6
    assert damaged.ended["refused"] >= 1
    assert damaged.counts.clean


def test_going_on_without_a_word_or_with_other_records_would_be_found(damaged):
    case, path = Case("newest", "bit", "resume run", ""), Path("step-0000000040.pt")
    silent, told = (Outcome(0, "", err, 1.0) for err in ([], [f"d2r train: {path}: damaged"]))
    judge = damaged._judge
    assert judge(case, silent, damaged._whole, path, {}) == ("silent", "went on without a word")
    assert judge(case, told, damaged._whole, path, {}) == ("went on with a warning", "")
    assert judge(case, told, damaged._other, path, {}) == ("lost", "other records than the undisturbed run's")
    two = Outcome(1, "", ["one line", f"{path}: damaged"], 1.0)
    assert judge(case, two, damaged._whole, path, {})[0] == "silent"
    assert (
        Outcome(1, "", ["Traceback (most recent call last):", "KeyError: 1"], 1.0).fault
        == "crash: traceback: KeyError: 1"
    )
    assert Outcome(-11, "", [], 1.0).fault.startswith("crash: ended by signal 11")
