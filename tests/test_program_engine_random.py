"""Random programs, in a random order of outcomes and with crashes, against a plain recursive interpreter."""

import json
from random import Random
from typing import Any
from zlib import crc32

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from program_driver import SMALL

from gateway.program import model
from gateway.program.commands import Command, Fail, Finish, StartCall, Wait
from gateway.program.engine import Engine
from gateway.program.evaluation import Evaluation
from gateway.program.journal import Completed, Event, Failed, TimerFired, decode, encode
from gateway.program.model import Json, Program, Template
from gateway.program.problems import RunFailed
from gateway.types import Kind

GIVEN: Json = {"n": 3, "list": [4, 5, 6]}
TOOLS = {"look": model.Tool(Kind.TOOL, "api.look"), "book": model.Tool(Kind.TOOL, "api.book")}


# ---- what targets do: the same for the same input and attempt


def settled(value: Json) -> Json:
    """Without the words that an agent is told about its nonsense: how they read does not matter here."""
    if isinstance(value, list):
        return [settled(item) for item in value if not (isinstance(item, dict) and item.get("role") == "system")]
    return {key: settled(item) for key, item in value.items()} if isinstance(value, dict) else value


def answers(target: str, given: Json, attempt: int) -> tuple[Json, bool | None, float]:
    """(output, None when it is done or else whether it may be tried again, cost)."""
    number = crc32(json.dumps([target, settled(given)], sort_keys=True).encode())
    cost = number % 7 / 10
    if number % 23 == 0 or attempt <= number // 100 % 4 - 1:  # a few fail for good, a quarter once, a quarter twice
        return None, number % 23 != 0, cost
    if target != "planner":
        return {"n": number % 5, "list": list(range(number % 4))}, None, cost
    wanted: list[Json] = [{"id": str(n), "tool": "look" if number & n else "book", "input": number % 9 + n} for n in range(number % 3 + 1)]
    output: Json = {"calls": wanted, "usage": {"tokens": number % 50}} if number % 5 > 1 else {"answer": number % 10}
    return ({"calls": [{"id": "x", "tool": "rob", "input": None}]} if number % 5 == 2 else output), None, cost


# ---- the interpreter


class Stopped(Exception):
    """with every (reason, node) that may be the first."""

    def __init__(self, *ways: tuple[str, str]) -> None:
        self.ways = set(ways)


