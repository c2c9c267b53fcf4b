"""A1: Poisson arrivals at .5 to 10 times the capacity of a server whose slots the policies are not told.

Oracle: a static limit that knows the slots, with as many places to wait and no network before the server, in the same engine with the
same arrivals and work; with exponential service it is M/M/c/2c. Goodput is the share of the slots' time that is spent on steps which end
well, which has the expectation of completions over capacity and less noise. Unloaded is the 99th percentile of the service time itself plus
the network. A reject is timed in real time, around the decision. The control has no policies at all.

`hidden` workloads keep their queue inside the server, as a model server does: no queue time is told, only a longer service.
"""

import math
from collections.abc import Callable
from time import thread_time

from gateway.core.permit import Permit
from gateway.core.permits import Permits
from gateway.types import Flow, Kind, Lane
from tests.lab.engine import Gateway, Server, Simulation, percentile, poisson, service_time
from tests.lab.scenario import Measured, Scenario, Stack

FLOW = Flow("acme", "plan", Kind.INFER, Lane.STANDARD)
MEAN_S, NETWORK_S = 0.1, 0.002
WARM_UP_S, SECONDS = {8: 15.0, 32: 8.0}, {8: 20.0, 32: 10.0}  # by slots
P99 = {"const": MEAN_S, "exp": MEAN_S * math.log(100), "bimodal": 5.5 * MEAN_S}
LOADS = (0.5, 1.0, 2.0, 5.0, 10.0)
CELLS = [(slots, kind, False) for slots in (8, 32) for kind in ("const", "exp", "bimodal")] + [(8, "const", True), (8, "exp", True)]


class Timed:
    """The gateway's permits, with the processor time of each refusal."""

    def __init__(self, permits: Permits) -> None:
        self._permits = permits
        self.refusals_s: list[float] = []

    def enter(self, flow: Flow, now_s: float) -> Permit:
        began_s = thread_time()
        permit = self._permits.enter(flow, now_s)
        if permit.refusal:
            self.refusals_s.append(thread_time() - began_s)
        return permit

    def __getattr__(self, name: str) -> Callable[..., object]:
        found: Callable[..., object] = getattr(self._permits, name)
        return found


def run(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    found: list[Measured] = []
    cells = CELLS[:2] if quick else CELLS
    for slots, kind, hidden in cells:
        for load in (2.0,) if quick else LOADS[2:] if hidden else LOADS:
            found += cell(stack, seed, slots, kind, hidden, load)
    _, unlimited, _ = watch(None, seed, 8, "exp", False, 2.0, NETWORK_S)
    return [*found, Measured("no policies", "8 slots, exp, 2x", "p99 / unloaded", unlimited, 2.1, control=True)]


def cell(stack: Stack, seed: int, slots: int, kind: str, hidden: bool, load: float) -> list[Measured]:
    goodput, p99, reject_s = watch(stack, seed, slots, kind, hidden, load, NETWORK_S)
    best, _, _ = watch(oracle(slots), seed, slots, kind, hidden, load, 0.0)
    workload = f"{slots} slots, {kind}{', hidden' if hidden else ''}, {load:g}x"
    judged = load >= 2
    return [
        Measured(stack.name, workload, "goodput / oracle", goodput / best, 0.97 if judged else None, at_most=False),
        Measured(stack.name, workload, "p99 / unloaded", p99, 2.1 if judged else None),
        *([Measured(stack.name, workload, "reject p99 ms", 1000 * reject_s, 2.0)] if judged else []),
    ]


def oracle(slots: int) -> Stack:
    """It is told the slots, and lets as many wait, however long."""
    wait = {"use": "bounded_wait", "max_waiting": slots, "max_wait_s": 3600.0, "wait_ratio": 1e6}
    return Stack(({"use": "fixed_limit", "limit": slots}, wait), name="oracle")


def watch(stack: Stack | None, seed: int, slots: int, kind: str, hidden: bool, load: float, network_s: float) -> tuple[float, float, float]:
    """Goodput as a share of the capacity, p99 of the admitted over that of an unloaded server, p99 of the rejects in processor seconds."""
    simulation = Simulation(seed)
    server = Server(simulation, slots, hidden_queue=hidden)
    timed = Timed(stack.permits(simulation.policy_random.random, lambda: simulation.now_s)) if stack else None
    gateway = Gateway(simulation, server, timed, network_s)  # type: ignore[arg-type]
    draw = service_time(kind, MEAN_S, simulation.random)
    rate_per_s = load * slots / MEAN_S
    from_s, until_s = WARM_UP_S[slots], WARM_UP_S[slots] + SECONDS[slots]
    poisson(simulation, lambda now_s: rate_per_s, lambda: offer(gateway, draw), until_s)
    simulation.run(from_s)
    before_s = server.busy_s
    simulation.run(until_s)
    admitted = [step.latency_s for step in gateway.records if step.outcome == "ok" and step.arrived_s >= from_s]
    goodput = (server.busy_s - before_s) / (SECONDS[slots] * slots)
    return goodput, percentile(admitted, 0.99) / (P99[kind] + network_s), percentile(timed.refusals_s, 0.99) if timed else 0.0


def offer(gateway: Gateway, draw: Callable[[], float]) -> None:
    gateway.offer(FLOW, draw())


SCENARIO = Scenario("A1", "overload", run)
