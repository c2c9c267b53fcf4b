"""B1: tenants that ask for more than their share beside tenants that do not.

The suites of "Fairness in Serving Large Language Models" (OSDI 2024), section 5, in our units, and one elephant with a hundred mice. So
that fairness itself is measured, thousands may wait at the gate and its limit is the slots of the server. Beside it, for reading: `whole
stack`, with all policies under test as they are; and services of constant length, where slots that began together end together for ever,
so that a mouse may find all of them half-way and waits for a part of a service, whatever the order.

gap / bound         For any two tenants and any time in which both have steps waiting throughout: the difference of the service that they
                    got, in cost units, charged at dispatch with the estimate and at the end with the difference to the real cost. The
                    paper's bound 2 * max(w_in * L_in, w_out * M) has w_in * L_in, the largest cost known at dispatch, for which we have
                    L, the largest estimate (all are 1: what a step costs is unknown), and w_out * M, the most that what is running can
                    still add, for which we have c * D: c slots, and D the largest amount that a step of the run cost more or less than
                    estimated. Bound: 2 * (L + c * D). The sizes of a suite have D from its own measured costs.
busy while waiting  share of slots that work, looked at every 5 ms, while anybody waits
mouse p99 / alone   99th percentile of the mice's latency over that of the same mice (arrivals and sizes) without the elephant
mice served         of the whole stack, which refuses steps where the others let them wait: the share of the mice's steps that ended well.
                    Each asks for far less than an equal share, so a stack that is fair to them refuses hardly any.

The failing control is no fairness policy: first come first served.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from gateway.core.permit import Permit
from gateway.core.permits import Permits
from gateway.policy import PolicyType, Sample, Slot
from gateway.types import Flow, Kind, Lane
from tests.lab.engine import Gateway, Server, Simulation, percentile, poisson, service_time
from tests.lab.scenario import Measured, Scenario, Stack

FLOW = Flow("", "plan", Kind.INFER, Lane.STANDARD)
MEAN_S, LOOK_S = 0.1, 0.005
WIDE = {"use": "bounded_wait", "max_waiting": 10_000_000, "max_wait_s": 1e7, "wait_ratio": 1e9}
MICE = tuple(f"mouse{number}" for number in range(100))
MICE_LOAD = 0.3  # of all mice together; each is far below a 101st of the capacity


@dataclass(frozen=True)
class NoConfig:
    """An observer of the laboratory: no parameters."""


class Ledger:
    """The gateway's permits, and as an observer: who waits and what each tenant was charged."""

    def __init__(self) -> None:
        self.permits: Permits
        self.waiting: Counter[str] = Counter()
        self.service: defaultdict[str, float] = defaultdict(float)
        self.largest_estimate = self.largest_error = self.widest = 0.0
        self._ranges: dict[tuple[str, str], tuple[float, float]] = {}

    def enter(self, flow: Flow, now_s: float) -> Permit:
        permit = self.permits.enter(flow, now_s)
        self.largest_estimate = max(self.largest_estimate, flow.cost)
        if permit.is_waiting:
            self.waiting[flow.tenant] += 1
        elif not permit.refusal:
            self._charge(flow, flow.cost)
        return permit

    def woken(self, permit: Permit, now_s: float) -> None:
        self.permits.woken(permit, now_s)
        self.waiting[permit.flow.tenant] -= 1
        if not permit.refusal:
            self._charge(permit.flow, permit.flow.cost)

    def give_up(self, permit: Permit, now_s: float) -> bool:
        left = self.permits.give_up(permit, now_s)
        self.waiting[permit.flow.tenant] -= left
        return left

    def end(self, permit: Permit, sample: Sample, now_s: float) -> None:
        self.permits.end(permit, sample, now_s)

    def rejected(self, flow: Flow, policy: str, reason: str, now_s: float) -> None:
        """Of no interest here."""

    def ended(self, flow: Flow, sample: Sample, now_s: float) -> None:
        error = sample.cost - flow.cost
        self.largest_error = max(self.largest_error, abs(error))
        self._charge(flow, error)

    def start_over(self) -> None:
        """Intervals are looked at from now on."""
        self._ranges.clear()
        self.largest_error = self.widest = 0.0

    @property
    def somebody_waits(self) -> bool:
        return any(self.waiting.values())

    def _charge(self, flow: Flow, cost: float) -> None:
        self.service[flow.tenant] += cost
        present = [tenant for tenant, waiting in self.waiting.items() if waiting]
        if len(present) > 2:
            return  # pairs are looked at where there are two
        for pair in [pair for pair in self._ranges if not all(self.waiting[tenant] for tenant in pair)]:
            del self._ranges[pair]
        for one, other in combinations(present, 2):
            gap = self.service[one] - self.service[other]
            low, high = self._ranges.get((one, other), (gap, gap))
            self._ranges[one, other] = low, high = min(low, gap), max(high, gap)
            self.widest = max(self.widest, high - low)


