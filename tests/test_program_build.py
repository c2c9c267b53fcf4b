"""Programs written in Python: references render to CEL that means the same, and what cannot be said is refused where it is written."""

import copy
import operator
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from program_examples import execute
from program_strategies import programs

from gateway.program.build import Budget, Kind, Lane, Program, ProgramInvalid, Ref, Retry, Tool, if_else, literal, null
from gateway.program.expressions import compile_expression, compile_template, evaluate, render
from gateway.program.model import Agent, Call, Choose, Expression, Loop, Map, Parallel, Template
from gateway.program.model import Program as Model
from gateway.program.parse import load_text
from gateway.program.refs import cel, to_ref
from gateway.program.write import to_json, to_yaml

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
TEXT = st.text(max_size=12) | st.text(st.sampled_from("$${}'\"\\\n\r\t \x00\u2028aé😀"), max_size=12)
INPUT = Program("p").input


def value(ref: Any, given: Any = None) -> Any:
    return evaluate(compile_expression(cel(ref)), {"input": given})


# --- references render to CEL ---


@pytest.mark.parametrize(
    ("ref", "text"),
    [
        (INPUT.question, "input.question"),
        (INPUT.hits[0]["id"], "input.hits[0].id"),
        (INPUT["a b"], "input['a b']"),
        (INPUT["in"], "input['in']"),
        (INPUT.hits[INPUT.n - 1], "input.hits[input.n - 1]"),
        ((INPUT.a + 1) * 2 - -INPUT.b, "(input.a + 1) * 2 - -input.b"),
        (1 - (2 - INPUT.a), "1 - (2 - input.a)"),
        (1 - INPUT.a - 2, "1 - input.a - 2"),
        (-(1 - INPUT.a), "-(1 - input.a)"),
        (literal(-1).as_text(), "string(-1)"),
        ((INPUT.a == 1) == (INPUT.b == 2), "(input.a == 1) == (input.b == 2)"),
        ((INPUT.a > 0) & ((INPUT.b > 0) | ~INPUT.c), "input.a > 0 && (input.b > 0 || !input.c)"),
        (~(INPUT.a & INPUT.b), "!(input.a && input.b)"),
        (INPUT.a > literal(3), "input.a > 3"),
        ("a" + INPUT.b, "'a' + input.b"),
        (INPUT.b.is_in(["x", "it's"]), "input.b in ['x', 'it\\'s']"),
        (INPUT.has("b"), "has(input.b)"),
        (INPUT.has("a b"), "'a b' in input"),
        (INPUT.a.starts_with("x") & INPUT.a.matches("^x+$"), "input.a.startsWith('x') && input.a.matches('^x+$')"),
        (if_else(INPUT.a, 1, if_else(INPUT.b, 2, 3)).size(), "(input.a ? 1 : (input.b ? 2 : 3)).size()"),
        (INPUT.hits.filter(lambda hit: hit.score > 0.5).map(lambda hit: {"id": hit.id}).size(), None),
        (INPUT.a == null, "input.a == null"),
        (INPUT._private, "input._private"),
    ],
)
def test_a_reference_is_cel(ref: Ref, text: str | None) -> None:
    assert cel(ref) == (text or "input.hits.filter(hit, hit.score > 0.5).map(hit, {'id': hit.id}).size()")
    compile_expression(cel(ref))


@given(JSON)
def test_a_literal_is_its_value(given: Any) -> None:
    assert value(literal(given)) == given


@given(TEXT)
def test_a_literal_text_stays_what_it_is_inside_of_a_template(text: str) -> None:
    assert render(compile_template(f"<{literal(text)}>"), {}) == f"<{text}>"


@given(TEXT, st.integers(0, 5))
def test_any_field_can_be_named(name: str, number: int) -> None:
    assert value(INPUT[name], {name: number}) == number
    assert value(INPUT.has(name), {name: number}) is True
    assert value(INPUT.has(name), {}) is False


