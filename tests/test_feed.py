"""A step's events and its result as one stream, whatever is lost, late or told twice."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

import pytest
from bus_rig import WAIT_S, eventually, finish, make_result, make_step, pull
from test_bus_memory import MemoryRig

from gateway.config import Config
from gateway.feed import StepFeed
from gateway.testing import ManualClock, MemoryBus
from gateway.types import EventKind, Payload, Status, StepEvent, StepResult

Item = StepEvent | StepResult
TENANT, STEP = "acme", "s1"
RESULT = StepResult(STEP, TENANT, Status.DONE, Payload(b"{}"), attempt=1)


def token(sequence: int, attempt: int = 1) -> StepEvent:
    return StepEvent(STEP, EventKind.TOKEN, attempt, sequence, "home", "w1", Payload(b"%d" % sequence))


def ended(sequence: int, attempt: int = 1) -> StepEvent:
    return StepEvent(STEP, EventKind.ENDED, attempt, sequence, "home", "w1")


class World:
    """A gateway whose replays a test answers by hand, and what a worker tells."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        bus = MemoryBus(Config(), self.clock)
        self.gateway, self.worker = bus.gateway(), bus.worker()
        self.asked: list[tuple[int, int]] = []  # attempt and after_sequence of each replay
        self.answers: list[asyncio.Future[Sequence[StepEvent]]] = []
        self.looks = 0
        self.gateway.replay = self._replay  # type: ignore[method-assign]

    async def _replay(self, tenant: str, step_id: str, attempt: int, after_sequence: int) -> Sequence[StepEvent]:
        self.asked.append((attempt, after_sequence))
        self.answers.append(asyncio.get_running_loop().create_future())
        return await self.answers[-1]

    def tell(self, *events: StepEvent) -> None:
        for event in events:
            self.worker.publish_event(TENANT, event)

    async def commit(self, result: StepResult = RESULT) -> None:
        await self.worker.commit(result, 60.0, "home")

    async def _look(self) -> StepResult | None:
        self.looks += 1
        return await self.gateway.result(TENANT, STEP)

    @asynccontextmanager
    async def feed(self, attempt: int = 0, after_sequence: int = 0) -> AsyncIterator[AsyncGenerator[Item, None]]:
        feed = StepFeed(self.gateway, self.clock, TENANT, STEP, attempt=attempt, after_sequence=after_sequence, find_result=self._look)
        async with feed, aclosing(feed.follow(float("inf"))) as items:
            yield items


@pytest.fixture
def world() -> World:
    return World()


async def following(items: AsyncGenerator[Item, None]) -> Item:
    return await asyncio.wait_for(anext(items), WAIT_S)


async def rest(items: AsyncGenerator[Item, None]) -> list[Item]:
    async with asyncio.timeout(WAIT_S):
        return [item async for item in items]


async def test_a_step_that_nobody_executes_yet_is_not_waited_for(world: World) -> None:
    """Its replay is answered by nobody; what comes live is told meanwhile."""
    async with world.feed() as items:
        reading = asyncio.create_task(rest(items))
        await eventually(lambda: world.asked == [(0, 0)])
        world.tell(token(1), token(2))
        await world.commit()
        world.tell(ended(3))
        assert await reading == [token(1), token(2), RESULT]
        assert world.looks == 1  # at the start: the result was heard as it was stored
    await eventually(lambda: world.answers[0].cancelled())


async def test_an_event_before_the_first_look_makes_a_replay_needless(world: World) -> None:
    async with world.feed() as items:
        world.tell(token(1))
        await asyncio.sleep(0)
        assert await following(items) == token(1)
        assert world.asked == []


async def test_what_is_there_already_comes_first(world: World) -> None:
    async with world.feed() as items:
        reading = asyncio.create_task(rest(items))
        await eventually(lambda: len(world.asked) == 1)
        world.tell(token(4), token(5))
        await eventually(lambda: len(world.asked) == 2)  # the first may have been asked too early
        assert world.answers[0].cancelled()
        world.answers[1].set_result([token(1), token(2), token(3), token(4)])
        world.tell(token(6))
        await world.commit()
        world.tell(ended(7))
        assert await reading == [*map(token, range(1, 7)), RESULT]
    assert world.asked == [(0, 0), (0, 0)]


async def test_a_replay_and_live_events_overlap(world: World) -> None:
    async with world.feed(attempt=1, after_sequence=2) as items:
        reading = asyncio.create_task(rest(items))
        await eventually(lambda: world.asked == [(1, 2)])
        world.tell(token(3))
        world.answers[0].set_result([token(3), token(4)])
        world.tell(token(4), token(5))
        await world.commit()
        world.tell(ended(6))
        assert await reading == [token(3), token(4), token(5), RESULT]


