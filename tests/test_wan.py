"""The relay that stands for a long line: what it carries, in which order, how it ends and is cut. How long it takes is not measured."""

import asyncio
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from gateway import addresses, wan
from gateway.wan import Relay

ROUND_TRIP_S = 0.02


def on_both_loops(test: Callable[[], Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """uvloop is what the process uses, the other one what tests that hold a relay in themselves use."""

    @pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
    def run(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            runner.run(test())

    return run


class Caller:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def ask(self, text: bytes) -> bytes:
        self.writer.write(text)
        return await self.reader.readexactly(len(text))

    async def ended(self) -> bytes:
        """What still comes before the end, in whatever way it ends."""
        try:
            return await self.reader.read()
        except ConnectionResetError:
            return b""


class Target:
    """A server that echoes; counts what it has read; can be told to read nothing for a while."""

    def __init__(self) -> None:
        self.connections, self.received = 0, bytearray()
        self.may_read = asyncio.Event()
        self.may_read.set()
        self.tasks: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.tasks.add(asyncio.create_task(self.echo(reader, writer)))

    async def echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self.may_read.wait() and (data := await reader.read(1 << 16)):
                self.received += data
                writer.write(data)
                await writer.drain()
            writer.write(b"bye")
        except ConnectionError:
            pass
        finally:
            writer.close()


@asynccontextmanager
async def line(round_trip_s: float = ROUND_TRIP_S) -> AsyncIterator[tuple[Target, Relay]]:
    target = Target()
    async with await asyncio.start_server(target.accept, "127.0.0.1", 0) as server:
        host, port = server.sockets[0].getsockname()
        async with Relay(host, port, round_trip_s=round_trip_s) as relay:
            yield target, relay
            target.may_read.set()
        if target.tasks:
            await asyncio.wait(target.tasks)


@asynccontextmanager
async def calling(relay: Relay) -> AsyncIterator[Caller]:
    reader, writer = await asyncio.open_connection(*addresses.split(relay.address))
    try:
        yield Caller(reader, writer)
    finally:
        writer.close()
        try:
            await writer.wait_closed()
        except ConnectionError:
            pass


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await asyncio.sleep(0.005)


async def nobody_on(relay: Relay) -> None:
    await until(lambda: relay.connections == 0)


@on_both_loops
async def test_everything_arrives_in_order_on_each_of_several_connections() -> None:
    async def one(relay: Relay, seed: int) -> None:
        rng = random.Random(seed)
        sent = [rng.randbytes(rng.choice([1, 100, 70_000])) for _ in range(60)]
        async with calling(relay) as caller:
            for data in sent:
                caller.writer.write(data)
            assert await caller.reader.readexactly(sum(map(len, sent))) == b"".join(sent)

    for round_trip_s in (0.0, ROUND_TRIP_S):
        async with line(round_trip_s) as (_, relay):
            await asyncio.gather(*(one(relay, seed) for seed in range(5)))
            await nobody_on(relay)


@on_both_loops
async def test_what_was_sent_is_on_the_way_first() -> None:
    """With a round trip of an hour nothing can have arrived."""
    async with line(3600.0) as (target, relay), calling(relay) as caller:
        caller.writer.write(b"slow")
        await until(lambda: relay.in_transit_bytes == 4)
        assert target.connections == 0


@on_both_loops
async def test_half_of_a_connection_can_end_before_the_other() -> None:
    async with line() as (_, relay), calling(relay) as caller:
        assert await caller.ask(b"one") == b"one"
        caller.writer.write(b"two")
        caller.writer.write_eof()
        assert await caller.reader.read() == b"twobye"
        await nobody_on(relay)


@on_both_loops
async def test_the_target_may_end_it_with_words_on_the_way() -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"go away")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server, Relay(*server.sockets[0].getsockname()) as relay:
        async with calling(relay) as caller:
            assert await caller.reader.read() == b"go away"
        await nobody_on(relay)


@on_both_loops
async def test_a_caller_that_goes_away_at_once_has_still_said_what_it_said() -> None:
    async with line() as (target, relay):
        async with calling(relay) as caller:
            caller.writer.write(b"last words")
        await until(lambda: target.received == b"last words" and relay.connections == 0)


@on_both_loops
async def test_nobody_there_ends_the_connection() -> None:
    async with Relay("127.0.0.1", addresses.free_port(), round_trip_s=ROUND_TRIP_S) as relay, calling(relay) as caller:
        assert await caller.ended() == b""
        await nobody_on(relay)


@on_both_loops
async def test_a_cut_holds_everything_and_tells_nobody() -> None:
    async with line() as (target, relay), calling(relay) as before:
        assert await before.ask(b"before") == b"before"
        relay.cut()
        before.writer.write(b"held")
        await until(lambda: relay.in_transit_bytes == 4)
        async with calling(relay) as new, calling(relay) as impatient:
            new.writer.write(b"new")
            await until(lambda: relay.in_transit_bytes == 7)
            impatient.writer.close()
            await until(lambda: relay.connections == 3)
            assert (target.connections, target.received) == (1, b"before")
            assert not before.reader.at_eof()
            relay.heal()
            assert await before.reader.readexactly(4) == b"held"
            assert await new.reader.readexactly(3) == b"new"


@on_both_loops
async def test_hanging_up_resets_what_there_is_and_what_comes() -> None:
    async with line() as (target, relay):
        async with calling(relay) as before:
            assert await before.ask(b"before") == b"before"
            relay.hang_up()
            assert await before.ended() == b""
        async with calling(relay) as refused:
            assert await refused.ended() == b""
        assert target.connections == 1
        relay.heal()
        async with calling(relay) as after:
            assert await after.ask(b"after") == b"after"
        await nobody_on(relay)


@on_both_loops
async def test_a_target_that_does_not_read_slows_the_caller_down() -> None:
    most = 1024 * 1024
    sent = random.Random(1).randbytes(16 * most)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wan, "MAX_IN_TRANSIT_BYTES", most)
        await sent_slowly(sent, most)


async def sent_slowly(sent: bytes, most: int) -> None:
    async with line() as (target, relay), calling(relay) as caller:
        target.may_read.clear()
        caller.writer.write(sent)
        await until(lambda: relay.in_transit_bytes > most)
        assert relay.in_transit_bytes < most + 1024 * 1024  # and at most one more read
        assert caller.writer.transport.get_write_buffer_size() > 0
        target.may_read.set()
        assert await caller.reader.readexactly(len(sent)) == sent


@on_both_loops
async def test_leaving_it_ends_what_is_still_open() -> None:
    target = Target()
    async with await asyncio.start_server(target.accept, "127.0.0.1", 0) as server:
        async with Relay(*server.sockets[0].getsockname(), round_trip_s=ROUND_TRIP_S) as relay:
            reader, writer = await asyncio.open_connection(*addresses.split(relay.address))
            caller = Caller(reader, writer)
            assert await caller.ask(b"hello") == b"hello"
        assert await caller.ended() == b""
        assert relay.connections == 0
        writer.close()
        await asyncio.wait(target.tasks)


async def test_as_a_process_it_is_cut_and_healed_by_signals(tmp_path: Path) -> None:
    target, ready_file = Target(), tmp_path / "ready"
    async with await asyncio.start_server(target.accept, "127.0.0.1", 0) as server:
        there = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        argv = ("--listen", "127.0.0.1:0", "--to", there, "--round-trip-ms", "10", "--ready-file", str(ready_file))
        process = await asyncio.create_subprocess_exec(sys.executable, "-P", "-m", "gateway.wan", *argv, stderr=subprocess.PIPE)
        assert process.stderr is not None

        async def told(number: signal.Signals) -> str:
            process.send_signal(number)
            return (await process.stderr.readline()).decode()  # type: ignore[union-attr]

        try:
            await until(lambda: ready_file.exists() and bool(ready_file.read_text()))
            address = addresses.split(ready_file.read_text())
            caller = Caller(*await asyncio.open_connection(*address))
            assert await caller.ask(b"one") == b"one"
            assert "cut, 1 connections" in await told(signal.SIGUSR1)
            caller.writer.write(b"two")
            assert "healed, 1 connections" in await told(signal.SIGUSR2)
            assert await caller.reader.readexactly(3) == b"two"
            assert "hung up" in await told(signal.SIGHUP)
            assert await caller.ended() == b""
            caller.writer.close()
            process.terminate()
            assert await process.wait() == 0
            await asyncio.wait(target.tasks)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--listen here --to 127.0.0.1:1", "'here' is not an address"),
        ("--listen 127.0.0.1:0 --to 127.0.0.1:1 --round-trip-ms -1", "say 0 to 60000"),
        ("--listen 192.0.2.1:1 --to 127.0.0.1:1", "nothing can listen on 192.0.2.1:1"),
        ("--help", "SIGUSR1 cuts it"),
    ],
)
def test_its_command_line_says_what_is_wrong(argv: str, said: str) -> None:
    command = [sys.executable, "-P", "-m", "gateway.wan", *argv.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert said in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0) == (argv == "--help")
