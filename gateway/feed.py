"""What happens to one step, as a stream: its events in order, each once, then its result.

Events are not stored, so the feed asks the executing worker for a replay when it begins or sees a gap. The result is stored: whatever
else gets lost, looking for it from time to time ends the feed.
"""

import asyncio
from asyncio import Future
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType
from typing import Self

from gateway.clock import Clock
from gateway.core.events import EventOrder
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
        self._items: asyncio.Queue[StepEvent | Future[StepResult]] = asyncio.Queue()
        self._subscription: Subscription | None = None
        self._outcome: Future[StepResult] | None = None

    async def __aenter__(self) -> Self:
        self._subscription = await self._bus.watch(self._tenant, self._step_id, self._on_event)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._outcome:
            self._outcome.cancel()
        if self._subscription:
            await self._subscription.close()

    def ends_with(self, outcome: "Future[StepResult]") -> None:
        """The result comes from here, and need not be looked for."""
        self._outcome = outcome
        outcome.add_done_callback(self._items.put_nowait)

    async def follow(self, deadline_s: float) -> AsyncGenerator[StepEvent | StepResult, None]:
        """Ends after the StepResult. Raises TimeoutError at deadline_s (wall clock), and what `ends_with` raises."""
        if self._outcome is None:
            result = await self._look()
            if result is None:
                for event in await self._replay():
                    yield event
            else:
                yield result
                return
        pause_s = FIRST_LOOK_S
        while True:
            remaining_s = deadline_s - self._clock.wall_s()
            if remaining_s <= 0:
                raise TimeoutError
            item = await self._next(min(pause_s, remaining_s))
            if isinstance(item, Future):
                yield item.result()
                return
            if item is None or item.kind is EventKind.ENDED:
                pause_s = min(pause_s * 2, LONGEST_LOOK_S)
                result = await self._look() if self._outcome is None else None
                if result:
                    yield result
                    return
                continue
            if self._order.gap(item):
                for event in await self._replay():
                    yield event
            if self._order.accept(item):
                yield item

    async def _next(self, timeout_s: float) -> "StepEvent | Future[StepResult] | None":
        try:
            async with asyncio.timeout(timeout_s):
                return await self._items.get()
        except TimeoutError:
            return None

    async def _look(self) -> StepResult | None:
        if self._find_result:
            return await self._find_result()
        return await self._bus.result(self._tenant, self._step_id)

    async def _replay(self) -> list[StepEvent]:
        events = await self._bus.replay(self._tenant, self._step_id, self._order.attempt, self._order.sequence)
        return [event for event in events if event.kind is not EventKind.ENDED and self._order.accept(event)]

    def _on_event(self, event: StepEvent) -> None:
        if self._items.qsize() < MAX_BUFFERED or event.kind is EventKind.ENDED:
            self._items.put_nowait(event)
