"""The corpus: real, deterministic, free of side effects."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.demo.corpus import DOC_CHARS, SUMMARY_CHARS, Entry, build

QUESTIONS = json.loads((Path(__file__).parent / "data" / "stdlib_questions.json").read_text())


@pytest.fixture(scope="module")
def corpus() -> dict[str, Entry]:
    return {entry.name: entry for entry in build()}


def test_thousands_of_entries_of_every_kind(corpus: dict[str, Entry]) -> None:
    assert len(corpus) > 3000
    assert {entry.kind for entry in corpus.values()} == {"module", "class", "function", "method"}


def test_order_is_by_name_and_names_are_unique() -> None:
    names = [entry.name for entry in build()]
    assert names == sorted(set(names))


@pytest.mark.parametrize("name", ["shutil.copytree", "sorted", "str.split", "os.path.join", "asyncio.run", "json.loads"])
def test_canonical_public_names(corpus: dict[str, Entry], name: str) -> None:
    assert corpus[name].signature.startswith("(")
    assert corpus[name].summary


@pytest.mark.parametrize("name", ["asyncio.runners.run", "posixpath.join", "posix.mkdir", "_io.open", "this", "antigravity"])
def test_no_second_names_and_no_skipped_modules(corpus: dict[str, Entry], name: str) -> None:
    assert name not in corpus


def test_lengths_are_capped_and_nothing_depends_on_memory_addresses(corpus: dict[str, Entry]) -> None:
    for entry in corpus.values():
        assert 0 < len(entry.summary) <= SUMMARY_CHARS
        assert len(entry.doc) <= DOC_CHARS
        assert " at 0x" not in entry.signature


def test_every_question_has_an_expected_name_in_the_corpus(corpus: dict[str, Entry]) -> None:
    assert len(QUESTIONS) == 30
    for question in QUESTIONS:
        assert set(question["names"]) & set(corpus), question["question"]


def test_building_prints_nothing_warns_of_nothing_and_opens_no_window() -> None:
    program = (
        "import sys; from gateway.demo.corpus import build; build(); "
        "sys.exit(any(name in sys.modules for name in ('tkinter', 'turtle', 'idlelib', 'antigravity', 'this')))"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-P", "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
