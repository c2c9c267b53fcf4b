"""Question: is one more step in the batch worth the wait for it?

The marginal rule. A batch of b rows takes l(b) = t0 + a*b, rows arrive at `arrivals_per_s` = lambda, and an execution could start now.
Sending now lets the next row, 1/lambda away, wait for the rest of this execution; waiting for it delays b rows by 1/lambda and all by a.
The next row gains more than the others lose only while

    b/lambda + a*b + 1/lambda < t0      that is      b < (lambda*t0 - 1) / (1 + lambda*a)

so small loads never wait and a queue that is there already goes at once. While no execution could start, steps wait anyway, and that
is what fills batches under load. With m instances, nothing waits while two are idle; and when the last idle one is taken, the next row
waits for the first of m executions to end: from t0/m, when they are evenly spread, to t0; the middle of the two takes the place of t0. A
wait ends after that time, the most that it can gain, after `slack_share` of what the first deadline leaves once the execution is paid for,
and after `max_wait_s`, whichever is first.

State: t0 and a, by least squares over the executions that were seen, older ones exponentially forgotten (Haykin, Adaptive Filter Theory,
2002, chapter 9). Times far beyond the expected one are cut. As long as only one size was seen nothing is known, and nothing waits.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import BatchCost, BatchView, ModelView, PolicyType, Slot, hookimpl

LEAST_SPREAD = 1.0  # sum of squared differences of the sizes from their mean that a slope can be told from
LEAST_BATCHES = 3
CUT = 3.0  # times the expected service time


@dataclass(frozen=True)
class MarginalConfig:
    """models: it serves these; without any, those that take batches and whose model server has no batcher for them."""

    models: tuple[str, ...] = ()
    max_wait_s: float = 1.0
    slack_share: float = 0.5
    memory_batches: float = 200.0

    def __post_init__(self) -> None:
        if not 0 < self.max_wait_s < float("inf"):
            raise ValueError("max_wait_s must be positive")
        if not 0 <= self.slack_share <= 1:
            raise ValueError("slack_share must be from 0 to 1")
        if not 2 <= self.memory_batches < float("inf"):
            raise ValueError("memory_batches must be at least 2")


class Line:
    """y = intercept + slope*x by least squares; each new point takes the share 1/memory of the weight of the older ones."""

    def __init__(self) -> None:
        self.count = 0
        self.slope: float | None = None  # the last one that could be told
        self._weight = self._mean_x = self._mean_y = self._sxx = self._sxy = 0.0

    def add(self, x: float, y: float, memory: float) -> None:
        """The means and sums are moved by the differences (West 1979), which stays exact when x varies little."""
        keep = 1.0 - 1.0 / memory
        self.count += 1
        self._weight = self._weight * keep + 1.0
        dx, dy = x - self._mean_x, y - self._mean_y
        self._mean_x += dx / self._weight
        self._mean_y += dy / self._weight
        self._sxx = self._sxx * keep + dx * (x - self._mean_x)
        self._sxy = self._sxy * keep + dx * (y - self._mean_y)
        if self._sxx >= LEAST_SPREAD and self.count >= LEAST_BATCHES:
            self.slope = self._sxy / self._sxx

    @property
    def known(self) -> tuple[float, float] | None:
        """(intercept, slope), neither below 0."""
        if self.slope is None:
            return None
        slope = min(max(self.slope, 0.0), self._mean_y / self._mean_x)
        return max(self._mean_y - slope * self._mean_x, 0.0), slope


class Marginal:
    def __init__(self, config: MarginalConfig) -> None:
        self._config = config
        self._instances = 1
        self._line = Line()

    def reconfigure(self, config: MarginalConfig) -> None:
        self._config = config

    def serves(self, model: ModelView) -> bool:
        self._instances = max(1, model.instances)
        if self._config.models:
            return model.name in self._config.models
        return model.max_batch_size > 1 and not model.server_batches

    def wait_s(self, view: BatchView, now_s: float) -> float:
        known = self._line.known
        if known is None or view.idle_slots != 1 or view.arrivals_per_s <= 0.0:
            return 0.0
        fixed_s, each_s = known
        rate = view.arrivals_per_s
        gain_s = fixed_s * (1.0 + 1.0 / self._instances) / 2.0
        if view.size * (1.0 + rate * each_s) >= rate * gain_s - 1.0:
            return 0.0
        config = self._config
        spare_s = view.least_slack_s - fixed_s - each_s * (view.size + 1)
        return max(0.0, min(min(gain_s, config.max_wait_s) - view.oldest_wait_s, config.slack_share * spare_s))

    def on_batch(self, size: int, service_s: float, now_s: float) -> None:
        known = self._line.known
        if known is not None and self._line.count > 2 * LEAST_BATCHES:
            service_s = min(service_s, CUT * (known[0] + known[1] * size))
        self._line.add(size, service_s, self._config.memory_batches)

    def learnt(self) -> BatchCost | None:
        known = self._line.known
        return None if known is None else BatchCost(*known, self._line.count)


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("marginal", Slot.BATCHING, MarginalConfig, Marginal, "waits for the next step only while that pays")]
