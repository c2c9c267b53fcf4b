"""Question: which region gets the step, and when may it be the next one?

The one through which what the target calls is nearest: as the workers measure it, all the way from this gateway; its home while that
has not measured it, and when another is nearer by less than 1 ms or a tenth, which may be noise. Unless it is loaded
beyond a bound: with more than `spill_at` steps for each slot (1.25 is the bound of consistent hashing with bounded loads, Mirrokni,
Thorup and Zadimoghaddam 2016) the next region gets the step, when that one is within the bound and less than `max_spill_ms` farther.
Where all are beyond it nothing spills. Score, in seconds:

    nearest within the bound   1                              another within the bound   -extra_s
    nearest beyond it          -max_spill_s                   another beyond it          -extra_s - max_spill_s

`extra_s` is how much farther it is; while that is not measured, its round trip. Measured round trips change rarely and not with load: a
target's is the least of some minutes. The load is `Endpoint.load`. A gateway's own steps in flight are known exactly at each decision, so
what spills is what goes over the bound, and nothing swings. What others have running is as old as the last heartbeat, never more than the
slots, and matters only with `spill_at` below 1; then all gateways would move at once, and back. So at most the share `max_share` of a
target's steps spills from the nearest region, evenly spread: a spilled step adds 1 - max_share to a debt, one that went there pays
max_share of it, and no more spill while there is too much. State: that debt for each target; the least recently used one is dropped.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from gateway import Endpoint, Flow, PolicyType, Slot, hookimpl

_MAX_TARGETS = 1000


@dataclass(frozen=True)
class NearestRegionConfig:
    """weight: of this score among those of other routing policies. spill_at: load (steps for each slot) beyond which a region is left, 0
    for never. max_spill_ms: extra round trip that a step may be sent. max_share: of a target's steps that may leave the nearest region, 0
    to 1."""

    weight: float = 1.0
    spill_at: float = 1.25
    max_spill_ms: float = 100.0
    max_share: float = 0.5

    def __post_init__(self) -> None:
        if self.weight < 0 or self.spill_at < 0 or self.max_spill_ms < 0:
            raise ValueError("weight, spill_at and max_spill_ms must not be negative")
        if not 0 <= self.max_share <= 1:
            raise ValueError("max_share must be from 0 to 1")


class NearestRegion:
    def __init__(self, config: NearestRegionConfig) -> None:
        self._debts: OrderedDict[str, float] = OrderedDict()  # by scope, 0 to 1
        self.reconfigure(config)

    def reconfigure(self, config: NearestRegionConfig) -> None:
        self._config = config
        self.weight = config.weight
        self._max_spill_s = config.max_spill_ms / 1000

    def score(self, flow: Flow, endpoint: Endpoint, now_s: float) -> float | None:
        if endpoint.workers == 0:
            return None
        config = self._config
        beyond = config.spill_at > 0 and endpoint.load > config.spill_at
        if not endpoint.nearest:
            extra_s = endpoint.round_trip_s if endpoint.extra_s is None else endpoint.extra_s
            return -extra_s - (self._max_spill_s if beyond else 0.0)
        if beyond and self._debts.get(flow.scope, 0.0) < config.max_share:
            return -self._max_spill_s
        return 1.0

    def chosen(self, flow: Flow, endpoint: Endpoint, now_s: float) -> None:
        debts, scope = self._debts, flow.scope
        debt = debts.get(scope, 0.0) + (0.0 if endpoint.nearest else 1.0) - self._config.max_share
        debts[scope] = min(max(debt, 0.0), 1.0)
        debts.move_to_end(scope)
        if len(debts) > _MAX_TARGETS:
            debts.popitem(last=False)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    summary = "the region that is nearest to what the target calls, spilling within bounds"
    return [PolicyType("nearest_region", Slot.ROUTING, NearestRegionConfig, NearestRegion, summary)]
