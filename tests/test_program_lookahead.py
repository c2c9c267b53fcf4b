"""Which calls are offered before it is known that they are needed, rule by rule, and that guesses on random programs are right."""

from collections.abc import Collection
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program_driver import Drive, call, program, when
from program_strategies import TARGETS, programs

from gateway.program import expressions
from gateway.program.commands import Command, StartCall
from gateway.program.engine import Engine
from gateway.program.evaluation import Evaluation
from gateway.program.journal import Completed, Failed, TimerFired
from gateway.program.lookahead import Ahead
from gateway.program.model import Agent, Call, Choose, Json, Loop, Map, Parallel, Program, Retry, Template, Tool
from gateway.types import Kind

UNKNOWN = when("steps.a.output == 1")


def looks(run: Drive, most: int = 100, writes: Collection[str] = ()) -> list[Ahead]:
    return run.engine.ahead(lambda kind, name: name.removeprefix("of_") not in writes, most)


def ahead(run: Drive, most: int = 100, writes: Collection[str] = ()) -> dict[str, Json]:
    return {one.start.key: one.start.input for one in looks(run, most, writes)}


# ---- what is offered


def test_both_branches_while_the_condition_is_not_known() -> None:
    run = Drive((call("a"), Choose("c", UNKNOWN, (call("b", "${input}"),), (call("d", 2),))), "given")
    assert ahead(run) == {"b": "given", "d": 2}
    run.completes("a", 1)
    assert run.running["b"].input == "given"


def test_one_branch_when_the_condition_is_known() -> None:
    run = Drive((call("a"), Choose("c", when("input == 2"), (call("b"),), (call("d"),))), 2)
    assert ahead(run) == {"b": None}


def test_a_condition_that_fails_says_nothing() -> None:
    run = Drive((call("a"), Choose("c", when("input.none == 2"), (call("b"),), (call("d"),))), 2)
    assert ahead(run) == {"b": None, "d": None}
    run.completes("a")
    assert run.failure == ("EXPRESSION_FAILED", "c")


def test_a_call_is_offered_as_the_engine_asks_for_it() -> None:
    node = Call("b", Kind.RETRIEVE, "docs", Template({"q": "${input}"}), timeout_s=3.0, retry=Retry(3))
    run = Drive((call("a"), Choose("c", UNKNOWN, (node,))), "why")
    (one,) = looks(run)
    run.completes("a", 1)
    assert run.started[-1] == one.start


def test_nothing_that_depends_on_what_runs() -> None:
    branch = (call("b", ["${steps.a.output}"]),)
    assert ahead(Drive((call("a"), Choose("c", UNKNOWN, branch, branch), call("d", "${steps.c.output}")))) == {}


def test_later_calls_that_do_not_depend_on_it() -> None:
    run = Drive((call("z"), call("a"), call("b", "${steps.z.output}"), call("c", "${steps.b.output}"), call("d", "${input}")), 5)
    run.completes("z", 4)
    assert ahead(run) == {"b": 4, "d": 5}


def test_a_choice_that_is_not_the_next_node_waits_for_its_turn() -> None:
    run = Drive((call("a"), call("b", "${steps.a.output}"), Choose("c", when("steps.b.output == 1"), (call("d"),))))
    assert ahead(run) == {}
    run.completes("a")
    assert ahead(run) == {"d": None}


def test_open_loops_and_maps_have_their_indices_in_the_key() -> None:
    inner = Loop(
        "l", when("loop.index < 3"), 3, (call("a"), Choose("c", UNKNOWN, (call("b", ["${loop.index}", "${loop.last}", "${it}"]),)))
    )
    run = Drive((Map("m", when("input"), "it", (inner,)),), ["x", "y"])
    assert ahead(run) == {"b/0.0": [0, None, "x"], "b/1.0": [0, None, "y"]}
    run.completes("a/1.0", 1)
    run.completes("b/1.0", "last")
    assert ahead(run) == {"b/1.1": [1, "last", "y"]}


def test_a_choice_inside_of_a_choice() -> None:
    inner = Choose("d", when("input == 1"), (call("x"),), (call("y"),))
    unknown = Choose("e", UNKNOWN, (call("z"),), (call("w"),))
    assert ahead(Drive((call("a"), Choose("c", UNKNOWN, (inner,), (unknown,))), 1)) == {"x": None, "z": None, "w": None}


def test_only_the_first_of_a_branch_that_has_not_begun() -> None:
    run = Drive((call("a"), Choose("c", UNKNOWN, (call("b"), call("d")))))
    assert ahead(run) == {"b": None}
    run.completes("a", 1)
    assert ahead(run) == {"d": None}


