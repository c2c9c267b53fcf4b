"""Programs as nearloop.v1.Program messages."""

import dataclasses
import math

import pytest
from google.protobuf import struct_pb2, text_format
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from program_strategies import programs

from gateway.edge.program_proto import field_path, program_from_proto, program_to_proto
from gateway.program import model
from gateway.program.check import check
from gateway.program.dump import dump_program
from gateway.program.model import Agent, Budget, Call, Choose, Expression, Json, Loop, Map, Parallel, Program, Retry, Template, Tool
from gateway.program.parse import parse_program
from gateway.program.problems import ProgramInvalid
from gateway.types import Kind, Lane
from nearloop.v1 import program_pb2 as pb

ECHO = Call("a", Kind.TOOL, "echo", Template({}))


def read(text: str) -> Program:
    return program_from_proto(text_format.Parse(text, pb.Program()))


def problems(text: str) -> list[tuple[str, str]]:
    with pytest.raises(ProgramInvalid) as raised:
        read(text)
    return list(raised.value.problems)


def over_the_wire(program: Program) -> Program:
    return program_from_proto(pb.Program.FromString(program_to_proto(program).SerializeToString()))


@given(programs())
def test_random_programs_mean_the_same_in_both_forms(made: Program) -> None:
    assert over_the_wire(made) == parse_program(dump_program(made)) == made


def test_every_field_of_every_node_survives() -> None:
    tools = {"find": Tool(Kind.RETRIEVE, "docs", "finds"), "run": Tool(Kind.INFER, "small"), "act": Tool(Kind.TOOL, "act")}
    body = (dataclasses.replace(ECHO, id="body"),)
    made = Program(
        "all",
        (
            Call(
                "c", Kind.INFER, "plan", Template([1, 1.5, None, True, "x", {}]), Lane.BATCH, 1.1, Retry(2, 0.05, 7.3, 1.5), Template(None)
            ),
            Call("d", Kind.RETRIEVE, "docs", Template(None), Lane.INTERACTIVE, retry=Retry(3)),
            Parallel("p", {"left": body, "right": (*body, ECHO)}),
            Map("m", Expression("input.list"), "it", body, 3, 7),
            Choose("i", Expression("true"), (), body),
            Loop("l", Expression("loop.index < 2"), 3, body, stop_quietly=True),
            Agent("g", "plan", Template([{"role": "user"}]), tools, Budget(3, 4.5, 100, 2.25)),
            Agent("h", "plan", Template("${input}"), {}),
        ),
        output=Template(None),
        input_schema={"type": "object", "minProperties": 1},
        most_steps=50,
        at_once=2,
        regions=("iad", "home"),
        description="all of it",
        metadata={"team": "x"},
    )
    assert over_the_wire(made) == made
    nodes = {type(node) for node in made.steps}
    assert nodes == set(model.Node.__args__), "a new kind of node needs its place here"
    for part in (made, *made.steps, *tools.values()):
        for field in dataclasses.fields(part):
            assert any(
                getattr(other, field.name) != field.default for other in (made, *made.steps, *tools.values()) if type(other) is type(part)
            ), f"{type(part).__name__}.{field.name} is not tried"


def test_order_is_kept_where_it_means_something() -> None:
    blocks = {name: (dataclasses.replace(ECHO, id=name),) for name in ("z", "b", "y", "a")}
    tools = {name: Tool(Kind.TOOL, "echo") for name in ("z", "b", "y", "a")}
    made = over_the_wire(Program("p", (Parallel("p", blocks), Agent("g", "plan", Template([]), tools))))
    parallel, agent = made.steps
    assert isinstance(parallel, Parallel)
    assert isinstance(agent, Agent)
    assert [*parallel.branches] == [*agent.tools] == ["z", "b", "y", "a"]
    given = dict.fromkeys(reversed("abcdefghij"), 1)
    message = program_to_proto(Program("p", (ECHO,), Template({"of": given}), {"properties": given}, metadata={"b": "", "a": ""}))
    made = program_from_proto(message)
    assert made.output is not None
    assert made.input_schema is not None
    for fields in (made.output.value["of"], made.input_schema["properties"]):
        assert [*fields] == sorted(given), "protobuf has no order of fields: one that is always the same"
    assert [*made.metadata] == ["a", "b"]


