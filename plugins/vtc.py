"""Question: which tenant's step may dispatch next?

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, with cost in place of tokens. Each
tenant has a counter of the service that it received:

    counter += cost / weight     the estimate at dispatch, the difference to the real cost when the step has ended
    next     =  the active tenant with the smallest counter

A tenant that becomes active is lifted to the smallest counter of the active ones, or, when nobody waits, to that of the tenant that
left last; it never falls below what it had. So time away earns nothing. A step that passes the gate without waiting counts as one that
came and left at once: its tenant is lifted before it pays and takes the level with it. Otherwise a tenant that used idle capacity alone
would owe all of it to whoever comes later, and starve.

Bound: between two tenants that wait all the time the service differs by at most 2 * (L + c * D), each by its weight, where L is the
largest estimate, c the number of steps in flight and D the largest error of an estimate. (The paper's 2 * max(w_in * L_in, w_out * M)
has w_in * L_in for what is known at dispatch and w_out * M for what the running batch may add later.)

Equal counters: the tenant that was charged longest ago first, then in the order of activation. State: the counters of the active tenants
and of at most `max_idle` others. Beyond that the smallest one is forgotten, which is worth least, and a tenant without a counter starts
no lower than the largest that was forgotten: being forgotten is no gain.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field

from gateway import Flow, PolicyType, Slot, hookimpl
from gateway.core.keyed_heap import KeyedHeap, Priority


@dataclass(frozen=True)
class VtcConfig:
    """weight: a tenant's share relative to others; `tenants` overrides it for single ones. max_idle: tenants that have nothing waiting and
    are remembered, for each target and tier."""

    weight: float = 1.0
    tenants: dict[str, float] = field(default_factory=dict)
    max_idle: int = 10_000

    def __post_init__(self) -> None:
        if self.weight <= 0 or any(weight <= 0 for weight in self.tenants.values()):
            raise ValueError("weight and the weights of tenants must be positive")
        if self.max_idle < 1:
            raise ValueError("max_idle must be at least 1")


class Vtc:
    def __init__(self, config: VtcConfig) -> None:
        self._config = config
        self._active = KeyedHeap()  # by counter, then by when it was charged last
        self._idle = KeyedHeap()  # the same
        self._level = 0.0  # what a tenant is lifted to when nobody waits
        self._forgotten = 0.0  # the largest counter that was forgotten
        self._charges = 0

    def reconfigure(self, config: VtcConfig) -> None:
        self._config = config
        self._bound()

    def key(self, flow: Flow) -> Hashable:
        return flow.tenant

    def activate(self, key: Hashable, flow: Flow, now_s: float) -> None:
        counter, charged = self._idle.remove(key) or (self._forgotten, 0)
        self._active.set(key, (max(counter, self._lift()), charged))

    def deactivate(self, key: Hashable, now_s: float) -> None:
        had = self._active.remove(key)
        if had is not None:
            self._level = max(self._level, had[0])
            self._remember(key, had)

    def pick(self, now_s: float) -> Hashable:
        return self._active.first()[0]

    def charge(self, key: Hashable, flow: Flow, cost: float, now_s: float) -> None:
        self._charges += 1
        share = cost / self._config.tenants.get(flow.tenant, self._config.weight)
        had = self._active.get(key)
        if had is not None:
            self._active.set(key, (had[0] + share, self._charges))
            return
        had = self._idle.remove(key)
        counter = had[0] if had else max(self._forgotten, self._lift())
        if not self._active:
            counter = max(counter, self._level)
            self._level = max(self._level, counter + share)
        self._remember(key, (counter + share, self._charges))

    def _lift(self) -> float:
        return self._active.first()[1][0] if self._active else self._level

    def _remember(self, key: Hashable, priority: Priority) -> None:
        self._idle.set(key, priority)
        self._bound()

    def _bound(self) -> None:
        while len(self._idle) > self._config.max_idle:
            key, (counter, *_) = self._idle.first()
            self._idle.remove(key)
            self._forgotten = max(self._forgotten, counter)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("vtc", Slot.FAIRNESS, VtcConfig, Vtc, "fair shares of cost for tenants: virtual token counters")]
