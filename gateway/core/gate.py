"""The concurrency limit of one scope with its wait queue: who goes in now, who waits, who is next.

The gate owns the counters and the queue; policies say how many (limit), which flow (fairness), which step (ordering), whether waiting is
allowed and what the hint is (backpressure). Without a fairness policy all share one queue; without an ordering policy lanes go in
their order of precedence, first come first served inside a lane.
"""

import heapq
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.core.estimators import Rate
from gateway.core.faults import Faults
from gateway.policy import Named, Reject, ScopeView
from gateway.types import LANES, Flow, Lane

UNLIMITED = 1_000_000
_LANE_RANK: dict[Lane, float] = {lane: float(rank) for rank, lane in enumerate(LANES)}


@dataclass(slots=True, eq=False)
class Ticket:
    """A step's place at the gate. `wake` is called, once, when it is granted after waiting; set it when `waiting` is true."""

    flow: Flow
    arrived_s: float
    wake: Callable[[], None] = lambda: None
    give_up_s: float = float("inf")
    key: Hashable = None
    waiting: bool = False


@dataclass(frozen=True, slots=True)
class GatePolicies:
    limits: Sequence[Named] = ()
    fairness: Named | None = None
    ordering: Named | None = None
    backpressure: Sequence[Named] = ()


@dataclass(slots=True)
class _Backlog:
    """The waiting tickets of one fairness key: a heap, where tickets that gave up stay until they surface."""

    heap: list[tuple[float, int, Ticket]] = field(default_factory=list)
    waiting: int = 0


class Gate:
    def __init__(self, scope: str, policies: GatePolicies, faults: Faults, random: Callable[[], float]) -> None:
        self.scope = scope
        self.inflight = 0
        self.waiting = 0
        self.drain = Rate()
        self._policies = policies
        self._faults = faults
        self._random = random
        self._backlogs: dict[Hashable, _Backlog] = {}
        self._arrivals = 0
        self._oldest: deque[Ticket] = deque()  # by arrival; tickets that left stay until they are first

    def limit(self) -> int:
        """The smallest limit that a policy gives; a policy that raises does not count."""
        smallest = UNLIMITED
        for named in self._policies.limits:
            limit = self._ask(named, "limit", self.scope)
            if limit is not None:
                smallest = min(smallest, max(1, int(limit)))
        return smallest

    def view(self, now_s: float) -> ScopeView:
        return ScopeView(self.scope, self.inflight, self.limit(), self.waiting, self._oldest_wait_s(now_s), self.drain.per_s(now_s))

    def offer(self, ticket: Ticket, now_s: float) -> Reject | None:
        """Grants the ticket (waiting is False), queues it (waiting is True, give_up_s says until when), or rejects it."""
        if not self.waiting and self.inflight < self.limit():
            self.inflight += 1
            self._charge(ticket, now_s)
            return None
        return self._queue(ticket, now_s)

    def release(self, now_s: float, completed: bool) -> None:
        """A granted ticket ended: grants as many waiting ones as fit now."""
        self.inflight -= 1
        if completed:
            self.drain.add(now_s)
        self.fill(now_s)

    def fill(self, now_s: float) -> None:
        limit = self.limit() if self.waiting else 0
        while self.waiting and self.inflight < limit:
            ticket = self._next(now_s)
            self.inflight += 1
            self._charge(ticket, now_s)
            ticket.wake()

    def abandon(self, ticket: Ticket, now_s: float) -> bool:
        """The ticket does not wait any longer. False when it has been granted meanwhile: then the caller must release it."""
        if not ticket.waiting:
            return False
        ticket.waiting = False
        self._left(ticket.key, now_s)
        return True

    def retry_after_s(self, flow: Flow, now_s: float) -> float | None:
        """The largest hint of the backpressure policies; None when none of them knows."""
        hints = [self._ask(named, "retry_after_s", flow, self.view(now_s), now_s, self._random()) for named in self._policies.backpressure]
        return max((hint for hint in hints if hint is not None), default=None)

    def _queue(self, ticket: Ticket, now_s: float) -> Reject | None:
        flow, view = ticket.flow, self.view(now_s)
        longest_s = float("inf")
        for named in self._policies.backpressure:
            wait_s = self._ask(named, "may_wait", flow, view, now_s, default=0.0)
            if wait_s is None:
                message = f"{self.scope} has {self.inflight} steps in flight and {self.waiting} waiting: no more may wait"
                return Reject("QUEUE_FULL", message, self.scope, self.retry_after_s(flow, now_s))
            longest_s = min(longest_s, wait_s)
        ticket.give_up_s = now_s + longest_s
        fairness, ordering = self._policies.fairness, self._policies.ordering
        ticket.key = self._ask(fairness, "key", flow) if fairness else None
        order = self._ask(ordering, "key", flow, ticket.arrived_s, view) if ordering else None
        backlog = self._backlogs.get(ticket.key)
        if backlog is None:
            backlog = self._backlogs[ticket.key] = _Backlog()
            if fairness:
                self._ask(fairness, "activate", ticket.key, flow, now_s)
        self._arrivals += 1
        heapq.heappush(backlog.heap, (_LANE_RANK[flow.lane] if order is None else order, self._arrivals, ticket))
        backlog.waiting += 1
        self._oldest.append(ticket)
        self.waiting += 1
        ticket.waiting = True
        return None

    def _next(self, now_s: float) -> Ticket:
        fairness = self._policies.fairness
        key = self._ask(fairness, "pick", now_s) if fairness else None
        if key not in self._backlogs:  # the policy failed or named a key that has nothing waiting: the longest active one
            key = next(iter(self._backlogs))
        heap = self._backlogs[key].heap
        ticket = heapq.heappop(heap)[2]
        while not ticket.waiting:
            ticket = heapq.heappop(heap)[2]
        ticket.waiting = False
        self._left(key, now_s)
        return ticket

    def _left(self, key: Hashable, now_s: float) -> None:
        self.waiting -= 1
        backlog = self._backlogs[key]
        backlog.waiting -= 1
        if not backlog.waiting:
            del self._backlogs[key]
            if self._policies.fairness:
                self._ask(self._policies.fairness, "deactivate", key, now_s)
        elif len(backlog.heap) > 2 * backlog.waiting + 64:  # mostly tickets that gave up: bound the memory
            backlog.heap = [entry for entry in backlog.heap if entry[2].waiting]
            heapq.heapify(backlog.heap)
        if len(self._oldest) > 2 * self.waiting + 64:
            self._oldest = deque(ticket for ticket in self._oldest if ticket.waiting)

    def _charge(self, ticket: Ticket, now_s: float) -> None:
        fairness = self._policies.fairness
        if fairness:
            key = ticket.key if ticket.key is not None else self._ask(fairness, "key", ticket.flow)
            self._ask(fairness, "charge", key, ticket.flow, ticket.flow.cost, now_s)

    def _oldest_wait_s(self, now_s: float) -> float:
        while self._oldest and not self._oldest[0].waiting:
            self._oldest.popleft()
        return now_s - self._oldest[0].arrived_s if self._oldest else 0.0

    def _ask(self, named: Named, method: str, *arguments: Any, default: Any = None) -> Any:
        try:
            return getattr(named.policy, method)(*arguments)
        except Exception as error:
            self._faults.note(named, error)
            return default
