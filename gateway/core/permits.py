"""Who may go on, and who waits: the admission chain, then the gate of the target. A permit ends exactly once.

Pure: it decides and keeps count, and time is an argument. `gateway/permits.py` does the waiting; the policy laboratory drives the same
object with a virtual clock.
"""

from collections.abc import Callable
from dataclasses import replace

from gateway.core.admission import AdmissionChain, Refusal, Reservations
from gateway.core.containment import Containment
from gateway.core.estimators import Average
from gateway.core.gate import Gate
from gateway.core.permit import Permit
from gateway.core.policies import PolicySet
from gateway.policy import Ending, Reject, Sample, Slot
from gateway.types import Flow


class Permits:
    """The gates of a process, by scope."""

    def __init__(self, policies: PolicySet, contain: Containment, random: Callable[[], float]) -> None:
        self.wait = Average(0.02)  # for a permit, seconds, all scopes
        self._strained_s = float("-inf")  # when a step last waited for its permit, or was refused for load
        self._policies = policies
        self._contain = contain
        self._random = random
        self._observers = policies.all(Slot.OBSERVER)
        self._scopes: dict[str, tuple[AdmissionChain, Gate]] = {}

    def enter(self, flow: Flow, now_s: float) -> Permit:
        """The permit is granted, waits (is_waiting), or is refused (refusal)."""
        permit = Permit(flow, now_s)
        reserved = self.reserve(flow, now_s)
        if isinstance(reserved, Refusal):
            permit.refusal = reserved
            return permit
        permit.reserved = reserved
        if reserved.favoured:
            permit.flow = replace(flow, favoured=True)
        refusal = self._of(flow.scope)[1].offer(permit, now_s)
        if refusal:
            self._refuse(permit, refusal, now_s)
        elif not permit.is_waiting:
            self.wait.add(0.0)
        else:
            self._strained_s = now_s
        return permit

    def woken(self, permit: Permit, now_s: float) -> None:
        """To be called by who waited, after `wake`."""
        if permit.refusal:
            self._refuse(permit, permit.refusal, now_s)
        else:
            self._strained_s = now_s
            self.wait.add(permit.granted_s - permit.arrived_s)

    def give_up(self, permit: Permit, now_s: float, *, left: bool = False) -> bool:
        """The permit's time to wait is over, or its caller has left; False when it was granted or refused in the last moment."""
        gate = self._of(permit.flow.scope)[1]
        if not gate.abandon(permit, now_s):
            return False
        waited_s = now_s - permit.arrived_s
        message = f"no permit for {gate.scope} within {waited_s:.1f} s"
        hint_s = None if left else gate.retry_after_s(permit.flow, now_s)
        self._refuse(permit, Refusal(Reject("WAIT_TIMEOUT", message, gate.scope, hint_s), "wait_timeout"), now_s, tell=not left)
        return True

    def end(self, permit: Permit, sample: Sample, now_s: float) -> None:
        """A granted step has ended; the policies learn from it. sample.inflight, cost and waited_s are filled in here."""
        chain, gate = self._of(permit.flow.scope)
        cost = permit.flow.cost
        if sample.ending is Ending.SUCCEEDED and sample.service_s > 0.0 and gate.unit.value > 0.0:
            cost = sample.service_s / gate.unit.value
        elif sample.round_trip_s > 0.0 and gate.unit.value > 0.0:  # it held its place, whatever came of it
            cost = max(cost, (sample.round_trip_s - sample.queue_s) / gate.unit.value)
        sample = Sample(  # several times faster than replace(), once for each step
            sample.scope,
            sample.ending,
            sample.round_trip_s,
            sample.queue_s,
            sample.service_s,
            permit.inflight,
            cost,
            sample.worker_wait_s,
            permit.granted_s - permit.arrived_s,
        )
        chain.ended(permit.reserved, permit.flow, sample, now_s)
        for named in self._observers:
            self._contain.call(named, "ended", None, None, permit.flow, sample, now_s)
        gate.end(permit, sample, now_s)

    # ---- jobs wait in the queue of their target and not at its gate: only the admission chain is asked --------------------------

    def reserve(self, flow: Flow, now_s: float) -> Reservations | Refusal:
        """`settle` or `give_back` must follow what was reserved."""
        chain, gate = self._of(flow.scope)
        view = gate.view(now_s)
        entered = chain.enter(flow, view, now_s)
        if isinstance(entered, Refusal):
            reject = entered.reject
            if not reject.denied:
                self._strained_s = now_s
            if reject.drain_hint:
                gate.refused_s = now_s
                hint_s = gate.retry_after_s(flow, now_s, view)
                entered = Refusal(Reject(reject.reason, reject.message, reject.scope, hint_s, reject.denied), entered.policy)
            self._tell(flow, entered, now_s)
        return entered

    def settle(self, reserved: Reservations, flow: Flow, now_s: float) -> None:
        """The step was stored as a job: what was reserved is used, and nothing was learnt about capacity."""
        chain, gate = self._of(flow.scope)
        chain.ended(reserved, flow, Sample(flow.scope, Ending.IGNORED, 0.0, 0.0, 0.0, gate.inflight, flow.cost), now_s)

    def give_back(self, reserved: Reservations, flow: Flow, now_s: float) -> None:
        """The step was not stored."""
        self._of(flow.scope)[0].release(reserved, flow, now_s)

    # ---- scopes ----------------------------------------------------------------------------------------------------------------

    def gate(self, scope: str) -> Gate:
        return self._of(scope)[1]

    def gates(self) -> dict[str, dict[str, int]]:
        """For people: what is in flight, may be, and waits, by scope."""
        return {
            scope: {"inflight": gate.inflight, "limit": gate.limit(), "waiting": gate.waiting} for scope, (_, gate) in self._scopes.items()
        }

    def is_strained(self, now_s: float, within_s: float) -> bool:
        """Does a step wait for its permit, or did one within the last seconds, or was one refused for load?"""
        return now_s - self._strained_s < within_s or any(gate.waiting for _, gate in self._scopes.values())

    def fill(self, now_s: float) -> None:
        """Limits may have changed from outside."""
        for _, gate in self._scopes.values():
            gate.changed(now_s)

    def _of(self, scope: str) -> tuple[AdmissionChain, Gate]:
        found = self._scopes.get(scope)
        if found is None:
            chain = AdmissionChain(self._policies.all(Slot.ADMISSION), self._contain, self._random)
            found = self._scopes[scope] = (chain, Gate(scope, self._policies, self._contain, self._random))
        return found

    def _refuse(self, permit: Permit, refusal: Refusal, now_s: float, *, tell: bool = True) -> None:
        permit.refusal = refusal
        self._strained_s = now_s
        chain, gate = self._of(permit.flow.scope)
        chain.release(permit.reserved, permit.flow, now_s)
        permit.reserved = Reservations()
        if tell:
            gate.refused_s = now_s
            self._tell(permit.flow, refusal, now_s)

    def _tell(self, flow: Flow, refusal: Refusal, now_s: float) -> None:
        for named in self._observers:
            self._contain.call(named, "rejected", None, None, flow, refusal.policy, refusal.reject.reason, now_s)
