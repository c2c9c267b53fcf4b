"""What happens to a policy that fails, and policies that are configured anew. The clock is a test's."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from gateway.core.containment import (
    BUDGET_S,
    MOST_SLOW_S,
    SUSPENDED_S,
    WINDOW_S,
    Containment,
    a_count,
    a_flow_of,
    a_probability,
    a_time,
    failed,
)
from gateway.core.policies import PolicyEntry, PolicySet
from gateway.policy import ADMIT, Named, OnError, PolicyType, Reject, Slot
from gateway.testing import ManualClock
from gateway.types import Flow, Kind, Lane


@dataclass
class Puppet:
    """Answers what it is told to, as slowly as it is told to."""

    clock: ManualClock
    answer: Any = 1.0
    takes_s: float = 0.0
    calls: int = 0

    def ask(self) -> Any:
        self.calls += 1
        self.clock.advance(self.takes_s)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@dataclass
class Rig:
    puppet: Puppet
    reports: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.contain = Containment(lambda named, what: self.reports.append(f"{named.name}: {what}"), self.puppet.clock.now_s)
        self.named = Named("puppet", Slot.ROUTING, self.puppet, OnError.ADMIT)

    def ask(self) -> Any:
        return self.contain.call(self.named, "ask", a_time, -7.0)


@pytest.fixture
def rig() -> Rig:
    return Rig(Puppet(ManualClock()))


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ZeroDivisionError("by nought"), "ask() raised ZeroDivisionError: by nought"),
        ("soon", "ask() raised TypeError: it returned 'soon', not seconds of at least 0"),
        (float("nan"), "ask() raised TypeError: it returned nan, not seconds of at least 0"),
        (True, "ask() raised TypeError: it returned True, not seconds of at least 0"),
    ],
)
def test_who_raises_or_answers_nonsense_is_answered_for_counted_and_named(rig: Rig, answer: Any, said: str) -> None:
    rig.puppet.answer = answer
    assert [rig.ask(), rig.ask()] == [-7.0, -7.0]
    assert rig.reports == [f"puppet: {said}"] * 2
    assert rig.contain.counts == {("puppet", "faults"): 2}
    rig.puppet.answer = 3
    assert rig.ask() == 3.0, "faults do not suspend"


def test_who_is_slow_is_suspended_and_comes_back(rig: Rig) -> None:
    rig.puppet.takes_s = MOST_SLOW_S / 4
    assert [rig.ask() for _ in range(4)] == [1.0] * 4, "a late answer is an answer"
    (said,) = rig.reports
    assert said == "puppet: ask() took 250.0 ms, and calls over 5 ms took 1.0 s of 10 s: it is not asked for 10 s"
    assert rig.ask() == -7.0
    assert rig.puppet.calls == 4
    rig.contain.tell(rig.named, "ask")
    assert rig.puppet.calls == 5, "what undoes an earlier call is said all the same"
    rig.puppet.takes_s = 0.0
    rig.puppet.clock.advance(SUSPENDED_S + 0.001)
    assert rig.ask() == 1.0
    assert rig.contain.counts == {("puppet", "slow"): 5, ("puppet", "suspended"): 1}


def test_slow_now_and_then_is_the_machine(rig: Rig) -> None:
    rig.puppet.takes_s = 2 * BUDGET_S
    for _ in range(500):
        assert rig.ask() == 1.0
        rig.puppet.clock.advance(WINDOW_S / 50)
    assert not rig.reports


def test_another_policy_is_asked_while_one_is_suspended(rig: Rig) -> None:
    rig.puppet.takes_s = 1.0
    rig.ask()
    other = Puppet(rig.puppet.clock, 2.0)
    assert rig.contain.call(Named("other", Slot.ROUTING, other, OnError.ADMIT), "ask", a_time, -7.0) == 2.0
    assert rig.ask() == -7.0


def test_on_error_says_what_a_failure_means() -> None:
    assert failed(Named("p", Slot.ADMISSION, None, OnError.ADMIT)) is ADMIT
    rejected = failed(Named("p", Slot.ADMISSION, None, OnError.REJECT))
    assert isinstance(rejected, Reject)
    assert (rejected.reason, rejected.scope) == ("POLICY_FAILED", "p")


FLOW = Flow("t", "x", Kind.TOOL, Lane.STANDARD)


@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (a_count, 0),
        (a_count, float("inf")),
        (a_count, float("nan")),
        (a_count, "8"),
        (a_probability, 1.5),
        (a_flow_of(FLOW), None),
        (a_flow_of(FLOW), Flow("other", "x", Kind.TOOL, Lane.STANDARD)),
        (a_flow_of(FLOW), Flow("t", "x", Kind.TOOL, Lane.STANDARD, tier=6)),
        (a_flow_of(FLOW), Flow("t", "x", Kind.TOOL, Lane.STANDARD, cost=0.0)),
    ],
)
def test_nonsense_is_known_as_such(check: Any, answer: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"it returned|it changed|out of range"):
        check(answer)


# ---- configured anew -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    size: int = 1


class Sized:
    """Objects 1, 3, 5 ... refuse sizes of 9 and more."""

    built = 0

    def __init__(self, config: Size) -> None:
        self.size = config.size
        self.strict = Sized.built % 2 == 1
        Sized.built += 1

    def reconfigure(self, config: Size) -> None:
        if self.strict and config.size > 9:
            raise ValueError("too big for me")
        self.size = config.size


def test_all_objects_of_a_policy_are_configured_anew_or_none() -> None:
    entry = PolicyEntry("sized", PolicyType("sized", Slot.LIMIT, Size, Sized), Size(), OnError.ADMIT)
    policies = PolicySet({Slot.LIMIT: [entry]})
    for _ in range(4):
        policies.all(Slot.LIMIT)
    assert policies.find("sized") is entry
    entry.reconfigure(Size(5))
    assert [one.size for one in entry.objects] == [5] * 4
    assert policies.all(Slot.LIMIT)[0].policy.size == 5, "later objects get it too"
    with pytest.raises(ValueError, match="too big"):
        entry.reconfigure(Size(10))
    assert [one.size for one in entry.objects] == [5] * 5
    assert entry.config == Size(5)


def test_one_that_cannot_go_back_keeps_no_other_from_it() -> None:
    class Stuck(Sized):
        def reconfigure(self, config: Size) -> None:
            raise RuntimeError(f"stuck at {self.size}, not {config.size}")

    entry = PolicyEntry("sized", PolicyType("sized", Slot.LIMIT, Size, Sized), Size(3), OnError.ADMIT)
    entry.objects += [Stuck(Size(3)), Stuck(Size(3))]
    entry.objects.insert(0, Sized(Size(3)))
    entry.objects[0].strict = False
    with pytest.raises(RuntimeError, match="stuck at 3, not 4"):
        entry.reconfigure(Size(4))
    assert entry.objects[0].size == 3
