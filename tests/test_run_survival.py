"""What keeps a step from being executed twice, piece by piece: the whole is in test_run_chaos.py and test_run_regions.py."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from run_guess_rig import CLOCK, RUN, RunWork, Service

from gateway import subjects
from gateway.config import Config
from gateway.edge import codec, lookup
from gateway.edge.delivery import NatsDelivery
from gateway.edge.jetstream import JetStream
from gateway.edge.sites import Sites
from gateway.errors import Rejected, Unavailable
from gateway.ports import NotHere, Queue
from gateway.program.commands import StartCall
from gateway.program.journal import Completed
from gateway.program.model import Call, Program, Template
from gateway.run_types import RunOrder
from gateway.testing_bus import MemoryBus
from gateway.testing_clock import ManualClock
from gateway.testing_runs import MemoryRuns
from gateway.types import Completed as StepCompleted
from gateway.types import Kind, Lane, Payload, Step, StepResult, Target
from workers.run_calls import RunCalls
from workers.run_writer import LATE_S, JournalWriter
from workers.runner import ProgramExecutor
from workers.served import ServedTargets

STEP = Step("5" * 32, "acme", Kind.TOOL, "charge", Payload(b"{}"), CLOCK.wall_s() + 60)
REGIONS = ("home", "iad")


@pytest.mark.parametrize(("delivered", "stored_s", "again"), [(1, 1000.0, True), (1, 1000.5, False), (2, 1000.5, True)])
def test_a_server_that_crashed_may_have_forgotten_a_delivery(delivered: int, stored_s: float, again: bool) -> None:
    subject = subjects.step("home", STEP.kind, STEP.target, STEP.lane, STEP.id)
    queue = Queue("home", STEP.kind, STEP.target, STEP.lane)
    ack = f"$JS.ACK.NL_STEPS_HOME.charge.{delivered}.7.7.{round(stored_s * 1e9)}.0"
    unused: Any = None
    delivery = NatsDelivery(unused, queue, subject, ack, codec.step_headers(STEP), b"{}", 2000.0, 1000.2, unused)
    assert (delivery.attempt, delivery.again) == (delivered, again)


# ---- looking for a step that may have been sent --------------------------------------------------------------------------------


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Regions that do not answer; the others know nothing of the step."""
    regions: list[str] = []

    async def is_queued(js: JetStream, step: Step, region: str) -> bool:
        if region in regions:
            await asyncio.sleep(60)
        return False

    async def read(js: JetStream, tenant: str, step_id: str, region: str) -> StepResult | None:
        return None

    monkeypatch.setattr(lookup, "_LOCATE_S", 0.01)
    monkeypatch.setattr(lookup, "is_queued", is_queued)
    monkeypatch.setattr(lookup.kept, "read", read)
    return regions


def sites() -> Sites:
    def js_of(_domain: str) -> Any:
        return None

    js: Any = type("Js", (), {"at": staticmethod(js_of)})()
    config = Config.model_validate({"regions": [{"name": name, "domain": name, "nats_urls": ["nats://a"]} for name in REGIONS]})
    return Sites(js, config, "home")


async def test_what_must_not_be_executed_twice_waits_for_every_region(silent: list[str]) -> None:
    found = sites()
    assert await lookup.locate(found, STEP, REGIONS, certain=True) == (None, "")
    silent.append("iad")
    assert await lookup.locate(found, STEP, REGIONS) == (None, "")
    for _ in range(2):
        with pytest.raises(Unavailable, match="1 of the regions home, iad"):
            await lookup.locate(found, STEP, REGIONS, certain=True)


