"""A connection comes back with its subscriptions, whatever ended it."""

import asyncio
from collections.abc import AsyncIterator

import pytest
from bus_rig import WAIT_S, eventually
from nats_process import NatsProcess

from gateway.config import NatsSection
from gateway.edge.link import Link
from gateway.errors import InvalidStep, Unavailable


class Echo:
    """A link with a subscription, and whether a message still makes the round."""

    def __init__(self, url: str) -> None:
        self.link = Link(NatsSection(), (url,), "test")
        self.received: list[bytes] = []
        self.returns = 0
        self.link.subscribe("test.before", lambda *message: self.received.append(message[3]))
        self.link.on_reconnect.append(self._on_reconnect)

    def _on_reconnect(self) -> None:
        self.returns += 1

    async def works(self) -> None:
        await self.link.barrier(WAIT_S)
        self.received.clear()
        self.link.send("test.before", b"hello", b"NATS/1.0\r\nA: b\r\n\r\n")
        await eventually(lambda: self.received == [b"hello"])


@pytest.fixture
async def echo(own_nats_server: NatsProcess) -> AsyncIterator[Echo]:
    echo = Echo(own_nats_server.url)
    await echo.link.start(10.0)
    yield echo
    await echo.link.close()


async def test_after_a_server_crash(echo: Echo, own_nats_server: NatsProcess) -> None:
    await echo.works()
    own_nats_server.kill()
    await eventually(lambda: not echo.link.connected)
    own_nats_server.start()
    await eventually(lambda: echo.returns == 1)
    await echo.works()
    assert echo.link.rebuilt == 0


async def test_after_the_client_closed_for_good(echo: Echo) -> None:
    await echo.works()
    await echo.link._client.close()
    assert not echo.link.connected
    await eventually(lambda: echo.returns == 1)
    await echo.works()
    assert echo.link.rebuilt == 1


async def test_after_the_read_task_died(echo: Echo) -> None:
    await echo.works()
    task = echo.link._client._reading_task
    assert task is not None
    task.cancel()
    await asyncio.wait([task])
    assert echo.link._client.is_connected  # the client alone would believe so for ever
    assert not echo.link.connected
    await eventually(lambda: echo.returns == 1)
    await echo.works()


async def test_what_was_sent_while_the_server_was_away_arrives(echo: Echo, own_nats_server: NatsProcess) -> None:
    own_nats_server.kill()
    await eventually(lambda: not echo.link.connected)
    assert echo.link.send("test.before", b"patience")
    own_nats_server.start()
    await eventually(lambda: echo.received == [b"patience"])


async def test_the_buffer_for_a_missing_server_is_bounded(echo: Echo, own_nats_server: NatsProcess) -> None:
    own_nats_server.kill()
    await eventually(lambda: not echo.link.connected)
    sent = [echo.link.send("test.other", bytes(1024 * 1024 - 100)) for _ in range(32)]
    assert sent[0]
    assert not sent[-1]


async def test_a_barrier_without_a_server_ends(echo: Echo, own_nats_server: NatsProcess) -> None:
    own_nats_server.kill()
    await eventually(lambda: not echo.link.connected)
    with pytest.raises(Unavailable):
        await echo.link.barrier(0.2)


async def test_too_large_is_refused_here(echo: Echo) -> None:
    limit = echo.link.max_payload_bytes
    with pytest.raises(InvalidStep):
        echo.link.send("test.before", bytes(limit + 1))
    with pytest.raises(InvalidStep):
        echo.link.send("test.before", bytes(limit), b"NATS/1.0\r\nA: b\r\n\r\n")
    echo.link.send("test.before", bytes(limit))
    await eventually(lambda: [len(body) for body in echo.received] == [limit])
    await echo.works()


async def test_an_ended_subscription_gets_nothing(echo: Echo) -> None:
    seen: list[bytes] = []
    subscription = echo.link.subscribe("test.before", lambda *message: seen.append(message[3]))
    await echo.works()
    assert seen == [b"hello"]
    await subscription.close()
    await subscription.close()
    await echo.works()
    assert seen == [b"hello"]


async def test_listening_that_fails_or_is_cancelled_leaves_nothing(echo: Echo, own_nats_server: NatsProcess) -> None:
    seen: list[bytes] = []
    before = set(echo.link._subscriptions)
    listening = asyncio.create_task(echo.link.listen("test.before", lambda *message: seen.append(message[3])))
    await asyncio.sleep(0)  # so that it has subscribed and waits for the server
    listening.cancel()
    await asyncio.wait([listening])
    assert listening.cancelled()
    assert echo.link._subscriptions == before
    await echo.works()
    assert seen == []
    own_nats_server.kill()
    await eventually(lambda: not echo.link.connected)
    with pytest.raises(Unavailable):
        await echo.link.listen("test.before", lambda *message: seen.append(message[3]), timeout_s=0.2)
    assert echo.link._subscriptions == before
    own_nats_server.start()
    await eventually(lambda: echo.returns == 1)
    await echo.works()
    assert seen == []


async def test_an_ended_subscription_is_ended_at_once(echo: Echo) -> None:
    seen: list[bytes] = []
    subscription = await echo.link.listen("test.before", lambda *message: seen.append(message[3]))
    await echo.works()
    assert seen == [b"hello"]
    echo.link.send("test.before", b"too late")
    subscription.end()
    subscription.end()
    await echo.works()
    assert seen == [b"hello"]
