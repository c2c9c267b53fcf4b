"""How much work the expressions of a run may do in all.

One evaluation is bounded by itself (`cel_evaluator.MOST_WORK`), but one event may cause thousands of them: 1000 evaluations at that bound
would keep a core busy for minutes. Units are counted, not time, so a run that is replayed is stopped at the very same evaluation.
"""

# 4 to 10 us each: 5 to 10 s of a slow core. 1000 steps with ten expressions of 20 units each, which is a lot, need a fifth of it.
MOST_RUN_WORK = 1_000_000


class UsedUp(Exception):
    """Nothing is left of an allowance. Not a ValueError: it is not the fault of the one expression that came last."""


class Allowance:
    """left: units. Belongs to one run, whose evaluations come one after the other, in whichever threads."""

    __slots__ = ("left",)

    def __init__(self, left: int) -> None:
        self.left = left

    def spend(self, units: int) -> None:
        """Raises UsedUp when there are not so many left."""
        self.left -= units
        if self.left < 0:
            raise UsedUp
