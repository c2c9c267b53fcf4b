"""Calls that are made before they are known to be needed: by `RunExecution`, with a service whose answers come when the test says so."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program_driver import SMALL, call, program, when
from program_strategies import TARGETS, programs
from test_gate import bound, limit, rig

from gateway import run_journal
from gateway.clock import SystemClock
from gateway.config import Config
from gateway.errors import Denied, NearloopError, Rejected, StepFailed, Unavailable
from gateway.ports import RunJournal
from gateway.program import expressions
from gateway.program.commands import StartCall
from gateway.program.dump import dump
from gateway.program.engine import Engine
from gateway.program.evaluation import Evaluation
from gateway.program.journal import Completed
from gateway.program.model import Block, Choose, Json, Map, Parallel, Program, Retry, Template
from gateway.run_record import write
from gateway.run_types import RunEvent, RunOrder, StepEnded, StepStarted, StepToken, Summary, decode_event
from gateway.testing_runs import MemoryJournal, MemoryRuns
from gateway.types import Completed as StepCompleted
from gateway.types import EventKind, Kind, Payload, Status, Step, StepEvent, StepResult, Target, Timing
from workers.run_calls import Outcome, RunCalls, step_id
from workers.run_execution import RunExecution
from workers.run_guesses import MOST_IN_FLIGHT, GuessBudget, Guesses, GuessService
from workers.run_writer import JournalWriter
from workers.runner import ProgramExecutor

CLOCK = SystemClock()
RUN = "home-" + "7" * 32
CHOICE = (call("a"), Choose("c", when("steps.a.output == 1"), (call("b", "${input}"),)))


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
        calls = RunCalls(order, "home", service, CLOCK, lambda: 0.5, check)
        guess_calls = RunCalls(order, "home", GuessService(service), CLOCK, lambda: 0.5, check)
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


# ---- adopted


async def test_a_guess_that_still_runs_becomes_the_call() -> None:
    service = Service()
    run = Run(CHOICE, service, given="in")
    async with going(run) as (task,):
        guess = await service.one("b/guess")
        await service.answer("a", 1)
        await run.work.event(StepStarted, "b")
        assert run.budget.in_flight == 0, "it is a call now"
        guess.answer.set_result("out")
        assert await task == "out"
    assert "b" not in service.asked
    assert guess.step.input.data == b'"in"'
    ended = await run.work.event(StepEnded, "b")
    assert (ended.attempt, ended.output, ended.speculated, ended.replayed) == (1, "out", True, False)
    assert not (await run.work.event(StepEnded, "a")).speculated
    assert run.work.summary == (1, 0)
    assert not service.abandoned


async def test_a_guess_that_has_its_outcome_becomes_the_call() -> None:
    service = Service()
    run = Run(CHOICE, service, given="in")
    async with going(run) as (task,):
        await service.answer("b/guess", "out")
        await service.answer("a", 1)
        assert await task == "out"
    assert "b" not in service.asked
    kinds = [(type(event), event.key) for event in run.work.events if isinstance(event, StepStarted | StepEnded)]
    assert kinds == [(StepStarted, "a"), (StepEnded, "a"), (StepStarted, "b"), (StepEnded, "b")], "nothing is told of a mere guess"
    assert run.work.summary == (1, 0)


async def test_a_guess_is_a_step_of_its_own() -> None:
    service = Service()
    run = Run((call("a"), call("b")), service)
    async with going(run):
        guess, real = await service.one("b/guess"), await service.one("a")
        assert real.step.id == step_id(RUN, "a", 1)
        assert guess.step.id == step_id(RUN, "b", 0)
        assert (guess.step.idempotency_key, guess.step.run, guess.again) == (f"{RUN}/b/guess", RUN, False)


async def test_the_journal_has_what_was_adopted_before_anything_goes_on_from_it() -> None:
    """Another runner does not find it under the call's id, and might get another answer."""
    service, runs = Service(), SlowRuns()
    known: dict[str, list[str]] = {}
    service.on_call = lambda key: known.setdefault(key, runs.completed())  # type: ignore[assignment, return-value]
    run = Run((call("a"), call("b"), call("w", "${steps.b.output}"), call("d", "${steps.w.output}")), service, runs=runs)
    service.writes = {"of_w"}
    async with going(run) as (task,):
        await service.answer("b/guess", 2)
        await service.answer("a", 1)
        await service.answer("w", 3)
        await service.answer("d", 4)
        assert await task == 4
    assert known["w"] == ["a", "b"]
    assert "w" not in known["d"], "as for any other call, whose result can be found again"
    assert runs.completed() == ["a", "b", "w", "d"]


