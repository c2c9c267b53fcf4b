"""Question: oldest step first, or newest?

First come first served normally, last in first out while overloaded (Maurer, "Fail at Scale", ACM Queue 2015, where it is
paired with CoDel). In an overload the oldest steps are those whose callers are about to give up: serving the newest first meets the
patience of some, where serving in order meets nobody's. Overloaded: the oldest waiting step of the target waits for over `target_s`.

    key = (1, arrived_s) normally        (0, -arrived_s) while overloaded

So the steps that came during the overload go first, newest first, then the older ones in their order, and steps that come after it queue
behind all of them. Pair it with a backpressure policy whose wait is bounded, or the oldest steps stay for as long as the overload. No
state: the order of a step is fixed when it begins to wait.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import Flow, OrderKey, PolicyType, ScopeView, Slot, hookimpl


@dataclass(frozen=True)
class AdaptiveLifoConfig:
    """target_s: overloaded while the oldest step waits for longer."""

    target_s: float = 0.1

    def __post_init__(self) -> None:
        if self.target_s <= 0:
            raise ValueError("target_s must be positive")


class AdaptiveLifo:
    def __init__(self, config: AdaptiveLifoConfig) -> None:
        self._config = config

    def reconfigure(self, config: AdaptiveLifoConfig) -> None:
        """For steps that come from now on."""
        self._config = config

    def key(self, flow: Flow, arrived_s: float, view: ScopeView) -> OrderKey:
        if view.oldest_wait_s > self._config.target_s:
            return (0.0, -arrived_s)
        return (1.0, arrived_s)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [
        PolicyType("adaptive_lifo", Slot.ORDERING, AdaptiveLifoConfig, AdaptiveLifo, "first come first served; newest first in an overload")
    ]
