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
    """The machine's clocks."""

    def now_s(self) -> float:
        return time.monotonic()

    def wall_s(self) -> float:
        return time.time()
