"""The gate of a target and what is around it: limits, the queue, tiers, shadows. Driven without any waiting: time is a number."""

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.core.containment import MOST_SLOW_S, Containment
from gateway.core.permit import Permit
from gateway.core.permits import Permits
from gateway.core.policies import PolicyEntry, PolicySet
from gateway.policy import ADMIT, Decision, Ending, OnError, PolicyType, Reject, Sample, ScopeView, Slot
from gateway.testing import ManualClock
from gateway.types import LANE_TIER, TIERS, Flow, Kind, Lane
from plugins.bounded_wait import BoundedWait, BoundedWaitConfig
from plugins.fixed_limit import FixedLimit, FixedLimitConfig

FLOW = Flow("t", "x", Kind.TOOL, Lane.STANDARD)


@dataclass
class Rig:
    """Permits for one scope, and what was granted or refused after it had waited."""

    permits: Permits
    contain: Containment
    reports: list[str]
    entries: list[PolicyEntry]
    woken: list[Permit] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)  # policy and reason, as observers hear it

    @property
    def gate(self) -> Any:
        return self.permits.gate("tool.x")

    def enter(self, tier: int = 3, tenant: str = "t", at_s: float = 0.0, **changes: Any) -> Permit:
        permit = self.permits.enter(replace(FLOW, tier=tier, tenant=tenant, **changes), at_s)
        permit.wake = lambda: self._wake(permit, at_s)
        return permit

    def _wake(self, permit: Permit, at_s: float) -> None:
        self.woken.append(permit)

    def end(self, permit: Permit, at_s: float = 1.0, service_s: float = 0.0, ending: Ending = Ending.SUCCEEDED) -> None:
        self.permits.end(permit, Sample("tool.x", ending, service_s, 0.0, service_s, 0), at_s)


def entry(slot: Slot, build: Any, name: str = "", config: Any = None, **more: Any) -> PolicyEntry:
    name = name or slot.value
    return PolicyEntry(name, PolicyType(name, slot, type(config), build), config, more.pop("on_error", OnError.ADMIT), **more)


def rig(*entries: PolicyEntry, clock: ManualClock | None = None) -> Rig:
    by_slot: dict[Slot, list[PolicyEntry]] = {}
    for one in entries:
        by_slot.setdefault(one.type.slot, []).append(one)
    reports: list[str] = []
    contain = Containment(lambda named, what: reports.append(f"{named.name}: {what}"), (clock or ManualClock()).now_s)
    return Rig(Permits(PolicySet(by_slot), contain, lambda: 0.5), contain, reports, list(entries))


def limit(count: int, **more: Any) -> PolicyEntry:
    return entry(Slot.LIMIT, FixedLimit, config=FixedLimitConfig(limit=count), **more)


def bound(waiting: int, **more: Any) -> PolicyEntry:
    return entry(Slot.BACKPRESSURE, BoundedWait, config=BoundedWaitConfig(max_waiting=waiting), **more)


# ---- the limit and the queue ---------------------------------------------------------------------------------------------------


def test_grants_up_to_the_limit_then_queues_then_refuses() -> None:
    r = rig(limit(2), bound(1))
    permits = [r.enter() for _ in range(4)]
    assert [permit.is_waiting for permit in permits] == [False, False, True, False]
    assert [permit.refusal for permit in permits[:3]] == [None] * 3
    refusal = permits[3].refusal
    assert refusal
    assert (refusal.policy, refusal.reject.reason, refusal.reject.scope) == ("backpressure", "QUEUE_FULL", "tool.x")
    assert refusal.reject.retry_after_s is None, "no hint while no drain rate is known"
    assert r.contain.counts == {("backpressure", "rejected"): 1}


def test_the_hint_is_the_measured_drain_time() -> None:
    r = rig(limit(1), bound(2))
    for index in range(200):
        permit = r.enter(at_s=index * 0.1)
        assert not permit.refusal
        r.end(permit, index * 0.1 + 0.1, service_s=0.1)
    for _ in range(2):
        r.enter(at_s=20.0)
    hint = r.gate.retry_after_s(FLOW, 20.0)
    assert hint is not None
    assert 0.15 < hint < 0.35, "two waiting places at ten a second, and up to half more"


def test_the_time_to_wait_is_the_shortest_that_a_policy_allows() -> None:
    short = entry(Slot.BACKPRESSURE, BoundedWait, "short", BoundedWaitConfig(max_wait_s=0.5))
    r = rig(limit(1), bound(10), short)
    r.enter()
    waiting = r.enter(at_s=7.0)
    assert waiting.give_up_s == 7.5
    assert r.permits.give_up(waiting, 7.5)
    assert waiting.refusal
    assert waiting.refusal.reject.reason == "WAIT_TIMEOUT"
    assert r.gate.waiting == 0


