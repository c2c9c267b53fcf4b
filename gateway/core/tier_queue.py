"""The waiting permits of one tier at one gate. Fairness picks the flow, ordering the step of that flow; without either, first come first
served."""

import heapq
from collections.abc import Hashable
from dataclasses import dataclass, field

from gateway.core.containment import Containment, a_key
from gateway.core.permit import Permit
from gateway.policy import Named, OrderKey
from gateway.types import Flow


@dataclass(slots=True)
class _Backlog:
    """The waiting permits of one key: a heap, where those that left stay until they surface."""

    heap: list[tuple[OrderKey, int, Permit]] = field(default_factory=list)
    waiting: int = 0
    told: bool = False  # the fairness policy knows that the key is active


class TierQueue:
    def __init__(self, fairness: Named | None, contain: Containment) -> None:
        self.waiting = 0
        self._fairness = fairness
        self._contain = contain
        self._backlogs: dict[Hashable, _Backlog] = {}
        self._untold: dict[Hashable, Flow] = {}  # keys that became active while the policy was suspended
        self._arrivals = 0
        self._newest: list[Permit] = []  # by arrival; permits that left stay until they are last

    def add(self, permit: Permit, order: OrderKey, now_s: float) -> None:
        permit.key = self._key(permit.flow)
        backlog = self._backlogs.get(permit.key)
        if backlog is None:
            backlog = self._backlogs[permit.key] = _Backlog()
            self._activate(permit.key, backlog, permit.flow, now_s)
        self._arrivals += 1
        heapq.heappush(backlog.heap, (order, self._arrivals, permit))
        backlog.waiting += 1
        self._newest.append(permit)
        self.waiting += 1
        permit.is_waiting = True

    def next(self, now_s: float) -> Permit:
        """Takes out the permit whose turn it is."""
        if self._untold:
            self._tell_untold(now_s)
        key = self._contain.call(self._fairness, "pick", a_key, None, now_s) if self._fairness else None
        if key not in self._backlogs:  # the policy failed or named a key that has nothing waiting: the longest active one
            key = next(iter(self._backlogs))
        heap = self._backlogs[key].heap
        permit = heapq.heappop(heap)[2]
        while not permit.is_waiting:
            permit = heapq.heappop(heap)[2]
        self.remove(permit, now_s)
        return permit

    def remove(self, permit: Permit, now_s: float) -> None:
        """It waits no longer, for whatever reason."""
        permit.is_waiting = False
        self.waiting -= 1
        backlog = self._backlogs[permit.key]
        backlog.waiting -= 1
        if not backlog.waiting:
            del self._backlogs[permit.key]
            self._untold.pop(permit.key, None)
            if self._fairness and backlog.told:
                self._contain.tell(self._fairness, "deactivate", permit.key, now_s)
        elif len(backlog.heap) > 2 * backlog.waiting + 64:  # mostly permits that left: bound the memory
            backlog.heap = [entry for entry in backlog.heap if entry[2].is_waiting]
            heapq.heapify(backlog.heap)
        if len(self._newest) > 2 * self.waiting + 64:
            self._newest = [one for one in self._newest if one.is_waiting]

    def newest(self) -> Permit:
        """The one that waits for the shortest time; call it only when something waits."""
        while not self._newest[-1].is_waiting:
            self._newest.pop()
        return self._newest[-1]

    def charge(self, permit: Permit, cost: float, now_s: float) -> None:
        if self._fairness:
            key = permit.key if permit.key is not None else self._key(permit.flow)
            permit.key = key
            self._contain.call(self._fairness, "charge", None, None, key, permit.flow, cost, now_s)

    def _activate(self, key: Hashable, backlog: _Backlog, flow: Flow, now_s: float) -> None:
        if self._fairness is None:
            return
        if self._contain.is_suspended(self._fairness):
            self._untold[key] = flow
            return
        backlog.told = True
        self._contain.call(self._fairness, "activate", None, None, key, flow, now_s)

    def _tell_untold(self, now_s: float) -> None:
        """Once the policy is back: without it the keys that it missed would never be picked."""
        assert self._fairness is not None
        if self._contain.is_suspended(self._fairness):
            return
        untold, self._untold = self._untold, {}
        for key, flow in untold.items():
            self._activate(key, self._backlogs[key], flow, now_s)

    def _key(self, flow: Flow) -> Hashable:
        return self._contain.call(self._fairness, "key", a_key, None, flow) if self._fairness else None
