"""Question: which region gets the step?

The one from which the target's API is nearest: its home while it has live workers, otherwise the live region with the smallest round trip.
A region without live workers is excluded. The score is minus the round trip in seconds, with a bonus for the home region that is larger
than any round trip. No state.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import Endpoint, Flow, PolicyType, Slot, hookimpl

_HOME_BONUS = 60.0  # seconds


@dataclass(frozen=True)
class NearestRegionConfig:
    """weight: of this score among those of other routing policies."""

    weight: float = 1.0


class NearestRegion:
    def __init__(self, config: NearestRegionConfig) -> None:
        self.weight = config.weight

    def score(self, flow: Flow, endpoint: Endpoint, now_s: float) -> float | None:
        if endpoint.workers == 0:
            return None
        return (_HOME_BONUS if endpoint.home else 0.0) - endpoint.round_trip_s


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("nearest_region", Slot.ROUTING, NearestRegionConfig, NearestRegion, "the region nearest to the target's API")]
