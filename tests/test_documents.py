"""What the documents promise: every hook has a section, every sample works."""

import inspect
import re
from pathlib import Path

import check_guide
import pytest

from gateway import config, hookspec, loader, plugin_facts
from gateway.conformance import check_policy
from gateway.policy import ScopeView, Slot
from gateway.types import Flow, Kind, Lane

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "plugins/README.md").read_text()
HOOKS = check_guide.HOOKS


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_section_in_the_guide_with_its_signature(hook: str) -> None:
    section = GUIDE.split(f"### {hook}\n", 1)[1].split("###", 1)[0]
    assert plugin_facts.signature(getattr(hookspec, hook)) in section


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented(hook: str) -> None:
    text = inspect.getdoc(getattr(hookspec, hook))
    assert text
    assert "versionadded" in text


@pytest.mark.parametrize("slot", list(Slot))
def test_every_slot_is_in_the_guide_with_the_signatures_of_its_methods(slot: Slot) -> None:
    section = GUIDE.split(f"### {slot.value}\n", 1)[1].split("###", 1)[0]
    lines = section.split("```py\n")[1].split("```")[0].splitlines()
    assert {line.split("(")[0].split(":")[0] for line in lines} == set(loader.METHODS[slot])
    assert lines == plugin_facts.methods(slot)


def test_what_the_guide_repeats_is_what_the_code_says() -> None:
    assert check_guide.written(GUIDE) == GUIDE, "run python -P tests/check_guide.py --write"


def test_every_built_in_policy_is_in_the_guide() -> None:
    for name, policy_type in loader.policy_types(loader.find_plugins(config.parse({}))).items():
        (row,) = [line for line in GUIDE.splitlines() if f"[`{name}`]" in line]
        assert row.startswith(f"| {policy_type.slot.value} |")
        assert row.endswith(f"| {policy_type.summary} |")


def test_every_method_has_the_signature_that_the_guide_shows() -> None:
    """The text of a signature, defined anew, takes what the Protocol's method takes."""
    for slot in Slot:
        for line in plugin_facts.methods(slot):
            if "(" not in line:
                continue
            name, wanted = line.split("(")[0], inspect.signature(getattr(loader.PROTOCOLS[slot], line.split("(")[0]))
            assert re.findall(r"(\w+): ", line) == list(wanted.parameters)[1:], f"{slot}.{name}"


def test_the_configuration_of_the_tutorial_is_one() -> None:
    toml = next(block for block in re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL) if "night_shift" in block)
    parsed = config.loads(toml.replace('use = "night_shift"\nmost = 20', 'use = "token_bucket"'), "guide")
    assert loader.build_policies(parsed, loader.find_plugins(parsed)).names == ["token_bucket", "fixed_limit", "bounded_wait"]


def test_the_sample_policy_of_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = re.search(r"```python\n(.*?)```", GUIDE, re.S)
    toml = next(block for block in re.findall(r"```toml\n(.*?)```", GUIDE, re.S) if "lane_guard" in block)
    assert python
    (tmp_path / "my_policies").mkdir()
    (tmp_path / "my_policies/lane_guard.py").write_text(python.group(1))
    monkeypatch.syspath_prepend(tmp_path)
    parsed = config.loads(toml, "guide")
    built = loader.build_policies(parsed, loader.find_plugins(parsed))
    (guard,) = built.all(Slot.ADMISSION)
    assert guard.name == "lane_guard"
    flow = Flow("other", "x", Kind.TOOL, Lane.INTERACTIVE)
    refused = guard.policy.decide(flow, ScopeView("tool.x", 0, 1, 0, 0.0, 0.0), 0.0, 0.0)
    assert refused.reason == "LANE_DENIED"
    types = loader.policy_types(loader.find_plugins(parsed))
    assert check_policy(types["lane_guard"]) == []


@pytest.mark.parametrize("document", ["README.md", "plugins/README.md", "config/README.md"])
def test_links_in_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), f"{document} links to {link}, which is not there"
