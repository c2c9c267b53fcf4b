"""What every bus must do: queues. A subclass brings the `make_rig` fixture."""

from bus_rig import DeadEntry, MakeRig, done, eventually, eventually_true, finish, make_result, make_step, pull

from gateway import subjects
from gateway.types import Lane, Payload


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

    async def test_hand_backs_are_counted_and_other_ends_are_not(self, make_rig: MakeRig) -> None:
        rig = await make_rig(ack_wait_s=1.0)
        gateway, worker, other = await rig.gateway(), await rig.worker(), await rig.worker("w2")
        inbox = await pull(rig, worker, 5)
        step = make_step(rig)
        future = gateway.execute(step, rig.region)
        await worker.hand_back(await inbox.next(), 0.0)
        assert await other.hand_backs(step.tenant, step.id, rig.region) == 1
        await other.hand_back(await inbox.next(), 0.05)
        rig.pass_time(0.1)
        assert (await inbox.next()).attempt == 3
        rig.pass_time(1.5)  # this one ends without a word
        delivery = await inbox.next()
        assert (delivery.attempt, await worker.hand_backs(step.tenant, step.id, rig.region)) == (4, 2)
        assert await worker.hand_backs(step.tenant, make_step(rig).id, rig.region) == 0
        assert await worker.hand_backs("another", step.id, rig.region) == 0
        await finish(worker, delivery, make_result(step, attempt=4))
        assert (await done(future)).attempt == 4

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


async def _asked(inbox: object) -> None:
    await eventually(lambda: inbox.puller.credits > 0)  # type: ignore[attr-defined, no-any-return]