class Plain:
    """One thing after the other; all branches to their end. `calls` counts them."""

    def __init__(self, program: Program) -> None:
        self.program, self.evaluation, self.calls = program, Evaluation(SMALL), 0

    def run(self) -> Json:
        variables: dict[str, Json] = {"input": GIVEN, "steps": {}}
        last = self.block(self.program.steps, variables, keep=True)
        return last if self.program.output is None else self.ask(self.evaluation.fill, self.program.output, variables, "")

    def ask(self, method: Any, *args: Any) -> Any:
        try:
            return method(*args)
        except RunFailed as error:
            raise Stopped((error.reason, error.step_id)) from None

    def block(self, nodes: model.Block, variables: dict[str, Json], keep: bool = False) -> Json:
        steps: dict[str, Json] = variables["steps"] if keep else {**variables["steps"]}  # type: ignore[assignment, dict-item]
        last: Json = None
        for node in nodes:
            last = getattr(self, type(node).__name__.lower())(node, {**variables, "steps": steps})
            steps[node.id] = {"output": last}
        return last

    def all_of(self, blocks: list[tuple[model.Block, dict[str, Json]]]) -> list[Json]:
        outputs, ways = [], set()
        for nodes, variables in blocks:
            try:
                outputs.append(self.block(nodes, variables))
            except Stopped as stopped:
                ways |= stopped.ways
        if ways:
            raise Stopped(*ways)
        return outputs

    def target(self, target: str, given: Json, attempts: int = 1) -> tuple[Json, bool, float]:
        """(output, whether it failed, cost of the last attempt)."""
        self.calls += 1
        for attempt in range(1, attempts + 1):
            output, again, cost = answers(target, given, attempt)
            if not again:
                break
        return output, again is not None, cost

    def call(self, node: model.Call, variables: dict[str, Json]) -> Json:
        output, failed, _ = self.target(node.target, self.ask(self.evaluation.fill, node.input, variables, node.id), node.retry.attempts)
        if failed and node.fallback is None:
            raise Stopped(("STEP_FAILED", node.id))
        return self.ask(self.evaluation.fill, node.fallback, variables, node.id) if failed else output

    def parallel(self, node: model.Parallel, variables: dict[str, Json]) -> Json:
        outputs = self.all_of([(nodes, variables) for nodes in node.branches.values()])
        return dict(zip(node.branches, outputs, strict=True))

    def map(self, node: model.Map, variables: dict[str, Json]) -> Json:
        items = self.ask(self.evaluation.value, node.over, variables, node.id)
        if not isinstance(items, list):
            raise Stopped(("NOT_A_LIST", node.id))
        if len(items) > node.most:
            raise Stopped(("TOO_MANY_ITEMS", node.id))
        return self.all_of([(node.body, {**variables, node.item: item}) for item in items])

    def choose(self, node: model.Choose, variables: dict[str, Json]) -> Json:
        taken = self.ask(self.evaluation.holds, node.condition, variables, node.id)
        return self.block(node.then if taken else node.otherwise, variables)

    def loop(self, node: model.Loop, variables: dict[str, Json]) -> Json:
        last: Json = None
        index = 0
        while True:
            inner: dict[str, Json] = {**variables, "loop": {"index": index, "last": last}}
            if not self.ask(self.evaluation.holds, node.condition, inner, node.id):
                return last
            if index == node.maximum:
                if node.stop_quietly:
                    return last
                raise Stopped(("LOOP_MAXIMUM", node.id))
            last = self.block(node.body, inner)
            index += 1

    def agent(self, node: model.Agent, variables: dict[str, Json]) -> Json:
        messages: list[Json] = list(self.ask(self.evaluation.fill, node.messages, variables, node.id))
        told: list[Json] = [{"name": name, "description": ""} for name in node.tools]
        spent, tokens, nonsense = 0.0, 0, 0
        for left in reversed(range(node.budget.iterations)):
            remaining: Json = {"iterations": left, "tokens": node.budget.tokens - tokens, "cost": node.budget.cost - spent}
            asked: Json = {"protocol": "nearloop.agent/v1", "messages": [*messages], "tools": told, "remaining": remaining}
            output, failed, cost = self.target(node.model, asked)
            if failed:
                raise Stopped(("STEP_FAILED", node.id))
            assert isinstance(output, dict)
            spent, tokens = spent + cost, tokens + output.get("usage", {"tokens": 0})["tokens"]  # type: ignore[index, operator, call-overload]
            if "answer" in output:
                messages.append({"role": "assistant", **output})
                return {"answer": output["answer"], "messages": messages, "iterations": node.budget.iterations - left}
            wanted: Any = output["calls"]
            if wanted[0]["tool"] not in node.tools:
                nonsense += 1
                messages.append({"role": "assistant", "invalid": output})
                if nonsense == 3:
                    raise Stopped(("MODEL_NONSENSE", node.id))
            elif left and spent < node.budget.cost and tokens < node.budget.tokens:
                nonsense = 0
                messages.append({"role": "assistant", "calls": wanted})
                for each in wanted:
                    result, failed, cost = self.target(node.tools[each["tool"]].target, each["input"])
                    spent += cost
                    error = {"code": "UNAVAILABLE", "reason": "BROKEN", "message": ""}
                    messages.append(
                        {"role": "tool", "call": each["id"], "tool": each["tool"], **({"error": error} if failed else {"output": result})}
                    )
            if spent >= node.budget.cost or tokens >= node.budget.tokens:
                break
        raise Stopped(("BUDGET_EXHAUSTED", node.id))


# ---- random programs