def test_the_branches_of_what_runs_next_side_by_side() -> None:
    both = Parallel("p", {"x": (call("b"), call("e")), "y": (Choose("c", UNKNOWN, (call("d"),)),), "z": ()})
    assert ahead(Drive((call("a"), both))) == {"b": None, "d": None}


def test_also_after_the_blocks_that_are_open() -> None:
    run = Drive((Parallel("p", {"x": (call("a"),), "y": (call("b"),)}), call("d"), call("e", "${steps.p.output}")))
    assert ahead(run) == {"d": None}


def test_nothing_inside_of_what_has_not_begun() -> None:
    agent = Agent("g", "model", Template([]), {"t": Tool(Kind.TOOL, "t")})
    for node in (Map("m", when("input"), "it", (call("b"),)), Loop("l", when("true"), 2, (call("b"),)), agent):
        assert ahead(Drive((call("a"), node), [1])) == {}
        assert ahead(Drive((call("a"), Choose("c", UNKNOWN, (node,))), [1])) == {}


def test_what_is_sure_to_come_is_first() -> None:
    run = Drive((call("a"), Choose("c", UNKNOWN, (call("b"),), (call("d"),)), call("e")))
    assert [*ahead(run, most=2)] == ["e", "b"]
    assert [*ahead(run, most=2)] == ["d"], "each is told once"
    assert ahead(run) == {}


def test_no_template_that_fails() -> None:
    run = Drive((call("a"), call("b", "${input.none}"), call("c")), {})
    assert ahead(run) == {"c": None}
    run.completes("a")
    assert run.failure == ("EXPRESSION_FAILED", "b")


def test_nothing_once_the_run_has_ended() -> None:
    for end in (Drive.cancelled, lambda run: run.fails("a"), lambda run: (run.completes("a"), run.completes("b"))):
        run = Drive((call("a"), call("b")))
        (one,) = looks(run)
        end(run)
        assert run.ended is not None
        assert not ahead(run)
        assert not run.engine.may_come(one)


# ---- what must not be offered


def test_never_a_call_that_does_more_than_read() -> None:
    run = Drive((call("a"), Choose("c", UNKNOWN, (call("b"),), (call("d"),)), call("e")))
    assert ahead(run, writes={"b", "e"}) == {"d": None}


@pytest.mark.parametrize(
    "node",
    [
        call("w"),
        Parallel("p", {"x": (call("a"),), "y": (call("q"), call("w"))}),
        Map("m", when("input"), "it", (call("a"), Choose("c", UNKNOWN, (call("w"),)))),
        Loop("l", when("loop.index < 2"), 2, (call("a"), call("w", "${steps.a.output}"))),
        Agent("g", "model", Template([]), {"t": Tool(Kind.TOOL, "of_w")}),
    ],
    ids=lambda node: type(node).__name__,
)
def test_nothing_before_a_step_that_may_write(node: Call | Parallel | Map | Loop | Agent) -> None:
    """Whether it runs, or comes in between: a step that reads may be meant to see what was written."""
    assert "b" not in ahead(Drive((node, call("b")), [1]), writes={"w"})
    assert "b" not in ahead(Drive((call("z"), node, call("b")), [1]), writes={"w"})
    assert "b" in ahead(Drive((node, call("b")), [1]))


def test_a_branch_that_reads_is_offered_although_what_follows_writes() -> None:
    run = Drive((call("a"), Choose("c", UNKNOWN, (call("b"), call("w"))), call("d")))
    assert ahead(run, writes={"w"}) == {"b": None}


def test_what_it_reads_of_steps_must_be_clear() -> None:
    """In CEL an expression can have a value although a step has not ended."""
    texts = ["${has(steps.a)}", "${steps.map(name, name)}", "${'a' in steps}", "${steps[input]}", "${steps.z.output}"]
    for text in texts:
        what = Program("p", (call("z"), call("a"), call("b", text)))
        engine = Engine(what, "z", Evaluation(expressions))
        engine.start()
        engine.apply(Completed("z", 1, "Z"))
        assert [one.start.input for one in engine.ahead(lambda kind, name: True, 9)] == (["Z"] if text == "${steps.z.output}" else [])


# ---- what may still come


def test_a_branch_that_was_not_taken_does_not_come() -> None:
    run = Drive((call("a"), Choose("c", UNKNOWN, (call("b"),), (call("d"),)), call("e")))
    guesses = {one.start.key: one for one in looks(run)}
    assert all(run.engine.may_come(one) for one in guesses.values())
    run.completes("a", 1)
    assert {key for key, one in guesses.items() if run.engine.may_come(one)} == {"e"}


