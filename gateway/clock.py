"""The one place that reads time."""

import time
from typing import Protocol


class Clock(Protocol):
    def now_s(self) -> float:
        """Monotonic seconds, for durations."""
        ...

    def wall_s(self) -> float:
        """Seconds since 1970 (UTC), for deadlines that travel."""
        ...


class SystemClock:
    """The machine's clocks. Read dozens of times for each step, so without a Python call around them."""

    now_s = staticmethod(time.monotonic)
    wall_s = staticmethod(time.time)
