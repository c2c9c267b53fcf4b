"""Steps for one model, sent one by one or held back until the batching policy lets them go together.

A batch is not one request: its steps go to the model server as separate requests at the same moment, and the server's own batcher puts
them into one execution. The seam costs a step microseconds and no turn of the event loop as long as the policy answers 0.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from gateway.clock import Clock, SystemClock
from gateway.core.estimators import Rate
from gateway.core.faults import FaultReport, Faults
from gateway.policy import BatchView, Named
from gateway.types import Target

log = logging.getLogger("nearloop.worker")

LEAST_WAIT_S = 0.001  # an event loop's timers are no finer, and a policy that asks for less would keep it busy


class Timer(Protocol):
    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Timer]


class Batch:
    """Steps that were sent together."""

    __slots__ = ("answered_s", "left", "sent_s", "size")

    def __init__(self, size: int, sent_s: float) -> None:
        self.size = self.left = size
        self.sent_s = sent_s
        self.answered_s = 0.0  # when its last answer came; 0 while there is none


class _Waiting:
    __slots__ = ("arrived_s", "deadline_s", "go")

    def __init__(self, arrived_s: float, deadline_s: float) -> None:
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.go: asyncio.Future[Batch] = asyncio.get_running_loop().create_future()


class Batcher:
    """The steps of one model: `enter`, send the step, `leave`.

    A full batch, and one that holds a step whose time is over, goes without asking. A policy that raises, or answers no number, is
    answered for: send now.
    """

    def __init__(self, named: Named, faults: Faults, clock: Clock, slots: int, max_size: int, call_later: CallLater | None = None) -> None:
        self.slots = slots
        self.max_size = max_size
        self._named = named
        self._faults = faults
        self._clock = clock
        self._call_later = call_later
        self._rate = Rate()
        self._waiting: list[_Waiting] = []
        self._running = 0
        self._timer: Timer | None = None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def enter(self, remaining_s: float) -> Batch:
        """Returns when the step may be sent; each return is followed by one `leave`. remaining_s is the time until its deadline."""
        now_s = self._clock.now_s()
        self._rate.add(now_s)
        wait_s = 0.0
        if not self._waiting:
            wait_s = self._wait_s(1, 0.0, remaining_s, now_s)
            if wait_s == 0.0:
                return self._sent(1, now_s)
        waiting = _Waiting(now_s, now_s + remaining_s)
        self._waiting.append(waiting)
        if wait_s > 0.0:
            self._look_in(wait_s)
        else:
            self._look()
        try:
            return await waiting.go
        except asyncio.CancelledError:
            if not waiting.go.cancelled():  # it had just been let go
                self.leave(waiting.go.result(), answered=False)
            elif waiting in self._waiting:
                self._waiting.remove(waiting)
                if not self._waiting:
                    self._stop_timer()
            raise

    def leave(self, batch: Batch, *, answered: bool) -> None:
        """A sent step is over. The policy hears of a batch when its last step is, unless none got an answer: that would be no sample.

        Its service time is that until the last answer.
        """
        self._running -= 1
        batch.left -= 1
        if answered:
            batch.answered_s = self._clock.now_s()
        if batch.left or not batch.answered_s:
            return
        try:
            self._named.policy.on_batch(batch.size, batch.answered_s - batch.sent_s, batch.answered_s)
        except Exception as error:
            self._faults.note(self._named, error)

    def _look(self) -> None:
        """Sends what waits, or looks again later."""
        self._stop_timer()
        # a step can be cancelled and not yet have had its turn to leave
        self._waiting = [one for one in self._waiting if not one.go.done()]
        if not self._waiting:
            return
        now_s = self._clock.now_s()
        slack_s = min(one.deadline_s for one in self._waiting) - now_s
        wait_s = self._wait_s(len(self._waiting), now_s - self._waiting[0].arrived_s, slack_s, now_s)
        if wait_s > 0.0:
            self._look_in(wait_s)
            return
        going, self._waiting = self._waiting, []
        batch = self._sent(len(going), now_s)
        for one in going:
            one.go.set_result(batch)

    def _wait_s(self, size: int, oldest_wait_s: float, slack_s: float, now_s: float) -> float:
        """0 to send now, else until when nobody need look; never beyond the first deadline."""
        if size >= self.max_size or slack_s <= 0.0:
            return 0.0
        idle = max(0, self.slots - self._running - size)
        view = BatchView(size, self.max_size, oldest_wait_s, slack_s, idle, self._rate.per_s(now_s))
        try:
            wait_s: float = self._named.policy.wait_s(view, now_s)
            return min(max(wait_s, LEAST_WAIT_S), slack_s) if wait_s > 0.0 else 0.0
        except Exception as error:
            self._faults.note(self._named, error)
            return 0.0

    def _sent(self, size: int, now_s: float) -> Batch:
        self._running += size
        return Batch(size, now_s)

    def _look_in(self, wait_s: float) -> None:
        call_later = self._call_later or asyncio.get_running_loop().call_later
        self._timer = call_later(wait_s, self._look)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Batching:
    """The batchers of a worker, by model. `slots(target)` is how many of a target's steps the worker takes at once."""

    def __init__(
        self,
        named: Named,
        slots: Callable[[Target], int],
        *,
        faults: Faults | None = None,
        clock: Clock | None = None,
        call_later: CallLater | None = None,
    ) -> None:
        self._named = named
        self._slots = slots
        self.faults = faults or Faults(log_once())
        self._clock = clock or SystemClock()
        self._call_later = call_later
        self._batchers: dict[str, tuple[Target, Batcher]] = {}

    def of(self, target: Target) -> Batcher:
        """The same one for a model as long as the worker lives; a model that was loaded again may bring other sizes."""
        known, batcher = self._batchers.get(target.name, (None, None))
        if batcher is None:
            batcher = Batcher(self._named, self.faults, self._clock, 0, 0, self._call_later)
        if known is not target:
            batcher.slots = self._slots(target)
            batcher.max_size = max(1, target.max_batch_size)
            self._batchers[target.name] = (target, batcher)
        return batcher


def log_once() -> FaultReport:
    """Logs the first fault of each policy; a policy that fails with every step must not fill the log."""
    said: set[str] = set()

    def report(named: Named, error: Exception) -> None:
        if named.name not in said:
            said.add(named.name)
            log.error("policy %s (%s) raised %s: %s; steps are sent at once", named.name, named.slot, type(error).__name__, error)

    return report
