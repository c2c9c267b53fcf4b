"""`MemoryBus`: both sides of the bus over one broker in memory."""

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from gateway import round_trips, subjects
from gateway.clock import Clock
from gateway.config import Config
from gateway.errors import Expired, InvalidStep, NearloopError, Unavailable
from gateway.ports import Delivery, Queue, Subscription
from gateway.run_types import RoundTrip, RoundTrips
from gateway.testing_broker import Broker, DeadLetter, MemoryPuller
from gateway.types import Job, Payload, Step, StepEvent, StepResult, Target, WorkerInfo


class MemoryBus:
    """A shared broker; `dead` shows the dead letters by subject. max_payload_bytes limits one step's or result's body."""

    def __init__(self, config: Config, clock: Clock, max_payload_bytes: int = 8 * 1024 * 1024) -> None:
        self._broker = Broker(config, clock, max_payload_bytes)

    def gateway(self, gateway_id: str = "gateway") -> "MemoryGatewayBus":
        return MemoryGatewayBus(self._broker, gateway_id)

    def worker(self, worker_id: str = "worker", region: str = "home") -> "MemoryWorkerBus":
        return MemoryWorkerBus(self._broker, worker_id, region)

    @property
    def dead(self) -> Mapping[str, DeadLetter]:
        return self._broker.dead


class _MemorySubscription:
    def __init__(self, end: Callable[[], None]) -> None:
        self._end: Callable[[], None] | None = end

    async def close(self) -> None:
        if self._end is not None:
            self._end()
            self._end = None


