"""The wheel's Triton, booted once on free ports with every model of the repository."""

import asyncio
import importlib.util
import json
import os
import select
import signal
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
import tritonclient.grpc.aio as triton
from tritonclient.utils import InferenceServerException

from workers.lexical import DIMENSIONS, embed
from workers.triton_aftermath import LostProcess, StubWatch, end_stubs, explain_failure, remove_shared_memory
from workers.triton_server import MODEL_REPOSITORY, command, prepare

needs_wheel = pytest.mark.skipif(importlib.util.find_spec("pytriton") is None, reason="nvidia-pytriton is not installed")
READY_S = 60


@dataclass
class Server:
    process: subprocess.Popen[bytes]
    http_port: int
    grpc_port: int
    metrics_port: int
    prefix: str

    async def until_ready(self) -> None:
        async with asyncio.timeout(READY_S), aiohttp.ClientSession() as session:
            while True:
                assert self.process.poll() is None, "Triton ended"
                try:
                    async with session.get(f"http://127.0.0.1:{self.http_port}/v2/health/ready") as answer:
                        if answer.status == 200:
                            return
                except aiohttp.ClientConnectionError:
                    pass
                await asyncio.sleep(0.05)  # a poll of another process, bounded by READY_S


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def start(repository: Path, folder: Path, ports: list[int]) -> Server:
    prefix = f"nlboot{uuid.uuid4().hex[:8]}"
    argv, env = command(repository, prepare(folder), *ports, shm_prefix=prefix)
    with (folder / "triton.log").open("wb") as log:
        process = subprocess.Popen(argv, env=env, stdout=log, stderr=log)
    return Server(process, *ports, prefix)


def stop(server: Server) -> None:
    server.process.kill()
    server.process.wait()
    end_stubs(server.prefix)
    remove_shared_memory(server.prefix)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start(MODEL_REPOSITORY, tmp_path_factory.mktemp("triton"), free_ports(3))
    try:
        asyncio.run(server.until_ready())
        yield server
    finally:
        stop(server)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[Any]:
    async with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
        yield client


def strings(name: str, values: list[bytes], *shape: int) -> list[Any]:
    tensor = triton.InferInput(name, list(shape), "BYTES")
    tensor.set_data_from_numpy(np.array(values, dtype=np.object_).reshape(shape))
    return [tensor]


def body(value: object, *shape: int) -> list[Any]:
    return strings("json", [json.dumps(value).encode()], *shape)


async def one_stream(model: str, inputs: list[Any]) -> AsyncIterator[dict[str, Any]]:
    yield {"model_name": model, "inputs": inputs, "enable_empty_final_response": True}


def is_final(result: Any) -> bool:
    return bool(result.get_response().parameters["triton_final_response"].bool_param)


@needs_wheel
@pytest.mark.stack
class TestServer:
    async def test_embed(self, client: Any) -> None:
        texts = ["copy a directory tree", "open a socket"]
        result = await client.infer("embed", strings("text", [text.encode() for text in texts], 2, 1))
        assert result.as_numpy("embedding").shape == (2, DIMENSIONS)
        np.testing.assert_allclose(result.as_numpy("embedding"), embed(texts), atol=1e-6)

    async def test_plan(self, client: Any) -> None:
        asked = {"question": "how do I copy a directory tree?", "observations": [], "max_iterations": 6}
        result = await client.infer("plan", body(asked, 1, 1))
        assert json.loads(result.as_numpy("json")[0, 0])["query"] == "copy directory tree"

    async def test_judge(self, client: Any) -> None:
        asked = {"question": "how do I copy a tree?", "name": "shutil.copytree", "evidence": "Copy a directory tree."}
        result = await client.infer("judge", body(asked, 1, 1))
        assert json.loads(result.as_numpy("json")[0, 0])["sufficient"] is True

    async def test_echo_in_a_batch(self, client: Any) -> None:
        rows = [b'{"n": 1}', '{"ä": 2}'.encode()]
        result = await client.infer("echo", strings("json", rows, 2, 1))
        assert result.as_numpy("json").reshape(-1).tolist() == rows

    @pytest.mark.parametrize("model", ["plan", "judge"])
    async def test_wrong_input_names_the_field(self, client: Any, model: str) -> None:
        with pytest.raises(InferenceServerException, match="question: missing") as caught:
            await client.infer(model, body({}, 1, 1))
        assert "INVALID_ARGUMENT" in caught.value.status()

    @pytest.mark.parametrize("wrong", [{}, {"ms": "x"}, {"ms": -1}, [1]])
    async def test_busy_refuses_wrong_input(self, client: Any, wrong: object) -> None:
        with pytest.raises(InferenceServerException, match=r"ms: |json: "):
            await client.infer("busy", body(wrong, 1))

    async def test_busy_holds_many_at_once(self, client: Any) -> None:
        results = await asyncio.gather(*(client.infer("busy", body({"ms": 50}, 1)) for _ in range(8)))
        assert {result.as_numpy("json")[0] for result in results} == {b'{"ms":50,"cancelled":false}'}

    async def test_tokens_stream_word_by_word(self, client: Any) -> None:
        words = []
        stream = client.stream_infer(one_stream("tokens", body({"text": "to be or", "delay_ms": 1}, 1)))
        async for result, error in stream:
            assert error is None
            if is_final(result):
                break
            words.append(json.loads(result.as_numpy("json")[0])["token"])
        assert words == ["to", "be", "or"]

    async def test_tokens_name_the_missing_field(self, client: Any) -> None:
        async for _, error in client.stream_infer(one_stream("tokens", body({}, 1))):
            assert "text: missing" in str(error)
            break

    async def test_cancelling_ends_the_work(self, client: Any, server: Server) -> None:
        before = await self.inferences(client)
        call = asyncio.ensure_future(client.infer("busy", body({"ms": 600_000}, 1)))
        quick = await client.infer("busy", body({"ms": 20}, 1))  # by then the other one is held as well
        assert quick.as_numpy("json")[0] == b'{"ms":20,"cancelled":false}'
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(20):  # far below the ten minutes that it would hold
            while await self.inferences(client) < before + 2:
                await asyncio.sleep(0.02)

    async def inferences(self, client: Any) -> int:
        statistics = await client.get_inference_statistics("busy", as_json=True)
        counted = statistics["model_stats"][0]["inference_stats"]
        return sum(int(counted.get(kind, {}).get("count", 0)) for kind in ("success", "fail", "cancel"))

    async def test_all_ports_listen_on_the_loopback_address_only(self, server: Server) -> None:
        for port in (server.http_port, server.grpc_port, server.metrics_port):
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
            # a server on all interfaces would answer here as well
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.2", port), timeout=5).close()


