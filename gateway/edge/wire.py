"""nats-py's client with a fast path: messages reach plain callbacks as raw bytes, publishes are written in batches.

nats-py keeps what it does well: connecting, authentication, TLS, pings, reconnecting, subscribing again. Replaced is what costs
time for each message: its parser, its queue and task for each subscription, its header dictionaries and its flusher task. This is
the one file that touches private names of nats-py; `tests/test_wire.py` fails when they move.
"""

import asyncio
import json
import logging
from collections.abc import Callable
from typing import Any

from nats.aio.client import Client, Srv
from nats.aio.subscription import Subscription
from nats.errors import ProtocolError
from nats.protocol.parser import Parser

log = logging.getLogger(__name__)

# Called with subject, reply subject, header block (empty without headers) and payload. It must not block.
Handler = Callable[[str, str, bytes, bytes], None]

MAX_BUFFERED_BYTES = 16 * 1024 * 1024  # of publishes while the connection is down
_MAX_LINE_BYTES = 64 * 1024
# One write for many messages: fewer system calls and wake-ups here, in the server and at who receives them. Measured with 64 steps in
# flight: a tenth less processor time for the whole path; the first message of a batch waits a millisecond or two.
_GATHER_S = 0.001
_GATHER_BYTES = 64 * 1024
_M, _H = ord("M"), ord("H")


class RawParser(Parser):
    """Cuts the byte stream into messages and gives each to the handler of its subscription at once."""

    nc: "RawClient"

    def reset(self) -> None:
        super().reset()
        self._needed = 0
        self._generation = getattr(self, "_generation", 0) + 1

    async def parse(self, data: bytes = b"") -> None:
        if self.buf:
            self.buf.extend(data)
            if len(self.buf) < self._needed:
                return  # collecting without a copy, since a large message comes in many pieces
            data = bytes(self.buf)
            self.buf.clear()
        self._needed = 0
        handlers, stats = self.nc.handlers, self.nc.stats
        position, size = 0, len(data)
        while position < size:
            line_end = data.find(b"\r\n", position)
            if line_end < 0:
                if size - position > _MAX_LINE_BYTES:
                    raise ProtocolError("nats: control line too long")
                break
            operation = data[position]
            if operation != _M and operation != _H:
                generation = self._generation
                await self._control(data[position:line_end])
                if generation != self._generation:
                    return  # the connection was given up meanwhile; what is left belongs to it
                position = line_end + 2
                continue
            words = data[position:line_end].split()
            start = line_end + 2
            with_headers = operation == _H
            try:
                end = start + int(words[-1])
                middle = start + int(words[-2]) if with_headers else start
            except ValueError:
                raise ProtocolError("nats: malformed message line") from None
            if end + 2 > size:
                self._needed = end + 2 - position
                break
            reply = words[3].decode() if len(words) == (6 if with_headers else 5) else ""
            position = end + 2
            stats["in_msgs"] += 1
            stats["in_bytes"] += end - middle
            handler = handlers.get(words[2])
            if handler is None:
                continue
            try:
                handler(words[1].decode(), reply, data[start:middle], data[middle:end])
            except Exception:  # one bad message must not end the connection's read loop
                log.exception("a message on %s could not be handled", words[1].decode())
        if position < size:
            self.buf.extend(data[position:] if position else data)

    async def _control(self, line: bytes) -> None:
        if line.startswith(b"PING"):
            await self.nc._process_ping()
        elif line.startswith(b"PONG"):
            await self.nc._process_pong()
        elif line.startswith(b"-ERR"):
            await self.nc._process_err(line[4:].strip().decode().lower())
        elif line.startswith(b"INFO"):
            await self.nc._process_info(json.loads(line[4:]))
        elif not line.startswith(b"+OK"):
            raise ProtocolError("nats: unknown protocol")


class RawClient(Client):
    """A nats-py client whose subscriptions are plain callbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.handlers: dict[bytes, Handler] = {}
        self._ps = RawParser(self)
        self._write_scheduled = False
        self.gather_until_s = 0.0  # by the loop's clock; until then what goes out waits for company

    @property
    def reader_alive(self) -> bool:
        """False when nobody reads any more, although the client may still say that it is connected."""
        return self._reading_task is not None and not self._reading_task.done()

    def send(self, command: bytes) -> bool:
        """Sends at the end of this loop iteration, or a little later until `gather_until_s`, with all that came meanwhile.

        False when it was not even buffered.
        """
        connected = self._status == Client.CONNECTED
        if not connected and (self.is_closed or self._pending_data_size + len(command) > MAX_BUFFERED_BYTES):
            return False
        self._pending.append(command)
        self._pending_data_size += len(command)
        if connected and not self._write_scheduled:
            self._write_scheduled = True
            loop = asyncio.get_running_loop()
            if loop.time() < self.gather_until_s and self._pending_data_size < _GATHER_BYTES:
                loop.call_later(_GATHER_S, self._write_pending)
            else:
                loop.call_soon(self._write_pending)
        return True

    def _write_pending(self) -> None:
        self._write_scheduled = False
        if self._pending and self._status == Client.CONNECTED and self._transport:
            pending, self._pending, self._pending_data_size = self._pending, [], 0
            self._transport.write(pending[0] if len(pending) == 1 else b"".join(pending))

    def ping(self) -> "asyncio.Future[bool]":
        """Ends once the server has handled all that was sent before. Never ends when the connection is lost."""
        self._write_pending()
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self._transport and self._status == Client.CONNECTED:
            self._pongs.append(future)
            self._transport.write(b"PING\r\n")
        return future

    async def _process_pong(self) -> None:
        # nats-py's own raises for a ping that was given up, which would end the read loop.
        if self._pongs:
            future: asyncio.Future[Any] = self._pongs.pop(0)
            if not future.done():
                future.set_result(True)
            self._pongs_received += 1
            self._pings_outstanding = 0

    async def _connect_to_server(self, s: Srv) -> None:
        # nats-py drops the transport of a failed attempt without closing it.
        if self._transport:
            self._transport.close()  # type: ignore[no-untyped-call]
        await super()._connect_to_server(s)

    async def close(self) -> None:
        if self._status != Client.CONNECTED:
            # Nobody takes it any more, and nats-py would raise when it tries to write it.
            self._pending, self._pending_data_size = [], 0
        await super().close()

    def add_handler(self, subject: str, queue: str, handler: Handler) -> int:
        """Subscribes; nats-py subscribes again after each reconnect. Returns the subscription's number."""
        self._sid += 1
        self._subs[self._sid] = Subscription(self, self._sid, subject, queue=queue)
        self.handlers[b"%d" % self._sid] = handler
        if self._status == Client.CONNECTED:
            self.send(f"SUB {subject} {queue} {self._sid}\r\n".encode())
        return self._sid

    def unsubscribe_sid(self, sid: int) -> None:
        """Ends interest at the server; messages on the way still reach the handler until `remove_handler`."""
        self._subs.pop(sid, None)
        if self._status == Client.CONNECTED:
            self.send(b"UNSUB %d\r\n" % sid)

    def remove_handler(self, sid: int) -> None:
        self.handlers.pop(b"%d" % sid, None)
