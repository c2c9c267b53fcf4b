"""What limits learn from: means over a window of steps, and whether two measures of successive windows go together."""

import math


class Window:
    """Sums of a window of finished steps. Times in seconds."""

    __slots__ = ("_inflight", "_own", "_own_squares", "_queue", "_transport", "count", "dropped", "started_s")

    def __init__(self, started_s: float) -> None:
        self.started_s = started_s
        self.count = self.dropped = 0
        self._inflight = 0
        self._queue = self._own = self._own_squares = self._transport = 0.0

    def add(self, inflight: int, queue_s: float, own_s: float, transport_s: float = 0.0) -> None:
        """A round trip: what is known to be a queue, what the target took itself, and the way there and back."""
        self.count += 1
        self._inflight += inflight
        self._queue += queue_s
        self._own += own_s
        self._transport += transport_s
        self._own_squares += own_s * own_s

    @property
    def inflight(self) -> float:
        return self._inflight / self.count

    @property
    def queue_s(self) -> float:
        return self._queue / self.count

    @property
    def own_s(self) -> float:
        return self._own / self.count

    @property
    def idle_s(self) -> float:
        """The round trip without the known queue."""
        return (self._own + self._transport) / self.count

    @property
    def deviation_s(self) -> float:
        """Standard deviation of own_s between the steps."""
        return math.sqrt(max(0.0, self._own_squares / self.count - self.own_s**2))

    @property
    def error_s(self) -> float:
        """Standard error of own_s."""
        return self.deviation_s / math.sqrt(self.count)


class Correlation:
    """Pearson's coefficient of pairs, older ones weighing less: each new pair has the weight `share` of the whole."""

    def __init__(self, share: float = 0.05) -> None:
        self.pairs = 0
        self._share = share
        self._mean_x = self._mean_y = self._xx = self._yy = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        self.pairs += 1
        share = max(self._share, 1 / self.pairs)
        dx, dy = x - self._mean_x, y - self._mean_y
        self._mean_x += share * dx
        self._mean_y += share * dy
        keep = 1.0 - share
        self._xx = keep * (self._xx + share * dx * dx)
        self._yy = keep * (self._yy + share * dy * dy)
        self._xy = keep * (self._xy + share * dx * dy)

    @property
    def spread(self) -> float:
        """Coefficient of variation of x; a correlation with something that hardly varies says nothing."""
        return math.sqrt(self._xx) / self._mean_x if self._mean_x > 0.0 else 0.0

    @property
    def value(self) -> float:
        """From -1 to 1; 0 while one of the two does not vary."""
        product = self._xx * self._yy
        return max(-1.0, min(1.0, self._xy / math.sqrt(product))) if product > 1e-24 else 0.0
