"""Calls that are gathered into executions: the asynchronous side of a BatchQueue.

Each call is a task of its own that waits here; each execution is another one. A call that is cancelled takes nothing from the others of its
execution; an execution for which nobody waits any more is cancelled.
"""

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, Protocol, TypeVar

from gateway.clock import Clock
from workers.batch_queue import BatchQueue, Execution

TURNS_TO_SEND = 2  # of the event loop, from a new task until its request is with gRPC

T = TypeVar("T")
R = TypeVar("R")


class Timer(Protocol):
    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], object]], Timer]


class Call(Generic[T, R]):
    """One call. deadline_s is on the gatherer's clock."""

    __slots__ = ("answer", "deadline_s", "item", "mates", "task")

    def __init__(self, item: T, deadline_s: float) -> None:
        self.item = item
        self.deadline_s = deadline_s
        self.answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self.task: asyncio.Task[None] | None = None  # its execution, once that has begun
        self.mates: Sequence[Call[T, R]] = ()  # the calls of that, itself included

    @property
    def is_over(self) -> bool:
        """It has its answer, or was cancelled."""
        return self.answer.done()

    def end(self, answer: R | Exception | None) -> None:
        if self.answer.done():
            return
        if isinstance(answer, Exception):
            self.answer.set_exception(answer)
        elif answer is not None:
            self.answer.set_result(answer)
        else:
            self.answer.cancel()


# An Exception is raised by the call that it is the answer of; None is for one that was over before.
Run = Callable[[Sequence[Call[T, R]]], Awaitable[tuple[Sequence[R | Exception | None], bool]]]


class Gatherer(Generic[T, R]):
    """run(calls) executes them together, answers each of them, and tells whether its time is a sample of what their number costs."""

    def __init__(self, queue: BatchQueue[Call[T, R]], run: Run[T, R], clock: Clock, call_later: CallLater | None = None) -> None:
        self.queue = queue
        self._run = run
        self._clock = clock
        self._call_later = call_later
        self._timer: Timer | None = None
        self._executions: set[asyncio.Task[None]] = set()
        self._closed = False

    async def call(self, item: T, key: Hashable, rows: int, remaining_s: float) -> R:
        """Raises what the call was ended with. remaining_s is the time until its deadline, which it is the caller's to keep."""
        now_s = self._clock.now_s()
        call: Call[T, R] = Call(item, now_s + remaining_s)
        entry = self.queue.add(call, key, rows, now_s, call.deadline_s)
        self._look()
        try:
            return await call.answer
        except asyncio.CancelledError:
            if not self.queue.remove(entry) and call.task is not None and all(one.is_over for one in call.mates):
                call.task.cancel()
            raise

    async def close(self) -> None:
        """Cancels what is in work; what waits is its callers' to cancel."""
        self._closed = True
        self._stop_timer()
        for task in self._executions:
            task.cancel()
        await asyncio.gather(*self._executions, return_exceptions=True)

    def _look(self) -> bool:
        """Starts what can be started, and looks again when the policy wants to be asked. True when it started something."""
        self._stop_timer()
        if self._closed:
            return False
        now_s, started = self._clock.now_s(), False
        while (execution := self.queue.take(now_s)) is not None:
            started = True
            task = asyncio.create_task(self._execute(execution))
            self._executions.add(task)
            task.add_done_callback(self._executions.discard)
            calls = [entry.item for entry in execution.entries]
            for call in calls:
                call.task, call.mates = task, calls
        if self.queue.again_s < float("inf"):
            call_later = self._call_later or asyncio.get_running_loop().call_later
            self._timer = call_later(self.queue.again_s - now_s, self._look)
        return started

    async def _execute(self, execution: Execution[Call[T, R]]) -> None:
        calls = [entry.item for entry in execution.entries]
        answers: Sequence[R | Exception | None] = [None] * len(calls)
        sample = started = False
        try:
            try:
                answers, sample = await self._run(calls)
            except Exception as error:
                answers = [error] * len(calls)
            finally:
                self.queue.ended(execution, self._clock.now_s(), sample=sample)
                started = self._look()
            if started:  # it is on its way before this one's calls go on: what they do with their answers would keep the model waiting
                for _ in range(TURNS_TO_SEND):
                    await asyncio.sleep(0)
        finally:
            for call, answer in zip(calls, answers, strict=True):
                call.end(answer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
