"""What priority shedding is made of: controller, priorities, precedence, at known inputs and within bounds."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.precedence import Precedence
from gateway.core.priorities import COHORTS, EPOCH_S, PRIORITIES, RecentPriorities, cohort, threshold
from gateway.core.shedding import ShedRatio, dagor_level, flow_error


def test_ratio_by_hand() -> None:
    ratio = ShedRatio()
    assert ratio.update(0.5, 0.5, 0.1, 1.4) == pytest.approx(0.1 * 0.5 + 1.4 * 0.5 * 0.5)
    assert ratio.update(0.0, 0.5, 0.1, 1.4) == pytest.approx(0.35)
    assert ratio.update(-1.0, 0.5, 0.1, 1.4) == 0.0
    assert ratio.update(0.1, 0.5, 0.1, 1.4) == pytest.approx(0.1 * 0.1 + 1.4 * 0.1 * 0.5), "the integral did not go below 0"


@settings(deadline=None)
@given(st.lists(st.floats(-1, 1), max_size=100))
def test_ratio_stays_within_0_and_1(errors: list[float]) -> None:
    ratio = ShedRatio()
    assert all(0 <= ratio.update(error, 0.5, 0.1, 1.4) <= 1 for error in errors)


@pytest.mark.parametrize("load", [1.5, 2.0, 10.0])
def test_ratio_settles_at_what_is_too_much(load: float) -> None:
    ratio = ShedRatio()
    for _ in range(20):
        ratio.update(flow_error((1 - ratio.value) * load * 100, 100, 0, load * 100), 0.5, 0.1, 1.4)
    assert ratio.value == pytest.approx(1 - 1 / load, abs=0.01)


def test_flow_error_by_hand() -> None:
    assert flow_error(60, 40, 4, 80) == pytest.approx(0.2)
    assert flow_error(10, 40, 4, 20) == -1.0
    assert flow_error(0, 0, 8, 0) == -1.0


@settings(deadline=None)
@given(st.lists(st.integers(0, PRIORITIES - 1), min_size=1, max_size=300), st.floats(0, 1))
def test_a_threshold_lets_at_most_its_share_pass_and_not_one_priority_less(priorities: list[int], share: float) -> None:
    recent = RecentPriorities(size=200)
    for priority in priorities:
        recent.add(priority)
    kept = priorities[-200:]
    assert len(recent) == len(kept)
    found = recent.thresholds([share])[0]
    assert share == 1 or sum(priority < found for priority in kept) <= share * len(kept) + 1e-6
    assert found == PRIORITIES or sum(priority <= found for priority in kept) > share * len(kept)


def test_threshold_of_a_histogram_and_dagors_level() -> None:
    assert threshold([5, 0, 5, 5], 10) == 3
    assert threshold([5, 0, 5, 5], 9) == 2
    assert threshold([5, 0, 5, 5], 100) == 4
    assert (dagor_level(200, True), dagor_level(200, False)) == (190.0, 202.0)


def test_a_run_has_one_cohort_for_an_epoch_and_others_later() -> None:
    cohorts = [cohort("acme", "run", second * EPOCH_S) for second in range(20)]
    assert len(set(cohorts)) > 10
    spread = [cohort("acme", f"run{number}", 0.0) for number in range(12_800)]
    assert min(spread) == 0
    assert max(spread) == COHORTS - 1
    assert all(60 < spread.count(one) < 150 for one in range(COHORTS))
    runs = [f"run{number}" for number in range(200)]
    changes = [sum(cohort("acme", run, now_s) != cohort("acme", run, now_s + EPOCH_S / 10) for run in runs) for now_s in (0.0, 150.0)]
    assert all(5 < changed < 40 for changed in changes), "they do not all change at once"


def test_precedence_needs_lower_ranks_that_are_served() -> None:
    precedence = Precedence()
    for _ in range(1000):
        precedence.served(3, False)
    assert precedence.outranks(2, False)
    assert precedence.outranks(3, True)
    assert not precedence.outranks(3, False)
    assert not precedence.outranks(5, False)
    for _ in range(2000):
        precedence.served(2, False)
    assert not precedence.outranks(2, False), "its own tier takes everything"
