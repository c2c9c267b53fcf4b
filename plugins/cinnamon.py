"""Question: when a target has more to do than it can, which steps are turned away?

The least important ones, and whole runs rather than single steps of many. Priority shedding by the controller of Cinnamon (Uber
Engineering blog, "Cinnamon: Using Century Old Tech to Build a Mean Load Shedder", 2023): priority = tier x 128 + cohort, 0 is shed last;
a PI controller on in-flow, out-flow and free slots says which share of the arrivals is too much, and the distribution of the last 1000
priorities turns that share into a threshold:

    error  = (passed - ended - free) / arrived, in a tick of 500 ms         ratio = Kp error + Ki integral(error dt), within 0..1
    passed = those with a priority below the threshold                      free = what the slots and a short queue could still take

Divided by the arrivals, the loop's gain does not depend on the load. Slower targets get longer ticks: at least 30 arrivals, 10 s at most.

Shedding begins when the gate's queue has had to refuse a step; a queue that comes and goes is no overload.

Between the ticks the queue decides, without the steps under way that are less important, since the gate lets those wait. While a slot is
free, or the queue is shorter than an eighth of the slots, everything is admitted: nothing is shed while there is capacity. From there on
the threshold counts, and its share falls, to a half when the queue is half as long as the slots are many, so that what is admitted is not
refused by the full queue behind.

All steps of a run have the same cohort, which is kept for the life of a run once it was admitted; others get a new one every few minutes.
Admitted runs have the front half of the cohorts of their tier, for up to 64 steps: a run that was begun is to be finished. So have steps of
modest tenants, which ask for no more than an equal share of what the tier gets done: they are not refused for what others send. Other steps
without a run are on their own.

State for each target: 1000 priorities, the admitted runs (the least recently used one is dropped beyond `max_runs`), six counters of
steps under way, the controller. Which runs were admitted is known to this gateway only.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from gateway import ADMIT, TIERS, Admit, Decision, Flow, PolicyType, Reject, Sample, ScopeView, Slot, hookimpl
from gateway.core.precedence import Precedence
from gateway.core.priorities import COHORTS, PRIORITIES, RecentPriorities, cohort
from gateway.core.shares import Shares
from gateway.core.shedding import ShedRatio, flow_error

_LEAST_ARRIVALS, _LONGEST_TICK_S = 30, 10.0
_LEVELS = 16  # of the queue's length, each with its threshold
_SHORT, _LONG = 0.125, 0.5  # queue, in slots
_MOST_FAVOURS = 64  # steps of one run: a tenant that gives one name to all it does gains no more
_FAVOURED = Admit(favoured=True)
_MOST, _LEAST = 1.25, 0.5  # of the share: without a queue, and with a long one


@dataclass(frozen=True)
class CinnamonConfig:
    """kp, ki: gains of the controller, ki a second. tick_s: how often it is asked. max_runs: admitted runs remembered for each target."""

    kp: float = 0.1
    ki: float = 1.4
    tick_s: float = 0.5
    max_runs: int = 10_000

    def __post_init__(self) -> None:
        if self.kp < 0 or self.ki <= 0 or self.tick_s <= 0 or self.max_runs < 1:
            raise ValueError("ki, tick_s and max_runs must be positive, kp must not be negative")
        if self.ki * self.tick_s >= 2:
            raise ValueError("ki * tick_s must be below 2, or the controller swings")


@dataclass(slots=True)
class _Run:
    cohort: int
    begun: bool = False  # a step of it was executed
    favours: int = 0  # how often that counted


class Cinnamon:
    def __init__(self, config: CinnamonConfig) -> None:
        self._config = config
        self._ratio = ShedRatio()
        self._recent = RecentPriorities()
        self._threshold = PRIORITIES
        self._thresholds = [PRIORITIES] * (_LEVELS + 1)
        self._runs: OrderedDict[tuple[str, str], _Run] = OrderedDict()
        self._under_way = [0] * TIERS
        self._precedence = Precedence()
        self._shares = Shares()
        self._ticked_s = float("-inf")
        self._arrived = self._passed = self._ended = 0
        self._refused = False  # by the gate, in this tick

    @property
    def ratio(self) -> float:
        """The share of the arrivals that is too much."""
        return self._ratio.value

    def reconfigure(self, config: CinnamonConfig) -> None:
        self._config = config
        while len(self._runs) > config.max_runs:
            self._runs.popitem(last=False)

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        if now_s - self._ticked_s >= self._config.tick_s:
            self._tick(view, now_s)
        run = self._runs.get((flow.tenant, flow.run)) if flow.run else None
        self._shares.came(flow.tenant, flow.tier, flow.cost, now_s)
        favoured = (run is not None and run.begun and run.favours < _MOST_FAVOURS) or self._shares.is_modest(flow.tenant, flow.tier)
        priority = self._priority(flow, run, favoured, now_s, random)
        self._recent.add(priority)
        self._arrived += 1
        self._passed += priority < self._threshold
        tier = flow.tier
        queue = view.inflight + view.waiting - sum(self._under_way[tier + 1 :]) - view.limit
        if queue >= 0 and priority >= self._thresholds[_level(queue, view.limit)] and not self._precedence.outranks(tier, favoured):
            message = f"{view.scope} has more steps than it can execute, and this one is among the less important"
            return Reject("SHED", message, view.scope, drain_hint=True)
        self._under_way[tier] += 1
        if run is not None and favoured:
            run.favours += 1
        if flow.run:
            self._remember(flow, run, priority)
        return _FAVOURED if favoured else ADMIT

    def release(self, flow: Flow, state: object, now_s: float) -> None:
        """The gate had no room for it: a run whose first step this was has not begun."""
        self._refused = True
        self._left(flow.tier)
        run = self._runs.get((flow.tenant, flow.run))
        if run is not None and not run.begun:
            del self._runs[flow.tenant, flow.run]

    def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None:
        self._left(flow.tier)
        if sample.round_trip_s <= 0.0:  # never dispatched, as a job that was stored: it says nothing about this gateway's flows
            self._arrived, self._passed = max(0, self._arrived - 1), max(0, self._passed - 1)
            return
        self._ended += 1
        self._precedence.served(flow.tier, flow.favoured)
        self._shares.served(flow.tier, sample.cost)
        run = self._runs.get((flow.tenant, flow.run))
        if run is not None:
            run.begun = True

    def _left(self, tier: int) -> None:
        self._under_way[tier] = max(0, self._under_way[tier] - 1)  # it may have come while the kernel went without this policy

    def _priority(self, flow: Flow, run: _Run | None, favoured: bool, now_s: float, random: float) -> int:
        if run is not None and favoured:
            return flow.tier * COHORTS + run.cohort // 2
        own = cohort(flow.tenant, flow.run, now_s) if flow.run else int(random * COHORTS)
        return flow.tier * COHORTS + (own if favoured else COHORTS + own) // 2

    def _remember(self, flow: Flow, run: _Run | None, priority: int) -> None:
        key = flow.tenant, flow.run
        if run is not None:
            self._runs.move_to_end(key)
            return
        self._runs[key] = _Run(2 * (priority % COHORTS) % COHORTS)
        if len(self._runs) > self._config.max_runs:
            self._runs.popitem(last=False)

    def _tick(self, view: ScopeView, now_s: float) -> None:
        config = self._config
        if self._arrived < _LEAST_ARRIVALS and now_s - self._ticked_s < max(_LONGEST_TICK_S, config.tick_s):
            return
        if view.inflight + view.waiting == 0:
            self._under_way = [0] * TIERS
        free = view.limit * (1 + _SHORT) - view.inflight - view.waiting
        error = flow_error(self._passed, self._ended, free, self._arrived)
        if not self._refused and self._ratio.value == 0.0:
            error = min(error, 0.0)  # a burst, or callers that wait for each other: the queue takes it
        passes = 1.0 - self._ratio.update(error, config.tick_s, config.kp, config.ki)
        self._threshold = self._recent.thresholds([passes])[0]
        if passes == 1.0:
            self._thresholds = [PRIORITIES] * (_LEVELS + 1)
        else:
            self._thresholds = self._recent.thresholds(
                [passes * (_MOST - (_MOST - _LEAST) * level / _LEVELS) for level in range(_LEVELS + 1)]
            )
        self._arrived = self._passed = self._ended = 0
        self._refused = False
        self._ticked_s = now_s


def _level(queue: int, limit: int) -> int:
    """0 without a queue, _LEVELS for a long one."""
    return min(_LEVELS, int(queue / (_LONG * limit) * _LEVELS))


@hookimpl
def nearloop_policy_types() -> Iterable[PolicyType]:
    summary = "priority shedding: the least important steps, whole runs at a time"
    return [PolicyType("cinnamon", Slot.ADMISSION, CinnamonConfig, Cinnamon, summary, per_scope=True)]
