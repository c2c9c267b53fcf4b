"""Question: may a step wait for a permit, how long, and when should a refused client come back?

Two hard bounds: at most `max_waiting` steps wait for each target and gateway, and none longer than `max_wait_s`. Within them a queue is
there to keep the target busy, and a longer one only makes everybody late. So a step may wait only where the expected wait is within an
allowance, which is relative to what a step takes when nothing waits:

    expected  = (waiting + 1) * round trip / in flight                              (Little's law: nobody has to tell the slots)
    allowance = wait_ratio * base - (round trip - base), at least base / 4 and least_wait_s

base is the lowest service time of late: it falls within a few service times and creeps up by 0.2 % a second. What waits behind the gate
already, at the worker or inside the model server, is thus taken off. One step may always wait. Until a service time is known only the hard
bounds hold.

A queue that comes and goes is a good one: while nothing was refused for its load for `calm_s`, by whatever policy, the allowance is
`burst_wait_s` more, and `burst` steps wait whatever is expected, for that is wrong where the steps of a target differ much. So a burst, or
callers that wait for each other's turn, are served in a moment instead of being sent away, and only a queue that outgrows it is overload.

CoDel (Nichols and Jacobson, ACM Queue 2012) in the variant of facebook/folly, `folly/executors/Codel.cpp`, is the guard for what the
expectation misses, such as a capacity that has just fallen: the target is half of the allowance; when the shortest wait of an interval of
100 ms was over the target the next interval is overloaded, and then what waited over twice the target is refused at its turn.

Steps that rank higher than others which are served anyway, by their tier or as favoured steps, are no overload: they may wait `patience`
service times, and CoDel does not refuse them (`gateway/core/precedence.py` says why).

The hint is the time in which the measured drain rate empties what waits, capped, plus up to half of it at random; unknown while no rate
is known. State: the base, CoDel's four numbers, twelve shares.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gateway import Flow, PolicyType, ScopeView, Slot, hookimpl
from gateway.core.codel import Codel
from gateway.core.precedence import Precedence

_CREEP_PER_S = 0.002  # of the base, so that it forgets within minutes what a target once could do
_SETTLE = 5.0  # service times in which the base follows a lower one
_LEAST_SHARE = 0.25  # of the base: the least allowance
_CALM = 5.0  # service times
_LATE = 2.0  # allowances after which a step is not waited for any longer, whatever its turn


@dataclass(frozen=True)
class BoundedWaitConfig:
    """max_waiting: steps for each scope and gateway; 0 refuses at once. wait_ratio: the allowance in idle service times;
    least_wait_s: never less than that, for targets that are quicker than the machine's hiccups. interval_s: CoDel's. burst_wait_s: more
    than the allowance while nothing was refused for calm_s, or for five service times where these are longer; 0: never. burst: steps
    that wait meanwhile without a look at the expected wait. patience:
    service times that a step may wait while lower ranks are served."""

    max_waiting: int = 1024
    max_wait_s: float = 5.0
    max_hint_s: float = 30.0
    wait_ratio: float = 0.65
    least_wait_s: float = 0.01
    interval_s: float = 0.1
    burst_wait_s: float = 0.5
    burst: int = 64
    calm_s: float = 2.0
    patience: float = 6.0

    def __post_init__(self) -> None:
        if self.max_waiting < 0 or self.max_wait_s <= 0 or self.max_hint_s <= 0:
            raise ValueError("max_waiting must not be negative, max_wait_s and max_hint_s must be positive")
        if (
            self.wait_ratio <= 0
            or self.interval_s <= 0
            or min(self.least_wait_s, self.burst_wait_s, self.calm_s, self.burst, self.patience) < 0
        ):
            raise ValueError("wait_ratio and interval_s must be positive, the other times and patience must not be negative")


class BoundedWait:
    def __init__(self, config: BoundedWaitConfig) -> None:
        self._config = config
        self._codel = Codel()
        self._precedence = Precedence()
        self._base_s = 0.0  # 0 while unknown
        self._looked_s = 0.0

    def reconfigure(self, config: BoundedWaitConfig) -> None:
        self._config = config

    def may_wait(self, flow: Flow, view: ScopeView, now_s: float) -> float | None:
        config = self._config
        if view.waiting >= config.max_waiting:
            return None
        allowance_s = self._allowance_s(view, now_s)
        if self._precedence.outranks(flow.tier, flow.favoured):
            allowance_s = max(allowance_s, config.patience * view.service_s)
        if view.waiting == 0:
            self._codel.is_empty(now_s, config.interval_s)
        elif (view.waiting + 1) * view.round_trip_s > allowance_s * view.inflight and not self._takes_burst(view):
            return None
        return min(config.max_wait_s, _LATE * allowance_s)

    def may_start(self, flow: Flow, waited_s: float, view: ScopeView, now_s: float) -> bool:
        late = self._codel.refuses(waited_s, self._allowance_s(view, now_s) / 2, now_s, self._config.interval_s)
        if late and not self._precedence.outranks(flow.tier, flow.favoured):
            return False
        self._precedence.served(flow.tier, flow.favoured)
        return True

    def retry_after_s(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> float | None:
        if view.drain_per_s <= 0:
            return None
        return min((view.waiting + 1) / view.drain_per_s, self._config.max_hint_s) * (1 + random / 2)

    def _is_calm(self, view: ScopeView) -> bool:
        return self._config.burst_wait_s > 0 and view.calm_s > max(self._config.calm_s, _CALM * self._base_s)

    def _takes_burst(self, view: ScopeView) -> bool:
        return view.waiting < self._config.burst and self._is_calm(view)

    def _allowance_s(self, view: ScopeView, now_s: float) -> float:
        """max_wait_s while no round trip is known."""
        config, service_s = self._config, view.service_s
        if service_s <= 0:
            return config.max_wait_s
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        if self._base_s <= 0:
            self._base_s = service_s
        elif service_s < self._base_s:
            self._base_s += (service_s - self._base_s) * (1 - math.exp(-passed_s / (_SETTLE * service_s)))
        else:
            self._base_s = min(service_s, self._base_s * (1 + _CREEP_PER_S * passed_s))
        base_s = self._base_s
        allowance_s = config.wait_ratio * base_s - (view.round_trip_s - base_s)
        allowance_s = max(allowance_s, _LEAST_SHARE * base_s, config.least_wait_s)
        if self._is_calm(view):
            allowance_s += config.burst_wait_s
        return min(config.max_wait_s, allowance_s)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("bounded_wait", Slot.BACKPRESSURE, BoundedWaitConfig, BoundedWait, "a bounded wait queue with an honest hint")]
