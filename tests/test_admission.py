from dataclasses import dataclass, field

from gateway.core.admission import AdmissionChain
from gateway.core.estimators import Rate
from gateway.core.events import EventOrder
from gateway.core.faults import Faults
from gateway.core.routing import choose, endpoints
from gateway.policy import Admit, Decision, Ending, Named, OnError, Reject, Sample, ScopeView, Slot
from gateway.types import Endpoint, EventKind, Flow, Kind, Lane, StepEvent, Target, WorkerInfo
from plugins.nearest_region import NearestRegion, NearestRegionConfig

FLOW = Flow("t", "x", Kind.TOOL, Lane.STANDARD)
VIEW = ScopeView("tool.x", 0, 1, 0, 0.0, 0.0)
SAMPLE = Sample("tool.x", Ending.SUCCEEDED, 0.1, 0.0, 0.1, 1)


@dataclass
class Scripted:
    name: str
    decision: Decision | Exception | None
    log: list[str] = field(default_factory=list)

    def decide(self, flow: Flow, view: ScopeView, now_s: float, random: float) -> Decision:
        self.log.append(f"decide {self.name}")
        if isinstance(self.decision, Exception):
            raise self.decision
        return self.decision  # type: ignore[return-value]

    def release(self, flow: Flow, state: object, now_s: float) -> None:
        self.log.append(f"release {self.name} {state}")

    def ended(self, flow: Flow, state: object, sample: Sample, now_s: float) -> None:
        self.log.append(f"ended {self.name} {state}")


def chain(log: list[str], *decisions: Decision | Exception | None, on_error: OnError = OnError.ADMIT) -> tuple[AdmissionChain, Faults]:
    faults = Faults(lambda named, error: log.append(f"fault {named.name}"))
    named = [Named(f"p{i}", Slot.ADMISSION, Scripted(f"p{i}", decision, log), on_error) for i, decision in enumerate(decisions)]
    return AdmissionChain(named, faults, lambda: 0.5), faults


def test_a_reject_releases_earlier_reservations_in_reverse() -> None:
    log: list[str] = []
    admission, _ = chain(log, Admit("a"), Admit("b"), Reject("NO", "no"), Admit("never"))
    reserved, reject, policy = admission.enter(FLOW, VIEW, 0.0)
    assert (reserved, policy) == ([], "p2")
    assert reject == Reject("NO", "no")
    assert log == ["decide p0", "decide p1", "decide p2", "release p1 b", "release p0 a"]


def test_an_admitted_step_ends_at_every_policy() -> None:
    log: list[str] = []
    admission, _ = chain(log, Admit("a"), Admit("b"))
    reserved, reject, _ = admission.enter(FLOW, VIEW, 0.0)
    assert reject is None
    admission.ended(reserved, FLOW, SAMPLE, 1.0)
    assert log[2:] == ["ended p0 a", "ended p1 b"]


def test_a_fault_is_answered_as_declared_and_counted() -> None:
    for on_error, rejected in ((OnError.ADMIT, False), (OnError.REJECT, True)):
        for nonsense in (ValueError("x"), None):
            log: list[str] = []
            admission, faults = chain(log, Admit("a"), nonsense, on_error=on_error)
            _, reject, policy = admission.enter(FLOW, VIEW, 0.0)
            assert (reject is not None) == rejected
            assert policy == ("p1" if rejected else "")
            assert faults.counts == {"p1": 1}


def test_rate_is_unbiased_from_the_start_and_forgets() -> None:
    rate = Rate(tau_s=2.0)
    assert rate.per_s(0.0) == 0.0
    for index in range(100):
        rate.add(index * 0.1)
    assert 9.0 < rate.per_s(9.9) < 11.0
    assert rate.per_s(60.0) < 0.01


def event(attempt: int, sequence: int) -> StepEvent:
    return StepEvent("s", EventKind.TOKEN, attempt, sequence)


def test_events_come_once_in_order_and_gaps_show() -> None:
    order = EventOrder(attempt=1, sequence=2)
    assert not order.accept(event(1, 2))
    assert not order.gap(event(1, 3))
    assert order.gap(event(1, 4))
    assert order.accept(event(1, 3))
    assert order.gap(event(2, 2)), "a new attempt begins at 1"
    assert not order.gap(event(2, 1))
    assert order.accept(event(2, 1))
    assert not order.accept(event(1, 9)), "an attempt that is over"


def test_routing_prefers_home_then_near_and_leaves_dead_regions_out() -> None:
    target = Target(Kind.TOOL, "x", home_region="b")

    def at(region: str, draining: bool = False) -> WorkerInfo:
        return WorkerInfo(f"w-{region}", region, Kind.TOOL, ("tool.x",), slots=4, draining=draining)

    def region_of(*workers: WorkerInfo) -> str | None:
        found = endpoints(target, ["a", "b", "c"], workers, {"a": 0.0, "b": 0.08, "c": 0.02}.__getitem__)
        policy = Named("nearest", Slot.ROUTING, NearestRegion(NearestRegionConfig()), OnError.ADMIT)
        return choose([policy], found, FLOW, 0.0, Faults(lambda *_: None))

    assert region_of(at("a"), at("b"), at("c")) == "b"
    assert region_of(at("c"), at("a")) == "a"
    assert region_of(at("b", draining=True), at("c")) == "c"
    assert region_of() is None


def test_without_routing_policies_the_home_region_wins() -> None:
    candidates = [Endpoint("a", 1, 1, 0, 0.0, home=False), Endpoint("b", 1, 1, 0, 0.1, home=True)]
    assert choose([], candidates, FLOW, 0.0, Faults(lambda *_: None)) == "b"
