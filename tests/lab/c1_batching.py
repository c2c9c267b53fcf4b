"""C1: a server that takes b + 1 rows hardly longer than b, and no batcher of its own. When does an execution go?

The worker's own BatchQueue, with the batching policy under test, before servers with l(b) = t0 + a*b; Poisson arrivals, from a tenth of
what full batches could do to .95 of it. The rival is Triton's dynamic batcher with the delay that is best for the very load: a batch
goes when a server is free and it is full or its oldest row has waited for the delay; all delays of the grid see the same arrivals, and
the best is taken afterwards. The policy has one setting for all loads. Controls: a long fixed delay, and batches that are always full.
"""

from collections import deque
from collections.abc import Callable
from itertools import accumulate, repeat

from gateway.core.containment import Containment
from gateway.policy import ModelView, Named, OnError, Slot
from plugins.fixed_window import FixedWindow, FixedWindowConfig
from tests.lab.engine import Simulation
from tests.lab.scenario import Measured, Scenario, Stack
from workers.batch_queue import BatchQueue, Execution

LOADS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
DELAYS_S = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04)
MOST = 16
SERVERS = {"20 ms + 2 ms b": (0.020, 0.002, 1), "5 ms + 2 ms b": (0.005, 0.002, 1), "20 ms + 2 ms b, 2 instances": (0.020, 0.002, 2)}
DEADLINE_S = 30.0
WARM_UP = 0.1  # of the rows, not counted
TARGET = 1.02
MODEL = "model"


def worker(named: Named, contain: Containment, simulation: Simulation, arrivals: list[float], cost: tuple[float, float, int]) -> float:
    """Mean latency of the rows with the worker as the batcher, seconds."""
    fixed_s, each_s, instances = cost
    queue: BatchQueue[int] = BatchQueue(named, contain, instances=instances, max_size=MOST, slots=len(arrivals) + 1)
    latencies = [0.0] * len(arrivals)
    asked_at = [float("inf")]

    def look() -> None:
        while (execution := queue.take(simulation.now_s)) is not None:
            simulation.after(fixed_s + each_s * execution.size, lambda execution=execution: end(execution))  # type: ignore[misc]
        asked_at[0] = queue.again_s
        if queue.again_s < float("inf"):
            simulation.at(queue.again_s, look_again)

    def look_again() -> None:
        if simulation.now_s == asked_at[0]:  # otherwise something happened since, and it was asked then
            look()

    def arrive(number: int) -> None:
        queue.add(number, "rows", 1, simulation.now_s, simulation.now_s + DEADLINE_S)
        look()
        if number + 1 < len(arrivals):
            simulation.at(arrivals[number + 1], lambda: arrive(number + 1))

    def end(execution: Execution[int]) -> None:
        queue.ended(execution, simulation.now_s, sample=True)
        for entry in execution.entries:
            latencies[entry.item] = simulation.now_s - entry.arrived_s
        look()

    simulation.at(arrivals[0], lambda: arrive(0))
    simulation.run(arrivals[-1] + DEADLINE_S)
    return _mean(latencies)


def triton(delay_s: float, arrivals: list[float], cost: tuple[float, float, int]) -> float:
    """Mean latency with Triton's dynamic batcher, without preferred sizes; the same arithmetic, written for itself."""
    fixed_s, each_s, instances = cost
    free_s = [0.0] * instances  # when each server is
    waiting: deque[float] = deque()
    latencies = []
    index = 0
    while index < len(arrivals) or waiting:
        server = min(range(instances), key=free_s.__getitem__)
        if not waiting:
            waiting.append(arrivals[index])
            index += 1
        # the batch fills until it is full, or its delay is over and a server is free
        go_s = max(free_s[server], waiting[0] + delay_s)
        while len(waiting) < MOST and index < len(arrivals) and arrivals[index] <= go_s:
            waiting.append(arrivals[index])
            index += 1
        if len(waiting) >= MOST:
            go_s = max(free_s[server], waiting[MOST - 1])
        batch = [waiting.popleft() for _ in range(min(MOST, len(waiting)))]
        free_s[server] = go_s + fixed_s + each_s * len(batch)
        latencies += [free_s[server] - arrived_s for arrived_s in batch]
    return _mean(latencies)


def _mean(latencies: list[float]) -> float:
    counted = latencies[int(WARM_UP * len(latencies)) :]
    return sum(counted) / len(counted)


def policy_of(stack: Stack, now_s: Callable[[], float], instances: int) -> tuple[Named, Containment]:
    """The object that a worker would choose. Raises ValueError when there is none, so that steps would go one by one."""
    policies, contain = stack.batching(now_s)
    model = ModelView(MODEL, MOST, server_batches=False, instances=instances)
    for named in policies:
        if named.policy.serves(model):
            return named, contain
    raise ValueError("no batching policy of the stack serves a model without a batcher of its own")


def run(stack: Stack, seed: int, quick: bool) -> list[Measured]:
    rows = 3000 if quick else 20_000
    measured = []
    for server, cost in SERVERS.items():
        fixed_s, each_s, instances = cost
        capacity_per_s = instances * MOST / (fixed_s + each_s * MOST)
        controls = {"fixed window, 20 ms": FixedWindowConfig(delay_s=0.02), "full batches": FixedWindowConfig(delay_s=5.0)}
        worst: dict[str, float] = {}
        for load in LOADS:
            simulation = Simulation(seed)
            gaps = (simulation.random.expovariate(load * capacity_per_s) for _ in repeat(None, rows))
            arrivals = list(accumulate(gaps))
            best_s = min(triton(delay_s, arrivals, cost) for delay_s in DELAYS_S)
            named, contain = policy_of(stack, lambda: 0.0, instances)
            ratio = worker(named, contain, simulation, arrivals, cost) / best_s
            workload = f"{server}, load {load:g}"
            measured.append(Measured(named.name, workload, "mean latency / best Triton delay", ratio, TARGET))
            if instances == 1:
                for name, config in controls.items():
                    control = Named(name, Slot.BATCHING, FixedWindow(config), OnError.ADMIT)
                    found = worker(control, contain, Simulation(seed), arrivals, cost) / best_s
                    worst[name] = max(worst.get(name, 0.0), found)
        for name, found in worst.items():
            measured.append(Measured(name, f"{server}, worst load", "mean latency / best Triton delay", found, TARGET, control=True))
    return measured


SCENARIO = Scenario("C1", "batches: one setting against the best Triton delay of each load", run)
