"""What a keeper does about runs without a result."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from gateway import run_record
from gateway.program.parse import parse_program
from gateway.run_types import OpenRun, Placement, RunOrder, RunRecord
from gateway.testing import ManualClock
from gateway.testing_runs import MemoryRuns
from gateway.types import Payload, Status, StepResult
from workers.keeper import SWEEP_S, YOUNG_S, Keeper

PROGRAM = {"program": "nearloop/v1", "name": "one", "steps": [{"id": "a", "tool": "echo", "input": {}}]}
RUN_ID = "home-" + "0" * 32


class Results:
    """What a keeper needs of the bus."""

    def __init__(self) -> None:
        self.results: dict[tuple[str, str], StepResult] = {}

    async def result(self, tenant: str, step_id: str) -> StepResult | None:
        return self.results.get((tenant, step_id))

    async def commit(self, result: StepResult, keep_s: float) -> bool:
        return self.results.setdefault((result.tenant, result.step_id), result) is result


class World:
    """One run that was accepted at home and placed in iad."""

    def __init__(self, place: Callable[[RunOrder, frozenset[str]], Placement]) -> None:
        self.clock = ManualClock()
        self.store = MemoryRuns()
        self.bus = Results()
        self.keeper = Keeper("home", self.bus, self.store, self.clock, lambda: 0.5, place, grace_s=5.0)  # type: ignore[arg-type]

    async def accept(self, **more: Any) -> RunRecord:
        import json

        order = RunOrder(RUN_ID, "acme", parse_program(PROGRAM), json.dumps(PROGRAM).encode(), {}, self.clock.wall_s() + 100)
        record = replace(run_record.record(order, "iad", self.clock.wall_s(), 60.0, may_move=True), **more)
        await self.store.accept(record)
        return record

    async def sweep(self, times: int = 1) -> None:
        for _ in range(times):
            self.clock.advance(SWEEP_S)
            await self.keeper.sweep()

    @property
    def mark(self) -> OpenRun | None:
        return self.store.marks.get(("acme", RUN_ID))

    def ends(self) -> None:
        self.bus.results["acme", RUN_ID] = StepResult(RUN_ID, "acme", Status.DONE, Payload())


@pytest.fixture
def world() -> World:
    return World(lambda order, silent: Placement(next(name for name in ("iad", "home") if name not in silent), ()))


async def test_a_token_that_is_nowhere_is_sent_again_but_not_before_the_gateway_had_its_time(world: World) -> None:
    await world.accept()
    world.clock.advance(YOUNG_S / 2)
    await world.keeper.sweep()
    assert not world.store.queued
    await world.sweep(2)
    assert set(world.store.queued) == {("iad", RUN_ID)}
    assert world.keeper.counts["sent_again"] == 1


async def test_a_token_that_waits_is_left_alone(world: World) -> None:
    record = await world.accept()
    await world.store.send(record, "iad")
    await world.sweep(10)
    assert world.keeper.counts == {"sent_again": 0, "moved": 0, "expired": 0, "closed": 0}


async def test_a_run_with_a_result_is_closed(world: World) -> None:
    record = await world.accept()
    await world.store.send(record, "iad")
    world.ends()
    await world.sweep(2)
    assert world.mark is None
    assert not world.store.queued


async def test_a_run_past_its_deadline_is_ended_as_expired_once(world: World) -> None:
    await world.accept()
    world.clock.advance(106)
    await world.sweep(2)
    assert world.bus.results["acme", RUN_ID].status is Status.EXPIRED
    assert world.mark is None
    assert world.keeper.counts["expired"] == 1


async def test_a_result_that_came_first_stands(world: World) -> None:
    await world.accept()
    world.clock.advance(106)
    world.ends()
    await world.sweep()
    assert world.bus.results["acme", RUN_ID].status is Status.DONE
    assert world.keeper.counts["expired"] == 0


async def test_a_run_moves_when_its_region_was_silent_in_two_sweeps(world: World) -> None:
    record = await world.accept()
    await world.store.send(record, "iad")
    world.store.silent = {"iad"}
    await world.sweep(2)
    assert world.mark is not None
    assert world.mark.region == "iad"
    await world.sweep()
    assert (world.mark.region, world.mark.left) == ("home", ("iad",))
    assert ("home", RUN_ID) in world.store.queued


async def test_a_run_that_must_not_run_twice_waits_for_its_region(world: World) -> None:
    await world.accept(may_move=False)
    world.store.silent = {"iad"}
    await world.sweep(10)
    assert world.mark is not None
    assert world.mark.region == "iad"
    world.store.silent = set()
    await world.sweep(40)
    assert ("iad", RUN_ID) in world.store.queued


async def test_a_run_that_may_go_nowhere_else_stays() -> None:
    world = World(lambda order, silent: Placement("", ()))
    await world.accept()
    world.store.silent = {"iad"}
    await world.sweep(5)
    assert world.mark is not None
    assert world.mark.region == "iad"


async def test_a_moved_run_is_open_until_its_old_region_has_given_the_token_back(world: World) -> None:
    record = await world.accept()
    await world.store.send(record, "iad")
    world.store.silent = {"iad"}
    await world.sweep(3)
    world.ends()
    await world.sweep(3)
    assert world.mark is not None
    world.store.silent = set()
    await world.sweep(40)
    assert world.mark is None
    assert not world.store.queued


async def test_one_run_that_cannot_be_looked_after_stops_no_other(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    record = await world.accept()
    other = replace(record, id="home-" + "1" * 32)
    await world.store.accept(other)
    find = world.store.find

    async def unreadable(tenant: str, run_id: str) -> RunRecord | None:
        if run_id == RUN_ID:
            raise KeyError("region")
        return await find(tenant, run_id)

    monkeypatch.setattr(world.store, "find", unreadable)
    await world.sweep(2)
    assert ("iad", other.id) in world.store.queued


async def test_an_ended_run_is_open_until_its_region_has_given_the_token_back(world: World) -> None:
    record = await world.accept()
    await world.store.send(record, "iad")
    world.store.silent = {"iad"}
    world.ends()
    await world.sweep(3)
    assert world.mark is not None
    world.store.silent = set()
    await world.sweep(40)
    assert world.mark is None
    assert not world.store.queued


async def test_a_mark_without_a_record_goes_away(world: World) -> None:
    await world.accept()
    world.store.records.clear()
    await world.sweep(2)
    assert world.mark is None
