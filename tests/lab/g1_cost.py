"""G1: what a decision costs, in real time on this machine: {1, 6} tiers x {10, 5000} flows.

Every built-in policy with its default parameters, through its own methods, with as many tenants (and runs) as there are flows:

    admission      decide, and ended for what it admitted          limit          limit, on_sample
    fairness       pick, deactivate, charge with the estimate, charge with the difference, key, activate: every flow waits
    ordering       key                                             backpressure   may_wait, may_start, retry_after_s

and all policies under test together with the gate: `enter` and `end`, where nobody waits, and where every flow waits all the time, for
which the limit is fixed, the queue wide and nothing sheds; an `end` there also decides who is next. A row has what all these calls cost
together, for one step: the median over batches of 20 steps, so that what else the machine does in between counts for little.

Limits: 50 us a step for a policy, which is stricter than for each call; 50 us for each of enter and end; and with 5000 flows at most twice
what it costs with 10, where that is over a microsecond: below, it is the processor's caches that are measured.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count, cycle
from statistics import median
from time import perf_counter
from typing import Any

from gateway import config, loader
from gateway.core.permit import Permit
from gateway.policy import Admit, Ending, PolicyType, Sample, ScopeView, Slot
from gateway.types import Flow, Kind, Lane
from tests.lab.scenario import Measured, Scenario, Stack

FLOW = Flow("", "plan", Kind.INFER, Lane.STANDARD)
VIEW = ScopeView("infer.plan", 8, 8, 100, 0.05, 80.0, 0.12, 0.1)
SAMPLE = Sample("infer.plan", Ending.SUCCEEDED, 0.12, 0.02, 0.1, 8, 1.1, 0.01, 0.03)
WIDE = {"use": "bounded_wait", "max_waiting": 1_000_000, "max_wait_s": 1e6, "wait_ratio": 1e9}
SLOTS = 8
TIERS, FLOWS = (1, 6), (10, 5000)
MOST_US, MOST_RATIO, TOO_LITTLE_US = 50.0, 2.0, 1.0
BATCH = 20
COUNTED = (Slot.ADMISSION, Slot.LIMIT, Slot.FAIRNESS, Slot.ORDERING, Slot.BACKPRESSURE)

Step = Callable[[], object]


def flows(tiers: int, number: int) -> list[Flow]:
    return [replace(FLOW, tenant=f"tenant{index}", run=f"run{index}", tier=index % tiers) for index in range(number)]


def costs_us(steps: list[Step], batches: int) -> list[float]:
    """Of one call of each: medians over the batches, which take turns, so that the same moments are compared."""
    took_s: list[list[float]] = [[] for _ in steps]
    for _ in range(batches):
        for number, step in enumerate(steps):
            began_s = perf_counter()
            for _ in range(BATCH):
                step()
            took_s[number].append(perf_counter() - began_s)
    return [1e6 * median(one) / BATCH for one in took_s]


def clock() -> Callable[[], float]:
    """A millisecond a call."""
    ticks = count(1)
    return lambda: next(ticks) / 1000


def admission(policy: Any, of: list[Flow]) -> Step:
    turn, now = cycle(of), clock()

    def step() -> None:
        flow, now_s = next(turn), now()
        decision = policy.decide(flow, VIEW, now_s, 0.5)
        if isinstance(decision, Admit):
            policy.ended(flow, decision.state, SAMPLE, now_s)

    return step


def limit(policy: Any, of: list[Flow]) -> Step:
    now = clock()

    def step() -> None:
        policy.limit(FLOW.scope)
        policy.on_sample(SAMPLE, now(), 0.5)

    return step


def fairness(policy: Any, of: list[Flow]) -> Step:
    now = clock()
    by_key = {policy.key(flow): flow for flow in of}
    for key, flow in by_key.items():
        policy.activate(key, flow, 0.0)

    def step() -> None:
        now_s = now()
        key = policy.pick(now_s)
        flow = by_key.pop(key)
        policy.deactivate(key, now_s)
        policy.charge(key, flow, 1.0, now_s)
        policy.charge(key, flow, 0.1, now_s)
        key = policy.key(flow)
        policy.activate(key, flow, now_s)
        by_key[key] = flow

    return step


def ordering(policy: Any, of: list[Flow]) -> Step:
    turn, now = cycle(of), clock()
    return lambda: policy.key(next(turn), now(), VIEW)


def backpressure(policy: Any, of: list[Flow]) -> Step:
    turn, now = cycle(of), clock()

    def step() -> None:
        flow, now_s = next(turn), now()
        policy.may_wait(flow, VIEW, now_s)
        policy.may_start(flow, 0.01, VIEW, now_s)
        policy.retry_after_s(flow, VIEW, now_s, 0.5)

    return step


CYCLES: dict[Slot, Callable[[Any, list[Flow]], Step]] = {
    Slot.ADMISSION: admission,
    Slot.LIMIT: limit,
    Slot.FAIRNESS: fairness,
    Slot.ORDERING: ordering,
    Slot.BACKPRESSURE: backpressure,
}


def path(stack: Stack, of: list[Flow], *, all_wait: bool) -> Step:
    """One step in, one step out."""
    if all_wait:
        stack = stack.without(Slot.ADMISSION).with_({"use": "fixed_limit", "limit": SLOTS}, WIDE, *admission_tables(stack))
    # The clock that looks for slow policies is read, and says nothing: somebody else's turn on this machine is no fault of theirs.
    permits, now, turn = stack.permits(lambda: 0.5, lambda: perf_counter() * 0.0), clock(), cycle(of)
    granted: deque[Permit] = deque()
    woken: deque[Permit] = deque()

    def enter(now_s: float) -> None:
        permit = permits.enter(next(turn), now_s)
        if permit.is_waiting:
            permit.wake = lambda: woken.append(permit)
        elif not permit.refusal:
            granted.append(permit)

    def step() -> None:
        now_s = now()
        enter(now_s)
        if granted:
            permits.end(granted.popleft(), SAMPLE, now_s)
        while woken:
            permit = woken.popleft()
            permits.woken(permit, now_s)
            if not permit.refusal:
                granted.append(permit)

    while all_wait and permits.gate(FLOW.scope).waiting < len(of):
        enter(0.0)
    return step


def admission_tables(stack: Stack) -> Iterator[Any]:
    """Without those that shed: here everybody is to wait."""
    of = stack.slots()
    return (table for table in stack.policies if of[table["use"]] is Slot.ADMISSION and table["use"] == "token_bucket")


def subjects(stack: Stack) -> dict[str, Callable[[list[Flow]], Step]]:
    """What is measured, by name."""
    types: list[PolicyType] = [*loader.policy_types(loader.find_plugins(config.parse({}))).values(), *stack.extra]
    found: dict[str, Callable[[list[Flow]], Step]] = {}
    for one in sorted((one for one in types if one.slot in COUNTED), key=lambda one: (COUNTED.index(one.slot), one.name)):
        found[f"{one.name} ({one.slot})"] = lambda of, one=one: CYCLES[one.slot](one.build(one.config()), of)  # type: ignore[misc]
    found[f"{stack.name}: enter and end, nobody waits"] = lambda of: path(stack, of, all_wait=False)
    found[f"{stack.name}: enter and end, all wait"] = lambda of: path(stack, of, all_wait=True)
    return found


def run(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    found = []
    batches = 60 if quick else 600
    for name, make in subjects(stack).items():
        most_us = 2 * MOST_US if "enter and end" in name else MOST_US
        for tiers in TIERS:
            of_tiers = f"{tiers} tier{'s' if tiers > 1 else ''}"
            steps = [make(flows(tiers, number)) for number in FLOWS]
            costs_us(steps, 10 if quick else FLOWS[1] // BATCH)  # until state has the size that it has in use
            few, many = costs_us(steps, batches)
            for number, took_us in zip(FLOWS, (few, many), strict=True):
                found.append(Measured(name, f"{number} flows, {of_tiers}", "us a step", took_us, most_us))
            target = MOST_RATIO if many > TOO_LITTLE_US else None
            found.append(Measured(name, of_tiers, "5000 flows / 10 flows", many / few, target))
    return found


SCENARIO = Scenario("G1", "the cost of a decision", run, seeds=3)
