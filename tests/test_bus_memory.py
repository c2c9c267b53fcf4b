"""The bus contract in memory, and what only a manual clock can show."""

import secrets

import pytest
from bus_contract import BusContract
from bus_contract_live import LiveContract
from bus_contract_queues import QueueContract
from bus_contract_recovery import RecoveryContract
from bus_rig import DeadEntry, MakeRig, make_result, make_step, pull

from gateway import config
from gateway.testing import ManualClock, MemoryBus
from gateway.testing_bus import MemoryGatewayBus, MemoryWorkerBus
from gateway.types import Kind, Target


class MemoryRig:
    def __init__(self, **settings: float) -> None:
        heartbeat_s = settings.pop("heartbeat_s", 2.0)
        self.region, self.other_region, self.tenant = "here", "there", "t1"
        self.target = Target(Kind.TOOL, f"echo-{secrets.token_hex(4)}")
        regions = [{"name": "home"}, {"name": self.region}, {"name": self.other_region}]
        self.config = config.parse(
            {"gateway": {"region": self.region}, "nats": settings, "regions": regions, "worker": {"heartbeat_s": heartbeat_s}}
        )
        self.clock = ManualClock()
        self.bus = MemoryBus(self.config, self.clock, max_payload_bytes=1024 * 1024)

    async def gateway(self, name: str = "g1") -> MemoryGatewayBus:
        gateway = self.bus.gateway(name)
        await gateway.start()
        return gateway

    async def worker(self, name: str = "w1") -> MemoryWorkerBus:
        worker = self.bus.worker(name, self.region)
        await worker.start()
        return worker

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)

    async def dead(self, subject: str) -> DeadEntry:
        found = self.bus.dead[subject]
        return DeadEntry(1, found.step.input.data, found.reason, found.message)


@pytest.fixture
def make_rig() -> MakeRig:
    async def make(**settings: float) -> MemoryRig:
        return MemoryRig(**settings)

    return make


class TestMemoryBus(BusContract, QueueContract, LiveContract, RecoveryContract):
    async def test_progress_extends_a_hold(self) -> None:
        rig = MemoryRig(ack_wait_s=10.0)
        gateway, worker = await rig.gateway(), await rig.worker()
        inbox = await pull(rig, worker, 2)
        gateway.execute(make_step(rig), rig.region)
        delivery = await inbox.next()
        rig.clock.advance(8.0)
        delivery.in_progress()
        rig.clock.advance(8.0)
        gateway.execute(make_step(rig), rig.region)
        assert (await inbox.next()).attempt == 1  # the other step: the first is still held
        inbox.puller.want(1)
        rig.clock.advance(2.5)
        again = await inbox.next()
        assert (again.step, again.attempt) == (delivery.step, 2)

    async def test_a_result_is_kept_for_its_time(self) -> None:
        rig = MemoryRig()
        gateway = await rig.gateway()
        step = make_step(rig)
        assert await gateway.commit(make_result(step), 5.0)
        rig.clock.advance(4.0)
        assert await gateway.result(step.tenant, step.id) is not None
        rig.clock.advance(2.0)
        assert await gateway.result(step.tenant, step.id) is None
