"""The life of a step in the gateway, on the bus in memory."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from gateway import subjects
from gateway.config import parse
from gateway.errors import AlreadyExists, Cancelled, Expired, NotFound, Rejected, StepFailed, Unavailable
from gateway.kernel import Kernel
from gateway.ports import Delivery, Puller, Queue
from gateway.testing import ManualClock, MemoryBus, make_kernel
from gateway.types import (
    LANES,
    Completed,
    EventKind,
    JobState,
    Kind,
    Payload,
    Status,
    Step,
    StepEvent,
    StepResult,
    Target,
    WorkerInfo,
)
from plugins.nearest_region import NearestRegion

REGIONS = {"regions": [{"name": "home"}, {"name": "iad"}]}
TARGET = Target(Kind.TOOL, "echo", home_region="home")


@dataclass
class HandWorker:
    """A worker whose every step a test ends by hand."""

    bus: Any
    deliveries: asyncio.Queue[Delivery] = field(default_factory=asyncio.Queue)
    pullers: list[Puller] = field(default_factory=list)
    events: dict[str, list[StepEvent]] = field(default_factory=dict)

    async def start(self, region: str, clock: ManualClock) -> None:
        await self.bus.start()
        await self.bus.announce([TARGET])
        await self.bus.heartbeat(WorkerInfo("w", region, Kind.TOOL, (TARGET.scope,), slots=100))
        await self.bus.serve_replay(lambda tenant, step_id, attempt, after: self.events.get(step_id))
        for lane in LANES:
            puller = await self.bus.consume(Queue(region, Kind.TOOL, "echo", lane), self.deliveries.put_nowait)
            puller.want(100)
            self.pullers.append(puller)

    def emit(self, step: Step, kind: EventKind, sequence: int, payload: Payload | None = None) -> None:
        event = StepEvent(step.id, kind, 1, sequence, "home", "w", payload)
        self.events.setdefault(step.id, []).append(event)
        self.bus.publish_event(step.tenant, event)

    async def end(self, delivery: Delivery, status: Status = Status.DONE, **more: Any) -> None:
        step = delivery.step
        result = StepResult(step.id, step.tenant, status, step.input, delivery.attempt, "home", "w", 20, 30, **more)
        await self.bus.commit(result, 60, subjects.result_region(step.id, delivery.queue.region))
        if delivery.reply_to:
            self.bus.reply(delivery.reply_to, result)
        self.bus.publish_event(step.tenant, StepEvent(step.id, EventKind.ENDED, delivery.attempt, 99))
        delivery.ack()


@dataclass
class World:
    clock: ManualClock
    bus: MemoryBus
    kernel: Kernel
    worker: HandWorker

    def step(self, **changes: Any) -> Step:
        base = Step("s1", "acme", Kind.TOOL, "echo", Payload(b'{"a":1}'), self.clock.wall_s() + 30)
        return replace(base, **changes)

    async def serve(self) -> None:
        await self.worker.end(await self.worker.deliveries.get())


@asynccontextmanager
async def world(*policies: dict[str, Any], worker_region: str | None = "home", plugins: list[str] | None = None) -> AsyncIterator[World]:
    clock = ManualClock()
    bus = MemoryBus(parse(REGIONS), clock)
    kernel = make_kernel(bus, clock, policies=policies, settings=REGIONS, plugins=plugins or [])
    made = World(clock, bus, kernel, HandWorker(bus.worker("w", worker_region or "home")))
    await kernel._bus.start()
    if worker_region:
        await made.worker.start(worker_region, clock)
    yield made
    for puller in made.worker.pullers:
        await puller.close()
    await kernel.close()


async def until(condition: Callable[[], bool]) -> None:
    """Lets other tasks run until the condition holds; pytest's time-out ends a hang."""
    while not condition():
        await asyncio.sleep(0)


async def test_execute_answers_with_output_and_times() -> None:
    async with world() as w:
        serving = asyncio.create_task(w.serve())
        completed = await w.kernel.execute(w.step())
        await serving
        assert completed.result.output == Payload(b'{"a":1}')
        assert (completed.timing.queue_us, completed.timing.service_us) == (20, 30)
        assert w.kernel.counts == {"done": 1}


@pytest.mark.parametrize(
    ("status", "error", "state"),
    [
        (Status.FAILED, StepFailed, "failed"),
        (Status.EXPIRED, Expired, "expired"),
        (Status.CANCELLED, Cancelled, "cancelled"),
        (Status.DEAD, StepFailed, "failed"),
    ],
)
async def test_a_result_that_is_not_done_is_raised(status: Status, error: type[Exception], state: str) -> None:
    async with world() as w:
        running = asyncio.create_task(w.kernel.execute(w.step()))
        await w.worker.end(await w.worker.deliveries.get(), status, code="NOT_FOUND" if status is Status.FAILED else "", message="why")
        with pytest.raises(error, match="why"):
            await running
        assert w.kernel.counts == {state: 1}