async def test_a_gap_that_nobody_fills_shows_in_the_numbers(world: World) -> None:
    async with world.feed() as items:
        world.tell(token(1), token(4))
        assert await following(items) == token(1)
        reading = asyncio.create_task(rest(items))
        await eventually(lambda: world.asked == [(1, 1)])
        world.answers[0].set_result([])
        world.tell(token(5))
        await world.commit()
        world.tell(ended(6))
        assert await reading == [token(4), token(5), RESULT]


async def test_a_result_does_not_wait_for_a_replay(world: World) -> None:
    """Nobody answers, nobody tells the end: a look finds the result, what was held comes before it."""
    async with world.feed() as items:
        world.tell(token(1), token(4), token(5))
        reading = asyncio.create_task(rest(items))
        await eventually(lambda: world.asked == [(1, 1)])
        await world.commit()
        assert await reading == [token(1), token(4), token(5), RESULT]
    assert len(world.asked) == 1


async def test_the_outcome_ends_the_feed_with_a_replay_under_way(world: World) -> None:
    feed = StepFeed(world.gateway, world.clock, TENANT, STEP)
    outcome: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
    async with feed, aclosing(feed.follow(float("inf"))) as items:
        feed.ends_with(outcome)
        world.tell(token(2))
        reading = asyncio.create_task(rest(items))
        await eventually(lambda: world.asked == [(0, 0)])
        outcome.set_result(RESULT)
        assert await reading == [token(2), RESULT]


async def test_a_lost_end_is_noticed(world: World) -> None:
    async with world.feed() as items:
        world.tell(token(1))
        assert await following(items) == token(1)
        await world.commit()
        assert await rest(items) == [RESULT]


async def test_events_of_a_worker_that_lost_its_step_do_not_put_off_looks(world: World) -> None:
    async with world.feed(attempt=2, after_sequence=9) as items:
        reading = asyncio.create_task(rest(items))
        await eventually(lambda: world.looks == 1)
        await world.commit()
        for sequence in range(1, 100):  # comes faster than any pause between looks, and tells nothing new
            world.clock.advance(0.1)
            world.tell(token(sequence))
            await asyncio.sleep(0)
        assert await reading == [RESULT]


async def test_a_live_stream_is_looked_at_from_time_to_time(world: World) -> None:
    async with world.feed() as items:
        world.tell(token(1))
        assert await following(items) == token(1)
        await world.commit()  # by another attempt, whose end was lost; this worker does not know yet
        for sequence in range(2, 50):
            world.clock.advance(0.2)
            world.tell(token(sequence))
            if isinstance(found := await following(items), StepResult):
                break
        assert found == RESULT
        assert sequence < 49


async def test_another_attempt_ends_what_a_dead_worker_began(world: World) -> None:
    result = StepResult(STEP, TENANT, Status.DONE, Payload(b"{}"), attempt=2, worker="w2")
    async with world.feed() as items:
        world.tell(token(1), token(2))
        reading = asyncio.create_task(rest(items))
        await eventually(lambda: world.looks == 1)
        world.tell(token(1, attempt=2), token(3))  # the last word of the first comes too late
        world.tell(token(2, attempt=2))
        await world.commit(result)
        world.tell(ended(3, attempt=2))
        assert await reading == [token(1), token(2), token(1, attempt=2), token(2, attempt=2), result]


async def test_a_slow_reader_keeps_the_end(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.feed.MAX_BUFFERED", 3)
    async with world.feed() as items:
        world.tell(*map(token, range(1, 10)))
        assert await following(items) == token(1)
        await world.commit()
        world.tell(ended(10))
        assert await rest(items) == [token(2), token(3), RESULT]


async def test_a_step_whose_worker_died_ends_with_the_next_delivery() -> None:
    """From the queue to the result on the bus in memory; the second worker's end is lost as well."""
    rig = MemoryRig(ack_wait_s=10.0)
    gateway = await rig.gateway()
    step = make_step(rig)
    died, alive = await rig.worker("w1"), await rig.worker("w2")
    first = await pull(rig, died, 1)
    gateway.execute(step, rig.region)
    assert (await first.next()).attempt == 1
    feed = StepFeed(gateway, rig.clock, step.tenant, step.id)
    async with feed, aclosing(feed.follow(float("inf"))) as items:
        reading = asyncio.create_task(rest(items))
        started = StepEvent(step.id, EventKind.STARTED, 1, 1, rig.region, "w1")
        died.publish_event(step.tenant, started)
        await first.puller.close()
        second = await pull(rig, alive, 1)
        rig.clock.advance(11.0)
        delivery = await second.next()
        result = make_result(step, attempt=delivery.attempt, worker="w2")
        assert delivery.attempt == 2
        assert await finish(alive, delivery, result)
        assert await reading == [started, result]
