"""Admission policies and the tier classifier: bounds, runs that stay together, bounded state."""

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.core.priorities import COHORTS, PRIORITIES
from gateway.policy import ADMIT, Admit, Ending, Reject, Sample, ScopeView
from gateway.types import JSON, TIERS, Flow, Kind, Lane, Payload, Step
from plugins.cinnamon import Cinnamon, CinnamonConfig
from plugins.dagor import Dagor, DagorConfig
from plugins.deadline import Deadline, DeadlineConfig
from plugins.tenant_tiers import TenantTiers, TenantTiersConfig
from plugins.token_bucket import TokenBucket, TokenBucketConfig

FLOW = Flow("acme", "x", Kind.TOOL, Lane.STANDARD)
IDLE = ScopeView("tool.x", 0, 8, 0, 0.0, 0.0)
FULL = ScopeView("tool.x", 8, 8, 4, 0.2, 40.0, 0.2, 0.1)
BUSY = replace(FULL, waiting=1)  # exactly the short queue that is meant to be there
DONE = Sample("tool.x", Ending.SUCCEEDED, 0.1, 0.02, 0.07, 3)


# ---- cinnamon ------------------------------------------------------------------------------------------------------------------


def overload(policy: Cinnamon, flows: Sequence[Flow], ticks: int = 12, began_s: float = 0.0) -> float:
    """Arrivals of 400 a second in turn, of which one in four ends and the gate refuses a few; the limit is 8, and one waits.

    Gives the time after it.
    """
    source = random.Random(1)
    admitted: list[Flow] = []
    for number in range(200 * ticks):
        now_s = began_s + number / 400
        flow = flows[number % len(flows)]
        if not isinstance(policy.decide(flow, BUSY, now_s, source.random()), Reject):
            admitted.append(flow)
        if number % 100 == 99 and admitted:
            policy.release(admitted.pop(), None, now_s)
        if number % 4 == 0 and admitted:
            policy.ended(admitted.pop(0), None, DONE, now_s)
    return began_s + ticks / 2


def is_shed(policy: Cinnamon, flow: Flow, now_s: float, source: float = 0.99) -> bool:
    decision = policy.decide(flow, FULL, now_s, source)
    if isinstance(decision, Reject):
        return True
    policy.release(flow, decision.state, now_s)
    return False


def test_cinnamon_sheds_the_share_that_is_too_much() -> None:
    policy = Cinnamon(CinnamonConfig())
    overload(policy, [FLOW])
    assert policy.ratio == pytest.approx(0.75, abs=0.1)
    refusal = policy.decide(FLOW, FULL, 6.0, 0.99)
    assert isinstance(refusal, Reject)
    assert (refusal.reason, refusal.scope, refusal.drain_hint) == ("SHED", "tool.x", True)


def test_cinnamon_sheds_nothing_while_a_slot_is_free() -> None:
    policy = Cinnamon(CinnamonConfig())
    now_s = overload(policy, [FLOW])
    free = replace(FULL, inflight=7, waiting=0)
    assert all(not isinstance(policy.decide(FLOW, free, now_s, draw / 10), Reject) for draw in range(10))


def test_cinnamon_forgets_an_overload() -> None:
    policy = Cinnamon(CinnamonConfig())
    now_s = overload(policy, [FLOW])
    for _ in range(400):
        now_s += 0.02
        policy.decide(FLOW, IDLE, now_s, 0.5)
        policy.ended(FLOW, None, DONE, now_s)
    assert policy.ratio == 0.0


def test_cinnamon_sheds_the_less_important_first() -> None:
    flows = [replace(FLOW, tier=tier) for tier in range(TIERS)]
    policy = Cinnamon(CinnamonConfig())
    now_s = overload(policy, flows)
    shed = [is_shed(policy, flow, now_s) for flow in flows]
    assert shed == sorted(shed)
    assert not shed[0]
    assert shed[-1]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 0.999)), min_size=50, max_size=150), st.integers(0, 40))
def test_cinnamon_at_one_instant_never_sheds_a_tier_before_a_lower_one(arrivals: list[tuple[int, float]], waiting: int) -> None:
    policy = Cinnamon(CinnamonConfig())
    view = replace(FULL, waiting=waiting)
    for number, (tier, draw) in enumerate(arrivals):
        flow = replace(FLOW, tier=tier)
        if policy.decide(flow, view, number / 100, draw) is ADMIT and number % 3:
            policy.ended(flow, None, DONE, number / 100)
        assert 0 <= policy.ratio <= 1
    shed = [is_shed_at(policy, replace(FLOW, tier=tier), view, len(arrivals) / 100) for tier in range(TIERS)]
    assert shed == sorted(shed)


def is_shed_at(policy: Cinnamon, flow: Flow, view: ScopeView, now_s: float) -> bool:
    decision = policy.decide(flow, view, now_s, 0.5)
    if not isinstance(decision, Reject):
        policy.release(flow, decision.state, now_s)
    return isinstance(decision, Reject)


