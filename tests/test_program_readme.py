"""The samples, tables and limits of gateway/program/README.md are true."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import text_format
from program_examples import execute

from gateway.edge.program_proto import program_from_proto
from gateway.program import agent, cel_evaluator, cel_syntax, expressions, model, parse, text
from gateway.program.agent import Answer, ToolCalls, request, understand
from gateway.program.build import Program
from gateway.program.check import MOST_SOURCE_CHARS, check
from gateway.program.model import MOST_PARALLEL, MOST_STEPS, Budget, Retry
from gateway.program.parse import FORMS, TOP, load_text
from gateway.program.reader import RESERVED
from gateway.program.refs import Ref
from nearloop.v1 import program_pb2

README_PATH = Path(parse.__file__).with_name("README.md")
README = README_PATH.read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.S | re.M)
    assert found
    return found


def rows(header: str) -> list[list[str]]:
    """Cells of the table with this header."""
    table = README.split(f"| {header} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\|)\|(?!\|)", line)[1:-1]] for line in table]


def whole(sample: str) -> str:
    if sample.startswith("program:"):
        return sample
    return f"program: {parse.VERSION}\nname: sample\nsteps:\n" + "".join(f"  {line}\n" for line in sample.splitlines())


@pytest.mark.parametrize("sample", blocks("yaml"))
def test_a_yaml_sample_is_right(sample: str) -> None:
    assert check(load_text(whole(sample), "sample.yaml")) == []


def test_every_form_and_field_has_a_sample() -> None:
    steps = [step for sample in blocks("yaml") for step in yaml.safe_load(whole(sample))["steps"]]
    for form, fields in FORMS.items():
        keys = {key for step in steps if form in step for key in step}
        assert keys >= {form, *fields} or (form in parse.CALLS and form in README), form
    assert {name for cells in rows("Field | Meaning") for name in re.findall(r"`(\w+)`", cells[0])} == set(TOP)
    assert {name for cells in rows("Step | Its output") for name in re.findall(r"`(\w+)`", cells[0])} == set(FORMS)


def test_the_first_samples_are_the_same_program_and_do_what_they_say() -> None:
    from_yaml = load_text(blocks("yaml")[0], "answer.yaml")
    scope: dict[str, Any] = {}
    exec(blocks("python")[0], scope)
    assert scope["program"] == from_yaml
    targets = {
        "retrieve.docs": lambda given: {"hits": [{"id": given["text"]}]},
        "tool.fetch": lambda given: given["id"],
        "infer.plan": lambda given: {"text": given["prompt"]},
    }
    output, _ = execute(from_yaml, {"question": "why"}, targets)
    assert output == {"answer": "Question: why\nPage: why", "sources": ["why"]}


def test_the_python_samples_are_right() -> None:
    for sample in blocks("python"):
        scope: dict[str, Any] = {}
        exec(sample, scope)
        assert check(scope["program"]) == []
    methods = {name for name in [*vars(Program), *vars(Ref)] if not name.startswith("_")}
    section = README.split("## In Python")[1] + README.split("## Top level")[0]
    assert {name for name in methods if not re.search(rf"\b{name}\b", section)} == set()


def test_the_protobuf_samples_are_right() -> None:
    for sample in blocks("textproto"):
        assert check(program_from_proto(text_format.Parse(sample, program_pb2.Program()))) == []


def test_the_protocol_of_agents_is_as_shown() -> None:
    asked, calls, answer = map(json.loads, blocks("json"))
    assert asked == request(asked["messages"], asked["tools"], 5, 20000, 40.0)
    assert isinstance(understand(calls, {"search"}), ToolCalls)
    assert understand(answer, {"search"}) == Answer("In Rome.")
    assert agent.PROTOCOL in README


@pytest.mark.parametrize("cells", rows("Expression | Value"), ids=lambda cells: cells[0])
def test_an_expression_has_the_value_that_is_shown(cells: list[str]) -> None:
    given = json.loads(re.search(r"Over the input\n`(.*?)`", README, re.S)[1])
    source, shown = (cell.strip("`") for cell in cells)
    made = expressions.evaluate(expressions.compile_expression(source), {"input": given})
    assert repr(made) == repr(json.loads(shown))


def test_every_function_of_the_language_is_shown() -> None:
    shown = " ".join(cells[0] for cells in rows("Expression | Value"))
    for name in cel_syntax.FUNCTIONS | cel_syntax.METHODS | cel_syntax.MACROS:
        assert f"{name}(" in shown, name


def test_the_limits_are_those_of_the_code() -> None:
    limits = [int(cells[1].replace(" MiB", "")) for cells in rows("What | At most")]
    assert limits == [
        text.MOST_BYTES // 2**20,
        parse.MOST_NODES,
        text.MOST_DEPTH,
        MOST_STEPS,
        MOST_PARALLEL,
        cel_syntax.MOST_CHARS,
        MOST_SOURCE_CHARS,
        cel_syntax.MOST_BRACKETS,
        cel_syntax.MOST_DEPTH,
        cel_syntax.MOST_MACROS,
        cel_evaluator.MOST_WORK,
        expressions.MOST_RESULT_CHARS,
    ]
    budget = Budget()
    assert (budget.iterations, budget.tokens, budget.wall_s) == (10, 1_000_000, 300)
    assert f"`most` is {model.Map.__dataclass_fields__['most'].default} where it is not said" in README
    assert "in" in RESERVED
    retry = Retry()
    assert (retry.first_s, retry.most_s, retry.factor) == (0.1, 5, 2), "as the sample of a call says"


def test_the_files_that_it_names_are_there() -> None:
    for link in re.findall(r"\]\((?!https:)(.*?)\)", README):
        assert (README_PATH.parent / link).exists(), link
