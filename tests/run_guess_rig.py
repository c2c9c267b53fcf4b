"""A run with guesses, and a service whose answers come when the test says so."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from program_driver import SMALL

from gateway import run_journal
from gateway.clock import SystemClock
from gateway.errors import NearloopError
from gateway.ports import RunJournal
from gateway.program.engine import Engine
from gateway.program.evaluation import Evaluation
from gateway.program.journal import Completed
from gateway.program.model import Block, Json, Program
from gateway.run_types import RunEvent, RunOrder, Summary, decode_event
from gateway.testing_runs import MemoryJournal, MemoryRuns
from gateway.types import Completed as StepCompleted
from gateway.types import EventKind, Kind, Payload, Status, Step, StepEvent, StepResult, Target, Timing
from workers.run_calls import RunCalls
from workers.run_execution import RunExecution
from workers.run_guesses import GuessBudget, Guesses, GuessService
from workers.run_writer import JournalWriter

CLOCK = SystemClock()
RUN = "home-" + "7" * 32


@dataclass
class Asked:
    step: Step
    again: bool
    answer: "asyncio.Future[Json]"
    on_event: Callable[[StepEvent], None] | None
    was_cancelled: bool = False

    def streams(self, text: str) -> None:
        assert self.on_event is not None
        self.on_event(StepEvent(self.step.id, EventKind.TOKEN, 1, 1, payload=Payload(text.encode())))


class Service:
    """Keeps what it is asked for by idempotency key, without the run: `b`, or `b/guess`. Targets that begin with `of_w` write."""

    def __init__(self) -> None:
        self.asked: dict[str, list[Asked]] = {}
        self.abandoned: list[str] = []
        self.writes: set[str] = set()
        self.on_call: Callable[[str], None] = lambda key: None
        self._news = asyncio.Event()

    async def call(self, step: Step, again: bool, on_event: Callable[[StepEvent], None] | None = None) -> StepCompleted:
        key = step.idempotency_key.partition("/")[2]
        self.on_call(key)
        asked = Asked(step, again, asyncio.get_running_loop().create_future(), on_event)
        self.asked.setdefault(key, []).append(asked)
        self._tell()
        try:
            output = await asked.answer
        except asyncio.CancelledError:
            asked.was_cancelled = True
            raise
        return StepCompleted(StepResult(step.id, step.tenant, Status.DONE, Payload(json.dumps(output).encode())), Timing())

    async def abandon(self, step: Step) -> None:
        self.abandoned.append(step.id)

    def target(self, kind: Kind, name: str) -> Target | None:
        return None if name == "of_none" else Target(kind, name, read_only=name not in self.writes)

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    async def one(self, key: str, number: int = 0) -> Asked:
        """The call for this key, once it has come."""
        while len(self.asked.get(key, ())) <= number:
            await self._news.wait()
        return self.asked[key][number]

    async def answer(self, key: str, output: Json) -> None:
        (await self.one(key)).answer.set_result(output)

    async def refuse(self, key: str, error: NearloopError, number: int = 0) -> None:
        (await self.one(key, number)).answer.set_exception(error)


class RunWork:
    def __init__(self, step: Step, attempt: int = 1) -> None:
        self.step = step
        self.attempt = attempt
        self.again = attempt > 1
        self.queue_region = "home"
        self.leaving = False
        self.events: list[RunEvent] = []
        self._news = asyncio.Event()

    def remaining_s(self) -> float:
        return 60.0

    def progress(self, fraction: float, message: str) -> None: ...

    def emit(self, token: Payload) -> None:
        self.events.append(decode_event(token.data))
        self._news.set()
        self._news = asyncio.Event()

    async def event(self, kind: type[RunEvent], key: str) -> Any:
        while not (found := [event for event in self.events if isinstance(event, kind) and getattr(event, "key", "") == key]):
            await self._news.wait()
        return found[0]

    @property
    def summary(self) -> tuple[int, int]:
        (summary,) = [event for event in self.events if isinstance(event, Summary)]
        return summary.guesses, summary.wrong_guesses


class SlowJournal(MemoryJournal):
    async def append(self, entry: bytes) -> None:
        for _ in range(20):
            await asyncio.sleep(0)
        await super().append(entry)


class SlowRuns(MemoryRuns):
    def journal(self, region: str, tenant: str, run_id: str, keep_s: float) -> RunJournal:
        return SlowJournal(self.journals.setdefault((region, tenant, run_id), []), self._fail)

    def completed(self) -> list[str]:
        entries = [run_journal.read(entry) for journal in self.journals.values() for entry in journal]
        return [event.key for entry in entries for event, _ in entry.events if isinstance(event, Completed)]


class Run:
    """One execution; everything it is given can be shared with another one."""

    def __init__(
        self,
        what: Program | Block,
        service: Service,
        *,
        given: Json = None,
        speculate: int = 4,
        budget: GuessBudget | None = None,
        runs: MemoryRuns | None = None,
        attempt: int = 1,
        tokens: bool = False,
        language: Any = SMALL,
    ) -> None:
        what = what if isinstance(what, Program) else Program("test", what)
        deadline_s = CLOCK.wall_s() + 60.0
        order = RunOrder(RUN, "acme", what, b"{}", given, deadline_s, tokens=tokens, speculate=speculate)
        step = Step(RUN, "acme", Kind.RUN, "program", Payload(b"{}"), deadline_s)
        self.runs = runs or MemoryRuns()
        self.work = RunWork(step, attempt)
        self.budget = budget or GuessBudget(lambda: False)
        self.engine = Engine(what, given, Evaluation(language))
        self.journal = self.runs.journal("home", "acme", RUN, 60.0)
        writer = JournalWriter(step, "runner", self.journal, self.runs, 60.0, CLOCK, lambda: 0.5)
        check: Callable[[Target, Payload], list[tuple[str, str]]] = lambda target, payload: []  # noqa: E731
        calls = RunCalls(order, "home", "r1", service, CLOCK, lambda: 0.5, check)
        guess_calls = RunCalls(order, "home", "r1", GuessService(service), CLOCK, lambda: 0.5, check)
        self.guesses = Guesses(speculate, self.engine, guess_calls, service, self.budget, tokens=tokens, again=attempt > 1)
        self.execution = RunExecution(
            self.work,
            self.engine,
            calls,
            writer,
            self.runs,
            "runner",
            "home",
            CLOCK,
            lambda: 0.5,
            tokens=tokens,
            guesses=self.guesses if speculate else None,
        )
        self.entries: Sequence[bytes] = ()

    async def go(self) -> Json:
        return json.loads((await self.execution.go(self.entries)).data)  # type: ignore[no-any-return]


@asynccontextmanager
async def going(*runs: Run) -> AsyncGenerator[list["asyncio.Task[Json]"]]:
    """Their tasks; afterwards nothing of them is left."""
    before = asyncio.all_tasks()
    tasks = [asyncio.create_task(run.go()) for run in runs]
    try:
        async with asyncio.timeout(20):
            yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for run in runs:
        assert run.budget.in_flight == 0
    assert asyncio.all_tasks() == before


class HearingBus:
    class _Heard:
        async def close(self) -> None: ...

    async def hear(self, mark: str) -> Any:
        return self._Heard()
