"""Requests over one connection: the JetStream API as JSON, publishes with their acknowledgement, reads of stored messages."""

import asyncio
import base64
import itertools
import json
import random
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple, TypeVar

from gateway.edge import headers as h
from gateway.edge.link import Link
from gateway.errors import Unavailable

NOT_FOUND_MESSAGE = 10037
NOT_FOUND_STREAM = 10059
NOT_FOUND_CONSUMER = 10014
STREAM_FULL = 10077
WRONG_LAST_SEQUENCE = frozenset({10071, 10164})
_TRIES = 4
_LIMIT_CHECK_S = 0.1

T = TypeVar("T")


class Message(NamedTuple):
    """A reply or a stored message."""

    subject: str
    headers: bytes
    data: bytes
    sequence: int = 0


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


class NoAnswer(Exception):
    """Nobody answered in time, or the connection was lost: the outcome is unknown."""


class JetStream:
    """What nats-py's JetStream context does not expose, over a `Link`."""

    def __init__(self, link: Link, publish_timeout_s: float) -> None:
        self.link, self._timeout_s = link, publish_timeout_s
        self._inbox = f"_INBOX.{secrets.token_hex(8)}"
        self._numbers = itertools.count(1)
        # One timer looks after the time limits of all: a timer for each request would be a third of its cost.
        self._waiting: dict[str, tuple[asyncio.Future[Message], float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._collecting: dict[str, asyncio.Queue[Message]] = {}
        link.subscribe(f"{self._inbox}.*", self._on_reply)
        link.on_reconnect.append(self._forget_waiting)

    def new_call(self) -> str:
        """A word that no other call has: marks what a call wrote, for when its answer is lost."""
        return f"{self._inbox[-16:]}-{next(self._numbers)}"

    def _on_reply(self, subject: str, _reply: str, headers: bytes, data: bytes) -> None:
        token = subject.rpartition(".")[2]
        waiting = self._waiting.pop(token, None)
        if waiting is not None:
            if not waiting[0].done():
                waiting[0].set_result(Message(subject, headers, data))
        elif (queue := self._collecting.get(token)) is not None:
            queue.put_nowait(Message(subject, headers, data))

    def _forget_waiting(self) -> None:
        """Their answers went to the lost connection."""
        waiting, self._waiting = self._waiting, {}
        for future, _ in waiting.values():
            if not future.done():
                future.set_exception(NoAnswer("the connection was lost"))

    def _give_up_late(self) -> None:
        self._timer = None
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        for token in [token for token, (_, limit_s) in self._waiting.items() if limit_s <= now_s]:
            future, _ = self._waiting.pop(token)
            if not future.done():
                future.set_exception(NoAnswer("no answer in time"))
        if self._waiting:
            self._timer = loop.call_later(_LIMIT_CHECK_S, self._give_up_late)

    async def request(self, subject: str, payload: bytes = b"", headers: bytes = b"", timeout_s: float | None = None) -> Message:
        """One request, one answer. Raises NoAnswer, InvalidStep (too large)."""
        token = str(next(self._numbers))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Message] = loop.create_future()
        self._waiting[token] = (future, loop.time() + (timeout_s or self._timeout_s))
        if self._timer is None:
            self._timer = loop.call_later(_LIMIT_CHECK_S, self._give_up_late)
        try:
            if not self.link.send(subject, payload, headers, f"{self._inbox}.{token}"):
                raise NoAnswer("the send buffer is full")
            answer = await future
        finally:
            self._waiting.pop(token, None)
        if answer.headers and h.status(answer.headers)[0] == 503:
            raise NoAnswer("nobody listens")
        return answer

    async def collect(self, subject: str, payload: bytes, timeout_s: float, headers: bytes = b"") -> tuple[list[Message], Message | None]:
        """One request, many answers: those before the one with an inline status, and that one (None when it did not come)."""
        token = f"c{next(self._numbers)}"
        queue = self._collecting[token] = asyncio.Queue()
        found: list[Message] = []
        try:
            self.link.send(subject, payload, headers, f"{self._inbox}.{token}")
            async with asyncio.timeout(timeout_s):
                while True:
                    message = await queue.get()
                    if h.status(message.headers)[0]:
                        return found, message
                    found.append(message)
        except TimeoutError:
            return found, None
        finally:
            del self._collecting[token]

    async def api(self, name: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A call of `$JS.API.<name>`. Raises ApiError, NoAnswer."""
        answer = await self.request(f"$JS.API.{name}", json.dumps(body).encode() if body else b"")
        return checked(answer.data)

    async def publish(self, subject: str, payload: bytes, headers: bytes) -> None:
        """Stores a message. Raises ApiError, NoAnswer, InvalidStep (too large)."""
        answer = await self.request(subject, payload, headers)
        if b'"error"' in answer.data:
            checked(answer.data)

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
        answer = await self.request(f"$JS.API.DIRECT.GET.{stream}.{subject}")
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
