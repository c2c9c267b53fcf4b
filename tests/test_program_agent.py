"""Agents: the protocol with the model, tools, budgets, nonsense."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
from program_driver import Drive, call, program, when

from gateway.program.commands import Fail, Wait
from gateway.program.journal import TimerFired
from gateway.program.model import Agent, Budget, Json, Map, Template, Tool
from gateway.types import Kind

QUESTION = {"role": "user", "content": "where is it warm?"}
TOOLS = {"weather": Tool(Kind.TOOL, "api.weather", "the weather of a place"), "my docs": Tool(Kind.RETRIEVE, "docs")}


USUAL = Budget()


def agent(budget: Budget = USUAL, tools: Mapping[str, Tool] = TOOLS, messages: Json = "${input}") -> Agent:
    return Agent("think", "planner", Template(messages), tools, budget)


def asked(run: Drive, key: str) -> Any:
    return run.running[key].input


def calls(*wanted: tuple[str, str, Json], **more: Json) -> Json:
    return {"calls": [{"id": call_id, "tool": tool, "input": value} for call_id, tool, value in wanted], **more}


def test_the_model_is_asked_by_the_protocol() -> None:
    schema = {"type": "object"}
    run = Drive((agent(Budget(iterations=5, tokens=100)),), [QUESTION], schemas={"tool.api.weather": schema})
    assert (run.running["think/0"].kind, run.running["think/0"].target) == (Kind.INFER, "planner")
    assert asked(run, "think/0") == {
        "protocol": "nearloop.agent/v1",
        "messages": [QUESTION],
        "tools": [
            {"name": "weather", "description": "the weather of a place", "input_schema": schema},
            {"name": "my docs", "description": ""},
        ],
        "remaining": {"iterations": 4, "tokens": 100},
    }


def test_calls_run_side_by_side_and_come_back_in_their_order() -> None:
    run = Drive((agent(), call("after", "${steps.think.output}")), [QUESTION])
    run.completes("think/0", calls(("a", "weather", {"of": "Rome"}), ("b", "my docs", "warm"), text="let me see"))
    first, second = run.running["think/0/weather.0"], run.running["think/0/my_docs.1"]
    assert (first.kind, first.target, first.input) == (Kind.TOOL, "api.weather", {"of": "Rome"})
    assert (second.kind, second.target, second.input) == (Kind.RETRIEVE, "docs", "warm")
    run.completes("think/0/my_docs.1", ["Rome"])
    assert [*run.running] == ["think/0/weather.0"]
    run.completes("think/0/weather.0", 31)
    conversation = [
        QUESTION,
        {
            "role": "assistant",
            "text": "let me see",
            "calls": [{"id": "a", "tool": "weather", "input": {"of": "Rome"}}, {"id": "b", "tool": "my docs", "input": "warm"}],
        },
        {"role": "tool", "call": "a", "tool": "weather", "output": 31},
        {"role": "tool", "call": "b", "tool": "my docs", "output": ["Rome"]},
    ]
    assert asked(run, "think/1")["messages"] == conversation
    assert run.engine.progress()["iterations"] == {"think": 1}
    run.completes("think/1", {"answer": "Rome"})
    output = {"answer": "Rome", "messages": [*conversation, {"role": "assistant", "answer": "Rome"}], "iterations": 2}
    assert run.running["after"].input == output
    assert not run.waiting
    assert run.engine.progress()["iterations"] == {}


def test_null_is_an_answer() -> None:
    run = Drive((agent(),), [])
    run.completes("think/0", {"answer": None})
    assert run.output == {"answer": None, "messages": [{"role": "assistant", "answer": None}], "iterations": 1}


def test_agents_in_a_map_have_keys_of_their_own() -> None:
    run = Drive((Map("m", when("input"), "it", (agent(messages=["${it}"]),)),), [1, 2])
    assert [*run.running] == ["think/0.0", "think/1.0"]
    run.completes("think/1.0", calls(("a", "weather", None)))
    run.completes("think/1.0/weather.0")
    assert [*run.running] == ["think/0.0", "think/1.1"]
    assert {*run.waiting} == {"think/0", "think/1"}
    assert all(re.fullmatch(r"[A-Za-z0-9_./-]+", start.key) for start in run.started)


def test_the_limits_of_the_run_hold_for_tools_and_the_model() -> None:
    run = Drive(program(agent(), at_once=2, most_steps=4), [])
    run.completes("think/0", calls(*((str(n), "weather", n) for n in range(3))))
    assert [*run.running] == ["think/0/weather.0", "think/0/weather.1"]
    for n in range(3):
        run.completes(f"think/0/weather.{n}")
    assert run.failure == ("TOO_MANY_STEPS", "think")


def test_a_failed_tool_is_told_to_the_model() -> None:
    run = Drive((agent(),), [])
    run.completes("think/0", calls(("a", "weather", None)))
    run.fails("think/0/weather.0", retryable=True, message="no")
    assert asked(run, "think/1")["messages"][-1] == {
        "role": "tool",
        "call": "a",
        "tool": "weather",
        "error": {"code": "UNAVAILABLE", "reason": "BROKEN", "message": "no"},
    }


def test_a_failed_model_fails_the_run() -> None:
    run = Drive((agent(),), [])
    run.fails("think/0")
    assert run.failure == ("STEP_FAILED", "think")


def test_messages_are_a_list() -> None:
    assert Drive((agent(),), "hello").failure == ("NOT_A_LIST", "think")


NONSENSE: list[tuple[Json, str]] = [
    ("just text", "not a JSON object"),
    ({}, 'either "answer" or "calls"'),
    ({"answer": 1, "calls": []}, 'either "answer" or "calls"'),
    ({"calls": []}, "at least one call"),
    ({"calls": {"id": "a"}}, "at least one call"),
    ({"calls": ["weather"]}, "a call is not a JSON object"),
    ({"calls": [{"tool": "weather"}]}, 'an "id" and a "tool"'),
    ({"calls": [{"id": "", "tool": "weather"}]}, 'an "id" and a "tool"'),
    ({"calls": [{"id": 1, "tool": "weather"}]}, 'an "id" and a "tool"'),
    ({"calls": [{"id": "a", "tool": ["weather"]}]}, 'an "id" and a "tool"'),
    (calls(("a", "weather", 1), ("a", "weather", 2)), "the same id"),
    (calls(("a", "weather", 1), ("b", "delete_all", 2)), "not on the allow-list: 'delete_all'; the tools are my docs, weather"),
    (calls(("a", "weather", 1), text=3), '"text" is not a string'),
]


@pytest.mark.parametrize(("answer", "problem"), NONSENSE)
def test_nonsense_is_told_to_the_model_and_nothing_of_it_is_started(answer: Json, problem: str) -> None:
    run = Drive((agent(),), [])
    run.completes("think/0", answer)
    assert [*run.running] == ["think/1"]
    invalid, told = asked(run, "think/1")["messages"]
    assert invalid == {"role": "assistant", "invalid": answer}
    assert told["role"] == "system"
    assert problem in told["content"]


def test_three_in_a_row_fail_the_run_and_the_last_reason_is_named_without_the_models_words() -> None:
    run = Drive((agent(),), [])
    for iteration in range(3):
        run.completes(f"think/{iteration}", calls(("a", "secret_word", None)))
    assert run.failure == ("MODEL_NONSENSE", "think")
    assert "allow-list" in run.why
    assert "secret_word" not in run.why


def test_sense_in_between_begins_the_count_again() -> None:
    run = Drive((agent(),), [])
    for iteration, answer in enumerate(["no", "no", calls(("a", "weather", None)), "no", "no"]):
        run.completes(f"think/{iteration}", answer)
        if iteration == 2:
            run.completes("think/2/weather.0")
    run.completes("think/5", {"answer": "sense"})
    assert run.ended is not None


def test_a_call_without_input_has_an_empty_one() -> None:
    run = Drive((agent(),), [])
    run.completes("think/0", {"calls": [{"id": "a", "tool": "weather"}]})
    assert run.running["think/0/weather.0"].input == {}


# ---- budgets


def exhausted(run: Drive, what: str) -> None:
    assert run.failure == ("BUDGET_EXHAUSTED", "think")
    assert what in run.why


def test_iterations_end_before_tools_are_called_in_vain() -> None:
    run = Drive((agent(Budget(iterations=2)),), [])
    run.completes("think/0", calls(("a", "weather", None)))
    run.completes("think/0/weather.0")
    assert asked(run, "think/1")["remaining"]["iterations"] == 0
    run.completes("think/1", calls(("a", "weather", None)))
    exhausted(run, "iterations (2)")
    assert [start.key for start in run.started] == ["think/0", "think/0/weather.0", "think/1"]


def test_nonsense_uses_iterations() -> None:
    run = Drive((agent(Budget(iterations=2)),), [])
    run.completes("think/0", "no")
    run.completes("think/1", "no")
    exhausted(run, "iterations")


def test_cost_is_of_model_and_tools_also_of_failed_ones() -> None:
    run = Drive((agent(Budget(cost=5.0)),), [])
    run.completes("think/0", calls(("a", "weather", 1), ("b", "weather", 2)), cost=1.0)
    run.completes("think/0/weather.1", cost=1.5)
    run.fails("think/0/weather.0", cost=1.0)
    assert asked(run, "think/1")["remaining"]["cost"] == 1.5
    run.completes("think/1", calls(("a", "weather", 1)), cost=1.5)
    exhausted(run, "cost (5)")


@pytest.mark.parametrize("usage", [{"usage": {"tokens": 60}}, {"usage": {"tokens": -1}}, {"usage": {"tokens": True}}, {"usage": 3}, {}])
def test_tokens_are_as_the_model_says_or_else_as_the_runner_counted(usage: dict[str, Json]) -> None:
    run = Drive((agent(Budget(tokens=100)),), [])
    run.completes("think/0", calls(("a", "weather", 1), **usage), tokens=50)
    run.completes("think/0/weather.0", tokens=1000)  # a tool's are not the model's
    used = 60 if usage == {"usage": {"tokens": 60}} else 50
    assert asked(run, "think/1")["remaining"]["tokens"] == 100 - used
    run.completes("think/1", calls(("a", "weather", 1), **usage), tokens=50)
    exhausted(run, "tokens (100)")


def test_an_answer_that_used_up_the_budget_is_an_answer() -> None:
    run = Drive((agent(Budget(iterations=1, cost=1.0, tokens=1)),), [])
    run.completes("think/0", {"answer": 5, "usage": {"tokens": 10}}, cost=9.0)
    assert isinstance(run.output, dict)
    assert run.output["answer"] == 5


def test_wall_time_is_a_wait_of_the_runner() -> None:
    run = Drive((agent(Budget(wall_s=7.0)),), [])
    assert run.waits == [Wait("think", 7.0, is_retry=False)]
    run.completes("think/0", calls(("a", "weather", 1)))
    assert isinstance(run.apply(TimerFired("think"))[-1], Fail)
    exhausted(run, "wall_s (7)")


def test_an_agent_that_cannot_begin_leaves_no_wait() -> None:
    run = Drive((agent(Budget(iterations=0)),), [])
    exhausted(run, "iterations")
    assert not run.waits
