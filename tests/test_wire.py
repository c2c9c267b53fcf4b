"""The fast path in nats-py's client: every way of cutting the byte stream gives the same messages."""

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client
from nats.errors import ProtocolError

from gateway.edge.wire import RawClient, RawParser

STREAM = (
    b'INFO {"server_id":"x"}\r\n'
    b"MSG a.b 1 5\r\nhello\r\n"
    b"PING\r\n"
    b"HMSG a.c 1 reply.to 22 25\r\nNATS/1.0\r\nKey: val\r\n\r\nxyz\r\n"
    b"+OK\r\n"
    b"MSG a.d 2 reply.2 0\r\n\r\n"
    b"HMSG a.e 1 16 16\r\nNATS/1.0 503\r\n\r\n\r\n"
    b"PONG\r\n"
    b"MSG a.f 9 3\r\nxxx\r\n"
    b"MSG a.g 2 8\r\nMSG 1 1\n\r\n"
)
EXPECTED = [
    (1, "a.b", "", b"", b"hello"),
    (1, "a.c", "reply.to", b"NATS/1.0\r\nKey: val\r\n\r\n", b"xyz"),
    (2, "a.d", "reply.2", b"", b""),
    (1, "a.e", "", b"NATS/1.0 503\r\n\r\n", b""),
    (2, "a.g", "", b"", b"MSG 1 1\n"),
]


class Recorder(RawClient):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, str, str, bytes, bytes]] = []
        self.control: list[str] = []
        for sid in (1, 2):
            self.handlers[b"%d" % sid] = lambda *message, sid=sid: self.seen.append((sid, *message))

    async def _process_ping(self) -> None:
        self.control.append("ping")

    async def _process_pong(self) -> None:
        self.control.append("pong")

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        self.control.append(info["server_id"])

    async def _process_err(self, err_msg: str) -> None:
        self.control.append(err_msg)
        self._ps.reset()


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
async def test_any_cut_gives_the_same(cuts: list[int]) -> None:
    client = Recorder()
    points = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(points):
        await client._ps.parse(STREAM[start:end])
    assert client.seen == EXPECTED
    assert client.control == ["x", "ping", "pong"]


async def test_a_handler_that_fails_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    client = Recorder()

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    client.handlers[b"1"] = broken
    await client._ps.parse(STREAM)
    assert client.seen == [one for one in EXPECTED if one[0] == 2]
    assert "a message on a.b could not be handled" in caplog.text


async def test_what_follows_a_fatal_error_belongs_to_the_old_connection() -> None:
    client = Recorder()
    await client._ps.parse(b"-ERR 'Stale Connection'\r\nMSG a.b 1 5\r\nhello\r\n")
    assert client.control == ["'stale connection'"]
    assert client.seen == []


async def test_nonsense_is_a_protocol_error() -> None:
    with pytest.raises(ProtocolError):
        await Recorder()._ps.parse(b"HTTP/1.1 200 OK\r\n")
    with pytest.raises(ProtocolError):
        await Recorder()._ps.parse(bytes(100_000))


async def test_a_pong_for_a_ping_that_was_given_up() -> None:
    client = RawClient()
    given_up = client.ping()
    client._pongs.append(given_up)
    given_up.cancel()
    await client._ps.parse(b"PONG\r\n")
    assert client._pongs == []


def test_the_private_names_of_nats_py_are_there() -> None:
    client = Client()
    for name in (
        "_ps",
        "_subs",
        "_sid",
        "_pending",
        "_pending_data_size",
        "_pongs",
        "_pings_outstanding",
        "_status",
        "_transport",
        "_reading_task",
    ):
        assert hasattr(client, name), name
    assert isinstance(RawClient()._ps, RawParser)