def test_cinnamon_keeps_a_begun_run_and_says_that_it_is_favoured() -> None:
    policy = Cinnamon(CinnamonConfig())
    begun = replace(FLOW, run="begun")
    assert policy.decide(begun, IDLE, 0.0, 0.0) is ADMIT
    policy.ended(begun, None, DONE, 0.1)
    now_s = overload(policy, [replace(FLOW, run=f"other{number}") for number in range(2400)], began_s=0.2)
    assert policy.decide(begun, FULL, now_s, 0.0) == Admit(favoured=True)
    new = [replace(FLOW, run=f"new{number}") for number in range(100)]
    assert sum(is_shed(policy, flow, now_s) for flow in new) > 60


def test_cinnamon_treats_all_first_steps_of_a_run_alike() -> None:
    policy = Cinnamon(CinnamonConfig())
    now_s = overload(policy, [replace(FLOW, run=f"run{number}") for number in range(2400)])
    for number in range(50):
        flow = replace(FLOW, run=f"new{number}")
        assert len({is_shed(policy, flow, now_s, draw / 5) for draw in range(5)}) == 1


def test_cinnamon_forgets_a_run_that_the_gate_refused() -> None:
    policy = Cinnamon(CinnamonConfig())
    flow = replace(FLOW, run="run")
    policy.decide(flow, IDLE, 0.0, 0.0)
    policy.release(flow, None, 0.0)
    assert policy._runs == {}


def test_cinnamons_state_is_bounded_and_stays_when_reconfigured() -> None:
    policy = Cinnamon(CinnamonConfig(max_runs=50))
    for number in range(3000):
        flow = replace(FLOW, run=f"run{number}")
        policy.decide(flow, IDLE, number / 100, 0.0)
        policy.ended(flow, None, DONE, number / 100)
    assert len(policy._runs) == 50
    assert len(policy._recent) == 1000
    assert policy._under_way == [0] * TIERS
    policy.reconfigure(CinnamonConfig(max_runs=10))
    assert list(policy._runs) == [("acme", f"run{number}") for number in range(2990, 3000)]


def test_cinnamon_does_not_learn_from_what_was_never_dispatched() -> None:
    policy = Cinnamon(CinnamonConfig())
    for number in range(1000):
        policy.decide(FLOW, FULL, number / 100, 0.5)
        policy.ended(FLOW, None, replace(DONE, ending=Ending.IGNORED, round_trip_s=0.0), number / 100)
    assert policy.ratio == 0.0


