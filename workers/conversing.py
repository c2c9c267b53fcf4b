"""The planner as a model of the protocol `nearloop.agent/v1` (gateway/program/agent.py): the agent node of a program asks it what to call.

What it is told as messages are the observations of `workers.planning`. Its tools: `search`, a collection whose points carry name and
summary; `lookup`, which gives the entry of a name; `judge`, which is asked about every entry before it counts.
"""

from typing import Any

from workers.model_io import Body, InputError, need
from workers.planning import MAX_ITERATIONS, plan

PROTOCOL = "nearloop.agent/v1"


def converse(body: Body) -> Body:
    """A request of the protocol -> the call that is wanted next, or `{"answer": {"name", "answer", "evidence"}}`; a name is empty when
    nothing was found. Raises InputError that names the field."""
    if need(body, "protocol", str) != PROTOCOL:
        raise InputError(f"protocol: {PROTOCOL} is spoken here")
    messages, remaining = need(body, "messages", list), need(need(body, "remaining", dict), "iterations", int)
    question, observations, pending = _read(messages)
    number = f"call-{len(messages)}"
    if pending is not None and remaining > 0:
        asked = {"question": question, "name": pending["name"], "evidence": str(pending.get("doc", ""))}
        return _call(number, "judge", asked, f"how well does {pending['name']} answer it")
    # A look takes two more times: one for the judge, one for what follows from its verdict.
    rounds = min(len(observations) + 1 + remaining // 2, MAX_ITERATIONS)
    action = plan({"question": question, "observations": observations, "max_iterations": rounds})
    if action["action"] == "search":
        return _call(number, "search", {"op": "query", "text": action["query"], "limit": action["limit"]}, action["reason"])
    if action["action"] == "lookup":
        return _call(number, "lookup", {"name": action["name"]}, action["reason"])
    return {"answer": {key: action[key] for key in ("name", "answer", "evidence")}}


def _call(number: str, tool: str, asked: Body, reason: str) -> Body:
    return {"calls": [{"id": number, "tool": tool, "input": asked}], "text": reason}


def _read(messages: list[Any]) -> tuple[str, list[Body], Body | None]:
    """The question, what was observed so far, and an entry that was looked up and not yet judged."""
    question, observations = "", list[Body]()
    wanted: dict[str, Body] = {}
    pending: Body | None = None
    for position, message in enumerate(messages):
        where = f"messages[{position}]"
        if not isinstance(message, dict):
            raise InputError(f"{where}: an object is needed, not {type(message).__name__}")
        if message.get("role") == "user":
            question = need(message, "content", str)
        elif message.get("role") == "assistant":
            wanted |= {call["id"]: call["input"] for call in message.get("calls", ())}
        elif message.get("role") == "tool":
            asked, output = wanted.get(need(message, "call", str), {}), message.get("output")
            output = output if isinstance(output, dict) else {}  # an error: nothing was seen
            match need(message, "tool", str):
                case "search":
                    action = {"action": "search", "query": str(asked.get("text", ""))}
                    hits = [{**hit["payload"], "score": hit["score"]} for hit in output.get("hits", ())]
                    observations.append({"action": action, "result": {"hits": hits}})
                case "lookup" if "name" in output:
                    pending = output
                case "lookup":
                    observations.append(_seen(str(asked.get("name", "")), {"error": "unknown name"}))
                case "judge" if pending is not None:
                    doc = str(pending.get("doc", ""))
                    told = {"signature": pending.get("signature", ""), "summary": " ".join(doc.split("\n\n")[0].split())}
                    observations.append(_seen(pending["name"], told | output))
                    pending = None
    if not question:
        raise InputError("messages: one of the user is needed")
    return question, observations, pending


def _seen(name: str, result: Body) -> Body:
    return {"action": {"action": "lookup", "name": name}, "result": result}
