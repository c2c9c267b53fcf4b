"""Texts and plain values to programs, and back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from program_strategies import TARGETS, programs

from gateway.program.check import check
from gateway.program.dump import dump_program
from gateway.program.model import Agent, Budget, Call, Choose, Expression, Loop, Map, Parallel, Program, Retry, Template, Tool
from gateway.program.parse import load_text, parse_program
from gateway.program.problems import ProgramInvalid, RunFailed
from gateway.program.text import SUFFIXES
from gateway.types import Kind, Lane

EXAMPLES = sorted(path for path in (Path(__file__).parent / "programs").iterdir() if path.suffix in SUFFIXES)


def problems(data: object) -> dict[str, str]:
    with pytest.raises(ProgramInvalid) as raised:
        parse_program(data)
    return dict(raised.value.problems)


def program(*steps: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"program": "nearloop/v1", "name": "p", "steps": list(steps), **more}


def call(step_id: str = "a", **more: Any) -> dict[str, Any]:
    return {"id": step_id, "tool": "echo", **more}


@given(programs())
def test_a_program_survives_being_written_down(made: Program) -> None:
    plain = dump_program(made)
    assert parse_program(plain) == made
    assert load_text(json.dumps(plain), "p.json") == made
    assert load_text(yaml.safe_dump(plain, allow_unicode=True), "p.yaml") == made


@given(programs())
def test_random_programs_are_valid(made: Program) -> None:
    assert [finding for finding in check(made, TARGETS) if finding.severity == "error"] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_valid_and_survives_being_written_down(path: Path) -> None:
    made = load_text(path.read_text(), path.name)
    assert check(made) == []
    assert parse_program(dump_program(made)) == made


def test_every_field_of_an_agent_survives() -> None:
    tools = {"find": Tool(Kind.RETRIEVE, "docs", "finds"), "run": Tool(Kind.INFER, "small")}
    agent = Agent("a", "plan", Template([{"role": "user"}]), tools, Budget(3, 4.5, 100, 2.0))
    made = Program("p", (agent, replace(agent, id="b", budget=Budget())), input_schema={"type": "object"}, metadata={"team": "x"})
    assert parse_program(dump_program(made)) == made


def test_every_form_of_step() -> None:
    text = """
program: nearloop/v1
name: all
steps:
  - {id: a, infer: plan, input: {x: 1}, lane: batch, timeout: 2, retry: {attempts: 2, factor: 3}, fallback: null}
  - id: b
    parallel:
      left: [{id: c, tool: echo}]
      right: [{id: d, retrieve: docs}]
  - id: e
    map: {over: "${input.list}", as: x, at_once: 2, most: 5, steps: [{id: f, tool: echo, input: "${x}"}]}
  - {id: g, if: true, then: [], else: [{id: h, tool: echo}]}
  - {id: i, while: loop.index < 2, maximum: 3, stop_quietly: true, steps: [{id: j, tool: echo}]}
limits: {steps: 50, at_once: 2}
output: null
"""
    made = load_text(text, "all.yml")
    echo = Template({})
    assert made.steps == (
        Call("a", Kind.INFER, "plan", Template({"x": 1}), Lane.BATCH, 2.0, Retry(2, factor=3.0), Template(None)),
        Parallel("b", {"left": (Call("c", Kind.TOOL, "echo", echo),), "right": (Call("d", Kind.RETRIEVE, "docs", echo),)}),
        Map("e", Expression("input.list"), "x", (Call("f", Kind.TOOL, "echo", Template("${x}")),), 2, 5),
        Choose("g", Expression("true"), (), (Call("h", Kind.TOOL, "echo", echo),)),
        Loop("i", Expression("loop.index < 2"), 3, (Call("j", Kind.TOOL, "echo", echo),), stop_quietly=True),
    )
    assert (made.most_steps, made.at_once, made.output) == (50, 2, Template(None))


def test_all_mistakes_are_said_at_once_with_their_places() -> None:
    text = """
program: nearloop/v2
nme: x
steps:
  - {id: 1a, toool: x}
  - {id: loop, tool: x, inputs: {}, retry: {attempts: 0, atempts: 3}, lane: interactve}
  - {id: w, while: "true", steps: []}
  - {id: m, map: {over: input, as: steps, steps: [{id: x, tool: 5}], most: 1.5}}
  - {id: b, tool: x, if: true}
  - 5
