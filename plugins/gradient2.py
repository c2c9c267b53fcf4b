"""Question: how many steps of a target may be in flight, when round trips are no longer than they were of late?

Gradient2, plain, as published in Netflix concurrency-limits (2018), class Gradient2Limit:

    long = average round trip over 600 samples, exponential after the first 10; short = the round trip of this sample
    long <- 0.95 long while long / short > 2                                    (what was slow for long is forgotten quickly)
    g = clamp(1.5 * long / short, 0.5, 1);  L <- 0.8 L + 0.2 (g L + 4), from 20 to 200; nothing while 2 * inflight < L

**Known failure**: it compares the target with its own past. Under steady overload, and when every step takes the same long time-out, long
and short are the same, g is 1, and L grows by 0.8 a sample to its maximum; drops are not looked at. Use vegas; this is here for comparison.
State: three numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import Ending, PolicyType, Sample, Slot, hookimpl
from gateway.core.limits import gradient2

_WARM_UP = 10
_LONG = 600


@dataclass(frozen=True)
class Gradient2Config:
    """initial, min_limit, max_limit: steps in flight for each scope and gateway. tolerance: how much longer than the long average is still
    no queue; queue: how many may wait at the target; smoothing: weight of a new limit."""

    initial: int = 20
    min_limit: int = 20
    max_limit: int = 200
    tolerance: float = 1.5
    queue: float = 4.0
    smoothing: float = 0.2

    def __post_init__(self) -> None:
        if not 1 <= self.min_limit <= self.initial <= self.max_limit:
            raise ValueError("min_limit must be at least 1, initial not below it, and max_limit not below initial")
        if self.tolerance < 1 or self.queue < 0 or not 0 < self.smoothing <= 1:
            raise ValueError("tolerance must be at least 1, queue not negative, smoothing above 0 and at most 1")


class Gradient2:
    def __init__(self, config: Gradient2Config) -> None:
        self._config = config
        self._limit = float(config.initial)
        self._long_s = 0.0
        self._samples = 0

    def limit(self, scope: str) -> int:
        return int(self._limit)

    def on_sample(self, sample: Sample, now_s: float, random: float) -> None:
        short_s = sample.round_trip_s
        if sample.ending is Ending.IGNORED or short_s <= 0:
            return
        self._samples += 1
        share = 1 / self._samples if self._samples <= _WARM_UP else 2 / (_LONG + 1)
        self._long_s += share * (short_s - self._long_s)
        if self._long_s / short_s > 2:
            self._long_s *= 0.95
        if 2 * sample.inflight >= self._limit:
            config = self._config
            self._set(gradient2(self._limit, self._long_s, short_s, config.tolerance, config.queue, config.smoothing))

    def reconfigure(self, config: Gradient2Config) -> None:
        self._config = config
        self._set(self._limit)

    def _set(self, limit: float) -> None:
        self._limit = min(max(limit, float(self._config.min_limit)), float(self._config.max_limit))


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [
        PolicyType("gradient2", Slot.LIMIT, Gradient2Config, Gradient2, "round trips against their long average; drifts, for comparison")
    ]