class _Side:
    """What gateways and workers have in common."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self.connected = False

    async def start(self) -> None:
        self.connected = True

    async def close(self) -> None:
        self.connected = False

    def _check_size(self, payload: Payload) -> None:
        size, limit = len(payload.data), self._broker.max_payload_bytes
        if size > limit:
            raise InvalidStep([("input", f"{size} bytes, the transport takes {limit}")], reason="TOO_LARGE")


class MemoryGatewayBus(_Side):
    """A `GatewayBus`."""

    def __init__(self, broker: Broker, gateway_id: str) -> None:
        super().__init__(broker)
        self._mark = gateway_id.ljust(subjects.MARK_LENGTH, "-")[: subjects.MARK_LENGTH]
        self._numbers = itertools.count(1)
        self._futures: dict[str, asyncio.Future[StepResult]] = {}
        self._heard: Counter[str] = Counter()  # other marks that this gateway listens to, and how often

    async def close(self) -> None:
        await super().close()
        for future in list(self._futures.values()):
            self._fail(future, Unavailable("the gateway is closing"))

    def _fail(self, future: "asyncio.Future[StepResult]", error: NearloopError) -> None:
        if not future.done():
            future.set_exception(error)
            future.exception()  # seen: a caller that has gone away is no reason for a log entry

    def new_id(self) -> str:
        return f"{self._mark}{next(self._numbers)}"

    def _reply_to(self, step_id: str) -> str:
        mark = step_id[: subjects.MARK_LENGTH]
        return subjects.reply(mark if mark in self._heard else self._mark, step_id)

    def execute(self, step: Step, region: str) -> "asyncio.Future[StepResult]":
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        if not self._may_wait(step, future):
            return future
        reply_to = self._reply_to(step.id)
        try:
            self._check_size(step.input)
            known = self._broker.result(step.tenant, step.id, subjects.result_region(step.id, region))
            if known is not None:
                future.set_result(known)
                return future
            self._broker.store(step, region, reply_to)
        except NearloopError as error:
            self._fail(future, error)
            return future
        self._wait(step, region, future, reply_to)
        return future

    def resume(self, step: Step, region: str) -> "asyncio.Future[StepResult]":
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        if self._may_wait(step, future):
            known = self._broker.result(step.tenant, step.id, subjects.result_region(step.id, region))
            if known is not None:
                future.set_result(known)
            else:
                self._wait(step, region, future, subjects.reply(step.id[: subjects.MARK_LENGTH], step.id))
        return future

    def _may_wait(self, step: Step, future: "asyncio.Future[StepResult]") -> bool:
        if step.id in self._futures:
            self._fail(future, InvalidStep([("id", f"{step.id} is being executed already")]))
            return False
        return True

    def _wait(self, step: Step, region: str, future: "asyncio.Future[StepResult]", reply_to: str) -> None:
        def on_result(result: StepResult) -> None:
            if result.tenant == step.tenant and not future.done():
                future.set_result(result)

        def forget(_: "asyncio.Future[StepResult]") -> None:
            self._futures.pop(step.id, None)
            if self._broker.waiting.get(reply_to) is on_result:
                del self._broker.waiting[reply_to]

        self._futures[step.id] = future
        self._broker.waiting[reply_to] = on_result
        future.add_done_callback(forget)
        late = Expired("the deadline passed before the step was done", scope=region)
        self._broker.call_later(max(0.0, step.deadline_s - self._broker.clock.wall_s()), lambda: self._fail(future, late))

    async def hear(self, mark: str) -> Subscription:
        if len(mark) != subjects.MARK_LENGTH or not subjects.is_id(mark):
            raise ValueError(f"{mark!r} is not a mark")
        self._heard[mark] += 1
        return _MemorySubscription(lambda: self._unhear(mark))

    def _unhear(self, mark: str) -> None:
        self._heard[mark] -= 1
        if not self._heard[mark]:
            del self._heard[mark]

    async def locate(self, step: Step, regions: Sequence[str], certain: bool = False) -> tuple[StepResult | None, str]:
        queued = next((region for region in regions if self._queued(step, region)), "")
        found = (self._broker.result(step.tenant, step.id, subjects.result_region(step.id, region)) for region in regions)
        return next((result for result in found if result is not None), None), queued

    async def result(self, tenant: str, step_id: str) -> StepResult | None:
        return self._broker.result(tenant, step_id, self._result_region(step_id))

    async def commit(self, result: StepResult, keep_s: float) -> bool:
        self._check_size(result.output)
        return self._broker.commit(result, keep_s, self._result_region(result.step_id))

    def _result_region(self, step_id: str) -> str:
        return subjects.result_region(step_id, self._broker.config.gateway.region)

    async def submit(self, job: Job) -> tuple[Job, bool]:
        self._check_size(job.step.input)
        known = self._broker.jobs.get(subjects.job(job.region, job.step.tenant, job.step.id))
        if known is not None:
            return known, False
        self._broker.store(job.step, job.region, job=job.record())
        return job.record(), True

    async def job(self, tenant: str, job_id: str) -> Job | None:
        return self._broker.jobs.get(subjects.job(subjects.job_region(job_id), tenant, job_id))

    async def is_queued(self, step: Step, region: str) -> bool:
        return self._queued(step, region)

    def _queued(self, step: Step, region: str) -> bool:
        return subjects.step(region, step.kind, step.target, step.lane, step.id) in self._broker.steps

    async def withdraw(self, step: Step, region: str) -> None:
        self._broker.steps.pop(subjects.step(region, step.kind, step.target, step.lane, step.id), None)
        for callback in list(self._broker.cancellers):
            asyncio.get_running_loop().call_soon(callback, step.tenant, step.id)

    async def watch(
        self,
        tenant: str,
        step_id: str,
        on_event: Callable[[StepEvent], None],
        on_result: Callable[[StepResult], None] | None = None,
    ) -> Subscription:
        watchers = self._broker.watchers[subjects.event(tenant, step_id)]
        hearers = self._broker.hearers[subjects.reply(step_id[: subjects.MARK_LENGTH], step_id)]
        hear = [] if on_result is None else [lambda result: on_result(result) if result.tenant == tenant else None]
        watchers.append(on_event)
        hearers += hear

        def end() -> None:
            watchers.remove(on_event)
            for one in hear:
                hearers.remove(one)

        return _MemorySubscription(end)

    async def replay(self, tenant: str, step_id: str, attempt: int, after_sequence: int) -> Sequence[StepEvent]:
        answers = (answer(tenant, step_id, attempt, after_sequence) for answer in self._broker.replayers)
        return next((list(events) for events in answers if events is not None), [])

    def targets(self) -> Mapping[str, Target]:
        return self._broker.targets

    def round_trips(self) -> RoundTrips:
        oldest_s = self._broker.clock.now_s() - round_trips.KEEP_S
        return round_trips.collect(trip for trip, seen_s in self._broker.round_trips.values() if seen_s > oldest_s)

    def workers(self) -> Sequence[WorkerInfo]:
        oldest_s = self._broker.clock.now_s() - 3 * self._broker.config.worker.heartbeat_s
        return [info for info, seen_s in self._broker.workers.values() if seen_s > oldest_s]


class MemoryWorkerBus(_Side):
    """A `WorkerBus`."""

    def __init__(self, broker: Broker, worker_id: str, region: str) -> None:
        super().__init__(broker)
        self._worker_id, self._region = worker_id, region
        self._pullers: list[MemoryPuller] = []

    async def close(self) -> None:
        await super().close()
        for puller in self._pullers:
            await puller.close()

    async def announce(self, targets: Sequence[Target]) -> None:
        self._broker.targets = self._broker.targets | {target.scope: target for target in targets}

    async def heartbeat(self, info: WorkerInfo) -> None:
        self._broker.workers[f"{info.region}.{info.id}"] = (info, self._broker.clock.now_s())

    async def retire(self, info: WorkerInfo) -> None:
        self._broker.workers.pop(f"{info.region}.{info.id}", None)

    async def consume(self, queue: Queue, on_delivery: Callable[[Delivery], None]) -> MemoryPuller:
        puller = MemoryPuller(self._broker, queue, on_delivery)
        self._pullers.append(puller)
        self._broker.pullers.append(puller)
        return puller

    async def result(self, tenant: str, step_id: str, region: str) -> StepResult | None:
        return self._broker.result(tenant, step_id, region)

    async def commit(self, result: StepResult, keep_s: float, region: str) -> bool:
        self._check_size(result.output)
        return self._broker.commit(result, keep_s, region)

    async def hand_back(self, delivery: Delivery, delay_s: float) -> None:
        self._broker.hand_backs[(delivery.queue.region, delivery.step.tenant, delivery.step.id)] += 1
        delivery.nak(delay_s)

    async def hand_backs(self, tenant: str, step_id: str, region: str) -> int:
        return self._broker.hand_backs[(region, tenant, step_id)]

    async def bury(self, delivery: Delivery, reason: str, message: str) -> None:
        step, region = delivery.step, delivery.queue.region
        subject = subjects.dead(region, step.kind, step.target, step.id)
        self._broker.dead.setdefault(subject, DeadLetter(step, region, delivery.attempt, reason, message))

    def reply(self, subject: str, result: StepResult) -> None:
        waiting = self._broker.waiting.get(subject)
        if waiting is not None:
            asyncio.get_running_loop().call_soon(waiting, result)

    def publish_event(self, tenant: str, event: StepEvent) -> None:
        for watcher in list(self._broker.watchers[subjects.event(tenant, event.step_id)]):
            asyncio.get_running_loop().call_soon(watcher, event)

    async def on_cancel(self, callback: Callable[[str, str], None]) -> Subscription:
        self._broker.cancellers.append(callback)
        return _MemorySubscription(lambda: self._broker.cancellers.remove(callback))

    async def serve_replay(self, answer: Callable[[str, str, int, int], Sequence[StepEvent] | None]) -> Subscription:
        self._broker.replayers.append(answer)
        return _MemorySubscription(lambda: self._broker.replayers.remove(answer))

    async def ping(self, region: str) -> float:
        """The configured round trip, since in memory there is none."""
        if not self._broker.pingers[region]:
            raise Unavailable(f"no worker of region {region} answered")
        return self._broker.config.round_trip_s(self._region, region)

    async def serve_ping(self) -> Subscription:
        self._broker.pingers[self._region] += 1
        return _MemorySubscription(lambda: self._broker.pingers.subtract([self._region]))

    async def publish_round_trip(self, trip: RoundTrip) -> None:
        self._broker.round_trips[round_trips.key(trip)] = (trip, self._broker.clock.now_s())
