"""The planner as a model of the protocol that agents of programs speak."""

from typing import Any

import pytest

from gateway.program import agent
from workers.conversing import converse
from workers.model_io import InputError

QUESTION = "how do I copy a directory tree?"
HITS = {
    "hits": [
        {"id": "shutil.copytree", "score": 0.8, "payload": {"name": "shutil.copytree", "summary": "Recursively copy a directory tree."}},
        {"id": "os.mkdir", "score": 0.5, "payload": {"name": "os.mkdir", "summary": "Create a directory."}},
    ]
}
ENTRY = {"name": "shutil.copytree", "signature": "(src, dst)", "doc": "Recursively copy a directory\ntree.\n\nMore of it."}
VERDICT = {"score": 0.86, "sufficient": True, "matched": ["copy"], "missing": []}
TOOLS = ("search", "lookup", "judge")


def ask(messages: list[Any], remaining: int = 9) -> Any:
    """What the model says, as an agent's loop understands it."""
    said = converse(agent.request([{"role": "user", "content": QUESTION}, *messages], [], remaining, 1000, float("inf")))
    return agent.understand(said, TOOLS)


def told(wanted: Any, **outcome: Any) -> list[Any]:
    """The messages that follow when the one call that is wanted has this outcome."""
    (call,) = wanted.calls
    return [wanted.message, {"role": "tool", "call": call.id, "tool": call.tool, **outcome}]


def call_of(wanted: Any) -> tuple[str, Any]:
    (call,) = wanted.calls
    return call.tool, call.input


def test_it_searches_looks_up_has_judged_and_answers() -> None:
    messages: list[Any] = []
    wanted = ask(messages)
    assert call_of(wanted) == ("search", {"op": "query", "text": "copy directory tree", "limit": 40})
    messages += told(wanted, output=HITS)
    wanted = ask(messages)
    assert call_of(wanted) == ("lookup", {"name": "shutil.copytree"})
    messages += told(wanted, output=ENTRY)
    wanted = ask(messages)
    assert call_of(wanted) == ("judge", {"question": QUESTION, "name": "shutil.copytree", "evidence": ENTRY["doc"]})
    messages += told(wanted, output=VERDICT)
    answered = ask(messages)
    text = "shutil.copytree(src, dst): Recursively copy a directory tree."
    assert answered == agent.Answer({"name": "shutil.copytree", "answer": text, "evidence": ["Recursively copy a directory tree."]})


def test_when_it_cannot_be_asked_again_it_answers() -> None:
    answered = ask([], remaining=0)
    assert answered.value["name"] == ""
    messages = told(ask([]), output=HITS)
    messages += told(ask(messages), output=ENTRY)
    assert ask(messages, remaining=0).value["name"] == "", "what was not judged does not count"


@pytest.mark.parametrize("remaining", range(1, 30))
def test_a_look_leaves_enough_for_the_judge_and_the_answer(remaining: int) -> None:
    messages: list[Any] = []
    for left in range(remaining, -1, -1):
        wanted = ask(messages, left)
        if isinstance(wanted, agent.Answer):
            return
        tool, _ = call_of(wanted)
        poor = {**VERDICT, "score": 0.2, "sufficient": False}
        messages += told(wanted, output={"search": HITS, "lookup": ENTRY, "judge": poor}[tool])
    pytest.fail("no answer although it could not be asked again")


@pytest.mark.parametrize("failing", TOOLS)
def test_what_fails_is_nothing_seen(failing: str) -> None:
    outputs = {"search": HITS, "lookup": ENTRY, "judge": VERDICT}
    messages: list[Any] = []
    tools = []
    for left in range(12, -1, -1):
        wanted = ask(messages, left)
        if isinstance(wanted, agent.Answer):
            break
        tool, _ = call_of(wanted)
        tools.append(tool)
        error = {"code": "UNAVAILABLE", "reason": "", "message": ""}
        messages += told(wanted, **({"error": error} if tool == failing else {"output": outputs[tool]}))
    assert isinstance(wanted, agent.Answer)
    assert wanted.value["name"] == ""
    assert failing in tools


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"protocol": "nearloop.agent/v9", "messages": [], "remaining": {"iterations": 1}}, "nearloop.agent/v1 is spoken"),
        ({"protocol": "nearloop.agent/v1", "messages": [], "remaining": {"iterations": 1}}, "one of the user is needed"),
        ({"protocol": "nearloop.agent/v1", "messages": [3], "remaining": {"iterations": 1}}, r"messages\[0\]"),
        ({"protocol": "nearloop.agent/v1", "messages": [], "remaining": {}}, "iterations: missing"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        converse(body)
