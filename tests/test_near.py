"""HTTP calls that a runner makes itself: which they are, how they end, and that the rest is sent."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway import config
from gateway.clock import SystemClock
from gateway.config import Config
from gateway.edge.bus import NatsGatewayBus
from gateway.types import Kind, Payload, Status, Step, StepResult
from workers.near import NearBus, NearTools

CLOCK = SystemClock()
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def settings(url: str, **more: object) -> Config:
    return config.parse(
        {
            "regions": [{"name": "home"}, {"name": "iad"}],
            "tools": {
                "modules": ["workers.builtin_tools"],
                "egress_allow": ["127.0.0.0/8"],
                "http": [{"name": "fetch", "url": f"{url}/page", "method": "POST"}],
            },
            "targets": [{"kind": "tool", "name": "fetch", "slots": 2, "timeout_s": 20, "idempotent": True} | more],
        }
    )


def step(target: str = "fetch", timeout_s: float = 20.0, **more: object) -> Step:
    fields = {"id": "s", "tenant": "acme", "kind": Kind.TOOL, "target": target, "input": Payload(b"{}")}
    return Step(**(fields | {"deadline_s": CLOCK.wall_s() + timeout_s} | more))  # type: ignore[arg-type]


class Api:
    """An API that answers when it is told to."""

    def __init__(self) -> None:
        self.go_on = asyncio.Event()
        self.keys: list[str] = []
        self.status = 200

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.keys.append(request.headers.get("Idempotency-Key", ""))
        await self.go_on.wait()
        return web.json_response({"page": 1}, status=self.status)


@pytest.fixture
async def api() -> AsyncIterator[tuple[Api, str]]:
    served, app = Api(), web.Application()
    app.router.add_post("/page", served.answer)
    server = TestServer(app)
    await server.start_server()
    yield served, str(server.make_url("")).rstrip("/")
    served.go_on.set()
    await server.close()


@pytest.fixture
async def near(api: tuple[Api, str]) -> AsyncIterator[NearTools]:
    tools = NearTools(settings(api[1]), "runner-1", CLOCK)
    await tools.start()
    yield tools
    await tools.close()


async def test_it_takes_http_tools_and_leaves_functions_to_workers(near: NearTools) -> None:
    assert near.takes(step())
    assert not near.takes(step("echo"))
    assert not near.takes(step("unknown"))
    assert not near.takes(step(kind=Kind.INFER))
    assert not near.takes(step(stream=True))


async def test_what_must_not_be_made_twice_is_left_to_workers(api: tuple[Api, str]) -> None:
    tools = NearTools(settings(api[1], idempotent=False), "runner-1", CLOCK)
    await tools.start()
    try:
        assert not tools.takes(step())
    finally:
        await tools.close()


async def test_a_call_that_is_cancelled_before_it_began_gives_its_slot_back(near: NearTools) -> None:
    for _ in range(3):
        task = near.execute(step())
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await asyncio.sleep(0)
    assert near.takes(step())


async def test_a_call_ends_with_its_output_and_who_made_it(near: NearTools, api: tuple[Api, str]) -> None:
    api[0].go_on.set()
    result = await near.execute(step(idempotency_key="run-1/fetch"))
    assert (result.status, result.output.data) == (Status.DONE, b'{"page": 1}')
    assert (result.region, result.worker, result.step_id, result.tenant) == ("home", "runner-1", "s", "acme")
    assert api[0].keys == ["run-1/fetch"]


async def test_what_the_api_refuses_is_a_failure(near: NearTools, api: tuple[Api, str]) -> None:
    api[0].go_on.set()
    api[0].status = 404
    result = await near.execute(step())
    assert result.status is Status.FAILED
    assert result.code
    assert near.takes(step())


async def test_a_call_ends_with_its_deadline(near: NearTools) -> None:
    result = await near.execute(step(timeout_s=0.05))
    assert (result.status, result.code) == (Status.EXPIRED, "DEADLINE_EXCEEDED")


async def test_it_takes_no_more_than_the_slots_of_a_target(near: NearTools, api: tuple[Api, str]) -> None:
    calls = [near.execute(step()), near.execute(step())]
    assert not near.takes(step())
    api[0].go_on.set()
    await asyncio.gather(*calls)
    assert near.takes(step())


async def test_a_target_that_must_not_be_called_here_is_not(api: tuple[Api, str]) -> None:
    tools = NearTools(settings(api[1], home_region="iad", regions=["iad"]), "runner-1", CLOCK)
    await tools.start()
    try:
        assert not tools.takes(step())
    finally:
        await tools.close()


async def test_a_busy_runner_and_other_regions_get_their_calls_sent(
    near: NearTools, api: tuple[Api, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []

    def send(self: NatsGatewayBus, step: Step, region: str) -> "asyncio.Future[StepResult]":
        sent.append(step.id)
        future: asyncio.Future[StepResult] = asyncio.get_running_loop().create_future()
        future.set_result(StepResult(step.id, step.tenant, Status.DONE))
        return future

    monkeypatch.setattr(NatsGatewayBus, "execute", send)
    few = settings(api[1]).model_copy(update={"worker": config.WorkerSection(near_calls=1)})
    bus = NearBus(few, "runner-1-inner", CLOCK, near)
    await bus.execute(step(id="far"), "iad")
    await asyncio.sleep(0)  # its end is noticed in the next turn of the loop
    first = bus.execute(step(id="first"), "home")
    await bus.execute(step(id="second"), "home")
    await asyncio.sleep(0)
    assert sent == ["far", "second"]
    api[0].go_on.set()
    await first
    await asyncio.sleep(0)
    await bus.execute(step(id="third"), "home")
    assert sent == ["far", "second"]
