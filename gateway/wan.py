"""A path to a far place, on one machine: a TCP relay that delays both directions, and can be cut.

Every byte arrives half a round trip after it came, in order. Up to MAX_IN_TRANSIT_BYTES of each direction of a connection are on the way at
once; beyond that the sender is slowed down. So the latency is that of a long line, and throughput is as good as untouched. Until the
target is called, half a round trip passes as well.
"""

import argparse
import asyncio
import logging
import signal
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self, cast

import uvloop

from gateway import addresses

log = logging.getLogger("nearloop.wan")
MAX_IN_TRANSIT_BYTES = 16 * 1024 * 1024  # 400 MB/s at a round trip of 80 ms
_TICK_S = 0.0005  # uvloop's clock counts milliseconds: what is due within half of one is due now


class Relay:
    """`async with Relay("127.0.0.1", 7422, round_trip_s=0.08) as relay:` takes connections at relay.address. Raises OSError."""

    def __init__(self, host: str, port: int, *, round_trip_s: float = 0.0, listen: tuple[str, int] = ("127.0.0.1", 0)) -> None:
        self.target = (host, port)
        self.one_way_s = round_trip_s / 2
        self.healed = asyncio.Event()
        self.healed.set()
        self.is_hung_up = False
        self.pairs: set[_Pair] = set()
        self._listen = listen
        self._idle = asyncio.Event()
        self._server: asyncio.Server | None = None

    @property
    def address(self) -> str:
        assert self._server is not None
        host, port = self._server.sockets[0].getsockname()[:2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    @property
    def connections(self) -> int:
        return len(self.pairs)

    @property
    def in_transit_bytes(self) -> int:
        return sum(line.size_bytes for pair in self.pairs for line in pair.lines)

    def cut(self) -> None:
        """As when a cable is cut: whatever is on the way or sent from now on arrives after heal(), and nobody is told. New connections are
        taken and reach the target after heal()."""
        self.healed.clear()

    def hang_up(self) -> None:
        """All connections are reset; so are new ones, until heal()."""
        self.is_hung_up = True
        self._abort()

    def heal(self) -> None:
        self.is_hung_up = False
        self.healed.set()
        for pair in tuple(self.pairs):
            for line in pair.lines:
                line.deliver()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.get_running_loop().create_server(lambda: _Pair(self).near, *self._listen)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server is not None
        self._server.close()
        self.is_hung_up = True  # what was accepted and not yet seen
        self._abort()
        while self.pairs:
            self._idle.clear()
            await self._idle.wait()
        await self._server.wait_closed()

    def _abort(self) -> None:
        for pair in tuple(self.pairs):
            pair.abort()

    def gone(self, pair: "_Pair") -> None:
        self.pairs.discard(pair)
        self._idle.set()


class _Pair:
    """A connection: the caller's end and the target's, and a line in each direction."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        there, back = _Line(relay, self._ended), _Line(relay, self._ended)
        self.lines = (there, back)
        self.near, self._far = _End(self, there, back), _End(self, back, there)
        self._dialling: asyncio.Task[None] | None = None
        self._open = 1  # ends that exist or are being called

    def accepted(self) -> None:
        self._relay.pairs.add(self)
        if self._relay.is_hung_up:
            self.abort()
        else:
            self._open = 2
            self._dialling = asyncio.create_task(self._dial())

    async def _dial(self) -> None:
        try:
            await asyncio.sleep(self._relay.one_way_s)
            await self._relay.healed.wait()
            await asyncio.get_running_loop().create_connection(lambda: self._far, *self._relay.target)
        except OSError:
            self.abort()
        finally:
            if self._far.transport is None:
                self.lost()

    def _ended(self) -> None:
        """Both directions of a connection that was ended in an orderly way are through."""
        if all(line.has_ended for line in self.lines):
            for end in (self.near, self._far):
                if end.transport is not None:
                    end.transport.close()

    def abort(self) -> None:
        if self._dialling is not None:
            self._dialling.cancel()
        for end in (self.near, self._far):
            if end.transport is not None:
                end.transport.abort()

    def lost(self) -> None:
        self._open -= 1
        if self._open == 0:
            self._relay.gone(self)


class _End(asyncio.Protocol):
    """One end of a connection: what it receives goes into one line, what it sends comes out of the other."""

    def __init__(self, pair: _Pair, into: "_Line", out_of: "_Line") -> None:
        self._pair, self._into, self._out_of = pair, into, out_of
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = self._into.source = self._out_of.target = cast(asyncio.Transport, transport)
        if self is self._pair.near:
            self._pair.accepted()
        else:
            self._out_of.deliver()

    def data_received(self, data: bytes) -> None:
        self._into.put(data)

    def eof_received(self) -> bool:
        self._into.put(b"")
        return True  # it still takes what the other one sends

    def connection_lost(self, _error: Exception | None) -> None:
        self._out_of.drop()
        self._into.put(None)
        self._pair.lost()

    def pause_writing(self) -> None:
        self._out_of.is_blocked = True

    def resume_writing(self) -> None:
        self._out_of.is_blocked = False
        self._out_of.deliver()


class _Line:
    """One direction of a connection: a queue of (due, bytes), where b"" is the end of the stream and None that of the connection."""

    def __init__(self, relay: Relay, on_end: Callable[[], None]) -> None:
        self._relay, self._on_end = relay, on_end
        self._loop = asyncio.get_running_loop()
        self._queue: deque[tuple[float, bytes | None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_full = self._is_dead = False
        self.source: asyncio.Transport | None = None
        self.target: asyncio.Transport | None = None
        self.size_bytes = 0
        self.is_blocked = False  # the target takes no more for now
        self.has_ended = False

    def put(self, data: bytes | None) -> None:
        if self._is_dead:
            return
        self._queue.append((self._loop.time() + self._relay.one_way_s, data))
        self.size_bytes += len(data or b"")
        if self.size_bytes > MAX_IN_TRANSIT_BYTES and self.source is not None and not self._is_full:
            self._is_full = True
            self.source.pause_reading()
        if self._timer is None:
            self.deliver()

    def deliver(self) -> None:
        """Hands over what is due, as far as the target takes it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now_s = self._loop.time() + _TICK_S
        while self._queue and self.target is not None and not self.is_blocked and self._relay.healed.is_set():
            due_s, data = self._queue[0]
            if due_s > now_s:
                self._timer = self._loop.call_at(due_s, self.deliver)
                return
            self._queue.popleft()
            if data is None:
                self.target.close()
            elif data == b"":
                self.has_ended = True
                try:
                    self.target.write_eof()
                except OSError:  # reset meanwhile, which nobody notices who has read to the end
                    self.target.abort()
                self._on_end()
            else:
                self.size_bytes -= len(data)
                self.target.write(data)
        if self.size_bytes <= MAX_IN_TRANSIT_BYTES // 2:
            self._read_on()

    def drop(self) -> None:
        """Nobody takes what is still on the way."""
        self._is_dead = True
        self._queue.clear()
        self.size_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._read_on()  # to see the source end

    def _read_on(self) -> None:
        if self._is_full and self.source is not None:
            self._is_full = False
            self.source.resume_reading()


async def _run(listen: str, target: str, round_trip_s: float, ready_file: Path | None) -> None:
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    async with Relay(*addresses.split(target), round_trip_s=round_trip_s, listen=addresses.split(listen)) as relay:

        def do(what: str, action: Callable[[], None]) -> None:
            action()
            log.info("%s, %d connections, %d bytes on the way", what, relay.connections, relay.in_transit_bytes)

        loop.add_signal_handler(signal.SIGUSR1, do, "cut", relay.cut)
        loop.add_signal_handler(signal.SIGUSR2, do, "healed", relay.heal)
        loop.add_signal_handler(signal.SIGHUP, do, "hung up", relay.hang_up)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        if ready_file is not None:
            ready_file.write_text(relay.address)
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -P -m gateway.wan",
        description="A TCP relay that makes the way to a server as long as one across the country.",
        epilog="SIGUSR1 cuts it: nothing arrives, nobody is told. SIGHUP resets all connections and all new ones. SIGUSR2 heals it, and "
        "what was held arrives.",
    )
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="port 0 takes a free one, see --ready-file")
    parser.add_argument("--to", required=True, metavar="HOST:PORT", help="the server")
    parser.add_argument("--round-trip-ms", type=float, default=0.0, metavar="MS", help="half of it is added in each direction (default: 0)")
    parser.add_argument("--ready-file", type=Path, metavar="FILE", help="gets the address once connections are taken")
    options = parser.parse_args()
    try:
        addresses.split(options.listen)
        addresses.split(options.to)
        if not 0 <= options.round_trip_ms <= 60_000:
            raise ValueError(f"--round-trip-ms {options.round_trip_ms:g}: say 0 to 60000")
    except ValueError as error:
        parser.error(str(error))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(options.listen, options.to, options.round_trip_ms / 1000, options.ready_file))
    except OSError as error:
        parser.exit(1, f"nothing can listen on {options.listen}: {error.strerror or error}\n")


if __name__ == "__main__":
    main()