class World:
    """A server of `slots` with one gateway before it. `table` is its fairness policy, None for none; `whole` keeps the other policies."""

    def __init__(self, stack: Stack, table: Mapping[str, Any] | None, seed: int, slots: int, *, whole: bool = False) -> None:
        self.simulation = Simulation(seed)
        self.server = Server(self.simulation, slots)
        self.ledger = Ledger()
        observer = PolicyType("lab_ledger", Slot.OBSERVER, NoConfig, lambda config: self.ledger)
        stack = replace(stack, extra=(*stack.extra, observer)).with_({"use": "lab_ledger"}).without(Slot.FAIRNESS)
        if not whole:
            stack = stack.without(Slot.ADMISSION).with_({"use": "fixed_limit", "limit": slots}, WIDE)
        if table:
            stack = stack.with_(table)
        self.ledger.permits = stack.permits(self.simulation.random.random, lambda: self.simulation.now_s)
        self.gateway = Gateway(self.simulation, self.server, self.ledger)  # type: ignore[arg-type]
        self._looks = self._busy = 0.0

    def sends(
        self, tenant: str, load: float | Callable[[float], float], kind: str, until_s: float, size: float = 1.0, seed: int = 0
    ) -> None:
        """Poisson arrivals at `load` times the capacity, measured in steps of the mean size; a tenant has a random source of its own, so
        that it sends the same whoever else is there."""
        source = random.Random(f"{tenant} {seed}")
        draw = service_time(kind, size * MEAN_S, source)
        own = Simulation(0)
        own.random = source
        per_s = self.server.slots / (MEAN_S * size)
        flow = replace(FLOW, tenant=tenant)
        arrivals: list[tuple[float, float]] = []
        poisson(own, lambda now_s: per_s * (load(now_s) if callable(load) else load), lambda: arrivals.append((own.now_s, draw())), until_s)
        own.run(until_s)
        iterator = iter(arrivals)

        def plan() -> None:
            following = next(iterator, None)
            if following:
                self.simulation.at(following[0], lambda: come(following[1]))

        def come(service_s: float) -> None:
            plan()
            self.gateway.offer(flow, service_s)

        plan()

    def run(self, warm_up_s: float, until_s: float) -> None:
        self.simulation.run(warm_up_s)
        self.ledger.start_over()
        self.simulation.after(LOOK_S, self._look)
        self.simulation.run(until_s)

    @property
    def busy(self) -> float:
        return self._busy / self._looks if self._looks else float("nan")

    @property
    def bound(self) -> float:
        return 2 * (self.ledger.largest_estimate + self.server.slots * self.ledger.largest_error)

    def p99_s(self, of: Callable[[str], bool], from_s: float, to_s: float) -> float:
        return percentile(
            [
                step.latency_s
                for step in self.gateway.records
                if step.outcome == "ok" and of(step.flow.tenant) and from_s <= step.arrived_s < to_s
            ],
            0.99,
        )

    def _look(self) -> None:
        if self.ledger.somebody_waits:
            self._looks += 1
            self._busy += self.server.running / self.server.slots
        self.simulation.after(LOOK_S, self._look)


