"""Small estimators over time. Pure: time is an argument, in seconds."""

import math


class Rate:
    """Events a second, exponentially decayed: each event adds 1/tau, and everything decays with exp(-dt/tau).

    Right after the start, when less than tau has been seen, the value is divided by the weight that has been collected so far, so
    that it is unbiased from the first second on.
    """

    def __init__(self, tau_s: float = 2.0) -> None:
        self._tau_s = tau_s
        self._value = 0.0
        self._started_s: float | None = None
        self._last_s = 0.0

    def add(self, now_s: float, count: float = 1.0) -> None:
        if self._started_s is None:
            self._started_s = self._last_s = now_s
        self._decay(now_s)
        self._value += count / self._tau_s

    def per_s(self, now_s: float) -> float:
        """0 while nothing is known."""
        if self._started_s is None:
            return 0.0
        seen_s = now_s - self._started_s
        weight = 1.0 - math.exp(-seen_s / self._tau_s)
        if weight < 0.05:  # less than about a tenth of a second with the default: too little to say
            return 0.0
        return self._value * math.exp(-(now_s - self._last_s) / self._tau_s) / weight

    def _decay(self, now_s: float) -> None:
        self._value *= math.exp(-(now_s - self._last_s) / self._tau_s)
        self._last_s = now_s


class Average:
    """Exponential average over events: each has the weight `share`, the first ones that of a plain mean, so it is unbiased at once."""

    def __init__(self, share: float = 0.05) -> None:
        self.value = 0.0  # 0 while nothing is known
        self._share = share
        self._events = 0

    def add(self, value: float) -> None:
        self._events += 1
        self.value += (value - self.value) * max(self._share, 1 / self._events)