async def test_a_runner_that_takes_over_makes_the_call_again() -> None:
    service, runs = Service(), MemoryRuns()
    first = Run(CHOICE, service, given="in", runs=runs)
    async with going(first) as (task,):
        await service.one("b/guess")
        await service.answer("a", 1)
        await first.work.event(StepStarted, "b")
        first.work.leaving = True
        task.cancel()
        await asyncio.wait({task})
    assert not service.abandoned, "the step is left to itself"
    second = Run(CHOICE, service, given="in", runs=runs, attempt=2)
    second.entries = await second.journal.read()
    async with going(second) as (task,):
        real = await service.one("b")
        assert (real.step.id, real.again) == (step_id(RUN, "b", 1), True)
        real.answer.set_result("out")
        assert await task == "out"
    assert second.work.summary == (0, 0)


async def test_guesses_of_a_run_that_was_taken_over_may_have_been_sent_before() -> None:
    service, runs = Service(), MemoryRuns()
    for attempt in (1, 2):
        run = Run(CHOICE, service, runs=runs, attempt=attempt)
        async with going(run):
            assert (await service.one("b/guess", attempt - 1)).again == (attempt == 2)
            run.work.leaving = True


async def test_what_a_guess_streams_is_told_once_it_is_adopted() -> None:
    service = Service()
    model = replace(call("b"), kind=Kind.INFER)
    run = Run((call("a"), model), service, tokens=True)
    async with going(run) as (task,):
        guess = await service.one("b/guess")
        assert guess.step.stream
        guess.streams("one ")
        assert not [event for event in run.work.events if isinstance(event, StepToken)]
        await service.answer("a", 1)
        await run.work.event(StepToken, "b")
        guess.streams("two")
        guess.answer.set_result("one two")
        assert await task == "one two"
    told = [event for event in run.work.events if getattr(event, "key", "") == "b"]
    assert [type(event) for event in told] == [StepStarted, StepToken, StepToken, StepEnded]
    assert [event.text for event in told if isinstance(event, StepToken)] == ["one ", "two"]


# ---- wrong


async def test_a_guess_that_is_not_needed_is_withdrawn_and_counted() -> None:
    service = Service()
    run = Run((*CHOICE, call("d", "${steps.c.output}")), service)
    async with going(run) as (task,):
        guess = await service.one("b/guess")
        await service.answer("a", 2)
        await service.answer("d", "end")
        assert await task == "end"
    assert guess.was_cancelled
    assert service.abandoned == [guess.step.id]
    assert run.work.summary == (1, 1)
    ended = [event for event in run.work.events if isinstance(event, StepEnded)]
    assert [event.key for event in ended] == ["a", "d"]
    (summary,) = [event for event in run.work.events if isinstance(event, Summary)]
    assert (summary.steps, summary.cost) == (2, 2.0), "guesses are not among them"


async def test_one_that_has_its_outcome_and_is_not_needed_is_forgotten() -> None:
    service = Service()
    run = Run(CHOICE, service)
    async with going(run) as (task,):
        await service.answer("b/guess", "out")
        await service.answer("a", 2)
        assert await task is None
    assert not service.abandoned
    assert run.work.summary == (1, 1)


@pytest.mark.parametrize("other", [True, 1.0, [1], "1"])
async def test_a_guess_with_another_input_is_wrong(other: Json) -> None:
    """The lookahead does not make such guesses; this is what keeps one from being taken for the call."""
    service = Service()
    run = Run((call("a"), call("b", "${input}")), service, given=1)
    run.engine.start()
    run.guesses.look()
    guess = await service.one("b/guess")
    start = StartCall("b", 1, "b", Kind.TOOL, "of_b", 1)
    assert run.guesses.adopt(replace(start, input=other)) is None
    assert run.guesses.adopt(start) is None, "it is gone"
    await run.guesses.close()
    assert (run.guesses.made, run.guesses.wrong, run.budget.in_flight) == (1, 1, 0)
    assert service.abandoned == [guess.step.id]


