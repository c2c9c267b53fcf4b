"""The agent's loop: plan, search or look up, judge, and again. It knows no transport: the caller gives the four calls."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

Body = dict[str, Any]
Plan = Callable[[Body], Awaitable[Body]]
Search = Callable[[str, int], Awaitable[list[Body]]]
Lookup = Callable[[str], Awaitable[Body | None]]
Judge = Callable[[Body], Awaitable[Body]]
# Told of every call as it ends: its kind (plan, search, lookup, judge, answer) and a line for people.
OnEvent = Callable[[str, str], None]


@dataclass(frozen=True, slots=True)
class Call:
    """One call that the loop made."""

    kind: str  # plan, search, lookup or judge
    detail: str


@dataclass(frozen=True, slots=True)
class Answer:
    """What the loop came to. `name` is empty when nothing that was seen answers the question; `score` is 0 to 1."""

    question: str
    answer: str
    name: str
    evidence: tuple[str, ...]
    score: float
    iterations: int
    calls: tuple[Call, ...]


class AgentError(Exception):
    """The planner said something that the loop cannot do."""


async def answer(
    question: str,
    *,
    plan: Plan,
    search: Search,
    lookup: Lookup,
    judge: Judge,
    max_iterations: int = 8,
    on_event: OnEvent | None = None,
) -> Answer:
    """Answer `question` in at most `max_iterations` rounds of plan and act.

    `plan(conversation)` gives the next action (see workers/planning.py), `search(query, limit)` a list of
    `{"name", "summary", "score"}`, `lookup(name)` the entry `{"name", "kind", "module", "signature", "doc"}` or None,
    `judge({"question", "name", "evidence"})` a verdict. What they raise passes through. Raises AgentError when the planner
    answers or looks up a name that no observation brought, or does not end in time.
    """
    calls: list[Call] = []
    observations: list[Body] = []
    known: set[str] = set()

    def note(kind: str, detail: str) -> None:
        calls.append(Call(kind, detail))
        if on_event:
            on_event(kind, detail)

    for iteration in range(1, max_iterations + 1):
        action = await plan({"question": question, "observations": observations, "max_iterations": max_iterations})
        note("plan", f"{action.get('action')}: {action.get('reason', '')}")
        match action:
            case {"action": "search", "query": str(query), "limit": int(limit)}:
                hits = await search(query, limit)
                note("search", f"{query!r}: {len(hits)} hits")
                known |= {hit["name"] for hit in hits}
                observations.append({"action": action, "result": {"hits": hits}})
            case {"action": "lookup", "name": str(name)} if name in known:
                entry = await lookup(name)
                note("lookup", name if entry else f"{name}: unknown")
                result = {"error": "unknown name"} if entry is None else await _verdict(question, entry, judge, note)
                observations.append({"action": action, "result": result})
            case {"action": "answer", "name": str(name), "answer": str(text)} if name in known or not name:
                score = _score(name, observations)
                if on_event:
                    on_event("answer", text)
                return Answer(question, text, name, tuple(action["evidence"]), score, iteration, tuple(calls))
            case _:
                raise AgentError(f"the planner asked for something that cannot be done: {action.get('action')!r}")
    raise AgentError(f"the planner gave no answer in {max_iterations} iterations")


async def _verdict(question: str, entry: Body, judge: Judge, note: Callable[[str, str], None]) -> Body:
    """The judge's verdict on an entry, with what an answer may quote of it."""
    doc = str(entry["doc"])
    verdict = await judge({"question": question, "name": entry["name"], "evidence": doc})
    note("judge", f"{entry['name']}: {verdict['score']:.2f}")
    return {"signature": entry["signature"], "summary": " ".join(doc.split("\n\n")[0].split())} | verdict


def _score(name: str, observations: list[Body]) -> float:
    for observation in observations:
        if observation["action"].get("name") == name and name:
            return float(observation["result"].get("score", 0.0))
    return 0.0
