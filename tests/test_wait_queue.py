"""Who may wait at a gate, until when, and with which hint."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.core.codel import Codel
from gateway.policy import ScopeView
from gateway.types import Flow, Kind, Lane
from plugins.bounded_wait import BoundedWait, BoundedWaitConfig

FLOW = Flow("acme", "plan", Kind.INFER, Lane.STANDARD)
UNKNOWN = ScopeView("infer.plan", 8, 8, 0, 0.0, 0.0)
KNOWN = replace(UNKNOWN, drain_per_s=80.0, round_trip_s=0.1, service_s=0.1)


def longest_queue(policy: BoundedWait, view: ScopeView, now_s: float = 1.0) -> int:
    """How many may wait, at this moment."""
    return next(waiting for waiting in range(5000) if policy.may_wait(FLOW, replace(view, waiting=waiting), now_s) is None)


def test_while_nothing_is_known_the_hard_bounds_hold() -> None:
    policy = BoundedWait(BoundedWaitConfig(max_waiting=12, max_wait_s=3.0))
    assert policy.may_wait(FLOW, UNKNOWN, 0.0) == 3.0
    assert longest_queue(policy, UNKNOWN) == 12


def test_the_queue_may_last_a_share_of_an_idle_round_trip() -> None:
    policy = BoundedWait(BoundedWaitConfig(wait_ratio=0.5, burst_wait_s=0))
    assert longest_queue(policy, KNOWN) == 4, "8 in flight in 0.1 s: the wait is 0.0125 s for each, and 0.05 s are allowed"
    assert longest_queue(policy, replace(KNOWN, inflight=80, limit=80)) == 40, (
        "the slots are not told, the number follows what is in flight"
    )


@pytest.mark.parametrize(
    ("round_trip_s", "service_s"), [(0.14, 0.1), (0.14, 0.14)], ids=["at the worker, measured", "inside the model server, hidden"]
)
def test_a_queue_behind_the_gate_is_taken_off(round_trip_s: float, service_s: float) -> None:
    policy = BoundedWait(BoundedWaitConfig(wait_ratio=0.75, burst_wait_s=0))
    assert longest_queue(policy, KNOWN) == 6
    queued = replace(KNOWN, round_trip_s=round_trip_s, service_s=service_s)
    assert longest_queue(policy, queued) == 2, "0.075 s less 0.04 s, at 0.14 / 8 s each"


def test_there_is_always_a_place_and_a_hard_end() -> None:
    policy = BoundedWait(BoundedWaitConfig(max_waiting=3, max_wait_s=0.02))
    assert longest_queue(policy, replace(KNOWN, round_trip_s=5.0)) >= 1
    assert longest_queue(policy, replace(KNOWN, inflight=500)) == 3
    assert policy.may_wait(FLOW, KNOWN, 1.0) == 0.02
    assert BoundedWait(BoundedWaitConfig(max_waiting=0)).may_wait(FLOW, KNOWN, 1.0) is None


def test_a_quick_target_has_a_least_wait() -> None:
    quick = replace(KNOWN, round_trip_s=0.001, service_s=0.001)
    policy = BoundedWait(BoundedWaitConfig(least_wait_s=0.01, burst_wait_s=0))
    assert longest_queue(policy, quick) == 80, "10 ms of 8 in flight for 1 ms each"


@given(
    st.lists(
        st.tuples(st.integers(0, 2000), st.integers(1, 500), st.sampled_from([0.0, 0.001, 0.1, 30.0]), st.sampled_from([1.0, 0.3, 0.0])),
        max_size=60,
    )
)
def test_hard_bounds_hold_whatever_is_measured(script: list[tuple[int, int, float, float]]) -> None:
    config = BoundedWaitConfig(max_waiting=100, max_wait_s=2.0, burst_wait_s=0)
    policy, now_s = BoundedWait(config), 0.0
    for waiting, inflight, round_trip_s, share in script:
        now_s += 0.05
        view = replace(KNOWN, waiting=waiting, inflight=inflight, round_trip_s=round_trip_s, service_s=round_trip_s * share)
        longest_s = policy.may_wait(FLOW, view, now_s)
        assert longest_s is None or 0 < longest_s <= 2.0
        assert waiting < 100 or longest_s is None
        assert isinstance(policy.may_start(FLOW, 0.2, view, now_s), bool)


# ---- CoDel ---------------------------------------------------------------------------------------------------------------------


def test_a_queue_that_stands_through_an_interval_is_cut_at_twice_the_target() -> None:
    codel = Codel()
    assert not codel.refuses(0.5, 0.02, 0.0, 0.1), "the first step of an interval always goes"
    assert not codel.refuses(0.5, 0.02, 0.05, 0.1), "one interval has to pass first"
    assert not codel.refuses(0.5, 0.02, 0.1, 0.1)
    assert codel.overloaded
    assert codel.refuses(0.041, 0.02, 0.11, 0.1)
    assert not codel.refuses(0.039, 0.02, 0.12, 0.1), "it waited over the target, not over twice the target"


def test_one_short_wait_in_an_interval_is_a_good_queue() -> None:
    codel = Codel()
    for now_s, waited_s in ((0.0, 0.5), (0.05, 0.019), (0.1, 0.5), (0.15, 0.5)):
        assert not codel.refuses(waited_s, 0.02, now_s, 0.1)
    assert not codel.overloaded


def test_an_empty_queue_ends_the_overload() -> None:
    codel = Codel()
    for now_s in (0.0, 0.05, 0.1):
        codel.refuses(0.5, 0.02, now_s, 0.1)
    assert codel.overloaded
    codel.is_empty(0.15, 0.1)
    assert not codel.refuses(0.5, 0.02, 0.16, 0.1)


def test_a_step_that_waited_in_a_standing_queue_is_refused_at_its_turn() -> None:
    policy = BoundedWait(BoundedWaitConfig(wait_ratio=0.6, burst_wait_s=0))
    started = [policy.may_start(FLOW, 0.2, replace(KNOWN, waiting=5), 1.0 + index * 0.03) for index in range(12)]
    assert started[:4] == [True] * 4, "no judgement before an interval is over"
    assert started.count(False) >= 4
    assert policy.may_start(FLOW, 0.03, replace(KNOWN, waiting=5), 1.37), "what waited for less than the allowance goes"


# ---- the hint ------------------------------------------------------------------------------------------------------------------


def test_the_hint_is_the_time_the_queue_takes_to_drain() -> None:
    policy = BoundedWait(BoundedWaitConfig(max_hint_s=10.0))
    view = replace(KNOWN, waiting=39)
    assert policy.retry_after_s(FLOW, UNKNOWN, 1.0, 0.5) is None
    assert policy.retry_after_s(FLOW, view, 1.0, 0.0) == pytest.approx(0.5)
    assert policy.retry_after_s(FLOW, view, 1.0, 0.5) == pytest.approx(0.625)
    assert policy.retry_after_s(FLOW, replace(view, drain_per_s=0.1), 1.0, 0.0) == 10.0


def test_new_parameters_hold_and_what_was_learnt_stays() -> None:
    policy = BoundedWait(BoundedWaitConfig(wait_ratio=0.5, burst_wait_s=0))
    assert longest_queue(policy, KNOWN) == 4
    policy.reconfigure(BoundedWaitConfig(wait_ratio=1.0, burst_wait_s=0))
    assert longest_queue(policy, KNOWN) == 8
    assert longest_queue(policy, replace(KNOWN, round_trip_s=0.15, service_s=0.15)) == 2, "the idle round trip is still known"


@pytest.mark.parametrize(
    "wrong", [{"max_waiting": -1}, {"max_wait_s": 0.0}, {"wait_ratio": 0.0}, {"least_wait_s": -1.0}, {"interval_s": 0.0}]
)
def test_wrong_parameters_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        BoundedWaitConfig(**wrong)  # type: ignore[arg-type]


def test_a_burst_may_wait_longer_until_that_was_not_enough() -> None:
    policy = BoundedWait(BoundedWaitConfig(wait_ratio=0.5, burst_wait_s=0.4, burst=20, calm_s=2.0))
    # 8 in flight, 100 ms each: 80 a second; the allowance is 50 ms, with the burst 450 ms, which 36 steps take.
    views = [replace(KNOWN, waiting=waiting) for waiting in range(60)]
    assert [policy.may_wait(FLOW, view, 10.0) is None for view in views].index(True) == 36
    lately = [replace(view, calm_s=1.9) for view in views]
    assert policy.may_wait(FLOW, lately[10], 10.5) is None, "refused lately: the allowance alone counts"
    assert policy.may_wait(FLOW, lately[3], 10.5) is not None
    assert policy.may_wait(FLOW, replace(views[10], calm_s=2.1), 14.5) is not None, "calm again"


def test_a_closed_loop_that_is_served_within_a_burst_is_never_refused() -> None:
    policy = BoundedWait(BoundedWaitConfig(burst_wait_s=0.5))
    view = replace(KNOWN, waiting=20)  # 28 callers, each comes again when it was answered
    for turn in range(200):
        assert policy.may_wait(FLOW, view, turn / 80) is not None
        assert policy.may_start(FLOW, 0.25, view, turn / 80)
