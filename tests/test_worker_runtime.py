"""The worker runtime on a bus in memory: what is committed, answered, acknowledged and handed back, and in which order."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gateway.clock import SystemClock
from gateway.config import Config, NatsSection, RegionSection, TargetSection, WorkerSection
from gateway.errors import StepFailed, Unavailable
from gateway.ports import Delivery, Queue, Work
from gateway.testing import MemoryBus
from gateway.testing_broker import Broker, MemoryPuller, Stored
from gateway.testing_bus import MemoryWorkerBus
from gateway.types import (
    EventKind,
    Kind,
    Lane,
    Payload,
    Status,
    Step,
    StepEvent,
    StepResult,
    Target,
    WorkerInfo,
)
from workers.catalogue import merge_target
from workers.runtime import WorkerRuntime

NEVER_S = 4e9  # a deadline far in the future, seconds since 1970


class Watched:
    """A delivery whose end is noted in the bus's journal."""

    def __init__(self, inner: Delivery, bus: "WatchedBus") -> None:
        self.inner, self.bus = inner, bus
        self.step, self.queue, self.attempt = inner.step, inner.queue, inner.attempt
        self.again = inner.again
        self.queued_us, self.pending, self.reply_to = inner.queued_us, inner.pending, inner.reply_to
        self.answered_by_commit = inner.answered_by_commit
        self.ended = ""
        self.extended = 0
        self.delay_s = 0.0

    def ack(self) -> None:
        self._end("ack")
        self.inner.ack()

    def nak(self, delay_s: float = 0.0) -> None:
        self._end("nak")
        self.delay_s = delay_s
        self.inner.nak(delay_s)

    def in_progress(self) -> None:
        self.extended += 1
        self.inner.in_progress()

    def _end(self, how: str) -> None:
        assert not self.ended, f"{self.step.id} was ended twice"
        self.ended = how
        self.bus.journal.append((how, self.step.id))


class WatchedBus(MemoryWorkerBus):
    """The bus in memory; `journal` has commits, replies and ends in order."""

    def __init__(self, memory: MemoryBus, config: Config) -> None:
        super().__init__(memory._broker, "w1", "home")
        self.config = config
        self.down = False
        self.journal: list[tuple[str, str]] = []
        self.deliveries: dict[str, list[Watched]] = defaultdict(list)
        self.replies: list[tuple[str, StepResult]] = []
        self.events: list[StepEvent] = []
        self.keeps: dict[str, float] = {}
        self.announced: list[Sequence[Target]] = []
        self.beats: list[WorkerInfo] = []
        self.open: set[Queue] = set()

    @property
    def broker(self) -> Broker:
        return self._broker

    def put(self, step: Step, *, region: str = "home", attempt: int = 1, reply_to: str = "nl.reply.g.x") -> str:
        """Stores a step so that its next delivery is number `attempt`; returns its id."""
        stored = Stored(step, region, reply_to, self.broker.clock.now_s(), attempt - 1)
        self.broker.steps[self.broker.subject_of(stored)] = stored
        self.broker.pump_soon()
        return step.id

    def has(self, result: StepResult) -> StepResult:
        """Somebody committed this result before."""
        assert self.broker.commit(result, 60.0, "home")
        return result

    def order(self, step_id: str) -> list[str]:
        return [what for what, whose in self.journal if whose == step_id]

    async def consume(self, queue: Queue, on_delivery: Callable[[Delivery], None]) -> MemoryPuller:
        def watch(inner: Delivery) -> None:
            delivery = Watched(inner, self)
            self.deliveries[inner.step.id].append(delivery)
            on_delivery(delivery)

        return await super().consume(queue, watch)

    async def commit(self, result: StepResult, keep_s: float, region: str) -> bool:
        if self.down:
            raise Unavailable("the transport is down")
        first = await super().commit(result, keep_s, region)
        self.journal.append(("commit", result.step_id))
        self.keeps[result.step_id] = keep_s
        return first

    def reply(self, subject: str, result: StepResult) -> None:
        self.journal.append(("reply", result.step_id))
        self.replies.append((subject, result))
        super().reply(subject, result)

    def publish_event(self, tenant: str, event: StepEvent) -> None:
        self.events.append(event)
        super().publish_event(tenant, event)

    async def announce(self, targets: Sequence[Target]) -> None:
        self.announced.append(targets)
        await super().announce(targets)

    async def heartbeat(self, info: WorkerInfo) -> None:
        self.beats.append(info)
        await super().heartbeat(info)

    def pulled(self) -> set[Queue]:
        return {puller.queue for puller in self.broker.pullers}

    def cancel(self, tenant: str, step_id: str) -> None:
        for callback in self.broker.cancellers:
            callback(tenant, step_id)

    def replay(self, *question: Any) -> Sequence[StepEvent] | None:
        (answer,) = self.broker.replayers
        return answer(*question)


