"""Question: how many steps may a session have outstanding?

Breakwater (Cho et al., "Overload Control for us-scale RPCs with Breakwater", OSDI 2020, 4): a pool of C credits for all sessions follows
the wait for a permit, each interval:

    wait < target:  C += max(increase * sessions, 1)
    otherwise:      C *= max(1 - decrease * (wait - target) / target, 0.5)

A session gets its demand, which is what it has outstanding, and an over-commitment of (C - granted) / sessions; a session below an equal
share of C gets one at least, so that it can grow while the others, which get nothing from an empty pool, shrink with each answer. Two
bounds of ours: over-commitment at most doubles what a session has outstanding (from `idle_window` on), so that idle sessions do not hold
the pool; and no session gets more than `max_window`. The increase is per interval of 100 ms, not per round trip of microseconds, so it is
larger than in the paper.

State: C and when it was adjusted, for the process. Intervals in which nobody asked do not count.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import CreditView, PolicyType, Slot, hookimpl


@dataclass(frozen=True)
class BreakwaterConfig:
    """target_wait_s: for a permit. The credits are of this gateway, all sessions together."""

    target_wait_s: float = 0.05
    interval_s: float = 0.1
    initial_credits: int = 1024
    min_credits: int = 16
    max_credits: int = 20_000
    max_window: int = 1024
    idle_window: int = 16
    increase: float = 0.1
    decrease: float = 0.02

    def __post_init__(self) -> None:
        if self.target_wait_s <= 0 or self.interval_s <= 0:
            raise ValueError("target_wait_s and interval_s must be positive")
        if not 1 <= self.min_credits <= self.initial_credits <= self.max_credits:
            raise ValueError("1 <= min_credits <= initial_credits <= max_credits must hold")
        if not 1 <= self.idle_window <= self.max_window:
            raise ValueError("1 <= idle_window <= max_window must hold")
        if self.increase <= 0 or not 0 < self.decrease < 1:
            raise ValueError("increase must be positive, decrease must be between 0 and 1")


class Breakwater:
    def __init__(self, config: BreakwaterConfig) -> None:
        self._config = config
        self._credits = float(config.initial_credits)
        self._adjusted_s: float | None = None

    @property
    def credits(self) -> float:
        """C, the pool of all sessions."""
        return self._credits

    def reconfigure(self, config: BreakwaterConfig) -> None:
        self._config = config
        self._credits = min(max(self._credits, config.min_credits), config.max_credits)

    def window(self, view: CreditView, now_s: float) -> int:
        config = self._config
        self._adjust(view, now_s)
        sessions = max(1, view.sessions)
        least = 1.0 if view.outstanding < self._credits / sessions else 0.0
        over = max((self._credits - view.granted) / sessions, least)
        over = min(over, max(view.outstanding, config.idle_window))
        return max(1, min(view.outstanding + int(over), config.max_window))

    def _adjust(self, view: CreditView, now_s: float) -> None:
        config = self._config
        if self._adjusted_s is None:
            self._adjusted_s = now_s
        if now_s - self._adjusted_s < config.interval_s:
            return
        self._adjusted_s = now_s
        if view.wait_s < config.target_wait_s:
            grown = self._credits + max(config.increase * view.sessions, 1.0)
        else:
            over = (view.wait_s - config.target_wait_s) / config.target_wait_s
            grown = self._credits * max(1.0 - config.decrease * over, 0.5)
        self._credits = min(max(grown, config.min_credits), config.max_credits)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("breakwater", Slot.CREDITS, BreakwaterConfig, Breakwater, "credits of sessions from the wait for a permit")]
