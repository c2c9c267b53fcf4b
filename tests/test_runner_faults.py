"""Random programs through the runner, while runners die, lose their lease and meet outages, against a plain recursive interpreter."""

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jumping_loop import LoopClock, run
from test_program_engine_random import GIVEN, Plain, Stopped, answers, programs, settled

from gateway import run_journal
from gateway.config import Config
from gateway.errors import NearloopError, Rejected, StepFailed, Unavailable
from gateway.ports import LeaseLost
from gateway.program import expressions
from gateway.program.engine import Engine
from gateway.program.evaluation import Evaluation
from gateway.program.journal import Completed, Event
from gateway.program.model import Json, Program
from gateway.run_types import RoundTrips, RunEvent, RunOrder, StepEnded, StepStarted, Summary, decode_event
from gateway.testing_runs import MemoryRuns
from gateway.types import Completed as StepCompleted
from gateway.types import Kind, Payload, Status, Step, StepEvent, StepResult, Target, Timing
from workers import run_writer
from workers.run_calls import step_id
from workers.runner import ProgramExecutor

RUN = "home-" + "5" * 32
MOST_RUNNERS = 40


class PlainCost(Plain):
    """What a step costs is what its target says, as for a runner."""

    def target(self, target: str, given: Json, attempts: int = 1) -> tuple[Json, bool, float]:
        output, failed, _ = super().target(target, given, attempts)
        return output, failed, 1.0


@dataclass
class World:
    """Targets behind a kernel that can refuse, lose its connection before or after a step was stored, and finds results by step id."""

    random: Random
    faults: float
    results: dict[str, asyncio.Task[StepCompleted]] = field(default_factory=dict)  # of steps that were stored, by id
    executions: Counter[str] = field(default_factory=Counter)  # by step id
    effects: Counter[str] = field(default_factory=Counter)  # by idempotency key

    def fails(self) -> bool:
        return self.random.random() < self.faults

    async def call(self, step: Step, again: bool) -> StepCompleted:
        if self.fails():
            raise Rejected("too much", retry_after_s=self.random.random())
        if self.fails():
            raise Unavailable("not sent", reason=self.random.choice(["NOT_STORED", "UNAVAILABLE"]))
        assert again or step.id not in self.results, "what may have been sent before has to be looked for"  # it would be executed again
        if step.id not in self.results:
            self.results[step.id] = asyncio.create_task(self.execute(step))
        if self.fails():
            raise Unavailable("sent, but nobody said so")
        return await asyncio.shield(self.results[step.id])

    async def execute(self, step: Step) -> StepCompleted:
        self.executions[step.id] += 1
        self.effects[step.idempotency_key] += 1
        await self.pause()
        key = step.idempotency_key.removeprefix(f"{RUN}/")
        attempt = next(number for number in range(1, 10) if step_id(RUN, key, number) == step.id)
        output, again, _ = answers(step.target, json.loads(step.input.data), attempt)
        if again is not None:
            raise StepFailed("", code="UNAVAILABLE", reason="BROKEN")
        return StepCompleted(StepResult(step.id, step.tenant, Status.DONE, Payload(json.dumps(output).encode()), worker="w"), Timing())

    async def pause(self) -> None:
        await asyncio.sleep(self.random.choice([0, 0, 0.001, 0.01, 0.1]))

    def disturb(self, what: str) -> None:
        """For the store."""
        if self.random.random() < self.faults / 2:
            raise Unavailable(what)


