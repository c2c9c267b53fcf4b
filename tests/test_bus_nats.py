"""The bus contract on a real nats-server, and what only a real one can show."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
from bus_contract import BusContract
from bus_contract_live import LiveContract
from bus_contract_queues import QueueContract
from bus_contract_recovery import RecoveryContract
from bus_rig import DeadEntry, MakeRig, done, eventually, eventually_true, finish, make_result, make_step, pull
from nats_process import NatsProcess, free_port

from gateway import config, subjects
from gateway.clock import SystemClock
from gateway.edge import headers as h
from gateway.edge.bus import NatsGatewayBus
from gateway.edge.jetstream import JetStream
from gateway.edge.link import Link
from gateway.edge.worker_bus import NatsWorkerBus
from gateway.errors import InvalidStep, Unavailable
from gateway.ports import Delivery, Queue
from gateway.types import Job, Kind, Lane, Payload, Target, WorkerInfo


class NatsRig:
    """Regions of its own on the shared server; closes and removes what it made."""

    def __init__(self, url: str, **settings: float) -> None:
        heartbeat_s = settings.pop("heartbeat_s", 2.0)
        mark = secrets.token_hex(5)
        self.region, self.other_region, self.tenant = f"a-{mark}", f"b-{mark}", f"t-{mark}"
        self.target = Target(Kind.TOOL, f"echo-{mark}")
        self.config = config.parse(
            {
                "nats": {"urls": [url]} | settings,
                "gateway": {"region": self.region},
                "triton": {"region": self.region},
                "regions": [{"name": self.region}, {"name": self.other_region}],
                "worker": {"heartbeat_s": heartbeat_s},
            }
        )
        self.clock = SystemClock()
        self._stack = AsyncExitStack()
        self.link = Link(self.config.nats, (url,), "test")
        self.js = JetStream(self.link, 5.0)

    async def gateway(self, name: str = "g1") -> NatsGatewayBus:
        gateway = NatsGatewayBus(self.config, f"{name}-{self.tenant}", self.clock)
        await gateway.start()
        self._stack.push_async_callback(gateway.close)
        return gateway

    async def worker(self, name: str = "w1") -> NatsWorkerBus:
        worker = NatsWorkerBus(self.config, name, self.region, self.clock)
        await worker.start()
        self._stack.push_async_callback(worker.close)
        return worker

    def pass_time(self, seconds: float) -> None:
        """It passes by itself."""

    async def dead(self, subject: str) -> DeadEntry:
        found = await self.js.last(subjects.DEAD_STREAM, subject)
        assert found is not None
        info = await self.js.api(f"STREAM.INFO.{subjects.DEAD_STREAM}", {"subjects_filter": subject})
        fields = h.parse(found.headers)
        return DeadEntry(info["state"]["subjects"][subject], found.data, fields[subjects.H_REASON], fields[subjects.H_MESSAGE])

    async def close(self) -> None:
        await self._stack.aclose()
        for region in self.config.region_names:
            await self.js.api(f"STREAM.DELETE.{subjects.steps_stream(region)}")
        await self.link.close()


@pytest.fixture
async def make_rig(nats_server: NatsProcess) -> AsyncIterator[MakeRig]:
    rigs: list[NatsRig] = []

    async def make(**settings: float) -> NatsRig:
        rig = NatsRig(nats_server.url, **settings)
        await rig.link.start(10.0)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        await rig.close()


class TestNatsBus(BusContract, QueueContract, LiveContract, RecoveryContract):
    async def test_a_foreign_message_in_a_queue_is_removed(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        assert isinstance(rig, NatsRig)
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 2)
        await rig.js.publish(subjects.step(rig.region, Kind.TOOL, rig.target.name, make_step(rig).lane, "x"), b"what?", b"")
        step = make_step(rig)
        gateway.execute(step, rig.region)
        assert (await inbox.next()).step == step
        assert worker.counters["malformed"] == 1

    async def test_a_removed_consumer_is_made_again(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        assert isinstance(rig, NatsRig)
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 2)
        step = make_step(rig)
        await eventually(lambda: inbox.puller.credits == 2)
        await rig.js.api(f"CONSUMER.DELETE.{subjects.steps_stream(rig.region)}.{subjects.consumer(step.kind, step.target, step.lane)}")
        gateway.execute(step, rig.region)
        delivery = await inbox.next()
        assert delivery.step == step
        await eventually(lambda: inbox.puller.credits == 1)

    async def test_a_lost_reply_is_found_in_the_results(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway, worker = await rig.gateway(), await rig.worker()
        assert isinstance(gateway, NatsGatewayBus)
        inbox = await pull(rig, worker, 1)
        future = gateway.execute(make_step(rig), rig.region)
        delivery = await inbox.next()
        await worker.commit(make_result(delivery.step), 60.0, rig.region)
        delivery.ack()  # and no reply
        gateway._dispatcher._look_soon()
        assert await done(future) == make_result(delivery.step)
        assert gateway.counters["recovered"] == 1

    async def test_a_cancelled_watch_leaves_nothing(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        gateway = await rig.gateway()
        assert isinstance(gateway, NatsGatewayBus)
        link, step = gateway._consume, make_step(rig)
        before = len(link._subscriptions), len(link._client.handlers), len(link._client._subs)
        for _ in range(50):
            watching = asyncio.create_task(gateway.watch(step.tenant, step.id, lambda _: None))
            await asyncio.sleep(0)  # so that it has subscribed and waits for the server
            watching.cancel()
            await asyncio.wait([watching])
            assert watching.cancelled()
        assert (len(link._subscriptions), len(link._client.handlers), len(link._client._subs)) == before
        await (await gateway.watch(step.tenant, step.id, lambda _: None)).close()
        assert (len(link._subscriptions), len(link._client.handlers), len(link._client._subs)) == before

    async def test_workers_that_have_gone_are_forgotten(self, make_rig: MakeRig) -> None:
        rig = await make_rig(heartbeat_s=0.3)
        gateway, worker = await rig.gateway(), await rig.worker()
        assert isinstance(gateway, NatsGatewayBus)
        names = [f"w{number}-{rig.tenant}" for number in range(50)]
        for name in names:
            await worker.heartbeat(WorkerInfo(name, rig.region, Kind.TOOL, (rig.target.scope,)))
        await eventually(lambda: {info.id for info in gateway.workers()} >= set(names))
        await eventually(lambda: not {info.id for info in gateway.workers()} & set(names))
        kept = (value for value in vars(gateway._live).values() if isinstance(value, set | dict | list | tuple))
        assert not any(name in str(value) for value in kept for name in names)

    async def test_nobody_there_is_unavailable(self) -> None:
        link = Link(config.NatsSection(), (f"nats://127.0.0.1:{free_port()}",), "test")
        with pytest.raises(Unavailable, match="no NATS server answered"):
            await link.start(0.5)

    async def test_servers_named_by_every_region_are_used(self, nats_server: NatsProcess) -> None:
        document = {"regions": [{"name": "home", "nats_urls": [nats_server.url]}]}
        gateway = NatsGatewayBus(config.parse(document), "g1", SystemClock())
        await gateway.start()
        assert gateway.connected
        await gateway.close()

    async def test_too_large_a_job_leaves_the_connection_alone(self, make_rig: MakeRig) -> None:
        rig = await make_rig()
        assert isinstance(rig, NatsRig)
        gateway = await rig.gateway()
        step = make_step(rig, id=f"{rig.region}-1", input=Payload(bytes(1024 * 1024)))  # with headers it is too large
        with pytest.raises(InvalidStep):
            await done(gateway.execute(step, rig.region))
        with pytest.raises(InvalidStep):
            await gateway.submit(Job(step, rig.region, 1.0, "d"))
        small = make_step(rig, id=f"{rig.region}-2")
        assert (await gateway.submit(Job(small, rig.region, 1.0, "d")))[1]
        assert gateway.connected


@pytest.fixture
async def crash_rig(own_nats_server: NatsProcess) -> AsyncIterator[NatsRig]:
    rig = NatsRig(own_nats_server.url, publish_timeout_s=2.0)
    await rig.link.start(10.0)
    yield rig
    await rig.close()


class TestServerCrash:
    """The server is killed and started again, on the same store."""

    async def test_every_step_ends_once(self, crash_rig: NatsRig, own_nats_server: NatsProcess) -> None:
        rig = crash_rig
        gateway, worker = await rig.gateway(), await rig.worker()
        executed: list[str] = []
        committed: list[str] = []
        tasks: set[asyncio.Task[None]] = set()

        async def work(delivery: Delivery) -> None:
            executed.append(delivery.step.id)
            try:
                if await finish(worker, delivery, make_result(delivery.step, output=delivery.step.input, attempt=delivery.attempt)):
                    committed.append(delivery.step.id)
            except Unavailable:
                delivery.nak()
            puller.want(16)

        def start(delivery: Delivery) -> None:
            tasks.add(asyncio.create_task(work(delivery)))

        puller = await worker.consume(Queue(rig.region, rig.target.kind, rig.target.name, Lane.STANDARD), start)
        puller.want(16)
        steps = [make_step(rig, input=Payload(b"%d" % number)) for number in range(200)]
        futures = [gateway.execute(step, rig.region) for step in steps[:100]]
        await eventually(lambda: len(committed) >= 20)
        own_nats_server.kill()
        futures += [gateway.execute(step, rig.region) for step in steps[100:]]
        own_nats_server.start()
        results = await asyncio.wait_for(asyncio.gather(*futures), 60.0)
        assert [result.output.data for result in results] == [step.input.data for step in steps]
        await asyncio.gather(*tasks)
        assert sorted(set(committed)) == sorted(committed)  # no step was won twice
        info = await rig.js.api(f"STREAM.INFO.{subjects.RESULTS_STREAM}", {"subjects_filter": f"nl.result.{rig.region}.{rig.tenant}.*"})
        assert info["state"]["subjects"] == {subjects.result(rig.region, step.tenant, step.id): 1 for step in steps}
        await eventually_true(lambda: _empty(rig))

    async def test_a_job_is_the_same_after_a_restart(self, crash_rig: NatsRig, own_nats_server: NatsProcess) -> None:
        rig = crash_rig
        gateway, worker = await rig.gateway(), await rig.worker()
        job = Job(make_step(rig, id=f"{rig.region}-1"), rig.region, 1_700_000_000.5, "digest")
        assert await gateway.submit(job) == (job.record(), True)
        inbox = await pull(rig, worker, 1)
        await finish(worker, await inbox.next(), make_result(job.step))
        await eventually_true(lambda: _not_queued(gateway, job, rig.region))
        own_nats_server.kill()
        own_nats_server.start()
        assert await gateway.submit(job) == (job.record(), False)
        assert await (await rig.gateway("g2")).submit(job) == (job.record(), False)
        assert not await gateway.is_queued(job.step, rig.region)


async def _empty(rig: NatsRig) -> bool:
    info = await rig.js.api(f"STREAM.INFO.{subjects.steps_stream(rig.region)}")
    return bool(info["state"]["messages"] == 0)


async def _not_queued(gateway: NatsGatewayBus, job: Job, region: str) -> bool:
    return not await gateway.is_queued(job.step, region)
