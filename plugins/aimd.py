"""Question: how many steps of a target may be in flight, when only failures and slowness tell?

Additive increase, multiplicative decrease (Chiu and Jain 1989), as in Netflix concurrency-limits, class AIMDLimit:

    dropped, or round trip > slow_s:    L <- backoff * L
    else, when 2 * inflight >= L:       L <- L + 1

It cannot see a queue that is shorter than slow_s. State: one number.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import Ending, PolicyType, Sample, Slot, hookimpl
from gateway.core.limits import aimd


@dataclass(frozen=True)
class AimdConfig:
    """initial, min_limit, max_limit: steps in flight for each scope and gateway. slow_s: a round trip that counts as a failure."""

    initial: int = 20
    min_limit: int = 1
    max_limit: int = 200
    backoff: float = 0.9
    slow_s: float = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_limit <= self.initial <= self.max_limit:
            raise ValueError("min_limit must be at least 1, initial not below it, and max_limit not below initial")
        if not 0.5 <= self.backoff < 1 or self.slow_s <= 0:
            raise ValueError("backoff must be from 0.5 to below 1, slow_s must be positive")


class Aimd:
    def __init__(self, config: AimdConfig) -> None:
        self._config = config
        self._limit = float(config.initial)

    def limit(self, scope: str) -> int:
        return int(self._limit)

    def on_sample(self, sample: Sample, now_s: float, random: float) -> None:
        if sample.ending is not Ending.IGNORED:
            overloaded = sample.ending is Ending.DROPPED or sample.round_trip_s > self._config.slow_s
            self._set(aimd(self._limit, sample.inflight, overloaded, self._config.backoff))

    def reconfigure(self, config: AimdConfig) -> None:
        self._config = config
        self._set(self._limit)

    def _set(self, limit: float) -> None:
        self._limit = min(max(limit, float(self._config.min_limit)), float(self._config.max_limit))


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("aimd", Slot.LIMIT, AimdConfig, Aimd, "a limit that grows until steps fail or are slow")]
