"""The demo's external API, over real HTTP; the command once as a process."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from aiohttp.test_utils import TestClient, TestServer

from gateway.demo.corpus import Entry
from gateway.demo.docs_api import Ledger, make_app

COPYTREE = Entry("shutil.copytree", "function", "shutil", "(src, dst)", "Copy a tree.", "Copy a tree.\n\nAll of it.")
Client = TestClient[aiohttp.web.Request, aiohttp.web.Application]


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with TestClient(TestServer(make_app([COPYTREE], Ledger(tmp_path / "ledger")))) as client:
        yield client


async def test_a_known_name_gives_its_documentation(client: Client) -> None:
    async with client.get("/v1/names/shutil.copytree") as answer:
        assert answer.status == 200
        assert await answer.json() == {
            "name": "shutil.copytree",
            "kind": "function",
            "module": "shutil",
            "signature": "(src, dst)",
            "doc": "Copy a tree.\n\nAll of it.",
        }


@pytest.mark.parametrize("name", ["shutil.nope", "%2e%2e%2fetc", "a%00b"])
async def test_an_unknown_name_is_a_404_with_a_json_error(client: Client, name: str) -> None:
    async with client.get(f"/v1/names/{name}") as answer:
        assert answer.status == 404
        assert "error" in await answer.json()


async def test_health(client: Client) -> None:
    async with client.get("/healthz") as answer:
        assert await answer.json() == {"status": "ok", "names": 1}


async def test_the_ledger_counts_calls_and_distinct_keys(client: Client) -> None:
    for key, calls in (("a", 1), ("b", 1), ("a", 2)):
        async with client.post("/v1/ledger", headers={"Idempotency-Key": key}) as answer:
            assert await answer.json() == {"key": key, "calls": calls}
    async with client.get("/v1/ledger") as answer:
        assert await answer.json() == {"keys": 2, "calls": 3, "repeated": {"a": 2}}


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "x" * 201}])
async def test_the_ledger_refuses_a_call_without_a_usable_key(client: Client, headers: dict[str, str]) -> None:
    async with client.post("/v1/ledger", headers=headers) as answer:
        assert answer.status == 400
        assert "Idempotency-Key" in (await answer.json())["error"]
    async with client.get("/v1/ledger") as answer:
        assert (await answer.json())["calls"] == 0


def test_a_ledger_file_outlives_the_ledger(tmp_path: Path) -> None:
    first = Ledger(tmp_path / "ledger")
    first.record("a")
    first.close()
    second = Ledger(tmp_path / "ledger")
    assert second.record("a") == 2
    second.close()


async def test_the_command_writes_its_port_and_ends_cleanly_on_sigterm(tmp_path: Path) -> None:
    port_file = tmp_path / "port"
    argv = [sys.executable, "-P", "-m", "gateway.demo.docs_api", "--port", "0", "--port-file", str(port_file)]
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        printed = (await process.stdout.readline()).decode()  # comes when the service is ready
        assert port_file.read_text() == printed
        url = f"http://127.0.0.1:{int(printed)}/v1/names/shutil.copytree"
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            assert (await answer.json())["module"] == "shutil"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
