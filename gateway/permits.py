"""Waiting for a permit: the asynchronous side of `core.permits`."""

import asyncio

from gateway.clock import Clock
from gateway.core.admission import Refusal, Reservations
from gateway.core.lifecycle import Event
from gateway.core.passage import Passage
from gateway.core.permit import Permit
from gateway.core.permits import Permits
from gateway.errors import Denied, Expired, Rejected
from gateway.policy import Ending, Sample
from gateway.types import Flow


class PermitDesk:
    def __init__(self, permits: Permits, clock: Clock) -> None:
        self.permits = permits
        self._clock = clock

    async def acquire(self, passage: Passage) -> None:
        """Admits the step, after waiting where that is allowed. Raises Rejected, Denied, Expired; nothing is held then."""
        flow = passage.flow
        if flow.deadline_s <= passage.arrived_s:
            raise Expired("the deadline has passed already", scope=flow.scope)
        permit = self.permits.enter(flow, passage.arrived_s)
        if permit.is_waiting:
            await self._wait(permit)
        if permit.refusal:
            raise _rejected(permit.refusal)
        passage.permit = permit
        passage.advance(Event.ADMIT)

    def release(self, passage: Passage, ending: Ending) -> None:
        """Ends the permit of a step, if it got one, and tells the policies."""
        if passage.permit is not None:
            now_s = self._clock.now_s()
            self.permits.end(passage.permit, passage.sample(ending, now_s), now_s)

    def reserve(self, flow: Flow) -> Reservations:
        """Asks the admission chain alone, for a job. `settle` or `give_back` must follow. Raises Rejected, Denied."""
        reserved = self.permits.reserve(flow, self._clock.now_s())
        if isinstance(reserved, Refusal):
            raise _rejected(reserved)
        return reserved

    def settle(self, reserved: Reservations, flow: Flow) -> None:
        self.permits.settle(reserved, flow, self._clock.now_s())

    def give_back(self, reserved: Reservations, flow: Flow) -> None:
        self.permits.give_back(reserved, flow, self._clock.now_s())

    async def _wait(self, permit: Permit) -> None:
        """Until the permit is granted or refused, or its time is over. A future and a timer: an Event and a timeout cost twice as much."""
        flow, loop = permit.flow, asyncio.get_running_loop()
        woken: asyncio.Future[None] = loop.create_future()

        def wake() -> None:
            if not woken.done():
                woken.set_result(None)

        permit.wake = wake
        timer = loop.call_later(min(permit.give_up_s, flow.deadline_s) - self._clock.now_s(), wake)
        try:
            await woken
        except asyncio.CancelledError:
            now_s = self._clock.now_s()
            if not self.permits.give_up(permit, now_s, left=True):
                self.permits.woken(permit, now_s)
                if not permit.refusal:
                    self.permits.end(permit, Sample(flow.scope, Ending.IGNORED, 0.0, 0.0, 0.0, 0), now_s)
            raise
        finally:
            timer.cancel()
        now_s = self._clock.now_s()
        if not permit.is_waiting:
            self.permits.woken(permit, now_s)
        elif self.permits.give_up(permit, now_s, left=flow.deadline_s <= now_s) and flow.deadline_s <= now_s:
            raise Expired("the deadline passed while the step waited for a permit", scope=flow.scope)


def _rejected(refusal: Refusal) -> Rejected:
    reject = refusal.reject
    kind = Denied if reject.denied else Rejected
    return kind(reject.message, reason=reject.reason, scope=reject.scope, policy=refusal.policy, retry_after_s=reject.retry_after_s)
