"""How long steps waited for this worker lately. Pure: time is an argument.

Gateways that share a worker see only their own steps; what the worker tells with each result is what all of them together made it. The
signal of DAGOR (Zhou et al., "Overload control for scaling WeChat microservices", 2018): the average queuing time in a window of one
second or 2,000 requests, whichever is shorter.
"""

from collections import deque

WINDOW_S = 1.0
WINDOW_STEPS = 2000


class WaitWindow:
    """Steps of one target by when they started. The newest one always counts, so slow steps do not leave the window empty."""

    __slots__ = ("_steps", "_sum_us")

    def __init__(self) -> None:
        self._steps: deque[tuple[float, int]] = deque()
        self._sum_us = 0  # whole microseconds, so that adding and taking away is exact

    def add(self, waited_us: int, now_s: float) -> None:
        """A step started now, after waiting so long for a slot."""
        self._steps.append((now_s, waited_us))
        self._sum_us += waited_us
        while len(self._steps) > WINDOW_STEPS or self._steps[0][0] <= now_s - WINDOW_S:
            self._sum_us -= self._steps.popleft()[1]

    @property
    def average_us(self) -> int:
        """As of the last start; 0 while there was none."""
        return self._sum_us // len(self._steps) if self._steps else 0


class WaitWindows:
    """One window for each target of a worker."""

    def __init__(self) -> None:
        self._windows: dict[str, WaitWindow] = {}

    def add(self, target: str, waited_us: int, now_s: float) -> None:
        window = self._windows.get(target)
        if window is None:
            window = self._windows[target] = WaitWindow()
        window.add(waited_us, now_s)

    def average_us(self, target: str) -> int:
        window = self._windows.get(target)
        return window.average_us if window is not None else 0
