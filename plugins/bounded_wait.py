"""Question: may a step wait for a permit, how long, and when should a refused client come back?

A queue of at most `max_waiting` steps for each target; nobody waits longer than `max_wait_s`. The hint is the time in which the
measured drain rate empties what waits (Little's law), capped, plus up to half of it at random; unknown while no rate is known. No state.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import Flow, PolicyType, ScopeView, Slot, hookimpl


@dataclass(frozen=True)
class BoundedWaitConfig:
    """max_waiting: steps for each scope and gateway; 0 refuses at once."""

    max_waiting: int = 1024
    max_wait_s: float = 5.0
    max_hint_s: float = 30.0

    def __post_init__(self) -> None:
        if self.max_waiting < 0 or self.max_wait_s <= 0 or self.max_hint_s <= 0:
            raise ValueError("max_waiting must not be negative, max_wait_s and max_hint_s must be positive")


class BoundedWait:
    def __init__(self, config: BoundedWaitConfig) -> None:
        self._config = config

    def may_wait(self, flow: Flow, view: ScopeView, now_s: float) -> float | None:
        return self._config.max_wait_s if view.waiting < self._config.max_waiting else None

    def retry_after_s(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> float | None:
        if view.drain_per_s <= 0:
            return None
        return min((view.waiting + 1) / view.drain_per_s, self._config.max_hint_s) * (1 + random / 2)

    def credits(self, client: str, view: ScopeView, now_s: float) -> int:
        return max(1, view.limit - view.inflight - view.waiting)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("bounded_wait", Slot.BACKPRESSURE, BoundedWaitConfig, BoundedWait, "a bounded wait queue with an honest hint")]