class Door:
    """The kernel and the bus of one runner. is_late: another one has the run; the server knows the messages of the last two minutes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_late = False

    async def call(self, step: Step, again: bool, on_event: Callable[[StepEvent], None] | None = None) -> StepCompleted:
        await self.world.pause()
        return await self.world.call(step, again or self.is_late)

    async def abandon(self, step: Step) -> None: ...

    def target(self, kind: Kind, name: str) -> Target | None:
        return Target(kind, name, idempotent=True, timeout_s=1e6)

    async def hear(self, mark: str) -> "Door":
        await self.world.pause()
        return self

    async def close(self) -> None: ...

    def round_trips(self) -> RoundTrips:
        return RoundTrips()


class Work:
    def __init__(self, step: Step, attempt: int) -> None:
        self.step, self.attempt, self.again = step, attempt, attempt > 1
        self.queue_region, self.leaving = "home", True
        self.events: list[RunEvent] = []

    def remaining_s(self) -> float:
        return 1e6

    def emit(self, token: Payload) -> None:
        self.events.append(decode_event(token.data))

    def progress(self, fraction: float, message: str) -> None: ...


@dataclass
class Ended:
    outcomes: list[Json | StepFailed]  # of every runner that came to one
    events: list[RunEvent]  # that the last one told
    runners: int
    late: int  # runners that lost their lease


async def through_runners(program: Program, world: World, runs: MemoryRuns, deaths: float) -> Ended:
    """Runner after runner, until one comes to an end. Some die on their way, some go on beside the one that takes over."""
    clock = LoopClock()
    step = Step(RUN, "acme", Kind.RUN, "program", Payload(b'{"program":null}'), clock.wall_s() + 1e6, run=RUN)
    order = RunOrder(RUN, "acme", program, b"null", GIVEN, step.deadline_s)
    outcomes: list[Json | StepFailed] = []
    late = 0
    beside: list[asyncio.Task[Payload]] = []
    for attempt in range(1, MOST_RUNNERS):
        door = Door(world)
        executor = ProgramExecutor(Config(), f"runner-{attempt}", "home", door, door, runs, clock, world.random.random, lambda *_: [])  # type: ignore[arg-type]
        executor._order = lambda work: order  # type: ignore[method-assign]
        work = Work(step, attempt)
        running = asyncio.create_task(executor.execute(work))
        if attempt < MOST_RUNNERS - 10 and world.random.random() < deaths:
            await asyncio.wait({running}, timeout=world.random.choice([0.0005, 0.02, 0.2, 2.0]))
            if not running.done() and world.random.random() < 0.5:
                beside.append(running)  # as one that was only stopped for a while
                door.is_late = True
                continue
            running.cancel()
        try:
            outcomes.append(json.loads((await running).data))
        except StepFailed as error:
            outcomes.append(error)
        except (asyncio.CancelledError, Unavailable):
            continue  # its step is delivered again
        except LeaseLost:
            late += 1
            continue
        for one in await asyncio.gather(*beside, return_exceptions=True):
            late += isinstance(one, LeaseLost)
            if isinstance(one, Payload):
                outcomes.append(json.loads(one.data))
            elif isinstance(one, StepFailed):
                outcomes.append(one)
            else:
                assert isinstance(one, LeaseLost | Unavailable), one
        await asyncio.gather(*world.results.values(), return_exceptions=True)
        return Ended(outcomes, work.events, attempt, late)
    raise AssertionError("no runner came to an end")


def compare(program: Program, seed: int, faults: float, deaths: float) -> tuple[str, Ended]:
    """How it ended, DONE or the reason."""
    plain = PlainCost(program)
    try:
        expected, ways = plain.run(), set[tuple[str, str]]()
    except Stopped as stopped:
        expected, ways = None, stopped.ways
    world = World(Random(seed), faults)
    runs = MemoryRuns(world.disturb)
    ended = run(through_runners(program, world, runs, deaths))
    first = ended.outcomes[0]  # what is committed: the first one
    if isinstance(first, StepFailed):
        named = first.message.removeprefix("step ").partition(":")[0] if first.message.startswith("step ") else ""
        assert (first.reason, named) in ways or (first.reason == "TOO_MANY_STEPS" and plain.calls > program.most_steps)
    else:
        assert not ways
        assert settled(first) == settled(expected)
    assert all(count == 1 for count in world.executions.values()), "a stored step was executed again"
    single = [key for key, count in world.effects.items() if count > 1]
    assert all(step_id(RUN, key.removeprefix(f"{RUN}/"), 2) in world.executions for key in single), "an effect without a second attempt"
    check_journal(program, runs, first, len(ended.outcomes) == 1)
    check_story(ended)
    return ("DONE" if not isinstance(first, NearloopError) else first.reason), ended


def check_journal(program: Program, runs: MemoryRuns, first: Json | StepFailed, alone: bool) -> None:
    """It leads a new engine to the same end."""
    events: list[Event] = []
    for entry in runs.journals.get(("home", "acme", RUN), ()):
        for event, large in run_journal.read(entry).events:
            if large is not None:
                assert isinstance(event, Completed)
                event = replace(event, output=json.loads(runs.values["acme", RUN, large.name]))
            events.append(event)
    engine = Engine(program, GIVEN, Evaluation(expressions))
    engine.replay(events)
    assert engine.ended is not None
    keys = [event.key for event in events if isinstance(event, Completed)]
    assert len(keys) == len(set(keys)), "an outcome was written twice"


def check_story(ended: Ended) -> None:
    """What the last runner tells is whole: every step begins before it ends, the summary comes last."""
    begun: Counter[tuple[str, int]] = Counter()
    for event in ended.events:
        if isinstance(event, StepStarted):
            begun[event.key, event.attempt] += 1
        elif isinstance(event, StepEnded) and not event.replayed:
            assert begun[event.key, event.attempt] == 1
    assert isinstance(ended.events[-1], Summary)


@pytest.fixture(autouse=True)
def small_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that some outputs are kept apart from the journal."""
    monkeypatch.setattr(run_writer, "LARGE_BYTES", 20)


HASTE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture]


@settings(max_examples=150, deadline=None, suppress_health_check=HASTE)
@given(programs(), st.integers(0, 1 << 30), st.sampled_from([0.0, 0.05, 0.2]), st.sampled_from([0.0, 0.5, 0.95]))
def test_runners_do_what_a_plain_interpreter_does_whatever_happens_to_them(
    program: Program, seed: int, faults: float, deaths: float
) -> None:
    compare(program, seed, faults, deaths)


def test_the_comparison_sees_deaths_lost_leases_and_every_way_to_end() -> None:
    """A test of the test: worlds in which nothing happens would prove little."""
    seen: Counter[str] = Counter()

    @settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def look(program: Program) -> None:
        end, ended = compare(program, 7, 0.1, 0.9)
        seen.update({end: 1, "takeovers": ended.runners - 1, "lost leases": ended.late})

    look()
    assert {"DONE", "STEP_FAILED", "BUDGET_EXHAUSTED", "LOOP_MAXIMUM"} <= seen.keys()
    assert seen["takeovers"] > 50
    assert seen["lost leases"] > 10
