"""How far does the evidence about a name answer the question? Lexical, explainable, and unable to be persuaded."""

from workers.model_io import Body, need
from workers.words import concepts, stems, terms, weight

SUFFICIENT = 0.6
_COVER_FACTOR, _NAME_FACTOR, _FOCUS_FACTOR, _EXACT_FACTOR = 0.6, 0.2, 0.1, 0.1
_KIN = 0.6  # credit for a term of the same family (compress, compression)
_KIN_PREFIX = 5  # characters in common that make a family
_IN_BODY = 0.4  # credit for a term that only the text behind the summary has
_DEPTH_COST, _CLASS_COST = 0.08, 0.06
_SHORT_SUMMARY = 4  # terms
_OUTSIDE_LEAF = 1 / 3  # weight of module and class in a name, its last part being 1
_SUMMARY_CHARS = 200
_BODY_CHARS = 1500


def judge(body: Body) -> Body:
    """`{"question", "name", "evidence"}` -> `{"score": 0..1, "sufficient", "matched", "missing"}`; terms are stems.

    Raises InputError that names a missing field.
    """
    question, name, evidence = (need(body, field, str) for field in ("question", "name", "evidence"))
    score, matched, missing = assess(question, name, evidence)
    return {"score": round(score, 4), "sufficient": score >= SUFFICIENT, "matched": matched, "missing": missing}


def assess(question: str, name: str, evidence: str) -> tuple[float, list[str], list[str]]:
    """Score from 0 to 1, and the question's terms that were matched and missing.

    score = 0.6 x share of the question that name and summary cover
          + 0.2 x share of the name that the question asks for
          + 0.1 x share of the summary that the question asks for
          + 0.1 x share of the question that is there in the same words, not in synonyms
          - a little for a class, and for each class or sub-module in the name: plain functions are told first
    """
    asked = list(dict.fromkeys(terms(question)))
    if not asked or not evidence.strip():
        return 0.0, [], asked
    summary, body = split_evidence(evidence)
    named = list(dict.fromkeys(terms(name)))
    leaf = set(terms(name.rpartition(".")[2]))
    told = set(named) | set(terms(summary))
    more = set(terms(body[:_BODY_CHARS])) - told
    credit = {term: max(_best(term, told), _IN_BODY * _best(term, more)) for term in asked}
    cover = _share(asked, credit)
    # `os.rename` before `ftplib.FTP.rename`, unless the question speaks of FTP
    name_share = _share(named, {term: _best(term, set(asked)) for term in named}, leaf)
    said = list(dict.fromkeys(terms(summary)))
    focus = _share(said, {term: _best(term, set(asked)) for term in said})
    focus *= min(1.0, len(said) / _SHORT_SUMMARY)  # a summary of one word is no explanation
    words = [word for word in stems(question) if concepts(word)]
    written = stems(f"{name} {summary}")
    exact = sum(word in written for word in words) / len(words) if words else 0.0
    depth = max(0, name.count(".") - 1)
    detour = _DEPTH_COST * depth + (_CLASS_COST if name.rpartition(".")[2][:1].isupper() else 0.0)
    score = _COVER_FACTOR * cover + _NAME_FACTOR * name_share + _FOCUS_FACTOR * focus + _EXACT_FACTOR * exact - detour
    matched = [term for term in asked if credit[term] > 0]
    return min(max(score, 0.0), 1.0), matched, [term for term in asked if credit[term] == 0]


def split_evidence(evidence: str) -> tuple[str, str]:
    """The first paragraph, joined to a line and cut, and the rest."""
    first, _, rest = evidence.strip().partition("\n\n")
    return " ".join(first.split())[:_SUMMARY_CHARS], rest


def _best(term: str, pool: set[str]) -> float:
    if term in pool:
        return 1.0
    if len(term) >= _KIN_PREFIX and any(other[:_KIN_PREFIX] == term[:_KIN_PREFIX] for other in pool):
        return _KIN
    return 0.0


def _share(wanted: list[str], credit: dict[str, float], full: set[str] | None = None) -> float:
    """The part of `wanted` that is credited, by weight; terms outside `full` count a third."""
    weights = {term: weight(term) * (1.0 if full is None or term in full else _OUTSIDE_LEAF) for term in wanted}
    total = sum(weights.values())
    return sum(amount * credit[term] for term, amount in weights.items()) / total if total else 0.0