async def test_a_region_that_did_not_answer_is_not_waited_for_again(silent: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    found = sites()
    silent.append("iad")
    await lookup.locate(found, STEP, REGIONS)
    monkeypatch.setattr(lookup, "_LOCATE_S", 60.0)
    async with asyncio.timeout(30):
        assert await lookup.locate(found, STEP, REGIONS) == (None, "")
    silent[:] = ["home"]
    monkeypatch.setattr(lookup, "_LOCATE_S", 0.01)
    with pytest.raises(Unavailable):  # the own region is always asked
        await lookup.locate(found, STEP, REGIONS)
    assert set(found.silent_until_s) == {"iad"}


# ---- the runner ----------------------------------------------------------------------------------------------------------------


def order() -> RunOrder:
    program = Program("one", (Call("a", Kind.TOOL, "charge", Template(None)),))
    return RunOrder(RUN, "acme", program, b"{}", None, CLOCK.wall_s() + 60)


class Refusing(Service):
    """Refuses the first call, with a hint that is longer than the step has time."""

    def __init__(self) -> None:
        super().__init__()
        self.refusals = 1

    async def call(self, step: Step, again: bool, on_event: Any = None) -> StepCompleted:
        if self.refusals:
            self.refusals -= 1
            raise Rejected("no permit", retry_after_s=1e6)
        return await super().call(step, again, on_event)


async def test_a_hint_that_is_too_long_ends_no_call() -> None:
    service, waits = Refusing(), []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    calls = RunCalls(order(), "home", "runner", service, CLOCK, lambda: 0.5, lambda target, payload: [], sleep)
    async with asyncio.timeout(20):
        made = asyncio.create_task(calls.make(StartCall("a/0", 1, "a", Kind.TOOL, "charge", None, None, None), False))
        await service.answer("a/0", 7)
        event = (await made).event
    assert isinstance(event, Completed)
    assert event.output == 7
    assert len(waits) == 1
    assert waits[0] < 1


async def test_a_run_that_must_not_be_here_goes_back_before_anything_is_done() -> None:
    runs, unused, asked = MemoryRuns(), None, []  # type: ignore[var-annotated]
    executor = ProgramExecutor(
        Config(),
        "runner",
        "home",
        unused,
        unused,
        runs,
        CLOCK,
        lambda: 0.5,
        unused,
        may_run=lambda order: asked.append(order.regions),  # type: ignore[arg-type, func-returns-value]
    )
    body = {"program": {"program": "nearloop/v1", "name": "a", "steps": [{"id": "a", "tool": "x"}]}, "options": {"regions": ["iad"]}}
    step = replace(STEP, id=RUN, kind=Kind.RUN, target="program", input=Payload(json.dumps(body).encode()))
    with pytest.raises(NotHere):
        await executor.execute(RunWork(step))
    assert asked == [("iad",)]
    assert not runs.journals


async def test_a_journal_that_cannot_be_written_is_noticed() -> None:
    clock, blocked = ManualClock(), asyncio.Event()

    class Slow:
        async def append(self, entry: bytes) -> None:
            await blocked.wait()

        async def read(self) -> Sequence[bytes]:
            return ()

    writer = JournalWriter(STEP, "runner", Slow(), MemoryRuns(), 60.0, clock, lambda: 0.5)
    assert not writer.is_late
    written = writer.write([Completed("a/0", 1, None)])
    await asyncio.sleep(0)
    assert not writer.is_late
    clock.advance(LATE_S + 0.1)
    assert writer.is_late
    blocked.set()
    await written
    await writer.flush()
    assert not writer.is_late


# ---- queues far away -----------------------------------------------------------------------------------------------------------


async def test_a_far_queue_is_open_only_while_its_own_region_does_not_serve_it() -> None:
    class Offers:
        def targets(self) -> Sequence[Target]:
            return [Target(Kind.RUN, "program", home_region="home")]

        def ready(self, target: str) -> bool:
            return True

    config, clock = Config.model_validate({"regions": [{"name": name} for name in REGIONS]}), ManualClock()
    memory = MemoryBus(config, clock)
    bus: Any = memory.worker("w", "home")
    cared_for = [True]
    unused: Any = None
    taken_care_of: Callable[[Queue], bool] = lambda queue: cared_for[0]  # noqa: E731
    served = ServedTargets(config, "home", bus, Offers(), clock, lambda: 0.5, unused, print, unused, taken_care_of)  # type: ignore[arg-type]
    await served.announce_changes()

    def opened() -> set[tuple[str, Lane]]:
        return {(lane.queue.region, lane.queue.lane) for lane in served.lanes["program"].lanes if lane.puller is not None}

    for is_cared_for, regions in ((True, {"home"}), (False, {"home", "iad"}), (True, {"home"})):
        cared_for[0] = is_cared_for
        await served.open_and_close()
        assert opened() == {(region, lane) for region in regions for lane in Lane}
