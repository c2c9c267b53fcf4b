"""`execute`: the hot path. A step goes out with one publish, its result comes back on one subscription; no task, no timer for each.

A step is unacked until JetStream has stored it, then pending until its result is here. One sweep looks after both: it ends what is
late and sends again what was not confirmed (the step's id makes that harmless). It never waits; results whose reply was lost are
looked for beside it.
"""

import asyncio
import logging
import math
import random
import secrets
from collections import Counter
from collections.abc import Callable, Sequence

from gateway import subjects
from gateway.clock import Clock
from gateway.edge import codec, kept
from gateway.edge import headers as h
from gateway.edge.jetstream import STREAM_FULL, ApiError, NoAnswer, checked
from gateway.edge.link import Link, LinkSubscription
from gateway.edge.lookup import is_queued
from gateway.edge.sites import Sites
from gateway.errors import Expired, InvalidStep, NearloopError, Rejected, Unavailable
from gateway.types import Step, StepResult

log = logging.getLogger(__name__)

_SWEEP_S = 0.2
_TRIES = 4
_FIRST_LOOK_S = 15.0  # a reply that has not come by then is looked for among the stored results
_LAST_LOOK_S = 120.0
_DUPLICATE_LOOK_S = 0.5
_LOOKS_AT_ONCE = 32
KEEP_AFTER_DEADLINE_S = 60
_GRACE_S = 0.1  # for the result that says so
_BUSY_FROM = 8  # steps waited for


def step_ttl_s(step: Step, now_s: float) -> int:
    """How long an abandoned step may stay in its queue."""
    return max(0, math.ceil(step.deadline_s - now_s)) + KEEP_AFTER_DEADLINE_S


class _Pending:
    __slots__ = ("due_s", "future", "give_up_s", "look_s", "looks", "region", "step")

    def __init__(self, step: Step, region: str, future: "asyncio.Future[StepResult]") -> None:
        self.step, self.region, self.future = step, region, future
        self.due_s = self.give_up_s = self.look_s = 0.0
        self.looks = 0


class Heard:
    """Its end waits for nobody, as that of a watch."""

    def __init__(self, subscription: LinkSubscription, forget: Callable[[], None]) -> None:
        self._subscription = subscription
        self._forget: Callable[[], None] | None = forget

    async def close(self) -> None:
        if self._forget is not None:
            self._forget()
            self._forget = None
            self._subscription.end()