def test_what_is_not_set_has_its_default() -> None:
    assert read('name: "p" steps { id: "a" call { tool: "echo" } }') == Program("p", (ECHO,))


def test_a_fallback_of_null_is_one() -> None:
    with_null, without = read("""
        name: "p"
        steps { id: "a" call { tool: "echo" fallback { null_value: NULL_VALUE } } }
        steps { id: "b" call { tool: "echo" } }
    """).steps
    assert isinstance(with_null, Call)
    assert isinstance(without, Call)
    assert (with_null.fallback, without.fallback) == (Template(None), None)


@pytest.mark.parametrize(("number", "becomes"), [(3.0, 3), (-2.0, -2), (2.0**53, 2**53), (0.5, 0.5), (1e300, 1e300), (-0.0, -0.0)])
def test_a_number_without_a_fraction_is_an_integer(number: float, becomes: Json) -> None:
    message = pb.Program(name="p", output=struct_pb2.Value(number_value=number))
    message.steps.add(id="a").call.tool = "echo"
    output = program_from_proto(message).output
    assert output is not None
    assert repr(output.value) == repr(becomes)


@given(st.floats(0.001, 7 * 24 * 3600.0))
def test_times_survive_to_the_nanosecond(seconds: float) -> None:
    made = over_the_wire(Program("p", (dataclasses.replace(ECHO, timeout_s=seconds),))).steps[0]
    assert isinstance(made, Call)
    assert made.timeout_s is not None
    assert abs(made.timeout_s - seconds) <= 1e-9
    rounded = round(seconds, 6)
    assert over_the_wire(Program("p", (dataclasses.replace(ECHO, timeout_s=max(rounded, 0.001)),))).steps[0].timeout_s == max(
        rounded, 0.001
    )


def test_a_whole_number_that_a_double_cannot_hold_is_refused() -> None:
    made = Program("p", (Map("m", Expression("[]"), "it", (dataclasses.replace(ECHO, input=Template({"a": [2**53 + 1]})),)),))
    with pytest.raises(ProgramInvalid) as raised:
        program_to_proto(made)
    assert [path for path, _ in raised.value.problems] == ["steps[0].map.steps[0].call.input.a[0]"]
    assert "2^53" in raised.value.problems[0][1]


def test_all_mistakes_are_said_at_once_in_terms_of_the_message() -> None:
    found = problems("""
        name: "a b"
        input_schema { fields { key: "a" value { } } }
        steps { id: "1a" call { tool: "a b" input { list_value { values { } } } lane: "interactve" timeout { seconds: -1 } } }
        steps { id: "r" call { infer: "m" retry { attempts: 0 first { seconds: 1 nanos: -5 } most { seconds: -3 } factor: 0.5 } } }
        steps { call { } }
        steps { id: "f" }
        steps { id: "p" parallel {
            branches { name: "x y" steps { id: "e" loop { condition: "true" } } }
            branches { name: "two" steps { id: "t" call { tool: "t" } } }
            branches { name: "two" steps { id: "u" call { tool: "" } } }
        } }
        steps { id: "m" map { item: "steps" most: 0 steps {
            id: "c" choose { then { id: "x" call { tool: "t" timeout { } } } otherwise { } }
        } } }
        steps { id: "g" agent {
            model: "m"
            tools { name: "t" } tools { name: "a b" tool: "" } tools { name: "t" tool: "x" }
            budget { iterations: 0 wall { } }
        } }
        output { number_value: nan }
        limits { steps: 0 at_once: 100 }
        regions: "home" regions: "no good"
    """)
    paths = dict(found)
    assert len(found) == len(paths), "each mistake is said once"
    assert paths.keys() == {
        "name",
        "input_schema.a",
        "steps[0].id",
        "steps[0].call.tool",
        "steps[0].call.input[0]",
        "steps[0].call.lane",
        "steps[0].call.timeout",
        "steps[1].call.retry.attempts",
        "steps[1].call.retry.first",
        "steps[1].call.retry.most",
        "steps[1].call.retry.factor",
        "steps[2].id",
        "steps[2].call",
        "steps[3]",
        "steps[4].parallel.branches[0]",
        "steps[4].parallel.branches[0].steps[0].loop.maximum",
        "steps[4].parallel.branches[0].steps[0].loop.steps",
        "steps[4].parallel.branches[2].name",
        "steps[4].parallel.branches[2].steps[0].call.tool",
        "steps[5].map.over",
        "steps[5].map.item",
        "steps[5].map.most",
        "steps[5].map.steps[0].choose.condition",
        "steps[5].map.steps[0].choose.then[0].call.timeout",
        "steps[5].map.steps[0].choose.otherwise[0]",
        "steps[5].map.steps[0].choose.otherwise[0].id",
        "steps[6].agent.messages",
        "steps[6].agent.tools[0]",
        "steps[6].agent.tools[1]",
        "steps[6].agent.tools[1].tool",
        "steps[6].agent.tools[2].name",
        "steps[6].agent.budget.iterations",
        "steps[6].agent.budget.wall",
        "output",
        "limits.steps",
        "limits.at_once",
        "regions[1]",
    }
    assert "null_value" in paths["steps[0].call.input[0]"]
    assert "did you mean `interactive`?" in paths["steps[0].call.lane"]
    assert "needs one of call, parallel" in paths["steps[3]"]
    assert "not bounded" in paths["steps[4].parallel.branches[0].steps[0].loop.maximum"]


