"""Regions with NATS servers of their own, joined by leaf nodes: everything reaches everything, and one that is away stops no other."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bus_rig import Inbox, done, eventually, eventually_true, finish, make_result, make_step
from regions_rig import DOMAINS, RegionsRig

from gateway import subjects
from gateway.edge.bus import NatsGatewayBus
from gateway.edge.worker_bus import NatsWorkerBus
from gateway.errors import Unavailable
from gateway.ports import Queue
from gateway.run_types import RoundTrip
from gateway.types import EventKind, Job, Kind, Lane, Payload, Status, Step, StepEvent, WorkerInfo


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[RegionsRig]:
    rig = RegionsRig(tmp_path, publish_timeout_s=1.0)
    try:
        rig.start()
        yield rig
    finally:
        await rig.close()


async def pull(rig: RegionsRig, worker: NatsWorkerBus, region: str, credits: int = 4) -> Inbox:
    inbox = Inbox()
    inbox.puller = await worker.consume(Queue(region, rig.target.kind, rig.target.name, Lane.STANDARD), inbox.waiting.put_nowait)
    inbox.puller.want(credits)
    return inbox


async def stored(gateway: NatsGatewayBus, stream: str) -> dict[str, list[str]]:
    """Subjects that the stream holds, by region."""
    found = {}
    for region in DOMAINS:
        info = await gateway.js_of(region).api(f"STREAM.INFO.{stream}", {"subjects_filter": ">"})
        found[region] = sorted(info["state"].get("subjects") or {})
    return found


async def started(rig: RegionsRig) -> tuple[NatsGatewayBus, NatsWorkerBus, NatsGatewayBus]:
    """A gateway at home, a worker in iad, a gateway in fra; all three sites have their streams, and see each other."""
    gateway, worker, far = await asyncio.gather(rig.gateway("home"), rig.worker("iad"), rig.gateway("fra"))
    for one in (gateway.js_of, worker.js_of, far.js_of):
        for region in DOMAINS:
            await eventually_true(lambda one=one, region=region: _answers(one(region).api("STREAM.INFO.NL_RESULTS")))
    return gateway, worker, far


async def _answers(call: Awaitable[object]) -> bool:
    try:
        await call
    except Exception:
        return False
    return True


async def test_a_step_is_executed_in_another_region(rig: RegionsRig) -> None:
    gateway, worker, far = await started(rig)
    info = WorkerInfo("w-iad", "iad", Kind.TOOL, (rig.target.scope,), slots=4)
    await worker.announce([rig.target])
    await worker.heartbeat(info)
    await worker.publish_round_trip(RoundTrip("iad", "home", 0.08))
    inbox = await pull(rig, worker, "iad")
    events = [StepEvent("", EventKind.STARTED, 1, 1, "iad", "w-iad"), StepEvent("", EventKind.TOKEN, 1, 2, "iad", "w-iad", Payload(b"to"))]
    for one in (gateway, far):
        await eventually(lambda one=one: one.targets().get(rig.target.scope) == rig.target and info in one.workers())
        await eventually(lambda one=one: one.round_trips().between("home", "iad") == 0.08)
        step = make_step(rig, id=one.new_id())
        told = [StepEvent(step.id, *[getattr(event, name) for name in StepEvent.__slots__[1:]]) for event in events]
        seen: list[StepEvent] = []
        await one.watch(step.tenant, step.id, seen.append)
        replaying = await worker.serve_replay(lambda _, step_id, *__, told=told, step=step: told if step_id == step.id else None)
        future = one.execute(step, "iad")
        delivery = await inbox.next()
        assert (delivery.step, delivery.answered_by_commit, delivery.queue.region) == (step, True, "iad")
        for event in told:
            worker.publish_event(step.tenant, event)
        await eventually(lambda seen=seen, told=told: seen == told)
        assert list(await one.replay(step.tenant, step.id, 0, 0)) == told
        await replaying.close()
        assert await finish(worker, delivery, make_result(step, region="iad"))
        assert await done(future) == make_result(step, region="iad")
        assert (await one.locate(step, ["home", "fra", "iad"]))[0] == make_result(step, region="iad")
    found = await stored(gateway, "NL_RESULTS")
    assert (len(found["iad"]), found["home"], found["fra"]) == (2, [], [])
    late = await rig.gateway("fra")  # what was said before it came is loaded
    assert (late.targets()[rig.target.scope], late.workers()) == (rig.target, (info,))
    assert late.round_trips().between("home", "iad") == 0.08


async def test_a_job_lives_in_its_region(rig: RegionsRig) -> None:
    gateway, worker, far = await started(rig)
    await worker.announce([rig.target])
    ended, cancelled = (
        Job(make_step(rig, id=subjects.job_id("iad", rig.tenant, Kind.TOOL, "echo", key)), "iad", 1_700_000_000.5, "digest") for key in "ab"
    )
    for job in (ended, cancelled):
        assert await gateway.submit(job) == (job.record(), True)
        assert await far.submit(job) == (job.record(), False)
        assert await far.job(rig.tenant, job.step.id) == job.record()
    told: list[str] = []
    await worker.on_cancel(lambda _, step_id: told.append(step_id))
    assert await far.commit(make_result(cancelled.step, status=Status.CANCELLED), 60.0)
    await far.withdraw(cancelled.step, "iad")
    await eventually(lambda: told == [cancelled.step.id])
    inbox = await pull(rig, worker, "iad")
    delivery = await inbox.next()
    assert delivery.step == ended.step
    assert await finish(worker, delivery, make_result(ended.step))
    for one in (gateway, far):
        assert await one.result(rig.tenant, ended.step.id) == make_result(ended.step)
        assert await one.result(rig.tenant, cancelled.step.id) == make_result(cancelled.step, status=Status.CANCELLED)
        assert not await one.commit(make_result(ended.step, worker="late"), 60.0)
        await eventually_true(lambda one=one: _not_queued(one, ended.step))
    found = await stored(gateway, "NL_RESULTS")
    assert (len(found["iad"]), found["home"], found["fra"]) == (2, [], [])


async def _not_queued(gateway: NatsGatewayBus, step: Step) -> bool:
    return not await gateway.is_queued(step, "iad")


async def test_a_far_worker_serves_the_queue_and_leaves_what_it_notes_there(rig: RegionsRig) -> None:
    gateway, worker, far = await started(rig)
    helper = await rig.worker("fra")
    await helper.announce([rig.target])
    inbox = await pull(rig, helper, "iad")
    step, poison = make_step(rig, id=gateway.new_id()), make_step(rig)
    future = gateway.execute(step, "iad")
    delivery = await inbox.next()
    await helper.hand_back(delivery, 0.0)
    delivery = await inbox.next()
    assert (delivery.step, delivery.attempt) == (step, 2)
    assert await worker.hand_backs(step.tenant, step.id, "iad") == await helper.hand_backs(step.tenant, step.id, "iad") == 1
    assert await finish(helper, delivery, make_result(step, region="fra"))
    assert await done(future) == make_result(step, region="fra")
    far.execute(poison, "iad")
    delivery = await inbox.next()
    await helper.bury(delivery, "POISON", "it bites")
    delivery.ack()
    dead = subjects.dead("iad", poison.kind, poison.target, poison.id)
    assert await stored(gateway, "NL_DEAD") == {"home": [], "iad": [dead], "fra": []}
    assert await stored(gateway, "KV_nl-handbacks") == {"home": [], "iad": [subjects.hand_backs(step.tenant, step.id)], "fra": []}


async def test_the_result_of_a_run_is_committed_at_its_origin(rig: RegionsRig) -> None:
    gateway, worker, far = await started(rig)
    run_id = subjects.job_id("home", rig.tenant, Kind.RUN, "program", "key")
    run = make_step(rig, id=run_id, kind=Kind.RUN, target="program")
    heard = await gateway.hear(run_id[: subjects.MARK_LENGTH])
    future = gateway.resume(run, "iad")
    region = subjects.result_region(run_id, "iad")
    assert region == "home"
    assert await worker.commit(make_result(run), 60.0, region)
    assert await done(future) == make_result(run)
    assert not await worker.commit(make_result(run, worker="late"), 60.0, region)
    assert await far.result(rig.tenant, run_id) == await worker.result(rig.tenant, run_id, region) == make_result(run)
    assert await stored(far, "NL_RESULTS") == {"home": [subjects.result("home", rig.tenant, run_id)], "iad": [], "fra": []}
    await heard.close()


async def test_regions_measure_each_other(rig: RegionsRig) -> None:
    _, worker, _ = await started(rig)
    helper = await rig.worker("fra")
    await worker.serve_ping()
    await eventually_true(lambda: _answers(helper.ping("iad")))
    with pytest.raises(Unavailable):
        await worker.ping("fra")


async def test_a_target_of_several_regions_is_as_the_last_one_said(rig: RegionsRig) -> None:
    gateway, worker, far = await started(rig)
    helper, changed = await rig.worker("fra"), replace(rig.target, description="newer")
    await worker.announce([rig.target])
    await eventually(lambda: far.targets().get(rig.target.scope) == rig.target)
    await helper.announce([changed])
    for one in (gateway, far, await rig.gateway("iad"), await rig.gateway("fra"), await rig.gateway("home")):
        await eventually(lambda one=one: one.targets().get(rig.target.scope) == changed)


async def test_a_region_that_hangs_is_not_waited_for(rig: RegionsRig) -> None:
    gateway, _, _ = await started(rig)
    near = await rig.worker("home")
    inbox = await pull(rig, near, "home")
    step = make_step(rig, id=gateway.new_id())
    rig.servers["iad"].pause()
    asked = [asyncio.ensure_future(call) for call in (gateway.locate(step, ["iad"]), near.ping("iad"))]
    future = gateway.execute(step, "home")
    await finish(near, await inbox.next(), make_result(step))
    assert await done(future) == make_result(step)
    assert (await gateway.locate(step, ["iad", "home"]))[0] == make_result(step)
    other = make_step(rig)
    assert await gateway.locate(other, ["iad", "home"]) == (None, "")
    refused = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 10.0)
    assert [type(error) for error in refused] == [Unavailable, Unavailable]
    rig.servers["iad"].resume()
    await eventually_true(lambda: _answers(gateway.locate(other, ["iad"])))


async def test_a_region_that_is_away_stops_no_other(rig: RegionsRig, caplog: pytest.LogCaptureFixture) -> None:
    gateway, worker, _ = await started(rig)
    near = await rig.worker("home")
    await near.announce([rig.target])
    await worker.announce([rig.target])
    near_inbox = await pull(rig, near, "home")
    waiting, job = make_step(rig, id=gateway.new_id()), Job(make_step(rig, id="iad-1"), "iad", 1_700_000_000.5, "digest")
    future = gateway.execute(waiting, "iad")
    await eventually_true(lambda: gateway.is_queued(waiting, "iad"))
    await gateway.submit(job)

    rig.servers["iad"].kill()
    step = make_step(rig)
    about_iad: list[Callable[[], Awaitable[object]]] = [
        lambda: gateway.execute(step, "iad"),
        lambda: gateway.submit(Job(make_step(rig, id="iad-2"), "iad", 1.0, "d")),
        lambda: gateway.job(rig.tenant, "iad-1"),
        lambda: gateway.is_queued(waiting, "iad"),
        lambda: gateway.withdraw(waiting, "iad"),
        lambda: gateway.locate(waiting, ["iad"]),
        lambda: gateway.result(rig.tenant, subjects.job_id("iad", "t1", Kind.TOOL, "echo", "k")),
        lambda: near.commit(make_result(step), 60.0, "iad"),
        lambda: near.result(rig.tenant, step.id, "iad"),
        lambda: near.ping("iad"),
    ]
    asked = [asyncio.ensure_future(call()) for call in about_iad]
    here = make_step(rig, id=gateway.new_id())
    at_home = gateway.execute(here, "home")
    delivery = await near_inbox.next()
    await finish(near, delivery, make_result(here))
    assert await done(at_home) == make_result(here)
    assert (await gateway.locate(here, ["iad", "home"]))[0] == make_result(here)
    late = await rig.gateway("home")  # starts without iad
    starting = await rig.worker("home")  # and so does a worker, which will help there
    await starting.announce([rig.target])
    far_inbox = await pull(rig, starting, "iad")
    refused = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 20.0)
    assert [type(error) for error in refused] == [Unavailable] * len(asked)
    assert late.connected

    rig.servers["iad"].start()
    delivered = [await far_inbox.next() for _ in range(2)]
    for delivery in delivered:
        await finish(starting, delivery, make_result(delivery.step))
    assert {delivery.step.id for delivery in delivered} == {waiting.id, job.step.id}
    assert await done(future) == make_result(waiting)
    assert await starting.result(rig.tenant, job.step.id, "iad") == make_result(job.step)
    noise = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(noise) == len(set(noise)) <= 3, noise  # of a gateway and a worker each, that it is away