@st.composite
def programs(draw: st.DrawFn) -> Program:
    count = iter(range(10_000))

    def value(seen: list[str], in_loop: bool) -> str:
        ways = ["input.n", "input", *(f"steps.{name}.output" for name in seen), *(["loop.index", "loop.last"] if in_loop else [])]
        return draw(st.sampled_from(ways))

    def number(seen: list[str], in_loop: bool) -> str:
        ways = ["input.n", *(f"steps.{name}.output.n" for name in seen if name[0] == "c"), *(["loop.index"] if in_loop else [])]
        return draw(st.sampled_from(ways))

    def condition(seen: list[str], in_loop: bool) -> model.Expression:
        if draw(st.integers(0, 19)) == 0:
            return model.Expression(draw(st.sampled_from(["input.none == 1", "input.n"])))
        return model.Expression(f"{number(seen, in_loop)} {draw(st.sampled_from(['<', '==', '!=']))} {draw(st.integers(0, 4))}")

    def block(depth: int, outer: list[str], in_loop: bool, least: int = 1) -> model.Block:
        seen, nodes = list(outer), []
        for _ in range(draw(st.integers(least, 3))):
            nodes.append(node(depth, seen, in_loop))
            seen.append(nodes[-1].id)
        return tuple(nodes)

    def node(depth: int, seen: list[str], in_loop: bool) -> model.Node:
        kind = draw(st.sampled_from(["call", "call", "call", "agent", *(["parallel", "map", "choose", "loop"] if depth else [])]))
        name = f"{kind[0] if kind != 'choose' else 'o'}{next(count)}"
        if kind == "call":
            retry = model.Retry(attempts=draw(st.integers(1, 3)))
            fallback = Template({"n": 1, "from": f"${{{value(seen, in_loop)}}}"}) if draw(st.booleans()) else None
            return model.Call(name, Kind.TOOL, name, Template({"q": [f"${{{value(seen, in_loop)}}}"]}), retry=retry, fallback=fallback)
        if kind == "parallel":
            return model.Parallel(name, {key: block(depth - 1, seen, in_loop, 0) for key in "xyz"[: draw(st.integers(1, 3))]})
        if kind == "map":
            lists = ["input.list", "input.list", *(f"steps.{name}.output.list" for name in seen if name[0] == "c"), value(seen, in_loop)]
            over, item = model.Expression(draw(st.sampled_from(lists))), f"item{name}"
            body = (model.Call(f"c{next(count)}", Kind.TOOL, "each", Template(f"${{{item}}}")), *block(depth - 1, seen, in_loop, 0))
            return model.Map(name, over, item, body, at_once=draw(st.integers(1, 3)), most=draw(st.sampled_from([2, 3, 100])))
        if kind == "choose":
            return model.Choose(name, condition(seen, in_loop), block(depth - 1, seen, in_loop), block(depth - 1, seen, in_loop, 0))
        if kind == "loop":
            return model.Loop(name, condition(seen, True), draw(st.integers(1, 4)), block(depth - 1, seen, True), draw(st.booleans()))
        budget = model.Budget(draw(st.integers(1, 6)), draw(st.sampled_from([1.0, 3.0, 50.0])), draw(st.sampled_from([60, 10_000])))
        return model.Agent(name, "planner", Template([{"role": "user", "content": f"${{{value(seen, in_loop)}}}"}]), TOOLS, budget)

    steps = block(2, [], False)
    output = Template([f"${{steps.{each.id}.output}}" for each in steps]) if draw(st.booleans()) else None
    return Program("random", steps, output, most_steps=draw(st.sampled_from([8, 60, 10_000])), at_once=draw(st.integers(1, 4)))


# ---- the engine, with outcomes in random order, and a new engine now and then


