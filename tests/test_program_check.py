"""What is said of a program before it runs."""

from typing import Any

import pytest

from gateway.program.bounds import Bound, bound
from gateway.program.check import Finding, check
from gateway.program.model import Call, Program, Template
from gateway.program.parse import parse_program
from gateway.types import Kind, Target

SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "limit": {"type": "integer"}, "how": {"enum": ["fast", "good"]}},
    "required": ["text"],
    "additionalProperties": False,
}
TARGETS = {
    target.scope: target
    for target in (
        Target(Kind.TOOL, "echo", read_only=True, cost=2.0),
        Target(Kind.TOOL, "send"),
        Target(Kind.INFER, "plan", cost=5.0, idempotent=True),
        Target(Kind.RETRIEVE, "docs", read_only=True, input_schema=SCHEMA),
    )
}


def call(step_id: str, value: object = None, **more: Any) -> dict[str, Any]:
    return {"id": step_id, "tool": "echo", "input": value, **more}


def made(*steps: dict[str, Any], **more: Any) -> Program:
    return parse_program({"program": "nearloop/v1", "name": "p", "steps": list(steps), **more})


def findings(*steps: dict[str, Any], **more: Any) -> list[Finding]:
    return check(made(*steps, **more), TARGETS)


def loop(*steps: dict[str, Any], condition: str = "loop.index < 2", **more: Any) -> dict[str, Any]:
    return {"id": "l", "while": condition, "maximum": 3, "steps": list(steps), **more}


def each(*steps: dict[str, Any], over: str = "input.list", item: str = "x") -> dict[str, Any]:
    return {"id": "m", "map": {"over": over, "as": item, "most": 4, "steps": list(steps)}}


A = call("a")


@pytest.mark.parametrize(
    ("steps", "path", "says"),
    [
        ([A, call("a")], "steps[1].id", "`a` is the id of another step"),
        ([A, loop(call("a"))], "steps[1].steps[0].id", "another step"),
        ([call("b", "${steps.b.output}")], "steps[0].input", "refers to itself, which is a cycle"),
        ([call("b", {"x": ["${steps.c.output}"]}), call("c")], "steps[0].input.x[0]", "`c` comes later, so this is a cycle"),
        ([A, call("b", "${steps.aa.output}")], "steps[1].input", "no step `aa`: did you mean `a`?"),
        ([loop(call("b", "${steps.l.output}"))], "steps[0].steps[0].input", "around this one"),
        ([loop(call("b", "${steps.c.output}"), call("c"))], "steps[0].steps[0].input", "`loop.last`"),
        ([loop(A), call("b", "${steps.a.output}")], "steps[1].input", "inside of `l`: from here only `steps.l.output`"),
        (
            [{"id": "p", "parallel": {"x": [A], "y": [call("b", "${steps.a.output}")]}}],
            "steps[0].parallel.y[0].input",
            "another branch",
        ),
        ([{"id": "p", "parallel": {"left": [A]}}, call("b", "${steps.p.output.lef}")], "steps[1].input", "did you mean `left`?"),
        ([A, call("b", "${steps.a.result}")], "steps[1].input", "only `output`"),
        ([A, call("b", "${a.output}")], "steps[1].input", "did you mean `steps.a.output`?"),
        ([call("b", "${inptu.x}")], "steps[0].input", "did you mean `input`?"),
        ([call("b", "${loop.index}")], "steps[0].input", "only inside of a loop"),
        ([loop(call("b", "${loop.idx}"))], "steps[0].steps[0].input", "loop.index and loop.last"),
        ([each(call("b", "${y}"))], "steps[0].map.steps[0].input", "no variable `y`"),
        ([each(A), call("b", "${x}")], "steps[1].input", "no variable `x`"),
        ([each(A, over="x")], "steps[0].map.over", "no variable `x`"),
        ([each(A, over="3")], "steps[0].map.over", "not a list"),
        ([each(A, over="[1,2,3,4,5]")], "steps[0].map.over", "has 5 items"),
        ([call("b", "${1 +}")], "steps[0].input", "is not CEL"),
        ([call("b", "${1 / 0}")], "steps[0].input", "division by zero"),
        ([call("b", "x", fallback="${steps.b.output}")], "steps[0].fallback", "itself"),
        ([{"id": "c", "if": "1", "then": [A]}], "steps[0].if", "neither true nor false"),
        ([{"id": "c", "if": "steps.c.output", "then": [A]}], "steps[0].if", "itself"),
        ([{"id": "c", "tool": "ecko"}], "steps[0].tool", "no target tool.ecko: did you mean `tool.echo`?"),
        ([{"id": "c", "agent": "plam", "messages": []}], "steps[0].agent", "did you mean `infer.plan`?"),
        (
            [{"id": "c", "agent": "plan", "messages": "${steps.c.output}", "tools": {"t": {"tool": "nope"}}}],
            "steps[0].tools.t.tool",
            "no target tool.nope",
        ),
    ],
)
def test_an_error(steps: list[dict[str, Any]], path: str, says: str) -> None:
    found = [finding for finding in findings(*steps) if finding.path == path]
    assert [finding.severity for finding in found] == ["error"]
    assert says in found[0].text


