"""Who is more important than what is served anyway: for these a queue is variance, and not overload."""

from gateway.types import TIERS

_RANKS = 2 * TIERS
_BATCH = 32  # steps, for which the shares are updated at once
_WEIGHT = 0.1  # of a batch in the shares
_ENOUGH = 0.01  # of the capacity


class Precedence:
    """Which share of the steps that a target takes ranks lower than a step: exponential averages over about 300 steps.

    Rank: the tier, and in a tier favoured steps (`Flow.favoured`) before others. While lower ranks get a share of the target, the higher
    ones together need less than it can do: their queue empties by itself, and refusing one would only hand its slot to a lower rank. Under
    overload all slots are always busy, so with a load rho of its own the queue of the higher ranks is longer than n with a probability of
    about rho^(n+1) (M/M/1): for one loss in a thousand at rho = .8 it needs 30 places, however many slots there are. Telephony reserves
    trunks for calls that are handed over in the same way.
    """

    def __init__(self) -> None:
        self._lower = [0.0] * _RANKS
        self._served = [0] * _RANKS  # of the batch
        self._steps = 0

    def served(self, tier: int, favoured: bool) -> None:
        self._served[_rank(tier, favoured)] += 1
        self._steps += 1
        if self._steps == _BATCH:
            self._fold()

    def _fold(self) -> None:
        below = _BATCH
        for rank, served in enumerate(self._served):
            below -= served
            self._lower[rank] += (below / _BATCH - self._lower[rank]) * _WEIGHT
        self._served = [0] * _RANKS
        self._steps = 0

    def outranks(self, tier: int, favoured: bool) -> bool:
        """Does the target have time for steps that rank lower?"""
        return self._lower[_rank(tier, favoured)] >= _ENOUGH


def _rank(tier: int, favoured: bool) -> int:
    return 2 * tier + (not favoured)
