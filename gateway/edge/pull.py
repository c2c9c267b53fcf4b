"""The raw pull loop of one queue: credits asked for, messages by callback, everything that can go wrong renewed inside.

A pull request asks for up to `batch` messages during `expires`. The server ends it with a status that says how many did not
come (`Nats-Pending-Messages`), so the count of credits stays exact; when the server falls silent it starts again from zero.
"""

import asyncio
import itertools
import json
import logging
import random
import secrets
from collections.abc import Awaitable, Callable

from gateway.clock import Clock
from gateway.edge import headers as h
from gateway.edge.link import Link
from gateway.errors import Unavailable

log = logging.getLogger(__name__)

EXPIRES_S = 30.0
HEARTBEAT_S = 5.0
_MISSED_S = 2.5 * HEARTBEAT_S
_TOP_UP_S = 0.01
_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 5.0
_MANY = 16
_NANO = 1_000_000_000

OnMessage = Callable[[str, str, bytes, bytes], None]


class PullLoop:
    """Asks a consumer for messages; `api` is the prefix of the JetStream that has it.

    `on_message` gets subject, acknowledgement subject, header block and body.
    """

    def __init__(
        self,
        link: Link,
        clock: Clock,
        api: str,
        stream: str,
        consumer: str,
        group: str,
        priority: int,
        on_message: OnMessage,
        ensure_consumer: Callable[[], Awaitable[None]],
    ) -> None:
        self._link, self._clock, self._on_message, self._ensure_consumer = link, clock, on_message, ensure_consumer
        self._subject = f"{api}.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._name = f"{stream} {consumer}"
        self._group, self._priority = group, priority
        self._inbox = f"_INBOX.{secrets.token_hex(8)}"
        self._numbers = itertools.count(1)
        # Requests that may still bring messages, oldest first: number -> (when the server has ended it at the latest, batch).
        self._open: dict[int, tuple[float, int]] = {}
        self._asked = 0  # sum of their batches
        self._era = 0  # requests up to this number were forgotten; what is said about them counts no more
        self._credits = self._wanted = 0
        self._heard_s = clock.now_s()
        self._closed = False
        self._repairing: asyncio.Task[None] | None = None
        self._failures = 0  # repairs that failed since the last one that did not
        self._gathering = False  # the top-up waits for more to ask for, not for something to get well
        self._top_up: asyncio.TimerHandle | asyncio.Handle | None = None
        self._subscription = link.subscribe(f"{self._inbox}.*", self._on_any)
        link.on_reconnect.append(self._on_reconnect)
        self.repairs = 0

    @property
    def credits(self) -> int:
        return self._credits

    @property
    def closing(self) -> bool:
        return self._closed

    def want(self, credits: int) -> None:
        self._wanted = credits
        if credits <= self._credits or self._closed:
            return
        # Few outstanding: ask in this loop iteration. Many: gather some more, since each request costs the server a message.
        soon = self._credits * 2 <= credits
        if self._top_up is not None:
            if not (soon and self._gathering):
                return
            self._top_up.cancel()
        self._gathering = not soon
        loop = asyncio.get_running_loop()
        self._top_up = loop.call_soon(self._ask) if soon else loop.call_later(_TOP_UP_S, self._ask)

    def _ask(self) -> None:
        self._top_up = None
        batch = self._wanted - self._credits
        if batch <= 0 or self._closed or self._repairing is not None:
            return
        if not self._credits:
            self._heard_s = self._clock.now_s()
        number = next(self._numbers)
        request = {
            "batch": batch,
            "expires": int(EXPIRES_S * _NANO),
            "idle_heartbeat": int(HEARTBEAT_S * _NANO),
            "group": self._group,
            "priority": self._priority,
        }
        if self._link.connected and self._link.send(self._subject, json.dumps(request).encode(), reply=f"{self._inbox}.{number}"):
            self._open[number] = (self._clock.now_s() + EXPIRES_S + _MISSED_S, batch)
            self._asked += batch
            self._credits += batch

    def _on_any(self, subject: str, reply: str, headers: bytes, data: bytes) -> None:
        self._heard_s = self._clock.now_s()
        if reply:
            self._credits = max(0, self._credits - 1)
            self._retire_oldest()
            self._on_message(subject, reply, headers, data)
            return
        code, text = h.status(headers)
        if code == 100:
            return
        number = int(subject.rpartition(".")[2])
        if number > self._era:
            left = int(h.parse(headers).get("Nats-Pending-Messages", "0"))
            self._asked -= self._open.pop(number, (0.0, 0))[1]
            self._credits = max(0, self._credits - left)
            self._retire_oldest()
        if code == 503 or (code == 409 and "deleted" in text.lower()):
            self.repair()
        elif code in (404, 408) or (code == 409 and "batch completed" in text.lower()):
            self.want(self._wanted)
        else:
            log.info("%s: pull ended: %s %s", self._name, code, text)
            self._later()

    def _retire_oldest(self) -> None:
        """A request that got all its messages ends without a status; the oldest are served first."""
        while self._open:
            oldest = next(iter(self._open))
            batch = self._open[oldest][1]
            if self._credits and self._asked - self._credits < batch:
                return
            del self._open[oldest]
            self._asked -= batch

    def _later(self) -> None:
        if self._top_up is None and not self._closed:
            self._gathering = False
            self._top_up = asyncio.get_running_loop().call_later(random.uniform(0.1, 0.5), self._ask)

    def check(self) -> None:
        """Called about once a second: notices a server that fell silent and requests whose end was lost."""
        now_s = self._clock.now_s()
        if self._closed or self._repairing is not None:
            return
        for number in [number for number, (end_s, _) in self._open.items() if end_s < now_s]:
            self._asked -= self._open.pop(number)[1]
        self._credits = min(self._credits, self._asked)
        if self._credits and self._heard_s + _MISSED_S < now_s:
            log.info("%s: no heartbeat for %.0f s", self._name, now_s - self._heard_s)
            self.repair()
        elif self._wanted > self._credits:
            self.want(self._wanted)

    def _on_reconnect(self) -> None:
        """Requests of the lost connection are gone."""
        self._forget()
        self._later()

    def _forget(self) -> None:
        self._era = next(self._numbers)
        self._open.clear()
        self._credits = self._asked = 0
        self._heard_s = self._clock.now_s()

    def repair(self) -> None:
        """The consumer may be gone, or not made yet: make sure of it, then ask again."""
        self._forget()
        if self._repairing is None and not self._closed:
            self.repairs += 1
            self._repairing = asyncio.create_task(self._repair_now(), name=f"repair {self._name}")

    async def _repair_now(self) -> None:
        """What fails is tried again after a pause that grows."""
        try:
            await asyncio.sleep(random.uniform(0.2, 1.0) * min(_LONGEST_PAUSE_S, _PAUSE_S * 2**self._failures))
            await self._ensure_consumer()
        except Exception as error:
            self._failures = min(self._failures + 1, _MANY)
            # That nobody answers was said by who asked; a worker has many loops.
            quiet = isinstance(error, Unavailable) or self._failures > 1
            log.log(logging.DEBUG if quiet else logging.WARNING, "%s: not restored yet: %s", self._name, error)
        else:
            self._failures = 0
        finally:
            self._repairing = None
        self.want(self._wanted)

    async def close(self) -> None:
        """Stops asking; returns when no message can come any more. What comes meanwhile still reaches on_message."""
        if self._closed:
            return
        self._closed = True
        if self._top_up is not None:
            self._top_up.cancel()
        if self._repairing is not None:
            self._repairing.cancel()
            await asyncio.gather(self._repairing, return_exceptions=True)
        self._link.on_reconnect.remove(self._on_reconnect)
        await self._subscription.close()
        self._forget()
