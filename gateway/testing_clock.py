"""A clock that a test moves."""

import itertools
from collections.abc import Callable
from heapq import heappop, heappush


class ManualClock:
    """A `Clock` that stands still until `advance`. Both times move together."""

    def __init__(self, now_s: float = 1000.0, wall_s: float = 1_700_000_000.0) -> None:
        self._now_s, self._wall_s = now_s, wall_s
        self._numbers = itertools.count()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []

    def now_s(self) -> float:
        return self._now_s

    def wall_s(self) -> float:
        return self._wall_s

    def call_at(self, when_s: float, callback: Callable[[], None]) -> None:
        """Calls back from within the `advance` that reaches when_s (monotonic seconds)."""
        heappush(self._calls, (when_s, next(self._numbers), callback))

    def advance(self, seconds: float) -> None:
        """Moves time; what falls due on the way is called in order, each at its own time."""
        end_s = self._now_s + seconds
        while self._calls and self._calls[0][0] <= end_s:
            when_s, _, callback = heappop(self._calls)
            self._move_to(max(when_s, self._now_s))
            callback()
        self._move_to(end_s)

    def _move_to(self, now_s: float) -> None:
        self._wall_s += now_s - self._now_s
        self._now_s = now_s
