"""The formulas of concurrency limits, apart from all bookkeeping. Limits are real numbers here; who uses them rounds.

Source of all three: Netflix concurrency-limits (github.com/Netflix/concurrency-limits, 2018): AIMDLimit, Gradient2Limit, VegasLimit.
"""

import math


def aimd(limit: float, inflight: int, overloaded: bool, backoff: float = 0.9) -> float:
    """Additive increase, multiplicative decrease: x backoff on overload, + 1 while at least half of the limit is in use."""
    if overloaded:
        return limit * backoff
    return limit + 1.0 if 2 * inflight >= limit else limit


def gradient2(limit: float, long_s: float, short_s: float, tolerance: float = 1.5, queue: float = 4.0, smoothing: float = 0.2) -> float:
    """g = clamp(tolerance * long / short, 0.5, 1); L <- (1 - smoothing) L + smoothing (g L + queue)."""
    gradient = max(0.5, min(1.0, tolerance * long_s / short_s))
    return limit * (1.0 - smoothing) + smoothing * (gradient * limit + queue)


def queue_size(inflight: float, base_s: float, round_trip_s: float) -> float:
    """How many of the steps in flight wait, by Little's law: N (1 - base / round trip)."""
    return max(0.0, inflight * (1.0 - base_s / round_trip_s)) if round_trip_s > 0.0 else 0.0


def vegas_bounds(limit: float, scale: float = 1.0) -> tuple[float, float, float]:
    """threshold, alpha and beta: the queue is meant to be from alpha to beta, and far too short up to the threshold.

    log10 L, 3 log10 L and 6 log10 L, times the scale. Below L = 2 the logarithm of 2 is used, or they would be nothing.
    """
    unit = scale * math.log10(max(2.0, limit))
    return unit, 3.0 * unit, 6.0 * unit


def vegas(limit: float, queue: float, dropped: bool = False, scale: float = 1.0) -> float:
    """One step of Vegas: + beta up to the threshold, + log10 L below alpha, - log10 L above beta or after a drop."""
    threshold, alpha, beta = vegas_bounds(limit, scale)
    unit = math.log10(max(2.0, limit))
    if dropped or queue > beta:
        return limit - unit
    if queue <= threshold:
        return limit + beta
    return limit + unit if queue < alpha else limit
