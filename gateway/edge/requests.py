"""Requests over one connection, one answer or many."""

import asyncio
import itertools
import secrets
from typing import NamedTuple

from gateway.edge import headers as h
from gateway.edge.link import Link

_LIMIT_CHECK_S = 0.1


class Message(NamedTuple):
    """A reply or a stored message."""

    subject: str
    headers: bytes
    data: bytes
    sequence: int = 0


class NoAnswer(Exception):
    """Nobody answered in time, or the connection was lost: the outcome is unknown."""


class Requests:
    """Questions and answers over a `Link`."""

    def __init__(self, link: Link, timeout_s: float) -> None:
        self.link, self._timeout_s = link, timeout_s
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
