"""The real NATS CLI, pointed at a running stack."""

import asyncio
import json
import os
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import aiohttp.web
from stack_support import Broker

from gateway.client import NearloopClient
from gateway.up import Stack

ROOT = Path(__file__).resolve().parent.parent
HINT = "install it with `go install github.com/nats-io/natscli/nats@v0.5.1`, or name it in NATS_CLI"


def find_cli() -> str | None:
    """NATS_CLI, .tools/nats as CI installs it, or one on the path."""
    named = os.environ.get("NATS_CLI")
    local = ROOT / ".tools/nats"
    return named or (str(local) if os.access(local, os.X_OK) else shutil.which("nats"))


CLI = find_cli()

CONFIG = """
[gateway]
listen = "127.0.0.1:0"

[auth]
anonymous_tenant = "local"

[nats]
ack_wait_s = 2.0

[worker]
heartbeat_s = 0.5

[tools]
modules = ["workers.builtin_tools"]
egress_allow = ["127.0.0.0/8"]

[[tools.http]]
name = "charge"
method = "POST"
url = "SHOP/charges"

[[targets]]
kind = "tool"
name = "charge"
max_deliver = 2

# Nobody serves it: its steps stay queued.
[[targets]]
kind = "tool"
name = "report"
"""


@dataclass
class Desk:
    """An operator's desk: a stack, and the CLI pointed at its server. The shop that `charge` calls is closed at first."""

    stack: Stack
    client: NearloopClient
    broker: Broker
    home: Path
    shop_port: int

    async def nats(self, *arguments: str) -> str:
        """What the CLI prints."""
        assert CLI is not None
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.home), "NATS_URL": self.stack.nats_url, "NO_COLOR": "1"}
        process = await asyncio.create_subprocess_exec(
            CLI,
            *arguments,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        try:
            output, _ = await asyncio.wait_for(process.communicate(), 20)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        text = output.decode()
        assert process.returncode == 0, f"nats {shlex.join(arguments)}: exit code {process.returncode}\n{text}"
        return text

    async def stats(self, service: str) -> dict[str, int]:
        """Requests by endpoint, all instances together."""
        found: dict[str, int] = {}
        for instance in json.loads(await self.nats("service", "stats", service, "--json")):
            for endpoint in instance["endpoints"]:
                found[endpoint["name"]] = found.get(endpoint["name"], 0) + endpoint["num_requests"]
        return found

    async def watched(self, *arguments: str) -> str:
        """What a `nats sub` prints while a step passes by."""
        listening = asyncio.create_task(self.nats(*arguments))
        while not listening.done():
            await self.client.execute("tool", "echo", {"hello": "world"}, run="agent-1", timeout_s=10)
        return await listening


class shop:
    """The service behind `charge`, open at last. One that hangs takes orders and never answers."""

    def __init__(self, port: int, hangs: bool = False) -> None:
        self._port, self._hangs = port, hangs
        self.calls = 0

    async def __aenter__(self) -> Self:
        app = aiohttp.web.Application()
        app.router.add_post("/charges", self._post)
        self._runner = aiohttp.web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await aiohttp.web.TCPSite(self._runner, "127.0.0.1", self._port).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _post(self, request: aiohttp.web.Request) -> aiohttp.web.Response:
        self.calls += 1
        if self._hangs:
            await asyncio.Event().wait()
        return aiohttp.web.json_response({"paid": (await request.json())["order"]})
