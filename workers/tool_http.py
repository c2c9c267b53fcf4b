"""HTTP tools: one request of the configuration, made with a step's input.

How an answer ends the step (a 2xx body is the output; an empty one is `{}`):

    404, 410 -> NOT_FOUND      400, 413, 414, 422 -> INVALID_ARGUMENT    401, 403 -> PERMISSION_DENIED   409 -> ABORTED
    408, 504 -> DEADLINE_EXCEEDED   429 -> RESOURCE_EXHAUSTED    502, 503 -> UNAVAILABLE    501 -> UNIMPLEMENTED
    other 4xx and 3xx -> FAILED_PRECONDITION    other 5xx -> INTERNAL

A request may be **repeated** when its target is idempotent (GET, PUT and DELETE are unless [[targets]] says otherwise; RFC 9110, 9.2.2)
or the step has a key, which travels as `Idempotency-Key`. Then 429, 502, 503 and a lost connection raise Unavailable, and the step
returns to the queue. Otherwise a connection lost after it was made is UNAVAILABLE with reason OUTCOME_UNKNOWN. A connection that could
not be made at all is always Unavailable.

How far away it is to what a tool calls is **measured** with its own requests: from a request's first byte to the head of its answer, on a
connection that is there. Once a minute there is one request more to each server, `HEAD /` without the tool's headers, which is safe
(RFC 9110, 9.2.1) and whose answer may be any: so that tools that nobody calls are known as well, and regions are compared by the same
request. `probe = false` turns that off, as for a server whose root is answered by a cache nearby.
"""

import asyncio
import email.utils
import io
import ssl
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import aiohttp
from pydantic_core import to_json
from yarl import URL

from gateway.clock import Clock, SystemClock
from gateway.config import Config, HttpToolSection
from gateway.errors import InvalidStep, NearloopError, StepFailed, Unavailable
from gateway.ports import Work
from gateway.types import JSON, Kind, Payload, Step, Target
from workers.egress import CheckedResolver, Egress
from workers.measure import Answers, Measurement
from workers.tool_input import JsonInput
from workers.tool_template import UrlTemplate, resolve_headers, scalar_text

_MAX_REDIRECTS = 3
_CONNECT_TIMEOUT_S = 10.0
_KEEPALIVE_S = 30.0
_MAX_RETRY_AFTER_S = 60.0
_CHUNK_BYTES = 64 * 1024
_PROBE_TIMEOUT_S = 5.0
_REPEATABLE_METHODS = frozenset({"GET", "PUT", "DELETE"})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
# All that may follow a redirect to another origin, of what the configuration set; any other header may be a credential.
_PLAIN_HEADERS = frozenset({"accept", "accept-language", "content-type", "user-agent"})
_CODES = {
    **dict.fromkeys((400, 413, 414, 422), "INVALID_ARGUMENT"),
    **dict.fromkeys((401, 403), "PERMISSION_DENIED"),
    **dict.fromkeys((404, 410), "NOT_FOUND"),
    **dict.fromkeys((408, 504), "DEADLINE_EXCEEDED"),
    **dict.fromkeys((502, 503), "UNAVAILABLE"),
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    501: "UNIMPLEMENTED",
}


class HttpClient:
    """The pooled connections of a worker, behind the allow-list. Made inside the event loop."""

    def __init__(self, egress: Egress, slots: int, clock: Clock | None = None) -> None:
        self.egress = egress
        self.clock = clock or SystemClock()
        self._answers = Answers(self.clock.now_s)
        self._probed: dict[URL, list[str]] = {}  # scopes of tools, by the server that they call
        # The limit is the worker's slots and one probe: a step never waits for a connection that the pool withholds.
        connector = aiohttp.TCPConnector(resolver=CheckedResolver(egress), limit=slots + 1, keepalive_timeout=_KEEPALIVE_S)
        self.session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),  # cookies would join the steps of different tenants
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            trace_configs=[self._trace()],
        )

    async def close(self) -> None:
        await self.session.close()

    # ---- round trips ---------------------------------------------------------------------------------------------------------

    def _trace(self) -> aiohttp.TraceConfig:
        """Times a request whose `trace_request_ctx` is what takes the seconds. Again from the start when aiohttp sends it once more."""
        now_s = self.clock.now_s

        async def sent(_session: object, context: SimpleNamespace, _parameters: object) -> None:
            context.sent_s = now_s()

        async def answered(_session: object, context: SimpleNamespace, _parameters: object) -> None:
            if context.trace_request_ctx is not None:
                context.trace_request_ctx(now_s() - context.sent_s)

        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(sent)  # when they are written, which is after connecting and before any of the body
        trace.on_request_end.append(answered)  # when the head of the answer has been read, which is before its body
        return trace

    def measure(self, scope: str, server: URL | None) -> Callable[[float], None]:
        """Takes the seconds in which a tool was answered. server: to be probed for it."""
        if server is not None:
            self._probed.setdefault(server, []).append(scope)
        return partial(self._answers.add, scope)

    def answered(self) -> Sequence[Measurement]:
        return self._answers.all()

    async def probe(self) -> None:
        """One server after the other, so that there is one probe at a time. A connection made for it says nothing: its time is left out."""
        for server, scopes in self._probed.items():
            try:
                self.egress.check_host(server.host or "")
                timeout = aiohttp.ClientTimeout(total=_PROBE_TIMEOUT_S)
                taker = partial(self._all_answered, scopes)
                async with self.session.head(server, allow_redirects=False, timeout=timeout, trace_request_ctx=taker):
                    pass
            except (aiohttp.ClientError, OSError, TimeoutError, NearloopError):
                continue  # steps will say what is wrong with it

    def _all_answered(self, scopes: Sequence[str], seconds: float) -> None:
        for scope in scopes:
            self._answers.add(scope, seconds)