@st.composite
def both(draw: st.DrawFn, depth: int = 4) -> tuple[Any, Any, str]:
    """An expression as Python values and as Refs, and its type."""
    kind = draw(st.sampled_from(["int", "bool"]))
    if depth == 0:
        if kind == "bool":
            return True, INPUT.yes, kind
        number = draw(st.integers(-5, 5))
        return (number, to_ref(number), kind) if draw(st.booleans()) else (7, INPUT.seven, kind)
    (a, left, a_kind), (b, right, b_kind) = draw(both(depth - 1)), draw(both(depth - 1))
    if a_kind == b_kind == "int":
        if kind == "int":
            if draw(st.booleans()):
                return -a, -left, kind
            of = draw(st.sampled_from([operator.add, operator.sub, operator.mul]))
            return of(a, b), of(left, right), kind
        of = draw(st.sampled_from([operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge]))
        return of(a, b), of(left, right), kind
    if a_kind == b_kind == "bool":
        if draw(st.booleans()):
            return not a, ~left, "bool"
        of = draw(st.sampled_from([operator.and_, operator.or_, operator.eq]))
        return of(a, b), of(left, right), "bool"
    if a_kind == "bool":
        return (b if a else 0), if_else(left, right, 0), "int"
    return (a if b else 0), if_else(right, left, 0), "int"


@given(both())
def test_operators_bind_as_in_python(expression: tuple[Any, Any, str]) -> None:
    expected, ref, _ = expression
    assert value(ref, {"yes": True, "seven": 7}) == expected


def test_macros_work_on_lists() -> None:
    given = {"hits": [{"id": "a", "score": 1}, {"id": "b", "score": 3}], "least": 2}
    assert value(INPUT.hits.map(lambda hit: hit.id), given) == ["a", "b"]
    assert value(INPUT.hits.filter(lambda hit: hit.score >= INPUT.least), given) == [{"id": "b", "score": 3}]
    assert value(INPUT.hits.exists(lambda hit: hit.id == "b"), given) is True
    assert value(INPUT.hits.all(lambda hit: hit.id == "b"), given) is False
    assert value(INPUT.hits.exists_one(lambda hit: hit.score > 0), given) is False
    nested = INPUT.hits.map(lambda hit: INPUT.hits.filter(lambda other: other.score > hit.score).size())
    assert value(nested, given) == [1, 0]


def test_the_item_of_a_macro_hides_nothing_that_it_uses() -> None:
    given = {"hits": [{"n": 1}, {"n": 2}], "n": 2}
    assert value(INPUT.hits.filter(lambda input: input.n == INPUT.n), given) == [{"n": 2}]
    twice = INPUT.hits.map(lambda hit: (lambda outer: INPUT.hits.filter(lambda hit: hit.n > outer.n).size())(hit))
    assert value(twice, given) == [1, 0]
    assert value(INPUT.hits.map(lambda é: é.n), given) == [1, 2]
    p = Program("p")
    with p.map("m", p.input.hits, item="hit") as each:
        inner = p.input.hits.filter(lambda hit: hit.n > each.item.n)
        p.tool("t", "size", {"larger": inner})
    output, _ = execute(p.build(), given, {"tool.size": lambda given: len(given["larger"])})
    assert output == [1, 0]


# --- what Python would have to know a value for ---


def test_what_only_a_run_knows_is_refused_with_what_to_write_instead() -> None:
    def loops() -> None:
        for _ in INPUT.hits:
            pass

    refused: list[tuple[Callable[[], object], str]] = [
        (lambda: bool(INPUT.a), r"p\.when"),
        (lambda: not INPUT.a, "`~`"),
        (lambda: INPUT.a and INPUT.b, "`&`"),
        (lambda: 0 < INPUT.a < 3, "a < b < c"),
        (lambda: 1 if INPUT.a == 1 else 2, "if_else"),
        (loops, r"p\.map"),
        (lambda: [*INPUT.hits], r"p\.map"),
        (lambda: len(INPUT.hits), r"\.size\(\)"),
        (lambda: "a" in INPUT.hits, "is_in"),
        (lambda: INPUT.hits[1:], "slices"),
        (lambda: f"{INPUT.price:.2f}", "only a run has"),
        (lambda: (INPUT.a > 0) & 1, "in parentheses"),
        (lambda: INPUT.a > 0 & INPUT.b, "in parentheses"),
        (lambda: {INPUT.a: 1}, "unhashable"),
        (lambda: literal({1, 2}), "set is no JSON"),
        (lambda: literal({1: 2}), "key"),
        (lambda: INPUT.a(), "not callable"),
    ]
    for attempt, says in refused:
        with pytest.raises(TypeError, match=says):
            attempt()
    with pytest.raises(ValueError, match="not finite"):
        literal(float("nan"))
    assert not hasattr(INPUT, "__array__"), "a protocol of Python is no field"
    assert cel(copy.copy(INPUT.a)) == "input.a"


