"""A discrete-event simulation around the gateway's own decisions: virtual clock, seeded randomness, a server with slots and one queue.

    arrivals -> Permits (the gateway's object, unchanged) -> network -> FIFO queue -> slot -> network -> Permits.end

Times are seconds on the virtual clock. An event is a function; events at the same time happen in the order in which they were made.
An experiment draws from `random`, policies from `policy_random`: whatever they decide, the same seed brings the same arrivals and work.
"""

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.core.permit import Permit
from gateway.core.permits import Permits
from gateway.policy import Ending, Reject, Sample
from gateway.types import Flow
from workers.wait_window import WaitWindow


class Simulation:
    def __init__(self, seed: int) -> None:
        self.now_s = 0.0
        self.random = random.Random(seed)
        self.policy_random = random.Random(f"policies {seed}")
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._made = 0

    def at(self, when_s: float, event: Callable[[], None]) -> None:
        self._made += 1
        heapq.heappush(self._events, (when_s, self._made, event))

    def after(self, wait_s: float, event: Callable[[], None]) -> None:
        self.at(self.now_s + wait_s, event)

    def run(self, until_s: float) -> None:
        events = self._events
        while events and events[0][0] <= until_s:
            self.now_s, _, event = heapq.heappop(events)
            event()
        self.now_s = until_s


class StepRecord:
    """A step as the experiment sees it. outcome: ok, late (the server gave up on it), or the reason of a refusal; empty while under way.

    arrived_s is when its client wanted to send it, so latency_s leaves out nothing.
    """

    __slots__ = ("arrived_s", "ended_s", "flow", "outcome", "refusal", "service_s", "started_s")

    def __init__(self, flow: Flow, arrived_s: float, service_s: float) -> None:
        self.flow = flow
        self.arrived_s = arrived_s
        self.service_s = service_s
        self.started_s = -1.0  # when a slot began with it
        self.ended_s = -1.0
        self.outcome = ""
        self.refusal: Reject | None = None

    @property
    def latency_s(self) -> float:
        return self.ended_s - self.arrived_s


@dataclass
class Server:
    """`slots` executions at once, the rest in one FIFO queue. Whose deadline is over when its turn comes is answered at once, as late.

    hidden_queue: the wait is part of the service time that gateways see, as behind a model server with a queue of its own.
    timeout_s: every step is answered only after this long, as failed: a backend that hangs.
    """

    simulation: Simulation
    slots: int
    hidden_queue: bool = False
    timeout_s: float = 0.0
    speed: float = 1.0  # 0.5: everything takes twice as long
    running: int = 0
    busy_s: float = 0.0  # slot seconds of work that were begun, each counted when it ends
    queue: "deque[tuple[StepRecord, float, Callable[[float, float, Ending], None]]]" = field(default_factory=deque)
    _waits: WaitWindow = field(default_factory=WaitWindow)

    def submit(self, step: StepRecord, done: Callable[[float, float, Ending], None]) -> None:
        """done(queue_s, service_s, ending) is called at the end."""
        if self.timeout_s:
            self.simulation.after(self.timeout_s, lambda: done(0.0, self.timeout_s, Ending.DROPPED))
        elif self.running < self.slots:
            self._start(step, self.simulation.now_s, done)
        else:
            self.queue.append((step, self.simulation.now_s, done))

    def set_slots(self, slots: int) -> None:
        self.slots = slots
        self._fill()

    def average_wait_s(self) -> float:
        """Of the steps that started within the last window, as a worker reports it: a hidden wait it does not know."""
        return self._waits.average_us / 1e6

    def _start(self, step: StepRecord, queued_s: float, done: Callable[[float, float, Ending], None]) -> None:
        now_s = self.simulation.now_s
        wait_s = now_s - queued_s
        self._waits.add(0 if self.hidden_queue else round(wait_s * 1e6), now_s)
        if step.flow.deadline_s <= now_s:
            self.simulation.after(0.0, lambda: done(wait_s, 0.0, Ending.DROPPED))
            return
        self.running += 1
        step.started_s = now_s
        service_s = step.service_s / self.speed

        def end() -> None:
            self.running -= 1
            self.busy_s += service_s
            self._fill()
            if self.hidden_queue:
                done(0.0, wait_s + service_s, Ending.SUCCEEDED)
            else:
                done(wait_s, service_s, Ending.SUCCEEDED)

        self.simulation.after(service_s, end)

    def _fill(self) -> None:
        while self.queue and self.running < self.slots:
            self._start(*self.queue.popleft())


