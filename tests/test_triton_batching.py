"""The worker as the batcher of models that have none: against a fake Triton that can be wrong in every way, and against a real one."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from test_triton_executor import Triton, need_wheel, work
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway import tensors
from gateway.config import Config, TritonSection
from gateway.errors import Expired, StepFailed, Unavailable
from gateway.policy import BatchView, ModelView, Named, OnError, Slot
from gateway.types import TENSORS, BatchCost, Payload
from plugins.marginal import Marginal, MarginalConfig
from workers.batching import Batching
from workers.triton import TritonExecutor
from workers.triton_server import MODEL_REPOSITORY

BAD = b'"bad"'


class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """One model `m` with batches of up to 4 rows that answers with its input, and refuses what holds BAD."""

    def __init__(self) -> None:
        self.config = service_pb2.model__config__pb2.ModelConfig(max_batch_size=4)
        self.batches: list[list[bytes]] = []
        self.traces: list[str] = []
        self.seconds_left: list[float] = []
        self.code = grpc.StatusCode.INVALID_ARGUMENT
        self.refuses_all = False
        self.loses_rows = False
        self.hold: asyncio.Event | None = None
        self.running = self.most_running = 0
        self.gone = 0

    async def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=True)

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:
        index = service_pb2.RepositoryIndexResponse()
        index.models.add(name="m", version="1", state="READY")
        return index

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        answer = service_pb2.ModelMetadataResponse(name=request.name)
        answer.inputs.add(name="json", datatype="BYTES", shape=[-1, 1])
        return answer

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=self.config)

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        rows = tensors.unpack_bytes(request.raw_input_contents[0])
        self.batches.append(rows)
        self.traces.append(dict(context.invocation_metadata()).get("traceparent", ""))
        self.seconds_left.append(context.time_remaining())
        self.running += 1
        self.most_running = max(self.running, self.most_running)
        try:
            if self.hold is not None:
                await self.hold.wait()
        except asyncio.CancelledError:
            self.gone += 1
            raise
        finally:
            self.running -= 1
        if BAD in rows or self.refuses_all:
            await context.abort(self.code, "no")
        response = service_pb2.ModelInferResponse(model_name="m")
        if self.loses_rows:
            rows = rows[:1]
        response.outputs.add(name="json", datatype="BYTES", shape=[len(rows), 1])
        response.raw_output_contents.append(tensors.pack_bytes(rows))
        return response


class Full:
    """A batching policy: sends when there are `size` rows."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.views: list[BatchView] = []
        self.sizes: list[int] = []
        self.model: ModelView | None = None

    def serves(self, model: ModelView) -> bool:
        self.model = model
        return True

    def learnt(self) -> BatchCost | None:
        return None

    def wait_s(self, view: BatchView, now_s: float) -> float:
        self.views.append(view)
        return 0.0 if view.size >= self.size else 60.0

    def on_batch(self, size: int, service_s: float, now_s: float) -> None:
        self.sizes.append(size)


class Rig:
    def __init__(self, triton: FakeTriton, executor: TritonExecutor, policy: Full) -> None:
        self.triton = triton
        self.executor = executor
        self.policy = policy

    def step(self, body: object, left_s: float = 30.0, trace: str = "") -> "asyncio.Task[Payload]":
        asked = work("m", body, left_s=left_s)
        asked.step = replace(asked.step, traceparent=trace)
        return asyncio.create_task(self.executor.execute(asked))

    def steps(self, *bodies: object) -> list["asyncio.Task[Payload]"]:
        return [self.step(body) for body in bodies]

    async def reload(self) -> None:
        """The model was loaded again, with another configuration."""
        self.executor.replicas[0].served = {}
        await self.executor.replicas[0].refresh()

    async def until_asked(self, times: int) -> None:
        async with asyncio.timeout(20):
            while len(self.triton.batches) < times or (self.triton.hold is not None and not self.triton.running):
                await asyncio.sleep(0.005)  # a look at another task, bounded


