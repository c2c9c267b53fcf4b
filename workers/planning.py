"""What does the agent do next? Search, look a name up, or answer: decided from the question and what was seen so far.

A name can be answered or looked up only if an observation brought it: the planner takes names from there alone.
"""

from dataclasses import dataclass, field
from typing import Any

from workers.judging import SUFFICIENT, assess
from workers.model_io import Body, InputError, need, need_between
from workers.words import concepts, weight

SEARCH_LIMIT = 40
MAX_SEARCHES = 3
MAX_ITERATIONS = 50
NOT_FOUND = "Not found: nothing that was seen answers this question."
# A verdict below SUFFICIENT is still answered at the very end, if the evidence covers a fair part of the question.
WEAK = 0.38
_SIMILARITY_FACTOR = 0.15  # how much the vector store's own score counts beside the lexical match
_STRONG = 0.7  # the weight from which a word of the question counts as a strong one
_PROMISING = 0.3  # a candidate below this is not worth a look


@dataclass(slots=True)
class Seen:
    """What the observations say."""

    queries: list[str] = field(default_factory=list)
    candidates: dict[str, Body] = field(default_factory=dict)  # by name, as the vector store gave them
    verdicts: dict[str, Body] = field(default_factory=dict)  # by name, of the names looked up


def plan(body: Body) -> Body:
    """`{"question", "observations": [{"action", "result"}], "max_iterations"}` -> the next action.

    An observation's result is `{"hits": [{"name", "summary", "score"}]}` after a search, and
    `{"summary", "signature", "score", "sufficient", "missing"}`, or `{"error"}`, after a look-up. Actions:
    `{"action": "search", "query", "limit", "reason"}`, `{"action": "lookup", "name", "reason"}` and
    `{"action": "answer", "name", "answer", "evidence", "reason"}`, where an empty name means not found.
    Raises InputError that names the field.
    """
    question = need(body, "question", str)
    seen = _read(need(body, "observations", list))
    left = need_between(body, "max_iterations", 1, MAX_ITERATIONS) - len(body["observations"])
    best = max(seen.verdicts, key=lambda name: float(seen.verdicts[name]["score"]), default="")
    promise = {name: _promise(question, hit) for name, hit in seen.candidates.items() if name not in seen.verdicts}
    rival = max(promise, key=lambda name: promise[name], default="")
    if best and float(seen.verdicts[best]["score"]) >= SUFFICIENT:
        # One more look when another candidate promises clearly more than what was found.
        if left > 1 and rival and promise[rival] > float(seen.verdicts[best]["score"]):
            return _lookup(rival, f"promises more than {best}")
        return _answer(best, seen, "the evidence suffices")
    if left <= 1:
        return _close(best, seen, "no iteration is left")
    if rival and promise[rival] >= _PROMISING and _is_turn_to_look(seen):
        return _lookup(rival, "the most promising name not yet seen")
    if query := _next_query(question, seen):
        return {"action": "search", "query": query, "limit": SEARCH_LIMIT, "reason": _why_search(seen)}
    if rival and promise[rival] >= _PROMISING:
        return _lookup(rival, "the next best name")
    return _close(best, seen, "nothing promising is left")


def _read(observations: list[Any]) -> Seen:
    seen = Seen()
    for position, observation in enumerate(observations):
        where = f"observations[{position}]"
        if not isinstance(observation, dict):
            raise InputError(f"{where}: an object is needed, not {type(observation).__name__}")
        action, result = (observation.get(key) for key in ("action", "result"))
        if not isinstance(action, dict) or not isinstance(result, dict):
            raise InputError(f"{where}: action and result are needed, both objects")
        if action.get("action") == "search":
            seen.queries.append(need(action, "query", str))
            for hit in need(result, "hits", list):
                if not isinstance(hit, dict):
                    raise InputError(f"{where}.result.hits: objects are needed")
                seen.candidates.setdefault(need(hit, "name", str), hit)
        elif action.get("action") == "lookup":
            score = result.get("score", 0.0)
            if not isinstance(score, (int, float)):
                raise InputError(f"{where}.result.score: a number is needed")
            seen.verdicts[need(action, "name", str)] = result | {"score": score}
        else:
            raise InputError(f"{where}.action.action: search or lookup is needed")
    return seen


def _promise(question: str, hit: Body) -> float:
    match = assess(question, hit["name"], str(hit.get("summary", "")))[0]
    score = hit.get("score", 0.0)
    similarity = float(score) if isinstance(score, (int, float)) else 0.0
    return (1 - _SIMILARITY_FACTOR) * match + _SIMILARITY_FACTOR * similarity


def _is_turn_to_look(seen: Seen) -> bool:
    """Two looks for each search, so that a search that went astray does not use up all iterations."""
    return len(seen.verdicts) < 2 * len(seen.queries)


def _next_query(question: str, seen: Seen) -> str:
    """The question without filler; then what the best evidence missed; then only the words that say most."""
    words = list(dict.fromkeys(word.strip("?!,.;:'\"") for word in question.split()))
    told = [word for word in words if concepts(word)]
    missed = {term for verdict in seen.verdicts.values() for term in verdict.get("missing", ())}
    strong = [word for word in told if any(weight(term) >= _STRONG for term in concepts(word))]
    plain = " ".join(dict.fromkeys(term for word in told for term in concepts(word)))
    options = [
        " ".join(told),
        " ".join(word for word in told if set(concepts(word)) & missed),
        " ".join(strong),
        plain,
    ]
    if len(seen.queries) >= MAX_SEARCHES:
        return ""
    return next((query for query in options if query and query not in seen.queries), "")


def _why_search(seen: Seen) -> str:
    return "the evidence so far does not suffice: other words" if seen.queries else "nothing is known yet"


def _lookup(name: str, reason: str) -> Body:
    return {"action": "lookup", "name": name, "reason": reason}


def _close(best: str, seen: Seen, reason: str) -> Body:
    if best and float(seen.verdicts[best]["score"]) >= WEAK:
        return _answer(best, seen, f"{reason}; the best supported name")
    return {"action": "answer", "name": "", "answer": NOT_FOUND, "evidence": [], "reason": reason}


def _answer(name: str, seen: Seen, reason: str) -> Body:
    """Words of the evidence only: signature and summary as they were looked up."""
    verdict = seen.verdicts[name]
    summary, signature = str(verdict.get("summary", "")), str(verdict.get("signature", ""))
    text = f"{name}{signature}: {summary}"
    return {"action": "answer", "name": name, "answer": text, "evidence": [summary], "reason": reason}
