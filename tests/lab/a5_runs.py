"""A5: runs of k = 1, 2, 4 calls, one after the other, of a target that gets twice what it can do. A refused call ends its run: no retries.

run success   the slots' time that went into runs which were completed, of all there is. It has the expectation of completed runs over the
              best possible, capacity / k a second, and less noise
begun, lost   runs that failed after their first call had been executed, of all that were begun

The control sheds at random: the same controller and the same stack, with a new cohort for each step and no memory of runs. With k = 1 there
is nothing to keep together, and no control.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gateway.policy import PolicyType, Slot
from gateway.types import Flow, Kind, Lane
from plugins.cinnamon import Cinnamon, CinnamonConfig
from tests.lab.engine import Gateway, Server, Simulation, StepRecord, poisson, service_time
from tests.lab.scenario import Measured, Scenario, Stack

LOAD, CALLS = 2.0, (1, 2, 4)
MEAN_S, NETWORK_S, WARM_UP_S = 0.1, 0.002, 15.0
CELLS = (("exp", 8, 60.0), ("const", 8, 60.0), ("exp", 32, 25.0))


class RandomShed(Cinnamon):
    """Knows no runs: each step is on its own."""

    def decide(self, flow, view, now_s, random):  # type: ignore[no-untyped-def]
        return super().decide(Flow(flow.tenant, flow.target, flow.kind, flow.lane, tier=flow.tier), view, now_s, random)


RANDOM_SHED = PolicyType("random_shed", Slot.ADMISSION, CinnamonConfig, RandomShed, "the control of A5", per_scope=True)


@dataclass
class Run:
    """One run: its calls follow each other at once."""

    world: "World"
    flow: Flow
    left: int
    used_s: float = 0.0

    def call(self) -> None:
        self.world.gateway.offer(self.flow, self.world.draw(), self._answered)

    def _answered(self, step: StepRecord) -> None:
        world = self.world
        if step.outcome != "ok":
            world.lost_s += [world.simulation.now_s] if self.used_s else []
            return
        world.begun_s += [] if self.used_s else [world.simulation.now_s]
        self.used_s += step.service_s
        self.left -= 1
        if self.left:
            self.call()
        else:
            world.completed.append((world.simulation.now_s, self.used_s))


@dataclass
class World:
    simulation: Simulation
    gateway: Gateway
    draw: Callable[[], float]
    completed: list[tuple[float, float]] = field(default_factory=list)  # when, and the slot seconds that it used
    begun_s: list[float] = field(default_factory=list)  # when
    lost_s: list[float] = field(default_factory=list)
    runs: int = 0

    def start(self, calls: int) -> None:
        self.runs += 1
        Run(self, Flow("acme", "plan", Kind.INFER, Lane.STANDARD, run=f"run{self.runs}"), calls).call()


def cell(stack: Stack, seed: int, kind: str, slots: int, seconds: float, calls: int) -> tuple[float, float]:
    """Run success, and the share of begun runs that were lost."""
    simulation = Simulation(seed)
    permits = stack.permits(simulation.random.random, lambda: simulation.now_s)
    gateway = Gateway(simulation, Server(simulation, slots), permits, NETWORK_S)
    world = World(simulation, gateway, service_time(kind, MEAN_S, simulation.random))
    runs_per_s = LOAD * slots / MEAN_S / calls
    poisson(simulation, lambda now_s: runs_per_s, lambda: world.start(calls), WARM_UP_S + seconds)
    simulation.run(WARM_UP_S + seconds)
    used_s = sum(used_s for when_s, used_s in world.completed if when_s >= WARM_UP_S)
    return used_s / (seconds * slots), _judged(world.lost_s) / max(1, _judged(world.begun_s))


def _judged(when_s: Iterable[float]) -> int:
    return sum(one_s >= WARM_UP_S for one_s in when_s)


def run(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    control = Stack(stack.policies, (*stack.extra, RANDOM_SHED)).with_({"use": "random_shed"}, name="random shedding")
    found = []
    for kind, slots, seconds in CELLS[:1] if quick else CELLS:
        for calls in CALLS:
            for tried in (stack, control) if calls > 1 else (stack,):
                success, lost = cell(tried, seed, kind, slots, seconds, calls)
                workload, is_control = f"{slots} slots, {kind}, k = {calls}", tried is control
                found.append(Measured(tried.name, workload, "run success", success, 0.95, at_most=False, control=is_control))
                if calls > 1:
                    found.append(Measured(tried.name, workload, "begun, lost", lost))
    return found


SCENARIO = Scenario("A5", "runs under overload", run)