@pytest.mark.parametrize(
    ("steps", "path", "says"),
    [
        ([{"id": "c", "if": "false", "then": [A], "else": [call("b")]}], "steps[0].then", "never reached"),
        ([{"id": "c", "if": "1 < 2", "then": [A], "else": [call("b")]}], "steps[0].else", "never reached"),
        ([loop(A, condition="false")], "steps[0].steps", "never reached"),
        ([loop(A, condition="true")], "steps[0].while", "fails after 3 iterations"),
        ([A, call("b", "${steps[input.which].output}")], "steps[1].input", "computed"),
        ([{"id": "b", "tool": "send", "retry": {"attempts": 2}}], "steps[0].retry", "neither idempotent nor read-only"),
    ],
)
def test_a_warning(steps: list[dict[str, Any]], path: str, says: str) -> None:
    found = findings(*steps)
    assert [(finding.severity, finding.path) for finding in found] == [("warning", path)]
    assert says in found[0].text


def test_what_follows_a_loop_that_always_fails_is_never_reached() -> None:
    _, found = findings(loop(A, condition="true"), call("b"), call("c"))
    assert (found.severity, found.path, found.text) == ("warning", "steps[1]", "is never reached: `l` before it always fails")


def test_the_expressions_of_a_program_are_bounded_together() -> None:
    found = findings(*(call(f"a{index}", "${" + "1+" * 50 + "1}") for index in range(700)))
    assert [finding.severity for finding in found] == ["error"]
    assert "more than 65536 characters" in found[0].text


def test_what_is_right_is_not_complained_about() -> None:
    steps = [
        A,
        each(call("b", {"x": "${x}", "a": "${steps.a.output}"}), call("c", "${steps.b.output}")),
        {"id": "p", "parallel": {"left": [call("d", "${steps.m.output[0]}")], "right": [call("e", "${steps.a.output}")]}},
        loop(call("f", "${loop.last} ${loop.index} ${steps.p.output.left}"), condition="loop.last == null || loop.last.more"),
        {"id": "g", "if": "steps.l.output != null", "then": [call("h", "${steps.l.output}")]},
        {"id": "i", "infer": "plan", "input": "$${steps.zz}", "retry": {"attempts": 3}},
        loop(call("n"), condition="true", stop_quietly=True) | {"id": "k"},
    ]
    assert findings(*steps, output="${steps.g.output}") == []


def test_the_output_sees_the_steps_of_the_program_only() -> None:
    [found] = findings(loop(A), output={"x": "${steps.a.output}"})
    assert (found.path, "inside of `l`" in found.text) == ("output.x", True)


def test_a_field_that_the_input_schema_rules_out() -> None:
    schema = {"properties": {"question": {}}, "additionalProperties": False}
    [found] = findings(call("b", "${input.qestion}"), input=schema)
    assert "did you mean `question`?" in found.text


def test_without_targets_nothing_is_said_of_them() -> None:
    assert check(made({"id": "a", "tool": "who_knows", "retry": {"attempts": 3}})) == []


def test_a_run_cannot_be_a_step() -> None:
    [found] = check(Program("p", (Call("a", Kind.RUN, "other", Template({})),)))
    assert "a run cannot be a step of a run" in found.text


@pytest.mark.parametrize(
    ("value", "path", "says"),
    [
        ("plain", "input", "must be object"),
        ("a ${input.x}", "input", "must be object"),
        ({}, "input", "must have `text`"),
        ({"text": 5}, "input.text", "must be string"),
        ({"text": "a", "limt": 5}, "input.limt", "did you mean `limit`?"),
        ({"text": "${input.x}", "limit": "5"}, "input.limit", "must be integer"),
        ({"text": "a", "limit": 1.5}, "input.limit", "must be integer"),
        ({"text": "a", "limit": True}, "input.limit", "must be integer"),
        ({"text": "a", "limit": "n ${input.x}"}, "input.limit", "must be integer"),
        ({"text": "a", "how": "slow"}, "input.how", "must be one of 'fast', 'good'"),
    ],
)
def test_an_input_that_can_never_fit(value: object, path: str, says: str) -> None:
    [found] = findings({"id": "a", "retrieve": "docs", "input": value})
    assert (found.severity, found.path) == ("error", f"steps[0].{path}")
    assert says in found.text


@pytest.mark.parametrize(
    "value",
    [
        "${input.all}",
        {"text": "${input.x}"},
        {"text": "a ${input.x}", "limit": "${input.y}", "how": "${input.z}"},
        {"text": "", "limit": 2.0},
    ],
)
def test_an_input_that_may_fit(value: object) -> None:
    assert findings({"id": "a", "retrieve": "docs", "input": value}) == []


def test_the_bound_multiplies_what_repeats() -> None:
    inner = loop(call("a", retry={"attempts": 2}), {"id": "b", "infer": "plan"})  # 3 x (1 + 1) steps, 3 x (2 x 2 + 5) units
    choose = {"id": "c", "if": "input.x", "then": [call("d")], "else": [call("e"), {"id": "f", "tool": "send"}]}  # 2 steps, 3 units
    parallel = {"id": "p", "parallel": {"x": [call("g")], "y": [call("h")]}}  # 2 steps, 4 units
    assert bound(made(each(inner)), TARGETS) == Bound(24, 108.0)
    assert bound(made(choose, parallel), TARGETS) == Bound(4, 7.0)
    assert bound(made(choose, parallel)) == Bound(4, 4.0)


def test_the_bound_of_an_agent() -> None:
    agent = {"id": "a", "agent": "plan", "messages": [], "tools": {"t": {"tool": "echo"}}, "budget": {"iterations": 4}}
    assert bound(made(agent), TARGETS) == Bound(8, 28.0)
    assert bound(made(agent | {"budget": {"iterations": 4, "cost": 10}}), TARGETS) == Bound(8, 17.0)


def test_a_bound_above_the_limit_is_a_warning() -> None:
    [found] = findings(each(A, call("b")), limits={"steps": 7})
    assert (found.severity, found.path) == ("warning", "limits.steps")
    assert "up to 8 steps" in found.text