@needs_wheel
@pytest.mark.stack
async def test_a_killed_server_leaves_nothing_behind(tmp_path: Path) -> None:
    server = start(MODEL_REPOSITORY, tmp_path, free_ports(3))
    try:
        await server.until_ready()
        async with triton.InferenceServerClient(f"127.0.0.1:{server.grpc_port}") as client:
            held = asyncio.ensure_future(client.infer("busy", body({"ms": 600_000}, 1)))
            await client.infer("busy", body({"ms": 20}, 1))
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            with pytest.raises(InferenceServerException):
                await held
    finally:
        stop(server)
    assert not [name for name in os.listdir("/dev/shm") if server.prefix in name]
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            assert server.prefix.encode() not in (folder / "cmdline").read_bytes()
        except OSError:
            continue


@needs_wheel
@pytest.mark.stack
async def test_a_killed_model_process_is_noticed_at_the_second_look(tmp_path: Path) -> None:
    server = start(MODEL_REPOSITORY, tmp_path, free_ports(3))
    try:
        await server.until_ready()
        watch, late = StubWatch(), StubWatch()
        pid = server.process.pid
        assert [watch.ailment(pid) for _ in range(3)] == ["", "", ""]
        with os.scandir("/proc") as folders:
            commands = {int(one.name): Path(one.path, "cmdline") for one in folders if one.name.isdecimal()}
        (stub,) = [number for number, path in commands.items() if is_stub_of(path, server.prefix, "echo_0_0")]
        exited = os.pidfd_open(stub)
        os.kill(stub, signal.SIGKILL)
        assert select.select([exited], [], [], 20)[0]  # readable when it has ended
        os.close(exited)
        assert watch.ailment(pid) == ""
        assert watch.ailment(pid) == "the process of model instance echo_0_0 has died"
        assert late.ailment(pid) == ""  # one that never saw it alive knows it by the name that a zombie keeps
        assert f"process id {stub}" in late.ailment(pid)
        assert watch.ailment(os.getpid()) == ""  # another process, another story: this one has no model processes
    finally:
        stop(server)


def is_stub_of(cmdline: Path, prefix: str, instance: str) -> bool:
    try:
        line = cmdline.read_bytes()
    except OSError:
        return False
    return prefix.encode() in line and instance.encode() in line


@needs_wheel
@pytest.mark.stack
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("import nope_nope", "No module named 'nope_nope'"),
        ("class TritonPythonModel:\n  def initialize(self, args): raise ValueError('no weights')", "no weights"),
    ],
)
def test_a_model_that_does_not_load_is_named_with_its_reason(tmp_path: Path, model: str, said: str) -> None:
    folder = tmp_path / "models" / "broken"
    (folder / "1").mkdir(parents=True)
    config = (MODEL_REPOSITORY / "echo" / "config.pbtxt").read_text()
    (folder / "config.pbtxt").write_text(config.replace('"echo"', '"broken"'))
    (folder / "1" / "model.py").write_text(model)
    assert_fails(tmp_path, free_ports(3), "'broken'", said)


@needs_wheel
@pytest.mark.stack
def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "models").mkdir()
        assert_fails(tmp_path, [*free_ports(1), port, *free_ports(1)], f"port {port}", "in use")


def assert_fails(folder: Path, ports: list[int], *said: str) -> None:
    server = start(folder / "models", folder, ports)
    try:
        assert server.process.wait(READY_S) != 0
    finally:
        stop(server)
    sentence = explain_failure((folder / "triton.log").read_text())
    assert "\n" not in sentence
    for words in said:
        assert words in sentence


def test_a_lost_process_is_tried_by_one_step_at_a_time_and_ever_more_rarely() -> None:
    lost, now_s, pauses = LostProcess(), 1000.0, []
    lost.failed(now_s, 1.0)
    lost.failed(now_s + 0.5, 1.0)  # a step that was in work as well: the pause stays as it is
    assert lost.may_try(now_s + 1.0)
    for _ in range(7):
        begun_s = now_s
        while not lost.may_try(now_s):
            now_s += 0.25
        pauses.append(now_s - begun_s)
        with lost.trying():
            assert not lost.may_try(now_s + 1000.0)
            lost.failed(now_s, 1.0)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    lost.failed(now_s, 0.0)
    assert not lost.may_try(now_s + 22.25)
    assert lost.may_try(now_s + 30.0)
