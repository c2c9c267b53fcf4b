"""What all expressions of a run together may cost. With the real language; what one evaluation may cost is tested with expressions."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from gateway.program import expressions
from gateway.program.allowance import MOST_RUN_WORK, Allowance, UsedUp
from gateway.program.commands import Fail, Finish, StartCall
from gateway.program.engine import Engine
from gateway.program.evaluation import Evaluation
from gateway.program.journal import Completed
from gateway.program.model import Call, Choose, Expression, Json, Loop, Program, Template
from gateway.program.problems import RunFailed
from gateway.types import Kind

HITS: Json = {"hits": [{"id": index} for index in range(100)]}
# About a thousand units an iteration, a fiftieth of what one evaluation may do.
LOOK = Choose("look", Expression("input.hits.exists(hit, hit.id == 99)"), ())
LOOP = Program(
    "looks", (Loop("again", Expression("loop.index < 100"), 100, (LOOK, Call("ask", Kind.TOOL, "x", Template("${loop.index}")))),)
)


def play(engine: Engine) -> list[Completed]:
    """Answers calls until the run has ended; what was told of them."""
    events: list[Completed] = []
    commands = engine.start()
    while engine.ended is None:
        (start,) = [command for command in commands if isinstance(command, StartCall)]
        events.append(Completed(start.key, 1, start.input))
        commands = engine.apply(events[-1])
    return events


def failure(engine: Engine) -> tuple[str, str]:
    assert isinstance(engine.ended, Fail)
    return engine.ended.error.reason, engine.ended.error.step_id


def test_a_run_ends_when_its_expressions_have_done_too_much() -> None:
    engine = Engine(LOOP, HITS, Evaluation(expressions), most_work=20_000)
    events = play(engine)
    assert failure(engine) == ("TOO_MUCH_WORK", "look")
    assert 5 < len(events) < 50


def test_it_has_more_than_enough_by_default() -> None:
    engine = Engine(LOOP, HITS, Evaluation(expressions))
    assert len(play(engine)) == 100
    assert isinstance(engine.ended, Finish)


def test_a_replay_ends_at_the_same_evaluation() -> None:
    shared = Evaluation(expressions)
    for most_work in range(20_000, 20_040, 7):
        engine = Engine(LOOP, HITS, shared, most_work=most_work)
        events = play(engine)
        again = Engine(LOOP, HITS, Evaluation(expressions), most_work=most_work)
        again.replay(events[:-1])
        assert again.ended is None
        again.apply(events[-1])
        assert failure(again) == failure(engine)


def test_runs_that_share_their_expressions_count_for_themselves_in_any_thread() -> None:
    shared = Evaluation(expressions)
    alone = Engine(LOOP, HITS, shared, most_work=20_000)
    expected = play(alone)
    barrier = Barrier(2)

    def run(_: int) -> tuple[list[Completed], tuple[str, str]]:
        engine = Engine(LOOP, HITS, shared, most_work=20_000)
        barrier.wait()
        return play(engine), failure(engine)

    with ThreadPoolExecutor(2) as pool:
        assert [*pool.map(run, range(2))] == [(expected, failure(alone))] * 2


def test_a_run_may_go_from_thread_to_thread() -> None:
    expected = play(Engine(LOOP, HITS, Evaluation(expressions), most_work=20_000))
    engine = Engine(LOOP, HITS, Evaluation(expressions), most_work=20_000)
    engine.start()
    for event in expected:
        with ThreadPoolExecutor(1) as fresh:
            fresh.submit(engine.apply, event).result()
    assert failure(engine) == ("TOO_MUCH_WORK", "look")


def test_one_evaluation_that_does_too_much_is_its_own_fault() -> None:
    engine = Engine(
        Program("one", (Choose("c", Expression("input.all(a, input.all(b, a != 0))"), ()),)), [*range(1, 400)], Evaluation(expressions)
    )
    engine.start()
    assert failure(engine) == ("EXPRESSION_FAILED", "c")


@pytest.mark.parametrize(
    ("template", "output", "most"),
    [
        ("${steps.read.output}", "x" * 8000, 160),
        ("as text: ${steps.read.output}", "x" * 4000, 160),
        ("${steps.read.output}", list(range(2000)), 25),
        ({"list": [1] * 2000}, None, 25),
    ],
    ids=["long", "text", "many", "template"],
)
def test_what_is_copied_counts(template: Json, output: Json, most: int) -> None:
    """There is nothing to compute: it is the size of what is handed on, again and again."""
    body = (Call("send", Kind.TOOL, "x", Template(template)),)
    steps = (Call("read", Kind.TOOL, "x", Template(1)), Loop("l", Expression("loop.index < 400"), 400, body))
    engine = Engine(Program("copies", steps), None, Evaluation(expressions), most_work=6_000)
    engine.start()
    engine.apply(Completed("read", 1, output))
    index = 0
    while engine.ended is None:
        engine.apply(Completed(f"send/{index}", 1, None))
        index += 1
    assert failure(engine)[0] == "TOO_MUCH_WORK"
    assert index < most


def test_an_allowance_is_used_up_once_and_for_all() -> None:
    allowance = Allowance(10)
    allowance.spend(10)
    with pytest.raises(UsedUp):
        allowance.spend(1)
    view = Evaluation(expressions).within(allowance)
    with pytest.raises(RunFailed, match="all the work") as failed:
        view.value(Expression("1 == 1"), {}, "node")
    assert (failed.value.reason, failed.value.step_id) == ("TOO_MUCH_WORK", "node")


def test_work_that_fails_counts_too() -> None:
    allowance = Allowance(MOST_RUN_WORK)
    with pytest.raises(RunFailed):
        Evaluation(expressions).within(allowance).value(Expression("input.all(x, x > 0) && input.none"), {"input": [1, 2, 3]}, "node")
    assert allowance.left < MOST_RUN_WORK