class HttpTool:
    """One entry of tools.http. What is wrong with it is appended to problems."""

    def __init__(self, section: HttpToolSection, config: Config, environ: Mapping[str, str], problems: list[str]) -> None:
        where = f"tools.http.{section.name}"
        self._section = section
        self._headers = resolve_headers(section.headers, environ, where, problems)
        self._url = UrlTemplate(section.url, where, problems)
        schema = dict(section.input_schema)
        if self._url.names:
            schema["required"] = list(dict.fromkeys([*schema.get("required", ()), *self._url.names]))
        try:
            self._input = JsonInput(schema)
        except ValueError as error:
            problems.append(f"{where}: {error}")
        setting = config.target_section(Kind.TOOL, section.name)
        said = setting.idempotent if setting is not None and "idempotent" in setting.model_fields_set else None
        self._idempotent = section.method in _REPEATABLE_METHODS if said is None else said
        self.target = Target(
            kind=Kind.TOOL,
            name=section.name,
            description=f"{section.method} {section.url}",
            home_region=config.region_names[0],
            slots=config.tools.slots,
            read_only=section.method == "GET",
            idempotent=self._idempotent,
            input_schema=schema,
        )
        self._client: HttpClient
        self._answered: Callable[[float], None]

    def bind(self, client: HttpClient) -> "HttpTool":
        self._client = client
        self._answered = client.measure(self.target.scope, self._url.server if self._section.probe else None)
        return self

    def ready(self) -> bool:
        return True

    async def execute(self, work: Work) -> Payload:
        """Raises InvalidStep, StepFailed, Unavailable."""
        step = work.step
        fields = self._input.parse(step.input)
        url = self._url.fill(fields)
        rest = {name: value for name, value in fields.items() if name not in self._url.names}
        body: bytes | None = None
        if self._section.method in ("GET", "DELETE"):
            url = url.extend_query(query_pairs(rest))
        else:
            body = to_json(rest) if self._url.names else step.input.data
        remaining_s = work.remaining_s()
        try:
            async with asyncio.timeout(remaining_s):
                return await self._request(step, url, body)
        except TimeoutError:
            message = f"tool {self._section.name!r} did not answer in the {remaining_s:.3f} s that were left"
            raise StepFailed(message, code="DEADLINE_EXCEEDED", reason="DEADLINE_EXCEEDED") from None

    async def _request(self, step: Step, url: URL, body: bytes | None) -> Payload:
        """One request and up to three redirects, each checked like the first."""
        method, headers = self._section.method, dict(self._headers)
        extra = {"Idempotency-Key": step.idempotency_key, "traceparent": step.traceparent, "tracestate": step.tracestate}
        headers.update({name: value for name, value in extra.items() if value})
        # A key of the client's says that it may be repeated; that of a run's step was made by us, and says nothing.
        repeatable = self._idempotent or (bool(step.idempotency_key) and not step.idempotency_key.startswith(f"{step.run}/"))
        mutated = False  # an earlier hop took a request that must not be repeated
        answered: Callable[[float], None] | None = self._answered
        for _ in range(_MAX_REDIRECTS + 1):
            self._client.egress.check_host(url.host or "")
            if body is not None and not any(name.lower() == "content-type" for name in headers):
                headers["Content-Type"] = JSON
            # A file, since aiohttp warns of large bytes; it writes a file in pieces.
            data = io.BytesIO(body) if body is not None else None
            options: Any = {"data": data, "headers": headers, "allow_redirects": False, "trace_request_ctx": answered}
            try:
                async with self._client.session.request(method, url, **options) as response:
                    if response.status not in _REDIRECTS or "Location" not in response.headers:
                        return await self._answer(response, repeatable)
                    location, status = response.headers["Location"], response.status
            except aiohttp.ClientError as error:
                raise self._lost(error, url, repeatable, mutated) from None
            mutated = mutated or not repeatable
            there = self._location(url, location)
            if there.origin() != url.origin():
                allowed = _PLAIN_HEADERS | {name.lower() for name in extra}
                headers = {name: value for name, value in headers.items() if name.lower() in allowed}
            if status == 303 or (status in (301, 302) and method == "POST"):
                method, body = "GET", None
                headers = {name: value for name, value in headers.items() if name.lower() != "content-type"}
            url, answered = there, None  # elsewhere, perhaps: not what the tool calls
        message = f"tool {self._section.name!r}: more than {_MAX_REDIRECTS} redirects"
        raise StepFailed(message, code="FAILED_PRECONDITION", reason="TOO_MANY_REDIRECTS")

    def _location(self, url: URL, location: str) -> URL:
        try:
            # As sent where that is possible: a signed address must not be encoded anew.
            there = url.join(URL(location, encoded=location.isascii() and location.isprintable() and " " not in location))
            if there.scheme in ("http", "https") and there.host:
                return there.with_user(None)
        except ValueError:
            pass
        message = f"tool {self._section.name!r}: a redirect that is no http or https address"
        raise StepFailed(message, code="FAILED_PRECONDITION", reason="BAD_REDIRECT")

    async def _answer(self, response: aiohttp.ClientResponse, repeatable: bool) -> Payload:
        status = response.status
        if 200 <= status < 300:
            return await self._output(response)
        code = _CODES.get(status, "FAILED_PRECONDITION" if status < 500 else "INTERNAL")
        message, reason = f"tool {self._section.name!r}: {response.url.host} answered {status}", f"HTTP_{status}"
        if repeatable and status in (429, 502, 503):
            retry_after_s = retry_after(response.headers.get("Retry-After", ""), self._client.clock.wall_s())
            raise Unavailable(message, reason=reason, retry_after_s=retry_after_s)
        raise StepFailed(message, code=code, reason=reason)

    async def _output(self, response: aiohttp.ClientResponse) -> Payload:
        limit = self._section.max_response_bytes
        data = bytearray()
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            data += chunk
            if len(data) > limit:
                message = f"tool {self._section.name!r}: the response is larger than max_response_bytes ({limit})"
                raise StepFailed(message, code="FAILED_PRECONDITION", reason="RESPONSE_TOO_LARGE")
        if not data:
            return Payload()
        return Payload(bytes(data), content_type(response))

    def _lost(self, error: aiohttp.ClientError, url: URL, repeatable: bool, mutated: bool) -> NearloopError:
        """What a connection's failure means. Its text stays here, since it can hold the filled-in URL."""
        name = f"tool {self._section.name!r}"
        if isinstance(error, aiohttp.ClientConnectorCertificateError | ssl.SSLCertVerificationError):
            return StepFailed(f"{name}: the certificate of {url.host} is not valid", code="FAILED_PRECONDITION", reason="TLS_FAILED")
        if isinstance(error, aiohttp.InvalidURL):
            return StepFailed(f"{name}: the address of {url.host} cannot be used", code="FAILED_PRECONDITION", reason="BAD_URL")
        unmade = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
        if unmade and not mutated:
            return Unavailable(f"{name}: no connection to {url.host} ({type(error).__name__})", reason="CONNECT_FAILED")
        if repeatable:
            return Unavailable(f"{name}: the connection to {url.host} was lost ({type(error).__name__})", reason="CONNECTION_LOST")
        message = f"{name}: the connection to {url.host} was lost after the request was sent; whether it took effect is unknown"
        return StepFailed(message, code="UNAVAILABLE", reason="OUTCOME_UNKNOWN")


def query_pairs(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Query parameters: lists repeat the name, null leaves it out. Raises InvalidStep for an object."""
    pairs = []
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict | list):
                raise InvalidStep([(f"input.{name}", "cannot be part of a query")], reason="INVALID_INPUT")
            if item is not None:
                pairs.append((name, scalar_text(item)))
    return pairs


def content_type(response: aiohttp.ClientResponse) -> str:
    """The content type as sent; JSON in UTF-8, which JSON always is, without its parameter."""
    header = response.headers.get("Content-Type", "application/octet-stream")
    if response.content_type == JSON and (response.charset or "utf-8").lower() in ("utf-8", "utf8"):
        return JSON
    return header if len(header) <= 200 and header.isascii() and header.isprintable() else "application/octet-stream"


def retry_after(header: str, now_s: float) -> float | None:
    """Seconds from a Retry-After header, a number or a date (RFC 9110, 10.2.3), from 0 to 60; None when there is none."""
    try:
        wait_s = float(header) if header.strip().isdigit() else email.utils.parsedate_to_datetime(header).timestamp() - now_s
    except (ValueError, TypeError):
        return None
    return min(max(wait_s, 0.0), _MAX_RETRY_AFTER_S)
