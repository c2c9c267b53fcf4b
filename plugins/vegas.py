"""Question: how many steps of a target may be in flight, when nobody knows how many it can execute at once?

TCP Vegas (Brakmo and Peterson, 1994) as in Netflix concurrency-limits, with three changes, for single round trips say little about targets
whose service times vary. State: one window of sums, a baseline, two correlations.

**Windows.** A decision for each window of steps that ended once the previous decision has worked its way through (as Uber's Cinnamon tuner
does): q = the part of the steps in flight that waits, by Little's law N * wait / round trip. wait is what the worker measured as its
queue, or what the execution took over the baseline, twice its standard error taken off; over many windows also less than that. The way to
the worker and back is no queue of the target, nor is a wait while the worker has free slots: on a busy machine these are long, and fewer
steps in flight would not make them shorter.

    q <= threshold    L doubles until the first queue; later + 20 % or beta, the double with each further window without a queue
    q <  alpha        L + log10 L
    q >  beta         L - 0.7 (q - (alpha + beta) / 2): what is too much is known, so it need not be crept away from (FAST TCP, Jin 2004)
    threshold, alpha, beta = queue_scale * (1, 3, 6) log10 L

Growth only while the limit is in use; below half of it nothing is learnt. A share of drops over max_drops takes the limit down by it.

**Baseline.** The mean execution of steps that found less than half of the limit in flight, and of probes: every now and then the limit is
4/5 of what is busy for about a round trip. A cut that does not shorten the round trip shows the target to be slower, and not to have a
queue: the baseline becomes what it takes now, and the cut is taken back.

**Correlation veto** (Cinnamon): no growth while over the last windows the round trip goes with the steps in flight (> 0.5) and the
throughput does not (< 0.3). **Absolute cap**: ratios cannot see a level that is steadily bad, so a mean round trip over the objective
always takes the limit down.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from gateway import Ending, PolicyType, Sample, Slot, hookimpl
from gateway.core.baseline import Baseline, Probe
from gateway.core.estimators import Average
from gateway.core.limits import vegas, vegas_bounds
from gateway.core.windows import Correlation, Window

_LEAST_STEPS, _MOST_STEPS = 10, 200  # of a window; half the limit in between
_LEAST_WINDOW_S = 0.02
_FULL = 0.85  # of the limit in flight, on average
_GAIN = 0.7
_GROWTH = 0.2
_DEEPEST_CUT = 0.7  # on the evidence of the baseline, which may be wrong
_CUT_IN_VAIN = 0.85  # of the expected gain is missing
_PROBE_LEVEL = 0.8
_LEVEL_SHARE = 0.05  # of a window in the long averages
_SURE = 0.1  # relative error of a baseline from which on small differences from it mean something
_PATIENT = 3.0  # idle round trips: who gave up before that did not give up on a target that is overloaded
_MOST_WAIT = 3.0  # of the worker's average wait for a slot: what a step was under way beyond that is the way
_MEASURED = 0.02  # of the round trip in the measured queue: the worker does see it


@dataclass(frozen=True)
class VegasConfig:
    """initial, min_limit, max_limit: steps in flight for each scope and gateway. objective_s: the mean round trip that is never to be
    exceeded, two thirds of the time-out that targets have by default; `scopes` overrides it for single ones. queue_scale: how long the
    queue at the target is meant to be. max_drops: share of dropped steps that is still normal. probe_windows: windows in use between
    probes."""

    initial: int = 5
    min_limit: int = 1
    max_limit: int = 1000
    objective_s: float = 20.0
    scopes: dict[str, float] = field(default_factory=dict)
    queue_scale: float = 0.3
    max_drops: float = 0.1
    probe_windows: int = 40

    def __post_init__(self) -> None:
        if not 1 <= self.min_limit <= self.initial <= self.max_limit:
            raise ValueError("min_limit must be at least 1, initial not below it, and max_limit not below initial")
        if self.objective_s <= 0 or any(objective_s <= 0 for objective_s in self.scopes.values()):
            raise ValueError("objective_s and the objectives of scopes must be positive")
        if self.queue_scale <= 0 or not 0 <= self.max_drops < 1 or self.probe_windows < 1:
            raise ValueError("queue_scale and probe_windows must be positive, max_drops must be from 0 to below 1")


class Vegas:
    def __init__(self, config: VegasConfig) -> None:
        self._config = config
        self._batches = 0  # slots of workers that serve the scope in batches
        self._limit = float(config.initial)
        self._now = config.initial  # what limit() says: rounded, or the level of a probe
        self._starting = True
        self._quiet = 0  # windows without a queue, one after the other
        self._window = Window(0.0)
        self._settled_s = float("-inf")  # until then steps end that tell about the limit before
        self._steps = _LEAST_STEPS
        self._light = max(1, config.initial // 2)  # steps in flight up to which nothing waits
        self._base = Baseline()
        self._probe: Probe | None = None
        self._probe_in = float(config.probe_windows)  # windows
        self._cut: tuple[float, float, float] | None = None  # own_s, idle_s and inflight when the baseline had the limit cut
        self._throughput, self._own = Correlation(), Correlation()  # each with the steps in flight
        self._level_steps = 0
        self._forget()
        self._deviation, self._measured = Average(_LEVEL_SHARE), Average(_LEVEL_SHARE)

    def limit(self, scope: str) -> int:
        return self._now

    def reconfigure(self, config: VegasConfig) -> None:
        self._config, self._probe = config, None
        self._set(self._limit)

    def batch_slots(self, slots: int) -> None:
        """A fuller batch takes longer, which reads as a queue; cutting the limit for it makes batches small, and the rest wait."""
        self._batches, self._probe = slots, None
        self._set(self._limit)

    def _least(self) -> int:
        return min(max(self._config.min_limit, self._batches), self._config.max_limit)

    def on_sample(self, sample: Sample, now_s: float, random: float) -> None:
        if sample.ending is Ending.IGNORED:
            return
        window, round_trip_s = self._window, sample.round_trip_s
        if self._probe is not None:
            window = self._probed(self._probe, now_s)
        if sample.ending is Ending.DROPPED:
            # A deadline that an idle target can hardly meet is its client's affair, and what was never sent says nothing of the target.
            idle_s = self._base.value_s or (window.own_s if window.count else 0.0)
            if round_trip_s > _PATIENT * idle_s:
                window.dropped += 1
        elif round_trip_s > 0.0:
            queue_s = min(sample.queue_s, _MOST_WAIT * sample.worker_wait_s, round_trip_s)
            own_s = min(sample.service_s, round_trip_s - queue_s) or round_trip_s - queue_s
            if self._probe is not None:
                self._probe.add(own_s, now_s - round_trip_s)
            elif sample.inflight <= self._light:
                self._base.add(own_s)
            if now_s < self._settled_s:
                return
            window.add(sample.inflight, queue_s, own_s, round_trip_s - queue_s - own_s)
        if window.count + window.dropped >= self._steps and now_s >= self._settled_s and now_s - window.started_s >= _LEAST_WINDOW_S:
            self._decide(window, sample, now_s, random)

    # ---- the limit -------------------------------------------------------------------------------------------------------------

    def _decide(self, window: Window, sample: Sample, now_s: float, random: float) -> None:
        before, limit = self._now, self._limit
        round_trip_s = window.queue_s + window.idle_s if window.count else sample.round_trip_s
        dropped = window.dropped / (window.count + window.dropped)
        objective_s = self._config.scopes.get(sample.scope, self._config.objective_s)
        queue = 0.0
        if dropped > self._config.max_drops:
            self._shrink(max(0.5, 1.0 - dropped))
        elif round_trip_s > objective_s:
            self._shrink(max(0.5, objective_s / round_trip_s))
        elif window.count and 2 * window.inflight >= before:
            queue = self._adapt(window, round_trip_s, now_s)
        self._light = max(1, int(min(limit, self._limit) / 2))
        self._steps = int(min(max(_LEAST_STEPS, self._limit / 2), _MOST_STEPS))
        if self._now != before:
            self._settled_s = now_s + round_trip_s
        elif self._probe is None and window.count and self._probe_in < 0.0:
            self._start_probe(queue, round_trip_s, window.idle_s, now_s, random)
        self._window = Window(max(now_s, self._settled_s))

    def _adapt(self, window: Window, round_trip_s: float, now_s: float) -> float:
        """One step of Vegas; the queue that it found, in steps."""
        limit, inflight = self._limit, window.inflight
        full = inflight >= _FULL * self._now
        if full:
            self._probe_in -= 1.0
            self._throughput.add(inflight, window.count / (now_s - window.started_s))
            self._own.add(inflight, window.own_s)
        hidden_s = self._hidden_s(window)
        self._measured.add(window.queue_s / round_trip_s)
        queue = inflight * max(window.queue_s, hidden_s) / round_trip_s
        threshold, alpha, beta = vegas_bounds(limit, self._config.queue_scale)
        capacity = self._capacity_after_cut(window)
        if capacity:
            limit = capacity + (alpha + beta) / 2
        elif queue > beta:
            limit -= _GAIN * (queue - (alpha + beta) / 2)
            if hidden_s > window.queue_s:
                limit = max(limit, _DEEPEST_CUT * self._limit)
                self._cut = (window.own_s, window.idle_s, inflight)
        elif full and queue < alpha and not window.dropped and not self._growth_is_vain():
            if queue > threshold or not (self._starting or self._sees_queues(window)):
                limit = vegas(limit, max(queue, 1.01 * threshold), scale=self._config.queue_scale)
            else:
                step = limit if self._starting else max(beta, _GROWTH * limit) * 2.0**self._quiet
                limit += min(limit, step)
        self._quiet = self._quiet + 1 if full and queue <= threshold else 0
        self._starting = self._starting and (self._quiet > 0 or not full)
        self._set(limit)
        return queue

    def _shrink(self, factor: float) -> None:
        self._starting, self._quiet = False, 0
        self._set(self._limit * factor)

    def _set(self, limit: float) -> None:
        self._limit = min(max(limit, float(self._least())), float(self._config.max_limit))
        if self._probe is None or self._now != self._probe.level:
            self._now = int(self._limit + 0.5)

    def _sees_queues(self, window: Window) -> bool:
        """Would a queue show at once? Where it does not, no queue in one window is a poor reason for a leap."""
        return self._measured.value > _MEASURED or self._error_s(window) < 0.05 * window.own_s

    def _growth_is_vain(self) -> bool:
        own = self._own
        return own.pairs >= 10 and own.spread > 0.05 and own.value > 0.5 and self._throughput.value < 0.3

    # ---- the queue that nobody measures, and the baseline ----------------------------------------------------------------------

    def _hidden_s(self, window: Window) -> float:
        """How much longer than the baseline steps take, measured queues apart: by this window alone, or more exactly by many windows."""
        base = self._base
        self._deviation.add(window.deviation_s)
        own_s, error_s, level_s = window.own_s, self._error_s(window), self._level_own.value
        if abs(window.inflight - self._level_inflight.value) > 0.25 * window.inflight or abs(own_s - level_s) > max(
            4 * error_s, 0.2 * level_s
        ):
            self._forget()
        self._level_inflight.add(window.inflight)
        self._level_own.add(own_s)
        self._level_steps = min(self._level_steps + window.count, int(2 * window.count / _LEVEL_SHARE))
        level_s = self._level_own.value
        level_error_s = self._deviation.value * math.sqrt(1.0 / max(1.0, base.weight) + 1.0 / self._level_steps)
        if base.value_s <= 0.0 or level_s < 0.95 * base.value_s - 2.5 * level_error_s:
            base.replace(level_s, self._level_steps)
        hidden_s = own_s - base.value_s - 2.0 * math.hypot(error_s, self._deviation.value / math.sqrt(base.weight))
        if self._deviation.value < _SURE * base.value_s * math.sqrt(base.weight):
            doubt = 1.0 if self._measured.value < _MEASURED else 3.0  # where the worker measures the queue there is little left to hide
            hidden_s = max(hidden_s, level_s - base.value_s - doubt * level_error_s)
        return max(0.0, hidden_s)

    def _error_s(self, window: Window) -> float:
        """Standard error of a window's mean; a few steps that happen to be alike are no proof of precision."""
        return max(window.deviation_s, self._deviation.value) / math.sqrt(window.count)

    def _forget(self) -> None:
        """The long averages are of another limit."""
        self._level_inflight, self._level_own = Average(_LEVEL_SHARE), Average(_LEVEL_SHARE)
        self._level_steps = 0

    def _capacity_after_cut(self, window: Window) -> float:
        """After a cut of the limit: were there a queue, the round trip would be shorter in proportion. If it is not, the baseline is wrong,
        what it takes now is the new one, and the capacity follows; otherwise 0."""
        if self._cut is None or window.inflight > 0.95 * self._cut[2]:
            return 0.0
        (own_s, idle_s, inflight), self._cut = self._cut, None
        shorter_s = idle_s * (1.0 - window.inflight / inflight)
        if window.own_s > 1.05 * own_s or window.own_s - self._error_s(window) <= own_s - (1.0 - _CUT_IN_VAIN) * shorter_s:
            return 0.0
        self._base.replace(window.own_s, window.count)
        self._forget()
        return inflight * window.idle_s / idle_s

    def _start_probe(self, queue: float, round_trip_s: float, idle_s: float, now_s: float, random: float) -> None:
        self._probe_in = self._config.probe_windows * (0.5 + random / 2)
        level = max(self._least(), int(_PROBE_LEVEL * (self._limit - queue)))
        if level < self._now:
            self._probe = Probe(level, self._now, round_trip_s, idle_s, self._deviation.value, now_s)
            self._now = level
            self._settled_s = self._probe.until_s + idle_s

    def _probed(self, probe: Probe, now_s: float) -> Window:
        """Ends the lower limit, later the probe. The window from now on."""
        if self._now == probe.level and now_s > probe.until_s:
            self._now = int(self._limit + 0.5)
            self._window = Window(self._settled_s)
        if now_s > probe.over_s:
            if probe.steps.count >= Probe.LEAST_STEPS:
                self._base.learn(probe.steps, self._deviation.value)
            self._probe = None
        return self._window


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    return [PolicyType("vegas", Slot.LIMIT, VegasConfig, Vegas, "a limit that finds the target's capacity, and a latency objective")]