@dataclass
class FakeExecutor:
    """Does what the step's input says; `gate` holds those that say `wait`."""

    found: list[Target] = field(default_factory=lambda: [Target(Kind.TOOL, "echo", slots=4)])
    is_ready: bool = True
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    started: list[str] = field(default_factory=list)
    refuse_starts: int = 0
    starts: int = 0
    most: int = 0
    running: int = 0

    async def start(self) -> None:
        self.starts += 1
        if self.starts <= self.refuse_starts:
            raise Unavailable("not there yet")

    async def close(self) -> None: ...

    def targets(self) -> Sequence[Target]:
        return self.found

    def ready(self, target: str) -> bool:
        return self.is_ready

    async def execute(self, work: Work) -> Payload:
        self.started.append(work.step.id)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            match work.step.input.data:
                case b"wait":
                    await self.gate.wait()
                case b"fail":
                    raise StepFailed("the API said 404", code="NOT_FOUND", reason="HTTP_404")
                case b"bug":
                    raise ValueError(f"secret {work.step.input.data!r}")
                case b"down":
                    raise Unavailable("the API is down")
                case b"large":
                    return Payload(b"x" * 2000)
                case b"tokens":
                    for number in range(3):
                        work.emit(Payload(b"%d" % number))
                    work.progress(0.5, "half")
            return work.step.input
        finally:
            self.running -= 1


def step(step_id: str, data: bytes = b"{}", **changes: Any) -> Step:
    return replace(Step(step_id, "acme", Kind.TOOL, "echo", Payload(data), NEVER_S), **changes)


@dataclass
class Rig:
    memory: MemoryBus
    bus: WatchedBus
    executor: FakeExecutor
    runtime: WorkerRuntime

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0)

    async def ended(self, step_id: str, delivery: int = 0) -> str:
        """How the delivery of the step (0 is the first one here) ended."""
        await self.until(lambda: len(self.bus.deliveries[step_id]) > delivery and self.bus.deliveries[step_id][delivery].ended)
        return self.bus.deliveries[step_id][delivery].ended


Make = Callable[..., Awaitable[Rig]]


@pytest.fixture
async def make() -> AsyncGenerator[Make, None]:
    rigs: list[Rig] = []

    async def make(executor: FakeExecutor | None = None, config: Config | None = None, start: bool = True) -> Rig:
        config = config or Config(worker=WorkerSection(drain_s=10))
        memory = MemoryBus(config, SystemClock(), max_payload_bytes=1000)
        bus, executor = WatchedBus(memory, config), executor or FakeExecutor()
        rig = Rig(memory, bus, executor, WorkerRuntime(config, Kind.TOOL, "home", "w1", bus, executor, random_source=lambda: 0.0))
        rigs.append(rig)
        if start:
            await rig.runtime.start()
        return rig

    yield make
    for rig in rigs:
        rig.executor.gate.set()
        rig.runtime.hurry()
        await rig.runtime.drain()
        await rig.runtime.close()


# ---- the order of things -------------------------------------------------------------------------------------------------------


async def test_the_result_is_committed_then_answered_then_acknowledged(make: Make) -> None:
    rig = await make()
    delivery = rig.bus.put(step("s1", b'{"a":1}'))
    assert await rig.ended(delivery) == "ack"
    assert rig.bus.order("s1") == ["commit", "reply", "ack"]
    subject, result = rig.bus.replies[0]
    assert subject == "nl.reply.g.x"
    assert (result.status, result.output.data, result.attempt) == (Status.DONE, b'{"a":1}', 1)
    assert (result.region, result.worker) == ("home", "w1")
    assert result.queue_us >= 5
    assert rig.bus.keeps["s1"] == 300.0
    assert rig.bus.events == []  # nobody listens to a plain Execute


async def test_a_result_that_came_second_is_not_answered(make: Make) -> None:
    rig = await make()
    theirs = rig.bus.has(StepResult("s1", "acme", Status.DONE))
    assert await rig.ended(rig.bus.put(step("s1"))) == "ack"
    assert rig.bus.replies == []
    assert await rig.bus.result("acme", "s1", "home") is theirs


