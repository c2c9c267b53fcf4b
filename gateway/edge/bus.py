"""The gateway's side of the bus on NATS."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from random import getrandbits

from gateway import subjects
from gateway.clock import Clock
from gateway.config import Config
from gateway.edge import codec, kept, lookup, replay, topology
from gateway.edge.connect import CONNECT_TIMEOUT_S, make_link
from gateway.edge.dispatch import Dispatcher
from gateway.edge.jetstream import JetStream, until_answered
from gateway.edge.jobs import JobStore
from gateway.edge.link import LinkSubscription
from gateway.edge.live import LiveCatalogue
from gateway.edge.sites import Sites
from gateway.ports import Subscription
from gateway.run_types import RoundTrips
from gateway.types import Job, Step, StepEvent, StepResult, Target, WorkerInfo

log = logging.getLogger(__name__)


class _Watch:
    """Its end waits for nobody: the call that watched may have a deadline, and the server may hang."""

    def __init__(self, *subscriptions: LinkSubscription) -> None:
        self._subscriptions = subscriptions

    async def close(self) -> None:
        for subscription in self._subscriptions:
            subscription.end()


class NatsGatewayBus:
    """A `GatewayBus` over three connections: steps leave on one, results arrive on another, the third is for everything else."""

    def __init__(self, config: Config, gateway_id: str, clock: Clock) -> None:
        self._config, self._region = config, config.gateway.region
        self._publish, self._consume, self.control = (
            make_link(config, f"{gateway_id} {name}", self._region) for name in ("publish", "consume", "control")
        )
        timeout_s = config.nats.publish_timeout_s
        self.js = JetStream(self.control, timeout_s)
        self._sites = Sites(self.js, config, self._region)
        self._jobs = JobStore(Sites(JetStream(self._publish, timeout_s), config, self._region), clock, config.nats.job_keep_s)
        self._dispatcher = Dispatcher(clock, self._publish, self._consume, self._sites, timeout_s)
        self._live = LiveCatalogue(self._sites, clock, config.worker.heartbeat_s)

    async def start(self) -> None:
        await asyncio.gather(*(link.start(CONNECT_TIMEOUT_S) for link in (self._publish, self._consume, self.control)))
        await topology.ensure_streams(self.js, self._config, self._region)
        await self._consume.barrier()
        await self._live.start()
        self._dispatcher.start()

    async def close(self) -> None:
        await self._dispatcher.close()
        await self._live.close()
        await asyncio.gather(*(link.close() for link in (self._publish, self._consume, self.control)))

    def js_of(self, region: str) -> JetStream:
        """The JetStream that has the region's streams and buckets; it may be away, then its calls raise NoAnswer."""
        return self._sites.js_of(region)

    @property
    def connected(self) -> bool:
        return self._publish.connected and self._consume.connected

    @property
    def counters(self) -> Mapping[str, int]:
        """dispatched, results, resent, recovered (found in the results stream after a lost reply)."""
        return self._dispatcher.counters

    def new_id(self) -> str:
        # Not a secret; os.urandom is a system call, and lets go of the interpreter's lock.
        return f"{self._dispatcher.mark}{getrandbits(96):024x}"

    def execute(self, step: Step, region: str) -> "asyncio.Future[StepResult]":
        return self._dispatcher.execute(step, region)

    async def submit(self, job: Job) -> tuple[Job, bool]:
        return await self._jobs.submit(job)

    async def job(self, tenant: str, job_id: str) -> Job | None:
        region = subjects.job_region(job_id)
        if region not in self._config.region_names:
            return None
        return await until_answered("a job", lambda _: self._jobs.read(region, tenant, job_id))

    async def result(self, tenant: str, step_id: str) -> StepResult | None:
        region = subjects.result_region(step_id, self._region)
        return await kept.read(self.js_of(region), tenant, step_id, region)

    async def is_queued(self, step: Step, region: str) -> bool:
        return await lookup.is_queued(self.js_of(region), step, region)

    async def commit(self, result: StepResult, keep_s: float) -> bool:
        region = subjects.result_region(result.step_id, self._region)
        return await kept.commit(self.js_of(region), result, keep_s, region)

    async def withdraw(self, step: Step, region: str) -> None:
        await lookup.withdraw(self.js_of(region), step, region)
        self.control.send(subjects.cancel(step.tenant, step.id))

    async def hear(self, mark: str) -> Subscription:
        return await self._dispatcher.hear(mark)

    def resume(self, step: Step, region: str) -> "asyncio.Future[StepResult]":
        return self._dispatcher.resume(step, region)

    async def locate(self, step: Step, regions: Sequence[str], certain: bool = False) -> tuple[StepResult | None, str]:
        return await lookup.locate(self._sites, step, regions, certain)

    def round_trips(self) -> RoundTrips:
        return self._live.round_trips()

    async def watch(
        self,
        tenant: str,
        step_id: str,
        on_event: Callable[[StepEvent], None],
        on_result: Callable[[StepResult], None] | None = None,
    ) -> Subscription:
        def on_message(_subject: str, _reply: str, headers: bytes, data: bytes) -> None:
            on_event(codec.read_event(step_id, headers, data))

        def on_reply(subject: str, _reply: str, headers: bytes, data: bytes) -> None:
            result = codec.read_result(subject, headers, data)
            if result.tenant == tenant and on_result is not None:
                on_result(result)

        if on_result is None:
            return _Watch(await self._consume.listen(subjects.event(tenant, step_id), on_message))
        stored = self._consume.subscribe(subjects.reply(step_id[: subjects.MARK_LENGTH], step_id), on_reply)
        try:
            return _Watch(stored, await self._consume.listen(subjects.event(tenant, step_id), on_message))
        except BaseException:
            stored.end()
            raise

    async def replay(self, tenant: str, step_id: str, attempt: int, after_sequence: int) -> Sequence[StepEvent]:
        return await replay.ask(self.js, tenant, step_id, attempt, after_sequence)

    def targets(self) -> Mapping[str, Target]:
        return self._live.targets()

    def workers(self) -> Sequence[WorkerInfo]:
        return self._live.workers()
