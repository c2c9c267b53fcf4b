"""Calls that are made before they are known to be needed: what becomes of them, rule by rule."""

import asyncio
import json
from dataclasses import replace

import pytest
from program_driver import call, program, when
from run_guess_rig import CLOCK, RUN, HearingBus, Run, RunWork, Service, SlowRuns, going
from test_gate import bound, limit, rig

from gateway.config import Config
from gateway.errors import Denied, NearloopError, Rejected, StepFailed, Unavailable
from gateway.ports import LeaseLost
from gateway.program.commands import StartCall
from gateway.program.dump import dump_program
from gateway.program.model import Choose, Json, Parallel, Retry, Template
from gateway.run_record import write
from gateway.run_types import RunOrder, StepEnded, StepStarted, StepToken, Summary
from gateway.testing_runs import MemoryRuns
from gateway.types import Kind, Payload, Step
from workers.run_calls import step_id
from workers.run_guesses import MOST_IN_FLIGHT, GuessBudget
from workers.runner import ProgramExecutor

CHOICE = (call("a"), Choose("c", when("steps.a.output == 1"), (call("b", "${input}"),)))


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
    service.on_call = lambda key: known.update({key: runs.completed()})
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


async def test_a_runner_that_has_lost_the_run_leaves_them_alone() -> None:
    service, runs = Service(), MemoryRuns()
    run = Run((call("a"), call("b"), call("d")), service, runs=runs)
    async with going(run) as (task,):
        guess = await service.one("b/guess")
        runs.journals["home", "acme", RUN].append(b"another runner")
        await service.answer("a", 1)
        with pytest.raises(LeaseLost):
            await task
    assert guess.step.id not in service.abandoned
    assert guess.was_cancelled


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


@pytest.mark.parametrize(("speculate", "is_strained", "guessed"), [(0, False, False), (2, True, False), (2, False, True)])
async def test_the_executor_speculates_when_the_order_says_so(speculate: int, is_strained: bool, guessed: bool) -> None:
    service = Service()
    what = program(call("a"), call("b"))
    deadline_s = CLOCK.wall_s() + 60.0
    order = RunOrder(RUN, "acme", what, json.dumps(dump_program(what)).encode(), None, deadline_s, speculate=speculate)
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
