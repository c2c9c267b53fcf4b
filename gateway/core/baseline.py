"""How long a step takes when nothing waits: the baseline that a queue is measured against, and the probes that keep it honest."""

import math

from gateway.core.windows import Window

_MOST_WEIGHT = 400.0  # samples: what the past weighs at most against new ones
_SURPRISE = 4.0  # standard errors from which on a probe is believed rather than averaged
_LEAST_ERROR = 0.02  # of the baseline
_TAIL = 6.0  # standard deviations that slow steps of a probe are waited for


class Baseline:
    """A mean, 0 while unknown, and the number of samples behind it."""

    def __init__(self) -> None:
        self.value_s = 0.0
        self.weight = 0.0

    def add(self, own_s: float, samples: int = 1) -> None:
        """Averages the mean of some samples into it."""
        self.weight += samples
        self.value_s += (own_s - self.value_s) * samples / self.weight
        self.weight = min(self.weight, _MOST_WEIGHT)

    def replace(self, own_s: float, samples: int) -> None:
        """The past is worth nothing: the target has changed."""
        self.value_s, self.weight = own_s, float(samples)

    def learn(self, probe: Window, deviation_s: float) -> None:
        """What a probe measured. deviation_s is that of single steps, for a probe of a few steps cannot tell its own."""
        error_s = max(probe.deviation_s, deviation_s) * math.sqrt(1.0 / probe.count + 1.0 / max(1.0, self.weight))
        if abs(probe.own_s - self.value_s) > _SURPRISE * max(error_s, _LEAST_ERROR * self.value_s):
            self.replace(probe.own_s, probe.count)
        else:
            self.add(probe.own_s, probe.count)


class Probe:
    """A moment with a lower limit, in which the target's queue runs dry.

    What counts are the steps that were dispatched in it, whenever they end: those that end in it are the short ones, and would make the
    baseline too low. inflight falls from the old limit to `level` before anything is dispatched, so that none of them finds a queue.
    """

    LEAST_STEPS = 3

    def __init__(self, level: int, limit: int, round_trip_s: float, idle_s: float, deviation_s: float, now_s: float) -> None:
        """round_trip_s with the queue, idle_s without what is known to be one."""
        self.level = level
        self.began_s = now_s
        self.until_s = now_s + round_trip_s * (1.0 - level / limit) + idle_s
        self.over_s = self.until_s + idle_s + _TAIL * deviation_s
        self.steps = Window(now_s)

    def add(self, own_s: float, dispatched_s: float) -> None:
        if self.began_s <= dispatched_s <= self.until_s:
            self.steps.add(0, 0.0, own_s)
