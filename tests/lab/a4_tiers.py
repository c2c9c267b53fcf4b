"""A4: three times the capacity in six tiers. The top tier alone is .8 of it, the other five share 2.2 times the capacity equally.

success      steps of the top tier that end well
inversions   refused steps that a less important step overtook: one that came later and got its slot before the refusal, of all refused
             ones. A slot that is free later goes to whoever comes then, since those that were refused are not there any more
next window  the same, with every less important step that comes within the 500 ms after the refusal and is executed: for reading. It counts
             slots that would otherwise stay empty. By this stricter reading the target is far from reached
goodput      share of the slots' time that is used. unseen tiers: the control, where all steps have the same tier

Without policies that know tiers a step of the top tier succeeds as any other, about one time in three.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence

from gateway.types import LANE_TIER, TIERS, Flow, Kind, Lane
from tests.lab.engine import Gateway, Server, Simulation, StepRecord, percentile, poisson, service_time
from tests.lab.scenario import Measured, Scenario, Stack

LOAD, TOP_LOAD = 3.0, 0.8
MEAN_S, NETWORK_S, WINDOW_S = 0.1, 0.002, 0.5
WARM_UP_S, TAIL_S = 15.0, 2.0
CELLS = (("exp", 8, 60.0), ("const", 8, 60.0), ("exp", 32, 25.0), ("const", 32, 25.0))


class World:
    """One run, and the steps that came between the warm-up and the tail, by importance: the first list is the top tier's."""

    def __init__(self, stack: Stack, seed: int, kind: str, slots: int, seconds: float, seen: bool = True) -> None:
        simulation = Simulation(seed)
        server = Server(simulation, slots)
        gateway = Gateway(simulation, server, stack.permits(simulation.random.random, lambda: simulation.now_s), NETWORK_S)
        draw = service_time(kind, MEAN_S, simulation.random)
        end_s = WARM_UP_S + seconds + TAIL_S
        flows = [
            Flow(f"tenant{one}", "plan", Kind.INFER, Lane.STANDARD, tier=one if seen else LANE_TIER[Lane.STANDARD]) for one in range(TIERS)
        ]
        for one, flow in enumerate(flows):
            load = TOP_LOAD if one == 0 else (LOAD - TOP_LOAD) / (TIERS - 1)
            poisson(simulation, rate(load * slots / MEAN_S), arrival(gateway, flow, draw), end_s)
        simulation.run(WARM_UP_S)
        before_s = server.busy_s
        simulation.run(WARM_UP_S + seconds)
        self.goodput = (server.busy_s - before_s) / (seconds * slots)
        simulation.run(end_s)
        judged = [step for step in gateway.records if WARM_UP_S <= step.arrived_s < WARM_UP_S + seconds]
        self.steps = [[step for step in judged if step.flow.tenant == flow.tenant] for flow in flows]

    def success(self, one: int) -> float:
        steps = self.steps[one]
        return sum(step.outcome == "ok" for step in steps) / len(steps)


def rate(per_s: float) -> Callable[[float], float]:
    return lambda now_s: per_s


def arrival(gateway: Gateway, flow: Flow, draw: Callable[[], float]) -> Callable[[], None]:
    def arrive() -> None:
        gateway.offer(flow, draw())

    return arrive


def inversions(steps: Sequence[Sequence[StepRecord]], later_s: float | None) -> float:
    """Of the refused steps, those after which a less important one came that got a slot before the refusal; with later_s, one that came
    until later_s after the refusal and got a slot at all."""
    executed = [[(step.arrived_s, step.started_s) for step in of_tier if step.started_s >= 0] for of_tier in steps]
    refused = inverted = 0
    for tier, of_tier in enumerate(steps):
        for step in of_tier:
            if step.outcome in ("ok", "late", ""):
                continue
            refused += 1
            inverted += any(overtakes(step, lower, later_s) for lower in executed[tier + 1 :])
    return inverted / max(1, refused)


def overtakes(step: StepRecord, lower: Sequence[tuple[float, float]], later_s: float | None) -> bool:
    until_s = step.ended_s + (later_s or 0.0)
    for arrived_s, started_s in lower[bisect_right(lower, (step.arrived_s, float("inf"))) :]:
        if arrived_s > until_s:
            return False
        if later_s is not None or started_s < step.ended_s:
            return True
    return False


def run(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    found = []
    for kind, slots, seconds in CELLS[:1] if quick else CELLS:
        workload = f"{slots} slots, {kind}"
        world = World(stack, seed, kind, slots, seconds)
        p99_s = percentile([step.latency_s for step in world.steps[0] if step.outcome == "ok"], 0.99)
        found += [
            Measured(stack.name, workload, "top tier success", world.success(0), 0.999, at_most=False),
            Measured(stack.name, workload, "inversions", inversions(world.steps, None), 0.001),
            Measured(stack.name, workload, "next window", inversions(world.steps, WINDOW_S)),
            Measured(stack.name, workload, "second tier success", world.success(1)),
            Measured(stack.name, workload, "last tier success", world.success(TIERS - 1)),
            Measured(stack.name, workload, "goodput", world.goodput),
            Measured(stack.name, workload, "top tier p99 s", p99_s),
        ]
    kind, slots, seconds = CELLS[0]
    unseen = World(stack, seed, kind, slots, seconds / 3, seen=False)
    workload = f"{slots} slots, {kind}"
    found.append(Measured("unseen tiers", workload, "top tier success", unseen.success(0), 0.999, at_most=False, control=True))
    return found


SCENARIO = Scenario("A4", "tiers under overload", run)
