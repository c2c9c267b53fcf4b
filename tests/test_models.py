"""The models' logic without a server, and the share of the evaluation questions that the whole loop answers."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gateway.demo.agent import AgentError, Answer, answer
from gateway.demo.corpus import Entry, build
from workers.judging import judge
from workers.lexical import DIMENSIONS, embed
from workers.model_io import InputError
from workers.planning import plan
from workers.triton_server import MODEL_REPOSITORY
from workers.words import terms

QUESTIONS = json.loads((Path(__file__).parent / "data" / "stdlib_questions.json").read_text())
SHARE_ANSWERED = 0.65
XYZ_DIMENSIONS = [14, 236, 279, 309]  # where the hash puts the word xyz
QUESTION = "how do I copy a directory tree?"
HITS = {
    "hits": [
        {"name": "shutil.copytree", "summary": "Recursively copy a directory tree.", "score": 0.8},
        {"name": "os.mkdir", "summary": "Create a directory.", "score": 0.5},
    ]
}


def search(query: str) -> dict[str, Any]:
    return {"action": "search", "query": query, "limit": 40, "reason": ""}


def lookup(name: str) -> dict[str, Any]:
    return {"action": "lookup", "name": name, "reason": ""}


def ask(*observations: tuple[dict[str, Any], dict[str, Any]], question: str = QUESTION, most: int = 8) -> dict[str, Any]:
    told = [{"action": action, "result": result} for action, result in observations]
    return plan({"question": question, "observations": told, "max_iterations": most})


# --- words and embed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [("deleting folders", "delete a folder"), ("shutil.copytree", "copy tree"), ("getSize", "get_size"), ("rm", "remove")],
)
def test_spellings_of_one_thing_have_the_same_terms(one: str, other: str) -> None:
    assert set(terms(other)) <= set(terms(one))


def test_embeddings_have_unit_length_and_are_stable() -> None:
    vectors = embed(["copy a file", "copy a file", "open a socket", "", "the of and"])
    assert vectors.shape == (5, DIMENSIONS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [1, 1, 1, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(vectors[0], vectors[1])
    # The hash is fixed: an index that was built by another process, or yesterday, still fits.
    assert np.flatnonzero(embed(["xyz"])[0]).tolist() == XYZ_DIMENSIONS


def test_related_texts_are_nearer_than_unrelated_ones() -> None:
    asked, near, far = embed(["how do I delete a folder?", "Remove a directory.", "Return the cosine of x."])
    assert asked @ near > 0.7
    assert abs(asked @ far) < 0.3


# --- judge -------------------------------------------------------------------------------------------------------------


def test_judge_tells_good_evidence_from_bad() -> None:
    good = judge({"question": QUESTION, "name": "shutil.copytree", "evidence": "Recursively copy a directory tree."})
    bad = judge({"question": QUESTION, "name": "math.cos", "evidence": "Return the cosine of x (measured in radians)."})
    assert good["sufficient"]
    assert good["missing"] == []
    assert not bad["sufficient"]
    assert bad["matched"] == []
    assert 0 <= bad["score"] < good["score"] <= 1


def test_judge_finds_nothing_in_empty_evidence() -> None:
    assert judge({"question": QUESTION, "name": "shutil.copytree", "evidence": " "})["score"] == 0


@pytest.mark.parametrize("field", ["question", "name", "evidence"])
def test_judge_names_a_missing_field(field: str) -> None:
    body = {"question": "q", "name": "n", "evidence": "e"}
    del body[field]
    with pytest.raises(InputError, match=field):
        judge(body)


# --- plan --------------------------------------------------------------------------------------------------------------


def test_plan_searches_first_without_filler_words() -> None:
    action = ask()
    assert (action["action"], action["query"]) == ("search", "copy directory tree")


def test_plan_looks_up_the_most_promising_hit_then_answers_from_its_evidence() -> None:
    assert ask((search("a"), HITS))["name"] == "shutil.copytree"
    seen = {"signature": "(src, dst)", "summary": "Copy a tree.", "score": 0.9, "sufficient": True, "missing": []}
    action = ask((search("a"), HITS), (lookup("shutil.copytree"), seen))
    assert action["action"] == "answer"
    assert action["answer"] == "shutil.copytree(src, dst): Copy a tree."
    assert action["evidence"] == ["Copy a tree."]


def test_plan_reformulates_when_the_evidence_was_judged_insufficient() -> None:
    poor = {"signature": "", "summary": "", "score": 0.1, "sufficient": False, "missing": ["tree"]}
    action = ask((search("copy directory tree"), HITS), (lookup("shutil.copytree"), poor), (lookup("os.mkdir"), poor))
    assert (action["action"], action["query"]) == ("search", "tree")


def test_plan_says_not_found_when_nothing_suffices() -> None:
    poor = {"signature": "", "summary": "", "score": 0.1, "sufficient": False, "missing": []}
    action = ask((search("a"), {"hits": []}), (lookup("os.mkdir"), poor), most=3)
    assert (action["action"], action["name"], action["evidence"]) == ("answer", "", [])


def test_plan_answers_in_the_last_iteration_whatever_happened() -> None:
    for most in range(1, 8):
        observations = [(search(f"q{number}"), {"hits": []}) for number in range(most - 1)]
        assert ask(*observations, most=most)["action"] == "answer"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"observations": [], "max_iterations": 6}, "question"),
        ({"question": "q", "max_iterations": 6}, "observations"),
        ({"question": "q", "observations": []}, "max_iterations"),
        ({"question": "q", "observations": [], "max_iterations": True}, "max_iterations"),
        ({"question": "q", "observations": [], "max_iterations": 0}, "max_iterations"),
        ({"question": "q", "observations": [7], "max_iterations": 6}, r"observations\[0\]"),
        ({"question": "q", "observations": [{"action": {}, "result": {}}], "max_iterations": 6}, "action"),
        ({"question": "q", "observations": [{"action": search("q"), "result": {}}], "max_iterations": 6}, "hits"),
        ({"question": "q", "observations": [{"action": lookup("n"), "result": {"score": "x"}}], "max_iterations": 6}, "score"),
    ],
)
def test_plan_names_the_field_that_is_wrong(body: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=field):
        plan(body)


# --- the model files, with Triton's module replaced ----------------------------------------------------------------------


class TritonError(Exception):
    INVALID_ARG = 2

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


@pytest.fixture
def pb_utils(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    shim = ModuleType("triton_python_backend_utils")
    tensor = lambda name, rows: SimpleNamespace(name=name, as_numpy=lambda: rows)  # noqa: E731
    response = lambda output_tensors, error=None: SimpleNamespace(tensors=output_tensors, error=error)  # noqa: E731
    shim.__dict__.update(
        Tensor=tensor,
        InferenceResponse=response,
        TritonError=TritonError,
        get_input_tensor_by_name=lambda request, name: request[name],
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", shim)
    return shim


def load(model: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"model_{model}", MODEL_REPOSITORY / model / "1" / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TritonPythonModel()


def request(name: str, *rows: bytes) -> dict[str, Any]:
    array = np.array(rows, dtype=np.object_).reshape(-1, 1)
    return {name: SimpleNamespace(as_numpy=lambda: array)}


@pytest.mark.usefixtures("pb_utils")
def test_embed_cuts_the_dynamic_batch_apart_again() -> None:
    one, two = load("embed").execute([request("text", b"copy a file"), request("text", b"x", b"open a \xff socket")])
    assert one.tensors[0].as_numpy().shape == (1, DIMENSIONS)
    np.testing.assert_array_equal(two.tensors[0].as_numpy(), embed(["x", "open a � socket"]))


@pytest.mark.usefixtures("pb_utils")
@pytest.mark.parametrize("model", ["plan", "judge"])
@pytest.mark.parametrize(("raw", "named"), [(b"{", "json"), (b"[]", "json"), (b"{}", "question")])
def test_wrong_input_is_refused_alone_and_named(model: str, raw: bytes, named: str) -> None:
    fine = {"question": "q", "name": "n", "evidence": "e", "observations": [], "max_iterations": 3}
    wrong, right = load(model).execute([request("json", raw), request("json", json.dumps(fine).encode())])
    assert named in str(wrong.error)
    assert wrong.error.code == TritonError.INVALID_ARG
    assert right.error is None


# --- the whole loop, in process ------------------------------------------------------------------------------------------


class Offline:
    """The four calls of the loop over the real corpus, with a brute-force vector search."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.names = list(self.entries)
        self.rows = {name: row for row, name in enumerate(self.names)}
        self.matrix = embed([entry.text for entry in entries])

    async def plan(self, body: dict[str, Any]) -> dict[str, Any]:
        return plan(json.loads(json.dumps(body)))  # what crosses the wire is JSON

    async def judge(self, body: dict[str, Any]) -> dict[str, Any]:
        return judge(body)

    async def search(self, query: str, limit: int) -> list[dict[str, Any]]:
        scores = self.matrix @ embed([query])[0]
        best = [self.entries[self.names[row]] for row in np.argsort(-scores, kind="stable")[:limit]]
        return [{"name": entry.name, "summary": entry.summary, "score": float(scores[self.rows[entry.name]])} for entry in best]

    async def lookup(self, name: str) -> dict[str, Any] | None:
        entry = self.entries.get(name)
        return entry and {key: getattr(entry, key) for key in ("name", "kind", "module", "signature", "doc")}

    async def answer(self, question: str, **more: Any) -> Answer:
        calls: dict[str, Any] = {"plan": self.plan, "search": self.search, "lookup": self.lookup, "judge": self.judge}
        return await answer(question, **calls | more)


