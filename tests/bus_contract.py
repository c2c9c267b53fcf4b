"""What every bus must do, in memory or on NATS: steps, jobs and results. A subclass brings the `make_rig` fixture."""

import asyncio

import pytest
from bus_rig import MakeRig, done, eventually_true, finish, make_result, make_step, pull

from gateway import subjects
from gateway.errors import InvalidStep, Rejected
from gateway.ports import Queue
from gateway.types import Job, Kind, Lane, Payload, Status


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

    async def test_the_commit_alone_answers_a_step_with_an_id_of_its_gateway(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, other, worker = await rig.gateway(), await rig.gateway("other"), await rig.worker()
        inbox = await pull(rig, worker, 2)
        step = make_step(rig, id=gateway.new_id())
        elsewhere = make_step(rig, id=other.new_id())
        futures = [gateway.execute(step, rig.region), other.execute(elsewhere, rig.region)]
        for _ in futures:
            delivery = await inbox.next()
            assert delivery.answered_by_commit
            assert await worker.commit(make_result(delivery.step), 60.0, rig.region)
            late = make_result(delivery.step, status=Status.FAILED, code="INTERNAL", message="a later result is refused and told to nobody")
            assert not await worker.commit(late, 60.0, rig.region)
            delivery.ack()
        assert [await done(future) for future in futures] == [make_result(step), make_result(elsewhere)]

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
            await worker.commit(make_result(make_step(rig), output=large), 60.0, rig.region)
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
        record = job.record()
        assert record.step.input.data == b""
        assert await gateway.submit(job) == (record, True)
        assert await gateway.submit(other) == (record, False)
        assert await gateway.job(rig.tenant, job.step.id) == record
        assert await (await rig.gateway("g2")).job(rig.tenant, job.step.id) == record
        assert await gateway.job("somebody-else", job.step.id) is None
        assert await gateway.job(rig.tenant, "nowhere-1") is None
        assert await gateway.is_queued(job.step, rig.region)
        delivery = await (await pull(rig, worker, 1)).next()
        assert (delivery.step, delivery.reply_to, delivery.pending) == (job.step, "", 0)
        assert await finish(worker, delivery, make_result(job.step))
        assert await gateway.submit(other) == (record, False)
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
        answers = await asyncio.gather(
            *(worker.commit(make_result(step, worker=f"w{n}", attempt=n), 60.0, rig.region) for n in range(1, 9))
        )
        assert sum(answers) == 1
        assert not await gateway.commit(make_result(step, status=Status.EXPIRED, worker="g1"), 60.0)
        stored = await worker.result(step.tenant, step.id, rig.region)
        assert stored == make_result(step, worker=f"w{answers.index(True) + 1}", attempt=answers.index(True) + 1)


async def _not_queued(gateway: object, step: object, region: str) -> bool:
    return not await gateway.is_queued(step, region)  # type: ignore[attr-defined, no-any-return]


def _job(region: str, step: object) -> Job:
    return Job(step, region, 1_700_000_000.123, "digest-1")  # type: ignore[arg-type]
