"""What the documents promise: every hook has a section, every sample works."""

import inspect
import re
from pathlib import Path

import pytest

from gateway import config, hookspec, loader
from gateway.policy import Slot

ROOT = Path(__file__).resolve().parent.parent
GUIDE = (ROOT / "plugins/README.md").read_text()
HOOKS = [name for name, value in vars(hookspec).items() if name.startswith("nearloop_") and inspect.isfunction(value)]


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_has_a_section_in_the_guide(hook: str) -> None:
    assert f"### {hook}\n" in GUIDE


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented(hook: str) -> None:
    text = inspect.getdoc(getattr(hookspec, hook))
    assert text
    assert "versionadded" in text


@pytest.mark.parametrize("slot", list(Slot))
def test_every_slot_is_in_the_guide_with_its_methods(slot: Slot) -> None:
    row = next(line for line in GUIDE.splitlines() if line.startswith(f"| {slot.value} "))
    assert set(re.findall(r"`(\w+)`", row)) == set(loader.METHODS[slot])


def test_the_sample_policy_of_the_guide_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = re.search(r"```python\n(.*?)```", GUIDE, re.S)
    toml = re.search(r"```toml\n(.*?)```", GUIDE, re.S)
    assert python
    assert toml
    (tmp_path / "my_policies").mkdir()
    (tmp_path / "my_policies/lane_guard.py").write_text(python.group(1))
    monkeypatch.syspath_prepend(tmp_path)
    parsed = config.loads(toml.group(1), "guide")
    built = loader.build_policies(parsed, loader.find_plugins(parsed))
    assert [named.name for named in built.all(Slot.ADMISSION)] == ["lane_guard"]


@pytest.mark.parametrize("document", ["README.md", "plugins/README.md", "config/README.md"])
def test_links_in_documents_lead_somewhere(document: str) -> None:
    path = ROOT / document
    for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text()):
        assert (path.parent / link).exists(), f"{document} links to {link}, which is not there"
