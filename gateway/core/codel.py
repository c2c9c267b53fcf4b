"""Controlled delay: a queue that stands is a bad one, a queue that comes and goes is a good one.

Nichols and Jacobson, "Controlling queue delay", ACM Queue 2012, in the variant of facebook/folly, `folly/executors/Codel.cpp`: no schedule
of drops; while overloaded, whatever waited longer than twice the target is refused.
"""


class Codel:
    """Overloaded: the shortest wait of the interval that is over was longer than the target. Times in seconds."""

    def __init__(self) -> None:
        self.overloaded = False
        self._shortest_s = 0.0
        self._ends_s = float("-inf")  # of the interval

    def refuses(self, waited_s: float, target_s: float, now_s: float, interval_s: float) -> bool:
        """To be asked about each step when its turn comes. The first one of an interval always goes."""
        if now_s >= self._ends_s:
            self.overloaded = self._shortest_s > target_s
            self._ends_s = now_s + interval_s
            self._shortest_s = waited_s
            return False
        self._shortest_s = min(self._shortest_s, waited_s)
        return self.overloaded and waited_s > 2 * target_s

    def is_empty(self, now_s: float, interval_s: float) -> None:
        """Nothing waits: the shortest wait is none. Without that, a queue that came back would find the judgement on the one before it."""
        self.overloaded = False
        self._shortest_s = 0.0
        self._ends_s = now_s + interval_s