class Gateway:
    """One gateway in front of a server. permits None: no policies at all. `records` has every step that was offered."""

    def __init__(
        self,
        simulation: Simulation,
        server: Server,
        permits: Permits | None,
        network_s: float = 0.0,
        on_end: Callable[[StepRecord], None] | None = None,
    ) -> None:
        self.simulation = simulation
        self.server = server
        self.permits = permits
        self.records: list[StepRecord] = []
        self._half_s = network_s / 2
        self._on_end = on_end

    def offer(self, flow: Flow, service_s: float, on_end: Callable[[StepRecord], None] | None = None) -> StepRecord:
        now_s = self.simulation.now_s
        step = StepRecord(flow, now_s, service_s)
        self.records.append(step)
        if self.permits is None:
            self._dispatch(step, None, on_end)
            return step
        permit = self.permits.enter(flow, now_s)
        if permit.is_waiting:
            # A moment later, as in the gateway, where who waits is a task of its own: never in the midst of another decision.
            permit.wake = lambda: self.simulation.after(0.0, lambda: self._woken(step, permit, on_end))
            if min(permit.give_up_s, flow.deadline_s) < float("inf"):
                self.simulation.at(min(permit.give_up_s, flow.deadline_s), lambda: self._give_up(step, permit, on_end))
        elif permit.refusal:
            self._refused(step, permit, on_end)
        else:
            self._dispatch(step, permit, on_end)
        return step

    def _woken(self, step: StepRecord, permit: Permit, on_end: Callable[[StepRecord], None] | None) -> None:
        assert self.permits is not None
        self.permits.woken(permit, self.simulation.now_s)
        if permit.refusal:
            self._refused(step, permit, on_end)
        else:
            self._dispatch(step, permit, on_end)

    def _give_up(self, step: StepRecord, permit: Permit, on_end: Callable[[StepRecord], None] | None) -> None:
        assert self.permits is not None
        if permit.is_waiting and self.permits.give_up(permit, self.simulation.now_s):
            self._refused(step, permit, on_end)

    def _refused(self, step: StepRecord, permit: Permit, on_end: Callable[[StepRecord], None] | None) -> None:
        assert permit.refusal is not None
        step.refusal = permit.refusal.reject
        self._ended(step, permit.refusal.reject.reason, on_end)

    def _dispatch(self, step: StepRecord, permit: Permit | None, on_end: Callable[[StepRecord], None] | None) -> None:
        dispatched_s = self.simulation.now_s

        def done(queue_s: float, service_s: float, ending: Ending) -> None:
            worker_wait_s = self.server.average_wait_s()
            if self._half_s:
                self.simulation.after(self._half_s, lambda: answered(queue_s, service_s, ending, worker_wait_s))
            else:
                answered(queue_s, service_s, ending, worker_wait_s)

        def answered(queue_s: float, service_s: float, ending: Ending, worker_wait_s: float) -> None:
            now_s = self.simulation.now_s
            if permit is not None and self.permits is not None:
                sample = Sample(step.flow.scope, ending, now_s - dispatched_s, queue_s, service_s, 0, 1.0, worker_wait_s)
                self.permits.end(permit, sample, now_s)
            self._ended(step, "ok" if ending is Ending.SUCCEEDED else "late", on_end)

        if self._half_s:
            self.simulation.after(self._half_s, lambda: self.server.submit(step, done))
        else:
            self.server.submit(step, done)

    def _ended(self, step: StepRecord, outcome: str, on_end: Callable[[StepRecord], None] | None) -> None:
        step.outcome = outcome
        step.ended_s = self.simulation.now_s
        for tell in (on_end, self._on_end):
            if tell is not None:
                tell(step)


def poisson(simulation: Simulation, rate_per_s: Callable[[float], float], arrive: Callable[[], None], until_s: float) -> None:
    """Calls `arrive` at Poisson times, at rate_per_s(now); the rate is looked at with each arrival."""

    def next_one() -> None:
        rate = rate_per_s(simulation.now_s)
        wait_s = simulation.random.expovariate(rate) if rate > 0 else 0.1
        if simulation.now_s + wait_s < until_s:
            simulation.after(wait_s, come if rate > 0 else next_one)

    def come() -> None:
        arrive()
        next_one()

    next_one()


def service_time(kind: str, mean_s: float, source: random.Random) -> Callable[[], float]:
    """const; exp; bimodal: nine of ten take half the mean, one takes five and a half times as much."""
    if kind == "const":
        return lambda: mean_s
    if kind == "exp":
        return lambda: source.expovariate(1 / mean_s)
    assert kind == "bimodal", kind
    return lambda: mean_s * (0.5 if source.random() < 0.9 else 5.5)


def percentile(values: list[float], share: float) -> float:
    """The share-th quantile; nan for no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")
