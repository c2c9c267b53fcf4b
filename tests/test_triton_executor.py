"""The Triton executor against a real Triton on the CPU, and its codec alone."""

import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import struct
import subprocess
import time
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway import tensors
from gateway.config import Config, TritonSection
from gateway.errors import Expired, InvalidStep, NearloopError, StepFailed, Unavailable
from gateway.policy import BatchView, ModelView, Named, OnError, Slot
from gateway.testing import ManualClock
from gateway.types import JSON, TENSORS, Kind, Payload, Step, TensorSpec
from workers import triton_aftermath, triton_server
from workers.batching import Batching
from workers.triton import TritonExecutor
from workers.triton_codec import Form, Model, decode, encode, join

MODELS = ("echo", "embed", "tokens", "busy")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Triton:
    """A tritonserver with the four models, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "models"
        self.repository.mkdir()
        for name in MODELS:
            (self.repository / name).symlink_to(triton_server.MODEL_REPOSITORY / name)
        self.backends = triton_server.prepare(folder)
        self.http, self.grpc, self.metrics = free_ports(3)
        self.prefix = f"nltest{os.getpid()}x{self.grpc}"
        self.log = folder / "triton.log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def config(self) -> Config:
        return Config(triton=TritonSection(url=f"127.0.0.1:{self.grpc}"))

    def start(self) -> None:
        argv, env = triton_server.command(self.repository, self.backends, self.http, self.grpc, self.metrics, shm_prefix=self.prefix)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(argv, env=env, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.http}/v2/health/ready", timeout=2).close()
                return
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            assert time.monotonic() < deadline, "Triton did not become ready"
            time.sleep(0.05)

    def kill(self) -> None:
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=20)
        triton_aftermath.remove_shared_memory(self.prefix)


def need_wheel() -> None:
    """Skips where Triton is not installed; whatever is wrong with one that is installed is a failure."""
    if importlib.util.find_spec("pytriton") is None:
        pytest.skip("nvidia-pytriton is not installed")


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    need_wheel()
    server = Triton(tmp_path_factory.mktemp("triton"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
async def executor(triton: Triton) -> AsyncGenerator[TritonExecutor, None]:
    executor = TritonExecutor(triton.config, "home")
    await executor.start()
    yield executor
    await executor.close()


@dataclass
class FakeWork:
    step: Step
    attempt: int = 1
    queue_region: str = "home"
    leaving: bool = False
    left_s: float = 30.0
    tokens: list[Payload] = field(default_factory=list)
    first_token: asyncio.Event = field(default_factory=asyncio.Event)

    def remaining_s(self) -> float:
        return self.left_s

    def emit(self, token: Payload) -> None:
        self.tokens.append(token)
        self.first_token.set()

    def progress(self, fraction: float, message: str) -> None:
        raise AssertionError("a model has no progress")


def work(target: str, body: object, *, content_type: str = JSON, left_s: float = 30.0) -> FakeWork:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    step = Step("step-1", "acme", Kind.INFER, target, Payload(data, content_type), deadline_s=0.0)
    return FakeWork(step, left_s=left_s)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await condition():
            await asyncio.sleep(0.02)


def threads(server: Triton, model: str) -> int:
    """Threads in the process of a Python model: `busy` and `tokens` have one for each request in work."""
    assert server.process is not None
    for status in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = status.read_bytes()
            if server.prefix.encode() in words and f"/{model}/1/model.py".encode() in words:
                return len(list(status.with_name("task").iterdir()))
    raise AssertionError(f"model {model} has no process")


# ---- the real server -----------------------------------------------------------------------------------------------------------


async def test_targets_carry_what_triton_says(executor: TritonExecutor) -> None:
    targets = {target.name: target for target in executor.targets()}
    assert set(targets) == set(MODELS)
    embed = targets["embed"]
    assert embed.tensor_inputs == (TensorSpec("text", "BYTES", (-1, 1)),)
    assert embed.tensor_outputs == (TensorSpec("embedding", "FP32", (-1, 384)),)
    assert embed.max_batch_size == 64
    assert embed.home_region == "home"
    assert embed.idempotent
    assert embed.slots >= 64
    assert "streams tokens" in targets["tokens"].description
    assert all(executor.ready(name) for name in MODELS)
    assert not executor.ready("unknown")


async def test_json_body_goes_in_and_comes_back(executor: TritonExecutor) -> None:
    body = '{"text": "Größe", "n": [1, 2]}'.encode()
    output = await executor.execute(work("echo", body))
    assert output == Payload(body, JSON)


async def test_kserve_json_and_raw_tensors_agree(executor: TritonExecutor) -> None:
    asked = {"inputs": [{"name": "text", "shape": [2, 1], "datatype": "BYTES", "data": [["read a file"], ["sort a list"]]}]}
    answer = json.loads((await executor.execute(work("embed", asked))).data)
    assert answer["model_name"] == "embed"
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("embedding", "FP32", [2, 384])

    texts = np.array([["read a file"], ["sort a list"]], dtype=np.object_)
    raw = await executor.execute(work("embed", tensors.encode({"text": texts}).data, content_type=TENSORS))
    embedding = tensors.decode(raw)["embedding"]
    assert embedding.shape == (2, 384)
    np.testing.assert_allclose(np.array(output["data"]).reshape(2, 384), embedding, rtol=1e-6)


async def test_decoupled_model_streams_tokens_and_ends_with_all(executor: TritonExecutor) -> None:
    asked = work("tokens", {"text": "one two three"})
    output = await executor.execute(asked)
    assert [json.loads(token.data) for token in asked.tokens] == [{"token": "one"}, {"token": "two"}, {"token": "three"}]
    assert json.loads(output.data) == {"tokens": [{"token": "one"}, {"token": "two"}, {"token": "three"}]}


@pytest.mark.parametrize("model", ["tokens", "busy"])
async def test_the_models_refusal_is_the_steps_failure(executor: TritonExecutor, model: str) -> None:
    with pytest.raises(StepFailed) as failure:
        await executor.execute(work(model, {"text": 5, "ms": "x"}))
    assert failure.value.code == "INVALID_ARGUMENT"
    assert failure.value.reason == "MODEL_REFUSED_INPUT"
    assert model in failure.value.message


async def test_a_wrong_shape_is_refused_by_triton(executor: TritonExecutor) -> None:
    asked = {"inputs": [{"name": "text", "shape": [1, 2], "datatype": "BYTES", "data": ["a", "b"]}]}
    with pytest.raises(StepFailed) as failure:
        await executor.execute(work("embed", asked))
    assert failure.value.code == "INVALID_ARGUMENT"


async def test_the_deadline_reaches_triton(executor: TritonExecutor) -> None:
    with pytest.raises(Expired):
        await executor.execute(work("busy", {"ms": 600_000}, left_s=0.2))


@pytest.mark.parametrize(("model", "body"), [("busy", {"ms": 600_000}), ("tokens", {"text": "word " * 1000, "delay_ms": 100})])
async def test_cancelling_reaches_the_model(triton: Triton, executor: TritonExecutor, model: str, body: object) -> None:
    """The model lets go of the request long before its time, which it does only when Triton says that the caller has gone."""

    async def idle() -> bool:
        return threads(triton, model) == idle_threads

    async def at_work() -> bool:
        return threads(triton, model) > idle_threads

    await executor.execute(work(model, {"text": "", "ms": 0}))
    idle_threads = threads(triton, "echo")  # the stub's own: the same in every model
    await eventually(idle)
    asked = work(model, body)
    task = asyncio.create_task(executor.execute(asked))
    await eventually(at_work)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await eventually(idle)
    assert len(asked.tokens) < 1000


async def test_no_address_and_nobody_there_are_unavailable() -> None:
    with pytest.raises(Unavailable, match="no Triton is configured"):
        await TritonExecutor(Config(), "home").start()
    (port,) = free_ports(1)
    executor = TritonExecutor(Config(triton=TritonSection(url=f"127.0.0.1:{port}")), "home")
    with pytest.raises(Unavailable, match="does not answer"):
        await executor.start()
    await executor.close()


async def test_work_goes_back_while_triton_is_down_and_on_when_it_is_back(tmp_path: Path) -> None:
    need_wheel()
    server = Triton(tmp_path)
    for name in ("embed", "tokens"):
        (server.repository / name).unlink()
    server.start()
    try:
        executor = TritonExecutor(server.config, "home")
        await executor.start()
        task = asyncio.create_task(executor.execute(work("busy", {"ms": 600_000})))
        await executor.execute(work("busy", {"ms": 0}))
        await asyncio.to_thread(server.kill)
        with pytest.raises(Unavailable):
            await task

        async def noticed() -> bool:
            return not executor.ready("busy")

        await eventually(noticed)
        with pytest.raises(Unavailable):
            await executor.execute(work("echo", {}))
        assert {target.name for target in executor.targets()} == {"echo", "busy"}
        await asyncio.to_thread(server.start)

        async def ready() -> bool:
            return executor.ready("echo")

        await eventually(ready)
        assert (await executor.execute(work("echo", {"a": 1}))).data == b'{"a": 1}'
        await executor.close()
    finally:
        server.kill()


# ---- the codec -----------------------------------------------------------------------------------------------------------------

BODY_MODEL = Model("echo", (TensorSpec("json", "BYTES", (-1, 1)),))
SUM_MODEL = Model("sum", (TensorSpec("a", "FP32", (-1, 2)), TensorSpec("b", "INT8", (-1,))))


def kserve(name: str, shape: list[int], datatype: str, data: object) -> Payload:
    return Payload(json.dumps({"inputs": [{"name": name, "shape": shape, "datatype": datatype, "data": data}]}).encode())


def answer(*outputs: tuple[str, str, list[int], bytes]) -> object:
    response = service_pb2.ModelInferResponse(model_name="sum")
    for name, datatype, shape, raw in outputs:
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(raw)
    return response


def test_a_body_is_one_bytes_element_with_the_batch_dimension() -> None:
    request, form = encode(BODY_MODEL, Payload(b'{"a":1}', "application/json; charset=utf-8"), "s1")
    assert form is Form.BODY
    assert (request.model_name, request.id) == ("echo", "s1")
    assert [(one.name, one.datatype, list(one.shape)) for one in request.inputs] == [("json", "BYTES", [1, 1])]
    assert list(request.raw_input_contents) == [b'\x07\0\0\0{"a":1}']


def test_raw_tensors_go_through_unchanged() -> None:
    payload = tensors.encode({"a": np.array([[1.5, 2.5]], dtype=np.float32), "b": np.array([7], dtype=np.int8)})
    request, form = encode(SUM_MODEL, payload, "s1")
    assert list(request.raw_input_contents) == [np.array([1.5, 2.5], "<f4").tobytes(), b"\x07"]
    pairs = zip(request.inputs, request.raw_input_contents, strict=True)
    echoed = answer(*((one.name, one.datatype, list(one.shape), raw) for one, raw in pairs))
    assert decode(echoed, form) == payload


@pytest.mark.parametrize(
    ("datatype", "data", "raw"),
    [
        ("FP32", [[1, 2.5]], np.array([1, 2.5], "<f4").tobytes()),
        ("INT64", [[1, -2]], np.array([1, -2], "<i8").tobytes()),
        ("UINT64", [2**64 - 1, 0], np.array([2**64 - 1, 0], "<u8").tobytes()),
        ("BOOL", [True, False], b"\x01\x00"),
        ("BYTES", ["é", ""], b"\x02\0\0\0\xc3\xa9\0\0\0\0"),
    ],
)
def test_kserve_json_becomes_raw_tensors_and_back(datatype: str, data: list[object], raw: bytes) -> None:
    request, form = encode(SUM_MODEL, kserve("a", [1, 2], datatype, data), "s1")
    assert list(request.raw_input_contents) == [raw]
    (output,) = json.loads(decode(answer(("a", datatype, [1, 2], raw)), form).data)["outputs"]
    flat = data[0] if isinstance(data[0], list) else data
    assert output == {"name": "a", "datatype": datatype, "shape": [1, 2], "data": flat}


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (Payload(b"{}", "text/plain"), "input"),
        (Payload(b"not json"), "input"),
        (Payload(b'{"inputs": 5}'), "input"),
        (Payload(b'{"inputs": [{"name": "a"}]}'), "input"),
        (Payload(b"\xff\xff", TENSORS), "input"),
        (kserve("a", [1, 3], "FP32", [1, 2]), "input.inputs.0.data"),
        (kserve("a", [-1], "FP32", [1]), "input.inputs.0.shape"),
        (kserve("a", [1], "INT8", [128]), "input.inputs.0.data"),
        (kserve("a", [1], "INT8", [True]), "input.inputs.0.data"),
        (kserve("a", [1], "FP16", [1e6]), "input.inputs.0.data"),
        (kserve("a", [1], "BYTES", [5]), "input.inputs.0.data"),
        (kserve("a", [1], "FP8", [5]), "input.inputs.0.datatype"),
    ],
)
def test_wrong_input_names_the_field(payload: Payload, field: str) -> None:
    with pytest.raises(InvalidStep) as failure:
        encode(SUM_MODEL, payload, "s1")
    assert failure.value.fields[0][0] == field


@pytest.mark.parametrize(
    "response", [answer(("a", "FP32", [1], struct.pack("<f", float("nan")))), answer(("a", "BYTES", [1], b"\x01\0\0\0\xff"))]
)
def test_an_output_that_json_cannot_hold_says_what_to_do(response: object) -> None:
    with pytest.raises(StepFailed, match=TENSORS):
        decode(response, Form.KSERVE)
    assert decode(response, Form.TENSORS).content_type == TENSORS


def test_tokens_are_joined_in_order() -> None:
    assert json.loads(join([Payload(b"1"), Payload(b'{"a":2}')], Form.BODY).data) == {"tokens": [1, {"a": 2}]}
    parts = [tensors.encode({name: np.array([1], dtype=np.int8)}) for name in ("x", "y")]
    assert list(tensors.decode(join(parts, Form.TENSORS))) == ["x", "y"]


# ---- what Triton is told and what its statuses mean ----------------------------------------------------------------------------


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """One model `m` that takes JSON; answers an inference with `status`, or with its input."""

    def __init__(self) -> None:
        self.metadata: dict[str, str] = {}
        self.status: tuple[grpc.StatusCode, str] | None = None
        self.up = True
        self.asked = 0
        self.hold: asyncio.Event | None = None
        self.holding = asyncio.Event()
        self.max_batch_size = 0
        self.has_batcher = True

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self.up)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        index = service_pb2.RepositoryIndexResponse()
        for name, version in (("m", "9"), ("m", "10"), ("not an id", "1")):
            index.models.add(name=name, version=version, state="READY")
        return index

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        answer = service_pb2.ModelMetadataResponse(name=request.name)
        answer.inputs.add(name="json", datatype="BYTES", shape=[1])
        return answer

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        answer = service_pb2.ModelConfigResponse()
        answer.config.max_batch_size = self.max_batch_size
        if self.has_batcher:
            answer.config.dynamic_batching.SetInParent()
        return answer

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        self.metadata = {key: value for key, value in context.invocation_metadata() if isinstance(value, str)}
        self.asked += 1
        if self.hold is not None:
            self.holding.set()
            await self.hold.wait()
        if self.status is not None:
            await context.abort(*self.status)
        return answer(("json", "BYTES", [1], request.raw_input_contents[0]))


@pytest.fixture
async def fake() -> AsyncGenerator[tuple[FakeTriton, TritonExecutor], None]:
    fake, server = FakeTriton(), grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    executor = TritonExecutor(Config(triton=TritonSection(url=f"127.0.0.1:{port}")), "home")
    await executor.start()
    yield fake, executor
    await executor.close()
    await server.stop(None)


async def test_trace_context_goes_on_and_names_that_are_no_ids_stay_out(fake: tuple[FakeTriton, TritonExecutor]) -> None:
    triton, executor = fake
    assert [target.name for target in executor.targets()] == ["m"]
    asked = work("m", {})
    asked.step = replace(asked.step, traceparent="00-aa-bb-01", tracestate="v=1")
    assert (await executor.execute(asked)).data == b"{}"
    assert (triton.metadata["traceparent"], triton.metadata["tracestate"]) == ("00-aa-bb-01", "v=1")


@pytest.mark.parametrize(
    ("status", "details", "raises", "code"),
    [
        (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size", Unavailable, "UNAVAILABLE"),
        (grpc.StatusCode.NOT_FOUND, "unknown model", Unavailable, "UNAVAILABLE"),
        (grpc.StatusCode.INTERNAL, "Stub process 'm' is not healthy", Unavailable, "UNAVAILABLE"),
        (grpc.StatusCode.INVALID_ARGUMENT, "text: missing", StepFailed, "INVALID_ARGUMENT"),
        (grpc.StatusCode.INTERNAL, "division by zero", StepFailed, "INTERNAL"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", Expired, "DEADLINE_EXCEEDED"),
    ],
)
async def test_each_status_of_triton_has_its_meaning(
    fake: tuple[FakeTriton, TritonExecutor],
    status: grpc.StatusCode,
    details: str,
    raises: type[NearloopError],
    code: str,
) -> None:
    triton, executor = fake
    triton.status = (status, details)
    with pytest.raises(raises) as failure:
        await executor.execute(work("m", {}))
    assert failure.value.code == code
    assert executor.ready("m") is ("Stub process" not in details)  # the server itself is there


LOST = (grpc.StatusCode.INTERNAL, "Failed to process the request(s) for model 'm_0_0', message: Stub process 'm_0_0' is not healthy.")


async def test_a_model_without_a_process_is_tried_by_one_step_now_and_then(fake: tuple[FakeTriton, TritonExecutor]) -> None:
    triton, executor = fake
    executor.replicas[0].clock = clock = ManualClock()
    triton.status = LOST
    for pause_s in (1.0, 2.0, 4.0):
        with pytest.raises(Unavailable, match="has lost its process"):
            await executor.execute(work("m", {}))
        asked = triton.asked
        assert not executor.ready("m")
        with pytest.raises(Unavailable):
            await executor.execute(work("m", {}))
        assert triton.asked == asked, "Triton is left alone meanwhile"
        clock.advance(pause_s)
        assert executor.ready("m")
    triton.status, triton.hold = None, asyncio.Event()
    trying = asyncio.create_task(executor.execute(work("m", {})))
    await triton.holding.wait()
    assert not executor.ready("m")
    with pytest.raises(Unavailable):
        await executor.execute(work("m", {}))
    triton.hold.set()
    assert (await trying).data == b"{}"
    assert executor.ready("m")
    assert (await executor.execute(work("m", {}))).data == b"{}"


@pytest.mark.parametrize("ends", ["refused", "cancelled", "server"])
async def test_how_else_a_try_or_a_pause_ends(fake: tuple[FakeTriton, TritonExecutor], ends: str) -> None:
    triton, executor = fake
    executor.replicas[0].clock = clock = ManualClock()
    triton.status = LOST
    with pytest.raises(Unavailable):
        await executor.execute(work("m", {}))
    if ends == "server":  # one that was away has started all its processes
        triton.up = False
        with pytest.raises(Unavailable):
            await executor.replicas[0].refresh()
        triton.up = True
        await executor.replicas[0].refresh()
        assert executor.ready("m")
        return
    clock.advance(1.0)
    if ends == "refused":  # the model itself said so: it has a process
        triton.status = (grpc.StatusCode.INVALID_ARGUMENT, "text: missing")
        with pytest.raises(StepFailed):
            await executor.execute(work("m", {}))
        assert not executor.replicas[0].lost
    else:  # nothing was found out: the next step tries
        triton.status, triton.hold = None, asyncio.Event()
        trying = asyncio.create_task(executor.execute(work("m", {})))
        await triton.holding.wait()
        trying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await trying
        assert executor.replicas[0].lost
    assert executor.ready("m")


class Pairs:
    """A batching policy: two at a time."""

    def __init__(self) -> None:
        self.views: list[BatchView] = []
        self.sizes: list[int] = []

    def serves(self, model: ModelView) -> bool:
        return True

    def learnt(self) -> None:
        return None

    def wait_s(self, view: BatchView, now_s: float) -> float:
        self.views.append(view)
        return 0.0 if view.size == 2 else 60.0

    def on_batch(self, size: int, service_s: float, now_s: float) -> None:
        self.sizes.append(size)


async def test_the_batching_policy_decides_when_steps_go(fake: tuple[FakeTriton, TritonExecutor]) -> None:
    triton, executor = fake
    policy = Pairs()
    executor._batching = Batching(lambda: [Named("pairs", Slot.BATCHING, policy, OnError.ADMIT)], lambda target: 5)
    triton.max_batch_size = 4
    executor.replicas[0].served = {}
    await executor.replicas[0].refresh()
    first, cancelled = (asyncio.create_task(executor.execute(work("m", {"n": n}))) for n in (1, 0))
    cancelled.cancel()  # before it even came
    with pytest.raises(asyncio.CancelledError):
        await cancelled
    assert (triton.asked, len(policy.views)) == (0, 1)
    second = executor.execute(work("m", {"n": 2}))
    assert [json.loads(output.data) for output in await asyncio.gather(first, second)] == [{"n": 1}, {"n": 2}]
    assert triton.asked == 2
    assert [(view.size, view.max_size, view.idle_slots) for view in policy.views] == [(1, 4, 4), (2, 4, 3)]
    assert policy.sizes == [2]


async def test_a_step_that_cannot_be_encoded_enters_no_batch(fake: tuple[FakeTriton, TritonExecutor]) -> None:
    _, executor = fake
    policy = Pairs()
    executor._batching = Batching(lambda: [Named("pairs", Slot.BATCHING, policy, OnError.ADMIT)], lambda target: 5)
    with pytest.raises(InvalidStep):
        await executor.execute(work("m", b"{}", content_type="text/plain"))
    assert policy.views == []
