"""The conformance suite finds what it looks for: for each rule a policy that breaks it, and one that keeps them all."""

import importlib
import itertools
import re
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gateway.conformance import RULES, Cost, PolicyConformance, check_policy, check_rule
from gateway.conformance_size import MANY_FLOWS, cost_us, size_bytes
from gateway.policy import ADMIT, Admit, Decision, PolicyType, Reject, Sample, ScopeView, Slot
from gateway.types import Flow


@dataclass(frozen=True)
class Config:
    """most: steps at once."""

    most: int = 8

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError("most must be at least 1")


class Good:
    """At most so many steps of a tenant at once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.held: dict[str, int] = {}

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        held = self.held.get(flow.tenant, 0)
        if held >= self.config.most:
            return Reject("TOO_MANY", f"tenant {flow.tenant} has {held} steps", retry_after_s=0.1)
        self.held[flow.tenant] = held + 1
        return ADMIT

    def release(self, flow: Flow, state: object, now_s: float) -> None:
        self.held[flow.tenant] -= 1
        if not self.held[flow.tenant]:
            del self.held[flow.tenant]

    def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None:
        self.release(flow, state, now_s)

    def reconfigure(self, config: Config) -> None:
        self.config = config


def policy(build: Any, config: type[Any] = Config, summary: str = "steps of a tenant at once", slot: Slot = Slot.ADMISSION) -> PolicyType:
    return PolicyType("sample", slot, config, build, summary)


class TestGood(PolicyConformance):
    """The way in which an author uses the suite."""

    policy_type = policy(Good)
    config = Config(3)


@dataclass
class Thawed:
    needed: int


class Short:
    def __init__(self, config: Config) -> None: ...

    def decide(self, flow: Flow) -> Decision:
        return ADMIT

    async def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None: ...


class Aloof(Good):
    """Nothing: it has nothing to give back."""

    def release(self, flow: Flow, state: object, now_s: float) -> None: ...


class Moody(Aloof):
    mood = itertools.count()  # of all objects together

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        return Reject("MOOD", f"mood {next(self.mood)}")


class Shouting(Aloof):
    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        return Reject("too many", "lower case is not a reason")


class Brittle(Aloof):
    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        return Admit(1 / view.drain_per_s)


class Meddling(Aloof):
    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        object.__setattr__(flow, "cost", 0.5)
        return ADMIT


class Impatient(Aloof):
    last_s = -1.0

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        rate = 1 / (now_s - self.last_s)
        self.last_s = now_s
        return Admit(rate)


class Hoarder(Good):
    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.seen: dict[str, float] = {}

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        self.seen[flow.tenant] = now_s
        return super().decide(flow, view, now_s, random)


class Tidy(Good):
    """Remembers 3,000 tenants: more than the first look sees."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.seen: OrderedDict[str, float] = OrderedDict()

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        self.seen[flow.tenant] = now_s
        if len(self.seen) > 3000:
            self.seen.popitem(last=False)
        return Admit()

    def release(self, flow: Flow, state: object, now_s: float) -> None: ...


class Keeper(Good):
    def release(self, flow: Flow, state: object, now_s: float) -> None:
        """Forgets to give back."""

    def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None:
        Good.release(self, flow, state, now_s)


class Forgetful(Good):
    def reconfigure(self, config: Config) -> None:
        self.config, self.held = config, {}


