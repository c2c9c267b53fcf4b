"""Plugins that are wrong: each is one clear sentence that names it, and one that fails later costs nobody the gateway."""

import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway import config, loader
from gateway.core.containment import MOST_SLOW_S, SUSPENDED_S, Containment
from gateway.core.permits import Permits
from gateway.errors import ConfigError
from gateway.policy import Ending, Sample, Slot
from gateway.serve import log_fault
from gateway.testing import ManualClock
from gateway.types import Flow, Kind, Lane

GOOD = """
from dataclasses import dataclass
from gateway import ADMIT, PolicyType, Slot, hookimpl

@dataclass(frozen=True)
class Config:
    "None."

class Policy:
    def __init__(self, config): pass
    def decide(self, flow, view, now_s, random): return ADMIT
    def release(self, flow, state, now_s): pass
    def ended(self, flow, state, sample, now_s): pass

@hookimpl
def nearloop_policy_types():
    return [PolicyType("sample", Slot.ADMISSION, Config, Policy, "a sample")]
"""
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes a module that can be imported; returns its name. entry_point: as that of an installed package, too."""
    monkeypatch.syspath_prepend(tmp_path)

    def written(name: str, text: str, *, entry_point: bool = False) -> str:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        if entry_point:
            info = tmp_path / f"{name}_package-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[nearloop]\n{name}_point = {name}\n")
        return name

    return written


def refusal(*modules: str, policies: Any = ({"use": "sample"},)) -> str:
    """The one sentence with which a gateway with these plugins does not start."""
    parsed = config.parse({"plugins": list(modules), "policies": list(policies)})
    with pytest.raises(ConfigError) as caught:
        loader.build_policies(parsed, loader.find_plugins(parsed))
    (sentence,) = caught.value.problems
    assert "\n" not in sentence
    return sentence


def test_a_good_plugin_is_no_problem_also_when_it_is_named_twice(write: Write) -> None:
    name = write("fine_plugin", GOOD, entry_point=True)
    for modules in ([], [name]):
        parsed = config.parse({"plugins": modules, "policies": [{"use": "sample"}]})
        assert loader.build_policies(parsed, loader.find_plugins(parsed)).names == ["sample"]
    assert ("fine_plugin_point (fine_plugin-package)", "sample") in [
        (plugin, policy_type.name) for plugin, policy_type in loader.brought(loader.find_plugins(config.parse({})))
    ]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("import no_such_thing", "ModuleNotFoundError: No module named 'no_such_thing'"),
        ("raise RuntimeError('no licence\\nhere')", "RuntimeError: no licence here"),
        ("def broken(:", "SyntaxError: invalid syntax"),
    ],
)
def test_one_that_fails_to_import_is_named(write: Write, text: str, why: str) -> None:
    assert refusal(write("failing_plugin", text)).startswith(f"plugins: 'failing_plugin' cannot be loaded: {why}")
    write("installed_plugin", text, entry_point=True)
    where = "the entry point 'installed_plugin_point' of the package 'installed_plugin-package'"
    assert refusal().startswith(f"{where} cannot be loaded: {why}")


def test_a_hook_with_arguments_that_do_not_exist_is_named(write: Write) -> None:
    sentence = refusal(write("greedy_plugin", GOOD.replace("nearloop_policy_types()", "nearloop_policy_types(wishes)")))
    assert sentence.startswith("plugins: 'greedy_plugin' cannot be loaded: PluginValidationError")
    assert "wishes" in sentence


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("return [Pol", "return [1] or [Pol", "plugin 'odd_plugin': nearloop_policy_types() brought int, not a PolicyType"),
        ("return [Pol", "return 1 / 0 or [Pol", "plugin 'odd_plugin': nearloop_policy_types() raised ZeroDivisionError: division by zero"),
        ("return [Pol", "return None and [Pol", "plugin 'odd_plugin': nearloop_policy_types() raised TypeError"),
        ("Slot.ADMISSION", "'admision'", "plugin 'odd_plugin': policy 'sample': there is no slot 'admision'; did you mean 'admission'?"),
        ("Slot.ADMISSION, Config", "Slot.ADMISSION, dict", "plugin 'odd_plugin': policy 'sample': its config must be a dataclass"),
        ('"sample"', '"a sample"', "plugin 'odd_plugin': the policy's name 'a sample' is not an id"),
    ],
)
def test_one_that_brings_something_else_is_named(write: Write, old: str, new: str, sentence: str) -> None:
    assert refusal(write("odd_plugin", GOOD.replace(old, new))).startswith(sentence)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "decide(self, flow, view, now_s, random)",
            "decide(self, flow)",
            "decide() must take (flow, view, now_s, random), and takes (flow)",
        ),
        ("def release(self, flow, state, now_s): pass", "", "lacks release, which the slot admission needs"),
        ("def ended", "async def ended", "ended() is async, and nobody would await it: policies are synchronous"),
        (
            "(self, config): pass",
            "(self): pass",
            "cannot be built: TypeError: Policy.__init__() takes 1 positional argument but 2 were given",
        ),
    ],
)
def test_a_policy_of_another_shape_is_named_with_both_signatures(write: Write, old: str, new: str, sentence: str) -> None:
    assert refusal(write("shapeless_plugin", GOOD.replace(old, new))) == f"policies.0 (sample): {sentence}"


def test_two_that_bring_the_same_name_are_both_named(write: Write) -> None:
    one, two = write("first_plugin", GOOD), write("second_plugin", GOOD)
    assert refusal(one, two) == "policy type 'sample' is brought by 'first_plugin' and 'second_plugin': remove or rename one"
    taken = write("usurping_plugin", GOOD.replace('"sample"', '"token_bucket"'))
    assert refusal(taken) == "policy type 'token_bucket' is brought by 'token_bucket' and 'usurping_plugin': remove or rename one"


def test_one_that_does_not_exist_is_refused_with_the_nearest_name() -> None:
    sentence = refusal(policies=[{"use": "token_bukkit"}])
    assert sentence == "policies.0 (token_bukkit): there is no policy 'token_bukkit'; did you mean 'token_bucket'?"
    assert "; there are " in refusal(policies=[{"use": "xyz"}])


# ---- while it runs -------------------------------------------------------------------------------------------------------------

FLOW = Flow("acme", "x", Kind.TOOL, Lane.STANDARD)
FAULTS = {
    "raises": ("return ADMIT", "return 1 / 0", "decide() raised ZeroDivisionError: division by zero"),
    "nonsense": ("return ADMIT", "return 'yes'", "decide() raised TypeError: it returned str, not Admit or Reject"),
    "mutates": ("return ADMIT", "flow.cost = 0", "decide() raised FrozenInstanceError: cannot assign to field 'cost'"),
    "reaches out": ("return ADMIT", "return view.nothing", "decide() raised AttributeError: 'ScopeView' object has no attribute 'nothing'"),
}


def permits_with(module: str, clock: Any, on_error: str) -> Permits:
    parsed = config.parse({"plugins": [module], "policies": [{"use": "sample", "on_error": on_error}]})
    contain = Containment(log_fault(clock), clock.now_s)
    return Permits(loader.build_policies(parsed, loader.find_plugins(parsed)), contain, lambda: 0.5)


@pytest.mark.parametrize("on_error", ["admit", "reject"])
@pytest.mark.parametrize("fault", FAULTS)
def test_one_that_fails_is_named_once_and_the_rest_goes_on(
    fault: str, on_error: str, write: Write, caplog: pytest.LogCaptureFixture
) -> None:
    old, new, said = FAULTS[fault]
    permits = permits_with(write("faulty_plugin", GOOD.replace(old, new)), ManualClock(), on_error)
    for _ in range(50):
        permit = permits.enter(FLOW, 0.0)
        if on_error == "reject":
            assert permit.refusal
            assert (permit.refusal.policy, permit.refusal.reject.reason) == ("sample", "POLICY_FAILED")
        else:
            assert permit.refusal is None
            permits.end(permit, Sample("tool.x", Ending.SUCCEEDED, 0.1, 0.0, 0.1, 0), 0.1)
    (line,) = caplog.messages
    assert line == f"policy sample (admission): {said}; going on as on_error = {on_error} says"


def test_a_slow_one_is_named_and_left_out_for_a_while(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    name = write("slow_plugin", GOOD.replace("return ADMIT", "spend(); return ADMIT"))
    permits = permits_with(name, clock, "reject")
    vars(sys.modules[name])["spend"] = lambda: clock.advance(MOST_SLOW_S / 4)
    permitted = [permits.enter(FLOW, 0.0) for _ in range(7)]
    assert [permit.refusal is None for permit in permitted] == [True] * 4 + [False] * 3
    (line,) = caplog.messages
    assert line.startswith("policy sample (admission): decide() took 250.0 ms")
    assert "it is not asked for 10 s; going on as on_error = reject says" in line
    clock.advance(SUSPENDED_S)
    assert permits.enter(FLOW, 0.0).refusal is None


def test_one_that_changes_what_is_shared_reaches_nobody_else(write: Write) -> None:
    """Steps, flows and views are frozen; there is nothing in them that could be changed in place."""
    permits = permits_with(write("fingering_plugin", GOOD.replace("return ADMIT", "view.limit = 0; return ADMIT")), ManualClock(), "admit")
    assert permits.enter(FLOW, 0.0).refusal is None
    assert permits.gate(FLOW.scope).view(0.0).limit > 0
    assert FLOW.cost == 1.0


def test_slots_know_their_protocols() -> None:
    assert set(loader.PROTOCOLS) == set(loader.METHODS) == set(Slot)
    assert textwrap.dedent(GOOD).count("def ") == 5