limits: {steps: 100000}
"""
    with pytest.raises(ProgramInvalid) as raised:
        load_text(text, "bad.yaml")
    found = dict(raised.value.problems)
    assert "did you mean `name`?" in found["nme"]
    assert "`nearloop/v1`" in found["program"]
    assert "is missing" in found["name"]
    assert "did you mean `tool`?" in found["steps[0]"]
    assert "word of the language" in found["steps[1].id"]
    assert "did you mean `input`?" in found["steps[1].inputs"]
    assert "did you mean `attempts`?" in found["steps[1].retry.atempts"]
    assert "from 1 to 20" in found["steps[1].retry.attempts"]
    assert "did you mean `interactive`?" in found["steps[1].lane"]
    assert "not bounded" in found["steps[2].maximum"]
    assert "has no steps" in found["steps[2].steps"]
    assert "word of the language" in found["steps[3].map.as"]
    assert "must be a text" in found["steps[3].map.steps[0].tool"]
    assert "whole number" in found["steps[3].map.most"]
    assert "both" in found["steps[4]"]
    assert "must be a mapping" in found["steps[5]"]
    assert "from 1 to 1000" in found["limits.steps"]
    assert f"{len(raised.value.problems)} mistakes" in str(raised.value)
    assert all(f"  - {path}: " in str(raised.value) for path in found)


@pytest.mark.parametrize(
    ("data", "path", "says"),
    [
        (None, "", "must be a mapping, not nothing"),
        ([], "", "must be a mapping, not a list"),
        (program(), "steps", "has no steps"),
        (program(call("a" * 65)), "steps[0].id", "1 to 64"),
        (program(call("a-b")), "steps[0].id", "1 to 64"),
        (program(call("in")), "steps[0].id", "word of the language"),
        (program({"tool": "echo"}), "steps[0].id", "is missing"),
        (program(call(timeout=-1)), "steps[0].timeout", "from 0.001"),
        (program(call(timeout=float("nan"))), "steps[0].timeout", "from 0.001"),
        (program(call(timeout=True)), "steps[0].timeout", "must be a number"),
        (program(call(input=float("inf"))), "steps[0].input", "not finite"),
        (program(call(input={"a": [b"x"]})), "steps[0].input.a[0]", "not JSON"),
        (program(call(input={1: 2})), "steps[0].input", "not a string"),
        (program({"id": "m", "map": {"over": "[]", "steps": [call()]}}), "steps[0].map.as", "is missing"),
        (program({"id": "p", "parallel": {}}), "steps[0].parallel", "no branches"),
        (program({"id": "p", "parallel": {"a b": [call()]}}), "steps[0].parallel.a b", "1 to 64"),
        (program({"id": "a", "agent": "m", "messages": [], "tools": {"t": {}}}), "steps[0].tools.t", "needs one of"),
        (program({"id": "a", "agent": "m", "messages": [], "budget": {"iterations": 0}}), "steps[0].budget.iterations", "from 1"),
        (program(*(call(f"a{i}") for i in range(1001))), "steps", "at most 1000"),
        (program(call(), regions="home"), "regions", "must be a list"),
    ],
)
def test_a_mistake(data: object, path: str, says: str) -> None:
    assert says in problems(data)[path]


@pytest.mark.parametrize(
    ("text", "name", "says"),
    [
        ("a: &x 1\nb: *x", "a.yaml", "aliases are not supported, at line 2, column 4"),
        ("a: 1\na: 2", "a.yaml", "the key `a` is there twice"),
        ("a:\n  b: {c: 1, c: 2}", "a.yaml", "the key `c` is there twice"),
        ('{"a": {"b": 1, "b": 2}}', "a.json", "the key `b` twice"),
        ("[" * 100_000, "a.json", "nests more than 64"),
        ("[" * 100_000, "a.yaml", "nests more than 64"),
        ("- " * 500, "a.yaml", "nests more than 64"),
        ("[" * 65 + "]" * 65, "a.json", "nests more than 64"),
        ("a: [", "a.yml", "is not YAML"),
        ("{", "a.json", "is not JSON"),
        ("1: 2", "a.yaml", "a key is not a string"),
        ("? [a]\n: 1", "a.yaml", "a key is not a string"),
        ("a: .nan", "a.yaml", "not finite"),
        ("NaN", "a.json", "NaN is not allowed"),
        ("a: !!python/object/apply:os.system [x]", "a.yaml", "tags are not supported"),
        ("a: !!timestamp 2020-01-01", "a.yaml", "tags are not supported"),
        ("a: !!bool x", "a.yaml", "tags are not supported"),
        ("a: 1\n---\nb: 2", "a.yaml", "is not YAML"),
        ("a: \x00", "a.yaml", "is not YAML"),
        ("a: " + "9" * 5000, "a.yaml", "a number of 5000 digits"),
        ('{"a": ' + "9" * 5000 + "}", "a.json", "a number of 5000 digits"),
        ("x" * 1_100_000, "a.json", "larger than"),
        ("", "a.yaml", "must be a mapping"),
        ("{}", "a.toml", "ends in none of"),
    ],
)
def test_a_text_that_is_refused(text: str, name: str, says: str) -> None:
    with pytest.raises(ProgramInvalid) as raised:
        load_text(text, name)
    assert says in str(raised.value)


def test_yaml_values_are_what_they_look_like() -> None:
    head = "program: nearloop/v1\nname: p\nsteps:\n- id: a\n  tool: echo\n"
    text = head + "  input: [yes, on, 010, 1:30, 2020-01-01, 0x1f, 1e3, ~, true, =, <<]\n"
    made = load_text(text, "p.yaml").steps[0]
    assert isinstance(made, Call)
    assert made.input.value == ["yes", "on", 10, "1:30", "2020-01-01", 31, 1000.0, None, True, "=", "<<"]


def test_problems_and_failures_read_well() -> None:
    assert str(ProgramInvalid([("", "is odd")])) == "the program has 1 mistake\n  - is odd"
    failed = RunFailed("think", "no answer", "AGENT_NONSENSE")
    assert (str(failed), failed.reason) == ("think: no answer", "AGENT_NONSENSE")