async def test_a_redelivered_step_with_a_result_is_only_answered(make: Make) -> None:
    rig = await make()
    stored = rig.bus.has(StepResult("s1", "acme", Status.DONE, Payload(b"1")))
    assert await rig.ended(rig.bus.put(step("s1"), attempt=2)) == "ack"
    assert rig.bus.replies == [("nl.reply.g.x", stored)]
    assert rig.executor.started == []


async def test_a_job_with_a_result_is_not_started(make: Make) -> None:
    rig = await make()
    cancelled = rig.bus.has(StepResult("s1", "acme", Status.CANCELLED))
    assert await rig.ended(rig.bus.put(step("s1"), reply_to="")) == "ack"
    assert rig.executor.started == []
    assert rig.bus.order("s1") == ["ack"]
    assert await rig.bus.result("acme", "s1", "home") is cancelled
    assert [event.kind for event in rig.bus.events] == [EventKind.ENDED]


async def test_a_redelivered_step_without_a_result_is_executed_again(make: Make) -> None:
    rig = await make()
    assert await rig.ended(rig.bus.put(step("s1"), attempt=2)) == "ack"
    assert rig.bus.replies[0][1].attempt == 2


async def test_past_max_deliver_a_step_is_buried_once_and_not_started(make: Make) -> None:
    rig = await make(FakeExecutor([Target(Kind.TOOL, "echo", max_deliver=2)]))
    assert await rig.ended(rig.bus.put(step("s1"), attempt=3)) == "ack"
    assert [(letter.step.id, letter.reason) for letter in rig.memory.dead.values()] == [("s1", "MAX_DELIVER")]
    assert rig.bus.replies[0][1].status is Status.DEAD
    assert rig.executor.started == []


async def test_hand_backs_do_not_count_as_deliveries_that_failed(make: Make) -> None:
    rig = await make(FakeExecutor([Target(Kind.TOOL, "echo", max_deliver=2)]))
    rig.bus.broker.hand_backs[("home", "acme", "s1")] = 7
    assert await rig.ended(rig.bus.put(step("s1"), attempt=9)) == "ack"  # the second one that was not handed back
    assert rig.bus.replies[0][1].status is Status.DONE
    rig.bus.broker.hand_backs[("home", "acme", "s2")] = 7
    assert await rig.ended(rig.bus.put(step("s2"), attempt=10)) == "ack"
    assert rig.bus.replies[1][1].status is Status.DEAD
    assert [letter.step.id for letter in rig.memory.dead.values()] == ["s2"]


async def test_every_way_of_handing_back_is_counted(make: Make) -> None:
    rig = await make(FakeExecutor([Target(Kind.TOOL, "echo", slots=1)]))
    running, waiting = rig.bus.put(step("s1", b"wait")), rig.bus.put(step("s2", b"wait", lane=Lane.BATCH))
    await rig.until(lambda: len(rig.bus.deliveries) == 2)
    rig.runtime.hurry()
    await rig.runtime.drain()
    assert [await rig.ended(one) for one in (running, waiting)] == ["nak", "nak"]
    assert rig.bus.broker.hand_backs == {("home", "acme", "s1"): 1, ("home", "acme", "s2"): 1}
    rig = await make()
    rig.executor.is_ready = False
    assert await rig.ended(rig.bus.put(step("s3", b"down"))) == "nak"
    assert rig.bus.broker.hand_backs == {("home", "acme", "s3"): 1}


