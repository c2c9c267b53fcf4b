"""Who may go on, and who waits: the admission chain, then the gate of the target. A permit ends exactly once, in `release`."""

import asyncio
from collections.abc import Callable

from gateway.clock import Clock
from gateway.core.admission import AdmissionChain, Reservations
from gateway.core.faults import Faults
from gateway.core.gate import Gate, GatePolicies, Ticket
from gateway.core.lifecycle import Event
from gateway.core.passage import Passage
from gateway.errors import Denied, Expired, Rejected
from gateway.loader import PolicySet
from gateway.policy import Ending, Reject, Sample, Slot
from gateway.types import Flow


class Permits:
    def __init__(self, policies: PolicySet, clock: Clock, random: Callable[[], float], faults: Faults) -> None:
        self._clock = clock
        self._random = random
        self._faults = faults
        self._chain = AdmissionChain(policies.all(Slot.ADMISSION), faults, random)
        self._limits = policies.all(Slot.LIMIT)
        self._observers = policies.all(Slot.OBSERVER)
        self._gate_policies = GatePolicies(
            self._limits, policies.one(Slot.FAIRNESS), policies.one(Slot.ORDERING), policies.all(Slot.BACKPRESSURE)
        )
        self._gates: dict[str, Gate] = {}

    async def acquire(self, passage: Passage) -> None:
        """Admits the step, after waiting where that is allowed. Raises Rejected, Expired; nothing is held then."""
        flow = passage.flow
        if flow.deadline_s <= self._clock.wall_s():
            raise Expired("the deadline has passed already", scope=flow.scope)
        reserved = self.reserve(flow)
        gate = self.gate(flow.scope)
        try:
            reject = await self._through(gate, passage)
            if reject:
                raise self._rejected(flow, reject, policy=reject.reason.lower())
        except BaseException:
            self._chain.release(reserved, flow, self._clock.now_s())
            raise
        passage.reserved, passage.gate, passage.inflight = reserved, gate, gate.inflight
        passage.advance(Event.ADMIT)

    def release(self, passage: Passage, ending: Ending) -> None:
        """Ends the permit of a step, if it got one, and tells the policies."""
        if passage.gate is None or passage.reserved is None:
            return
        flow, now_s = passage.flow, self._clock.now_s()
        sample = passage.sample(ending, now_s)
        self._chain.ended(passage.reserved, flow, sample, now_s)
        for named in self._limits:
            try:
                named.policy.on_sample(sample, now_s)
            except Exception as error:
                self._faults.note(named, error)
        for named in self._observers:
            try:
                named.policy.ended(flow, sample, now_s)
            except Exception as error:
                self._faults.note(named, error)
        passage.gate.release(now_s, completed=ending is Ending.SUCCEEDED)

    def reserve(self, flow: Flow) -> Reservations:
        """Asks the admission chain alone; `settle` or `give_back` must follow. Raises Rejected."""
        now_s = self._clock.now_s()
        reserved, reject, policy = self._chain.enter(flow, self.gate(flow.scope).view(now_s), now_s)
        if reject:
            raise self._rejected(flow, reject, policy)
        return reserved

    def settle(self, reserved: Reservations, flow: Flow) -> None:
        """The step was stored as a job: what was reserved is used, and nothing was learnt about capacity."""
        sample = Sample(flow.scope, Ending.IGNORED, 0.0, 0.0, 0.0, self.gate(flow.scope).inflight, flow.cost)
        self._chain.ended(reserved, flow, sample, self._clock.now_s())

    def give_back(self, reserved: Reservations, flow: Flow) -> None:
        """The step was not stored."""
        self._chain.release(reserved, flow, self._clock.now_s())

    def gate(self, scope: str) -> Gate:
        found = self._gates.get(scope)
        if found is None:
            found = self._gates[scope] = Gate(scope, self._gate_policies, self._faults, self._random)
        return found

    async def _through(self, gate: Gate, passage: Passage) -> Reject | None:
        """Waits, where waiting is allowed, until the gate grants a place."""
        flow, arrived_s = passage.flow, passage.arrived_s
        ticket = Ticket(flow, arrived_s)
        reject = gate.offer(ticket, arrived_s)
        if reject or not ticket.waiting:
            return reject
        granted = asyncio.Event()
        ticket.wake = granted.set
        try:
            async with asyncio.timeout(min(ticket.give_up_s - arrived_s, max(0.0, flow.deadline_s - self._clock.wall_s()))):
                await granted.wait()
        except TimeoutError:
            now_s = self._clock.now_s()
            if not gate.abandon(ticket, now_s):
                return None  # granted in the last moment
            if flow.deadline_s <= self._clock.wall_s():
                raise Expired("the deadline passed while the step waited for a permit", scope=gate.scope) from None
            message = f"no permit for {gate.scope} within {now_s - arrived_s:.1f} s"
            return Reject("WAIT_TIMEOUT", message, gate.scope, gate.retry_after_s(flow, now_s))
        except asyncio.CancelledError:
            now_s = self._clock.now_s()
            if not gate.abandon(ticket, now_s):
                gate.release(now_s, completed=False)
            raise
        return None

    def _rejected(self, flow: Flow, reject: Reject, policy: str) -> Rejected:
        for named in self._observers:
            try:
                named.policy.rejected(flow, policy, reject.reason, self._clock.now_s())
            except Exception as error:
                self._faults.note(named, error)
        kind = Denied if reject.denied else Rejected
        return kind(reject.message, reason=reject.reason, scope=reject.scope, policy=policy, retry_after_s=reject.retry_after_s)