# --- programs ---


def test_every_node_and_option() -> None:
    p = Program(
        "all",
        description="all of it",
        input_schema={"type": "object"},
        regions=["iad"],
        most_steps=900,
        at_once=2,
        metadata={"team": "x"},
    )
    a = p.infer("a", "plan", lane="batch", timeout_s=2, retry=Retry(2, factor=3.0), fallback=None, text=p.input.text)
    p.retrieve("b", "docs", {"timeout_s": 1, "near": [a.vector, f"{a.text}!"]}, retry=2, lane=Lane.INTERACTIVE, fallback={"hits": [a]})
    with p.parallel("c") as c:
        with c.branch("left"):
            p.tool("d", "echo")
        with c.branch("right"), p.map("e", p.input.list, item="x", at_once=2, most=5) as e:
            p.tool("f", "echo", e.item)
    with p.when("g", c.output.left == null) as g:
        p.tool("h", "echo", None)
    with g.otherwise(), p.loop("i", lambda loop: loop.index < 2, maximum=3, stop_quietly=True) as i:
        p.tool("j", "echo", last=i.last)
    p.agent("k", "plan", messages=[{"role": "user", "content": p.input.text}], tools={"t": Tool(Kind.TOOL, "echo", "says it")})
    p.agent("l", "plan", messages=p.input.messages, tools={}, budget=Budget(iterations=2, cost=3.0))
    p.output(g=g.output, size=c.output.right.size())
    echo = Template({})
    message = {"role": "user", "content": "${input.text}"}
    assert p.build() == Model(
        "all",
        (
            Call("a", Kind.INFER, "plan", Template({"text": "${input.text}"}), Lane.BATCH, 2.0, Retry(2, factor=3.0), Template(None)),
            Call(
                "b",
                Kind.RETRIEVE,
                "docs",
                Template({"timeout_s": 1, "near": ["${steps.a.output.vector}", "${steps.a.output.text}!"]}),
                Lane.INTERACTIVE,
                None,
                Retry(2),
                Template({"hits": ["${steps.a.output}"]}),
            ),
            Parallel(
                "c",
                {
                    "left": (Call("d", Kind.TOOL, "echo", echo),),
                    "right": (Map("e", Expression("input.list"), "x", (Call("f", Kind.TOOL, "echo", Template("${x}")),), 2, 5),),
                },
            ),
            Choose(
                "g",
                Expression("steps.c.output.left == null"),
                (Call("h", Kind.TOOL, "echo", Template(None)),),
                (Loop("i", Expression("loop.index < 2"), 3, (Call("j", Kind.TOOL, "echo", Template({"last": "${loop.last}"})),), True),),
            ),
            Agent("k", "plan", Template([message]), {"t": Tool(Kind.TOOL, "echo", "says it")}),
            Agent("l", "plan", Template("${input.messages}"), {}, Budget(2, 3.0)),
        ),
        Template({"g": "${steps.g.output}", "size": "${steps.c.output.right.size()}"}),
        {"type": "object"},
        900,
        2,
        ("iad",),
        "all of it",
        {"team": "x"},
    )
    assert load_text(p.yaml(), "p.yaml") == load_text(p.json(), "p.json") == p.build()


def test_all_mistakes_are_said_when_it_is_built() -> None:
    p = Program("a b")
    p.tool("1a", "echo", lane="interactve", retry=0, timeout_s=-1)
    p.map("m", p.input.list)
    with pytest.raises(ProgramInvalid) as raised:
        p.build()
    assert {path for path, _ in raised.value.problems} == {
        "name",
        "steps[0].id",
        "steps[0].lane",
        "steps[0].retry.attempts",
        "steps[0].timeout",
        "steps[1].map.steps",
    }


