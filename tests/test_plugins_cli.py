"""`nearloop plugins ...`, and every policy that `new` can start."""

import importlib
import json
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway import config, loader, plugin_facts, scaffolding
from gateway.cli import app
from gateway.conformance import RULES, check_rule
from gateway.policy import Slot

ROOT = Path(__file__).resolve().parent.parent
SLOTS = [slot for slot in Slot if slot not in loader.NOT_ASKED]


def plugins(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["plugins", *arguments], env={"COLUMNS": "160", "NO_COLOR": "1", "TERM": "dumb"})


def test_list_says_slot_origin_use_and_summary(tmp_path: Path) -> None:
    toml = tmp_path / "gateway.toml"
    toml.write_text('[[policies]]\nuse = "token_bucket"\nname = "quota"\nshadow = true\n\n[[policies]]\nuse = "token_bucket"\n')
    done = plugins("list", "--json", "--config", str(toml))
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    (row,) = [row for row in rows if row["name"] == "token_bucket"]
    assert (row["slot"], row["from"], row["used_as"]) == ("admission", "built in", ["quota (shadow)", "token_bucket"])
    assert all(row["summary"] for row in rows)
    found = loader.policy_types(loader.find_plugins(config.parse({})))
    assert {row["name"] for row in rows} == set(found)
    table = plugins("list")
    (line,) = [line for line in table.stdout.splitlines() if " token_bucket " in line]
    assert found["token_bucket"].summary in line


def test_describe_shows_parameters_and_methods() -> None:
    text = plugins("describe", "token_bucket").stdout
    for expected in (
        "token_bucket, a policy of the slot admission",
        "Question: does this tenant ask for more than its rate?",
        "  rate_per_s: float = 5000.0",
        "  tenants: dict[str, float] = {}",
        "Objects: one for the process.",
        "unless the configuration says otherwise: the step goes on without it.",
        "  decide(flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision",
    ):
        assert expected in text
    assert "Objects: one for each target and tier." in plugins("describe", "plugins.drr:drr").stdout
    assert "  weight: float\n" in plugins("describe", "nearest_region").stdout


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("token_bukket", "there is no policy 'token_bukket', and no module of that name; did you mean 'token_bucket'?"),
        ("no.such.module", "'no.such.module' cannot be loaded: ModuleNotFoundError"),
        ("plugins.drr:dr", "'plugins.drr' brings no policy 'dr'; did you mean 'drr'?"),
        ("gateway.errors", "'gateway.errors' cannot be loaded: AttributeError"),
    ],
)
@pytest.mark.parametrize("command", ["describe", "check"])
def test_what_is_not_there_is_one_sentence(command: str, name: str, sentence: str) -> None:
    done = plugins(command, name)
    assert done.exit_code == 1
    assert sentence in done.stderr
    assert "Traceback" not in done.output


def test_check_passes_a_good_policy_and_says_what_it_costs() -> None:
    done = plugins("check", "fixed_limit")
    assert "us for a step with 10 flows and " in done.stdout
    (row,) = json.loads(plugins("check", "plugins.fixed_limit:FixedLimit", "--json").stdout)
    assert (row["policy"], row["slot"]) == ("fixed_limit", "limit")
    assert [finding for finding in row["findings"] if finding["rule"] != "cost"] == []
    assert row["cost_us"]["few_us"] > 0


def test_check_says_what_is_wrong_and_ends_with_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hasty_plugin.py").write_text(
        "import time\nfrom dataclasses import dataclass\nfrom gateway import PolicyType, Slot, hookimpl\n\n"
        "@dataclass\nclass C:\n    speed: int = 1\n\n"
        "class P:\n    def __init__(self, config): pass\n    def limit(self, scope): return 0\n    def on_sample(self, *a): pass\n\n"
        "@hookimpl\ndef nearloop_policy_types():\n    return [PolicyType('hasty', Slot.LIMIT, C, P)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    done = plugins("check", "hasty_plugin")
    assert done.exit_code == 1
    for sentence in (
        "documented: policy hasty: it has no summary",
        "documented: policy hasty: C has no docstring",
        "documented: policy hasty: C is not frozen",
        "pure: policy hasty: its module imports time",
        "answers_in_range: policy hasty: limit('tool.x'): it returned 0, not a number from 1 to a billion",
    ):
        assert sentence in done.stdout
    assert "findings in hasty_plugin" in done.stderr
    assert "keeps the contract" not in done.stdout


# ---- new -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", SLOTS)
def test_every_new_policy_keeps_the_contract_and_passes_its_test(slot: Slot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"made_{slot}"
    done = plugins("new", name, "--slot", slot.value, "--directory", str(tmp_path))
    assert done.exit_code == 0, done.output
    folder = tmp_path / scaffolding.package_of(name)
    module_name = scaffolding.module_of(name)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["pyproject.toml", "README.md", f"{module_name}.py", f"test_{module_name}.py"]
    )
    for path in folder.iterdir():
        for word in ("policy_name", "policy_module", "package-name", "PolicyName", "slot_name", "one_line", "test_imports"):
            assert word not in path.read_text(), f"{word} is left in {path.name}"
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["project"]["entry-points"] == {"nearloop": {name: module_name}}
    monkeypatch.syspath_prepend(folder)
    (policy_type,) = importlib.import_module(module_name).nearloop_policy_types()
    assert (policy_type.name, policy_type.slot) == (name, slot)
    for rule in RULES:
        assert check_rule(rule, policy_type, keys=(500, 2500), far_keys=(500, 2500)) == []
    test = importlib.import_module(f"test_{module_name}")
    own = [function for own_name, function in vars(test).items() if own_name.startswith("test_")]
    assert own
    for function in own:
        function()
    parsed = config.parse({"plugins": [module_name], "policies": [{"use": name}]})
    assert loader.build_policies(parsed, loader.find_plugins(parsed)).names == [name]


def test_there_is_a_template_for_every_slot_that_is_asked() -> None:
    assert list(scaffolding.ONE_LINES) == SLOTS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("Night-Shift", "--slot", "limit"), "is no name for a policy"),
        (("token_bucket", "--slot", "admission"), "there is a policy 'token_bucket' already"),
        (("night", "--slot", "redaction"), "nothing asks policies of the slot redaction"),
        (("night", "--slot", "limits"), "is not one of"),
    ],
)
def test_new_refuses_what_could_not_work(arguments: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    done = plugins("new", *arguments, "--directory", str(tmp_path))
    assert done.exit_code == 2
    assert sentence in " ".join(done.stderr.replace("│", " ").split())
    assert not list(tmp_path.iterdir())


def test_new_changes_nothing_that_exists(tmp_path: Path) -> None:
    assert plugins("new", "night", "--slot", "limit", "--directory", str(tmp_path)).exit_code == 0
    policy = tmp_path / "nearloop-night" / "nearloop_night.py"
    policy.write_text("mine")
    done = plugins("new", "night", "--slot", "admission", "--directory", str(tmp_path))
    assert done.exit_code == 2
    assert "exists already" in done.stderr
    assert policy.read_text() == "mine"


def test_signatures_are_those_of_the_source() -> None:
    assert plugin_facts.signature(plugin_facts.loader.PROTOCOLS[Slot.LIMIT].on_sample) == (
        "on_sample(sample: Sample, now_s: float, random: float) -> None"
    )
    for slot in Slot:
        assert len(plugin_facts.methods(slot)) == len(loader.METHODS[slot])
