"""Question: which region has the most room for the step?

The one with the fewest steps for each slot: an endpoint is a region today, so there are few and all are compared; drawing two of them
(Mitzenmacher 2001) would only hide the best one. Score: minus the load, in whole parts of `grain`, so that a little less load is no
reason to go far; among equals the smaller round trip, as a thousandth of a load for each second.

What all gateways have running is as old as the last heartbeat. Everybody would go to the emptiest region until the next one says so
(Mitzenmacher, "How useful is old information?", 2000), hence the steps that this gateway has sent since are added to what was told.
State: for each target and region what was told last, and what was in flight then; the least recently used one is dropped.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from math import floor

from gateway import Endpoint, Flow, PolicyType, Slot, hookimpl

_MAX_ENDPOINTS = 4000
_PER_SECOND = 0.001  # of round trip; settles ties


@dataclass(frozen=True)
class LeastLoadedConfig:
    """weight: of this score among those of other routing policies. grain: difference in load (steps for each slot) that counts."""

    weight: float = 1.0
    grain: float = 0.1

    def __post_init__(self) -> None:
        if self.weight < 0 or self.grain <= 0:
            raise ValueError("weight must not be negative, grain must be positive")


class LeastLoaded:
    def __init__(self, config: LeastLoadedConfig) -> None:
        self._told: OrderedDict[tuple[str, str], tuple[int, int]] = OrderedDict()  # running, and in flight from here when that was told
        self.reconfigure(config)

    def reconfigure(self, config: LeastLoadedConfig) -> None:
        self._config = config
        self.weight = config.weight

    def score(self, flow: Flow, endpoint: Endpoint, now_s: float) -> float | None:
        if endpoint.workers == 0:
            return None
        grain = self._config.grain
        return -floor(self._load(flow.scope, endpoint) / grain + 1e-9) * grain - endpoint.round_trip_s * _PER_SECOND

    def _load(self, scope: str, endpoint: Endpoint) -> float:
        key = scope, endpoint.region
        told = self._told.get(key)
        if told is None or told[0] != endpoint.running:
            told = self._told[key] = endpoint.running, endpoint.inflight
            if len(self._told) > _MAX_ENDPOINTS:
                self._told.popitem(last=False)
        self._told.move_to_end(key)
        running = endpoint.running + max(0, endpoint.inflight - told[1])
        return max(running, endpoint.inflight) / endpoint.slots if endpoint.slots else 0.0

    def chosen(self, flow: Flow, endpoint: Endpoint, now_s: float) -> None:
        """The next view has it in flight."""


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("least_loaded", Slot.ROUTING, LeastLoadedConfig, LeastLoaded, "the region with the fewest steps for each slot")]
