"""What the tests of the whole stack share: a running one that must leave nothing behind, and waits for conditions."""

import asyncio
import json
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import nats
import psutil
from nats.aio.client import Client
from nats.errors import Error as NatsError

from gateway import addresses
from gateway.config import Config
from gateway.up import Stack

log = logging.getLogger(__name__)
T = TypeVar("T")
LOOK_EVERY_S = 0.05


async def eventually(look: Callable[[], Awaitable[T]], good: Callable[[T], bool], within_s: float, what: str) -> T:
    """What `look` answers once it is good; looks again and again for within_s seconds."""
    deadline_s = asyncio.get_running_loop().time() + within_s
    while True:
        found = await look()
        if good(found):
            return found
        assert asyncio.get_running_loop().time() < deadline_s, f"{what}: not within {within_s:g} s, the last look found {found!r}"
        await asyncio.sleep(LOOK_EVERY_S)


@dataclass(frozen=True)
class Footprint:
    """What a stack occupies on this machine; processes are (pid, time of creation)."""

    processes: frozenset[tuple[int, float]]
    ports: tuple[int, ...]
    shm_prefix: str
    state_dir: Path

    @classmethod
    def of(cls, stack: Stack) -> Self:
        processes: set[tuple[int, float]] = set()
        prefix, ports = "", set()
        for name in stack.part_names:
            root = psutil.Process(stack.part(name).pid)
            for process in [root, *root.children(recursive=True)]:
                processes.add((process.pid, process.create_time()))
                ports |= {one.laddr.port for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
            if found := re.search(r"nearloop-[0-9a-f]+-", " ".join(root.cmdline())) if name == "triton" else None:
                prefix = found.group()
        return cls(frozenset(processes), tuple(sorted(ports)), prefix, stack.state_dir)

    def left(self) -> list[str]:
        """What is still there of it."""
        found = [f"process {pid}" for pid, created_s in self.processes if _runs(pid, created_s)]
        found += [f"port {port}" for port in self.ports if not addresses.is_free(port)]
        found += [str(path) for path in Path("/dev/shm").iterdir() if self.shm_prefix and self.shm_prefix in path.name]
        found += [str(self.state_dir)] if self.state_dir.exists() else []
        return found


def _runs(pid: int, created_s: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == created_s and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@asynccontextmanager
async def running(config: Config, **options: Any) -> AsyncIterator[Stack]:
    """A stack, in a temporary directory. Fails when it leaves a process, a port, shared memory or a file behind."""
    children = {child.pid for child in psutil.Process().children()}
    async with Stack(config, on_line=log.info, **options) as stack:
        yield stack
        for name in stack.part_names:
            await asyncio.wait_for(stack.wait_ready(name), 30)
        footprint = Footprint.of(stack)
        there = footprint.left()
        assert len(there) >= len(footprint.processes) + len(footprint.ports) + 1, there
        assert all(f"port {address.rpartition(':')[2]}" in there for address in stack.gateway_addresses)
        assert "triton" not in stack.part_names or any(path.startswith("/dev/shm/") for path in there)
    assert footprint.left() == []
    assert {child.pid for child in psutil.Process().children()} <= children


class Broker:
    """Looks into the streams, past the gateway."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._client = Client()

    async def __aenter__(self) -> Self:
        self._client = await nats.connect(self._url, max_reconnect_attempts=-1, reconnect_time_wait=0.2, error_cb=_ignore)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def api(self, name: str, **body: Any) -> dict[str, Any]:
        """A call of `$JS.API.<name>`; repeated while a server that was killed is on its way back."""

        async def ask() -> dict[str, Any]:
            try:
                answer = await self._client.request(f"$JS.API.{name}", json.dumps(body).encode(), timeout=2)
            except NatsError as error:
                return {"error": repr(error)}
            found: dict[str, Any] = json.loads(answer.data)
            return found

        return await eventually(ask, lambda found: "error" not in found, 15, f"$JS.API.{name}")

    async def subjects(self, stream: str, subject_filter: str) -> dict[str, int]:
        """How many messages each subject of a stream has."""
        info = await self.api(f"STREAM.INFO.{stream}", subjects_filter=subject_filter)
        return dict(info["state"].get("subjects") or {})

    async def state(self, *streams: str) -> list[tuple[int, int]]:
        """(messages, last sequence) of each stream: unchanged means that nothing was stored."""
        infos = [await self.api(f"STREAM.INFO.{stream}") for stream in streams]
        return [(info["state"]["messages"], info["state"]["last_seq"]) for info in infos]


async def _ignore(error: Exception) -> None:
    """nats-py logs every lost connection otherwise."""
