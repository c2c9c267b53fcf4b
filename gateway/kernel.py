"""The life of a step in a gateway: classify -> admit -> (wait) -> route -> dispatch -> result.

Execute   one stored message, answered when the result is there
Submit    job record and step in one atomic batch, answered when they are durable
Execute with an idempotency key is Submit, then waiting for the job: the same key finds the same job on any gateway
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

from gateway.clock import Clock
from gateway.config import Config
from gateway.core import outcome, routing
from gateway.core.containment import Containment, a_count, a_flow_of, failed
from gateway.core.lifecycle import Event
from gateway.core.passage import Passage
from gateway.core.permits import Permits
from gateway.core.policies import PolicySet
from gateway.errors import Cancelled, Denied, Expired, NearloopError, Rejected, Unavailable
from gateway.feed import StepFeed
from gateway.jobs import Jobs
from gateway.permits import PermitDesk
from gateway.policy import CreditView, Reject, Slot
from gateway.ports import GatewayBus, Tracer
from gateway.run_types import RoundTrips
from gateway.types import (
    LANE_TIER,
    BatchCost,
    Completed,
    Endpoint,
    Flow,
    JobState,
    JobStatus,
    Kind,
    Step,
    StepEvent,
    StepResult,
    Target,
    TargetStatus,
)

log = logging.getLogger(__name__)
RECONNECT_PATIENCE_S = 2.0
LATE_BY_S = 0.05  # gRPC cancels a call at its deadline, by a clock of its own
DEFAULT_WINDOW = 64  # steps that a session may have outstanding where no policy decides
FAILED_WINDOW = 8  # and where one should and fails
ROUTES_FRESH_S = 0.5  # heartbeats come every two seconds; looking at all workers for each step would cost more than it tells


class Kernel:
    """Implements `ports.StepService`."""

    def __init__(
        self,
        config: Config,
        policies: PolicySet,
        bus: GatewayBus,
        clock: Clock,
        random: Callable[[], float],
        tracer: Tracer,
        contain: Containment,
        catalogue: Sequence[Target] = (),
    ) -> None:
        self._config = config
        self._bus = bus
        self._clock = clock
        self._tracer = tracer
        self._catalogue = {target.scope: target for target in (*catalogue, *(section.target() for section in config.targets))}
        self._classifiers = policies.all(Slot.CLASSIFY)
        self._routing = policies.all(Slot.ROUTING)
        self._credits = policies.one(Slot.CREDITS)
        self.contain = contain
        self.counts: Counter[str] = Counter()  # how steps ended, by state
        self.service_ns = 0  # from arrival to the end, all steps together
        self.permits = Permits(policies, contain, random)
        self._permits = PermitDesk(self.permits, clock)
        self._sent: Counter[tuple[str, str]] = Counter()  # steps that were dispatched and have not ended, by scope and region
        self._routes: dict[str, tuple[float, tuple[Endpoint, ...]]] = {}
        self._jobs = Jobs(config, bus, clock, self.target)
        self._background: set[asyncio.Task[None]] = set()

    # ---- execute ---------------------------------------------------------------------------------------------------------------

    async def execute(self, step: Step) -> Completed:
        if not self._bus.connected:
            await self.need_transport()
        if step.idempotency_key:
            return await self._execute_durably(step)
        with self._begin(step) as passage:
            await self._permits.acquire(passage)
            region = self._route(passage)
            waiting = self._bus.execute(passage.step, region)
            passage.stored(self._clock.now_s())
            try:
                return self._completed(passage, await waiting)
            except asyncio.CancelledError:
                self._withdraw(passage, region)
                raise

    async def call(self, step: Step, again: bool, on_event: Callable[[StepEvent], None] | None = None) -> Completed:
        """A step of a run: `Execute` without a job of its own, since its runner asks for it again until it knows the outcome.

        again: it may have been sent before, under the same id. Then its result is looked for, and it is sent only when no queue has it.
        on_event: hears what a step that streams tells. When the caller is cancelled the step goes on: see `abandon`.
        """
        await self.need_transport()
        stored, region = await self._sent_before(step) if again else (None, "")
        if stored is not None:
            if error := outcome.failure(stored):
                raise error
            return outcome.completed(stored, 0.0, (stored.queue_us + stored.service_us) / 1e6)
        with self._begin(step) as passage:
            await self._permits.acquire(passage)
            watch = await self._bus.watch(step.tenant, step.id, on_event) if on_event else None
            try:
                waiting = self._bus.resume(passage.step, region) if region else self._bus.execute(passage.step, self._route(passage))
                passage.stored(self._clock.now_s())
                return self._completed(passage, await waiting)
            finally:
                if watch is not None:
                    await watch.close()

    async def abandon(self, step: Step) -> None:
        """Nobody needs the step of a run any more."""
        await asyncio.gather(*(self._bus.withdraw(step, region) for region in self._serving(step)))

    async def _sent_before(self, step: Step) -> tuple[StepResult | None, str]:
        """In every region that it can have been sent to: one whose workers have all died since may have its result. What must not be
        executed twice waits for all of them to answer."""
        target = self.target(step.kind, step.target)
        certain = target is None or not (target.read_only or target.idempotent)
        return await self._bus.locate(step, [endpoint.region for endpoint in self._endpoints(step.kind, step.target)], certain)

    def _serving(self, step: Step) -> list[str]:
        """The regions in which it may wait or be executed."""
        return [endpoint.region for endpoint in self._endpoints(step.kind, step.target) if endpoint.workers or endpoint.home]

    async def stream(self, step: Step) -> AsyncGenerator[StepEvent | Completed, None]:
        await self.need_transport()
        with self._begin(step) as passage:
            await self._permits.acquire(passage)
            step, region = passage.step, ""
            if step.idempotency_key:
                job, _ = await self._jobs.store(self._outliving(step))
                feed = self._jobs.feed(job)
            else:
                region = self._route(passage)
                feed = StepFeed(self._bus, self._clock, step.tenant, step.id)
            async with feed:
                if region:
                    feed.ends_with(self._bus.execute(step, region))
                passage.stored(self._clock.now_s())
                try:
                    async with aclosing(feed.follow(step.deadline_s)) as items:
                        async for item in items:
                            yield self._completed(passage, item) if isinstance(item, StepResult) else item
                except TimeoutError:
                    raise Expired("the deadline passed before the step was done", scope=passage.flow.scope) from None
                except (asyncio.CancelledError, GeneratorExit):
                    if region:
                        self._withdraw(passage, region)
                    raise

    async def _execute_durably(self, step: Step) -> Completed:
        with self._begin(step) as passage:
            await self._permits.acquire(passage)
            job, _ = await self._jobs.store(self._outliving(passage.step))
            passage.stored(self._clock.now_s())
            feed = self._jobs.feed(job)
            try:
                async with feed, aclosing(feed.follow(step.deadline_s)) as items:
                    async for item in items:
                        if isinstance(item, StepResult):
                            return self._completed(passage, item)
            except TimeoutError:
                pass
            raise Expired(f"the deadline passed; the step goes on as job {job.step.id}", scope=passage.flow.scope)

    def _outliving(self, step: Step) -> Step:
        """A key can be asked for again, so its job does not end with the patience of the first caller: it gets the target's time."""
        target = self.target(step.kind, step.target)
        return replace(step, deadline_s=max(step.deadline_s, self._clock.wall_s() + target.timeout_s)) if target else step

    async def need_transport(self) -> None:
        """Rides out a short break. Raises Unavailable when it is longer: then nothing was stored, and saying so at once is honest."""
        give_up_s = self._clock.now_s() + RECONNECT_PATIENCE_S
        while not self._bus.connected:
            if self._clock.now_s() >= give_up_s:
                message = "this gateway has lost its connection to NATS and tries to get it back"
                raise Unavailable(message, reason="NOT_STORED", retry_after_s=RECONNECT_PATIENCE_S)
            await asyncio.sleep(0.05)

    def _begin(self, step: Step) -> Passage:
        flow = self._classify(step)
        step, span = self._tracer.start(step, flow)
        passage = Passage(step, flow, self._clock.now_s(), span, self._end)
        passage.advance(Event.CLASSIFY)
        return passage

    def _completed(self, passage: Passage, result: StepResult) -> Completed:
        """Raises the error that the result stands for, unless it is done."""
        passage.result = result
        error = outcome.failure(result)
        if error:
            raise error
        admission_s = passage.dispatched_s - passage.arrived_s
        return outcome.completed(result, admission_s, self._clock.now_s() - passage.arrived_s)

    def _withdraw(self, passage: Passage, region: str) -> None:
        """The caller has gone. A step that is late as well needs nothing: it is not started any more, or stops by itself."""
        if not self._is_late(passage.step):
            self._spawn(self._bus.withdraw(passage.step, region))

    def _is_late(self, step: Step) -> bool:
        return step.deadline_s <= self._clock.wall_s() + LATE_BY_S

    def _end(self, passage: Passage, error: BaseException | None) -> None:
        now_s = self._clock.now_s()
        if isinstance(error, asyncio.CancelledError) and self._is_late(passage.step):
            error = Expired("the caller's deadline passed", scope=passage.flow.scope)
        if passage.region:
            self._sent[passage.flow.scope, passage.region] -= 1
        passage.advance(_ENDING_EVENTS.get(type(error), Event.FAIL) if error else Event.SUCCEED)
        self.counts[passage.state.value] += 1
        self.service_ns += int((now_s - passage.arrived_s) * 1e9)
        try:
            self._tracer.end(passage.span, error)
        finally:
            self._permits.release(passage, outcome.ending(error))

    # ---- decisions -------------------------------------------------------------------------------------------------------------

    def _classify(self, step: Step) -> Flow:
        """Raises Rejected when a classifier fails that is configured to reject then."""
        target = self.target(step.kind, step.target)
        cost = target.cost if target else 1.0
        deadline_s = self._clock.now_s() + step.deadline_s - self._clock.wall_s()
        flow = Flow(step.tenant, step.target, step.kind, step.lane, step.run, deadline_s, cost, LANE_TIER[step.lane], step.client_region)
        for named in self._classifiers:
            classified = self.contain.call(named, "classify", a_flow_of(flow), None, step, flow)
            if classified is not None:
                flow = classified
            elif isinstance(decision := failed(named), Reject):
                raise Rejected(decision.message, reason=decision.reason, scope=decision.scope, policy=named.name)
        return flow

    def _route(self, passage: Passage) -> str:
        flow = passage.flow
        now_s, scope = self._clock.now_s(), flow.scope
        fresh_s, candidates = self._routes.get(scope, (float("-inf"), ()))
        if now_s - fresh_s > ROUTES_FRESH_S:
            candidates = self._endpoints(flow.kind, flow.target)
            if any(endpoint.workers for endpoint in candidates):
                self._routes[scope] = (now_s, candidates)
            target = self.target(flow.kind, flow.target)
            if target is not None and target.max_batch_size > 1:
                self.permits.gate(scope).batch_slots(sum(endpoint.slots for endpoint in candidates))
        live = [replace(endpoint, inflight=self._sent[scope, endpoint.region]) for endpoint in candidates if endpoint.workers]
        if within := passage.step.regions:
            live = [endpoint for endpoint in live if endpoint.region in within]
        chosen = routing.choose(self._routing, live, flow, now_s, self.contain)
        if chosen is None and live:
            message = f"the routing policies rule out every region that serves {scope} now"
            raise Unavailable(message, reason="NO_REGION", scope=scope, retry_after_s=self._config.worker.heartbeat_s)
        if chosen is None:
            message = f"no worker serves {scope} now: start one, or submit a job, which waits for it"
            raise Unavailable(message, reason="NO_WORKERS", scope=scope, retry_after_s=self._config.worker.heartbeat_s)
        passage.region = chosen.region
        self._sent[scope, chosen.region] += 1
        return chosen.region

    def _endpoints(self, kind: Kind, name: str) -> tuple[Endpoint, ...]:
        target = self.target(kind, name) or Target(kind, name)
        here, regions = self._config.gateway.region, self._config.region_names
        return routing.endpoints(target, regions, self._bus.workers(), self.round_trips(), here)

    def round_trips(self) -> RoundTrips:
        """As measured; as configured where nothing was."""
        return routing.known_round_trips(self._bus.round_trips(), self._config.round_trips_s)

    # ---- jobs ------------------------------------------------------------------------------------------------------------------

    async def submit(self, step: Step) -> tuple[JobStatus, bool]:
        """Jobs wait in the queue, not at the gate: only the admission chain is asked."""
        await self.need_transport()
        with self.reserved(step) as step:
            job, created = await self._jobs.store(step)
        return (JobStatus(job, JobState.QUEUED) if created else await self._jobs.status(job)), created

    @contextmanager
    def reserved(self, step: Step) -> Iterator[Step]:
        """Around storing a job or a run: asks the admission chain, and takes it back when storing fails. Raises Rejected, Denied."""
        flow = self._classify(step)
        step, span = self._tracer.start(step, flow)
        try:
            reserved = self._permits.reserve(flow)
            try:
                yield step
            except BaseException:
                self._permits.give_back(reserved, flow)
                raise
        except BaseException as error:
            self._tracer.end(span, error)
            raise
        self._tracer.end(span, None)
        self._permits.settle(reserved, flow)

    async def job(self, tenant: str, job_id: str) -> JobStatus:
        await self.need_transport()
        return await self._jobs.status(await self._jobs.find(tenant, job_id))

    async def watch(self, tenant: str, job_id: str, attempt: int, after_sequence: int) -> AsyncGenerator[StepEvent | Completed, None]:
        await self.need_transport()
        job = await self._jobs.find(tenant, job_id)
        async with aclosing(self._jobs.watch(job, attempt, after_sequence)) as items:
            async for item in items:
                yield item

    async def cancel(self, tenant: str, job_id: str) -> JobStatus:
        await self.need_transport()
        job = await self._jobs.find(tenant, job_id)
        await self._jobs.cancel(job)
        return await self._jobs.status(job)

    # ---- sessions --------------------------------------------------------------------------------------------------------------

    def window(self, tenant: str, sessions: int, tenant_sessions: int, granted: int, outstanding: int) -> int:
        if self._credits is None:
            return DEFAULT_WINDOW
        view = CreditView(tenant, sessions, tenant_sessions, granted, outstanding, self.permits.wait.value)
        window: int = self.contain.call(self._credits, "window", a_count, FAILED_WINDOW, view, self._clock.now_s())
        return DEFAULT_WINDOW if self._credits.shadow else window

    # ---- catalogue -------------------------------------------------------------------------------------------------------------

    def target(self, kind: Kind, name: str) -> Target | None:
        scope = f"{kind.value}.{name}"
        return self._bus.targets().get(scope) or self._catalogue.get(scope)

    def targets(self, kind: Kind | None = None) -> Sequence[TargetStatus]:
        known = {**self._catalogue, **self._bus.targets()}
        chosen = [target for _, target in sorted(known.items()) if kind in (None, target.kind)]
        return [
            TargetStatus(
                target,
                tuple(endpoint.region for endpoint in self._endpoints(target.kind, target.name) if endpoint.workers),
                self._batch_cost(target),
            )
            for target in chosen
        ]

    def _batch_cost(self, target: Target) -> BatchCost | None:
        """Of the worker that has seen the most batches."""
        costs = [worker.batch_costs[target.scope] for worker in self._bus.workers() if target.scope in worker.batch_costs]
        return max(costs, key=lambda cost: cost.batches, default=None)

    # ---- background ------------------------------------------------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(_quietly(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def close(self) -> None:
        await asyncio.gather(*self._background, return_exceptions=True)


_ENDING_EVENTS: dict[type[BaseException], Event] = {
    Expired: Event.EXPIRE,
    Cancelled: Event.CANCEL,
    Rejected: Event.REJECT,
    Denied: Event.REJECT,
    asyncio.CancelledError: Event.CANCEL,
    GeneratorExit: Event.CANCEL,
}


async def _quietly(work: Coroutine[Any, Any, None]) -> None:
    try:
        await work
    except NearloopError as error:
        log.warning("a withdrawal failed, the step runs on until its deadline: %s", error)
