from pathlib import Path

import pytest

from gateway import config, loader
from gateway.errors import ConfigError
from gateway.policy import Slot
from gateway.types import Kind

ROOT = Path(__file__).resolve().parent.parent


def problems(document: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.parse(document)
    return caught.value.problems


def test_three_mistakes_are_reported_as_three() -> None:
    found = problems({"gatway": {}, "gateway": {"listn": "x"}, "nats": {"replicas": 2}})
    assert len(found) == 3
    assert "gateway.listn: unknown key; did you mean 'listen'?" in found
    assert any("did you mean 'gateway'" in problem for problem in found)


def test_mistakes_across_sections() -> None:
    found = problems(
        {
            "gateway": {"region": "homme"},
            "targets": [{"kind": "tool", "name": "a", "home_region": "nowhere"}, {"kind": "tool", "name": "a"}],
        }
    )
    assert any("did you mean 'home'" in problem for problem in found)
    assert any("targets.0.home_region" in problem for problem in found)
    assert any("more than once" in problem for problem in found)


def _region(name: str, url: str = "", domain: str = "") -> dict[str, object]:
    return {"name": name} | ({"nats_urls": [url]} if url else {}) | ({"domain": domain} if domain else {})


HOME = _region("home", "nats://me:secret@a", "hub")


def test_regions_may_have_servers_of_their_own() -> None:
    found = config.parse({"regions": [HOME, _region("iad", "nats://b", "iad"), _region("lab", "nats://me:secret@a", "hub")]})
    assert [found.domain(name) for name in found.region_names] == ["hub", "iad", "hub"]
    assert [found.site(name) for name in found.region_names] == [("home", "lab"), ("iad",), ("home", "lab")]
    assert found.nats_urls("iad") == ("nats://b",)


def test_regions_that_share_servers_are_one_site() -> None:
    found = config.parse({"regions": [_region("home"), _region("iad")]})
    assert (found.domain("iad"), found.site("iad")) == ("", ("home", "iad"))


@pytest.mark.parametrize(
    ("regions", "sentences"),
    [
        ([_region("home", "nats://a"), _region("iad", "nats://b")], ["0.domain: region 'home' needs", "1.domain: region 'iad' needs"]),
        ([HOME, _region("iad")], ["1.domain: region 'iad' needs nats_urls and a domain"]),
        ([HOME, _region("iad", "nats://b")], ["1.domain: region 'iad' needs nats_urls and a domain"]),
        ([_region("home", "", "hub")], ["0.domain: a region with a domain needs nats_urls"]),
        ([HOME, _region("iad", "nats://b", "hub")], ["1.domain: 'hub' is the domain of a region with other servers already"]),
        ([HOME, _region("iad", "nats://me:secret@a", "iad")], ["1.domain: a region with the same servers has another domain"]),
        ([HOME, _region("iad", "nats://b", "i.ad")], ["1.domain: 'i.ad' is not a domain: 1 to 64 letters"]),
    ],
)
def test_servers_that_cannot_be_told_apart_are_refused(regions: list[dict[str, object]], sentences: list[str]) -> None:
    found = problems({"regions": regions})
    assert [one.startswith(f"regions.{sentence}") for one, sentence in zip(found, sentences, strict=True)] == [True] * len(sentences)
    assert "secret" not in "".join(found)


@pytest.mark.parametrize(
    ("shared", "home", "iad"),
    [([], [], []), (["nats://a"], [], []), ([], ["nats://a"], ["nats://a"]), (["nats://a", "nats://b"], ["nats://b", "nats://a"], [])],
)
def test_the_same_servers_may_be_said_for_each_region(shared: list[str], home: list[str], iad: list[str]) -> None:
    regions = [{"name": "home", "nats_urls": home}, {"name": "iad", "nats_urls": iad}]
    assert config.parse({"nats": {"urls": shared}, "regions": regions}).nats_urls("iad") == tuple(iad or shared)


def test_the_reference_configuration_says_the_defaults() -> None:
    assert config.load(ROOT / "config/nearloop.toml").nats == config.parse({}).nats


@pytest.mark.parametrize("name", ["", "a b", "a.b", "*", ">", "x" * 65, "ä"])
def test_ids_in_the_configuration_are_checked(name: str) -> None:
    assert "is not an id" in problems({"targets": [{"kind": "tool", "name": name}]})[0]


def test_an_empty_file_works_and_a_broken_one_is_named(tmp_path: Path) -> None:
    empty, broken = tmp_path / "empty.toml", tmp_path / "broken.toml"
    empty.write_text("")
    broken.write_text("[gateway\n")
    assert config.load(empty).region_names == ("home",)
    with pytest.raises(ConfigError, match=r"broken\.toml.*\n.*not TOML"):
        config.load(broken)
    with pytest.raises(ConfigError, match="cannot be read"):
        config.load(tmp_path / "missing.toml")


def test_round_trips_count_both_ways() -> None:
    parsed = config.parse({"regions": [{"name": "home", "round_trip_ms": {"iad": 80}}, {"name": "iad"}]})
    assert parsed.round_trip_s("home", "iad") == parsed.round_trip_s("iad", "home") == 0.08
    assert parsed.round_trip_s("home", "home") == 0


def test_default_policies_are_built_in_order() -> None:
    parsed = config.parse({})
    manager = loader.find_plugins(parsed)
    policies, types = loader.build_policies(parsed, manager), loader.policy_types(manager)
    wanted: dict[Slot, list[str]] = {}
    for section in config.DEFAULT_POLICIES:
        wanted.setdefault(types[section.use].slot, []).append(section.name or section.use)
    assert {slot: [named.name for named in policies.all(slot)] for slot in policies.entries} == wanted
    assert {Slot.LIMIT, Slot.BACKPRESSURE, Slot.ROUTING, Slot.BATCHING} <= set(wanted)


def test_two_instances_of_a_type_with_names() -> None:
    entries = [{"use": "token_bucket", "name": "slow", "rate_per_s": 1}, {"use": "token_bucket", "name": "fast"}]
    parsed = config.parse({"policies": entries})
    built = loader.build_policies(parsed, loader.find_plugins(parsed)).all(Slot.ADMISSION)
    assert [named.name for named in built] == ["slow", "fast"]


def test_every_mistake_in_policies_is_reported() -> None:
    entries = [
        {"use": "token_bukket"},
        {"use": "token_bucket", "rate": 3},
        {"use": "fixed_limit", "limit": 0},
        {"use": "fixed_limit", "limit": "x", "name": "second"},
        {"use": "fixed_limit"},
    ]
    parsed = config.parse({"policies": entries})
    with pytest.raises(ConfigError) as caught:
        loader.build_policies(parsed, loader.find_plugins(parsed))
    text = "\n".join(caught.value.problems)
    for expected in ("did you mean 'token_bucket'", "unknown parameter 'rate'", "at least 1", "second", "the name 'fixed_limit' is taken"):
        assert expected in text


def test_a_plugin_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(ConfigError, match="'no_such_module' cannot be loaded"):
        loader.find_plugins(config.parse({"plugins": ["no_such_module"]}))


def test_a_plugin_with_a_misspelt_hook_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "misspelt_plugin.py").write_text("from gateway import hookimpl\n\n@hookimpl\ndef nearloop_polcy_types():\n    return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="nearloop_polcy_types"):
        loader.find_plugins(config.parse({"plugins": ["misspelt_plugin"]}))


def test_a_policy_without_a_needed_method_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking_plugin.py").write_text(
        "from dataclasses import dataclass\nfrom gateway import PolicyType, Slot, hookimpl\n\n"
        "@dataclass(frozen=True)\nclass C:\n    'None.'\n\n"
        "class P:\n    def __init__(self, config): pass\n    def limit(self, scope): return 1\n\n"
        "@hookimpl\ndef nearloop_policy_types():\n    return [PolicyType('lacking', Slot.LIMIT, C, P)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parsed = config.parse({"plugins": ["lacking_plugin"], "policies": [{"use": "lacking"}]})
    with pytest.raises(ConfigError, match="lacks on_sample"):
        loader.build_policies(parsed, loader.find_plugins(parsed))


@pytest.mark.parametrize("path", [*sorted((ROOT / "config").glob("*.toml")), ROOT / "gateway/demo/demo.toml"], ids=lambda path: path.name)
def test_every_shipped_configuration_loads(path: Path) -> None:
    loaded = config.load(path)
    loader.build_policies(loaded, loader.find_plugins(loaded))


def test_a_slot_that_nothing_asks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "redacting_plugin.py").write_text(
        "from dataclasses import dataclass\nfrom gateway import PolicyType, Slot, hookimpl\n\n"
        "@dataclass(frozen=True)\nclass C:\n    'None.'\n\n"
        "class P:\n    def __init__(self, config): pass\n    def redact(self, attributes): return {}\n\n"
        "@hookimpl\ndef nearloop_policy_types():\n    return [PolicyType('redacting', Slot.REDACTION, C, P)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    parsed = config.parse({"plugins": ["redacting_plugin"], "policies": [{"use": "redacting"}]})
    with pytest.raises(ConfigError, match="nothing asks policies of the slot redaction"):
        loader.build_policies(parsed, loader.find_plugins(parsed))


def test_a_target_section_becomes_a_target() -> None:
    section = config.parse({"targets": [{"kind": "tool", "name": "a", "slots": 3}]}).target_section(Kind.TOOL, "a")
    assert section
    assert section.target().slots == 3
