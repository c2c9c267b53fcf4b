"""An HTTP API that does next to nothing, and the ways to it: POST {"n": 3} answers {"n": 4}, HEAD answers. What a benchmark's tools call.

Written for its price: on a machine with two cores, what an HTTP framework takes for a request would be most of what is measured. Each
--way PORT:MS is a relay in this process through which it is as many milliseconds of round trip away.
"""

import argparse
import asyncio
import json
import re
from contextlib import AsyncExitStack
from typing import cast

import uvloop

from gateway.wan import Relay

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def answer(body: bytes) -> bytes:
    data = json.dumps({"n": json.loads(body)["n"] + 1}).encode() if body else b""
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(data), data)


class Connection(asyncio.Protocol):
    """Requests one after the other, each with a Content-Length or without a body."""

    def __init__(self) -> None:
        self._data = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._data, 0, end)
            size = int(length.group(1)) if length else 0
            if len(self._data) < end + 4 + size:
                return
            body, self._data = self._data[end + 4 : end + 4 + size], self._data[end + 4 + size :]
            assert self._transport is not None
            self._transport.write(answer(body))


async def serve(port: int, ways: list[tuple[int, float]]) -> None:
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        server = await loop.create_server(Connection, "127.0.0.1", port)
        stack.callback(server.close)
        for way, round_trip_ms in ways:
            await stack.enter_async_context(Relay("127.0.0.1", port, round_trip_s=round_trip_ms / 1000, listen=("127.0.0.1", way)))
        await server.serve_forever()


def _way(text: str) -> tuple[int, float]:
    port, _, milliseconds = text.partition(":")
    return int(port), float(milliseconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--way", type=_way, action="append", default=[])
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.way))