def under_test(stack: Stack) -> Mapping[str, Any]:
    of = stack.slots()
    return next((table for table in stack.policies if of[table["use"]] is Slot.FAIRNESS), {"use": "vtc"})


EQUALS = "on-off, more than its share"
Suite = tuple[str, str, list[tuple[str, float | Callable[[float], float], float]]]
# Loads are of the capacity; the paper's rates in relation to what its server could do. Sizes are in means of the service time.
SUITES: list[Suite] = [
    ("two clients", "const", [("a", 0.75, 1.0), ("b", 1.5, 1.0)]),
    ("two clients", "exp", [("a", 0.75, 1.0), ("b", 1.5, 1.0)]),
    ("on-off, less than its share", "exp", [("a", lambda now_s: 0.25 if now_s % 10 < 5 else 0.0, 1.0), ("b", 1.0, 1.0)]),
    (EQUALS, "exp", [("a", lambda now_s: 1.5 if now_s % 10 < 5 else 0.0, 1.0), ("b", 1.5, 1.0)]),
    ("Poisson, short and long", "exp", [("a", 0.75, 0.5), ("b", 1.5, 2.0)]),
]


def suites(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    found = []
    seconds = 12.0 if quick else 25.0
    for name, kind, clients in SUITES:
        for table in (under_test(stack), None):
            world = World(stack, table, seed, 8)
            for tenant, load, size in clients:
                world.sends(tenant, load, kind, seconds, size, seed)
            world.run(2.0, seconds)
            policy, workload = (table or {"use": "FCFS"})["use"], f"{name}, {kind}"
            control = table is None
            # First come first served is fair while nobody sends more than others.
            target = None if control and name == EQUALS else 1.0
            found.append(Measured(policy, workload, "gap / bound", world.ledger.widest / world.bound, target, control=control))
            found.append(Measured(policy, workload, "busy while waiting", world.busy, None if control else 0.99, at_most=False))
    return found


def elephant(stack: Stack, seed: int, quick: bool, kind: str, whole: bool = False) -> list[Measured]:
    slots, warm_up_s, seconds = 8, 5.0, 20.0 if quick else 60.0

    def world_of(table: Mapping[str, Any] | None, load: float) -> World:
        world = World(stack, table, seed, slots, whole=whole)
        for mouse in MICE:
            world.sends(mouse, MICE_LOAD / len(MICE), kind, seconds, seed=seed)
        if load:
            world.sends("elephant", load, kind, seconds, seed=seed)
        world.run(warm_up_s, seconds)
        return world

    def mouse(tenant: str) -> bool:
        return tenant != "elephant"

    table, to_s = under_test(stack), seconds - 10 * MEAN_S
    alone_s = world_of(table, 0.0).p99_s(mouse, warm_up_s, to_s)
    judged = not whole and kind != "const"
    workload = f"elephant and mice, {kind}{', whole stack' if whole else ''}"
    found = []
    for one in (table, None) if judged else (table,):
        world = world_of(one, 2.0)
        policy, control = (one or {"use": "FCFS"})["use"], one is None
        ratio = world.p99_s(mouse, warm_up_s, to_s) / alone_s
        found.append(Measured(policy, workload, "mouse p99 / alone", ratio, 1.2 if judged else None, control=control))
        found.append(Measured(policy, workload, "busy while waiting", world.busy, 0.99 if judged and one else None, at_most=False))
    if whole:
        mice = [step for step in world.gateway.records if mouse(step.flow.tenant) and warm_up_s <= step.arrived_s < to_s]
        found.append(Measured(policy, workload, "mice served", sum(step.outcome == "ok" for step in mice) / len(mice)))
    return found


def run(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    found = suites(stack, seed, quick)
    for kind in ["exp"] if quick else ["exp", "bimodal", "const"]:
        found += elephant(stack, seed, quick, kind)
    return found + elephant(stack, seed, quick, "exp", whole=True)


SCENARIO = Scenario("B1", "fairness", run)
