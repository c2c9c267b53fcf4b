"""The engine, rule by rule. Agents have a file of their own."""

import pytest
from program_driver import SMALL, Drive, call, program, when

from gateway.program.calls import JournalMismatch
from gateway.program.commands import Cancel, Fail, StartCall, Wait
from gateway.program.engine import Engine
from gateway.program.evaluation import Evaluation
from gateway.program.journal import Cancelled, Completed, Failed, TimerFired, completed_outputs, decode, encode
from gateway.program.model import Choose, Loop, Map, Parallel, Retry, Template
from gateway.types import Kind, Lane

TWICE = Retry(attempts=2)


# ---- order and values


def test_a_chain_hands_outputs_on() -> None:
    run = Drive((call("a", {"q": "${input.q}"}), call("b", "${steps.a.output.hits[0]}")), {"q": "why"})
    assert run.started == [StartCall("a", 1, "a", Kind.TOOL, "of_a", {"q": "why"})]
    run.completes("a", {"hits": [7, 8]})
    assert run.running["b"].input == 7
    run.completes("b", "end")
    assert run.output == "end"
    assert run.engine.outputs() == {"a": {"hits": [7, 8]}, "b": "end"}


def test_lane_and_time_out_are_passed_on() -> None:
    run = Drive((call("a", lane=Lane.BATCH, timeout_s=2.5),))
    assert (run.started[0].lane, run.started[0].timeout_s) == (Lane.BATCH, 2.5)


def test_a_program_without_steps_finishes_at_once() -> None:
    assert Drive(()).output is None


def test_the_output_of_the_program_sees_its_steps() -> None:
    run = Drive(program(call("a"), call("b"), output=Template({"both": ["${steps.a.output}", "${steps.b.output}"]})))
    run.completes("a", 1)
    run.completes("b", 2)
    assert run.output == {"both": [1, 2]}


def test_branches_run_at_the_same_time_and_are_named_in_order() -> None:
    both = Parallel("p", {"x": (call("a"), call("b", "${steps.a.output}")), "y": (call("c"),), "z": ()})
    run = Drive((both, call("d", "${steps.p.output}")))
    assert [*run.running] == ["a", "c"]
    run.completes("c", "C")
    run.completes("a", "A")
    run.completes("b", "B")
    assert run.running["d"].input == {"x": "B", "y": "C", "z": None}
    assert list(run.running["d"].input) == ["x", "y", "z"]


def test_what_is_inside_of_a_node_is_not_seen_outside() -> None:
    run = Drive((Parallel("p", {"x": (call("a"),)}), call("b", "${steps.a.output}")))
    run.completes("a", 1)
    assert run.failure == ("EXPRESSION_FAILED", "b")


def test_a_map_keeps_the_order_of_its_items_whatever_ends_first() -> None:
    run = Drive((Map("m", when("input"), "it", (call("a", {"of": "${it}"}),)),), [10, 20, 30])
    assert [(start.key, start.input) for start in run.started] == [("a/0", {"of": 10}), ("a/1", {"of": 20}), ("a/2", {"of": 30})]
    for key in ("a/2", "a/0", "a/1"):
        run.completes(key, key)
    assert run.output == ["a/0", "a/1", "a/2"]


def test_a_map_over_nothing_gives_nothing() -> None:
    assert Drive((Map("m", when("input"), "it", (call("a"),)),), []).output == []


def test_maps_inside_of_maps_have_keys_with_both_indices() -> None:
    inner = Map("n", when("row"), "cell", (call("a", ["${row}", "${cell}"]),))
    run = Drive((Map("m", when("input"), "row", (inner,)),), [[1], [2, 3]])
    assert {start.key: start.input for start in run.started} == {"a/0.0": [[1], 1], "a/1.0": [[2, 3], 2], "a/1.1": [[2, 3], 3]}
    for key in ("a/1.1", "a/0.0", "a/1.0"):
        run.completes(key, key)
    assert run.output == [["a/0.0"], ["a/1.0", "a/1.1"]]


