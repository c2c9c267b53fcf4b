"""A supervised connection to NATS: it comes back by itself, with its subscriptions, whatever ended it."""

import asyncio
import logging
import random
import ssl
from collections.abc import Callable
from typing import Any

from nats.aio.client import Server

from gateway.addresses import shown_url
from gateway.config import NatsSection
from gateway.edge.wire import Handler, RawClient
from gateway.errors import InvalidStep, Unavailable

log = logging.getLogger(__name__)

_CHECK_S = 0.5
_BUSY_FOR_S = 0.01
_CONNECT_TIMEOUT_S = 2
_BARRIER_TRY_S = 5.0


class LinkSubscription:
    """A subscription of a link; it outlives reconnects."""

    def __init__(self, link: "Link", subject: str, queue: str, handler: Handler) -> None:
        self._link, self.subject, self.queue, self.handler = link, subject, queue, handler
        self.sid = 0

    async def close(self) -> None:
        """Returns when no message can come any more; those on the way still reach the handler."""
        await self._link.unsubscribe(self)

    def end(self) -> None:
        """At once: nothing reaches the handler any more, and the server is told when it can be."""
        self._link.end(self)


class Link:
    """One connection. Publish, consume and control have one each, since an error of one must not stop the others.

    Listeners in `on_reconnect` are called after each time that the connection was lost and is back.
    """

    def __init__(self, settings: NatsSection, urls: tuple[str, ...], name: str) -> None:
        self._settings, self._urls, self.name = settings, urls or ("nats://127.0.0.1:4222",), name
        self._client = RawClient()
        self._subscriptions: set[LinkSubscription] = set()
        self._supervisor: asyncio.Task[None] | None = None
        self._random = random.Random()
        self.on_reconnect: list[Callable[[], None]] = []
        self.rebuilt = 0

    @property
    def connected(self) -> bool:
        return self._client.is_connected and self._client.reader_alive

    @property
    def max_payload_bytes(self) -> int:
        return self._client.max_payload

    async def start(self, timeout_s: float) -> None:
        """Connects. Raises Unavailable when no server answers within timeout_s."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connect(self._client)
        except (TimeoutError, OSError, ValueError) as error:
            reason = self._client.last_error or error
            await self._client.close()
            raise Unavailable(
                f"no NATS server answered at {', '.join(map(shown_url, self._urls))} within {timeout_s:g} s"
                f" ({type(reason).__name__}: {reason}); start one with `nearloop up` or correct [nats] urls"
            ) from None
        self._supervisor = asyncio.create_task(self._supervise(), name=f"supervise {self.name}")

    async def _connect(self, client: RawClient) -> None:
        settings = self._settings
        options: dict[str, Any] = {}
        if settings.credentials:
            options["user_credentials"] = settings.credentials
        if settings.tls_ca:
            options["tls"] = ssl.create_default_context(cafile=settings.tls_ca)
        await client.connect(
            servers=list(self._urls),
            name=self.name,
            error_cb=self._on_error,
            reconnected_cb=self._on_reconnected,
            connect_timeout=_CONNECT_TIMEOUT_S,
            reconnect_time_wait=1,
            max_reconnect_attempts=-1,
            reconnect_to_server_handler=self._next_server,
            ping_interval=5,
            max_outstanding_pings=2,
            **options,
        )
        for subscription in self._subscriptions:
            subscription.sid = client.add_handler(subscription.subject, subscription.queue, subscription.handler)

    def _next_server(self, servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
        """The least tried server, after a pause that grows to 2 s and differs between clients."""
        server = min(servers, key=lambda one: one.reconnects)
        return server, self._random.uniform(0.5, 1.0) * min(2.0, 0.05 * 2 ** min(server.reconnects, 6))

    async def _on_error(self, error: Exception) -> None:
        log.debug("%s: %s: %s", self.name, type(error).__name__, error)

    async def _on_reconnected(self) -> None:
        log.info("%s: connected again", self.name)
        for listener in self.on_reconnect:
            listener()

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(_CHECK_S)
            client = self._client
            if client.is_closed or (client.is_connected and not client.reader_alive):
                # One more look, since a reconnect swaps the reading task.
                await asyncio.sleep(_CHECK_S * self._random.uniform(0.5, 1.5))
                if client.is_closed or (client.is_connected and not client.reader_alive):
                    await self._rebuild()

    async def _rebuild(self) -> None:
        log.warning("%s: the connection was closed for good (%s), opening a new one", self.name, self._client.last_error)
        old, client = self._client, RawClient()
        try:
            await old.close()
            async with asyncio.timeout(10 * _CONNECT_TIMEOUT_S):
                await self._connect(client)
        except (TimeoutError, OSError, ValueError) as error:
            log.warning("%s: no new connection yet: %s", self.name, client.last_error or error)
            await client.close()
            return
        self._client = client
        self.rebuilt += 1
        await self._on_reconnected()

    def gather(self, busy: bool) -> None:
        """While the owner is busy, and a little longer, messages wait for each other a moment.

        Longer, since quick steps come and go in bursts: between two of them nobody would look busy.
        """
        if busy:
            self._client.gather_until_s = asyncio.get_running_loop().time() + _BUSY_FOR_S

    def send(self, subject: str, payload: bytes = b"", headers: bytes = b"", reply: str = "") -> bool:
        """Publishes without waiting; buffered while the connection is down. False when the buffer is full.

        Raises InvalidStep when payload and headers are larger than the server takes: such a message would end the connection.
        """
        size = len(payload) + len(headers)
        if size > self._client._max_payload:
            limit = f"{size} bytes with headers, the transport takes {self._client.max_payload}"
            raise InvalidStep([("input", limit)], reason="TOO_LARGE")
        line = f"HPUB {subject} {reply} {len(headers)} {size}\r\n" if headers else f"PUB {subject} {reply} {size}\r\n"
        return self._client.send(b"%b%b%b\r\n" % (line.encode(), headers, payload))

    def subscribe(self, subject: str, handler: Handler, queue: str = "") -> LinkSubscription:
        """Active at the server after the next `barrier`."""
        subscription = LinkSubscription(self, subject, queue, handler)
        self._subscriptions.add(subscription)
        if not self._client.is_closed and self._supervisor is not None:
            subscription.sid = self._client.add_handler(subject, queue, handler)
        return subscription

    async def listen(self, subject: str, handler: Handler, timeout_s: float = 10.0, queue: str = "") -> LinkSubscription:
        """A subscription that is active at the server. Raises Unavailable; leaves nothing behind then, nor when it is cancelled."""
        subscription = self.subscribe(subject, handler, queue)
        try:
            await self.barrier(timeout_s)
        except BaseException:
            subscription.end()  # without waiting: a wait could be cancelled in its turn
            raise
        return subscription

    def end(self, subscription: LinkSubscription) -> None:
        if subscription in self._subscriptions:
            self._subscriptions.discard(subscription)
            self._client.unsubscribe_sid(subscription.sid)
            self._client.remove_handler(subscription.sid)

    async def unsubscribe(self, subscription: LinkSubscription) -> None:
        if subscription not in self._subscriptions:
            return
        self._subscriptions.discard(subscription)
        client, sid = self._client, subscription.sid
        client.unsubscribe_sid(sid)
        try:
            if client.is_connected:
                await asyncio.wait_for(client.ping(), _BARRIER_TRY_S)
        except TimeoutError:
            pass  # the connection is gone, and the subscription with it
        finally:
            client.remove_handler(sid)

    async def barrier(self, timeout_s: float = 10.0) -> None:
        """Returns once the server has handled all that was sent here before. Raises Unavailable."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        if self.connected:
                            await asyncio.wait_for(self._client.ping(), min(_BARRIER_TRY_S, timeout_s))
                            return
                    except TimeoutError:
                        pass
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise Unavailable(f"NATS did not answer within {timeout_s:g} s") from None

    async def close(self) -> None:
        """Sends what is buffered, then disconnects."""
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
            self._supervisor = None
        client = self._client
        if client.is_connected:
            try:
                await asyncio.wait_for(client.ping(), 2.0)
            except TimeoutError:
                log.warning("%s: closed before the server confirmed what was sent", self.name)
        await client.close()
