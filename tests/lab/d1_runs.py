"""D1: runs of heavy-tailed length at 90 % of the capacity.

Runs arrive at random (Poisson). The number of their steps is Pareto with exponent 1.1 between 1 and 1000: half have one step, one in a
hundred has more than sixty. A step takes an exponential time. The steps of a run come one after the other, as an agent makes them, or all
at once, as when it fans out. Any number may wait at the gate, whose limit is the slots of the server.

Completion is from the arrival of a run to the end of its last step, averaged over the runs that arrived after the warm-up and that every
policy finished; all policies see the same arrivals, lengths and sizes. Target: at most .7 of the mean under first come first served. The
failing control is fairness by tenant, which does not know of runs. Oracle: shortest remaining run first, which knows the lengths, as no
policy can.

With steps one after the other first come first served shares the slots among runs, and with four slots a run, which can use only one,
hardly waits: half of its completion is its own work, and the oracle itself gets no further than about .7. So this case is for reading.
"""

import random
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, replace
from statistics import mean
from typing import Any

from gateway.core.keyed_heap import KeyedHeap
from gateway.policy import PolicyType, Slot
from gateway.types import Flow, Kind, Lane
from tests.lab.engine import Gateway, Server, Simulation, StepRecord
from tests.lab.scenario import Measured, Scenario, Stack

FLOW = Flow("acme", "plan", Kind.INFER, Lane.STANDARD)
MEAN_S, LOAD = 0.1, 0.9
EXPONENT, MOST_STEPS, LONG = 1.1, 1000, 100
BEYOND = (MOST_STEPS + 1.0) ** -EXPONENT  # of the unbounded distribution
MEAN_STEPS = sum((n**-EXPONENT - BEYOND) / (1 - BEYOND) for n in range(1, MOST_STEPS + 1))
WIDE = {"use": "bounded_wait", "max_waiting": 10_000_000, "max_wait_s": 1e7, "wait_ratio": 1e9}
CASES = [("one after the other", 1, True), ("at once", 4, True), ("one after the other", 4, False)]  # steps, slots, judged


class Run:
    def __init__(self, gateway: Gateway, name: str, services_s: list[float], at_once: bool) -> None:
        self.steps = self.left = len(services_s)
        self.began_s = gateway.simulation.now_s
        self.ended_s = float("inf")
        self._gateway, self._services_s = gateway, services_s
        self._flow = replace(FLOW, run=name)
        for _ in range(self.steps if at_once else 1):
            self._send()

    def _send(self) -> None:
        self._gateway.offer(self._flow, self._services_s.pop(), self._ended)

    def _ended(self, ended: StepRecord) -> None:
        self.left -= 1
        if not self.left:
            self.ended_s = self._gateway.simulation.now_s
        elif self._services_s:
            self._send()


@dataclass(frozen=True)
class NoConfig:
    """The oracle has no parameters."""


class ShortestRemaining:
    """The oracle: the run with the fewest steps left goes first. It is told how many they are."""

    def __init__(self, left: Counter[str]) -> None:
        self._left = left
        self._active = KeyedHeap()

    def key(self, flow: Flow) -> Hashable:
        return flow.run

    def activate(self, key: Hashable, flow: Flow, now_s: float) -> None:
        self._active.set(key, (self._left[flow.run],))

    def deactivate(self, key: Hashable, now_s: float) -> None:
        self._active.remove(key)

    def pick(self, now_s: float) -> Hashable:
        return self._active.first()[0]

    def charge(self, key: Hashable, flow: Flow, cost: float, now_s: float) -> None:
        if cost == flow.cost:  # a dispatch
            self._left[flow.run] -= 1
            if key in self._active:
                self._active.set(key, (self._left[flow.run],))


def lengths(source: random.Random) -> int:
    """By inversion."""
    tail: float = 1 - source.random() * (1 - BEYOND)
    return min(MOST_STEPS, int(tail ** (-1 / EXPONENT)))


def runs(stack: Stack, table: Mapping[str, Any] | None, seed: int, slots: int, at_once: bool, seconds: float) -> list[Run]:
    """All that arrived, in their order; the same for every policy."""
    simulation, source = Simulation(seed), random.Random(seed)
    left: Counter[str] = Counter()
    oracle = PolicyType("shortest_remaining", Slot.FAIRNESS, NoConfig, lambda config: ShortestRemaining(left))
    stack = replace(stack, extra=(*stack.extra, oracle)).without(Slot.ADMISSION, Slot.FAIRNESS)
    stack = stack.with_({"use": "fixed_limit", "limit": slots}, WIDE)
    if table:
        stack = stack.with_(table)
    permits = stack.permits(simulation.random.random, lambda: simulation.now_s)
    gateway = Gateway(simulation, Server(simulation, slots), permits)
    found: list[Run] = []

    def arrive() -> None:
        services_s = [source.expovariate(1 / MEAN_S) for _ in range(lengths(source))]
        name = f"run{len(found)}"
        left[name] = len(services_s)
        found.append(Run(gateway, name, services_s, at_once))
        simulation.after(source.expovariate(rate_per_s), arrive)

    rate_per_s = LOAD * slots / MEAN_S / MEAN_STEPS
    simulation.after(source.expovariate(rate_per_s), arrive)
    simulation.run(seconds)
    return found


def under_test(stack: Stack) -> Mapping[str, Any]:
    """A fairness policy that was asked for by name; otherwise the one that is made for this."""
    of = stack.slots()
    named = [table for table in stack.policies if of[table["use"]] is Slot.FAIRNESS] if stack.name != "defaults" else []
    return named[0] if named else {"use": "las"}


def case(stack: Stack, seed: int, quick: bool, steps: str, slots: int, judged: bool) -> list[Measured]:
    seconds, warm_up_s = (200.0, 20.0) if quick else (1600.0 / slots, 160.0 / slots)
    tables = {"FCFS": None, "test": under_test(stack), "control": {"use": "vtc"}, "oracle": {"use": "shortest_remaining"}}
    of = {name: runs(stack, table, seed, slots, steps == "at once", seconds) for name, table in tables.items()}
    counted = [
        number
        for number, one in enumerate(of["FCFS"])
        if one.began_s >= warm_up_s and all(found[number].ended_s < float("inf") for found in of.values())
    ]

    def ratio(name: str, numbers: list[int]) -> float:
        """Of the mean completions."""
        ours, theirs = (mean(of[policy][number].ended_s - of[policy][number].began_s for number in numbers) for policy in (name, "FCFS"))
        return ours / theirs

    use, what = under_test(stack)["use"], "mean completion / FCFS"
    workload = f"steps {steps}, {slots} slot{'s' if slots > 1 else ''}, rho {LOAD:g}"
    target = 0.7 if judged else None
    found = [
        Measured(use, workload, what, ratio("test", counted), target),
        Measured("vtc", workload, what, ratio("control", counted), target, control=True),
        Measured("shortest remaining", workload, what, ratio("oracle", counted)),
    ]
    long = [number for number in counted if of["FCFS"][number].steps > LONG]
    if long:
        found.append(Measured(use, f"{workload}, runs of over {LONG} steps", what, ratio("test", long)))
    return found


def run(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    return [one for steps, slots, judged in CASES for one in case(stack, seed, quick, steps, slots, judged)]


SCENARIO = Scenario("D1", "runs of heavy-tailed length", run)
