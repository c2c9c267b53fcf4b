"""The worker's side of the bus on NATS."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence

from gateway import round_trips
from gateway import subjects as s
from gateway.clock import Clock
from gateway.config import Config
from gateway.edge import codec, handbacks, kept, topology
from gateway.edge.buckets import H_OPERATION
from gateway.edge.catalogue import write_target, write_worker
from gateway.edge.connect import CONNECT_TIMEOUT_S, make_link
from gateway.edge.delivery import NatsDelivery
from gateway.edge.headers import block, escape
from gateway.edge.jetstream import WRONG_LAST_SEQUENCE, ApiError, JetStream, NoAnswer, until_answered
from gateway.edge.pull import PullLoop
from gateway.edge.queues import QueueMaker
from gateway.edge.replay import ReplayServer
from gateway.edge.sites import Sites
from gateway.errors import Unavailable
from gateway.ports import Delivery, Queue, Subscription
from gateway.run_types import RoundTrip
from gateway.types import StepEvent, StepResult, Target, WorkerInfo

log = logging.getLogger(__name__)

_CHECK_S = 1.0
_PING_S = 2.0
_SKEW_S = 1.0  # between the clocks of server and worker
_BUSY_FROM = 3  # steps held at once; quick ones are never many, however many pass through


class _NatsPuller:
    """A pull loop whose messages become deliveries; what comes while it closes is handed back."""

    def __init__(self, bus: "NatsWorkerBus", loop: PullLoop) -> None:
        self._bus, self.loop = bus, loop

    @property
    def credits(self) -> int:
        return self.loop.credits

    def want(self, credits: int) -> None:
        self.loop.want(credits)

    async def close(self) -> None:
        await self.loop.close()
        self._bus.pullers.discard(self)


class NatsWorkerBus:
    """A `WorkerBus`: steps are pulled on one connection, results and acknowledgements leave on another."""

    def __init__(self, config: Config, worker_id: str, region: str, clock: Clock) -> None:
        self._config, self._worker_id, self._region, self._clock = config, worker_id, region, clock
        self._publish, self._consume, self.control = (
            make_link(config, f"{worker_id} {name}", region) for name in ("publish", "consume", "control")
        )
        timeout_s = config.nats.publish_timeout_s
        self._results = Sites(JetStream(self._publish, timeout_s), config, region)
        self.js = JetStream(self.control, timeout_s)
        self._sites = Sites(self.js, config, region)
        self._queues = QueueMaker(config, self._sites)
        # A server that crashed counts the deliveries anew that it had not written down. That one crashed shows by the connection, but for
        # one far away, behind the own.
        self._back_s = clock.wall_s()
        self._consume.on_reconnect.append(self._on_back)
        self._held: set[str] = set()  # subjects of steps that have not ended; one that is delivered again counts once
        self.pullers: set[_NatsPuller] = set()
        self._checker: asyncio.Task[None] | None = None
        self._handing_back: set[asyncio.Task[None]] = set()
        self.counters = {"delivered": 0, "redelivered": 0, "malformed": 0, "committed": 0, "lost_commits": 0}

    async def start(self) -> None:
        """Raises Unavailable, TopologyMismatch."""
        await asyncio.gather(*(link.start(CONNECT_TIMEOUT_S) for link in (self._publish, self._consume, self.control)))
        await topology.ensure_streams(self.js, self._config, self._region)
        self._checker = asyncio.create_task(self._check_forever(), name="check pull loops")

    async def close(self) -> None:
        if self._checker is not None:
            self._checker.cancel()
            await asyncio.gather(self._checker, return_exceptions=True)
        await self._queues.close()
        await asyncio.gather(*(puller.close() for puller in list(self.pullers)))
        await asyncio.gather(*self._handing_back)
        await asyncio.gather(*(link.close() for link in (self._consume, self._publish, self.control)))

    def js_of(self, region: str) -> JetStream:
        """The JetStream that has the region's streams and buckets; it may be away, then its calls raise NoAnswer."""
        return self._sites.js_of(region)

    @property
    def connected(self) -> bool:
        return self._publish.connected and self._consume.connected

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_S)
            for puller in list(self.pullers):
                puller.loop.check()

    async def announce(self, targets: Sequence[Target]) -> None:
        await self._queues.make(targets)
        await asyncio.gather(*(self._announce(target) for target in targets))

    async def _announce(self, target: Target) -> None:
        subject, data = s.bucket_key(s.TARGETS_BUCKET, target.scope), write_target(target)
        await until_answered("an announcement", lambda _: self.js.publish(subject, data, b""))

    def _worker_key(self, info: WorkerInfo) -> str:
        return s.bucket_key(s.WORKERS_BUCKET, f"{info.region}.{info.id}")

    async def heartbeat(self, info: WorkerInfo) -> None:
        # Without an acknowledgement: the next one comes soon.
        self.control.send(self._worker_key(info), write_worker(info))

    async def retire(self, info: WorkerInfo) -> None:
        headers = block(f"{H_OPERATION}: DEL\r\n")
        await until_answered("a farewell", lambda _: self.js.publish(self._worker_key(info), b"", headers))

    async def consume(self, queue: Queue, on_delivery: Callable[[Delivery], None]) -> _NatsPuller:
        loop: PullLoop

        def on_message(subject: str, reply: str, headers: bytes, data: bytes) -> None:
            self._deliver(queue, loop.closing, on_delivery, subject, reply, headers, data)

        js = self.js_of(queue.region)

        def ensure() -> Awaitable[None]:
            return self._queues.ensure(queue)

        if js is self.js:
            await ensure()
        stream, consumer = s.steps_stream(queue.region), s.consumer(queue.kind, queue.target, queue.lane)
        loop = PullLoop(
            self._consume, self._clock, js.prefix, stream, consumer, topology.PRIORITY_GROUP, queue.priority, on_message, ensure
        )
        if js is not self.js:
            # The region may not answer now, and nobody says from afar that a consumer is missing: the loop asks once it is there.
            loop.repair()
        puller = _NatsPuller(self, loop)
        self.pullers.add(puller)
        return puller

    def _deliver(
        self,
        queue: Queue,
        closing: bool,
        on_delivery: Callable[[Delivery], None],
        subject: str,
        ack_subject: str,
        headers: bytes,
        data: bytes,
    ) -> None:
        try:
            unsure_until_s = self._back_s + _SKEW_S if queue.region in self._sites.own_regions else float("inf")
            delivery = NatsDelivery(
                self._publish, queue, subject, ack_subject, headers, data, self._clock.wall_s(), unsure_until_s, self._on_ended
            )
        except (ValueError, KeyError) as error:
            # Not written by a gateway: nobody waits for it and it would come back for ever.
            log.warning("%s is not a step and is removed: %s", subject, error)
            self.counters["malformed"] += 1
            self._publish.send(ack_subject, b"+TERM")
            return
        self._held.add(subject)
        if closing:
            task = asyncio.get_running_loop().create_task(self.hand_back(delivery, 0.0), name="hand back")
            self._handing_back.add(task)
            task.add_done_callback(self._handing_back.discard)
            return
        self._publish.gather(len(self._held) >= _BUSY_FROM)
        self.counters["delivered"] += 1
        self.counters["redelivered"] += delivery.attempt > 1
        on_delivery(delivery)

    def _on_back(self) -> None:
        self._back_s = self._clock.wall_s()

    def _on_ended(self, subject: str) -> None:
        self._held.discard(subject)
        self._publish.gather(len(self._held) >= _BUSY_FROM)

    async def result(self, tenant: str, step_id: str, region: str) -> StepResult | None:
        return await kept.read(self.js_of(region), tenant, step_id, region)

    async def commit(self, result: StepResult, keep_s: float, region: str) -> bool:
        first = await kept.commit(self._results.js_of(region), result, keep_s, region)
        self.counters["committed" if first else "lost_commits"] += 1
        return first

    async def hand_back(self, delivery: Delivery, delay_s: float) -> None:
        step, js = delivery.step, self.js_of(delivery.queue.region)
        try:
            await handbacks.add(js, step.tenant, step.id, max(0.0, step.deadline_s - self._clock.wall_s()))
        except Unavailable as error:
            log.debug("step %s goes back uncounted: %s", step.id, error.message)
        finally:
            delivery.nak(delay_s)

    async def hand_backs(self, tenant: str, step_id: str, region: str) -> int:
        return await handbacks.read(self.js_of(region), tenant, step_id)

    async def bury(self, delivery: Delivery, reason: str, message: str) -> None:
        step = delivery.step
        extra = (
            f"{codec.H_EXPECTED_SUBJECT_SEQUENCE}: 0\r\n{codec.H_LANE}: {step.lane.value}\r\n{s.H_ATTEMPT}: {delivery.attempt}\r\n"
            f"{s.H_WORKER}: {self._worker_id}\r\n{s.H_REASON}: {escape(reason)}\r\n"
            f"{s.H_MESSAGE}: {escape(message[: codec.MAX_MESSAGE_CHARACTERS])}\r\n"
        )
        subject = s.dead(delivery.queue.region, step.kind, step.target, step.id)
        headers = codec.step_headers(step, extra=extra)

        async def attempt(_: int) -> None:
            try:
                await self.js.publish(subject, step.input.data, headers)
            except ApiError as error:
                if error.err_code not in WRONG_LAST_SEQUENCE:
                    raise Unavailable(f"NATS refused a dead letter: {error}") from None

        await until_answered("a dead letter", attempt)

    def reply(self, subject: str, result: StepResult) -> None:
        self._publish.send(subject, result.output.data, codec.result_headers(result))

    def publish_event(self, tenant: str, event: StepEvent) -> None:
        body = event.payload.data if event.payload is not None else b""
        self._publish.send(s.event(tenant, event.step_id), body, codec.event_headers(event))

    async def on_cancel(self, callback: Callable[[str, str], None]) -> Subscription:
        def on_message(subject: str, _reply: str, _headers: bytes, _data: bytes) -> None:
            _, _, tenant, step_id = subject.split(".")
            callback(tenant, step_id)

        return await self.control.listen(s.cancel("*", "*"), on_message)

    async def serve_replay(self, answer: Callable[[str, str, int, int], Sequence[StepEvent] | None]) -> Subscription:
        server = ReplayServer(self.control, answer)
        return await self.control.listen(s.replay("*", "*"), server.on_request)

    async def ping(self, region: str) -> float:
        started_s = self._clock.now_s()
        try:
            await self.js.request(s.ping(region), timeout_s=_PING_S)
        except NoAnswer as error:
            raise Unavailable(f"no worker of region {region} answered within {_PING_S:g} s: {error}") from None
        return self._clock.now_s() - started_s

    async def serve_ping(self) -> Subscription:
        def on_message(_subject: str, reply: str, _headers: bytes, _data: bytes) -> None:
            if reply:
                self.control.send(reply)

        return await self.control.listen(s.ping(self._region), on_message, queue="ping")

    async def publish_round_trip(self, trip: RoundTrip) -> None:
        subject, data = s.bucket_key(s.REGIONS_BUCKET, round_trips.key(trip)), round_trips.write(trip, self._worker_id)
        await until_answered("a round trip", lambda _: self.js.publish(subject, data, b""))
