"""The concurrency limit of one scope with its wait queue: who goes in now, who waits, who is next.

The gate owns the counters and the queue; policies say how many (limit), which flow (fairness), which step (ordering), whether waiting is
allowed and what the hint is (backpressure). Tiers are the gate's own: the most important one that waits goes first, and when the queue
is full the newest step of the least important tier makes room for a more important one.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from gateway.core.admission import Refusal
from gateway.core.containment import Containment, a_count, a_hint, a_time_or_none, a_truth, an_order
from gateway.core.estimators import Average, Rate
from gateway.core.permit import Permit
from gateway.core.policies import PolicySet
from gateway.core.tier_queue import TierQueue
from gateway.policy import Ending, Named, OnError, Reject, Sample, ScopeView, Slot
from gateway.types import TIERS, Flow

UNLIMITED = 1_000_000
_FAILED = -1.0  # in place of a longest wait
_ANY_ORDER = (0.0,)


class Gate:
    def __init__(self, scope: str, policies: PolicySet, contain: Containment, random: Callable[[], float]) -> None:
        self.scope = scope
        self.inflight = 0
        self.waiting = 0
        self.drain, self.round_trip, self.service = Rate(), Average(), Average()
        self.refused_s = float("-inf")  # when a step was refused for this scope's load last
        self.unit = Average()  # service time of a cost unit, as steps were estimated
        self._contain = contain
        self._random = random
        self._limits = policies.all(Slot.LIMIT)
        self._batch_slots = 0
        self._limit = 0  # as of the last sample or change of parameters; 0 while not asked
        self._backpressure = policies.all(Slot.BACKPRESSURE)
        self._ordering = policies.one(Slot.ORDERING)
        self._tiers = [TierQueue(policies.one(Slot.FAIRNESS), contain) for _ in range(TIERS)]
        self._oldest: deque[Permit] = deque()  # by arrival; permits that left stay until they are first

    # ---- counters --------------------------------------------------------------------------------------------------------------

    def limit(self) -> int:
        """The smallest limit that a policy gives; a policy that fails, or is a shadow, does not count.

        Asked once between samples, since what a policy says depends on nothing else.
        """
        if self._limit:
            return self._limit
        smallest = UNLIMITED
        for named in self._limits:
            if not named.shadow:
                smallest = min(smallest, self._contain.call(named, "limit", a_count, UNLIMITED, self.scope))
        self._limit = smallest
        return smallest

    def batch_slots(self, slots: int) -> None:
        """See `policy.LimitPolicy`."""
        if slots != self._batch_slots:
            self._batch_slots, self._limit = slots, 0
            for named in self._limits:
                if hasattr(named.policy, "batch_slots"):
                    self._contain.call(named, "batch_slots", None, None, slots)

    def view(self, now_s: float) -> ScopeView:
        return ScopeView(
            self.scope,
            self.inflight,
            self.limit(),
            self.waiting,
            self._oldest_wait_s(now_s),
            self.drain.per_s(now_s),
            self.round_trip.value,
            self.service.value,
            now_s - self.refused_s,
        )

    # ---- in and out ------------------------------------------------------------------------------------------------------------

    def offer(self, permit: Permit, now_s: float) -> Refusal | None:
        """Grants the permit, lets it wait (is_waiting, until give_up_s), or refuses it."""
        for named in self._limits:
            if named.shadow and self.inflight >= self._contain.call(named, "limit", a_count, UNLIMITED, self.scope):
                self._contain.count(named, "shadow_rejected")
        if not self.waiting and self.inflight < self.limit():
            self._grant(permit, now_s)
            return None
        return self._queue(permit, now_s)

    def end(self, permit: Permit, sample: Sample, now_s: float) -> None:
        """A granted step has ended: the limits learn from it, and as many waiting ones as fit now are granted."""
        self.inflight -= 1
        if sample.round_trip_s > 0.0 and sample.ending is Ending.SUCCEEDED:
            self.drain.add(now_s)
            self.round_trip.add(sample.round_trip_s)
            self.service.add(sample.service_s)
            self.unit.add(sample.service_s / permit.flow.cost)
        for named in self._limits:
            self._contain.call(named, "on_sample", None, None, sample, now_s, self._random())
        if sample.cost != permit.flow.cost:
            self._tiers[permit.flow.tier].charge(permit, sample.cost - permit.flow.cost, now_s)
        self.changed(now_s)

    def changed(self, now_s: float) -> None:
        """What the limits say may be another number now."""
        self._limit = 0
        self.fill(now_s)

    def fill(self, now_s: float) -> None:
        while self.waiting and self.inflight < self.limit():
            permit = self._next(now_s)
            permit.refusal = self._too_late(permit, now_s)
            if permit.refusal is None:
                self._grant(permit, now_s)
            permit.wake()

    def abandon(self, permit: Permit, now_s: float) -> bool:
        """It does not wait any longer. False when it was granted or refused meanwhile."""
        if not permit.is_waiting:
            return False
        self._tiers[permit.flow.tier].remove(permit, now_s)
        self._left()
        return True

    def retry_after_s(self, flow: Flow, now_s: float, view: ScopeView | None = None) -> float | None:
        """The largest hint of the backpressure policies; None when none of them knows."""
        view = view or self.view(now_s)
        hints = [
            self._contain.call(named, "retry_after_s", a_hint, None, flow, view, now_s, self._random())
            for named in self._backpressure
            if not named.shadow
        ]
        return max((hint for hint in hints if hint is not None), default=None)

    # ---- the queue -------------------------------------------------------------------------------------------------------------

    def _queue(self, permit: Permit, now_s: float) -> Refusal | None:
        flow, view = permit.flow, self.view(now_s)
        longest_s, refused_by = self._longest_wait_s(flow, view, now_s)
        if refused_by is not None:
            victim = self._less_important(flow.tier)
            if victim is not None:
                ahead = sum(queue.waiting for queue in self._tiers[: flow.tier + 1])  # the others would be overtaken
                longest_s, refused_by = self._longest_wait_s(flow, replace(view, waiting=ahead), now_s, again=True)
            if refused_by is not None:
                return self._full(refused_by, flow, now_s)
            assert victim is not None
            self._displace(victim, now_s)
        permit.give_up_s = now_s + longest_s
        order = _ANY_ORDER
        if self._ordering:
            order = self._contain.call(self._ordering, "key", an_order, _ANY_ORDER, flow, permit.arrived_s, view)
        self._tiers[flow.tier].add(permit, order, now_s)
        self._oldest.append(permit)
        self.waiting += 1
        return None

    def _longest_wait_s(self, flow: Flow, view: ScopeView, now_s: float, *, again: bool = False) -> tuple[float, Named | None]:
        """How long it may wait, or the policy that does not let it."""
        longest_s = float("inf")
        for named in self._backpressure:
            otherwise = float("inf") if named.on_error is OnError.ADMIT else _FAILED
            wait_s = self._contain.call(named, "may_wait", a_time_or_none, otherwise, flow, view, now_s)
            if named.shadow:
                if wait_s is None and not again:
                    self._contain.count(named, "shadow_rejected")
            elif wait_s is None or wait_s == _FAILED:
                return 0.0, named
            else:
                longest_s = min(longest_s, wait_s)
        return longest_s, None

    def _full(self, named: Named, flow: Flow, now_s: float) -> Refusal:
        self._contain.count(named, "rejected")
        message = f"{self.scope} has {self.inflight} steps in flight and {self.waiting} waiting: no more may wait"
        return Refusal(Reject("QUEUE_FULL", message, self.scope, self.retry_after_s(flow, now_s)), named.name)

    def _less_important(self, tier: int) -> Permit | None:
        """The newest waiting permit of the least important tier that is less important than `tier`."""
        for queue in reversed(self._tiers[tier + 1 :]):
            if queue.waiting:
                return queue.newest()
        return None

    def _displace(self, victim: Permit, now_s: float) -> None:
        self.abandon(victim, now_s)
        message = f"{self.scope} is full, and a step of a more important tier came"
        victim.refusal = Refusal(Reject("DISPLACED", message, self.scope, self.retry_after_s(victim.flow, now_s)), "tiers")
        victim.wake()

    def _too_late(self, permit: Permit, now_s: float) -> Refusal | None:
        if not self._backpressure:
            return None
        waited_s, view = now_s - permit.arrived_s, self.view(now_s)
        for named in self._backpressure:
            if self._contain.call(named, "may_start", a_truth, True, permit.flow, waited_s, view, now_s):
                continue
            if named.shadow:
                self._contain.count(named, "shadow_rejected")
                continue
            self._contain.count(named, "rejected")
            message = f"the step waited {waited_s:.3f} s for {self.scope}, which is overloaded: too long to be of use"
            return Refusal(Reject("WAITED_TOO_LONG", message, self.scope, self.retry_after_s(permit.flow, now_s)), named.name)
        return None

    def _next(self, now_s: float) -> Permit:
        permit = next(queue for queue in self._tiers if queue.waiting).next(now_s)
        self._left()
        return permit

    def _grant(self, permit: Permit, now_s: float) -> None:
        self.inflight += 1
        permit.granted_s, permit.inflight = now_s, self.inflight
        self._tiers[permit.flow.tier].charge(permit, permit.flow.cost, now_s)

    def _left(self) -> None:
        self.waiting -= 1
        if len(self._oldest) > 2 * self.waiting + 64:
            self._oldest = deque(permit for permit in self._oldest if permit.is_waiting)

    def _oldest_wait_s(self, now_s: float) -> float:
        while self._oldest and not self._oldest[0].is_waiting:
            self._oldest.popleft()
        return now_s - self._oldest[0].arrived_s if self._oldest else 0.0
