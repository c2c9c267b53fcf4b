"""What happens to one step, as a stream: its events in order, each once, then its result.

Events are not stored, so the feed asks the executing worker for a replay when it begins or sees a gap. Nobody answers for a step that is
not executed yet, so a replay is never waited for: only events that it may fill a gap before are held until it is there. The result is
stored: whatever else gets lost, looking for it from time to time ends the feed.
"""

import asyncio
from asyncio import Future, Task
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Sequence
from types import TracebackType
from typing import Self

from gateway.clock import Clock
from gateway.core.events import EventOrder
from gateway.errors import Unavailable
from gateway.ports import GatewayBus, Subscription
from gateway.types import EventKind, StepEvent, StepResult

MAX_BUFFERED = 4096  # events for a reader that is slow; beyond that tokens are dropped, the sequence numbers show it
FIRST_LOOK_S = 0.5
LONGEST_LOOK_S = 5.0


class StepFeed:
    """`async with StepFeed(...) as feed:` listens from then on; `feed.follow(...)` yields."""

    def __init__(
        self,
        bus: GatewayBus,
        clock: Clock,
        tenant: str,
        step_id: str,
        *,
        attempt: int = 0,
        after_sequence: int = 0,
        find_result: Callable[[], Awaitable[StepResult | None]] | None = None,
    ) -> None:
        self._bus = bus
        self._clock = clock
        self._tenant = tenant
        self._step_id = step_id
        self._order = EventOrder(attempt, after_sequence)
        self._find_result = find_result
        self._items: asyncio.Queue[StepEvent | Future[StepResult]] = asyncio.Queue()  # events are in order here
        self._held: list[StepEvent] = []  # came after a gap that a replay may fill
        self._heard = False  # nothing before the latest event is missing, or it is known to be
        self._replay: Task[Sequence[StepEvent]] | None = None
        self._subscription: Subscription | None = None
        self._outcome: Future[StepResult] | None = None
        self._stored: StepResult | None = None

    async def __aenter__(self) -> Self:
        self._subscription = await self._bus.watch(self._tenant, self._step_id, self._on_event, self._on_result if self._find_result else None)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._outcome:
            self._outcome.cancel()
        try:
            if self._subscription:
                await self._subscription.close()
        finally:
            if self._replay:
                self._replay.cancel()

    def ends_with(self, outcome: "Future[StepResult]") -> None:
        """The result comes from here, and need not be looked for."""
        self._outcome = outcome
        outcome.add_done_callback(self._items.put_nowait)

    async def follow(self, deadline_s: float) -> AsyncGenerator[StepEvent | StepResult, None]:
        """Ends after the StepResult. Raises TimeoutError at deadline_s (wall clock), and what `ends_with` raises."""
        result = await self._look()
        if self._outcome is None and result is None and not self._heard and self._replay is None:
            self._ask()
        pause_s = FIRST_LOOK_S
        look_s = self._clock.now_s() + pause_s
        while result is None:
            remaining_s = deadline_s - self._clock.wall_s()
            if remaining_s <= 0:
                raise TimeoutError
            item = await self._next(min(look_s - self._clock.now_s(), remaining_s))
            if isinstance(item, Future):
                result = item.result()
                break
            told_end = item is not None and item.kind is EventKind.ENDED
            if item is not None and not told_end:
                yield item
            # Also while events come: they may be those of a worker that has lost the step to another.
            if item is None or told_end or look_s <= self._clock.now_s():
                result = await self._look()
                pause_s = FIRST_LOOK_S if told_end else min(pause_s * 2, LONGEST_LOOK_S)
                look_s = self._clock.now_s() + pause_s
        for event in self._rest():
            yield event
        yield result

    async def _next(self, timeout_s: float) -> "StepEvent | Future[StepResult] | None":
        try:
            async with asyncio.timeout(timeout_s):
                return await self._items.get()
        except TimeoutError:
            return None

    async def _look(self) -> StepResult | None:
        if self._outcome is not None or self._stored is not None:
            return self._stored
        if self._find_result:
            return await self._find_result()
        return await self._bus.result(self._tenant, self._step_id)

    def _on_result(self, result: StepResult) -> None:
        """The results stream itself told it, after the events before it: in their order it is a hint to look."""
        self._stored = result
        hint = StepEvent(self._step_id, EventKind.ENDED, 0, 0)
        if self._held:
            self._held.append(hint)
        else:
            self._items.put_nowait(hint)

    def _on_event(self, event: StepEvent) -> None:
        if self._items.qsize() + len(self._held) >= MAX_BUFFERED and event.kind is not EventKind.ENDED:
            return
        if self._held:
            self._held.append(event)
        elif self._order.gap(event):
            self._held.append(event)
            self._ask()  # again, if need be: the worker may not have had the step yet when it was asked
        else:
            self._tell([event])

    def _tell(self, events: Iterable[StepEvent]) -> None:
        for event in events:
            if event.kind is EventKind.ENDED:  # only a hint to look: it counts in no order
                self._items.put_nowait(event)
            elif self._order.accept(event):
                self._heard = True
                self._items.put_nowait(event)

    def _ask(self) -> None:
        """Asks for a replay of what has been missed."""
        if self._replay:
            self._replay.cancel()
        self._replay = asyncio.create_task(self._missed(), name="replay events")
        self._replay.add_done_callback(self._on_replay)

    async def _missed(self) -> Sequence[StepEvent]:
        try:
            return await self._bus.replay(self._tenant, self._step_id, self._order.attempt, self._order.sequence)
        except Unavailable:
            return []  # the result is what counts, and is looked for

    def _on_replay(self, replay: "Task[Sequence[StepEvent]]") -> None:
        if replay is self._replay and not replay.cancelled():
            self._replay = None
            self._tell(replay.result())
            self._release()

    def _release(self) -> None:
        held, self._held = self._held, []
        self._tell(held)

    def _rest(self) -> list[StepEvent]:
        """What came before the result was known; a gap that no replay has filled yet stays one."""
        self._release()
        waiting = [self._items.get_nowait() for _ in range(self._items.qsize())]
        return [item for item in waiting if isinstance(item, StepEvent) and item.kind is not EventKind.ENDED]
