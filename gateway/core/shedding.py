"""The controllers of priority shedding, apart from priorities and bookkeeping."""


class ShedRatio:
    """A PI controller: which share of the arrivals is too much?

    ratio = Kp e + Ki integral(e dt), kept within 0..1, and so is the integral by itself: it does not wind up.
    """

    def __init__(self) -> None:
        self.value = 0.0
        self._integral = 0.0

    def update(self, error: float, dt_s: float, kp: float, ki: float) -> float:
        self._integral = _share(self._integral + ki * error * dt_s)
        self.value = _share(kp * error + self._integral)
        return self.value


def flow_error(passed: float, out: float, free: float, arrived: float) -> float:
    """(in-flow - out-flow - free slots) / arrivals, from -1 to 1.

    By the arrivals, so that the gain of the loop is the same at twice and at ten times the capacity: a ratio r lets (1 - r) of them pass.
    """
    return max(-1.0, min(1.0, (passed - out - free) / arrived)) if arrived > 0 else -1.0


def dagor_level(admitted: int, overloaded: bool, down: float = 0.05, up: float = 0.01) -> float:
    """How many steps the next window may admit, of `admitted` in the last one: (1 - down) N when overloaded, otherwise (1 + up) N."""
    return admitted * ((1.0 - down) if overloaded else (1.0 + up))


def _share(value: float) -> float:
    return max(0.0, min(1.0, value))
