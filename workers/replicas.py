"""Servers of the same models: which one gets a step, which of them agree, when one that refused is asked again. Pure; times in seconds.

Question: which replica gets the step? The one that its run belongs to by rendezvous hashing, since what the run's last step left behind
(a key-value cache) is there; unless that one would have more in flight than 1.25 times the mean, the bound of consistent hashing with
bounded loads (Mirrokni, Thorup and Zadimoghaddam 2016). Then, and for a step without a run, the one with the fewest in flight.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from math import ceil
from typing import TypeVar

from workers.rendezvous import highest

BOUND = 1.25
_PAUSE_S = (0.1, 5.0)  # first and longest

H = TypeVar("H", bound=Hashable)


def capacity(total: int, count: int) -> int:
    """How many steps one of `count` replicas may have when there are `total` in all."""
    return ceil(BOUND * total / count)


def choose(in_flight: Mapping[str, int], run: str) -> str:
    """in_flight: what each candidate has in work and waiting, in their order. run: empty when the step has none.

    Raises ValueError without candidates.
    """
    if run:
        own = highest(run, in_flight)
        if in_flight[own] < capacity(sum(in_flight.values()) + 1, len(in_flight)):
            return own
    return min(in_flight, key=in_flight.__getitem__)


def agreed(contracts: Sequence[H], now: H | None) -> H:
    """What most replicas say of a model; of equals the one that holds now, else the first. Raises ValueError for none."""
    counts = Counter(contracts)
    return max(counts, key=lambda contract: (counts[contract], contract == now))


class Pause:
    """After a refusal: twice as long each time, with jitter. Refusals during it, of steps that were sent before, change nothing."""

    __slots__ = ("_pause_s", "_until_s")

    def __init__(self) -> None:
        self._pause_s = 0.0
        self._until_s = float("-inf")

    def is_over(self, now_s: float) -> bool:
        return now_s >= self._until_s

    def refused(self, now_s: float, random: float) -> None:
        if not self.is_over(now_s):
            return
        first_s, longest_s = _PAUSE_S
        self._pause_s = min(max(first_s, self._pause_s * 2.0), longest_s)
        self._until_s = now_s + self._pause_s * (0.75 + random / 4)