@pytest.mark.parametrize("wrong", [{"ki": 0.0}, {"kp": -1.0}, {"tick_s": 0.0}, {"max_runs": 0}, {"ki": 4.0}])
def test_cinnamon_refuses_bad_parameters(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        CinnamonConfig(**wrong)  # type: ignore[arg-type]


# ---- dagor ---------------------------------------------------------------------------------------------------------------------


def dagor_window(policy: Dagor, now_s: float, wait_s: float, steps: int = 1000) -> int:
    """A window of arrivals spread over tiers and runs, whose workers report wait_s; how many were admitted."""
    admitted = 0
    for number in range(steps):
        flow = replace(FLOW, tier=number % TIERS, run=f"run{number}")
        if not isinstance(policy.decide(flow, FULL, now_s + number / steps, 0.0), Reject):
            admitted += 1
            policy.ended(flow, None, replace(DONE, worker_wait_s=wait_s), now_s + number / steps)
    return admitted


def test_dagor_goes_down_by_5_percent_and_up_by_1() -> None:
    policy = Dagor(DagorConfig())
    assert dagor_window(policy, 0.0, 0.05) == 1000
    assert 930 <= dagor_window(policy, 1.0, 0.05) <= 951
    lower = dagor_window(policy, 2.0, 0.001)
    assert 870 <= lower <= 910
    assert lower < dagor_window(policy, 3.0, 0.001) <= lower * 1.01 + 1


def test_dagor_sheds_the_last_tier_first_and_whole_runs() -> None:
    policy = Dagor(DagorConfig())
    for window in range(4):
        dagor_window(policy, float(window), 0.05)
    assert 4 * COHORTS < policy.level < PRIORITIES
    flow = replace(FLOW, tier=5, run="one")
    assert len({type(policy.decide(flow, FULL, 4.0 + draw / 100, draw / 10)) for draw in range(10)}) == 1


def test_dagor_uses_the_steps_own_wait_without_a_report_and_recovers_from_nothing() -> None:
    policy = Dagor(DagorConfig())
    policy.decide(FLOW, FULL, 0.0, 0.0)
    policy.ended(FLOW, None, replace(DONE, queue_s=0.03), 0.5)
    policy.decide(FLOW, FULL, 1.0, 0.0)
    assert policy.level <= FLOW.tier * COHORTS + COHORTS
    for second in range(2, 6):
        last = policy.decide(FLOW, FULL, float(second), 0.0)
    assert last is ADMIT


# ---- deadline ------------------------------------------------------------------------------------------------------------------


def test_deadline_by_hand() -> None:
    policy = Deadline(DeadlineConfig())
    enough, short = replace(FLOW, deadline_s=10.31), replace(FLOW, deadline_s=10.29)
    assert policy.decide(enough, FULL, 10.0, 0.0) is ADMIT, "4 / 40 + .2 = .3"
    refusal = policy.decide(short, FULL, 10.0, 0.0)
    assert isinstance(refusal, Reject)
    assert (refusal.reason, refusal.scope, refusal.drain_hint) == ("DEADLINE_UNREACHABLE", "tool.x", True)
    assert policy.decide(short, replace(FULL, inflight=7, waiting=4), 10.0, 0.0) is ADMIT, "a slot is free"
    policy.reconfigure(DeadlineConfig(slack=2.0))
    assert policy.decide(short, FULL, 10.0, 0.0) is ADMIT


@pytest.mark.parametrize("view", [replace(FULL, round_trip_s=0.0), replace(FULL, drain_per_s=0.0)])
def test_deadline_does_not_refuse_on_what_it_does_not_know(view: ScopeView) -> None:
    assert Deadline(DeadlineConfig()).decide(replace(FLOW, deadline_s=10.01), view, 10.0, 0.0) is ADMIT
    assert Deadline(DeadlineConfig()).decide(FLOW, FULL, 10.0, 0.0) is ADMIT, "no deadline"


# ---- token bucket --------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.5), st.floats(0.1, 5)), max_size=80))
def test_token_bucket_keeps_both_rates(arrivals: list[tuple[float, float]]) -> None:
    policy = TokenBucket(TokenBucketConfig(rate_per_s=4, burst=6, requests_per_s=2, request_burst=3))
    now_s = cost = 0.0
    requests = 0
    for gap_s, step_cost in arrivals:
        now_s += gap_s
        if policy.decide(replace(FLOW, cost=step_cost), FULL, now_s, 0.0) is ADMIT:
            cost, requests = cost + step_cost, requests + 1
        assert cost <= 6 + 4 * now_s + 1e-6
        assert requests <= 3 + 2 * now_s + 1e-6


def test_token_bucket_takes_from_both_or_none_and_gives_both_back() -> None:
    policy = TokenBucket(TokenBucketConfig(rate_per_s=1, burst=2, requests_per_s=0.5, request_burst=1))
    assert policy.decide(FLOW, FULL, 0.0, 0.0) is ADMIT
    refusal = policy.decide(FLOW, FULL, 0.0, 0.0)
    assert isinstance(refusal, Reject)
    assert refusal.retry_after_s == pytest.approx(2.0)
    assert "requests a second" in refusal.message
    policy.release(FLOW, None, 0.0)
    assert policy.decide(replace(FLOW, cost=2.0), FULL, 0.0, 0.0) is ADMIT, "the refusal took no cost units, the release gave them back"


def test_token_bucket_by_tenant_and_reconfigured() -> None:
    policy = TokenBucket(TokenBucketConfig(requests_per_s=1, request_burst=1, tenant_requests={"free": 0.0}, max_tenants=5))
    free = replace(FLOW, tenant="free")
    assert all(policy.decide(free, FULL, 0.0, 0.0) is ADMIT for _ in range(50))
    assert policy.decide(FLOW, FULL, 0.0, 0.0) is ADMIT
    policy.reconfigure(TokenBucketConfig(requests_per_s=10, request_burst=1))
    assert isinstance(policy.decide(FLOW, FULL, 0.05, 0.0), Reject), "what was in the bucket stays"
    assert policy.decide(FLOW, FULL, 0.15, 0.0) is ADMIT
    for number in range(20):
        policy.decide(replace(FLOW, tenant=f"t{number}"), FULL, 1.0, 0.0)
    policy.reconfigure(TokenBucketConfig(max_tenants=2))
    assert list(policy._buckets) == ["t18", "t19"]


# ---- tiers ---------------------------------------------------------------------------------------------------------------------


def test_important_tenants_go_one_tier_up() -> None:
    policy = TenantTiers(TenantTiersConfig(important=("gold",)))
    found = []
    for tenant in ("gold", "acme"):
        for lane, tier in ((Lane.INTERACTIVE, 1), (Lane.STANDARD, 3), (Lane.BATCH, 5)):
            step = Step("1", tenant, Kind.TOOL, "x", Payload(b"", JSON), 0.0, lane)
            found.append(policy.classify(step, replace(FLOW, tenant=tenant, lane=lane, tier=tier)).tier)
    assert found == [0, 2, 4, 1, 3, 5]
    policy.reconfigure(TenantTiersConfig())
    assert policy.classify(Step("1", "gold", Kind.TOOL, "x", Payload(), 0.0), replace(FLOW, tenant="gold")).tier == FLOW.tier
