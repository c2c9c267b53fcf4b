"""The broker behind `MemoryBus`: queues with holds and redelivery, results, dead letters, events. One event loop, no I/O."""

import asyncio
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from gateway import subjects
from gateway.clock import Clock
from gateway.config import Config
from gateway.errors import Rejected
from gateway.ports import Delivery, Queue
from gateway.run_types import RoundTrip
from gateway.testing_clock import ManualClock
from gateway.types import Job, Kind, Lane, Step, StepEvent, StepResult, Target, WorkerInfo

QueueName = tuple[str, Kind, str, Lane]


@dataclass(slots=True)
class Stored:
    """A step in its queue. It can be delivered from free_s on: later than now while a worker holds it."""

    step: Step
    region: str
    reply_to: str
    stored_s: float
    deliveries: int = 0
    free_s: float = 0.0


@dataclass(frozen=True, slots=True)
class DeadLetter:
    step: Step
    region: str
    attempt: int
    reason: str
    message: str


class MemoryPuller:
    def __init__(self, broker: "Broker", queue: Queue, on_delivery: Callable[[Delivery], None]) -> None:
        self._broker, self.queue, self.on_delivery = broker, queue, on_delivery
        self.credits = 0
        self.served = 0  # number of the last delivery, so that equals take turns

    def want(self, credits: int) -> None:
        self.credits = max(self.credits, credits)
        self._broker.pump_soon()

    async def close(self) -> None:
        self.credits = 0
        if self in self._broker.pullers:
            self._broker.pullers.remove(self)


class MemoryDelivery:
    """Ends in exactly one of ack and nak; what comes after the first is ignored."""

    def __init__(self, broker: "Broker", stored: Stored, queue: Queue, pending: int) -> None:
        self._broker, self._stored, self._ended = broker, stored, False
        self.queue, self.pending = queue, pending
        self.step, self.attempt, self.reply_to = stored.step, stored.deliveries, stored.reply_to
        self.again = self.attempt > 1
        self.answered_by_commit = subjects.is_republished(self.reply_to, self.step.id)
        self.queued_us = max(0, round((broker.clock.now_s() - stored.stored_s) * 1e6))

    def ack(self) -> None:
        if not self._ended:
            self._ended = True
            self._broker.remove(self._stored)

    def nak(self, delay_s: float = 0.0) -> None:
        if not self._ended:
            self._ended = True
            self._broker.hold(self._stored, delay_s)

    def let_go(self) -> None:
        self._ended = True

    def in_progress(self) -> None:
        if not self._ended:
            self._broker.hold(self._stored, self._broker.config.nats.ack_wait_s)


@dataclass
class Broker:
    """What a NATS server keeps, for one test."""

    config: Config
    clock: Clock
    max_payload_bytes: int
    steps: dict[str, Stored] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    hand_backs: Counter[tuple[str, str, str]] = field(default_factory=Counter)  # by region, tenant and step id
    results: dict[str, tuple[StepResult, float]] = field(default_factory=dict)
    dead: dict[str, DeadLetter] = field(default_factory=dict)
    targets: dict[str, Target] = field(default_factory=dict)
    workers: dict[str, tuple[WorkerInfo, float]] = field(default_factory=dict)
    pullers: list[MemoryPuller] = field(default_factory=list)
    watchers: dict[str, list[Callable[[StepEvent], None]]] = field(default_factory=lambda: defaultdict(list))
    waiting: dict[str, Callable[[StepResult], None]] = field(default_factory=dict)
    hearers: dict[str, list[Callable[[StepResult], None]]] = field(default_factory=lambda: defaultdict(list))
    cancellers: list[Callable[[str, str], None]] = field(default_factory=list)
    pingers: Counter[str] = field(default_factory=Counter)  # workers that answer, by region
    round_trips: dict[str, tuple[RoundTrip, float]] = field(default_factory=dict)  # by key, with the time
    replayers: list[Callable[[str, str, int, int], Sequence[StepEvent] | None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._numbers = itertools.count(1)
        self._pump: asyncio.Handle | None = None

    def store(self, step: Step, region: str, reply_to: str = "", job: Job | None = None) -> None:
        """Raises Rejected when the region is full. The same step twice is stored once."""
        subject = subjects.step(region, step.kind, step.target, step.lane, step.id)
        if subject in self.steps:
            return
        kept = sum(one.region == region for one in self.steps.values()) + sum(one.region == region for one in self.jobs.values())
        if kept + (1 if job is None else 2) > self.config.nats.max_queue_messages:
            raise Rejected(f"the queue of region {region} is full", reason="QUEUE_FULL", scope=region, policy="queue")
        if job is not None:
            self.jobs[subjects.job(region, step.tenant, step.id)] = job
        self.steps[subject] = Stored(step, region, reply_to, self.clock.now_s())
        self.pump_soon()

    def subject_of(self, stored: Stored) -> str:
        step = stored.step
        return subjects.step(stored.region, step.kind, step.target, step.lane, step.id)

    def remove(self, stored: Stored) -> None:
        self.steps.pop(self.subject_of(stored), None)

    def hold(self, stored: Stored, seconds: float) -> None:
        """Not to be delivered for so long."""
        stored.free_s = self.clock.now_s() + seconds
        if seconds > 0:
            self.call_later(seconds, self.pump_soon)
        else:
            self.pump_soon()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> None:
        if isinstance(self.clock, ManualClock):
            self.clock.call_at(self.clock.now_s() + seconds, callback)
        else:
            asyncio.get_running_loop().call_later(seconds, callback)

    def pump_soon(self) -> None:
        """Deliveries never happen inside the call that caused them, as on a network."""
        if self._pump is None:
            self._pump = asyncio.get_running_loop().call_soon(self._deliver_all)

    def _deliver_all(self) -> None:
        self._pump = None
        now_s = self.clock.now_s()
        free: dict[QueueName, list[Stored]] = defaultdict(list)
        for stored in self.steps.values():
            if stored.free_s <= now_s:
                free[(stored.region, stored.step.kind, stored.step.target, stored.step.lane)].append(stored)
        for name, waiting in free.items():
            for index, stored in enumerate(waiting):
                takers = [one for one in self.pullers if one.credits > 0 and _name(one.queue) == name]
                if not takers:
                    break
                self._deliver(min(takers, key=lambda one: (one.queue.priority, one.served)), stored, len(waiting) - index - 1)

    def _deliver(self, puller: MemoryPuller, stored: Stored, pending: int) -> None:
        puller.credits -= 1
        puller.served = next(self._numbers)
        stored.deliveries += 1
        self.hold(stored, self.config.nats.ack_wait_s)
        puller.on_delivery(MemoryDelivery(self, stored, puller.queue, pending))

    def commit(self, result: StepResult, keep_s: float, region: str) -> bool:
        if self.result(result.tenant, result.step_id, region) is not None:
            return False
        subject = subjects.result(region, result.tenant, result.step_id)
        self.results[subject] = (result, self.clock.now_s() + max(1.0, keep_s))
        reply = subjects.reply(result.step_id[: subjects.MARK_LENGTH], result.step_id)
        for hearer in (*self.hearers[reply], *filter(None, [self.waiting.get(reply)])):
            hearer(result)
        return True

    def result(self, tenant: str, step_id: str, region: str) -> StepResult | None:
        found = self.results.get(subjects.result(region, tenant, step_id))
        return None if found is None or found[1] <= self.clock.now_s() else found[0]


def _name(queue: Queue) -> QueueName:
    return (queue.region, queue.kind, queue.target, queue.lane)
