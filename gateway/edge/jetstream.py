"""The JetStream API as JSON, publishes with their acknowledgement, reads of stored messages; of the own servers or of another domain."""

import asyncio
import base64
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from gateway.edge import headers as h
from gateway.edge.link import Link
from gateway.edge.requests import Message, NoAnswer, Requests
from gateway.errors import Unavailable

__all__ = ["ApiError", "JetStream", "Message", "NoAnswer", "checked", "until_answered"]

NOT_FOUND_MESSAGE = 10037
NOT_FOUND_STREAM = 10059
NOT_FOUND_CONSUMER = 10014
STREAM_FULL = 10077
WRONG_LAST_SEQUENCE = frozenset({10071, 10164})
_TRIES = 4

T = TypeVar("T")


class ApiError(Exception):
    """JetStream said no. err_code is JetStream's own number, code the HTTP-like one."""

    def __init__(self, error: Mapping[str, Any]) -> None:
        self.code, self.err_code = int(error.get("code", 0)), int(error.get("err_code", 0))
        self.description = str(error.get("description", ""))
        super().__init__(f"{self.description} ({self.err_code})")

    @property
    def passing(self) -> bool:
        """True for what ends by itself: no leader, JetStream still starting."""
        return self.code == 503 and self.err_code != STREAM_FULL


class JetStream:
    """What nats-py's JetStream context does not expose, over a `Link`: of the servers that it is connected to, or with a domain of others
    that are reached through them."""

    def __init__(self, link: Link, publish_timeout_s: float, domain: str = "", requests: Requests | None = None) -> None:
        self.link, self._timeout_s = link, publish_timeout_s
        self._requests = requests or Requests(link, publish_timeout_s)
        self.request, self.collect, self.new_call = self._requests.request, self._requests.collect, self._requests.new_call
        self._domain = domain
        self.prefix = f"$JS.{domain}.API" if domain else "$JS.API"

    def at(self, domain: str) -> "JetStream":
        """The JetStream of a domain, over the same connection."""
        return JetStream(self.link, self._timeout_s, domain, self._requests)

    async def api(self, name: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A call of `$JS.API.<name>`. Raises ApiError, NoAnswer."""
        answer = await self.request(f"{self.prefix}.{name}", json.dumps(body).encode() if body else b"")
        return checked(answer.data)

    async def publish(self, subject: str, payload: bytes, headers: bytes) -> None:
        """Stores a message. Raises ApiError, NoAnswer, InvalidStep (too large)."""
        if self._domain and subject.startswith("$KV."):  # does not cross between domains; other subjects find their stream
            subject = f"{self.prefix}.{subject}"
        answer = await self.request(subject, payload, headers)
        if b'"error"' in answer.data:
            checked(answer.data)

    async def store(self, subject: str, payload: bytes, headers: bytes) -> int:
        """Like `publish`; returns the message's sequence in its stream."""
        return int(checked((await self.request(subject, payload, headers)).data)["seq"])

    async def last(self, stream: str, subject: str) -> Message | None:
        """The last message on a subject, asked from the stream's leader, so never stale. Raises ApiError, NoAnswer."""
        try:
            found = (await self.api(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject}))["message"]
        except ApiError as error:
            if error.err_code == NOT_FOUND_MESSAGE:
                return None
            raise
        header, data = base64.b64decode(found.get("hdrs", "")), base64.b64decode(found.get("data", ""))
        return Message(found["subject"], header, data, found["seq"])

    async def direct_last(self, stream: str, subject: str) -> Message | None:
        """The last message on a subject from whichever replica answers; it can lag behind. Raises NoAnswer."""
        answer = await self.request(f"{self.prefix}.DIRECT.GET.{stream}.{subject}")
        code, text = h.status(answer.headers)
        if code == 404:
            return None
        if code:
            raise NoAnswer(f"{code} {text}")
        return Message(subject, answer.headers, answer.data)


async def until_answered(what: str, operation: Callable[[int], Awaitable[T]]) -> T:
    """Repeats `operation(tries_before)` while nobody answers. It must be safe to repeat. Raises Unavailable."""
    reason = NoAnswer()
    for tries in range(_TRIES):
        try:
            return await operation(tries)
        except NoAnswer as error:
            reason = error
        except ApiError as error:
            raise Unavailable(f"NATS refused {what}: {error}") from None
        await asyncio.sleep(random.uniform(0.05, 0.2) * 2**tries)
    raise Unavailable(f"NATS did not confirm {what} after {_TRIES} tries: {reason}")


def checked(data: bytes) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(data)
    if "error" in answer:
        error = ApiError(answer["error"])
        if error.passing:
            raise NoAnswer(str(error))
        raise error
    return answer