@pytest.fixture
async def rig() -> AsyncGenerator[Rig, None]:
    fake, server = FakeTriton(), grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    policy = Full(1)
    batching = Batching(lambda: [Named("full", Slot.BATCHING, policy, OnError.ADMIT)], lambda target: target.slots)
    executor = TritonExecutor(Config(triton=TritonSection(url=f"127.0.0.1:{port}")), "home", batching=batching)
    await executor.start()
    yield Rig(fake, executor, policy)
    await executor.close()
    await server.stop(None)


def numbers(outputs: list[Payload]) -> list[object]:
    return [json.loads(output.data) for output in outputs]


async def test_steps_become_one_request_and_each_gets_its_own_answer(rig: Rig) -> None:
    rig.policy.size = 3
    tasks = [rig.step({"n": 1}, left_s=5.0, trace="00-aa-bb-01"), *rig.steps({"n": 2}, {"n": 3})]
    assert numbers(await asyncio.gather(*tasks)) == [{"n": 1}, {"n": 2}, {"n": 3}]
    assert rig.triton.batches == [[b'{"n": 1}', b'{"n": 2}', b'{"n": 3}']]
    assert rig.triton.traces == ["00-aa-bb-01"]
    assert rig.triton.seconds_left[0] > 6.0, "the time of the step that has the most"
    assert rig.policy.sizes == [3]
    assert rig.policy.model == ModelView("m", 4, server_batches=False, instances=1)


async def test_no_more_executions_than_instances(rig: Rig) -> None:
    rig.triton.config.instance_group.add(count=2)
    await rig.reload()
    rig.triton.hold = asyncio.Event()
    tasks = rig.steps(*range(9))
    await rig.until_asked(2)
    assert [len(batch) for batch in rig.triton.batches] == [1, 1]
    rig.triton.hold.set()
    assert numbers(await asyncio.gather(*tasks)) == list(range(9))
    assert rig.triton.most_running == 2
    assert sorted(len(batch) for batch in rig.triton.batches) == [1, 1, 3, 4]


async def test_rows_of_a_step_stay_together(rig: Rig) -> None:
    rig.policy.size = 3
    rows = np.array([[b"1"], [b"2"]], dtype=np.object_)
    asked = work("m", tensors.encode({"json": rows}).data, content_type=TENSORS)
    two, one = asyncio.create_task(rig.executor.execute(asked)), rig.step(3)
    assert tensors.decode(await two)["json"].tolist() == [[b"1"], [b"2"]]
    assert (await one).data == b"3"
    assert rig.triton.batches == [[b"1", b"2", b"3"]]


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL])
async def test_one_bad_input_does_not_fail_its_neighbours(rig: Rig, code: grpc.StatusCode) -> None:
    rig.policy.size = 3
    rig.triton.code = code
    tasks = rig.steps(1, "bad", 3)
    one, bad, three = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(one, Payload)
    assert isinstance(three, Payload)
    assert numbers([one, three]) == [1, 3]
    assert isinstance(bad, StepFailed)
    assert bad.code == code.name
    assert [len(batch) for batch in rig.triton.batches] == [3, 1, 2, 1, 1]
    assert rig.policy.sizes == [], "neither time is one of a batch of that size"


async def test_a_triton_that_is_away_sends_all_steps_back_at_once(rig: Rig) -> None:
    rig.policy.size = 2
    rig.triton.refuses_all, rig.triton.code = True, grpc.StatusCode.UNAVAILABLE
    for outcome in await asyncio.gather(*rig.steps(1, 2), return_exceptions=True):
        assert isinstance(outcome, Unavailable)
    assert len(rig.triton.batches) == 1


async def test_an_answer_that_has_lost_rows_is_asked_for_again_one_by_one(rig: Rig) -> None:
    rig.policy.size = 2
    rig.triton.loses_rows = True
    assert numbers(await asyncio.gather(*rig.steps(1, 2))) == [1, 2]
    assert [len(batch) for batch in rig.triton.batches] == [2, 1, 1]


