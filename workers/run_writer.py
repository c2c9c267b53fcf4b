"""Writes a run's journal: what comes while an entry is on its way goes into the next one together."""

import asyncio
import json
from collections.abc import Callable, Sequence

from gateway import run_journal
from gateway.clock import Clock
from gateway.errors import Unavailable
from gateway.ports import RunJournal, RunStore
from gateway.program.journal import Completed, Event
from gateway.run_journal import Large
from gateway.types import Step

LARGE_BYTES = 64 * 1024  # an output above it is kept apart from the journal
MOST_EVENTS = 8  # in an entry: with LARGE_BYTES each it fits into the megabyte that a NATS server takes by default
AGAIN_FIRST_S = 0.1
AGAIN_MOST_S = 2.0
LATE_S = 1.0


class JournalWriter:
    """`on_failure(error)` hears that nothing can be written any more: LeaseLost, or what the store refuses. Outages are waited out."""

    def __init__(
        self,
        step: Step,
        runner: str,
        journal: RunJournal,
        store: RunStore,
        keep_s: float,
        clock: Clock,
        random: Callable[[], float],
    ) -> None:
        self._step = step
        self._runner = runner
        self._journal = journal
        self._store = store
        self._keep_s = keep_s
        self._clock = clock
        self._random = random
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        self._waiting: list[tuple[Event, asyncio.Future[None]]] = []
        self._task: asyncio.Task[None] | None = None
        self._begun_s = 0.0  # when the writing of the entry that is on its way began
        self.failure: BaseException | None = None

    async def fence(self) -> None:
        """An entry without events: from now on no earlier runner can append. Raises LeaseLost, Unavailable."""
        await self._journal.append(run_journal.write(self._clock.wall_s(), self._runner, ()))

    def write(self, events: Sequence[Event]) -> "asyncio.Future[None]":
        """Stored in this order, after everything before; the future ends when they are, or when it is known that they cannot be."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self.failure is not None or not events:
            done.set_result(None)
            return done
        self._waiting.extend((event, done) for event in events)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._write_all(), name="write a run's journal")
        return done

    @property
    def is_late(self) -> bool:
        """Nothing could be stored for long: perhaps this runner is cut off, and another one has the run."""
        return bool(self._task and not self._task.done() and self._begun_s and self._clock.now_s() - self._begun_s > LATE_S)

    async def _write_all(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:MOST_EVENTS], self._waiting[MOST_EVENTS:]
            self._begun_s = self._clock.now_s()
            try:
                await self._store_entry([event for event, _ in batch])
            except Exception as error:
                self._fail(error, batch)
                return
            for _, done in batch:
                if not done.done():
                    done.set_result(None)

    async def _store_entry(self, events: Sequence[Event]) -> None:
        """Waits out an outage; the entry stays the same, so that a try whose outcome is unknown does no harm."""
        entry: bytes | None = None
        pause_s = AGAIN_FIRST_S
        while True:
            try:
                if entry is None:
                    parts = [(event, await self._apart(event)) for event in events]
                    entry = run_journal.write(self._clock.wall_s(), self._runner, parts)
                return await self._journal.append(entry)
            except Unavailable:
                await asyncio.sleep(pause_s * (0.5 + self._random() / 2))
                pause_s = min(2 * pause_s, AGAIN_MOST_S)

    async def _apart(self, event: Event) -> Large | None:
        """Where a large output is kept; None for one that goes into the entry."""
        if not isinstance(event, Completed):
            return None
        data = json.dumps(event.output, separators=(",", ":"), ensure_ascii=False).encode()
        if len(data) <= LARGE_BYTES:
            return None
        return Large(await self._store.put_value(self._step.tenant, self._step.id, data, self._keep_s), len(data))

    def _fail(self, error: BaseException, batch: Sequence[tuple[Event, "asyncio.Future[None]"]]) -> None:
        self.failure = error
        for _, done in (*batch, *self._waiting):
            if not done.done():
                done.set_result(None)  # whoever waits looks at `failure`
        self._waiting.clear()
        self.on_failure(error)

    async def flush(self) -> None:
        """Returns when everything is stored. Raises what went wrong."""
        while self._task is not None and not self._task.done():
            await asyncio.wait({self._task})
        if self.failure is not None:
            raise self.failure

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
