"""HTTP tools against real servers on free ports."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from gateway.config import parse
from gateway.errors import InvalidStep, StepFailed, Unavailable
from gateway.types import Kind, Payload, Step
from workers.tool_http import retry_after
from workers.tools import ToolsExecutor

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class FakeWork:
    def __init__(self, data: object, *, key: str = "", remaining_s: float = 30.0) -> None:
        body = Payload(data if isinstance(data, bytes) else json.dumps(data).encode())
        self.step = Step("s", "acme", Kind.TOOL, "api", body, 0.0, idempotency_key=key, traceparent=TRACE, tracestate="a=b")
        self.attempt = 1
        self._remaining_s = remaining_s

    def remaining_s(self) -> float:
        return self._remaining_s

    def emit(self, token: Payload) -> None:
        raise AssertionError("HTTP tools emit nothing")

    def progress(self, fraction: float, message: str) -> None:
        raise AssertionError("HTTP tools tell no progress")


class Server:
    """Remembers requests and answers them with `answer`."""

    def __init__(self) -> None:
        self.seen: list[web.BaseRequest] = []
        self.bodies: list[bytes] = []
        self.peers: set[object] = set()
        self.answer: Any = lambda request: web.json_response({"ok": True})
        self.url = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.seen.append(request)
        self.bodies.append(await request.content.read())
        self.peers.add(request.transport.get_extra_info("peername") if request.transport else None)
        answer = self.answer(request)
        return await answer if asyncio.iscoroutine(answer) else answer


@asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    server = Server()
    runner = web.ServerRunner(web.Server(server.handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await runner.cleanup()


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with serving() as running:
        yield running


@asynccontextmanager
async def calling(
    url: str, method: str = "GET", target: dict[str, object] | None = None, allow: str = "127.0.0.0/8", **tool: object
) -> AsyncIterator[ToolsExecutor]:
    document: dict[str, Any] = {"tools": {"http": [{"name": "api", "url": url, "method": method, **tool}], "egress_allow": [allow]}}
    if target is not None:
        document["targets"] = [{"kind": "tool", "name": "api", **target}]
    executor = ToolsExecutor(parse(document), environ={"API_KEY": "s3cret"})
    await executor.start()
    try:
        yield executor
    finally:
        await executor.close()


async def failing(executor: ToolsExecutor, data: object, **work: Any) -> StepFailed:
    with pytest.raises(StepFailed) as caught:
        await executor.execute(FakeWork(data, **work))
    return caught.value


# ---- requests ------------------------------------------------------------------------------------------------------------------


async def test_get_path_query_headers_and_one_connection(server: Server) -> None:
    async with calling(server.url + "/docs/{name}?v=1", headers={"Authorization": "Bearer ${API_KEY}"}) as executor:
        (target,) = executor.targets()
        assert target.read_only
        assert target.idempotent
        assert target.input_schema["required"] == ["name"]
        for _ in range(3):
            output = await executor.execute(FakeWork({"name": "json.dumps", "tags": ["a b", "c&d"], "deep": True, "no": None}, key="k-1"))
        assert output == Payload(b'{"ok": true}', "application/json")
    request = server.seen[0]
    assert request.raw_path == "/docs/json.dumps?v=1&tags=a+b&tags=c%26d&deep=true"
    headers = request.headers
    assert (headers["Authorization"], headers["Idempotency-Key"]) == ("Bearer s3cret", "k-1")
    assert (headers["traceparent"], headers["tracestate"]) == (TRACE, "a=b")
    assert len(server.peers) == 1


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("a/b", "/x/a%2Fb/y"),
        ("../../admin", "/x/..%2F..%2Fadmin/y"),
        ("a?b#c", "/x/a%3Fb%23c/y"),
        ("%2e%2e", "/x/%252e%252e/y"),
        ("é ü", "/x/%C3%A9%20%C3%BC/y"),
        ("\r\nX: y", "/x/%0D%0AX%3A%20y/y"),
        ("...", "/x/.../y"),
        (7, "/x/7/y"),
        (False, "/x/false/y"),
    ],
)
async def test_a_value_stays_in_its_segment(server: Server, value: object, path: str) -> None:
    async with calling(server.url + "/x/{name}/y") as executor:
        await executor.execute(FakeWork({"name": value}))
    assert server.seen[0].raw_path == path


@pytest.mark.parametrize(
    "data", [{"name": "."}, {"name": ".."}, {"name": ""}, {"name": None}, {"name": [1]}, {"name": {}}, {}, [], b"{", b'{"name":NaN}']
)
async def test_values_that_are_no_segment(server: Server, data: object) -> None:
    async with calling(server.url + "/x/{name}/y") as executor:
        with pytest.raises(InvalidStep):
            await executor.execute(FakeWork(data))
    assert not server.seen


async def test_dots_cannot_be_put_together(server: Server) -> None:
    async with calling(server.url + "/x/{a}{b}/.{a}") as executor:
        with pytest.raises(InvalidStep):
            await executor.execute(FakeWork({"a": ".", "b": "x"}))
        with pytest.raises(InvalidStep):
            await executor.execute(FakeWork({"a": ".", "b": "."}))
    assert not server.seen


async def test_post_body(server: Server) -> None:
    async with calling(server.url + "/things", "POST") as executor:
        sent = b'{ "a":1,  "b": [2] }'
        await executor.execute(FakeWork(sent))
    async with calling(server.url + "/things/{id}", "PATCH", headers={"content-type": "application/merge-patch+json"}) as executor:
        await executor.execute(FakeWork({"id": "x", "a": 1}))
    assert server.bodies == [sent, b'{"a":1}']
    assert [request.headers["Content-Type"] for request in server.seen] == ["application/json", "application/merge-patch+json"]
    assert "Idempotency-Key" not in server.seen[0].headers


async def test_large_body(server: Server) -> None:
    sent = json.dumps({"a": "x" * 1_500_000}).encode()
    server.answer = lambda request: web.Response(status=204)
    async with calling(server.url, "POST", max_response_bytes=10) as executor:
        # The server's default is to refuse more than 1 MiB; read() of the low-level server has no such limit here.
        assert await executor.execute(FakeWork(sent)) in (Payload(),)
    assert server.bodies == [sent]


async def test_schema_is_checked_again(server: Server) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
    async with calling(server.url, input_schema=schema) as executor:
        for data in ({"n": "hunter2"}, {"m": 1}, [1]):
            with pytest.raises(InvalidStep) as caught:
                await executor.execute(FakeWork(data))
            assert "hunter2" not in caught.value.message
    assert not server.seen


async def test_output_content_type_and_cap(server: Server) -> None:
    async with calling(server.url, max_response_bytes=100) as executor:
        server.answer = lambda request: web.Response(text="hé", content_type="text/plain", charset="utf-8")
        assert await executor.execute(FakeWork({})) == Payload("hé".encode(), "text/plain; charset=utf-8")
        server.answer = lambda request: web.Response(text="{}", content_type="application/json", charset="utf-8")
        assert await executor.execute(FakeWork({})) == Payload(b"{}", "application/json")
        server.answer = lambda request: web.Response(body=b"x" * 101)
        error = await failing(executor, {})
        assert (error.code, error.reason) == ("FAILED_PRECONDITION", "RESPONSE_TOO_LARGE")

        async def bomb(request: web.BaseRequest) -> web.StreamResponse:
            response = web.Response(body=b"x" * 1_000_000)
            response.enable_compression(web.ContentCoding.gzip)
            return response

        server.answer = bomb
        assert (await failing(executor, {})).reason == "RESPONSE_TOO_LARGE"


# ---- answers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (404, "NOT_FOUND"),
        (400, "INVALID_ARGUMENT"),
        (422, "INVALID_ARGUMENT"),
        (401, "PERMISSION_DENIED"),
        (403, "PERMISSION_DENIED"),
        (408, "DEADLINE_EXCEEDED"),
        (504, "DEADLINE_EXCEEDED"),
        (409, "ABORTED"),
        (418, "FAILED_PRECONDITION"),
        (304, "FAILED_PRECONDITION"),
        (500, "INTERNAL"),
        (429, "RESOURCE_EXHAUSTED"),
        (503, "UNAVAILABLE"),
    ],
)
async def test_status_ends_the_step(server: Server, status: int, code: str) -> None:
    server.answer = lambda request: web.Response(status=status, text="" if status == 304 else "private")
    async with calling(server.url, "POST") as executor:
        error = await failing(executor, {})
    assert (error.code, error.reason) == (code, f"HTTP_{status}")
    assert "private" not in error.message
    assert len(server.seen) == 1


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("method", "target", "key", "again"),
    [
        ("GET", None, "", True),
        ("PUT", None, "", True),
        ("POST", None, "", False),
        ("POST", None, "k", True),
        ("POST", {"idempotent": True}, "", True),
        ("POST", {"cost": 2}, "", False),
        ("GET", {"idempotent": False}, "", False),
    ],
)
async def test_busy_servers_return_the_step_when_it_may_be_repeated(
    server: Server, status: int, method: str, target: dict[str, object] | None, key: str, again: bool
) -> None:
    server.answer = lambda request: web.Response(status=status, headers={"Retry-After": "7"})
    async with calling(server.url, method, target) as executor:
        with pytest.raises(Unavailable if again else StepFailed) as caught:
            await executor.execute(FakeWork({}, key=key))
        assert executor.targets()[0].idempotent is (again and not key)
    assert caught.value.retry_after_s == (7.0 if again else None)


def test_retry_after() -> None:
    assert retry_after("12", 0.0) == 12.0
    assert retry_after("86400", 0.0) == 60.0
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 90.0) == 10.0
    assert retry_after("Thu, 01 Jan 1970 00:01:40 GMT", 900.0) == 0.0
    assert retry_after("", 0.0) is None
    assert retry_after("soon", 0.0) is None


async def test_time_out(server: Server) -> None:
    never = asyncio.Event()

    async def hang(request: web.BaseRequest) -> web.Response:
        await never.wait()
        return web.Response()

    server.answer = hang
    async with calling(server.url) as executor:
        for remaining_s in (0.05, 0.0):
            error = await failing(executor, {}, remaining_s=remaining_s)
            assert (error.code, error.reason) == ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")


# ---- connections ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_refused_connection_returns_the_step(method: str) -> None:
    with socket.socket() as held:  # bound and not listening: nobody else gets the port, and it refuses
        held.bind(("127.0.0.1", 0))
        async with calling(f"http://127.0.0.1:{held.getsockname()[1]}/", method) as executor:
            with pytest.raises(Unavailable) as caught:
                await executor.execute(FakeWork({}))
    assert caught.value.reason == "CONNECT_FAILED"


@pytest.mark.parametrize("cut", ["before the answer", "in the body"])
@pytest.mark.parametrize(("method", "key", "again"), [("GET", "", True), ("POST", "", False), ("POST", "k", True)])
async def test_lost_connection(server: Server, method: str, key: str, again: bool, cut: str) -> None:
    async def lose(request: web.BaseRequest) -> web.StreamResponse:
        response = web.StreamResponse()
        response.content_length = 10
        if cut == "in the body":
            await response.prepare(request)
            await response.write(b"12345")
        assert request.transport is not None
        request.transport.close()
        return response

    server.answer = lose
    async with calling(server.url, method) as executor:
        with pytest.raises(Unavailable if again else StepFailed) as caught:
            await executor.execute(FakeWork({}, key=key))
    assert caught.value.reason == ("CONNECTION_LOST" if again else "OUTCOME_UNKNOWN")
    assert caught.value.code == "UNAVAILABLE"


# ---- redirects and egress ------------------------------------------------------------------------------------------------------


def redirect(location: str, status: int = 302) -> Any:
    return lambda request: web.Response(status=status, headers={"Location": location})


async def test_redirect_to_another_origin_drops_credentials(server: Server) -> None:
    async with serving() as other:
        server.answer = redirect(f"{other.url}/there?x=%2F")
        headers = {"Authorization": "Bearer ${API_KEY}", "X-Token": "${API_KEY}", "Accept": "text/html"}
        async with calling(server.url, headers=headers) as executor:
            assert (await executor.execute(FakeWork({}, key="k"))).data == b'{"ok": true}'
        request = other.seen[0]
        assert request.raw_path == "/there?x=%2F"
        assert "s3cret" not in str(request.headers)
        assert (request.headers["Accept"], request.headers["Idempotency-Key"], request.headers["traceparent"]) == ("text/html", "k", TRACE)


async def test_redirect_within_the_origin_keeps_them(server: Server) -> None:
    server.answer = lambda request: web.json_response(1) if request.path == "/b" else redirect("/b", 307)(request)
    async with calling(server.url + "/a", "POST", headers={"X-Token": "${API_KEY}"}) as executor:
        await executor.execute(FakeWork({"q": 1}))
    assert [(request.method, request.path, request.headers["X-Token"]) for request in server.seen] == [
        ("POST", "/a", "s3cret"),
        ("POST", "/b", "s3cret"),
    ]
    assert server.bodies == [b'{"q": 1}'] * 2


@pytest.mark.parametrize("status", [301, 302, 303])
async def test_redirect_after_post_is_a_get(server: Server, status: int) -> None:
    server.answer = lambda request: web.json_response(1) if request.path == "/b" else redirect("/b", status)(request)
    async with calling(server.url + "/a", "POST") as executor:
        await executor.execute(FakeWork({"q": 1}))
    assert [request.method for request in server.seen] == ["POST", "GET"]
    assert server.bodies[1] == b""
    assert "Content-Type" not in server.seen[1].headers


async def test_redirects_end(server: Server) -> None:
    server.answer = redirect("/again")
    async with calling(server.url) as executor:
        assert (await failing(executor, {})).reason == "TOO_MANY_REDIRECTS"
    assert len(server.seen) == 4


async def test_lost_after_a_redirected_post_is_not_repeated(server: Server) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        server.answer = redirect(f"http://127.0.0.1:{held.getsockname()[1]}/", 303)
        async with calling(server.url, "POST") as executor:
            assert (await failing(executor, {})).reason == "OUTCOME_UNKNOWN"


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://169.254.169.254/latest/meta-data/", "EGRESS_DENIED"),
        ("http://[::1]/", "EGRESS_DENIED"),
        ("http://[::ffff:10.0.0.1]/", "EGRESS_DENIED"),
        ("http://2130706433/", "EGRESS_DENIED"),
        ("http://0x7f.1/", "EGRESS_DENIED"),
        ("file:///etc/passwd", "BAD_REDIRECT"),
        ("http://[", "BAD_REDIRECT"),
    ],
)
async def test_redirects_are_checked(server: Server, location: str, reason: str) -> None:
    server.answer = redirect(location)
    async with calling(server.url) as executor:
        assert (await failing(executor, {})).reason == reason


async def test_a_name_is_checked_at_its_address(server: Server) -> None:
    url = server.url.replace("127.0.0.1", "localhost")
    async with calling(url, allow="localhost") as executor:
        error = await failing(executor, {})
    assert (error.code, error.reason) == ("PERMISSION_DENIED", "EGRESS_DENIED")
    assert "'localhost' (" in error.message
    assert "tools.egress_allow" in error.message
    assert not server.seen
    async with calling(url, allow="127.0.0.0/8") as executor:
        await executor.execute(FakeWork({}))
    assert len(server.seen) == 1


async def test_secrets_and_payloads_stay_out_of_logs_and_errors(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server.answer = lambda request: web.Response(status=500, text="private")
    async with calling(server.url + "/{name}", headers={"Authorization": "${API_KEY}"}) as executor:
        error = await failing(executor, {"name": "hunter2"})
    for text in (
        error.message,
        repr(executor.targets()),
        *(record.getMessage() for record in caplog.records if record.name != "aiohttp.access"),
    ):
        assert "s3cret" not in text
        assert "hunter2" not in text
        assert "private" not in text