@pytest.mark.parametrize(("given", "taken", "output"), [(1, "a", "A"), (2, None, None)])
def test_a_condition_takes_one_branch(given: int, taken: str | None, output: str | None) -> None:
    run = Drive((Choose("c", when("input == 1"), (call("a"),)),), given)
    if taken:
        run.completes(taken, output)
    assert run.output == output
    assert len(run.started) == (1 if taken else 0)


def test_a_loop_sees_its_index_and_its_last_output() -> None:
    run = Drive((Loop("l", when("loop.last != 9"), 5, (call("a", ["${loop.index}", "${loop.last}"]),)), call("b", "${steps.l.output}")))
    assert run.running["a/0"].input == [0, None]
    run.completes("a/0", 8)
    assert run.running["a/1"].input == [1, 8]
    assert run.engine.progress() == {"steps_done": 1, "running": ["a/1"], "queued": 0, "iterations": {"l": 1}}
    run.completes("a/1", 9)
    assert run.running["b"].input == 9
    assert run.engine.progress()["iterations"] == {}


def test_a_loop_without_iterations_gives_null() -> None:
    assert Drive((Loop("l", when("false"), 5, (call("a"),)),)).output is None


def test_a_loop_may_use_its_maximum_but_no_more() -> None:
    run = Drive((Loop("l", when("loop.index < 2"), 2, (call("a"),)),))
    run.completes("a/0")
    run.completes("a/1", "end")
    assert run.output == "end"


def test_a_loop_over_its_maximum_fails_or_stops_quietly() -> None:
    loud, quiet = (Drive((Loop("l", when("true"), 2, (call("a"),), stop_quietly=quiet),)) for quiet in (False, True))
    for run in (loud, quiet):
        run.completes("a/0", 1)
        run.completes("a/1", 2)
    assert loud.failure == ("LOOP_MAXIMUM", "l")
    assert quiet.output == 2


# ---- limits


def test_the_run_has_a_limit_at_once_and_starts_in_program_order() -> None:
    run = Drive(program(Parallel("p", {name: (call(name), call(f"{name}2")) for name in "abc"}), at_once=2))
    assert [*run.running] == ["a", "b"]
    assert run.engine.progress()["queued"] == 1
    run.completes("b")
    assert [*run.running] == ["a", "b2"]  # it is before c in the program
    run.completes("a")
    assert [*run.running] == ["b2", "a2"]


def test_a_map_has_a_limit_at_once_for_its_items() -> None:
    run = Drive((Map("m", when("input"), "it", (call("a"), call("b")), at_once=2),), [0, 0, 0, 0])
    assert [*run.running] == ["a/0", "a/1"]
    run.completes("a/0")
    assert [*run.running] == ["a/1", "b/0"]
    run.completes("b/0")
    assert [*run.running] == ["a/1", "a/2"]


def test_too_many_steps() -> None:
    run = Drive(program(Loop("l", when("true"), 100, (call("a"),)), most_steps=2))
    run.completes("a/0")
    run.completes("a/1")
    assert run.failure == ("TOO_MANY_STEPS", "a")


def test_further_attempts_are_no_steps() -> None:
    run = Drive(program(call("a", retry=TWICE), most_steps=1))
    run.fails("a", retryable=True)
    run.apply(TimerFired("a"))
    run.completes("a", "end")
    assert run.output == "end"


def test_loops_that_call_nothing_come_to_an_end() -> None:
    inner = Loop("inner", when("true"), 1000, (Choose("c", when("true"), ()),), stop_quietly=True)
    assert Drive((Loop("outer", when("true"), 1000, (inner,)),)).failure[0] == "TOO_MANY_STEPS"


@pytest.mark.parametrize(("given", "reason"), [({"a": 1}, "NOT_A_LIST"), (None, "NOT_A_LIST"), ([1, 2, 3], "TOO_MANY_ITEMS")])
def test_what_a_map_refuses(given: object, reason: str) -> None:
    run = Drive((Map("m", when("input"), "it", (call("a"),), most=2),), given)  # type: ignore[arg-type]
    assert run.failure == (reason, "m")


