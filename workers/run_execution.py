"""One run, from its first step to its output: the engine says what to do, this does it.

    commands --> calls, waits --> outcomes --> engine --> journal --> commands ...

What the journal has been told before the next calls start: everything that cannot be found again. A call that succeeded has a stored
result with an id that follows from the run, so that it is found when the entry is lost: its entry is written while the next calls are
under way already. A failure or a timer is written first, since another runner might see it differently.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from gateway import run_journal
from gateway.clock import Clock
from gateway.errors import NearloopError, StepFailed
from gateway.placing import NO_SAVINGS, Savings
from gateway.ports import RunStore, Work
from gateway.program.commands import Cancel, Command, Fail, StartCall, Wait
from gateway.program.engine import Engine
from gateway.program.journal import Completed, Event, Failed, TimerFired
from gateway.program.problems import RunFailed
from gateway.run_types import RUN_EVENT, RunEvent, StepEnded, Summary, encode_event
from gateway.types import Payload
from workers.run_calls import SHOWN_OUTPUT_BYTES, Outcome, RunCalls
from workers.run_guesses import Guess, Guesses
from workers.run_writer import JournalWriter

SLOW_S = 0.005  # a turn of the engine above it moves the run's further turns off the loop
# gRPC codes for the reasons of gateway.program; anything else failed because a step did, and has that step's meaning.
_CODES = {
    "CANCELLED": "CANCELLED",
    "EXPRESSION_FAILED": "INVALID_ARGUMENT",
    "TOO_MANY_STEPS": "RESOURCE_EXHAUSTED",
    "TOO_MUCH_WORK": "RESOURCE_EXHAUSTED",
    "BUDGET_EXHAUSTED": "RESOURCE_EXHAUSTED",
}


class RunExecution:
    """`entries`: of the journal, when another runner had the run before."""

    def __init__(
        self,
        work: Work,
        engine: Engine,
        calls: RunCalls,
        writer: JournalWriter,
        store: RunStore,
        runner: str,
        region: str,
        clock: Clock,
        random: Callable[[], float],
        *,
        tokens: bool = False,
        savings: Savings = NO_SAVINGS,
        guesses: Guesses | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._work = work
        # An earlier runner may have been further than its journal says: it does not wait for the entry of a result that can be found again.
        self._again = work.again
        self._engine = engine
        self._calls = calls
        self._writer = writer
        self._store = store
        self._runner = runner
        self._region = region
        self._clock = clock
        self._random = random
        self._tokens = tokens
        self._savings = savings
        self._guesses = guesses
        self._saved_s = -savings.once_s
        self._sleep = sleep
        self._tasks: dict[str, asyncio.Task[None]] = {}  # calls and waits, by key
        self._inbox: asyncio.Queue[Outcome | TimerFired | BaseException] = asyncio.Queue()
        writer.on_failure = self._inbox.put_nowait
        self._abandoning: set[asyncio.Task[None]] = set()
        self._slow = False
        self._untold: list[RunEvent] = []
        self._steps, self._cost, self._token_count = 0, 0.0, 0
        self._waited_us, self._waiting_since_s = 0, 0.0
        self._timers: dict[str, float] = {}  # wall-clock time at which a wait of an agent began, by key

    async def go(self, entries: Sequence[bytes]) -> Payload:
        """The output as JSON. Raises NearloopError for a run that failed, LeaseLost, CancelledError."""
        try:
            self._perform(await self._begin(entries))
            self._look_ahead()
            while self._engine.ended is None:
                await self._take(await self._arrived())
            return await self._finish()
        except asyncio.CancelledError:
            if not self._work.leaving:
                await self._drop_calls()
            raise
        finally:
            self._tell()
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), *self._abandoning, return_exceptions=True)
            if self._guesses is not None:
                await self._guesses.close()
            await self._writer.close()

    # ---- begin -----------------------------------------------------------------------------------------------------------------

    async def _begin(self, entries: Sequence[bytes]) -> list[Command]:
        """A run that somebody had before is rebuilt: its events are told again, what was under way is asked for again."""
        at_s = self._clock.wall_s()
        read = [run_journal.read(entry) for entry in entries]
        self._note_timers(await self._turn(self._engine.start), read[0].at_s if read else at_s)
        for entry in read:
            for event, large in entry.events:
                if large is not None and isinstance(event, Completed):
                    event = await self._filled(event, large.name)
                self._tell_again(event)
                self._note_timers(await self._turn(partial(self._engine.apply, event)), entry.at_s)
        return [*self._engine.outstanding()]

    async def _filled(self, event: Completed, name: str) -> Completed:
        """Raises Unavailable; the run then goes back to its queue."""
        step = self._work.step
        data = await self._store.value(step.tenant, step.id, name, self._work.queue_region)
        if data is None:
            raise StepFailed("an output that the journal refers to is gone", code="DATA_LOSS", reason="VALUE_LOST")
        return Completed(event.key, event.attempt, json.loads(data), event.cost, event.tokens)

    def _tell_again(self, event: Event) -> None:
        if isinstance(event, Completed):
            size_bytes = len(json.dumps(event.output, separators=(",", ":"), ensure_ascii=False).encode())
            shown = (event.output, 0) if size_bytes <= SHOWN_OUTPUT_BYTES else (None, size_bytes)
            self._emit(StepEnded(event.key, event.key.partition("/")[0], event.attempt, *shown, replayed=True))
            self._count(event)
        elif isinstance(event, Failed):
            node = event.key.partition("/")[0]
            ended = StepEnded(
                event.key, node, event.attempt, code=event.error_code, reason=event.reason, message=event.message, replayed=True
            )
            self._emit(ended)
            self._count(event)

    def _note_timers(self, commands: Sequence[Command], at_s: float) -> None:
        for command in commands:
            if isinstance(command, Wait) and not command.is_retry:
                self._timers[command.key] = at_s

    # ---- go on -----------------------------------------------------------------------------------------------------------------

    async def _arrived(self) -> list[Outcome | TimerFired]:
        """At least one; raises what ended the journal."""
        arrived = [await self._inbox.get()]
        while not self._inbox.empty():
            arrived.append(self._inbox.get_nowait())
        found: list[Outcome | TimerFired] = []
        for item in arrived:
            if isinstance(item, BaseException):
                raise item
            found.append(item)
        return found

    async def _take(self, arrived: Sequence[Outcome | TimerFired]) -> None:
        commands: list[Command] = []
        told: list[Event] = []
        certain = True
        for item in arrived:
            event = item.event if isinstance(item, Outcome) else item
            if self._tasks.pop(event.key, None) is None or self._engine.ended is not None:
                continue  # its outcome is not needed any more
            if isinstance(item, Outcome):
                self._emit(item.told)
                self._count(event)
                certain = certain and item.stored
            is_retry = isinstance(event, TimerFired) and event.key not in self._timers
            more = await self._turn(partial(self._engine.apply, event))
            if not is_retry:
                told.append(event)
                certain = certain and not isinstance(event, TimerFired)
            self._note_timers(more, self._clock.wall_s())
            self._cancel(more)
            commands += more
        if not self._is_waiting():
            self._waited_us += int((self._clock.now_s() - self._waiting_since_s) * 1e6)
        written = self._writer.write(told)
        if not certain or self._writer.is_late:
            await written
        if self._writer.failure is not None:
            raise self._writer.failure
        self._perform(commands)
        self._look_ahead()

    async def _turn(self, turn: Callable[[], list[Command] | None]) -> list[Command]:
        """A turn of the engine, in a thread when this run's turns have been found slow: other runs share the loop."""
        if self._slow:
            return await asyncio.to_thread(turn) or []
        began_s = self._clock.now_s()
        commands = turn()
        self._slow = self._clock.now_s() - began_s > SLOW_S
        return commands or []

    def _cancel(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, Cancel):
                self._timers.pop(command.key, None)
                if task := self._tasks.pop(command.key, None):
                    task.cancel()
                    self._abandon(command.key)

    def _abandon(self, key: str) -> None:
        for calls in (self._calls, self._guesses) if self._guesses is not None else (self._calls,):
            task = asyncio.create_task(calls.abandon(key), name="abandon a call")
            self._abandoning.add(task)
            task.add_done_callback(self._abandoning.discard)

    def _look_ahead(self) -> None:
        if self._guesses is not None:
            self._guesses.look()

    def _perform(self, commands: Sequence[Command]) -> None:
        idle = not self._is_waiting()
        cancelled = {command.key for command in commands if isinstance(command, Cancel)}
        for command in commands:
            if isinstance(command, StartCall | Wait) and command.key not in cancelled:
                work = self._call(command, self._guess(command)) if isinstance(command, StartCall) else self._wait(command)
                self._tasks[command.key] = asyncio.create_task(work, name=f"call {command.key}")
        if idle and self._is_waiting():
            self._waiting_since_s = self._clock.now_s()
            started = (command for command in commands if isinstance(command, StartCall))
            self._saved_s += max((self._savings.call_s(f"{one.kind.value}.{one.target}") for one in started), default=0.0)

    def _is_waiting(self) -> bool:
        """For a call, or for its next attempt; the clock of an agent's budget runs beside."""
        return any(key not in self._timers for key in self._tasks)

    def _guess(self, start: StartCall) -> Guess | None:
        return self._guesses.adopt(start) if self._guesses is not None else None

    async def _call(self, start: StartCall, guess: Guess | None) -> None:
        self._emit(self._calls.started(start))
        on_token = self._emit if self._tokens else None
        try:
            outcome = await guess.outcome(on_token) if guess is not None else None
            self._inbox.put_nowait(outcome or await self._calls.make(start, self._again, on_token))
        except Exception as error:  # a fault of ours: the run must not wait for ever
            self._inbox.put_nowait(error)

    async def _wait(self, wait: Wait) -> None:
        if wait.is_retry:
            await self._sleep(wait.delay_s * (0.5 + self._random()))
        else:
            began_s = self._timers.get(wait.key, self._clock.wall_s())
            await self._sleep(max(0.0, began_s + wait.delay_s - self._clock.wall_s()))
        self._inbox.put_nowait(TimerFired(wait.key))

    def _count(self, event: Event) -> None:
        if isinstance(event, Completed | Failed):
            self._steps += 1
            self._cost += event.cost
            self._token_count += event.tokens if isinstance(event, Completed) else 0

    def _emit(self, event: RunEvent) -> None:
        """Told when the calls of this turn have left: nobody's next step waits for it."""
        self._untold.append(event)
        if len(self._untold) == 1:
            loop = asyncio.get_running_loop()
            loop.call_soon(loop.call_soon, self._tell)

    def _tell(self) -> None:
        untold, self._untold = self._untold, []
        for event in untold:
            self._work.emit(Payload(encode_event(event), RUN_EVENT))

    # ---- end -------------------------------------------------------------------------------------------------------------------

    async def _finish(self) -> Payload:
        ended = self._engine.ended
        self._emit(self._summary())
        self._tell()
        if isinstance(ended, Fail):
            await self._writer.flush()  # what completed is all that is left of it
            raise failure(ended.error)
        assert ended is not None
        await self._writer.flush()
        return Payload(json.dumps(ended.output, separators=(",", ":"), ensure_ascii=False).encode())

    def _summary(self) -> Summary:
        saved_us = max(0, int(self._saved_s * 1e6))
        made, wrong = (self._guesses.made, self._guesses.wrong) if self._guesses is not None else (0, 0)
        return Summary(self._region, self._runner, self._steps, self._cost, self._token_count, self._waited_us, saved_us, made, wrong)

    async def _drop_calls(self) -> None:
        """The run was cancelled or its time is over: what still runs for it is told so."""
        for key, task in self._tasks.items():
            task.cancel()
            self._abandon(key)
        await asyncio.gather(*self._abandoning, return_exceptions=True)
        if self._guesses is not None:
            self._guesses.drop()


def failure(error: RunFailed) -> NearloopError:
    """The run's error for its client: it names the step, and keeps the reason."""
    named = f"step {error.step_id}: {error.message}" if error.step_id else error.message
    return StepFailed(named, code=_CODES.get(error.reason, "ABORTED"), reason=error.reason)