def test_an_empty_message_is_refused() -> None:
    assert dict(problems("")) == {"name": "is missing", "steps": "has no steps"}


def test_findings_of_the_checker_can_be_told_in_terms_of_the_message() -> None:
    message = text_format.Parse(
        """
        name: "p"
        steps { id: "c" choose { condition: "nobody" otherwise { id: "m" map { over: "5" item: "x" steps {
            id: "a" call { tool: "t" input { struct_value { fields { key: "of" value { string_value: "${y}" } } } } } } } } } }
        """,
        pb.Program(),
    )
    found = [field_path(message, finding.path) for finding in check(program_from_proto(message))]
    assert found == [
        "steps[0].choose.condition",
        "steps[0].choose.otherwise[0].map.over",
        "steps[0].choose.otherwise[0].map.steps[0].call.input.of",
    ]


def nested_loops(levels: int) -> pb.Program:
    message = pb.Program(name="p")
    steps = message.steps
    for level in range(levels):
        loop = steps.add(id=f"l{level}").loop
        loop.condition, loop.maximum = "false", 1
        steps = loop.steps
    steps.add(id="a").call.tool = "echo"
    return message


def nested_value(levels: int, is_list: bool) -> pb.Program:
    value = struct_pb2.Value(string_value="x")
    for _ in range(levels):
        outer = struct_pb2.Value()
        (outer.list_value.values.add() if is_list else outer.struct_value.fields["a"]).CopyFrom(value)
        value = outer
    message = nested_loops(0)
    message.output.CopyFrom(value)
    return message


def test_depth_is_limited_as_in_texts() -> None:
    for message in (nested_loops(5), nested_value(40, is_list=True), nested_value(40, is_list=False)):
        assert program_from_proto(message).name == "p"
    for message in (nested_loops(40), nested_loops(500), *(nested_value(levels, of) for levels in (70, 500) for of in (True, False))):
        with pytest.raises(ProgramInvalid, match="nests more than 64 deep"):
            program_from_proto(message)


def test_parsers_of_protobuf_have_a_limit_of_their_own() -> None:
    pb.Program.FromString(nested_value(33, is_list=False).SerializeToString())
    with pytest.raises(DecodeError):
        pb.Program.FromString(nested_value(34, is_list=False).SerializeToString())


@given(
    st.recursive(st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=2))
)
def test_a_number_that_is_not_finite_is_never_let_through(value: object) -> None:
    def proto(item: object) -> struct_pb2.Value:
        if isinstance(item, list):
            return struct_pb2.Value(list_value=struct_pb2.ListValue(values=[proto(one) for one in item]))
        if isinstance(item, bool):
            return struct_pb2.Value(bool_value=item)
        if isinstance(item, float):
            return struct_pb2.Value(number_value=item)
        return struct_pb2.Value(string_value=item) if isinstance(item, str) else struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)

    def is_finite(item: object) -> bool:
        return all(map(is_finite, item)) if isinstance(item, list) else not isinstance(item, float) or math.isfinite(item)

    message = nested_loops(0)
    message.output.CopyFrom(proto(value))
    if is_finite(value):
        assert program_from_proto(message).output == Template(value)
    else:
        with pytest.raises(ProgramInvalid, match="not finite"):
            program_from_proto(message)
