"""What every bus must do, in memory or on NATS. A subclass brings the `make_rig` fixture."""

import asyncio
from dataclasses import replace

import pytest
from bus_rig import DeadEntry, MakeRig, done, eventually, eventually_true, finish, make_result, make_step, pull

from gateway import subjects
from gateway.errors import InvalidStep, Rejected
from gateway.ports import Queue
from gateway.types import EventKind, Job, Kind, Lane, Payload, Status, StepEvent, StepResult, Target, WorkerInfo


class BusContract:
    """Steps, jobs and results."""

    async def test_a_result_comes_back(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 1)
        step = make_step(rig, run="run-1", client_region="office", stream=True, traceparent=f"00-{'ab' * 16}-{'cd' * 8}-01")
        future = gateway.execute(step, rig.region)
        delivery = await inbox.next()
        assert (delivery.step, delivery.attempt, delivery.pending) == (step, 1, 0)
        assert delivery.queued_us >= 0
        assert delivery.queue == Queue(rig.region, Kind.TOOL, step.target, Lane.STANDARD)
        result = make_result(step)
        assert await finish(worker, delivery, result)
        assert await done(future) == result
        assert await gateway.result(step.tenant, step.id) == result
        await eventually_true(lambda: _not_queued(gateway, step, rig.region))

    async def test_text_of_any_kind_survives(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 1)
        step = make_step(rig, idempotency_key=" größe\r\n100% ✓ ", input=Payload(bytes(range(256)), "application/octet-stream"))
        future = gateway.execute(step, rig.region)
        delivery = await inbox.next()
        assert delivery.step == step
        result = make_result(step, status=Status.FAILED, code="INTERNAL", reason="STEP_FAILED", message="line 1\r\nNl-Status: done\n50% ✓")
        await finish(worker, delivery, result)
        assert await done(future) == result

    async def test_many_at_once(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 10)
        steps = [make_step(rig, input=Payload(b"%d" % number)) for number in range(100)]
        futures = [gateway.execute(step, rig.region) for step in steps]
        for _ in steps:
            delivery = await inbox.next()
            await finish(worker, delivery, make_result(delivery.step, output=delivery.step.input))
            inbox.puller.want(10)
        results = await asyncio.gather(*(done(future) for future in futures))
        assert [result.output.data for result in results] == [step.input.data for step in steps]

    async def test_a_full_queue_rejects(self, make_rig: MakeRig) -> None:
        rig = await make_rig(max_queue_messages=2)
        gateway, worker = await rig.gateway(), await rig.worker()
        steps = [make_step(rig) for _ in range(2)]
        futures = [gateway.execute(step, rig.region) for step in steps]
        for step in steps:
            await eventually_true(lambda step=step: gateway.is_queued(step, rig.region))
        with pytest.raises(Rejected) as caught:
            await done(gateway.execute(make_step(rig), rig.region))
        assert (caught.value.reason, caught.value.scope, caught.value.retry_after_s) == ("QUEUE_FULL", rig.region, None)
        inbox = await pull(rig, worker, 1)
        delivery = await inbox.next()
        await finish(worker, delivery, make_result(delivery.step))
        assert await done(futures[0] if delivery.step == steps[0] else futures[1])
        await eventually_true(lambda: _not_queued(gateway, delivery.step, rig.region))
        inbox.puller.want(2)
        last = gateway.execute(make_step(rig), rig.region)
        for _ in range(2):
            delivery = await inbox.next()
            await finish(worker, delivery, make_result(delivery.step))
        assert (await done(last)).status is Status.DONE

    async def test_too_large_is_refused_and_nothing_breaks(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        large = Payload(bytes(2 * 1024 * 1024))
        with pytest.raises(InvalidStep) as caught:
            await done(gateway.execute(make_step(rig, input=large), rig.region))
        assert caught.value.reason == "TOO_LARGE"
        with pytest.raises(InvalidStep):
            await gateway.submit(_job(rig.region, make_step(rig, input=large)))
        with pytest.raises(InvalidStep):
            await worker.commit(make_result(make_step(rig), output=large), 60.0)
        inbox = await pull(rig, worker, 1)
        future = gateway.execute(make_step(rig), rig.region)
        delivery = await inbox.next()
        await finish(worker, delivery, make_result(delivery.step))
        assert (await done(future)).status is Status.DONE

    async def test_a_forgotten_step_stays_queued(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        step = make_step(rig)
        future = gateway.execute(step, rig.region)
        await eventually_true(lambda: gateway.is_queued(step, rig.region))
        future.cancel()
        delivery = await (await pull(rig, worker, 1)).next()
        assert await finish(worker, delivery, make_result(step))
        assert await gateway.result(step.tenant, step.id) == make_result(step)

    async def test_the_same_id_twice_at_once_is_an_error(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway = await rig.gateway()
        step = make_step(rig)
        first = gateway.execute(step, rig.region)
        with pytest.raises(InvalidStep):
            await done(gateway.execute(step, rig.region))
        assert not first.done()

    async def test_a_step_that_has_ended_is_answered_with_its_result(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        step = make_step(rig)
        first = gateway.execute(step, rig.region)
        delivery = await (await pull(rig, worker, 1)).next()
        await finish(worker, delivery, make_result(step))
        assert await done(first) == await done(gateway.execute(step, rig.region)) == make_result(step)

    async def test_a_job_is_stored_once(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        job = _job(rig.region, make_step(rig, id=subjects.job_id(rig.region, rig.tenant, Kind.TOOL, rig.target.name, "key")))
        other = Job(job.step, job.region, job.created_s + 5, "another-digest")
        assert await gateway.submit(job) == (job, True)
        assert await gateway.submit(other) == (job, False)
        assert await gateway.job(rig.tenant, job.step.id) == job
        assert await (await rig.gateway("g2")).job(rig.tenant, job.step.id) == job
        assert await gateway.job("somebody-else", job.step.id) is None
        assert await gateway.job(rig.tenant, "nowhere-1") is None
        assert await gateway.is_queued(job.step, rig.region)
        delivery = await (await pull(rig, worker, 1)).next()
        assert (delivery.step, delivery.reply_to, delivery.pending) == (job.step, "", 0)
        assert await finish(worker, delivery, make_result(job.step))
        assert await gateway.submit(other) == (job, False)
        await eventually_true(lambda: _not_queued(gateway, job.step, rig.region))

    async def test_a_job_that_does_not_fit_leaves_nothing(self, make_rig: MakeRig) -> None:
        rig = await make_rig(max_queue_messages=3)
        gateway = await rig.gateway()
        first, second = (_job(rig.region, make_step(rig, id=f"{rig.region}-{number}")) for number in (1, 2))
        await gateway.submit(first)
        with pytest.raises(Rejected) as caught:
            await gateway.submit(second)
        assert (caught.value.reason, caught.value.scope) == ("QUEUE_FULL", rig.region)
        assert await gateway.job(rig.tenant, second.step.id) is None
        assert not await gateway.is_queued(second.step, rig.region)

    async def test_jobs_at_once(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateways = await rig.gateway("g1"), await rig.gateway("g2")
        jobs = [_job(rig.region, make_step(rig, id=f"{rig.region}-{number}")) for number in range(100)]
        answers = await asyncio.gather(*(gateway.submit(job) for job in jobs for gateway in gateways))
        assert sum(stored for _, stored in answers) == len(jobs)
        assert {job.step.id for job, _ in answers} == {job.step.id for job in jobs}

    async def test_the_first_result_wins(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        step = make_step(rig)
        assert await gateway.result(step.tenant, step.id) is None
        answers = await asyncio.gather(*(worker.commit(make_result(step, worker=f"w{n}", attempt=n), 60.0) for n in range(1, 9)))
        assert sum(answers) == 1
        assert not await gateway.commit(make_result(step, status=Status.EXPIRED, worker="g1"), 60.0)
        stored = await worker.result(step.tenant, step.id)
        assert stored == make_result(step, worker=f"w{answers.index(True) + 1}", attempt=answers.index(True) + 1)


class QueueContract:
    """Deliveries: attempts, lanes, priorities, credits."""

    async def test_handed_back_comes_again(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 3)
        step = make_step(rig)
        future = gateway.execute(step, rig.region)
        for attempt in (1, 2):
            delivery = await inbox.next()
            assert (delivery.step, delivery.attempt) == (step, attempt)
            delivery.nak(0.05 if attempt == 2 else 0.0)
            rig.pass_time(0.1)
        delivery = await inbox.next()
        assert delivery.attempt == 3
        await finish(worker, delivery, make_result(step, attempt=3))
        assert (await done(future)).attempt == 3

    async def test_only_the_first_end_counts(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 2)
        gateway.execute(make_step(rig), rig.region)
        delivery = await inbox.next()
        delivery.nak()
        delivery.ack()
        assert (await inbox.next()).attempt == 2

    async def test_a_hold_runs_out(self, make_rig: MakeRig) -> None:
        rig = await make_rig(ack_wait_s=1.0)
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 2)
        step = make_step(rig)
        gateway.execute(step, rig.region)
        assert (await inbox.next()).attempt == 1
        rig.pass_time(1.5)
        delivery = await inbox.next()
        assert (delivery.step, delivery.attempt) == (step, 2)
        assert delivery.queued_us >= 900_000
        assert await gateway.is_queued(step, rig.region)

    async def test_lanes_are_queues_of_their_own(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        steps = {lane: make_step(rig, lane=lane) for lane in (Lane.BATCH, Lane.INTERACTIVE, Lane.STANDARD)}
        for step in steps.values():
            gateway.execute(step, rig.region)
        for lane in Lane:
            assert (await (await pull(rig, worker, 2, lane=lane)).next()).step == steps[lane]

    async def test_regions_are_queues_of_their_own(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        here, there = make_step(rig), make_step(rig)
        gateway.execute(there, rig.other_region)
        gateway.execute(here, rig.region)
        assert (await (await pull(rig, worker, 2)).next()).step == here
        assert (await (await pull(rig, worker, 2, region=rig.other_region)).next()).step == there

    async def test_near_workers_come_first(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, near, far = await rig.gateway(), await rig.worker("near"), await rig.worker("far")
        far_inbox = await pull(rig, far, 3, priority=1)
        alone = make_step(rig)
        gateway.execute(alone, rig.region)
        assert (await far_inbox.next()).step == alone  # no near worker: far ones serve at once
        near_inbox = await pull(rig, near, 3)
        await _asked(near_inbox)
        for _ in range(5):
            gateway.execute(make_step(rig), rig.region)
        for _ in range(3):
            await near_inbox.next()
        for _ in range(2):
            await far_inbox.next()
        assert near_inbox.waiting.empty()
        assert far_inbox.waiting.empty()
        assert (near_inbox.puller.credits, far_inbox.puller.credits) == (0, 0)

    async def test_credits_count_what_is_outstanding(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 5)
        await eventually(lambda: inbox.puller.credits == 5)
        for left in (4, 3):
            gateway.execute(make_step(rig), rig.region)
            (await inbox.next()).ack()
            assert inbox.puller.credits == left
        inbox.puller.want(5)
        await eventually(lambda: inbox.puller.credits == 5)
        for left in range(4, -1, -1):
            gateway.execute(make_step(rig), rig.region)
            (await inbox.next()).ack()
            assert inbox.puller.credits == left

    async def test_a_closed_puller_takes_nothing(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        closed = await pull(rig, worker, 10)
        await _asked(closed)
        await closed.puller.close()
        assert closed.puller.credits == 0
        steps = [make_step(rig) for _ in range(3)]
        for step in steps:
            gateway.execute(step, rig.region)
        inbox = await pull(rig, worker, 3)
        deliveries = [await inbox.next() for _ in steps]
        assert [(delivery.step, delivery.attempt) for delivery in deliveries] == [(step, 1) for step in steps]
        assert closed.waiting.empty()

    async def test_withdrawn_and_cancelled(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        cancelled: list[tuple[str, str]] = []
        subscription = await worker.on_cancel(lambda tenant, step_id: cancelled.append((tenant, step_id)))
        gone, kept = make_step(rig), make_step(rig)
        for step in (gone, kept):
            gateway.execute(step, rig.region)
        for step in (gone, kept):
            await eventually_true(lambda step=step: gateway.is_queued(step, rig.region))
        await gateway.withdraw(gone, rig.region)
        assert not await gateway.is_queued(gone, rig.region)
        await eventually(lambda: (gone.tenant, gone.id) in cancelled)
        assert (await (await pull(rig, worker, 2)).next()).step == kept
        await subscription.close()
        cancelled.clear()
        other: list[str] = []
        await (await rig.worker("w2")).on_cancel(lambda _, step_id: other.append(step_id))
        await gateway.withdraw(kept, rig.region)
        await eventually(lambda: kept.id in other)
        assert kept.id not in {step_id for _, step_id in cancelled}

    async def test_buried_once(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 1)
        step = make_step(rig, input=Payload(b"poison"))
        gateway.execute(step, rig.region)
        delivery = await inbox.next()
        await worker.bury(delivery, "POISON", "it bites")
        await worker.bury(delivery, "OTHER", "again")
        delivery.ack()
        subject = subjects.dead(rig.region, step.kind, step.target, step.id)
        assert await rig.dead(subject) == DeadEntry(1, b"poison", "POISON", "it bites")


class LiveContract:
    """Events and the live catalogue."""

    async def test_events_are_watched(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        step = make_step(rig)
        seen: list[StepEvent] = []
        subscription = await gateway.watch(step.tenant, step.id, seen.append)
        events = _events(step.id)
        for event in events:
            worker.publish_event(step.tenant, event)
        await eventually(lambda: len(seen) == len(events))
        assert seen == events
        await subscription.close()
        later: list[StepEvent] = []
        await gateway.watch(step.tenant, step.id, later.append)
        worker.publish_event(step.tenant, events[0])
        await eventually(lambda: later == events[:1])
        assert seen == events

    async def test_events_are_replayed_by_who_executes(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway = await rig.gateway()
        step = make_step(rig)
        assert list(await gateway.replay(step.tenant, step.id, 1, 0)) == []  # no worker at all
        asked: list[tuple[str, str, int, int]] = []

        def answer(*question: object) -> list[StepEvent]:
            asked.append(question)  # type: ignore[arg-type]
            return _events(step.id)[1:]

        await (await rig.worker("idle")).serve_replay(lambda *_: None)
        assert list(await gateway.replay(step.tenant, step.id, 1, 0)) == []  # nobody executes it
        await (await rig.worker("busy")).serve_replay(answer)
        assert list(await gateway.replay(step.tenant, step.id, 2, 7)) == _events(step.id)[1:]
        assert asked == [(step.tenant, step.id, 2, 7)]

    async def test_targets_and_workers_are_known(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        info = WorkerInfo(f"w-{rig.tenant}", rig.region, Kind.TOOL, (rig.target.scope,), slots=4, running=1)
        assert rig.target.scope not in gateway.targets()
        await worker.announce([rig.target])
        await worker.heartbeat(info)
        await eventually(lambda: gateway.targets().get(rig.target.scope) == rig.target and info in gateway.workers())
        changed = replace(rig.target, description="another")
        await worker.announce([changed])
        await eventually(lambda: gateway.targets()[rig.target.scope] == changed)
        late = await rig.gateway("late")
        assert late.targets()[rig.target.scope] == changed
        assert info in late.workers()
        await worker.retire(info)
        await eventually(lambda: info not in gateway.workers() and info not in late.workers())
        later = await rig.gateway("later")
        assert info not in later.workers()

    async def test_a_worker_that_falls_silent_is_dropped(self, make_rig: MakeRig) -> None:
        rig = await make_rig(heartbeat_s=0.3)
        gateway, worker = await rig.gateway(), await rig.worker()
        info = WorkerInfo(f"w-{rig.tenant}", rig.region, Kind.TOOL, ("tool.x",))
        await worker.heartbeat(info)
        await eventually(lambda: info in gateway.workers())
        rig.pass_time(1.0)
        await eventually(lambda: info not in gateway.workers())

    async def test_queues_exist_once_announced(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        workers = [await rig.worker(name) for name in ("a", "b", "c")]
        target = Target(Kind.TOOL, rig.target.name)
        await asyncio.gather(*(worker.announce([target]) for worker in workers))
        await workers[0].announce([target])
        for worker in workers:
            assert (await pull(rig, worker, 1)).puller.credits <= 1


async def _not_queued(gateway: object, step: object, region: str) -> bool:
    return not await gateway.is_queued(step, region)  # type: ignore[attr-defined, no-any-return]


async def _asked(inbox: object) -> None:
    await eventually(lambda: inbox.puller.credits > 0)  # type: ignore[attr-defined, no-any-return]


def _job(region: str, step: object) -> Job:
    return Job(step, region, 1_700_000_000.123, "digest-1")  # type: ignore[arg-type]


def _events(step_id: str) -> list[StepEvent]:
    return [
        StepEvent(step_id, EventKind.STARTED, 1, 1, "home", "w1"),
        StepEvent(step_id, EventKind.TOKEN, 1, 2, "home", "w1", payload=Payload("to ✓\r\n".encode(), "text/plain")),
        StepEvent(step_id, EventKind.PROGRESS, 1, 3, "home", "w1", fraction=0.25, message="a\r\nquarter 25%"),
        StepEvent(step_id, EventKind.ENDED, 1, 4, "home", "w1"),
    ]


__all__ = ["BusContract", "LiveContract", "QueueContract", "StepResult"]
