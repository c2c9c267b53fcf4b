"""The programs of tests/programs: each is right, survives every way of writing it, and does what it says."""

from pathlib import Path
from typing import Any

import pytest
from program_examples import EXAMPLES, FOLDER, Unavailable, execute, load_example

from gateway.edge.program_proto import program_from_proto, program_to_proto
from gateway.program.check import check
from gateway.program.dump import dump_program
from gateway.program.parse import load_text, parse_program
from gateway.program.write import to_json, to_yaml
from gateway.types import Lane

PAGES = [{"id": "p1", "text": "Copper conducts."}, {"id": "p2", "text": "Glass does not."}]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_right_and_survives_every_way_of_writing_it(path: Path) -> None:
    program = load_example(path)
    assert check(program) == []
    assert parse_program(dump_program(program)) == program
    assert load_text(to_json(program), "p.json") == program
    assert load_text(to_yaml(program), "p.yaml") == program
    assert program_from_proto(program_to_proto(program)) == program


def search(given: Any) -> Any:
    return {"hits": PAGES[: given.get("limit", 1)]}


def fetch(given: Any) -> Any:
    return next(page["text"] for page in PAGES if page["id"] == given["id"])


def test_chain_answers_from_a_page() -> None:
    targets = {"retrieve.docs": search, "tool.fetch": fetch, "infer.plan": lambda given: {"text": given["prompt"].upper()}}
    output, started = execute(load_example(FOLDER / "chain.yaml"), {"question": "Does it?"}, targets)
    assert output == {"answer": "QUESTION: DOES IT?\nPAGE: COPPER CONDUCTS.", "sources": ["p1", "p2"]}
    assert [call.node_id for call in started] == ["search", "page", "think"]


def test_chain_thinks_without_a_page_when_the_collection_is_down() -> None:
    def down(given: Any) -> Any:
        raise Unavailable

    targets = {"retrieve.docs": down, "infer.plan": lambda given: {"text": given["prompt"]}}
    output, started = execute(load_example(FOLDER / "chain.yaml"), {"question": "Does it?"}, targets)
    assert output == {"answer": "Question: Does it?\nPage: null", "sources": []}
    assert [call.attempt for call in started] == [1, 2, 3, 1]


def researcher(given: Any) -> Any:
    """Searches, fetches what was found, and answers with it."""
    last = given["messages"][-1]
    if last["role"] == "user":
        return {"calls": [{"id": "a", "tool": "search", "input": {"text": last["content"]}}]}
    if last["tool"] == "search":
        return {"calls": [{"id": "b", "tool": "fetch", "input": {"id": last["output"]["hits"][0]["id"]}}]}
    return {"answer": f"{given['messages'][1]['content']} {last['output']}"}


def test_research_compares_until_it_is_sure() -> None:
    verdicts = iter([{"best": "glass", "confidence": 0.5}, {"best": "copper", "confidence": 0.9}])
    recorded: list[Any] = []
    judged: list[Any] = []

    def note(given: Any) -> Any:
        if given["thing"] == "air":
            raise Unavailable
        return {"id": f"note on {given['thing']}", "text": given["text"]}

    def judge(given: Any) -> Any:
        judged.append(given)
        return next(verdicts)

    def record(given: Any) -> Any:
        recorded.append(given)
        return "ok"

    targets = {
        "infer.plan": researcher,
        "retrieve.docs": search,
        "tool.fetch": fetch,
        "tool.note": note,
        "infer.judge": judge,
        "tool.record": record,
    }
    given = {"question": "Which conducts best?", "things": ["copper", "air", "glass"]}
    output, started = execute(load_example(FOLDER / "research.py"), given, targets)
    assert output == {"best": "copper", "is_recorded": True, "notes": ["note on copper", "note on glass"]}
    assert [notes["text"] for notes in judged[0]["notes"]] == [
        "What is known about copper? Which conducts best? Copper conducts.",
        "What is known about glass? Which conducts best? Copper conducts.",
    ]
    assert [asked["before"] for asked in judged] == [None, {"best": "glass", "confidence": 0.5}]
    assert recorded == [{"text": "Which conducts best? copper, after 3 searches"}]
    assert {call.lane for call in started if call.target == "judge"} == {Lane.INTERACTIVE}
    assert max(call.attempt for call in started if call.target == "note") == 3


def test_research_records_nothing_of_which_it_is_not_sure() -> None:
    targets = {"infer.judge": lambda given: {"best": "none", "confidence": 0.1}}
    output, started = execute(load_example(FOLDER / "research.py"), {"question": "?", "things": []}, targets)
    assert output == {"best": "none", "is_recorded": False, "notes": []}
    assert len(started) == 3


@pytest.mark.parametrize(("rule", "ordered"), [("cheap", {"order": 7}), ("none", None)])
def test_offers_orders_the_best_that_the_rules_allow(rule: str, ordered: Any) -> None:
    asked: list[Any] = []

    def price(given: Any) -> Any:
        asked.append(given)
        if given["shop"] == "shut":
            raise Unavailable
        return {"shop": given["shop"], "price": len(given["shop"])}

    def plan(given: Any) -> Any:
        best = min(given["offers"], key=lambda offer: offer["price"])
        return {"offer": best if given["rule"] == "cheap" else None}

    targets = {
        "tool.price": price,
        "retrieve.docs": lambda given: {"hits": [{"text": rule}] * given["limit"]},  # a whole number, though protobuf knows doubles only
        "infer.plan": plan,
        "tool.order": lambda given: {"order": given["price"]},
    }
    given = {"item": "wire", "shops": ["central", "shut", "station"]}
    output, started = execute(load_example(FOLDER / "offers.txtpb"), given, targets)
    assert output == {"ordered": ordered, "asked": 3}
    assert [one["shop"] for one in asked].count("shut") == 2
    assert all(one["item"] == "wire" for one in asked)
    assert ("order" in {call.node_id for call in started}) == (ordered is not None)
