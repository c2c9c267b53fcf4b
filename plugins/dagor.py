"""Question: up to which priority does a target take steps, when its workers say that steps wait too long for them?

DAGOR (Zhou et al., "Overload Control for Scaling WeChat Microservices", SoCC 2018). Priority = tier x 128 + cohort, 0 is shed last; the
cohort comes from tenant and run, so that a run stays together, and from the tenant alone where there is no run. Workers say with each
result how long steps waited for them lately; where they do not, the step's own wait counts. For each window of 1 s or 2000 steps:

    overloaded      the average wait was over 20 ms
    the next level  the largest for which at most N of the arrivals of this window lie below it
                    N = (1 - .05) x admitted when overloaded, (1 + .01) x admitted otherwise

State for each target: a histogram over the 768 priorities, three sums. Levels are this gateway's own; all gateways hear the same waits.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from gateway import ADMIT, Decision, Flow, PolicyType, Reject, Sample, ScopeView, Slot, hookimpl
from gateway.core.priorities import COHORTS, PRIORITIES, cohort, threshold
from gateway.core.shedding import dagor_level


@dataclass(frozen=True)
class DagorConfig:
    """max_wait_s: average wait for a worker beyond which a target is overloaded. window_s, window_steps: a window ends with the first of
    them. down, up: share of the admitted steps by which the level falls and rises."""

    max_wait_s: float = 0.02
    window_s: float = 1.0
    window_steps: int = 2000
    down: float = 0.05
    up: float = 0.01

    def __post_init__(self) -> None:
        if self.max_wait_s <= 0 or self.window_s <= 0 or self.window_steps < 1:
            raise ValueError("max_wait_s, window_s and window_steps must be positive")
        if not 0 < self.down < 1 or self.up <= 0:
            raise ValueError("down must be between 0 and 1, up must be positive")


class Dagor:
    def __init__(self, config: DagorConfig) -> None:
        self._config = config
        self._level = PRIORITIES  # priorities below it are admitted
        self._started_s: float | None = None
        self._reset()

    @property
    def level(self) -> int:
        return self._level

    def reconfigure(self, config: DagorConfig) -> None:
        self._config = config

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        config = self._config
        if self._started_s is None:
            self._started_s = now_s
        elif now_s - self._started_s >= config.window_s or self._arrived >= config.window_steps:
            self._next_window(now_s)
        priority = flow.tier * COHORTS + cohort(flow.tenant, flow.run, now_s)
        self._counts[priority] += 1
        self._arrived += 1
        if priority >= self._level:
            message = f"steps wait too long for the workers of {view.scope}, and this one is among the less important"
            return Reject("SHED", message, view.scope, drain_hint=True)
        self._admitted += 1
        return ADMIT

    def release(self, flow: Flow, state: object, now_s: float) -> None:
        """What the gate refuses was admitted here: the level is about the workers."""

    def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None:
        if sample.round_trip_s > 0.0:
            self._waits_s += sample.worker_wait_s or sample.queue_s
            self._ended += 1

    def _next_window(self, now_s: float) -> None:
        config = self._config
        overloaded = self._ended > 0 and self._waits_s / self._ended > config.max_wait_s
        if self._arrived:
            steps = dagor_level(self._admitted, overloaded, config.down, config.up)
            if not overloaded:
                steps = max(steps, self._admitted + 1.0)  # 1 % of a few steps would never let another one in
            level = threshold(self._counts, steps)
            if not overloaded and level <= self._level:  # the next priority that anybody has, however many steps that are
                level = next((one + 1 for one in range(self._level, len(self._counts)) if self._counts[one]), len(self._counts))
            self._level = level
        self._started_s = now_s
        self._reset()

    def _reset(self) -> None:
        self._counts = [0] * PRIORITIES
        self._arrived = self._admitted = self._ended = 0
        self._waits_s = 0.0


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    summary = "WeChat's levels: sheds by priority when workers report long waits"
    return [PolicyType("dagor", Slot.ADMISSION, DagorConfig, Dagor, summary, per_scope=True)]