def test_a_loop_of_ten_thousand_iterations_forgets_them() -> None:
    run = Drive(program(Loop("l", when("loop.index < 10000"), 10_000, (call("a"), call("b", "${steps.a.output}"))), most_steps=20_000))
    for index in range(10_000):
        run.completes(f"a/{index}", [index])
        assert run.engine.outputs() == {f"a/{index}": [index]}
        run.completes(f"b/{index}", index)
    assert run.output == 9999
    assert run.engine.outputs() == {"l": 9999}
    assert len(completed_outputs(run.journal)) == 20_000


# ---- failures


def test_a_failed_call_fails_the_run_and_cancels_its_siblings() -> None:
    run = Drive((call("first"), Parallel("p", {"x": (call("a"),), "y": (call("b"),), "z": (call("c", retry=TWICE),)})))
    run.completes("first", 1)
    run.fails("c", retryable=True)
    commands = run.fails("b", message="no more seats")
    assert {command.key for command in commands if isinstance(command, Cancel)} == {"a", "c"}
    assert isinstance(commands[-1], Fail)
    assert run.failure == ("STEP_FAILED", "b")
    assert run.why == "b: UNAVAILABLE BROKEN: no more seats"
    assert run.engine.outputs() == {"first": 1}


def test_nothing_is_started_by_the_event_that_fails_the_run() -> None:
    """Both branches go on from the same event, and the second one cannot."""
    branches = {"x": (call("a"),), "y": (call("b", "${steps.none.output}"),)}
    run = Drive((call("first"), Parallel("p", branches)))
    assert [type(command) for command in run.completes("first")] == [Fail]
    assert [start.key for start in run.started] == ["first"]


def test_retries_wait_longer_each_time_and_end() -> None:
    run = Drive((call("a", 5, retry=Retry(attempts=4, first_s=0.5, factor=3.0, most_s=2.0)),))
    for attempt in (1, 2, 3):
        run.fails("a", retryable=True)
        run.apply(TimerFired("a"))
        assert run.running["a"] == StartCall("a", attempt + 1, "a", Kind.TOOL, "of_a", 5)
    run.fails("a", retryable=True)
    assert [wait.delay_s for wait in run.waits] == [0.5, 1.5, 2.0]
    assert all(wait.is_retry for wait in run.waits)
    assert run.failure == ("STEP_FAILED", "a")
    assert "after 4 attempts" in run.why


def test_what_is_not_declared_safe_is_not_tried_again() -> None:
    run = Drive((call("a", retry=TWICE),))
    run.fails("a", retryable=False)
    assert run.failure == ("STEP_FAILED", "a")
    assert not run.waits


def test_a_delay_never_overflows() -> None:
    run = Drive((call("a", retry=Retry(attempts=3, factor=1e300, most_s=4.0)),))
    run.fails("a", retryable=True)
    run.apply(TimerFired("a"))
    run.fails("a", retryable=True)
    assert run.waits[-1].delay_s == 4.0


def test_a_call_that_waits_for_its_retry_keeps_its_place() -> None:
    run = Drive(program(Parallel("p", {"x": (call("a", retry=TWICE),), "y": (call("b"),)}), at_once=1))
    run.fails("a", retryable=True)
    assert not run.running
    run.apply(TimerFired("a"))
    assert [*run.running] == ["a"]


def test_a_fallback_is_made_from_what_the_call_sees() -> None:
    run = Drive((call("a"), call("b", retry=TWICE, fallback=Template({"instead": "${steps.a.output}"})), call("c", "${steps.b.output}")))
    run.completes("a", 1)
    run.fails("b", retryable=True)
    run.apply(TimerFired("b"))
    run.fails("b", retryable=True)
    assert run.running["c"].input == {"instead": 1}


