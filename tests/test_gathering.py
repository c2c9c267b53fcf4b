"""Calls that are executed together: answers, errors, cancellation, and that a model is never kept waiting."""

import asyncio
from collections.abc import Callable, Sequence

import pytest

from gateway.core.containment import Containment
from gateway.policy import BatchView, Named, OnError, Slot
from gateway.testing import ManualClock
from workers.batch_queue import BatchQueue
from workers.gathering import Call, Gatherer


class FakePolicy:
    def __init__(self, answer: Callable[[BatchView], float]) -> None:
        self.answer = answer
        self.batches: list[tuple[int, float]] = []

    def wait_s(self, view: BatchView, now_s: float) -> float:
        return self.answer(view)

    def on_batch(self, size: int, service_s: float, now_s: float) -> None:
        self.batches.append((size, service_s))


class Timer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self._callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self._callback = None

    def run(self) -> None:
        if self._callback is not None:
            self._callback()


async def turns() -> None:
    """Lets every task go as far as it can."""
    for _ in range(12):
        await asyncio.sleep(0)


class Rig:
    """A gatherer of numbers on a manual clock, whose executions end when the test says so; the answer to a number is its square."""

    def __init__(self, answer: Callable[[BatchView], float] = lambda view: 0.0, instances: int = 1, slots: int = 100) -> None:
        self.clock = ManualClock()
        self.policy = FakePolicy(answer)
        named = Named("p", Slot.BATCHING, self.policy, OnError.ADMIT)
        queue: BatchQueue[Call[int, int]] = BatchQueue(
            named, Containment(lambda named, what: None, self.clock.now_s), instances=instances, max_size=4, slots=slots
        )
        self.gatherer: Gatherer[int, int] = Gatherer(queue, self._run, self.clock, self._call_later)
        self.running: list[tuple[list[int], asyncio.Future[Exception | None]]] = []
        self.cancelled: list[list[int]] = []

    def _call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        timer = Timer(callback)
        self.clock.call_at(self.clock.now_s() + delay_s, timer.run)
        return timer

    async def _run(self, calls: Sequence[Call[int, int]]) -> tuple[Sequence[int | Exception | None], bool]:
        numbers = [call.item for call in calls]
        ends: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.running.append((numbers, ends))
        try:
            error = await ends
        except asyncio.CancelledError:
            self.cancelled.append(numbers)
            raise
        if error is not None:
            raise error
        return [ValueError("odd") if number == 13 else number * number for number in numbers], True

    def call(self, *numbers: int) -> list["asyncio.Task[int]"]:
        return [asyncio.create_task(self.gatherer.call(number, "k", 1, 60.0)) for number in numbers]

    async def end(self, numbers: list[int], error: Exception | None = None) -> None:
        next(ends for running, ends in self.running if running == numbers).set_result(error)
        await turns()

    @property
    def started(self) -> list[list[int]]:
        return [numbers for numbers, _ in self.running]


async def test_what_comes_while_the_model_is_busy_goes_together() -> None:
    rig = Rig()
    tasks = rig.call(1, 2, 3, 4, 5, 6)
    await turns()
    assert rig.started == [[1]]
    rig.clock.advance(0.5)
    await rig.end([1])
    assert rig.started == [[1], [2, 3, 4, 5]]
    await rig.end([2, 3, 4, 5])
    await rig.end([6])
    assert await asyncio.gather(*tasks) == [1, 4, 9, 16, 25, 36]
    assert rig.policy.batches == [(1, 0.5), (4, 0.0), (1, 0.0)]


async def test_the_next_execution_begins_before_the_answers_of_the_last_are_seen() -> None:
    rig = Rig()
    order: list[str] = []
    tasks = rig.call(1, 2)
    tasks[0].add_done_callback(lambda task: order.append(f"answered, {len(rig.running)} begun"))
    await turns()
    await rig.end([1])
    assert order == ["answered, 2 begun"]
    await rig.end([2])
    await asyncio.gather(*tasks)


async def test_it_waits_as_the_policy_says() -> None:
    rig = Rig(lambda view: 5.0 if view.oldest_wait_s < 5.0 else 0.0)
    tasks = rig.call(1)
    await turns()
    rig.clock.advance(3.0)
    tasks += rig.call(2)
    await turns()
    rig.clock.advance(2.5)  # the first timer was for 5.0: it was called off
    await turns()
    assert rig.started == []
    rig.clock.advance(2.5)
    await turns()
    assert rig.started == [[1, 2]]
    await rig.end([1, 2])
    assert await asyncio.gather(*tasks) == [1, 4]


async def test_each_call_gets_its_own_error_and_all_that_of_the_whole() -> None:
    rig = Rig()
    first = rig.call(1)
    await turns()
    tasks = rig.call(12, 13, 14)
    await turns()
    await rig.end([1])
    await rig.end([12, 13, 14])
    assert [str(one) for one in await asyncio.gather(*tasks, return_exceptions=True)] == ["144", "odd", "196"]
    lost = rig.call(7)
    await turns()
    await rig.end([7], ConnectionError("gone"))
    with pytest.raises(ConnectionError):
        await lost[0]
    assert await first[0] == 1
    assert [size for size, _ in rig.policy.batches] == [1, 3]  # what failed is no sample


async def test_a_cancelled_call_takes_nothing_from_the_others() -> None:
    rig = Rig(lambda view: 0.0 if view.size == 3 else 60.0, instances=2)
    tasks = rig.call(1, 2, 3, 4)
    await turns()
    assert rig.started == [[1, 2, 3]]
    tasks[1].cancel()
    tasks[3].cancel()  # waits
    await turns()
    assert rig.cancelled == []
    assert rig.gatherer.queue.waiting == 0
    await rig.end([1, 2, 3])
    ended = await asyncio.gather(*tasks, return_exceptions=True)
    assert (ended[0], ended[2]) == (1, 9)
    assert isinstance(ended[1], asyncio.CancelledError)
    assert isinstance(ended[3], asyncio.CancelledError)


async def test_an_execution_that_nobody_waits_for_is_cancelled_and_makes_room() -> None:
    rig = Rig()
    first = rig.call(0)
    await turns()
    tasks = rig.call(1, 2)
    await turns()
    await rig.end([0])
    later = rig.call(3)
    await turns()
    for task in tasks:
        task.cancel()
        await turns()
    assert rig.cancelled == [[1, 2]]
    assert rig.started == [[0], [1, 2], [3]]
    await rig.end([3])
    assert await asyncio.gather(*first, *later) == [0, 9]
    assert [size for size, _ in rig.policy.batches] == [1, 1]


async def test_closing_cancels_what_is_in_work_and_starts_nothing() -> None:
    rig = Rig()
    tasks = rig.call(1, 2)
    await turns()
    await rig.gatherer.close()
    assert rig.cancelled == [[1]]
    assert rig.started == [[1]]
    with pytest.raises(asyncio.CancelledError):
        await tasks[0]
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
