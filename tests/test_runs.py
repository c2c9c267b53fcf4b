"""Runs in a gateway: what a promise outlives."""

import asyncio
import json
from contextlib import aclosing
from dataclasses import replace

import pytest
from bus_rig import eventually

from gateway.config import parse
from gateway.errors import AlreadyExists
from gateway.program.parse import parse_program
from gateway.run_types import RunOrder
from gateway.runs import Runs
from gateway.testing import ManualClock, MemoryBus, make_kernel
from gateway.testing_runs import MemoryRuns
from gateway.types import JobState, Status

PROGRAM = {"program": "nearloop/v1", "name": "one", "steps": [{"id": "a", "tool": "echo", "input": {}}]}
REGIONS = {"regions": [{"name": "home"}, {"name": "iad"}]}


class World:
    def __init__(self) -> None:
        self.clock, config = ManualClock(), parse(REGIONS)
        memory = MemoryBus(config, self.clock)
        self.bus, self.store = memory.gateway(), MemoryRuns()
        kernel = make_kernel(memory, self.clock, settings=REGIONS)
        kernel._bus = self.bus
        self.runs = Runs(config, kernel, self.bus, self.store, self.clock, lambda: 0.0)

    def order(self, timeout_s: float = 3600.0, key: str = "k", regions: tuple[str, ...] = ("iad",)) -> RunOrder:
        deadline_s = self.clock.wall_s() + timeout_s
        document = json.dumps(PROGRAM).encode()
        return RunOrder("", "acme", parse_program(PROGRAM), document, {}, deadline_s, idempotency_key=key, regions=regions)


@pytest.fixture
async def world() -> World:
    world = World()
    await world.bus.start()
    return world


async def test_a_second_order_with_less_patience_ends_no_run(world: World) -> None:
    status, created = await world.runs.submit_run(world.order())
    assert created
    async with aclosing(world.runs.run(world.order(timeout_s=5.0))) as items:
        assert (await anext(items)).id == status.id  # type: ignore[union-attr]
        waiting = asyncio.ensure_future(anext(items))
        world.clock.advance(60.0)
        await asyncio.sleep(0)
        assert await world.runs._result("acme", status.id, world.clock.wall_s() - 50.0) is None
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
    world.clock.advance(3600.0)
    result = await world.runs._result("acme", status.id, status.deadline_s)
    assert result is not None
    assert result.status is Status.EXPIRED


async def test_a_key_is_for_one_program_and_input(world: World) -> None:
    await world.runs.submit_run(world.order())
    with pytest.raises(AlreadyExists):
        await world.runs.submit_run(replace(world.order(), input={"other": 1}))
    assert not (await world.runs.submit_run(world.order()))[1]


async def test_a_cancelled_run_whose_region_is_away_stays_open_for_a_keeper(world: World) -> None:
    status, _ = await world.runs.submit_run(world.order())
    await eventually(lambda: bool(world.store.queued))
    world.store.silent = {"iad"}
    assert (await world.runs.cancel_run("acme", status.id)).state is JobState.CANCELLED
    assert world.store.marks
    world.store.silent = set()
    other, _ = await world.runs.submit_run(world.order(key="other"))
    await world.runs.cancel_run("acme", other.id)
    assert [mark.id for mark in world.store.marks.values()] == [status.id]


async def test_the_token_of_a_cancelled_run_is_not_sent_any_more(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.runs.SEND_AGAIN_S", (0.001, 0.002))
    world.store.silent = {"iad"}
    status, _ = await world.runs.submit_run(world.order())
    await world.runs.cancel_run("acme", status.id)
    world.store.silent = set()
    await eventually(lambda: not world.runs._sending)
    assert not world.store.queued
