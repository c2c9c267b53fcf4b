"""What every bus must do: events and the live catalogue. A subclass brings the `make_rig` fixture."""

import asyncio
from dataclasses import replace

from bus_rig import MakeRig, eventually, make_step, pull

from gateway.types import EventKind, Kind, Payload, StepEvent, Target, WorkerInfo


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


def _events(step_id: str) -> list[StepEvent]:
    return [
        StepEvent(step_id, EventKind.STARTED, 1, 1, "home", "w1"),
        StepEvent(step_id, EventKind.TOKEN, 1, 2, "home", "w1", payload=Payload("to ✓\r\n".encode(), "text/plain")),
        StepEvent(step_id, EventKind.PROGRESS, 1, 3, "home", "w1", fraction=0.25, message="a\r\nquarter 25%"),
        StepEvent(step_id, EventKind.ENDED, 1, 4, "home", "w1"),
    ]