def test_a_call_that_waits_for_its_turn_still_comes() -> None:
    run = Drive(program(call("z"), Parallel("p", {"x": (call("a"),), "y": (call("b"),)}), at_once=1))
    guesses = {one.start.key: one for one in looks(run)}
    assert guesses.keys() == {"a", "b"}
    run.completes("z")
    assert [*run.running] == ["a"]
    assert [run.engine.may_come(guesses[key]) for key in "ab"] == [False, True]
    assert ahead(run) == {}
    run.completes("a")
    assert run.running["b"] == guesses["b"].start
    assert not run.engine.may_come(guesses["b"])


# ---- what it costs


def test_it_uses_nothing_of_what_the_run_may_spend() -> None:
    """Exactly as much as the run itself needs, in the small language's units; a look evaluates the same template."""
    steps = (call("a"), Choose("c", UNKNOWN, (call("b", ["${input}", "${input}"]),)))
    for most_work, ended in ((5, None), (4, "TOO_MUCH_WORK")):
        run = Drive(steps, 1, most_work=most_work)
        assert ahead(run) == {"b": [1, 1]}
        run.completes("a", 1)
        assert (run.failure[0] if run.ended else None) == ended


def test_what_takes_long_is_not_offered() -> None:
    what = Program("p", (call("a"), call("b", "${input.all(x, x > 0)}"), call("c", "${input[0]}")))
    engine = Engine(what, [1] * 1000, Evaluation(expressions))
    engine.start()
    found = [one.start.key for _ in range(2) for one in engine.ahead(lambda kind, name: True, 9)]
    assert found == ["c"]
    (start,) = [command for command in engine.apply(Completed("a", 1, None)) if isinstance(command, StartCall)]
    assert start.input is True


def test_all_looks_of_a_run_together_are_bounded() -> None:
    body = (call("a"), call("b", "${input.exists(x, x == 30)}"))
    what = Program("p", (Loop("l", when("loop.index < 1000"), 1000, body),), most_steps=10_000)
    engine = Engine(what, [*range(60)], Evaluation(expressions))
    engine.start()
    offered = 0
    for index in range(1000):
        offered += len(engine.ahead(lambda kind, name: True, 9))
        engine.apply(Completed(f"a/{index}", 1, None))
        engine.apply(Completed(f"b/{index}", 1, None))
    assert 100 < offered < 900


# ---- random programs


def reads_only(kind: Kind, name: str) -> bool:
    return TARGETS[f"{kind.value}.{name}"].read_only


class Guesser:
    """Drives two engines by the same events in random order, one of which is looked ahead in."""

    def __init__(self, what: Program, random: Random) -> None:
        self.random = random
        self.engine, self.plain = (Engine(what, {"x": [1, 2]}, Evaluation(expressions)) for _ in range(2))
        self.guesses: dict[str, Ahead] = {}
        self.right = self.wrong = 0
        self.gone: set[str] = set()

    def play(self) -> None:
        self.told(self.engine.start(), self.plain.start())
        for _ in range(200):
            if self.engine.ended is not None:
                break
            asked = self.random.choice(self.engine.outstanding())
            if not isinstance(asked, StartCall):
                event: Completed | Failed | TimerFired = TimerFired(asked.key)
            elif self.random.random() < 0.1:
                event = Failed(asked.key, asked.attempt, "UNAVAILABLE", "BROKEN", retryable=True)
            else:
                event = Completed(asked.key, asked.attempt, self.random.choice([None, 1, asked.input]))
            self.told(self.engine.apply(event), self.plain.apply(event))

    def told(self, commands: list[Command], plain: list[Command]) -> None:
        assert str(commands) == str(plain), "looking changes nothing"
        assert self.engine.outputs() == self.plain.outputs()
        for command in commands:
            if isinstance(command, StartCall):
                assert command.key not in self.gone, "what cannot come does not come"
                if command.attempt == 1 and command.key in self.guesses:
                    assert self.guesses.pop(command.key).start == command
                    self.right += 1
        for key in [key for key, one in self.guesses.items() if not self.engine.may_come(one)]:
            del self.guesses[key]
            self.gone.add(key)
            self.wrong += 1
        for one in self.engine.ahead(reads_only, self.random.randint(0, 3)):
            assert one.start.key not in self.guesses
            assert reads_only(one.start.kind, one.start.target)
            self.guesses[one.start.key] = one


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs(), st.integers(0, 1 << 30))
def test_what_is_asked_for_is_what_was_guessed(what: Program, seed: int) -> None:
    Guesser(what, Random(seed)).play()


def test_random_programs_give_right_and_wrong_guesses() -> None:
    """A test of the test."""
    seen = [0, 0]

    @settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def look(what: Program) -> None:
        for seed in range(4):
            guesser = Guesser(what, Random(seed))
            guesser.play()
            seen[0] += guesser.right
            seen[1] += guesser.wrong

    look()
    assert seen[0] > 50, seen
    assert seen[1] > 3, seen