def test_a_failed_expression_names_its_node_and_itself() -> None:
    run = Drive((Choose("c", when("input.x == 1"), ()),), {})
    assert run.failure == ("EXPRESSION_FAILED", "c")
    assert "input.x == 1" in run.why


@pytest.mark.parametrize("node", [Choose("n", when("input"), ()), Loop("n", when("input"), 1, (call("a"),))])
def test_a_condition_is_true_or_false(node: Choose | Loop) -> None:
    assert Drive((node,), 1).failure == ("EXPRESSION_FAILED", "n")


def test_the_output_of_the_program_may_fail_too() -> None:
    run = Drive(program(call("a"), output=Template("${steps.a.output.x}")))
    run.completes("a", {})
    assert run.failure == ("EXPRESSION_FAILED", "")


# ---- cancellation and mistakes of the runner


def test_cancellation_stops_everything() -> None:
    run = Drive(program(Parallel("p", {name: (call(name, retry=TWICE),) for name in "abc"}), at_once=2))
    run.fails("a", retryable=True)
    assert [command.key for command in run.cancelled() if isinstance(command, Cancel)] == ["a", "b"]
    assert run.failure == ("CANCELLED", "")
    assert run.why == "enough"
    for late in (Completed("b", 1, 1), TimerFired("a"), Cancelled()):
        assert run.engine.apply(late) == []


@pytest.mark.parametrize("event", [Completed("b", 1, 0), Completed("nobody", 1, 0), Failed("a", 3, "INTERNAL", "X"), Completed("a", 1, 0)])
def test_an_outcome_of_nothing_is_refused_and_changes_nothing(event: Completed | Failed) -> None:
    run = Drive((call("a", retry=TWICE), call("b")))
    run.fails("a", retryable=True)
    before = run.engine.outstanding()
    with pytest.raises(JournalMismatch):
        run.engine.apply(event)
    assert run.engine.outstanding() == before
    run.apply(TimerFired("a"))
    run.completes("a")
    run.completes("b", 2)
    assert run.output == 2


def test_a_late_timer_is_no_mistake() -> None:
    run = Drive((call("a"),))
    assert run.apply(TimerFired("a")) == []
    assert run.apply(TimerFired("nobody")) == []
    assert [*run.running] == ["a"]


# ---- the journal


def test_a_new_engine_asks_for_what_is_missing_and_for_nothing_else() -> None:
    what = program(Parallel("p", {"x": (call("a"), call("d")), "y": (call("b", retry=TWICE),), "z": (call("c"),)}))
    run = Drive(what)
    run.completes("a", 1)
    run.fails("b", retryable=True)
    engine = Engine(what, None, Evaluation(SMALL))
    engine.replay(decode(encode(event)) for event in run.journal)
    assert {asked.key for asked in engine.outstanding()} == {"b", "c", "d"}
    assert {type(asked) for asked in engine.outstanding() if asked.key == "b"} == {Wait}
    assert engine.outputs() == {"a": 1}
    assert engine.progress() == run.engine.progress()


def test_the_timer_of_a_retry_may_be_missing_in_the_journal() -> None:
    run = Drive((call("a", retry=TWICE), call("b")))
    run.apply(Failed("a", 1, "UNAVAILABLE", "BROKEN", retryable=True))
    run.engine.apply(Completed("a", 2, "late"))
    assert [asked.key for asked in run.engine.outstanding()] == ["b"]
    assert run.engine.outputs() == {"a": "late"}


@pytest.mark.parametrize(
    "event", [Completed("a/0", 2, {"x": [1]}, 0.5, 7), Failed("a", 1, "X", "Y", "z", True, 1.5), TimerFired("a"), Cancelled("r")]
)
def test_events_survive_the_journal(event: Completed | Failed | TimerFired | Cancelled) -> None:
    assert decode(encode(event)) == event


@pytest.mark.parametrize("entry", [{}, {"type": "other"}, {"type": "completed"}, {"type": "cancelled", "more": 1}])
def test_what_is_no_event_is_refused(entry: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="journal"):
        decode(entry)
