"""A2: a step of the load, and a server that loses half of its slots and gets them back.

The load goes from .7 to 1.4 times the capacity at 20 s and stays; half of the slots are gone from 40 s to 60 s. Within its band: the
busy slots, averaged over the following second, are within 5 % of what they can be, and no more steps wait at the server than it has
slots; looked at every 100 ms. Settled: from when on it stays there for two seconds on end. (Later a limit may look for a new baseline now
and then, which is not the answer to the step.) Service times are exponential, 100 ms on average, so a second is ten of them.

The oracle keeps all slots busy at all three times and has no step wait at the server, so it is settled at once. The control is a constant
limit of eight times the slots: the slots are busy, and the queue at the server never ends.
"""

from gateway.types import Flow, Kind, Lane
from tests.lab.engine import Gateway, Server, Simulation, poisson, service_time
from tests.lab.scenario import Measured, Scenario, Stack

FLOW = Flow("acme", "plan", Kind.INFER, Lane.STANDARD)
MEAN_S, NETWORK_S, SLOTS = 0.1, 0.002, 32
LOOK_S, STAYS_S, WATCH_S, END_S = 0.1, 2.0, 10.0, 72.0
CHANGES = (("load .7 to 1.4", 20.0), ("half the slots", 40.0), ("all slots again", 60.0))


CONTROL = Stack(({"use": "fixed_limit", "limit": 8 * SLOTS},), name="fixed_limit 256")


def run(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    found = [Measured(stack.name, title, "settled after s", settled_s, 1.0) for title, settled_s in play(stack, seed)]
    return found + [
        Measured(CONTROL.name, title, "settled after s", settled_s, 1.0, control=True) for title, settled_s in play(CONTROL, seed)
    ]


def play(stack: Stack, seed: int) -> list[tuple[str, float]]:
    simulation = Simulation(seed)
    server = Server(simulation, SLOTS)
    gateway = Gateway(simulation, server, stack.permits(simulation.policy_random.random, lambda: simulation.now_s), NETWORK_S)
    draw = service_time("exp", MEAN_S, simulation.random)
    looks: list[tuple[float, int, int, int]] = []  # when, busy slots, slots, waiting at the server

    def look() -> None:
        looks.append((simulation.now_s, min(server.running, server.slots), server.slots, len(server.queue)))
        simulation.after(LOOK_S / 10, look)

    def arrive() -> None:
        gateway.offer(FLOW, draw())

    poisson(simulation, lambda now_s: (0.7 if now_s < 20 else 1.4) * SLOTS / MEAN_S, arrive, END_S)
    simulation.at(40.0, lambda: server.set_slots(SLOTS // 2))
    simulation.at(60.0, lambda: server.set_slots(SLOTS))
    look()
    simulation.run(END_S)
    return [(title, settled_s(looks, at_s)) for title, at_s in CHANGES]


def settled_s(looks: list[tuple[float, int, int, int]], changed_s: float) -> float:
    """Seconds; WATCH_S when it never was."""
    good = 0
    for number in range(round(WATCH_S / LOOK_S)):
        when_s = changed_s + number * LOOK_S
        second = [one for one in looks if when_s <= one[0] < when_s + 1.0]
        busy = sum(one[1] for one in second) / sum(one[2] for one in second)
        _, _, slots, waiting = second[0]
        good = good + 1 if busy >= 0.95 and waiting <= slots else 0
        if good * LOOK_S >= STAYS_S:
            return when_s + LOOK_S - STAYS_S - changed_s
    return WATCH_S


SCENARIO = Scenario("A2", "steps", run)
