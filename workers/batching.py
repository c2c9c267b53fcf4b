"""When the steps for a model are executed, as its batching policy says.

For a model whose server has a batcher of its own, a batch is not one request: its steps are sent one by one, or held back until the policy
lets them go, as separate requests at the same moment. The seam costs a step microseconds and no turn of the event loop as long as the
policy answers 0. For a model without one a batch is one request: see `gathering` and `batch_queue`.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.clock import Clock, SystemClock
from gateway.core.containment import Containment, Report, a_time, a_truth
from gateway.core.estimators import Rate
from gateway.policy import BatchView, ModelView, Named
from gateway.types import BatchCost, Target
from workers.batch_queue import LEAST_WAIT_S, BatchQueue
from workers.gathering import CallLater, Gatherer, Run, Timer

log = logging.getLogger("nearloop.worker")


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

    def __init__(
        self, named: Named, contain: Containment, clock: Clock, slots: int, max_size: int, call_later: CallLater | None = None
    ) -> None:
        self.slots = slots
        self.max_size = max_size
        self.named = named
        self._contain = contain
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
        if not batch.left and batch.answered_s:
            self._contain.call(self.named, "on_batch", None, None, batch.size, batch.answered_s - batch.sent_s, batch.answered_s)
        if not batch.left and self._waiting:
            self._look()

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
        wait_s: float = self._contain.call(self.named, "wait_s", a_time, 0.0, view, now_s)
        return min(max(wait_s, LEAST_WAIT_S), slack_s) if wait_s > 0.0 else 0.0

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
    """The batching of a worker: for each model, on each server that has it, the policy object that serves it, and what waits for it.

    A batch is of one server, so a step's server is chosen first. `replica` names it; `share` is its part of the target's slots.

    policies() makes new objects of all batching policies, in their order. `slots(target)` is how many of a target's steps the worker takes
    at once.
    """

    def __init__(
        self,
        policies: Callable[[], Sequence[Named]],
        slots: Callable[[Target], int],
        *,
        contain: Containment | None = None,
        clock: Clock | None = None,
        call_later: CallLater | None = None,
    ) -> None:
        self._policies = policies
        self._slots = slots
        self.clock = clock or SystemClock()
        self.contain = contain or Containment(log_once(), self.clock.now_s)
        self._call_later = call_later
        self._models: dict[tuple[str, str], _Batched] = {}

    def batcher(self, target: Target, model: ModelView, replica: str = "", share: float = 1.0) -> Batcher | None:
        """Of a model that gets its steps as separate requests; None when no policy serves it, so that they are sent at once.

        The same one as long as the worker lives; a model that was loaded again may bring other sizes.
        """
        batched = self._of(target, model, replica)
        if batched.named is None:
            return None
        if batched.batcher is None:
            batched.batcher = Batcher(batched.named, self.contain, self.clock, 0, 0, self._call_later)
        if batched.batcher_for is not target:
            batched.batcher_for = target
            batched.batcher.named = batched.named
            batched.batcher.slots = self._share(target, share)
            batched.batcher.max_size = max(1, target.max_batch_size)
        return batched.batcher

    def gatherer(
        self, target: Target, model: ModelView, run: Run[Any, Any], replica: str = "", share: float = 1.0
    ) -> Gatherer[Any, Any] | None:
        """Of a model whose steps are executed together by `run`, likewise."""
        batched = self._of(target, model, replica)
        if batched.named is None:
            return None
        if batched.gatherer is None:
            queue = BatchQueue[Any](batched.named, self.contain, instances=1, max_size=1, slots=1)
            batched.gatherer = Gatherer(queue, run, self.clock, self._call_later)
        if batched.gatherer_for is not target:
            batched.gatherer_for = target
            batched.gatherer.queue.configure(
                batched.named, instances=max(1, model.instances), max_size=model.max_batch_size, slots=self._share(target, share)
            )
        return batched.gatherer

    def learnt(self) -> dict[str, BatchCost]:
        """What the policies know of the costs of models, by scope; of several replicas, what comes from the most batches."""
        costs: dict[str, BatchCost] = {}
        for batched in self._models.values():
            if batched.named is not None:
                cost = self.contain.call(batched.named, "learnt", _a_cost_or_none, None)
                scope = batched.target.scope
                if cost is not None and (scope not in costs or cost.batches > costs[scope].batches):
                    costs[scope] = cost
        return costs

    async def close(self) -> None:
        for batched in self._models.values():
            if batched.gatherer is not None:
                await batched.gatherer.close()

    def _share(self, target: Target, share: float) -> int:
        return max(1, round(self._slots(target) * share))

    def _of(self, target: Target, model: ModelView, replica: str) -> "_Batched":
        key = (replica, target.name)
        batched = self._models.get(key)
        if batched is None:
            batched = self._models[key] = _Batched(target, model, self._choose(model))
        elif batched.target is not target:
            batched.target = target
            if batched.model != model:
                batched.model = model
                if batched.named is None or not self._serves(batched.named, model):
                    batched.named = self._choose(model)
        return batched

    def _choose(self, model: ModelView) -> Named | None:
        return next((named for named in self._policies() if self._serves(named, model)), None)

    def _serves(self, named: Named, model: ModelView) -> bool:
        serves: bool = self.contain.call(named, "serves", a_truth, False, model)
        return serves


@dataclass(slots=True)
class _Batched:
    target: Target
    model: ModelView
    named: Named | None
    batcher: Batcher | None = None
    batcher_for: Target | None = None
    gatherer: Gatherer[Any, Any] | None = None
    gatherer_for: Target | None = None


def _a_cost_or_none(answer: Any) -> BatchCost | None:
    if answer is None:
        return None
    if not isinstance(answer, BatchCost) or not (0 <= answer.fixed_s < float("inf") and 0 <= answer.each_s < float("inf")):
        raise TypeError(f"it returned {answer!r}, not a BatchCost of at least 0 seconds")
    return answer


def log_once() -> Report:
    """Logs the first fault of each policy; a policy that fails with every step must not fill the log."""
    said: set[str] = set()

    def report(named: Named, what: str) -> None:
        if named.name not in said:
            said.add(named.name)
            log.error("policy %s (%s): %s; steps are sent at once", named.name, named.slot, what)

    return report
