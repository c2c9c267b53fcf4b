"""Priorities for shedding: the tier first, then a cohort, so that overload hits whole runs and not single steps of every run.

Priority 0 is shed last. After Cinnamon (Uber, 2023: 6 tiers x 128 cohorts) and DAGOR (WeChat, SoCC 2018: business level, user level).
"""

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from zlib import crc32

from gateway.types import TIERS

COHORTS = 128
PRIORITIES = TIERS * COHORTS
EPOCH_S = 300.0  # after which runs get another cohort, so that nobody is always last


def cohort(tenant: str, run: str, now_s: float) -> int:
    """0 to COHORTS - 1, the same for all steps of a run within an epoch. Epochs of different runs do not change at the same time."""
    own = crc32(f"{tenant}\0{run}".encode())
    epoch = int(now_s / EPOCH_S + own / 2**32)
    return crc32(epoch.to_bytes(8, "big", signed=True), own) % COHORTS


def threshold(counts: Sequence[int], steps: float) -> int:
    """Of a histogram over priorities: the largest threshold below which (priority < threshold) at most `steps` of it lie."""
    below = 0
    for priority, count in enumerate(counts):
        below += count
        if below > steps:
            return priority
    return len(counts)


class RecentPriorities:
    """Of the last `size` steps, for their cumulative distribution."""

    def __init__(self, size: int = 1000) -> None:
        self._size = size
        self._recent: deque[int] = deque()
        self._counts = [0] * PRIORITIES

    def __len__(self) -> int:
        return len(self._recent)

    def add(self, priority: int) -> None:
        self._recent.append(priority)
        self._counts[priority] += 1
        if len(self._recent) > self._size:
            self._counts[self._recent.popleft()] -= 1

    def thresholds(self, shares: Sequence[float]) -> list[int]:
        """For each share of the steps the threshold that lets it pass, at most. A share of 1 lets all priorities pass. O(PRIORITIES)."""
        below = list(accumulate(self._counts))
        return [_first_over(below, share * len(self._recent)) if share < 1.0 else PRIORITIES for share in shares]


def _first_over(below: Sequence[int], steps: float) -> int:
    low, high = 0, len(below)
    while low < high:
        middle = (low + high) // 2
        if below[middle] > steps + 1e-9:
            high = middle
        else:
            low = middle + 1
    return low