@pytest.mark.parametrize(
    "error",
    [
        StepFailed("it failed", code="INTERNAL", reason="BROKEN"),
        Rejected("too much", retry_after_s=0.0),
        Denied("never"),
        Unavailable("nobody is there", reason="NO_WORKERS"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("is_adopted", [False, True])
async def test_a_guess_that_fails_is_forgotten_and_not_repeated(error: NearloopError, is_adopted: bool) -> None:
    service = Service()
    run = Run(CHOICE, service)
    async with going(run) as (task,):
        guess = await service.one("b/guess")
        if not is_adopted:
            guess.answer.set_exception(error)
        await service.answer("a", 1)
        if is_adopted:
            await run.work.event(StepStarted, "b")
            guess.answer.set_exception(error)
        real = await service.one("b")
        assert real.step.id == step_id(RUN, "b", 1)
        real.answer.set_result("out")
        assert await task == "out"
    assert len(service.asked["b/guess"]) == 1
    assert not (await run.work.event(StepEnded, "b")).speculated
    assert run.work.summary == (1, 0)


async def test_a_fault_of_ours_in_a_guess_does_no_harm(caplog: pytest.LogCaptureFixture) -> None:
    service = Service()
    run = Run(CHOICE, service)
    async with going(run) as (task,):
        (await service.one("b/guess")).answer.set_exception(KeyError("ours"))
        await service.answer("a", 1)
        await service.answer("b", "out")
        assert await task == "out"
    assert "a guess of a run failed" in caplog.text


# ---- which, and how many


async def test_only_targets_that_only_read_by_the_catalogue_of_the_moment() -> None:
    service = Service()
    service.writes = {"of_b", "of_d"}
    steps = (call("a"), Parallel("p", {"x": (call("b"),), "y": (call("none"),)}), call("d"), call("e"))
    run = Run(steps, service)
    async with going(run) as (task,):
        await service.answer("a", 1)
        await service.one("b")
        service.writes.clear()
        await service.answer("b", 1)
        await service.answer("none", 1)
        await service.answer("e/guess", "E")
        await service.answer("d", 1)
        assert await task == "E"
    assert {key for key in service.asked if key.endswith("guess")} == {"e/guess"}


async def test_at_most_so_many_whether_they_run_or_have_their_outcome() -> None:
    service = Service()
    run = Run(tuple(call(name) for name in "abcde"), service, speculate=2)
    async with going(run) as (task,):
        await service.answer("b/guess", 1)
        await service.one("c/guess")
        assert run.budget.in_flight <= 2
        await service.answer("a", 1)  # b is adopted, and there is room for one more
        await service.one("d/guess")
        assert "e/guess" not in service.asked
        for name in "cd":
            await service.answer(f"{name}/guess", 1)
        await service.answer("e" if "e" in service.asked else "e/guess", "end")
        assert await task == "end"


async def test_all_runs_together_have_a_limit() -> None:
    service, budget = Service(), GuessBudget(lambda: False, most=3)
    runs = [Run(tuple(call(name) for name in "abcd"), service, budget=budget) for _ in range(2)]
    async with going(*runs) as tasks:
        await service.one("a", 1)
        await service.one("d/guess")
        assert budget.in_flight == 3
        assert [len(service.asked[f"{name}/guess"]) for name in "bcd"] == [1, 1, 1]
        assert runs[1].guesses.made == 0
        service.asked["b/guess"][0].answer.set_result(1)
        service.asked["a"][1].answer.set_result(1)
        await service.one("b")
        assert runs[1].guesses.made <= 1, "one had its outcome, so there is room for one"
        assert not [task for task in tasks if task.done()]


async def test_there_are_none_under_pressure() -> None:
    service, strained = Service(), [True]
    run = Run(tuple(call(name) for name in "abc"), service, budget=GuessBudget(lambda: strained[0]))
    assert run.budget.room() == 0
    async with going(run) as (task,):
        await service.answer("a", 1)
        await service.one("b")
        strained[0] = False
        assert run.budget.room() == MOST_IN_FLIGHT
        await service.answer("b", 1)
        await service.answer("c", "end")
        assert await task == "end"
    assert not [key for key in service.asked if key.endswith("/guess")]
    assert run.work.summary == (0, 0)


async def test_when_the_pressure_is_over_there_are_guesses_again() -> None:
    service, strained = Service(), [True]
    run = Run(tuple(call(name) for name in "abc"), service, budget=GuessBudget(lambda: strained[0]))
    async with going(run) as (task,):
        await service.one("a")
        strained[0] = False
        await service.answer("a", 1)
        await service.answer("c/guess", "end")
        await service.answer("b", 1)
        assert await task == "end"


def test_pressure_is_a_wait_for_a_permit_or_a_refusal_of_late() -> None:
    gates = rig(limit(1), bound(1))
    permits = gates.permits
    assert not permits.is_strained(0.0, 2.0)
    first = gates.enter(at_s=10.0)
    assert not permits.is_strained(10.0, 2.0)
    second = gates.enter(at_s=11.0)
    assert second.is_waiting
    assert permits.is_strained(1000.0, 2.0), "it still waits"
    gates.end(first, at_s=1000.0)
    permits.woken(second, 1000.0)
    assert permits.is_strained(1001.9, 2.0)
    assert not permits.is_strained(1002.0, 2.0)
    gates.enter(at_s=2000.0)
    assert gates.enter(at_s=2100.0).refusal is not None
    gates.end(second, at_s=2100.0)
    assert permits.is_strained(2101.9, 2.0)
    assert not permits.is_strained(2102.0, 2.0)


# ---- the end


async def test_a_cancelled_run_withdraws_its_guesses() -> None:
    service = Service()
    run = Run((call("a"), call("b"), call("d")), service)
    async with going(run) as (task,):
        await service.answer("d/guess", 1)
        guess, real = await service.one("b/guess"), await service.one("a")
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
    assert sorted(service.abandoned) == sorted([guess.step.id, real.step.id])
    assert guess.was_cancelled


async def test_a_runner_that_leaves_leaves_them_alone() -> None:
    service = Service()
    run = Run((call("a"), call("b")), service)
    async with going(run) as (task,):
        guess = await service.one("b/guess")
        run.work.leaving = True
        task.cancel()
        await asyncio.wait({task})
    assert not service.abandoned
    assert guess.was_cancelled, "nobody waits here any more"


async def test_a_run_that_fails_withdraws_its_guesses() -> None:
    service = Service()
    run = Run((call("a"), call("b")), service)
    async with going(run) as (task,):
        guess = await service.one("b/guess")
        await service.refuse("a", StepFailed("no", code="INTERNAL", reason="BROKEN"))
        with pytest.raises(StepFailed, match="step a"):
            await task
    assert service.abandoned == [guess.step.id]
    assert run.work.summary == (1, 1)


@pytest.mark.parametrize("how", ["failure", "cancellation"])
async def test_an_adopted_guess_is_withdrawn_as_the_call_would_be(how: str) -> None:
    service = Service()
    both = Parallel("p", {"x": (call("a"), call("b")), "y": (call("d"),)})
    run = Run((both,), service)
    async with going(run) as (task,):
        guess = await service.one("b/guess")
        await service.answer("a", 1)
        await run.work.event(StepStarted, "b")
        if how == "failure":
            await service.refuse("d", StepFailed("no", code="INTERNAL", reason="BROKEN"))
            with pytest.raises(StepFailed):
                await task
        else:
            task.cancel()
            await asyncio.wait({task})
    assert guess.step.id in service.abandoned
    assert guess.was_cancelled


async def test_a_retry_is_no_guess() -> None:
    service = Service()
    run = Run((call("a"), call("b", retry=Retry(2, first_s=0.0))), service)
    async with going(run) as (task,):
        (await service.one("b/guess")).answer.set_exception(Unavailable("gone"))
        await service.answer("a", 1)
        await service.refuse("b", StepFailed("no", code="UNAVAILABLE", reason="BROKEN"))
        second = await service.one("b", 1)
        assert second.step.id == step_id(RUN, "b", 2)
        second.answer.set_result("out")
        assert await task == "out"


# ---- by the executor


class HearingBus:
    class _Heard:
        async def close(self) -> None: ...

    async def hear(self, mark: str) -> Any:
        return self._Heard()


@pytest.mark.parametrize(("speculate", "is_strained", "guessed"), [(0, False, False), (2, True, False), (2, False, True)])
async def test_the_executor_speculates_when_the_order_says_so(speculate: int, is_strained: bool, guessed: bool) -> None:
    service = Service()
    what = program(call("a"), call("b"))
    deadline_s = CLOCK.wall_s() + 60.0
    order = RunOrder(RUN, "acme", what, json.dumps(dump(what)).encode(), None, deadline_s, speculate=speculate)
    work = RunWork(Step(RUN, "acme", Kind.RUN, "program", Payload(write(order)), deadline_s))
    executor = ProgramExecutor(
        Config(),
        "runner",
        "home",
        service,
        HearingBus(),  # type: ignore[arg-type]
        MemoryRuns(),
        CLOCK,
        lambda: 0.5,
        lambda target, payload: [],
        is_strained=lambda: is_strained,
    )
    async with asyncio.timeout(20):
        task = asyncio.create_task(executor.execute(work))
        if guessed:
            await service.answer("b/guess", "out")
        await service.answer("a", 1)
        if not guessed:
            await service.answer("b", "out")
        assert json.loads((await task).data) == "out"
    assert ("b/guess" in service.asked) == guessed
    assert work.summary == (int(guessed), 0)


# ---- random programs


class World:
    """What targets see and change: `send` writes, the others tell how often it was written. Answers after some turns of the loop."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.sent = 0
        self.served = 0

    async def call(self, step: Step, again: bool, on_event: Callable[[StepEvent], None] | None = None) -> StepCompleted:
        self.served += 1
        for _ in range(self.random.randint(0, 6)):
            await asyncio.sleep(0)
        if step.target == "send":
            self.sent += 1
        elif hash_of(step) % 11 == 0:
            raise StepFailed("broken", code="INVALID_ARGUMENT", reason="BROKEN")
        output: Json = [None, 1, self.sent][hash_of(step) % 3]
        for _ in range(self.random.randint(0, 6)):
            await asyncio.sleep(0)
        return StepCompleted(StepResult(step.id, step.tenant, Status.DONE, Payload(json.dumps(output).encode())), Timing())

    async def abandon(self, step: Step) -> None: ...

    def target(self, kind: Kind, name: str) -> Target | None:
        return TARGETS.get(f"{kind.value}.{name}")


def hash_of(step: Step) -> int:
    return sum(step.input.data) + len(step.target)


def in_order(block: Block) -> Block:
    """The same without steps side by side, so that it is clear what each of them sees of the world."""
    made = []
    for node in block:
        if isinstance(node, Parallel):
            name, inner = next(iter(node.branches.items()))
            node = replace(node, branches={name: in_order(inner)})
        elif isinstance(node, Choose):
            node = replace(node, then=in_order(node.then), otherwise=in_order(node.otherwise))
        elif isinstance(node, Map):
            node = replace(node, body=in_order(node.body), at_once=1)
        elif hasattr(node, "body"):
            node = replace(node, body=in_order(node.body))
        made.append(node)
    return tuple(made)


async def outcome_of(what: Program, speculate: int, seed: int) -> tuple[str, int, int]:
    world = World(Random(seed))
    run = Run(what, world, given={"x": [1, 2]}, speculate=speculate, language=expressions)  # type: ignore[arg-type]
    async with going(run) as (task,):
        try:
            output = json.dumps(await task)
        except NearloopError as error:
            output = f"{error.reason}: {error.message}"
    guesses, wrong = run.work.summary
    return output, guesses, guesses - wrong


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs(), st.integers(0, 1 << 30))
def test_a_run_gives_the_same_with_guesses_and_without(what: Program, seed: int) -> None:
    what = replace(what, steps=in_order(what.steps))
    plain, _, _ = asyncio.run(outcome_of(what, 0, seed))
    for speculate in (1, 4):
        assert asyncio.run(outcome_of(what, speculate, seed + speculate))[0] == plain


def test_random_programs_have_guesses_that_are_adopted() -> None:
    """A test of the test."""
    right = 0

    @settings(max_examples=80, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def look(what: Program) -> None:
        nonlocal right
        right += asyncio.run(outcome_of(replace(what, steps=in_order(what.steps)), 4, 1))[2]

    look()
    assert right > 10


async def test_a_step_that_reads_sees_what_the_one_before_it_wrote() -> None:
    """Although neither uses the other's output: the reason why nothing is guessed before a step that writes."""
    what = program(call("w"), call("b"), output=Template("${steps.b.output}"))
    service = Service()
    service.writes = {"of_w"}
    run = Run(what, service)
    async with going(run) as (task,):
        await service.answer("w", 1)
        await service.answer("b", "seen")
        assert await task == "seen"
    assert [*service.asked] == ["w", "b"]
