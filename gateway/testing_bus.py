"""`MemoryBus`: both sides of the bus over one broker in memory."""

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence

from gateway import subjects
from gateway.clock import Clock
from gateway.config import Config
from gateway.errors import Expired, InvalidStep, NearloopError, Unavailable
from gateway.ports import Delivery, Queue, Subscription
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

    async def result(self, tenant: str, step_id: str) -> StepResult | None:
        return self._broker.result(tenant, step_id)

    async def commit(self, result: StepResult, keep_s: float) -> bool:
        self._check_size(result.output)
        return self._broker.commit(result, keep_s)

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

    def execute(self, step: Step, region: str) -> "asyncio.Future[StepResult]":
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        if step.id in self._futures:
            self._fail(future, InvalidStep([("id", f"{step.id} is being executed already")]))
            return future
        reply_to = subjects.reply(self._mark, step.id)
        try:
            self._check_size(step.input)
            if (known := self._broker.result(step.tenant, step.id)) is not None:
                future.set_result(known)
                return future
            self._broker.store(step, region, reply_to)
        except NearloopError as error:
            self._fail(future, error)
            return future

        def on_result(result: StepResult) -> None:
            if result.tenant == step.tenant and not future.done():
                future.set_result(result)

        def forget(_: "asyncio.Future[StepResult]") -> None:
            self._futures.pop(step.id, None)
            self._broker.waiting.pop(reply_to, None)

        self._futures[step.id] = future
        self._broker.waiting[reply_to] = on_result
        future.add_done_callback(forget)
        late = Expired("the deadline passed before the step was done", scope=region)
        self._broker.call_later(max(0.0, step.deadline_s - self._broker.clock.wall_s()), lambda: self._fail(future, late))
        return future

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
        return subjects.step(region, step.kind, step.target, step.lane, step.id) in self._broker.steps

    async def withdraw(self, step: Step, region: str) -> None:
        self._broker.steps.pop(subjects.step(region, step.kind, step.target, step.lane, step.id), None)
        for callback in list(self._broker.cancellers):
            asyncio.get_running_loop().call_soon(callback, step.tenant, step.id)

    async def watch(self, tenant: str, step_id: str, on_event: Callable[[StepEvent], None]) -> Subscription:
        watchers = self._broker.watchers[subjects.event(tenant, step_id)]
        watchers.append(on_event)
        return _MemorySubscription(lambda: watchers.remove(on_event))

    async def replay(self, tenant: str, step_id: str, attempt: int, after_sequence: int) -> Sequence[StepEvent]:
        answers = (answer(tenant, step_id, attempt, after_sequence) for answer in self._broker.replayers)
        return next((list(events) for events in answers if events is not None), [])

    def targets(self) -> Mapping[str, Target]:
        return self._broker.targets

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

    async def hand_back(self, delivery: Delivery, delay_s: float) -> None:
        self._broker.hand_backs[(delivery.step.tenant, delivery.step.id)] += 1
        delivery.nak(delay_s)

    async def hand_backs(self, tenant: str, step_id: str) -> int:
        return self._broker.hand_backs[(tenant, step_id)]

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