async def test_without_a_worker_execute_is_refused_with_a_hint_and_holds_nothing() -> None:
    async with world({"use": "fixed_limit", "limit": 1}, worker_region=None) as w:
        for _ in range(3):
            with pytest.raises(Unavailable, match="no worker serves") as caught:
                await w.kernel.execute(w.step())
            assert (caught.value.reason, caught.value.retry_after_s) == ("NO_WORKERS", 2.0)


async def test_when_routing_rules_out_every_region_the_error_does_not_blame_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NearestRegion, "score", lambda *_: None)
    async with world({"use": "nearest_region"}) as w:
        with pytest.raises(Unavailable, match=r"rule out every region that serves tool\.echo") as caught:
            await w.kernel.execute(w.step())
        assert caught.value.reason == "NO_REGION"


async def test_a_live_worker_elsewhere_is_used() -> None:
    async with world({"use": "nearest_region"}, worker_region="iad") as w:
        running = asyncio.create_task(w.kernel.execute(w.step()))
        delivery = await w.worker.deliveries.get()
        assert delivery.queue.region == "iad"
        await w.worker.end(delivery)
        await running


async def test_a_step_goes_to_none_but_the_regions_that_it_names() -> None:
    async with world({"use": "nearest_region"}, worker_region="iad") as w:
        with pytest.raises(Unavailable, match="no worker serves"):
            await w.kernel.execute(w.step(regions=("home",)))
        running = asyncio.create_task(w.kernel.execute(w.step(id="s2", regions=("home", "iad"))))
        await w.worker.end(await w.worker.deliveries.get())
        await running


async def test_the_limit_queues_then_refuses_and_lets_the_next_one_in() -> None:
    async with world({"use": "fixed_limit", "limit": 1}, {"use": "bounded_wait", "max_waiting": 1}) as w:
        first = asyncio.create_task(w.kernel.execute(w.step(id="s1")))
        delivery = await w.worker.deliveries.get()
        second = asyncio.create_task(w.kernel.execute(w.step(id="s2")))
        await until(lambda: w.kernel.permits.gate("tool.echo").waiting == 1)
        with pytest.raises(Rejected) as caught:
            await w.kernel.execute(w.step(id="s3"))
        assert (caught.value.reason, caught.value.scope) == ("QUEUE_FULL", "tool.echo")
        await w.worker.end(delivery)
        await first
        await w.serve()
        assert (await second).result.step_id == "s2"
        assert w.kernel.permits.gate("tool.echo").inflight == 0


