"""The protocol between an agent loop and its model, `nearloop.agent/v1`. Both directions are JSON.

The loop asks:

    {"protocol": "nearloop.agent/v1",
     "messages":  [...],                 the program's own messages, then what happened since, in order (below)
     "tools":     [{"name": "search", "description": "...", "input_schema": {...}}],    input_schema: where the target has one
     "remaining": {"iterations": 8, "tokens": 9000, "cost": 12.5}}

`remaining.iterations` is how often the model can be asked after this time: at 0 it has to answer. `cost` is left out when it has no
limit. The wall time is not told: it would differ when the loop is repeated from its journal.

The model gives the final answer, any JSON, or the calls it wants, which run at the same time:

    {"answer": ...,                                                  "usage": {"tokens": 310}}
    {"calls": [{"id": "a", "tool": "search", "input": {...}}, ...],  "usage": {"tokens": 310}, "text": "what it thinks"}

`id` is chosen by the model and differs between the calls of one answer; `input` is `{}` when left out; `text` and `usage` are
optional; other fields are ignored. Messages that the loop adds:

    {"role": "assistant", "calls": [...], "text": "..."}             calls that it asked for
    {"role": "tool", "call": "a", "tool": "search", "output": ...}   in the order of the calls
    {"role": "tool", "call": "b", "tool": "book", "error": {"code": "UNAVAILABLE", "reason": "OVERLOADED", "message": "..."}}
    {"role": "assistant", "invalid": ...}                            what was not understood, followed by
    {"role": "system", "content": "..."}                             what was wrong with it
    {"role": "assistant", "answer": ...}                             the last one, in the agent's output

An answer is nonsense when it is not of that form, repeats an id, or calls a tool that is not on the allow-list: then nothing of it is
executed. After three in a row the run fails. A new version of the protocol gets another name; a model that does not know the name it is
given should fail rather than guess.
"""

from collections.abc import Collection
from dataclasses import dataclass

from gateway.program.model import Json

PROTOCOL = "nearloop.agent/v1"


@dataclass(frozen=True, slots=True)
class ToolCall:
    id: str
    tool: str
    input: Json


@dataclass(frozen=True, slots=True)
class Answer:
    value: Json


@dataclass(frozen=True, slots=True)
class ToolCalls:
    calls: tuple[ToolCall, ...]
    message: dict[str, Json]  # as the conversation keeps it


@dataclass(frozen=True, slots=True)
class Nonsense:
    """problem: for anyone. detail: for the model only, since it may repeat words of its answer."""

    problem: str
    detail: str = ""


class _NotUnderstood(Exception):
    pass


def request(messages: list[Json], tools: list[Json], iterations: int, tokens: int, cost: float) -> dict[str, Json]:
    """What the model is sent; the last three are what remains."""
    remaining: dict[str, Json] = {"iterations": iterations, "tokens": tokens}
    if cost != float("inf"):
        remaining["cost"] = cost
    return {"protocol": PROTOCOL, "messages": messages, "tools": tools, "remaining": remaining}


def tokens_used(output: Json, counted: int) -> int:
    """By `usage.tokens` of the model's output, or else as the runner counted."""
    usage = output.get("usage") if isinstance(output, dict) else None
    tokens = usage.get("tokens") if isinstance(usage, dict) else None
    return tokens if isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0 else counted


def understand(output: Json, allowed: Collection[str]) -> Answer | ToolCalls | Nonsense:
    """What the model wants. allowed: names of the tools that it may call."""
    try:
        if not isinstance(output, dict):
            raise _NotUnderstood("it is not a JSON object")
        if ("answer" in output) == ("calls" in output):
            raise _NotUnderstood('it needs either "answer" or "calls"')
        if "answer" in output:
            return Answer(output["answer"])
        return _tool_calls(output, allowed)
    except _NotUnderstood as error:
        return Nonsense(*error.args)


def _tool_calls(output: dict[str, Json], allowed: Collection[str]) -> ToolCalls:
    entries, text = output["calls"], output.get("text")
    if not isinstance(entries, list) or not entries:
        raise _NotUnderstood('"calls" is not a list of at least one call')
    if text is not None and not isinstance(text, str):
        raise _NotUnderstood('"text" is not a string')
    calls = tuple(_tool_call(entry, allowed) for entry in entries)
    if len({call.id for call in calls}) < len(calls):
        raise _NotUnderstood("two calls have the same id")
    message: dict[str, Json] = {"role": "assistant", "calls": [{"id": call.id, "tool": call.tool, "input": call.input} for call in calls]}
    return ToolCalls(calls, message if text is None else {**message, "text": text})


def _tool_call(entry: Json, allowed: Collection[str]) -> ToolCall:
    if not isinstance(entry, dict):
        raise _NotUnderstood("a call is not a JSON object")
    call_id, tool = entry.get("id"), entry.get("tool")
    if not isinstance(call_id, str) or not call_id or not isinstance(tool, str):
        raise _NotUnderstood('a call needs an "id" and a "tool", both of them strings')
    if tool not in allowed:
        raise _NotUnderstood(
            "a tool that it calls is not on the allow-list", f"{tool!r}; the tools are {', '.join(sorted(allowed)) or 'none'}"
        )
    return ToolCall(call_id, tool, entry.get("input", {}))