class Shaken:
    def __init__(self, program: Program, random: Random) -> None:
        self.program, self.random = program, random
        self.journal: list[Event] = []
        self.over: set[tuple[str, int]] = set()  # attempts with an outcome
        self.peak = 0

    def run(self, crash: float) -> Finish | Fail:
        engine = Engine(self.program, GIVEN, Evaluation(SMALL))
        self.check(engine.start())
        while engine.ended is None:
            if self.random.random() < crash:
                engine = self.rebuilt(engine)
            calls = [asked for asked in engine.outstanding() if isinstance(asked, StartCall) or asked.is_retry]
            self.peak = max(self.peak, len(calls))
            event = self.outcome(self.random.choice(calls))
            self.journal.append(decode(json.loads(json.dumps(encode(event)))))
            self.check(engine.apply(event))
        assert self.rebuilt(engine).ended is not None
        return engine.ended

    def outcome(self, asked: StartCall | Wait) -> Event:
        if isinstance(asked, Wait):
            return TimerFired(asked.key)
        output, again, cost = answers(asked.target, asked.input, asked.attempt)
        self.over.add((asked.key, asked.attempt))
        if again is None:
            return Completed(asked.key, asked.attempt, output, cost)
        return Failed(asked.key, asked.attempt, "UNAVAILABLE", "BROKEN", "", again, cost)

    def check(self, commands: list[Command]) -> None:
        assert not [one for one in commands if isinstance(one, StartCall) and (one.key, one.attempt) in self.over]

    def rebuilt(self, engine: Engine) -> Engine:
        new = Engine(self.program, GIVEN, Evaluation(SMALL))
        new.replay(self.journal)
        assert new.outstanding() == engine.outstanding()
        assert new.outputs() == engine.outputs()
        assert new.progress() == engine.progress()
        self.check([*new.outstanding()])
        return new


def compare(program: Program, seed: int, crash: float) -> str:
    """How it ended: DONE or the reason."""
    plain, shaken = Plain(program), Shaken(program, Random(seed))
    try:
        expected, ways = plain.run(), set[tuple[str, str]]()
    except Stopped as stopped:
        expected, ways = None, stopped.ways
    ended = shaken.run(crash)
    assert shaken.peak <= program.at_once
    keys = [event.key for event in shaken.journal if isinstance(event, Completed)]
    assert len(keys) == len(set(keys))
    if isinstance(ended, Fail):
        reason = ended.error.reason
        assert (reason, ended.error.step_id) in ways or (reason == "TOO_MANY_STEPS" and plain.calls > program.most_steps)
        return reason
    assert not ways
    assert plain.calls <= program.most_steps
    assert settled(ended.output) == settled(expected)
    return "DONE"


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(programs(), st.integers(0, 1 << 30), st.sampled_from([0.0, 0.1, 1.0]))
def test_the_engine_does_what_a_plain_interpreter_does(program: Program, seed: int, crash: float) -> None:
    compare(program, seed, crash)


def test_the_comparison_sees_every_way_to_end() -> None:
    """A test of the test: programs that all finish, or all fail in one way, would prove little."""
    seen: dict[str, int] = {}

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(programs())
    def look(program: Program) -> None:
        end = compare(program, 1, 0.0)
        seen[end] = seen.get(end, 0) + 1

    look()
    assert {"DONE", "STEP_FAILED", "BUDGET_EXHAUSTED", "TOO_MANY_STEPS", "LOOP_MAXIMUM", "NOT_A_LIST", "EXPRESSION_FAILED"} <= seen.keys()
    assert seen["DONE"] > 50


@pytest.mark.parametrize("mistake", ["order", "twice"])
def test_the_comparison_finds_a_broken_engine(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test of the test, too."""
    from gateway.program.calls import Calls
    from gateway.program.frames import MapFrame

    if mistake == "order":
        right = MapFrame.closed
        monkeypatch.setattr(MapFrame, "closed", lambda frame, machine, slot, last: right(frame, machine, -1 - slot, last))
    else:
        monkeypatch.setattr(Calls, "end", lambda calls, call: None)
    program = Program(
        "map",
        (
            model.Map(
                "m", model.Expression("input.list"), "it", (model.Call("c1", Kind.TOOL, "x", Template("${it}"), retry=model.Retry(3)),)
            ),
        ),
    )
    with pytest.raises(AssertionError):
        compare(program, 1, 0.5)
