"""The one stack that the end-to-end tests share, with the HTTP API that its tool calls."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import aiohttp.web
import tritonclient.grpc.aio as triton
from stack_support import Broker, eventually, running

from gateway import config
from gateway.client import ClientResult, NearloopClient
from gateway.types import EventKind, StepEvent
from gateway.up import Stack

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
name = "note"
method = "POST"
url = "SERVICE/notes"
input_schema = { type = "object", properties = { text = { type = "string" } }, required = ["text"], additionalProperties = false }

[[targets]]
kind = "tool"
name = "note"
slots = 4

# Nobody serves it: its steps stay queued.
[[targets]]
kind = "tool"
name = "absent"

[[retrieve.collections]]
name = "notes"
"""


@dataclass
class Service:
    """An HTTP API that a tool calls: keeps the headers of what came; can be told to hold its answers back, or to be out of order."""

    headers: list[Mapping[str, str]] = field(default_factory=list)
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    is_down: bool = False

    def __post_init__(self) -> None:
        self.may_answer.set()

    async def post(self, request: aiohttp.web.Request) -> aiohttp.web.Response:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        await self.may_answer.wait()
        if self.is_down:
            raise aiohttp.web.HTTPServiceUnavailable
        return aiohttp.web.json_response({"noted": (await request.json())["text"]})


@dataclass
class World:
    stack: Stack
    client: NearloopClient
    broker: Broker
    service: Service


@asynccontextmanager
async def start_world() -> AsyncIterator[World]:
    service, app = Service(), aiohttp.web.Application()
    app.router.add_post("/notes", service.post)
    runner = aiohttp.web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with (
            running(config.loads(CONFIG.replace("SERVICE", url), "stack")) as stack,
            NearloopClient(stack.gateway_address) as client,
            Broker(stack.nats_url) as broker,
        ):
            yield World(stack, client, broker, service)
    finally:
        await runner.cleanup()


def key() -> str:
    return uuid.uuid4().hex


async def wait_started(client: NearloopClient, job_id: str) -> None:
    async with aclosing(client.watch(job_id, timeout_s=20)) as items:
        first = await anext(items)
        assert isinstance(first, StepEvent)
        assert first.kind is EventKind.STARTED


def tokens(events: "list[StepEvent | ClientResult]") -> list[str]:
    payloads = [event.payload for event in events if isinstance(event, StepEvent) and event.payload is not None]
    return [json.loads(payload.data)["token"] for payload in payloads]


class at_rest:
    """Triton has ended every request for the model that was made inside, long before the time that was asked for."""

    def __init__(self, world: World, model: str) -> None:
        self._address, self._model = world.stack.triton_url, model

    async def __aenter__(self) -> None:
        self._before = await self._ended()

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            await eventually(self._ended, lambda ended: ended > self._before, 15, f"Triton has stopped {self._model}")

    async def _ended(self) -> int:
        async with triton.InferenceServerClient(self._address) as client:
            found = (await client.get_inference_statistics(self._model)).model_stats[0].inference_stats
        return int(found.success.count + found.fail.count)