@pytest.fixture(scope="module")
def offline() -> Offline:
    return Offline(build())


async def test_the_share_of_questions_answered(offline: Offline) -> None:
    answers = {entry["question"]: await offline.answer(entry["question"]) for entry in QUESTIONS}
    right = [entry["question"] for entry in QUESTIONS if answers[entry["question"]].name in entry["names"]]
    assert len(right) / len(QUESTIONS) >= SHARE_ANSWERED, sorted(set(answers) - set(right))
    for given in answers.values():
        assert given.iterations <= 8
        if given.name:  # every word of an answer comes from the entry
            entry = offline.entries[given.name]
            summary = " ".join(entry.doc.split("\n\n")[0].split())
            assert given.answer == f"{entry.name}{entry.signature}: {summary}"
            assert given.evidence == (summary,)


@pytest.mark.parametrize("question", ["how do I bake a chocolate cake?", "???", "who won the football match?"])
async def test_what_the_library_cannot_answer_is_not_found(offline: Offline, question: str) -> None:
    given = await offline.answer(question)
    assert (given.name, given.evidence) == ("", ())


async def test_events_are_told_as_they_happen(offline: Offline) -> None:
    events: list[str] = []
    given = await offline.answer(QUESTION, on_event=lambda kind, detail: events.append(kind))
    assert events[:2] == ["plan", "search"]
    assert events[-1] == "answer"
    assert [call.kind for call in given.calls] == events[:-1]


@pytest.mark.parametrize("action", [lookup("os.invented"), {"action": "answer", "name": "os.invented", "answer": "x"}, {}])
async def test_a_planner_that_invents_a_name_is_stopped(offline: Offline, action: dict[str, Any]) -> None:
    async def inventive(body: dict[str, Any]) -> dict[str, Any]:
        return action

    with pytest.raises(AgentError):
        await offline.answer(QUESTION, plan=inventive)


async def test_a_planner_that_never_answers_is_bounded(offline: Offline) -> None:
    async def endless(body: dict[str, Any]) -> dict[str, Any]:
        return search("again")

    with pytest.raises(AgentError, match="3 iterations"):
        await offline.answer(QUESTION, plan=endless, max_iterations=3)
