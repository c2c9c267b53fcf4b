"""Three regions with a real nats-server each: home is the hub, iad and fra are its leaf nodes."""

import secrets
from contextlib import AsyncExitStack
from pathlib import Path

from nats_process import NatsProcess, free_port

from gateway import config
from gateway.clock import SystemClock
from gateway.edge.bus import NatsGatewayBus
from gateway.edge.server_config import leaf_url
from gateway.edge.worker_bus import NatsWorkerBus
from gateway.types import Kind, Target

DOMAINS = {"home": "hub", "iad": "iad", "fra": "fra"}


class RegionsRig:
    """The part of a bus rig that is needed, with a gateway and a worker for each region. The servers are started one by one."""

    def __init__(self, folder: Path, **settings: float) -> None:
        leaf_port, password = free_port(), secrets.token_hex(8)
        remote = leaf_url(f"127.0.0.1:{leaf_port}", password)
        self.servers = {
            name: NatsProcess(
                folder / name,
                server_name=name,
                domain=domain,
                **({"leaf_listen_port": leaf_port, "leaf_password": password} if name == "home" else {"leaf_remotes": [remote]}),
            )
            for name, domain in DOMAINS.items()
        }
        self.region, self.other_region, self.tenant = "iad", "home", "t1"
        self.target = Target(Kind.TOOL, "echo")
        self.clock = SystemClock()
        regions = [{"name": name, "nats_urls": [server.url], "domain": DOMAINS[name]} for name, server in self.servers.items()]
        self._document = {"nats": settings, "regions": regions, "worker": {"heartbeat_s": 1.0}}
        self.config = config.parse(self._document)
        self._stack = AsyncExitStack()

    def start(self, *names: str) -> None:
        for name in names or DOMAINS:
            self.servers[name].start()

    async def gateway(self, region: str = "home") -> NatsGatewayBus:
        gateway = NatsGatewayBus(config.parse(self._document | {"gateway": {"region": region}}), f"g-{region}", self.clock)
        await gateway.start()
        self._stack.push_async_callback(gateway.close)
        return gateway

    async def worker(self, region: str = "iad") -> NatsWorkerBus:
        worker = NatsWorkerBus(self.config, f"w-{region}", region, self.clock)
        await worker.start()
        self._stack.push_async_callback(worker.close)
        return worker

    async def close(self) -> None:
        await self._stack.aclose()
        for server in self.servers.values():
            server.kill()