def test_a_permit_that_was_granted_in_the_last_moment_is_kept() -> None:
    r = rig(limit(1), bound(10))
    first, second = r.enter(), r.enter()
    r.end(first, 1.0)
    assert not r.permits.give_up(second, 1.0), "it has the permit already"
    r.permits.woken(second, 1.0)
    assert second.refusal is None
    assert (second.granted_s, r.gate.inflight) == (1.0, 1)
    r.end(second, 2.0)
    assert r.gate.inflight == 0


# ---- tiers ---------------------------------------------------------------------------------------------------------------------


def test_tiers_go_strictly_and_permits_of_a_tier_by_arrival() -> None:
    r = rig(limit(1))
    running = r.enter()
    waiting = [r.enter(tier) for tier in (5, 3, 1, 5, 0, 4, 1, 2)]
    for _ in waiting:
        r.end(running)
        running = r.woken[-1]
    assert [waiting.index(permit) for permit in r.woken] == [4, 2, 6, 7, 1, 5, 0, 3]


def test_a_lane_gives_its_tier() -> None:
    assert [LANE_TIER[lane] for lane in (Lane.INTERACTIVE, Lane.STANDARD, Lane.BATCH)] == [1, 3, 5]
    assert max(LANE_TIER.values()) < TIERS


def test_a_full_queue_gives_up_the_newest_of_its_least_important_tier() -> None:
    r = rig(limit(1), bound(3))
    r.enter()
    standard, old_batch, new_batch = r.enter(3), r.enter(5), r.enter(5)
    urgent = r.enter(1)
    assert urgent.is_waiting
    assert r.woken == [new_batch]
    assert new_batch.refusal
    assert (new_batch.refusal.reject.reason, new_batch.refusal.policy) == ("DISPLACED", "tiers")
    assert not new_batch.is_waiting
    r.enter(1)
    assert r.woken == [new_batch, old_batch]
    same = r.enter(3)
    assert same.refusal, "a step of its own tier is not displaced"
    assert same.refusal.reject.reason == "QUEUE_FULL"
    assert standard.is_waiting
    assert r.gate.waiting == 3


def test_nobody_is_displaced_for_a_step_that_could_not_wait_anyway() -> None:
    r = rig(limit(1), bound(0))
    r.enter()
    refused = r.enter(0)
    assert refused.refusal
    assert not r.woken
    nothing = rig(limit(1), bound(2), entry(Slot.BACKPRESSURE, lambda config: No(), "no"))
    nothing.enter()
    assert nothing.enter(0).refusal
    assert nothing.woken == []