async def test_a_fault_of_the_worker_counts_as_a_failed_delivery(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await make()

    async def result(tenant: str, step_id: str) -> StepResult | None:
        raise ValueError("a stored result that cannot be read")

    monkeypatch.setattr(rig.bus, "result", result)
    assert await rig.ended(rig.bus.put(step("s1"), attempt=2)) == "nak"
    assert rig.bus.deliveries["s1"][0].delay_s > 0
    assert rig.bus.broker.hand_backs == {}


async def test_a_delivery_for_a_closed_queue_is_counted_as_handed_back(make: Make) -> None:
    rig = await make()
    await rig.until(lambda: rig.bus.pulled())
    for lanes in rig.runtime._served.lanes.values():
        lanes.is_open = False
    assert await rig.ended(rig.bus.put(step("s1"))) == "nak"
    assert rig.bus.broker.hand_backs == {("home", "acme", "s1"): 1}


async def test_a_step_of_other_regions_goes_back(make: Make) -> None:
    rig = await make()
    assert await rig.ended(rig.bus.put(step("s1", regions=("iad",)))) == "nak"
    assert await rig.ended(rig.bus.put(step("s2", regions=("iad", "home")))) == "ack"


async def test_a_step_comes_back_no_later_than_its_deadline(make: Make) -> None:
    rig = await make()
    rig.executor.is_ready = False
    clock = rig.bus.broker.clock
    rig.bus.broker.hand_backs[("home", "acme", "s1")] = 19
    assert await rig.ended(rig.bus.put(step("s1", b"down", deadline_s=clock.wall_s() + 5.0), attempt=20)) == "nak"
    assert 0 < rig.bus.deliveries["s1"][0].delay_s <= 5.0


async def test_an_outage_longer_than_max_deliver_is_waited_out(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.life.BACKOFF_FIRST_S", 0.001)
    monkeypatch.setattr("workers.life.BACKOFF_MAX_S", 0.001)
    rig = await make(FakeExecutor([Target(Kind.TOOL, "echo", max_deliver=2)]))
    up = asyncio.Event()
    really = rig.executor.execute

    async def execute(work: Work) -> Payload:
        if not up.is_set():
            rig.executor.started.append(work.step.id)
            raise Unavailable("the API is down")
        return await really(work)

    monkeypatch.setattr(rig.executor, "execute", execute)
    rig.bus.put(step("s1"), reply_to="")
    await rig.until(lambda: len(rig.executor.started) >= 4)
    up.set()
    await rig.until(lambda: rig.bus.broker.results)
    found = await rig.bus.result("acme", "s1", "home")
    assert found is not None
    assert found.status is Status.DONE
    assert rig.memory.dead == {}


async def test_expired_work_is_not_started(make: Make) -> None:
    rig = await make()
    assert await rig.ended(rig.bus.put(step("s1", deadline_s=1.0))) == "ack"
    result = rig.bus.replies[0][1]
    assert (result.status, result.code) == (Status.EXPIRED, "DEADLINE_EXCEEDED")
    assert rig.executor.started == []


# ---- how a step ends -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "code", "reason", "message"),
    [
        (b"fail", "NOT_FOUND", "HTTP_404", "the API said 404"),
        (b"bug", "INTERNAL", "EXECUTOR_ERROR", "the executor raised ValueError"),
        (b"large", "INVALID_ARGUMENT", "TOO_LARGE", "input: 2000 bytes, the transport takes 1000"),
    ],
)
async def test_failures_say_why_and_keep_the_input_to_themselves(
    make: Make, caplog: pytest.LogCaptureFixture, data: bytes, code: str, reason: str, message: str
) -> None:
    rig = await make()
    with caplog.at_level(logging.DEBUG):
        assert await rig.ended(rig.bus.put(step("s1", data))) == "ack"
    result = rig.bus.replies[0][1]
    assert (result.status, result.code, result.reason, result.message) == (Status.FAILED, code, reason, message)
    assert "secret" not in caplog.text


async def test_a_targets_time_out_ends_the_step(make: Make) -> None:
    rig = await make(FakeExecutor([Target(Kind.TOOL, "echo", timeout_s=0.01)]))
    assert await rig.ended(rig.bus.put(step("s1", b"wait"))) == "ack"
    result = rig.bus.replies[0][1]
    assert (result.status, result.reason) == (Status.EXPIRED, "TARGET_TIMEOUT")
    assert rig.executor.running == 0


async def test_cancel_reaches_running_and_waiting_steps(make: Make) -> None:
    rig = await make(FakeExecutor([Target(Kind.TOOL, "echo", slots=1)]))
    running = rig.bus.put(step("s1", b"wait"))
    waiting = rig.bus.put(step("s2", b"wait", lane=Lane.BATCH))
    await rig.until(lambda: rig.executor.started == ["s1"])
    rig.bus.cancel("acme", "s2")
    assert await rig.ended(waiting) == "ack"
    rig.bus.cancel("other", "s1")
    rig.bus.cancel("acme", "s1")
    assert await rig.ended(running) == "ack"
    assert {result.step_id: result.status for _, result in rig.bus.replies} == {"s1": Status.CANCELLED, "s2": Status.CANCELLED}
    assert rig.executor.started == ["s1"]


async def test_an_unreachable_transport_at_commit_hands_the_step_back(make: Make) -> None:
    rig = await make()
    rig.bus.down = True
    assert await rig.ended(rig.bus.put(step("s1"))) == "nak"
    assert rig.bus.replies == []
    rig.bus.down = False
    assert await rig.ended("s1", delivery=1) == "ack"


# ---- events --------------------------------------------------------------------------------------------------------------------


async def test_a_stream_has_numbered_events_that_can_be_had_again(make: Make) -> None:
    rig = await make()
    await rig.ended(rig.bus.put(step("s1", b"tokens", stream=True)))
    kinds = [event.kind for event in rig.bus.events]
    assert kinds == [EventKind.STARTED, *[EventKind.TOKEN] * 3, EventKind.PROGRESS, EventKind.ENDED]
    assert [event.sequence for event in rig.bus.events] == [1, 2, 3, 4, 5, 6]
    assert rig.bus.replay("acme", "s1", 1, 4) == tuple(rig.bus.events[4:])
    assert rig.bus.replay("acme", "s1", 7, 4) == tuple(rig.bus.events)  # of another attempt: all
    assert rig.bus.replay("other", "s1", 1, 0) is None


async def test_a_job_has_events_and_is_kept_beyond_its_deadline(make: Make) -> None:
    rig = await make()
    await rig.ended(rig.bus.put(step("s1", deadline_s=NEVER_S), reply_to=""))
    assert [event.kind for event in rig.bus.events] == [EventKind.STARTED, EventKind.ENDED]
    left_s = NEVER_S - SystemClock().wall_s()
    assert left_s + 59.0 < rig.bus.keeps["s1"] - rig.bus.config.nats.job_keep_s < left_s + 61.0  # longer than its record
    assert rig.bus.replies == []


# ---- slots ---------------------------------------------------------------------------------------------------------------------


async def test_slots_bound_what_runs_and_urgent_steps_start_first(make: Make) -> None:
    rig = await make(FakeExecutor([Target(Kind.TOOL, "echo", slots=2)]))
    put = [rig.bus.put(step(f"r{index}", b"wait")) for index in range(6)]
    await rig.until(lambda: len(rig.executor.started) == 2)
    put += [rig.bus.put(step("late-batch", b"{}", lane=Lane.BATCH)), rig.bus.put(step("urgent", b"{}", lane=Lane.INTERACTIVE))]
    await rig.until(lambda: True)
    rig.executor.gate.set()
    for delivery in put:
        assert await rig.ended(delivery) == "ack"
    assert rig.executor.most == 2
    assert rig.executor.started.index("urgent") < rig.executor.started.index("late-batch")
    assert len(rig.bus.broker.results) == 8
    assert not rig.bus.broker.steps


async def test_far_queues_are_pulled_only_when_the_config_says_so(make: Make) -> None:
    regions = (RegionSection(name="home"), RegionSection(name="far"))
    far = await make(config=Config(regions=regions))
    assert {queue.priority for queue in far.bus.pulled() if queue.region == "far"} == {1}
    assert await far.ended(far.bus.put(step("s1"), region="far")) == "ack"
    near = await make(config=Config(regions=regions, worker=WorkerSection(far_regions=False)))
    assert {queue.region for queue in near.bus.pulled()} == {"home"}


async def test_the_same_step_delivered_again_while_it_runs_is_executed_once(make: Make) -> None:
    rig = await make()
    rig.bus.put(step("s1", b"wait"))
    await rig.until(lambda: rig.executor.started == ["s1"])
    rig.bus.put(step("s1", b"wait"), attempt=2)  # as if its hold had run out
    await rig.until(lambda: len(rig.bus.deliveries["s1"]) == 2)
    rig.executor.gate.set()
    assert await rig.ended("s1", delivery=1) == "ack"
    assert rig.bus.deliveries["s1"][0].ended == ""  # only the newer one counts
    assert rig.executor.started == ["s1"]
    assert len(rig.bus.replies) == 1


async def test_what_is_held_for_long_is_extended(make: Make) -> None:
    rig = await make(config=Config(nats=NatsSection(ack_wait_s=1)))
    rig.bus.put(step("s1", b"wait"))
    await rig.until(lambda: any(delivery.extended for delivery in rig.bus.deliveries["s1"]))
    assert [delivery.ended for delivery in rig.bus.deliveries["s1"]] == [""]


# ---- readiness -----------------------------------------------------------------------------------------------------------------


async def test_the_start_waits_for_the_executor(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.life.BACKOFF_FIRST_S", 0.001)
    rig = await make(FakeExecutor(refuse_starts=3))
    assert rig.executor.starts == 4
    assert rig.bus.beats[0].targets == ("tool.echo",)


async def test_unavailable_hands_back_and_stops_pulling_until_ready(make: Make) -> None:
    rig = await make()
    rig.executor.is_ready = False
    first = rig.bus.put(step("s1", b"down"))
    assert await rig.ended(first) == "nak"
    assert rig.bus.deliveries["s1"][0].delay_s > 0
    await rig.until(lambda: not rig.bus.pulled())
    later = rig.bus.put(step("s2"))
    await rig.until(lambda: rig.bus.beats[-1].targets == ())
    assert rig.bus.deliveries[later] == []  # it stays in the queue
    rig.executor.is_ready = True
    assert await rig.ended(later) == "ack"


async def test_new_targets_are_announced_and_served(make: Make) -> None:
    rig = await make()
    rig.executor.found = [*rig.executor.found, Target(Kind.TOOL, "more")]
    delivery = rig.bus.put(step("s1", target="more"))
    assert await rig.ended(delivery) == "ack"
    assert [target.name for target in rig.bus.announced[-1]] == ["echo", "more"]


# ---- drain ---------------------------------------------------------------------------------------------------------------------


async def test_drain_lets_running_work_finish_and_hands_back_the_rest(make: Make) -> None:
    rig = await make(FakeExecutor([Target(Kind.TOOL, "echo", slots=1)]))
    running = rig.bus.put(step("s1", b"wait"))
    waiting = rig.bus.put(step("s2", b"wait", lane=Lane.BATCH))
    await rig.until(lambda: rig.executor.started == ["s1"])
    draining = asyncio.create_task(rig.runtime.drain())
    assert await rig.ended(waiting) == "nak"
    assert not rig.bus.pulled()
    assert rig.bus.beats[-1].draining
    rig.executor.gate.set()
    await draining
    assert await rig.ended(running) == "ack"
    assert "home.w1" in rig.bus.broker.workers
    await rig.runtime.close()
    assert rig.bus.broker.workers == {}


async def test_hurry_hands_back_what_still_runs(make: Make) -> None:
    rig = await make()
    running = rig.bus.put(step("s1", b"wait"))
    await rig.until(lambda: rig.executor.started == ["s1"])
    draining = asyncio.create_task(rig.runtime.drain())
    rig.runtime.hurry()
    await draining
    assert await rig.ended(running) == "nak"
    assert rig.executor.running == 0
    assert rig.bus.broker.results == {}


# ---- together with a gateway ---------------------------------------------------------------------------------------------------


async def test_a_gateway_gets_results_and_its_withdrawal_stops_the_work(make: Make) -> None:
    rig = await make()
    gateway = rig.memory.gateway()
    assert (await gateway.execute(step("s1", b'"hi"'), "home")).output.data == b'"hi"'
    assert (await gateway.execute(step("s2", b"fail"), "home")).status is Status.FAILED
    future = gateway.execute(step("s3", b"wait"), "home")
    await rig.until(lambda: rig.executor.running)
    await gateway.withdraw(step("s3", b"wait"), "home")
    assert (await future).status is Status.CANCELLED
    assert rig.executor.running == 0


async def test_what_a_draining_worker_hands_back_another_one_finishes(make: Make) -> None:
    rig = await make()
    gateway = rig.memory.gateway()
    future = gateway.execute(step("s1", b"wait"), "home")
    await rig.until(lambda: rig.executor.running)
    executor = FakeExecutor()
    executor.gate.set()
    other = WorkerRuntime(rig.bus.config, Kind.TOOL, "home", "w2", rig.memory.worker("w2"), executor)
    await other.start()
    rig.runtime.hurry()
    await rig.runtime.drain()
    result = await future
    assert (result.worker, result.attempt, result.status) == ("w2", 2, Status.DONE)
    await other.drain()
    await other.close()


# ---- settings ------------------------------------------------------------------------------------------------------------------


def test_only_what_a_section_gives_wins_over_the_announcement() -> None:
    announced = Target(Kind.TOOL, "echo", description="says it again", home_region="far", slots=3, timeout_s=9.0, idempotent=True)
    section = TargetSection(kind=Kind.TOOL, name="echo", slots=7, idempotent=False)
    assert merge_target(section, announced) == replace(announced, slots=7, idempotent=False)
    assert merge_target(None, announced) is announced
