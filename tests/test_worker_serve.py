"""A worker process: what it says when a part is missing, and how it serves and leaves on a real nats-server."""

import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nats
import pytest

from gateway.clock import SystemClock
from gateway.config import load
from gateway.edge.bus import NatsGatewayBus
from gateway.edge.server_config import server_config
from gateway.parts import find_nats_server
from gateway.types import Kind, Payload, Status, Step


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def worker(config: Path, kind: str, *more: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-P", "-m", "workers.serve", "--kind", kind, "--region", "home", "--config", str(config), *more]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def nats_port(tmp_path: Path) -> Iterator[int]:
    port = free_port()
    (tmp_path / "nats.conf").write_text(server_config(port, str(tmp_path / "store")))
    with (tmp_path / "nats.log").open("w") as log:
        server = subprocess.Popen([str(find_nats_server()), "-c", str(tmp_path / "nats.conf")], stdout=log, stderr=log)
    yield port  # worker and gateway wait for it themselves
    server.terminate()
    server.wait(20)


async def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            assert process.poll() is None, process.communicate()[1]
            await asyncio.sleep(0.05)


async def micro_stats(port: int, name: str) -> dict[str, Any]:
    """What `nats service stats` asks for, by an ordinary client."""
    client = await nats.connect(f"nats://127.0.0.1:{port}")
    try:
        answer = await client.request(f"$SRV.STATS.{name}", timeout=10)
        return dict(json.loads(answer.data))
    finally:
        await client.close()


async def test_a_tool_worker_serves_and_drains_on_sigterm(nats_port: int, tmp_path: Path) -> None:
    config, ready = tmp_path / "config.toml", tmp_path / "ready"
    config.write_text(f'nats.urls = ["nats://127.0.0.1:{nats_port}"]\ntools.modules = ["workers.builtin_tools"]\n')
    process = worker(config, "tool", "--name", "w1", "--ready-file", str(ready))
    gateway = NatsGatewayBus(load(config), "g1", SystemClock())
    try:
        await wait_for(ready.exists, process)
        await gateway.start()
        step = Step("s1", "acme", Kind.TOOL, "echo", Payload(b'{"text": "hi"}'), time.time() + 30)
        result = await asyncio.wait_for(gateway.execute(step, "home"), 30)
        assert (result.status, result.worker) == (Status.DONE, "w1")
        assert [info.id for info in gateway.workers()] == ["w1"]
        stats = await micro_stats(nats_port, "nearloop-tool")
        assert (stats["id"], stats["metadata"]["region"]) == ("w1", "home")
        assert [(one["name"], one["num_requests"], one["num_errors"]) for one in stats["endpoints"]] == [("echo", 1, 0)]
        process.terminate()
        _, said = await asyncio.to_thread(process.communicate, timeout=30)
        assert process.returncode == 0
        assert "tool worker w1 is ready in region home: tool.echo" in said
        assert "has stopped" in said
        assert list(gateway.workers()) == []  # it retired: nobody waits for its heartbeat to become stale
    finally:
        process.kill()
        process.communicate()
        await gateway.close()


async def test_sigterm_ends_a_worker_that_waits_for_triton(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'nats.urls = ["nats://127.0.0.1:{free_port()}"]\ntriton.url = "127.0.0.1:{free_port()}"\n')
    process = worker(config, "infer")
    assert process.stderr is not None
    try:
        line = await asyncio.wait_for(asyncio.to_thread(process.stderr.readline), 30)
        assert "is not ready and tries again: Triton at 127.0.0.1:" in line
        process.terminate()
        await asyncio.to_thread(process.communicate, timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("tools.modules = ['no_such_module']\nnats.urls = ['nats://127.0.0.1:1']", "tool", "no_such_module"),
        ("nats.ulrs = []", "tool", "did you mean 'urls'?"),
    ],
)
async def test_a_worker_that_cannot_start_says_why(tmp_path: Path, text: str, kind: str, says: str) -> None:
    config = tmp_path / "config.toml"
    config.write_text(text)
    process = worker(config, kind)
    try:
        _, said = await asyncio.to_thread(process.communicate, timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 2, said
    assert says in said
    assert "Traceback" not in said
