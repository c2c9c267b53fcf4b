from dataclasses import dataclass, field

from gateway.core.admission import AdmissionChain, Refusal, Reservations
from gateway.core.containment import Containment
from gateway.core.estimators import Rate
from gateway.core.events import EventOrder
from gateway.policy import Admit, Decision, Ending, Named, OnError, Reject, Sample, ScopeView, Slot
from gateway.types import EventKind, Flow, Kind, Lane, StepEvent

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


def chain(
    log: list[str], *decisions: Decision | Exception | None, on_error: OnError = OnError.ADMIT, shadow: bool = False
) -> tuple[AdmissionChain, Containment]:
    contain = Containment(lambda named, what: log.append(f"fault {named.name}: {what}"), lambda: 0.0)
    named = [Named(f"p{i}", Slot.ADMISSION, Scripted(f"p{i}", decision, log), on_error, shadow) for i, decision in enumerate(decisions)]
    return AdmissionChain(named, contain, lambda: 0.5), contain


def admitted(entered: Reservations | Refusal) -> Reservations:
    assert not isinstance(entered, Refusal)
    return entered


def test_a_reject_releases_earlier_reservations_in_reverse() -> None:
    log: list[str] = []
    admission, _ = chain(log, Admit("a"), Admit("b"), Reject("NO", "no"), Admit("never"))
    assert admission.enter(FLOW, VIEW, 0.0) == Refusal(Reject("NO", "no"), "p2")
    assert log == ["decide p0", "decide p1", "decide p2", "release p1 b", "release p0 a"]


def test_an_admitted_step_ends_at_every_policy() -> None:
    log: list[str] = []
    admission, _ = chain(log, Admit("a"), Admit("b"))
    admission.ended(admitted(admission.enter(FLOW, VIEW, 0.0)), FLOW, SAMPLE, 1.0)
    assert log[2:] == ["ended p0 a", "ended p1 b"]


def test_a_fault_is_answered_as_declared_and_counted() -> None:
    for on_error, rejected in ((OnError.ADMIT, False), (OnError.REJECT, True)):
        for nonsense in (ValueError("x"), None):
            log: list[str] = []
            admission, contain = chain(log, Admit("a"), nonsense, on_error=on_error)
            entered = admission.enter(FLOW, VIEW, 0.0)
            if rejected:
                assert isinstance(entered, Refusal)
                assert (entered.policy, entered.reject.reason) == ("p1", "POLICY_FAILED")
                assert log[-1] == "release p0 a"
            else:
                admission.ended(admitted(entered), FLOW, SAMPLE, 1.0)
                assert log[-1] == "ended p0 a", "a policy that made no decision does not hear of the end"
            assert contain.counts == {("p1", "faults"): 1} | ({("p1", "rejected"): 1} if rejected else {})
            (fault,) = [line for line in log if line.startswith("fault")]
            assert (
                fault
                == f"fault p1: decide() raised {'ValueError: x' if nonsense else 'TypeError: it returned NoneType, not Admit or Reject'}"
            )


def test_a_shadow_keeps_nobody_out() -> None:
    log: list[str] = []
    admission, contain = chain(log, Admit("a"), Reject("NO", "no"), shadow=True)
    admission.ended(admitted(admission.enter(FLOW, VIEW, 0.0)), FLOW, SAMPLE, 1.0)
    assert log == ["decide p0", "decide p1", "ended p0 a"]
    assert contain.counts == {("p1", "shadow_rejected"): 1}


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