async def test_cancelling_one_step_leaves_the_others_and_cancelling_all_reaches_triton(rig: Rig) -> None:
    rig.triton.hold = asyncio.Event()
    rig.policy.size = 2
    first, second = rig.steps(1, 2)
    await rig.until_asked(1)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    rig.triton.hold.set()
    assert (await second).data == b"2"
    assert rig.triton.gone == 0

    rig.triton.hold = asyncio.Event()
    tasks = rig.steps(3, 4)
    await rig.until_asked(2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    async with asyncio.timeout(20):
        while not rig.triton.gone:
            await asyncio.sleep(0.005)  # a look at another task, bounded


async def test_a_step_whose_time_is_over_ends_alone(rig: Rig) -> None:
    rig.triton.hold = asyncio.Event()
    rig.policy.size = 2
    short, long = rig.step(1, left_s=0.1), rig.step(2)
    with pytest.raises(Expired):
        await short
    rig.triton.hold.set()
    assert (await long).data == b"2"
    assert rig.triton.batches == [[b"1", b"2"]]


@pytest.mark.parametrize("kind", ["dynamic_batching", "sequence_batching", "ensemble_scheduling"])
async def test_models_that_triton_schedules_get_separate_requests(rig: Rig, kind: str) -> None:
    getattr(rig.triton.config, kind).SetInParent()
    await rig.reload()
    rig.policy.size = 2
    assert numbers(await asyncio.gather(*rig.steps(1, 2))) == [1, 2]
    assert [len(batch) for batch in rig.triton.batches] == [1, 1]
    assert rig.policy.model is not None
    assert rig.policy.model.server_batches


async def test_decoupled_models_are_never_merged(rig: Rig) -> None:
    rig.triton.config.model_transaction_policy.decoupled = True
    await rig.reload()
    served = rig.executor.replicas[0].served["m"]
    assert not served.merges
    assert served.view.max_batch_size == 0


async def test_instances_are_counted_for_each_gpu(rig: Rig) -> None:
    rig.triton.config.instance_group.add(count=2, gpus=[0, 1])
    rig.triton.config.instance_group.add(count=1)
    await rig.reload()
    assert rig.executor.replicas[0].served["m"].view.instances == 5
    assert rig.executor.replicas[0].served["m"].target.slots == 2 * 4 * 5


async def test_without_a_policy_for_it_steps_go_one_by_one(rig: Rig) -> None:
    rig.executor._batching = Batching(list, lambda target: 5)
    assert numbers(await asyncio.gather(*rig.steps(1, 2))) == [1, 2]
    assert [len(batch) for batch in rig.triton.batches] == [1, 1]


@pytest.mark.stack
async def test_a_real_triton_executes_what_the_worker_has_merged(tmp_path: Path) -> None:
    need_wheel()
    server = Triton(tmp_path)
    for name in ("echo", "embed"):
        link = server.repository / name
        link.unlink()
        link.mkdir()
        (link / "1").symlink_to(MODEL_REPOSITORY / name / "1")
        lines = (MODEL_REPOSITORY / name / "config.pbtxt").read_text().splitlines()
        (link / "config.pbtxt").write_text("\n".join(line for line in lines if "dynamic_batching" not in line))
    for name in ("tokens", "busy"):
        (server.repository / name).unlink()
    server.start()
    batching = Batching(lambda: [Named("marginal", Slot.BATCHING, Marginal(MarginalConfig()), OnError.ADMIT)], lambda target: target.slots)
    executor = TritonExecutor(server.config, "home", batching=batching)
    try:
        await executor.start()
        bodies = [{"n": number, "text": "é" * number} for number in range(40)]
        outputs = await asyncio.gather(*(executor.execute(work("echo", body)) for body in bodies))
        assert numbers(outputs) == bodies
        texts = [f"text {number}" for number in range(20)]
        asked = [{"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [text]}]} for text in texts]
        alone = [await executor.execute(work("embed", one)) for one in asked[:3]]
        together = await asyncio.gather(*(executor.execute(work("embed", one)) for one in asked))
        assert together[:3] == alone
        assert len({output.data for output in together}) == 20
        assert set(batching.learnt()) <= {"infer.echo", "infer.embed"}
    finally:
        await executor.close()
        server.kill()
