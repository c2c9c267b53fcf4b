"""A3: half an hour of mild overload, and a backend that only ever times out. A limit must neither creep up nor grow on failures.

1.5 times the capacity of 8 slots, exponential service, with the queue visible and hidden inside the server; and a server that answers every
step with a failure after 2 s, for five minutes, which are 150 answers in a row. Measured is the mean limit of the last minute over the
slots, which are the oracle's limit. The control is Gradient2 as published, started at the oracle's limit and free to go below it, for ten
minutes: a ratio of two averages cannot see a level that is steadily bad.
"""

from gateway.types import Flow, Kind, Lane
from tests.lab.engine import Gateway, Server, Simulation, poisson, service_time
from tests.lab.scenario import Measured, Scenario, Stack

FLOW = Flow("acme", "plan", Kind.INFER, Lane.STANDARD)
MEAN_S, NETWORK_S, SLOTS = 0.1, 0.002, 8
SECONDS, CONTROL_S, HANGING_S, TIMEOUT_S, TARGET = 1800.0, 600.0, 300.0, 2.0, 1.3
CONTROL = Stack(({"use": "gradient2", "initial": SLOTS, "min_limit": 1}, {"use": "bounded_wait"}), name="gradient2")


def run(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    found = []
    for title, hidden, timeout_s in (("1.5x", False, 0.0), ("1.5x, hidden", True, 0.0), ("all time out", False, TIMEOUT_S)):
        for chosen, control in ((stack, False), (CONTROL, True)):
            seconds = min(CONTROL_S if control else SECONDS, HANGING_S if timeout_s else SECONDS, 120.0 if quick else SECONDS)
            over = final_limit(chosen, seed, seconds, hidden, timeout_s) / SLOTS
            found.append(Measured(chosen.name, title, "final limit / slots", over, TARGET, control=control))
    return found


def final_limit(stack: Stack, seed: int, seconds: float, hidden: bool, timeout_s: float) -> float:
    simulation = Simulation(seed)
    server = Server(simulation, SLOTS, hidden_queue=hidden, timeout_s=timeout_s)
    permits = stack.permits(simulation.policy_random.random, lambda: simulation.now_s)
    gateway = Gateway(simulation, server, permits, NETWORK_S)
    draw = service_time("exp", MEAN_S, simulation.random)
    limits: list[int] = []

    def look() -> None:
        if simulation.now_s >= seconds - 60:
            limits.append(permits.gate(FLOW.scope).limit())
        simulation.after(0.5, look)

    def arrive() -> None:
        gateway.offer(FLOW, draw())

    poisson(simulation, lambda now_s: 1.5 * SLOTS / MEAN_S, arrive, seconds)
    look()
    simulation.run(seconds)
    return sum(limits) / len(limits)


SCENARIO = Scenario("A3", "drift", run)
