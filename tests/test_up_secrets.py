"""What a stack keeps from other users of the machine: its files, and its queues."""

import asyncio
import json
import os
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import urlopen

import nats
import psutil
import pytest
from test_up import configuration

from gateway import parts
from gateway.supervisor import PartFailed
from gateway.up import Stack

pytestmark = pytest.mark.stack


def mode_of(path: Path) -> str:
    return f"{path.stat().st_mode & 0o777:03o}"


async def test_secrets_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    """Whatever an existing state directory allows, and whatever is in it already."""
    for name in ("nats", "logs"):
        (tmp_path / name).mkdir(mode=0o755)
    for name in ("nearloop.toml", "nats.conf", "addresses.json", "nats.url"):
        (tmp_path / name).touch(mode=0o644)
    tmp_path.chmod(0o755)
    lines: list[str] = []
    async with Stack(configuration(), state_dir=tmp_path, on_line=lines.append, triton=False) as stack:
        files = {path.name for path in tmp_path.iterdir() if path.is_file()}
        assert files == {"addresses.json", "lock", "nats.conf", "nats.url", "nearloop.toml"}
        assert {name: mode_of(tmp_path / name) for name in files} == dict.fromkeys(files, "600")
        assert {name: mode_of(tmp_path / name) for name in ("nats", "logs")} == {"nats": "700", "logs": "700"}
        assert (tmp_path / "nats.url").read_text() == f"{stack.nats_url}\n"
        token = urlsplit(stack.nats_url).username or ""
        assert len(token) >= 32
        arguments = [word for name in stack.part_names for word in psutil.Process(stack.part(name).pid).cmdline()]
    told = lines + arguments + [path.read_text() for path in (tmp_path / "logs").iterdir()]
    assert not [text for text in told if token in text]


async def test_a_state_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    if os.getuid() == 0:
        os.chown(tmp_path, 12345, -1)
    theirs = tmp_path if os.getuid() == 0 else Path("/")
    with pytest.raises(PartFailed, match=f"^the state directory {theirs} belongs to another user: name another --state-dir$"):
        await Stack(configuration(), state_dir=theirs, triton=False).__aenter__()
    assert not list(tmp_path.iterdir())


async def test_only_who_knows_the_token_gets_to_the_queues() -> None:
    async with Stack(configuration(), triton=False, workers=[]) as stack:
        document = json.loads((stack.state_dir / "addresses.json").read_text())
        port = urlsplit(stack.nats_url).port or 0
        for told in ({}, {"auth_token": "x" * 48}, {"user": urlsplit(stack.nats_url).username}):
            assert b"Authorization Violation" in await greeted(port, told)
        assert b"PONG" in await greeted(port, {"auth_token": urlsplit(stack.nats_url).username})
        client = await nats.connect(stack.nats_url, allow_reconnect=False)
        assert {"NL_RESULTS", "NL_STEPS_HOME"} <= {info.config.name for info in await client.jetstream().streams_info()}
        await client.close()
        watching = await asyncio.to_thread(lambda: urlopen(f"{document['nats_monitoring']}/connz?auth=1", timeout=5).read().decode())
        assert (urlsplit(stack.nats_url).username or "?") not in watching
        first = stack.nats_url
    async with Stack(configuration(), triton=False, workers=[]) as stack:
        assert urlsplit(stack.nats_url).username != urlsplit(first).username


async def greeted(port: int, told: dict[str, object]) -> bytes:
    """What a nats-server answers to the first words of a client."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        assert (await reader.readline()).startswith(b"INFO ")
        writer.write(f"CONNECT {json.dumps({'verbose': False} | told)}\r\nPING\r\n".encode())
        return await asyncio.wait_for(reader.readline(), 10)
    finally:
        writer.close()
        await writer.wait_closed()


async def test_a_password_is_not_told_when_something_else_answers() -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"220 mail.example.com\r\n")
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PartFailed, match=f"nats://127.0.0.1:{port} is no NATS server") as caught:
            await parts.check_existing_nats((f"nats://me:secret@127.0.0.1:{port}",))
    assert "secret" not in str(caught.value)