@pytest.mark.parametrize(
    ("rule", "policy_type", "said"),
    [
        ("documented", policy(Good, Thawed, ""), "no summary"),
        ("documented", policy(Good, Thawed), "Thawed has no docstring"),
        ("documented", policy(Good, Thawed), "Thawed is not frozen"),
        ("documented", policy(Good, Thawed), "needed of Thawed has no default"),
        ("signatures", policy(Short), "lacks release"),
        ("signatures", policy(Short), re.escape("decide() must take (flow, view, now_s, random), and takes (flow: gateway.types.Flow)")),
        ("signatures", policy(Short), re.escape("ended() is async")),
        ("deterministic", policy(Moody), "answer .* to the same calls was .* by one object and .* by another"),
        ("answers_in_range", policy(Shouting), "'too many' is not UPPER_SNAKE_CASE"),
        ("answers_in_range", policy(Brittle), r"decide\(.* raised ZeroDivisionError: float division by zero"),
        ("leaves_input_alone", policy(Meddling), r"decide\(\) changed what it was given: .* became"),
        ("survives_still_time", policy(Impatient), "ZeroDivisionError"),
        ("bounded_state", policy(Hoarder), "KiB after 5000 tenants and .* KiB after 20000"),
        ("releases", policy(Keeper), "it admits 0 of 100 steps after 200 that were reserved and released, and [1-9]"),
        ("reconfigures", policy(Forgetful), "parameters that it has already changed its answers|KeyError"),
    ],
    ids=lambda value: value if isinstance(value, str) and value in RULES else "",
)
def test_a_policy_that_breaks_a_rule_is_found(rule: str, policy_type: PolicyType, said: str) -> None:
    config = Thawed(1) if policy_type.config is Thawed else None
    found = check_rule(rule, policy_type, config, keys=(200, 1000), far_keys=(5000, 20_000))
    assert all(one.message.startswith("policy sample: ") for one in found)
    assert any(re.search(said, one.message) for one in found), found
    assert check_rule("bounded_state", policy(Good), keys=(200, 1000)) == []


def test_a_bound_above_the_first_look_is_a_bound() -> None:
    assert check_rule("bounded_state", policy(Tidy), keys=(200, 1000), far_keys=(5000, 20_000)) == []


def test_a_module_that_reads_clocks_or_rolls_dice_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(__file__).read_text().split("class TestGood")[0]
    (tmp_path / "dicing.py").write_text(text.replace("import itertools", "import asyncio.events\nfrom random import random as dice"))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("dicing")
    found = check_rule("pure", policy(module.Good, module.Config))
    assert [one.message.split(":")[1] for one in found] == [" its module imports asyncio", " its module imports random"]


def test_everything_is_reported_and_a_policy_without_methods_is_not_tried() -> None:
    assert {finding.rule for finding in check_policy(policy(Short))} == {"signatures"}
    assert str(check_policy(policy(lambda config: 1 / 0))[0]).startswith("signatures: policy sample: ZeroDivisionError")


def test_a_fairness_policy_that_picks_nobody_active_is_found() -> None:
    class Stubborn:
        def __init__(self, config: Config) -> None: ...
        def key(self, flow: Flow) -> str:
            return flow.tenant

        def activate(self, key: str, flow: Flow, now_s: float) -> None: ...
        def deactivate(self, key: str, now_s: float) -> None: ...
        def pick(self, now_s: float) -> str:
            return "me"

        def charge(self, key: str, flow: Flow, cost: float, now_s: float) -> None: ...

    (found,) = check_rule("answers_in_range", policy(Stubborn, slot=Slot.FAIRNESS))
    assert "pick() chose 'me', which is not active" in found.message


def test_size_counts_what_an_object_reaches() -> None:
    @dataclass(slots=True)
    class Slotted:
        inside: list[str] = field(default_factory=list)

    small, large = Slotted(), Slotted(["x" * 1000 + str(number) for number in range(100)])
    assert size_bytes(large) - size_bytes(small) > 100_000
    large.inside.append(large)  # type: ignore[arg-type]
    assert size_bytes({"a": large}) < 200_000


def test_the_cost_is_judged_by_its_size_and_its_growth() -> None:
    assert Cost(1.0, 1.5).findings == []
    assert Cost(0.2, 5.0).findings == [], "within the noise of a small number"
    assert Cost(40.0, 60.0).findings == [f"a step costs 60.0 us with {MANY_FLOWS} flows: 50 are allowed"]
    assert Cost(10.0, 30.0).findings == ["a step costs 10.0 us with 10 flows and 30.0 us with 5000"]
    assert 0 < cost_us(Slot.ADMISSION, Good(Config()), 10, rounds=1, calls=50) < 1e6
