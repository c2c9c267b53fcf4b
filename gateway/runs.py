"""Runs in a gateway: accepted durably in its own region, placed where they waste the least time, followed, cancelled.

    run        check admission -> place -> store the record here -> token to the chosen region -> events as they come -> result
    submit     the same without the events

The record is what was promised; its region, the run's origin, has the one result. Nobody waits until the token has crossed to another
region: when it is lost, a keeper (workers/keeper.py) sends it again.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace

from gateway import run_record, subjects
from gateway.clock import Clock
from gateway.config import Config
from gateway.core import outcome
from gateway.errors import AlreadyExists, InvalidStep, NearloopError, NotFound, Unavailable
from gateway.feed import StepFeed
from gateway.kernel import Kernel
from gateway.placing import Placer
from gateway.ports import GatewayBus, RunStore
from gateway.run_journal import completed_steps
from gateway.run_types import RUN_TARGET, OpenRun, Placement, RunOrder, RunRecord, RunStatus, StepRecord
from gateway.types import Completed, JobState, Kind, Payload, Status, Step, StepEvent, StepResult

log = logging.getLogger(__name__)
SEND_AGAIN_S = (0.25, 5.0)  # first and longest pause
SEND_FOR_S = 60.0
SHOWN_OUTPUT_BYTES = 64 * 1024
SHOWN_BYTES = 512 * 1024  # of the outputs of all completed steps of a run


class Runs:
    """Implements `ports.RunService`."""

    def __init__(self, config: Config, kernel: Kernel, bus: GatewayBus, store: RunStore, clock: Clock, random: Callable[[], float]) -> None:
        self._config = config
        self._kernel = kernel
        self._bus = bus
        self._store = store
        self._placer = Placer(config, bus, kernel.target)
        self._clock = clock
        self._random = random
        self._region = config.gateway.region
        self._sending: set[asyncio.Task[None]] = set()

    # ---- accept ----------------------------------------------------------------------------------------------------------------

    async def run(self, order: RunOrder) -> AsyncGenerator[RunStatus | StepEvent | Completed, None]:
        order = self._identified(order)
        feed = self._feed(order)
        accepting = asyncio.create_task(self._accept(order), name="accept a run")
        try:
            async with feed:  # listening and accepting at the same time; both are here, in the gateway's own region
                record, placement, _ = await accepting
                yield self._status(record, JobState.QUEUED, placement)
                async with aclosing(self._follow(feed)) as items:
                    async for item in items:
                        yield item
        finally:
            accepting.cancel()

    async def submit_run(self, order: RunOrder) -> tuple[RunStatus, bool]:
        record, placement, created = await self._accept(self._identified(order))
        if created:
            return self._status(record, JobState.QUEUED, placement), True
        return await self.run_status(record.tenant, record.id), False

    def _identified(self, order: RunOrder) -> RunOrder:
        key = order.idempotency_key or secrets.token_hex(16)
        return replace(order, id=subjects.job_id(self._region, order.tenant, Kind.RUN, RUN_TARGET, key))

    async def _accept(self, order: RunOrder) -> tuple[RunRecord, Placement, bool]:
        """Raises AlreadyExists, Rejected, Denied, Unavailable."""
        await self._kernel.need_transport()
        placement = self._placer.place(order)
        region = placement.region or self._fallback(order)
        step = run_step(order, Payload(run_record.write(order)))
        with self._kernel.reserved(step) as step:
            order = replace(order, traceparent=step.traceparent, tracestate=step.tracestate)
            safe = run_record.is_safe_twice(order.program, self._placer.target)
            offered = run_record.record(order, region, self._clock.wall_s(), self._config.nats.job_keep_s, safe)
            record, created = await self._store.accept(offered)
        if created:
            self._send_soon(record)
        if record.digest != offered.digest:
            raise AlreadyExists("run.idempotency_key: was used before for another program or input")
        return record, placement, created

    def _fallback(self, order: RunOrder) -> str:
        """No region can take it now, for example since no runner has been heard of yet: it waits where it may run."""
        candidates = self._placer.allowed(order)
        if not candidates:
            names = ", ".join(self._config.region_names)
            raise InvalidStep([("run.regions", f"no region is left in which it may run; there are {names}")])
        return self._region if self._region in candidates else candidates[0]

    async def place(self, order: RunOrder) -> Placement:
        return self._placer.place(order)

    def _send_soon(self, record: RunRecord) -> None:
        task = asyncio.create_task(self._send(record), name="send a run's token")
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, record: RunRecord) -> None:
        """Until it is stored. When this gateway dies or gives up first, a keeper sends it, which looks before: the server knows a token
        that it has had for two minutes only."""
        pause_s, most_s = SEND_AGAIN_S
        give_up_s = min(record.deadline_s, self._clock.wall_s() + SEND_FOR_S)
        while self._clock.wall_s() < give_up_s:
            try:
                if pause_s > SEND_AGAIN_S[0] and await self._bus.result(record.tenant, record.id) is not None:
                    return  # it was cancelled meanwhile
                await self._store.send(record, record.region)
                return
            except Unavailable as error:
                log.debug("run %s: its token is not stored yet: %s", record.id, error.message)
            except NearloopError as error:
                log.warning("run %s: its token was refused and is left to a keeper: %s", record.id, error.message)
                return
            await asyncio.sleep(pause_s * (0.5 + self._random() / 2))
            pause_s = min(2 * pause_s, most_s)

    # ---- follow ----------------------------------------------------------------------------------------------------------------

    async def watch_run(self, tenant: str, run_id: str, attempt: int, after_sequence: int) -> AsyncGenerator[StepEvent | Completed, None]:
        record = await self._record(tenant, run_id)
        async with self._feed(record, attempt, after_sequence) as feed, aclosing(self._follow(feed)) as items:
            async for item in items:
                yield item

    def _feed(self, record: RunRecord | RunOrder, attempt: int = 0, after_sequence: int = 0) -> StepFeed:
        return StepFeed(
            self._bus,
            self._clock,
            record.tenant,
            record.id,
            attempt=attempt,
            after_sequence=after_sequence,
            find_result=lambda: self._result(record.tenant, record.id, record.deadline_s),
        )

    async def _result(self, tenant: str, run_id: str, deadline_s: float) -> StepResult | None:
        """The one result. A run that nobody ended until its deadline and a moment more is ended here."""
        found = await self._bus.result(tenant, run_id)
        if found is not None or self._clock.wall_s() < deadline_s + self._config.nats.ack_wait_s:
            return found
        record = await self._store.find(tenant, run_id)
        # The record's own deadline: the same key can be asked for again with less patience.
        if record is not None and self._clock.wall_s() >= record.deadline_s + self._config.nats.ack_wait_s:
            await self._bus.commit(expired(record), record.keep_s + 60)
        return await self._bus.result(tenant, run_id)

    async def _follow(self, feed: StepFeed) -> AsyncGenerator[StepEvent | Completed, None]:
        async with aclosing(feed.follow(float("inf"))) as items:
            async for item in items:
                if isinstance(item, StepEvent):
                    yield item
                    continue
                error = outcome.failure(item)
                if error:
                    raise error
                yield outcome.completed(item, 0.0, (item.queue_us + item.service_us) / 1e6)

    # ---- ask and cancel --------------------------------------------------------------------------------------------------------

    async def run_status(self, tenant: str, run_id: str) -> RunStatus:
        record = await self._record(tenant, run_id)
        mark, result = await asyncio.gather(self._store.mark(tenant, record.id), self._bus.result(tenant, record.id))
        region = mark.region if mark else result.region if result else record.region
        steps = await self._steps(record, region)
        status = self._status(record, JobState.QUEUED)
        if result is not None:
            return replace(status, state=outcome.job_state(result), region=region, steps=steps, result=result)
        running = bool(steps) or await self._bus.replay(tenant, record.id, 0, 0)
        return replace(status, state=JobState.RUNNING if running else JobState.QUEUED, region=region, steps=steps)

    async def cancel_run(self, tenant: str, run_id: str) -> RunStatus:
        """The cancelled result is committed first, so that exactly one of it and a runner's result stands."""
        record = await self._record(tenant, run_id)
        mark = await self._store.mark(tenant, record.id)
        keep_s = record.keep_s + max(0.0, record.deadline_s - self._clock.wall_s()) + 60
        if await self._bus.commit(cancelled(record), keep_s) and await self._withdraw(record, mark):
            await self._store.close_run(tenant, record.id)
        return await self.run_status(tenant, record.id)

    async def _withdraw(self, record: RunRecord, mark: OpenRun | None) -> bool:
        """False when a region does not answer: the run stays open for a keeper, which withdraws it there."""
        regions, answered = (mark.region, *mark.left) if mark else (record.region,), True
        for region in regions:
            try:
                await self._store.withdraw(record, region)
            except Unavailable as error:
                log.debug("run %s could not be withdrawn from %s: %s", record.id, region, error.message)
                answered = False
        return answered

    async def _record(self, tenant: str, run_id: str) -> RunRecord:
        known = subjects.is_id(run_id) and subjects.job_region(run_id) in self._config.region_names
        record = await self._store.find(tenant, run_id) if known else None
        if record is None:
            kept = f"runs are kept for {self._config.nats.job_keep_s:g} s after their deadline"
            raise NotFound(f"run_id: this tenant has no run {run_id!r}; {kept}", reason="RUN_NOT_FOUND")
        return record

    async def _steps(self, record: RunRecord, region: str) -> tuple[StepRecord, ...]:
        """From where it is executed, else from where it was placed first: a runner far away writes there."""
        for place in dict.fromkeys((region, record.region)):
            try:
                entries = await self._store.journal(place, record.tenant, record.id, 0.0).read()
            except Unavailable:
                continue
            if entries:
                return await asyncio.to_thread(completed_steps, entries, SHOWN_OUTPUT_BYTES, SHOWN_BYTES)
        return ()

    def _status(self, record: RunRecord, state: JobState, placement: Placement | None = None) -> RunStatus:
        return RunStatus(
            record.id,
            record.tenant,
            record.program,
            state,
            record.region,
            record.lane,
            record.created_s,
            record.deadline_s,
            placement=placement,
        )

    async def close(self) -> None:
        for task in self._sending:
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)


def run_step(order: RunOrder, body: Payload) -> Step:
    """The run as the step that a runner gets."""
    return Step(
        id=order.id,
        tenant=order.tenant,
        kind=Kind.RUN,
        target=RUN_TARGET,
        input=body,
        deadline_s=order.deadline_s,
        lane=order.lane,
        run=order.id,
        client_region=order.client_region,
        traceparent=order.traceparent,
        tracestate=order.tracestate,
    )


def cancelled(record: RunRecord) -> StepResult:
    return _ended(record, Status.CANCELLED, "CANCELLED", "cancelled by request")


def expired(record: RunRecord) -> StepResult:
    return _ended(record, Status.EXPIRED, "DEADLINE_EXCEEDED", "the deadline passed before the run was done")


def _ended(record: RunRecord, status: Status, code: str, message: str) -> StepResult:
    return StepResult(record.id, record.tenant, status, region=record.region, code=code, reason=code, message=message)