async def test_who_is_cancelled_while_waiting_leaves_no_trace() -> None:
    async with world({"use": "fixed_limit", "limit": 1}, {"use": "bounded_wait"}) as w:
        first = asyncio.create_task(w.kernel.execute(w.step(id="s1")))
        delivery = await w.worker.deliveries.get()
        second = asyncio.create_task(w.kernel.execute(w.step(id="s2")))
        gate = w.kernel.permits.gate("tool.echo")
        await until(lambda: gate.waiting == 1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        assert (gate.inflight, gate.waiting) == (1, 0)
        await w.worker.end(delivery)
        await first
        assert gate.inflight == 0


async def test_a_cancelled_caller_withdraws_its_step() -> None:
    async with world() as w:
        cancelled: list[tuple[str, str]] = []
        await w.worker.bus.on_cancel(lambda tenant, step_id: cancelled.append((tenant, step_id)))
        running = asyncio.create_task(w.kernel.execute(w.step()))
        await w.worker.deliveries.get()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await until(lambda: bool(cancelled))
        assert cancelled == [("acme", "s1")]
        assert w.kernel.counts == {"cancelled": 1}


async def test_a_deadline_that_has_passed_is_not_dispatched() -> None:
    async with world() as w:
        with pytest.raises(Expired):
            await w.kernel.execute(w.step(deadline_s=w.clock.wall_s()))
        assert w.worker.deliveries.empty()


async def test_a_lost_transport_is_said_after_a_moment_and_a_short_break_is_ridden_out() -> None:
    async with world() as w:
        w.kernel._bus.connected = False  # type: ignore[misc]
        calls = [
            asyncio.create_task(w.kernel.execute(w.step())),
            asyncio.create_task(w.kernel.submit(w.step())),
            asyncio.create_task(w.kernel.job("acme", "home-x")),
            asyncio.create_task(w.kernel.cancel("acme", "home-x")),
        ]
        await asyncio.sleep(0)
        w.clock.advance(2.1)
        for call in calls:
            with pytest.raises(Unavailable, match="lost its connection") as caught:
                await call
            assert caught.value.reason == "NOT_STORED"
        assert w.worker.deliveries.empty()
        patient = asyncio.create_task(w.kernel.execute(w.step()))
        await asyncio.sleep(0)
        w.kernel._bus.connected = True  # type: ignore[misc]
        await w.serve()
        assert (await patient).result.status is Status.DONE


async def test_a_step_that_nobody_ends_expires() -> None:
    async with world() as w:
        running = asyncio.create_task(w.kernel.execute(w.step()))
        await w.worker.deliveries.get()
        w.clock.advance(31)
        with pytest.raises(Expired):
            await running
        assert w.kernel.counts == {"expired": 1}
        assert w.kernel.permits.gate("tool.echo").inflight == 0


async def test_a_call_that_is_cancelled_at_its_deadline_counts_as_expired_and_withdraws_nothing() -> None:
    async with world() as w:
        cancelled: list[str] = []
        await w.worker.bus.on_cancel(lambda tenant, step_id: cancelled.append(step_id))
        running = asyncio.create_task(w.kernel.execute(w.step()))
        await w.worker.deliveries.get()
        w.clock.advance(29.99)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert w.kernel.counts == {"expired": 1}
        assert not w.kernel._background
        assert not cancelled


async def test_a_tenant_over_its_rate_is_refused_with_a_hint() -> None:
    async with world({"use": "token_bucket", "rate_per_s": 2, "burst": 1}) as w:
        running = asyncio.create_task(w.kernel.execute(w.step(id="s1")))
        await w.serve()
        await running
        with pytest.raises(Rejected) as caught:
            await w.kernel.execute(w.step(id="s2"))
        assert caught.value.policy == "token_bucket"
        assert caught.value.retry_after_s == pytest.approx(0.5 * 1.25)


async def test_a_broken_policy_is_contained_and_counted(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_plugin.py").write_text(
        "from dataclasses import dataclass\nfrom gateway import PolicyType, Slot, hookimpl\n\n"
        "@dataclass(frozen=True)\nclass C:\n    'None.'\n\n"
        "class P:\n    def __init__(self, config): pass\n    def decide(self, *a): raise ZeroDivisionError\n"
        "    release = ended = decide\n\n"
        "@hookimpl\ndef nearloop_policy_types():\n    return [PolicyType('broken', Slot.ADMISSION, C, P)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for on_error in ("admit", "reject"):
        async with world({"use": "broken", "on_error": on_error}, plugins=["broken_plugin"]) as w:
            running = asyncio.create_task(w.kernel.execute(w.step()))
            if on_error == "admit":
                await w.serve()
                await running
            else:
                with pytest.raises(Rejected, match="policy broken failed"):
                    await running
            assert w.kernel.contain.counts["broken", "faults"] >= 1


async def test_stream_yields_events_in_order_then_the_result() -> None:
    async with world() as w:

        async def collect() -> list[StepEvent | Completed]:
            return [item async for item in w.kernel.stream(w.step(stream=True))]

        running = asyncio.create_task(collect())
        delivery = await w.worker.deliveries.get()
        w.worker.emit(delivery.step, EventKind.STARTED, 1)
        for sequence in (2, 3):
            w.worker.emit(delivery.step, EventKind.TOKEN, sequence, Payload(b'"x"'))
        await w.worker.end(delivery)
        items = await running
        assert [item.sequence for item in items if isinstance(item, StepEvent)] == [1, 2, 3]
        assert isinstance(items[-1], Completed)
        assert w.kernel.counts == {"done": 1}


async def test_a_lost_event_is_asked_for_again() -> None:
    async with world() as w:
        stream = w.kernel.stream(w.step(stream=True))
        first = asyncio.ensure_future(anext(stream))
        delivery = await w.worker.deliveries.get()
        w.worker.events[delivery.step.id] = [StepEvent("s1", EventKind.STARTED, 1, 1), StepEvent("s1", EventKind.TOKEN, 1, 2)]
        w.worker.emit(delivery.step, EventKind.TOKEN, 3)
        seen = [await first, await anext(stream), await anext(stream)]
        assert [item.sequence for item in seen if isinstance(item, StepEvent)] == [1, 2, 3]
        await stream.aclose()
        assert w.kernel.counts == {"cancelled": 1}


async def test_submit_is_the_same_job_for_the_same_key() -> None:
    async with world() as w:
        one, created = await w.kernel.submit(w.step(idempotency_key="k"))
        two, again = await w.kernel.submit(w.step(idempotency_key="k"))
        assert (created, again) == (True, False)
        assert one.job.step.id == two.job.step.id
        await until(lambda: w.worker.deliveries.qsize() == 1)
        with pytest.raises(AlreadyExists, match="idempotency_key"):
            await w.kernel.submit(w.step(idempotency_key="k", input=Payload(b'{"a":2}')))
        same, created = await w.kernel.submit(w.step(idempotency_key="k", input=Payload(b'{ "a" : 1 }')))
        assert (same.job.step.id, created) == (one.job.step.id, False)
        other, created = await w.kernel.submit(w.step(tenant="other", idempotency_key="k"))
        assert created
        assert other.job.step.id != one.job.step.id


async def test_execute_with_a_key_finds_the_result_again() -> None:
    async with world() as w:
        running = asyncio.create_task(w.kernel.execute(w.step(idempotency_key="k")))
        await w.serve()
        first = await running
        again = await w.kernel.execute(w.step(idempotency_key="k"))
        assert again.result == first.result
        assert w.worker.deliveries.empty()


async def test_a_key_outlives_the_first_callers_patience() -> None:
    async with world() as w:
        first = asyncio.create_task(w.kernel.execute(w.step(idempotency_key="k", deadline_s=w.clock.wall_s() + 0.01)))
        delivery = await w.worker.deliveries.get()
        assert delivery.step.deadline_s == w.clock.wall_s() + TARGET.timeout_s
        w.clock.advance(0.02)
        with pytest.raises(Expired, match="goes on as job home-"):
            await first
        again = asyncio.create_task(w.kernel.execute(w.step(idempotency_key="k")))
        await w.worker.end(delivery)
        assert (await again).result.status is Status.DONE


async def test_watch_resumes_after_a_sequence_number() -> None:
    async with world() as w:
        status, _ = await w.kernel.submit(w.step(idempotency_key="k"))
        delivery = await w.worker.deliveries.get()
        for sequence in (1, 2, 3):
            w.worker.emit(delivery.step, EventKind.TOKEN, sequence)
        watching = w.kernel.watch("acme", status.job.step.id, 1, 2)
        third = await anext(watching)
        assert isinstance(third, StepEvent)
        assert third.sequence == 3
        await w.worker.end(delivery)
        last = await anext(watching)
        assert isinstance(last, Completed)
        assert (await w.kernel.job("acme", status.job.step.id)).state is JobState.DONE


async def test_another_tenant_does_not_find_the_job() -> None:
    async with world() as w:
        status, _ = await w.kernel.submit(w.step(idempotency_key="k"))
        for job_id in (status.job.step.id, "home-nothing", "nowhere-x", "a.b", ""):
            with pytest.raises(NotFound, match="job_id"):
                await w.kernel.job("other", job_id)


async def test_cancel_ends_a_queued_job_and_leaves_an_ended_one() -> None:
    async with world(worker_region=None) as w:
        status, _ = await w.kernel.submit(w.step(idempotency_key="k"))
        job_id = status.job.step.id
        assert status.state is JobState.QUEUED
        assert (await w.kernel.cancel("acme", job_id)).state is JobState.CANCELLED
        assert not await w.kernel._bus.is_queued(status.job.step, "home")
        with pytest.raises(Cancelled):
            await anext(w.kernel.watch("acme", job_id, 0, 0))
    async with world() as w:
        status, _ = await w.kernel.submit(w.step(idempotency_key="k"))
        await w.serve()
        assert (await w.kernel.cancel("acme", status.job.step.id)).state is JobState.DONE


async def test_a_job_that_nobody_took_expires_with_one_result() -> None:
    async with world(worker_region=None) as w:
        status, _ = await w.kernel.submit(w.step(idempotency_key="k"))
        w.clock.advance(30 + 11)
        found = await w.kernel.job("acme", status.job.step.id)
        assert found.state is JobState.EXPIRED
        assert found.result
        assert found.result.code == "DEADLINE_EXCEEDED"
        assert not await w.kernel._bus.is_queued(status.job.step, "home")


async def test_targets_are_listed_with_live_regions() -> None:
    async with world() as w:
        (status,) = w.kernel.targets(Kind.TOOL)
        assert (status.target.name, status.live_regions) == ("echo", ("home",))
        assert w.kernel.targets(Kind.INFER) == []
        w.clock.advance(3600)
        assert w.kernel.targets(Kind.TOOL)[0].live_regions == ()
