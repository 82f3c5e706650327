"""The campaign of NaN and infinity in a few of its cases, and that it would tell of a number that passes."""

import pytest
from campaigns import non_finite

from d2r_fast.learning import learner
from d2r_fast.training import trainer

pytestmark = pytest.mark.usefixtures("restore_torch_switches")


def test_numbers_that_are_not_finite_are_told_before_they_are_saved():
    cases = non_finite.choose(10, seed=0)
    assert {case.kind for case in cases} == {"engine", "noise", "learned", "replay", "checkpoint"}
    for case in cases:
        outcome, what = non_finite.try_case(case, seed=0)
        assert outcome in ("told", "harmless"), (case, what)


def test_an_infinite_second_moment_that_nobody_looks_for_is_silent(monkeypatch):
    for module in (learner, trainer):
        monkeypatch.setattr(module, "first_not_finite", lambda tensors: None)
    case = non_finite.Case("learned", "critics.net.head.weight: Adam's second moment", float("inf"))
    outcome, what = non_finite.try_case(case, seed=0)
    assert outcome == "silent"
    assert "'second', 'critics.net.head.weight'" in what
