"""Regions with a nats-server each, on one machine: the first region's takes the connections of the others, as leaf nodes."""

import asyncio
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from gateway import addresses, parts
from gateway.config import Config, RegionSection
from gateway.edge import server_config
from gateway.supervisor import Part, PartFailed

_LOOK_EVERY_S = 0.05


@dataclass(frozen=True, slots=True)
class RegionServer:
    """A region's nats-server. url has its token: not for people to see."""

    region: str
    part: Part
    url: str
    monitoring_url: str


@dataclass(frozen=True, slots=True)
class RegionServers:
    """The servers of all regions, the first region's first, and the relays that stand between it and the others."""

    servers: tuple[RegionServer, ...]
    relays: tuple[Part, ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """In the order of their dependencies."""
        hub, *leafs = (server.part for server in self.servers)
        return (hub, *self.relays, *leafs)

    def configured(self, config: Config) -> Config:
        """With the urls and domains of these servers."""
        own = {server.region: {"nats_urls": (server.url,), "domain": server.region} for server in self.servers}
        return config.model_copy(update={"regions": tuple(section.model_copy(update=own[section.name]) for section in config.regions)})

    async def linked(self) -> frozenset[str]:
        """The regions that the first region's server has a connection with, as far as it has noticed. Raises OSError, TimeoutError."""
        answer = await _get_json(f"{self.servers[0].monitoring_url}/leafz")
        names = {leaf.get("name") for leaf in answer.get("leafs") or ()}
        return frozenset(server.region for server in self.servers[1:] if _server_name(server.region) in names)

    async def until_linked(self, timeout_s: float = 20.0) -> None:
        """Raises PartFailed when a region's server does not get through to the first region's."""
        missing = {server.region for server in self.servers[1:]}
        try:
            async with asyncio.timeout(timeout_s):
                while missing := missing - await self.linked():
                    await asyncio.sleep(_LOOK_EVERY_S)
        except (OSError, TimeoutError):
            names = ", ".join(f"nats-{region}" for region in sorted(missing))
            raise PartFailed(f"{names}: not connected with {self.servers[0].part.name} within {timeout_s:g} s: see their logs") from None


def with_regions(config: Config, names: Sequence[str]) -> Config:
    """The configuration with exactly these regions, in this order, before they have servers. Raises PartFailed."""
    try:
        fresh = [RegionSection(name=name) for name in names]
    except ValidationError as error:
        raise PartFailed(f"--regions: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
    if twice := next((name for name in names if names.count(name) > 1), ""):
        raise PartFailed(f"--regions: {twice!r} is there more than once")
    if config.nats.urls or any(section.nats_urls for section in config.regions):
        raise PartFailed("--regions starts a nats-server for each region, but NATS servers are named already (--nats or the configuration)")
    if config.gateway.region != names[0]:
        raise PartFailed(f"--regions: the first one must be that of the gateway, which is {config.gateway.region!r} (gateway.region)")
    known = {section.name: section for section in config.regions}
    if config.regions != (RegionSection(name="home"),) and set(known) != set(names):
        raise PartFailed(f"--regions says {', '.join(names)}, the configuration says {', '.join(known)}: correct one of them")
    used = [("triton.region", config.triton.region), *((f"home_region of {one.name}", one.home_region) for one in config.targets)]
    if wrong := next((f"{where} is {region!r}" for where, region in used if region not in names), ""):
        raise PartFailed(f"--regions says {', '.join(names)}, but {wrong}")
    return config.model_copy(update={"regions": tuple(known.get(section.name, section) for section in fresh)})


def check_wan(names: Sequence[str], wan: Mapping[str, float]) -> None:
    """Raises PartFailed for a simulated distance of what is no region, or is the first one."""
    for region in wan:
        if region not in names[1:]:
            raise PartFailed(f"a distance is simulated between the first region and another one of --regions, which {region!r} is not")


def prepare(state_dir: Path, names: Sequence[str], wan: Mapping[str, float], nats_port: int, monitoring_port: int) -> RegionServers:
    """Writes the servers' configurations. The ports are the first region's, 0 is any free one; wan: simulated round trips to the first
    region, seconds, for which a relay each stands in between. Raises PartFailed, PortInUse."""
    hub, password = names[0], secrets.token_hex(24)
    leaf_port = addresses.free_port()
    servers: list[RegionServer] = []
    relays: list[Part] = []
    for region in names:
        is_hub = region == hub
        port = addresses.choose(nats_port if is_hub else 0, "--nats-port")
        monitoring = addresses.choose(monitoring_port if is_hub else 0, "--nats-http-port")
        through, uses = f"127.0.0.1:{leaf_port}", () if is_hub else (f"nats-{hub}",)
        if region in wan:
            relay = _relay(state_dir, region, through, wan[region], uses)
            relays.append(relay)
            through, uses = relay.address, (relay.name,)
        token = secrets.token_hex(24)
        part = parts.nats_part(
            f"nats-{region}",
            state_dir,
            port,
            uses=uses,
            server_name=_server_name(region),
            monitor_port=monitoring,
            token=token,
            domain=region,
            leaf_listen_port=leaf_port if is_hub else 0,
            leaf_password=password if is_hub else "",
            leaf_remotes=() if is_hub else (server_config.leaf_url(through, password),),
        )
        servers.append(RegionServer(region, part, f"nats://{token}@127.0.0.1:{port}", f"http://127.0.0.1:{monitoring}"))
    return RegionServers(tuple(servers), tuple(relays))


def _server_name(region: str) -> str:
    return f"nearloop-{region}"


def _relay(state_dir: Path, region: str, target: str, round_trip_s: float, uses: tuple[str, ...]) -> Part:
    name = f"wan-{region}"
    address, ready_file = f"127.0.0.1:{addresses.free_port()}", state_dir / "ready" / name

    async def ready() -> bool:
        return ready_file.exists()

    return parts.python_part(
        name,
        *(
            "gateway.wan",
            "--listen",
            address,
            "--to",
            target,
            "--round-trip-ms",
            f"{round_trip_s * 1000:g}",
            "--ready-file",
            str(ready_file),
        ),
        probe=ready,
        address=address,
        uses=uses,
        before_start=lambda: ready_file.unlink(missing_ok=True),
    )


async def _get_json(url: str, timeout_s: float = 2.0) -> dict[str, Any]:
    where = urlsplit(url)
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        try:
            writer.write(f"GET {where.path} HTTP/1.0\r\nHost: {where.netloc}\r\n\r\n".encode())
            head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
            await writer.wait_closed()
    if b" 200 " not in head.split(b"\r\n")[0]:
        raise OSError(f"{url}: {head.splitlines()[0].decode() if head else 'no answer'}")
    found: dict[str, Any] = json.loads(body)
    return found