class No:
    """Nobody may wait."""

    def may_wait(self, flow: Flow, view: ScopeView, now_s: float) -> float | None:
        return None

    def may_start(self, flow: Flow, waited_s: float, view: ScopeView, now_s: float) -> bool:
        return False

    def retry_after_s(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> float | None:
        return 3.0


class Yes(No):
    """Everybody may wait, and nobody may start."""

    def may_wait(self, flow: Flow, view: ScopeView, now_s: float) -> float | None:
        return 10.0


def test_whoever_waited_too_long_is_refused_when_its_turn_comes() -> None:
    r = rig(limit(1), entry(Slot.BACKPRESSURE, lambda config: Yes(), "late"))
    running = r.enter()
    waiting = [r.enter(), r.enter()]
    r.end(running)
    assert r.woken == waiting
    reasons = [permit.refusal and (permit.refusal.policy, permit.refusal.reject.reason) for permit in waiting]
    assert reasons == [("late", "WAITED_TOO_LONG")] * 2
    assert waiting[0].refusal
    assert waiting[0].refusal.reject.retry_after_s == 3.0
    assert (r.gate.inflight, r.gate.waiting) == (0, 0)
    assert r.contain.counts == {("late", "rejected"): 2}


# ---- fairness ------------------------------------------------------------------------------------------------------------------


class RoundRobin:
    """The smallest fairness policy: keys take turns."""

    def __init__(self, config: object = None) -> None:
        self.active: list[Hashable] = []
        self.charged: list[tuple[Hashable, float]] = []

    def key(self, flow: Flow) -> Hashable:
        return flow.tenant

    def activate(self, key: Hashable, flow: Flow, now_s: float) -> None:
        assert key not in self.active
        self.active.append(key)

    def deactivate(self, key: Hashable, now_s: float) -> None:
        self.active.remove(key)

    def pick(self, now_s: float) -> Hashable:
        self.active.append(self.active.pop(0))
        return self.active[-1]

    def charge(self, key: Hashable, flow: Flow, cost: float, now_s: float) -> None:
        self.charged.append((key, cost))


def drain(r: Rig, running: Permit) -> list[Permit]:
    """Ends one after the other until nothing waits."""
    while r.gate.waiting:
        r.end(running)
        running = r.woken[-1]
    return r.woken


def test_fairness_picks_the_flow() -> None:
    r = rig(limit(1), entry(Slot.FAIRNESS, RoundRobin))
    running = r.enter()
    for tenant in "aaab":
        r.enter(tenant=tenant)
    assert [permit.flow.tenant for permit in drain(r, running)] == ["a", "b", "a", "a"]
    assert not r.reports


def test_each_scope_and_tier_has_a_fairness_object_of_its_own() -> None:
    fair = entry(Slot.FAIRNESS, RoundRobin)
    r = rig(limit(1), fair)
    r.enter()
    for tier in (1, 3):
        for tenant in "ab":
            r.enter(tier, tenant)
    r.permits.gate("tool.y")
    assert len(fair.objects) == 2 * TIERS
    assert [one.active for one in fair.objects[:TIERS]] == [[], ["a", "b"], [], ["a", "b"], [], []]
    assert all(not one.active for one in fair.objects[TIERS:])


def test_the_estimate_is_charged_at_dispatch_and_the_measured_rest_at_the_end() -> None:
    fair = entry(Slot.FAIRNESS, RoundRobin)
    r = rig(limit(10), fair)
    for _ in range(3):
        r.end(r.enter(cost=2.0), service_s=0.1)
    charged = fair.objects[3].charged
    assert charged[0] == ("t", 2.0)
    assert sum(cost for _, cost in charged) == 6.0, "an average step costs what was estimated"
    del charged[:]
    r.end(r.enter(cost=2.0), service_s=0.4)
    r.end(r.enter(cost=2.0), service_s=0.0, ending=Ending.DROPPED)
    assert charged[0] == ("t", 2.0)
    assert charged[1][0] == "t"
    assert 5.0 < charged[1][1] < 6.1, "four times the service time costs four times as much"
    assert charged[2:] == [("t", 2.0)], "a step without a service time stays at its estimate"


def test_a_fairness_policy_that_raises_does_not_stop_the_gate() -> None:
    class Broken:
        def __getattr__(self, name: str) -> object:
            raise ZeroDivisionError(name)

    r = rig(limit(1), entry(Slot.FAIRNESS, lambda config: Broken()))
    running, waiting = r.enter(), r.enter()
    r.end(running)
    assert r.woken == [waiting]
    assert r.contain.counts["fairness", "faults"] >= 2
    assert all(report.startswith("fairness: ") for report in r.reports)


class Slow(RoundRobin):
    """Each pick takes as long as `takes_s` says."""

    clock = ManualClock()
    takes_s = 0.0

    def pick(self, now_s: float) -> Hashable:
        self.clock.advance(self.takes_s)
        return super().pick(now_s)


def test_keys_that_came_and_went_while_fairness_was_suspended_are_made_known_to_it() -> None:
    clock = ManualClock()
    fair = entry(Slot.FAIRNESS, Slow)
    r = rig(limit(1), fair, clock=clock)
    running = r.enter()
    policy = fair.objects[3]
    policy.clock, policy.takes_s = clock, MOST_SLOW_S / 5
    for tenant in "aabbccd":
        r.enter(tenant=tenant)
    for _ in range(5):
        r.end(running)
        running = r.woken[-1]
    assert r.contain.counts["fairness", "suspended"] == 1
    policy.takes_s = 0.0
    r.enter(tenant="new")
    r.end(running)  # while suspended the longest active key goes first
    r.end(r.woken[-1])
    clock.advance(11.0)
    r.enter(tenant="newer")
    drain(r, r.woken[-1])
    assert policy.active == []
    assert {permit.flow.tenant for permit in r.woken} == {*"abcd", "new", "newer"}
    assert r.contain.counts["fairness", "faults"] == 0


# ---- shadows -------------------------------------------------------------------------------------------------------------------


class Never:
    """Admits nobody."""

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        return Reject("NO", "no", drain_hint=True)

    def release(self, flow: Flow, state: object, now_s: float) -> None:
        raise AssertionError("it reserved nothing")

    def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None:
        raise AssertionError("it admitted nothing")


def test_a_shadow_decides_and_is_counted_and_nothing_else() -> None:
    never = entry(Slot.ADMISSION, lambda config: Never(), "never", shadow=True)
    narrow = limit(1, name="narrow", shadow=True)
    nobody = entry(Slot.BACKPRESSURE, lambda config: No(), "nobody", shadow=True)
    r = rig(never, narrow, limit(2), bound(5), nobody)
    permits = [r.enter() for _ in range(4)]
    assert [permit.refusal for permit in permits] == [None] * 4
    assert [permit.is_waiting for permit in permits] == [False, False, True, True]
    r.end(permits[0])
    assert r.woken == [permits[2]]
    counts = dict(r.contain.counts)
    assert counts[("never", "shadow_rejected")] == 4
    assert counts[("narrow", "shadow_rejected")] == 3, "once for each step that it would have kept out"
    assert counts[("nobody", "shadow_rejected")] == 3, "two would not have waited, one would not have started"
    assert ("never", "rejected") not in counts
    assert not r.reports


def test_a_refusal_can_carry_the_hint_of_the_target() -> None:
    r = rig(entry(Slot.ADMISSION, lambda config: Never(), "never"), entry(Slot.BACKPRESSURE, lambda config: Yes(), "late"))
    refusal = r.enter().refusal
    assert refusal
    assert (refusal.policy, refusal.reject.retry_after_s) == ("never", 3.0)


def test_a_refusal_releases_what_was_reserved_and_an_admission_policy_can_be_per_scope() -> None:
    class Counting:
        def __init__(self, config: object) -> None:
            self.held = 0

        def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
            self.held += 1
            return ADMIT

        def release(self, flow: Flow, state: object, now_s: float) -> None:
            self.held -= 1

        def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None:
            self.held -= 1

    single = entry(Slot.ADMISSION, Counting, "single")
    scoped = PolicyEntry("scoped", PolicyType("scoped", Slot.ADMISSION, type(None), Counting, per_scope=True), None, OnError.ADMIT)
    r = rig(single, scoped, limit(1), bound(1))
    running, waiting, refused = r.enter(), r.enter(), r.enter()
    other = r.permits.enter(replace(FLOW, target="y"), 0.0)
    assert refused.refusal
    assert [one.held for one in single.objects + scoped.objects] == [3, 2, 1]
    assert r.permits.give_up(waiting, 1.0)
    r.end(running)
    r.permits.end(other, Sample("tool.y", Ending.IGNORED, 0.0, 0.0, 0.0, 0), 1.0)
    assert [one.held for one in single.objects + scoped.objects] == [0, 0, 0]


# ---- always --------------------------------------------------------------------------------------------------------------------

actions = st.lists(st.tuples(st.sampled_from(["offer", "release", "abandon"]), st.integers(0, 50), st.integers(0, 5)), max_size=120)


@given(actions, st.integers(1, 5), st.integers(0, 8), st.booleans())
def test_counts_never_leak(script: list[tuple[str, int, int]], most: int, max_waiting: int, fair: bool) -> None:
    entries = [limit(most), bound(max_waiting)] + ([entry(Slot.FAIRNESS, RoundRobin)] if fair else [])
    r = rig(*entries)
    granted: list[Permit] = []
    waiting: list[Permit] = []
    now_s = 0.0
    for action, pick, tier in script:
        now_s += 0.001
        if action == "offer":
            permit = r.enter(tier, f"t{pick % 3}", now_s)
            if permit.is_waiting:
                waiting.append(permit)
            elif not permit.refusal:
                granted.append(permit)
        elif action == "release" and granted:
            r.end(granted.pop(pick % len(granted)), now_s)
        elif action == "abandon" and waiting:
            assert r.permits.give_up(waiting.pop(pick % len(waiting)), now_s)
        for permit in r.woken:
            waiting.remove(permit)
            r.permits.woken(permit, now_s)
            if not permit.refusal:
                granted.append(permit)
        r.woken.clear()
        assert r.gate.inflight == len(granted) <= most
        assert r.gate.waiting == len(waiting) <= max_waiting
        assert not waiting or r.gate.inflight == most, "nobody waits while there is room"
    assert not r.reports


def test_the_slots_of_batches_reach_the_limits_that_want_to_know() -> None:
    from plugins.vegas import Vegas, VegasConfig

    r = rig(entry(Slot.LIMIT, Vegas, "vegas", VegasConfig(initial=4)), limit(50))
    assert r.permits.gate("tool.echo").limit() == 4
    r.permits.gate("tool.echo").batch_slots(32)
    assert r.permits.gate("tool.echo").limit() == 32
    r.permits.gate("tool.echo").batch_slots(64)
    assert r.permits.gate("tool.echo").limit() == 50, "a fixed limit says what it said"