class Dispatcher:
    """Steps that this gateway waits for."""

    def __init__(self, clock: Clock, publish: Link, consume: Link, sites: Sites, publish_timeout_s: float) -> None:
        self._clock, self._publish, self._consume, self._sites, self._timeout_s = clock, publish, consume, sites, publish_timeout_s
        self._random = random.Random()
        self._pending: dict[str, _Pending] = {}
        self._unacked: dict[str, _Pending] = {}
        self._ack_prefix = f"_INBOX.{secrets.token_hex(8)}."
        self.mark = secrets.token_hex(subjects.MARK_LENGTH // 2)
        self._reply_prefix = subjects.reply(self.mark, "")
        publish.subscribe(self._ack_prefix + "*", self._on_ack)
        consume.subscribe(subjects.replies(self.mark), self._on_reply)
        publish.on_reconnect.append(self._send_unacked_soon)
        consume.on_reconnect.append(self._look_soon)
        self._sweeper: asyncio.Task[None] | None = None
        self._looking: dict[str, asyncio.Task[None]] = {}  # by region: one that does not answer holds up no other
        self._heard: Counter[str] = Counter()  # other marks that this gateway listens to, and how often
        self.counters = {"dispatched": 0, "results": 0, "resent": 0, "recovered": 0}

    def start(self) -> None:
        self._sweeper = asyncio.create_task(self._sweep_forever(), name="sweep steps")

    async def close(self) -> None:
        """Steps still waited for end with Unavailable; they stay in their queues."""
        tasks = [task for task in (self._sweeper, *self._looking.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for pending in list(self._pending.values()):
            self._fail(pending, Unavailable("the gateway is closing"))

    def execute(self, step: Step, region: str) -> "asyncio.Future[StepResult]":
        pending, fresh = self._wait(step, region)
        if fresh:
            now_s = self._clock.now_s()
            pending.give_up_s = now_s + self._patience_s(region)
            self.counters["dispatched"] += 1
            self._publish.gather(len(self._pending) >= _BUSY_FROM)
            self._send(pending, now_s)
        return pending.future

    def _patience_s(self, region: str) -> float:
        """Another region may have fallen silent for long, and somebody else may execute the step meanwhile."""
        return self._timeout_s if region not in self._sites.own_regions else _TRIES * self._timeout_s

    def resume(self, step: Step, region: str) -> "asyncio.Future[StepResult]":
        """Waits for a step that is in its queue already. It is looked for soon, since another gateway may be told of its result."""
        pending, fresh = self._wait(step, region)
        if fresh:
            pending.look_s = self._clock.now_s() + _DUPLICATE_LOOK_S
        return pending.future

    def _wait(self, step: Step, region: str) -> tuple[_Pending, bool]:
        """False when the step is waited for already; the future has failed then."""
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        pending = _Pending(step, region, future)
        known = self._pending.get(step.id)
        if known is not None and not known.future.done():
            future.set_exception(InvalidStep([("id", f"{step.id} is being executed already")]))
            return pending, False
        pending.look_s = self._clock.now_s() + _FIRST_LOOK_S
        self._pending[step.id] = pending
        return pending, True

    async def hear(self, mark: str) -> Heard:
        """Raises Unavailable."""
        if len(mark) != subjects.MARK_LENGTH or not subjects.is_id(mark):
            raise ValueError(f"{mark!r} is not a mark")
        subscription = await self._consume.listen(subjects.replies(mark), self._on_reply)
        self._heard[mark] += 1
        return Heard(subscription, lambda: self._unhear(mark))

    def _unhear(self, mark: str) -> None:
        self._heard[mark] -= 1
        if not self._heard[mark]:
            del self._heard[mark]

    def _reply_to(self, step_id: str) -> str:
        """The mark in the id when it is heard here, so that the commit answers; else our own, and the worker has to."""
        mark = step_id[: subjects.MARK_LENGTH]
        return subjects.reply(mark, step_id) if mark in self._heard else self._reply_prefix + step_id

    def _send(self, pending: _Pending, now_s: float) -> None:
        step = pending.step
        subject = subjects.step(pending.region, step.kind, step.target, step.lane, step.id)
        headers = codec.dispatch_headers(step, self._reply_to(step.id), step_ttl_s(step, self._clock.wall_s()))
        pending.due_s = now_s + self._timeout_s * self._random.uniform(0.8, 1.2)
        self._unacked[step.id] = pending
        try:
            self._publish.send(subject, step.input.data, headers, self._ack_prefix + step.id)
        except InvalidStep as error:
            self._fail(pending, error)

    def _on_ack(self, subject: str, _reply: str, headers: bytes, data: bytes) -> None:
        pending = self._unacked.pop(subject[len(self._ack_prefix) :], None)
        if pending is None:
            return
        if not headers and b'"error"' not in data:
            if b'"duplicate"' in data:
                # Stored before, perhaps ended before: then nobody sends a reply any more.
                pending.look_s = min(pending.look_s, self._clock.now_s() + _DUPLICATE_LOOK_S)
            return
        try:
            if headers:
                raise NoAnswer(h.status(headers)[1])  # nobody listens: the stream is not there (yet)
            checked(data)
        except NoAnswer:
            pending.due_s = self._clock.now_s() + self._random.uniform(0.1, 0.5)
            self._unacked[pending.step.id] = pending
        except ApiError as error:
            self._fail(pending, _refusal(error, pending))

    def _on_reply(self, subject: str, _reply: str, headers: bytes, data: bytes) -> None:
        pending = self._pending.get(subject[len(self._reply_prefix) :])
        if pending is None:
            return
        result = codec.read_result(subject, headers, data)
        if result.tenant == pending.step.tenant:
            self._finish(pending, result)

    def _finish(self, pending: _Pending, result: StepResult) -> None:
        self._drop(pending)
        if not pending.future.done():
            self.counters["results"] += 1
            pending.future.set_result(result)

    def _fail(self, pending: _Pending, error: NearloopError) -> None:
        self._drop(pending)
        if not pending.future.done():
            pending.future.set_exception(error)
            pending.future.exception()  # seen: a caller that has gone away is no reason for a log entry

    def _drop(self, pending: _Pending) -> None:
        step_id = pending.step.id
        if self._pending.get(step_id) is pending:
            del self._pending[step_id]
            self._unacked.pop(step_id, None)

    def _send_unacked_soon(self) -> None:
        for pending in self._unacked.values():
            pending.due_s = 0.0

    def _look_soon(self) -> None:
        for pending in self._pending.values():
            pending.look_s = 0.0

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_S)
            try:
                self._sweep(self._clock.now_s(), self._clock.wall_s())
            except Exception:  # the sweep is what repairs; it must outlive its own faults
                log.exception("a sweep over the waiting steps failed")

    def _sweep(self, now_s: float, wall_s: float) -> None:
        for pending in [one for one in self._pending.values() if one.future.done()]:
            self._drop(pending)
        self._sweep_expired(wall_s - _GRACE_S)
        self._sweep_unacked(now_s, wall_s)
        due: dict[str, list[_Pending]] = {}
        for one in self._pending.values():
            if one.look_s <= now_s and one.step.id not in self._unacked:
                due.setdefault(one.region, []).append(one)
        for region, some in due.items():
            looking = self._looking.get(region)
            if looking is None or looking.done():
                self._looking[region] = asyncio.create_task(self._look(some), name="look for lost results")

    def _sweep_expired(self, before_s: float) -> None:
        """The worker ends a step that is late, unless there is none any more."""
        for pending in [one for one in self._pending.values() if one.step.deadline_s <= before_s]:
            self._fail(pending, Expired("the deadline passed before the step was done", scope=pending.region))

    def _sweep_unacked(self, now_s: float, wall_s: float) -> None:
        for pending in [one for one in self._unacked.values() if one.due_s <= now_s]:
            if pending.step.deadline_s <= wall_s:
                continue  # nobody starts it any more; it expires in a moment
            if pending.give_up_s <= now_s:
                self._fail(pending, Unavailable(f"NATS did not confirm the step within {self._patience_s(pending.region):g} s"))
            else:
                self.counters["resent"] += 1
                self._send(pending, now_s)

    async def _look(self, due: Sequence[_Pending]) -> None:
        try:
            for start in range(0, len(due), _LOOKS_AT_ONCE):
                if not self._sites.own.link.connected:
                    return
                chunk = [pending for pending in due[start : start + _LOOKS_AT_ONCE] if not pending.future.done()]
                await asyncio.gather(*(self._look_for(pending) for pending in chunk))
        except Exception:
            log.exception("looking for lost results failed")

    async def _look_for(self, pending: _Pending) -> None:
        """Finds a result whose reply was lost; sends the step again when it is neither queued nor ended."""
        step = pending.step
        pending.look_s = self._clock.now_s() + min(_LAST_LOOK_S, _FIRST_LOOK_S * 2**pending.looks)
        pending.looks += 1
        try:
            result = await self._read(pending)
            if result is None and not await is_queued(self._sites.js_of(pending.region), step, pending.region):
                # It may have ended between the two looks.
                result = await self._read(pending)
                if result is None and not pending.future.done():
                    self.counters["resent"] += 1
                    pending.give_up_s = self._clock.now_s() + self._patience_s(pending.region)
                    self._send(pending, self._clock.now_s())
            if result is not None:
                self.counters["recovered"] += 1
                self._finish(pending, result)
        except Unavailable:
            pending.look_s = self._clock.now_s() + self._random.uniform(0.5, 1.5)

    async def _read(self, pending: _Pending) -> StepResult | None:
        step = pending.step
        region = subjects.result_region(step.id, pending.region)
        return await kept.read(self._sites.js_of(region), step.tenant, step.id, region)


def _refusal(error: ApiError, pending: _Pending) -> NearloopError:
    step = pending.step
    if error.err_code == STREAM_FULL:
        return Rejected(f"the queue of region {pending.region} is full", reason="QUEUE_FULL", scope=pending.region, policy="queue")
    if error.code == 400:
        return InvalidStep([("step", f"{step.kind.value}.{step.target}: {error}")])
    return Unavailable(f"NATS refused the step: {error}")