def test_a_reference_out_of_its_scope_is_refused() -> None:
    p = Program("p")
    with p.map("m", p.input.list) as m:
        inner = p.tool("t", "echo", m.item)
    with p.loop("l", lambda loop: loop.index < 2, maximum=2) as loop:
        p.tool("u", "echo", inner, fallback=[m.item])
        p.tool("v", "echo", loop.output)
    p.output([loop.index, Program("other").tool("elsewhere", "echo")])
    with pytest.raises(ProgramInvalid) as raised:
        p.build()
    found = dict(raised.value.problems)
    assert "is inside of `m`" in found["steps[1].steps[0].input"]
    assert "no variable `m_item`" in found["steps[1].steps[0].fallback[0]"]
    assert "is the step around this one" in found["steps[1].steps[1].input"]
    assert "only inside of a loop" in found["output[0]"]
    assert "no step `elsewhere`" in found["output[1]"]


def test_index_and_last_of_an_outer_loop_are_refused_in_an_inner_one() -> None:
    p = Program("p")
    with p.loop("outer", lambda loop: loop.index < 2, maximum=2) as outer:
        index = outer.index
        with p.loop("inner", lambda loop: loop.index < 2, maximum=2) as inner:
            p.tool("a", "echo", [inner.index])
            with pytest.raises(ValueError, match="of `outer` cannot be seen in `inner`"):
                p.tool("b", "echo", n=[index])
            with pytest.raises(ValueError, match="of `outer` cannot be seen in `inner`"):
                p.map("m", p.input.list.filter(lambda item: item.n == outer.last))
        with pytest.raises(ValueError, match="of `inner` cannot be seen in `outer`"):
            p.when("c", inner.index == 1)
    assert len(p.build().steps) == 1


def test_a_dollar_before_a_reference_is_not_lost() -> None:
    p = Program("p")
    with pytest.raises(ValueError, match="literal"):
        p.tool("a", "echo", text=f"costs ${p.input.price}")
    p.tool("a", "echo", text=f"costs {literal('$')}{p.input.price}, {literal('${')} is text", ten="$10")
    output, _ = execute(p.build(), {"price": 3}, {"tool.echo": lambda given: given})
    assert output == {"text": "costs $3, ${ is text", "ten": "$10"}


def test_misuse_is_refused_where_it_is_written() -> None:
    p = Program("p")
    with pytest.raises(TypeError, match="as a whole and as x"):
        p.tool("a", "echo", {}, x=1)
    with pytest.raises(TypeError, match="either"):
        p.output()
    with pytest.raises(TypeError, match="either"):
        p.output(1, x=2)
    with pytest.raises(ValueError, match="none of its branches"), p.parallel("b"):
        p.tool("c", "echo")
    with p.parallel("d") as d:
        with d.branch("one"):
            p.tool("e", "echo")
            with pytest.raises(RuntimeError, match="not complete"):
                p.build()
        with pytest.raises(ValueError, match="two branches"):
            d.branch("one")


def test_an_exception_inside_of_a_block_leaves_it() -> None:
    p = Program("p")
    with pytest.raises(TypeError), p.loop("b", lambda loop: loop.index < 2, maximum=2) as b, p.map("c", p.input.list):
        p.tool("d", "echo", {}, index=b.index)
    p.tool("e", "echo")
    assert [step["id"] for step in p._plain["steps"]] == ["b", "e"]


# --- texts ---


@given(
    programs(),
    st.lists(TEXT | st.sampled_from(["1e3", "0o17", "yes", "010", "null", "~", "2001-01-01", ".5", "1.", "=", "a\n b\n\n", "|"])),
)
def test_a_text_is_read_as_the_same_program(made: Model, texts: list[str]) -> None:
    shared = {"same": [text.replace("${", "$${") for text in texts]}
    call = Call("weird", Kind.TOOL, "echo", Template([shared, shared, dict.fromkeys(texts, 1)]))
    made = Model(made.name, (*made.steps, call), made.output, metadata={"note": "1e3"})
    assert load_text(to_yaml(made), "p.yaml") == made
    assert load_text(to_json(made), "p.json") == made
