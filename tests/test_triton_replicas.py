"""Several Tritons behind one executor: fakes that can be away, disagree and refuse, and two real ones."""

import asyncio
import contextlib
import json
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from test_triton_batching import Full
from test_triton_executor import LOST, FakeTriton, FakeWork, Triton, eventually, free_ports, need_wheel, work
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway import tensors
from gateway.config import Config, parse
from gateway.errors import ConfigError, Expired, StepFailed, Unavailable
from gateway.policy import Named, OnError, Slot
from gateway.testing import ManualClock
from workers.batching import Batching
from workers.rendezvous import highest
from workers.triton import TritonExecutor

BUSY = (grpc.StatusCode.UNAVAILABLE, "Exceeds maximum queue size")


class Fake(FakeTriton):
    """One of several. Says how many it was asked; can be another model, keep a state, or stream `tokens` before it ends with its status."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = [-1, 1]
        self.config = service_pb2.ModelConfigResponse().config
        self.tokens: list[bytes] = []
        self.answer: Callable[[Any, Any], Awaitable[Any]] | None = None
        self.server: grpc.aio.Server | None = None
        self.address = ""

    async def ModelMetadata(self, request: Any, context: Any) -> Any:
        answer = service_pb2.ModelMetadataResponse(name=request.name)
        answer.inputs.add(name="json", datatype="BYTES", shape=self.shape)
        return answer

    async def ModelConfig(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelConfigResponse(config=self.config)

    async def ModelInfer(self, request: Any, context: Any) -> Any:
        return await (self.answer(request, context) if self.answer is not None else super().ModelInfer(request, context))

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:
        self.asked += 1
        async for _ in requests:
            break
        for token in self.tokens:
            answer = service_pb2.ModelStreamInferResponse()
            answer.infer_response.outputs.add(name="json", datatype="BYTES", shape=[1, 1])
            answer.infer_response.raw_output_contents.append(tensors.pack_bytes([token]))
            yield answer
        if self.status is not None:
            await context.abort(*self.status)

    async def start(self, port: int = 0) -> None:
        self.server = grpc.aio.server()
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(self, self.server)
        self.address = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop(None)
            self.server = None


class Rig:
    def __init__(self) -> None:
        self.fakes: list[Fake] = []
        self.clock = ManualClock()
        self.executor = TritonExecutor(Config(), "home")

    async def start(self, count: int, change: Callable[[list[Fake]], None] = lambda fakes: None, **options: Any) -> TritonExecutor:
        self.fakes = [Fake() for _ in range(count)]
        change(self.fakes)
        for fake in self.fakes:
            await fake.start()
        target = options.pop("target", None)
        sections = [{"kind": "infer", "name": "m", **target}] if target else []
        config = parse({"triton": {"urls": [f"grpc://{fake.address}" for fake in self.fakes]}, "targets": sections})
        self.executor = TritonExecutor(config, "home", clock=self.clock, **options)
        await self.executor.start()
        return self.executor

    async def look(self) -> None:
        """At all of them now, not in a second."""
        for one in self.executor.replicas:
            with contextlib.suppress(Unavailable):
                await one.refresh()

    @property
    def asked(self) -> list[int]:
        return [fake.asked for fake in self.fakes]

    def own(self, run: str) -> Fake:
        address = highest(f"acme/{run}", [fake.address for fake in self.fakes])
        return next(fake for fake in self.fakes if fake.address == address)

    def run_of(self, fake: Fake) -> str:
        """A run that belongs to it."""
        return next(run for run in map(str, range(1000)) if self.own(run) is fake)


@pytest.fixture
async def rig() -> AsyncGenerator[Rig, None]:
    rig = Rig()
    yield rig
    await rig.executor.close()
    for fake in rig.fakes:
        await fake.stop()


def of_run(run: str, body: object = None, left_s: float = 30.0) -> FakeWork:
    asked = work("m", body or {}, left_s=left_s)
    asked.step = replace(asked.step, run=run)
    return asked


async def test_slots_add_up_and_a_run_keeps_to_its_replica(rig: Rig) -> None:
    executor = await rig.start(3)
    (target,) = executor.targets()
    assert target.slots == 3 * 16
    for run in ("a", "b", "c", "d", "e", "f"):
        before = rig.own(run).asked
        for _ in range(3):
            assert (await executor.execute(of_run(run))).data == b"{}"
        assert rig.own(run).asked == before + 3
    assert sum(rig.asked) == 18


async def test_steps_without_a_run_and_those_beyond_the_bound_go_to_the_least_loaded(rig: Rig) -> None:
    executor = await rig.start(2)
    for fake in rig.fakes:
        fake.hold = asyncio.Event()
    tasks = [asyncio.create_task(executor.execute(work("m", {}))) for _ in range(6)]
    await eventually(lambda: _is(rig.asked == [3, 3]))
    tasks += [asyncio.create_task(executor.execute(of_run(rig.run_of(rig.fakes[1])))) for _ in range(8)]
    await eventually(lambda: _is(sum(rig.asked) == 14))
    assert rig.asked == [5, 9], "the last one makes it 9 of 14: ceil(1.25 * 7)"
    for fake in rig.fakes:
        assert fake.hold is not None
        fake.hold.set()
    await asyncio.gather(*tasks)
    assert all(one.in_flight["m"] == 0 for one in executor.replicas)


async def _is(true: bool) -> bool:
    return true


@pytest.mark.parametrize("status", [BUSY, (grpc.StatusCode.NOT_FOUND, "unloaded"), LOST])
async def test_what_one_does_not_take_another_gets_and_it_is_asked_again_later(rig: Rig, status: tuple[grpc.StatusCode, str]) -> None:
    executor = await rig.start(2)
    first = rig.fakes[0]
    first.status = status
    run = rig.run_of(first)
    for _ in range(3):
        assert (await executor.execute(of_run(run))).data == b"{}"
    assert rig.asked == [1, 3], "it is left alone for a moment"
    assert executor.ready("m")
    rig.clock.advance(1.0)
    await executor.execute(of_run(run))
    assert rig.asked == [2, 4]
    first.status = None
    rig.clock.advance(5.0)
    await executor.execute(of_run(run))
    await executor.execute(of_run(run))
    assert rig.asked == [4, 4], "the run is at home again"


async def test_with_all_away_a_step_goes_back_after_each_was_asked_once(rig: Rig) -> None:
    executor = await rig.start(3)
    for fake in rig.fakes:
        fake.status = BUSY
    with pytest.raises(Unavailable):
        await executor.execute(work("m", {}))
    assert rig.asked == [1, 1, 1]
    with pytest.raises(Unavailable):
        await executor.execute(work("m", {}))
    assert sum(rig.asked) == 4, "all have refused a moment ago: one is asked all the same"
    for fake in rig.fakes:
        await fake.stop()
    await rig.look()
    assert not executor.ready("m")
    with pytest.raises(Unavailable, match="not ready"):
        await executor.execute(work("m", {}))
    assert [target.name for target in executor.targets()] == ["m"]


@pytest.mark.parametrize(
    ("status", "raises"),
    [((grpc.StatusCode.INVALID_ARGUMENT, "wrong"), StepFailed), ((grpc.StatusCode.DEADLINE_EXCEEDED, ""), Expired)],
)
async def test_a_models_own_answer_and_an_ended_time_go_nowhere_else(
    rig: Rig, status: tuple[grpc.StatusCode, str], raises: type[Exception]
) -> None:
    executor = await rig.start(2)
    for fake in rig.fakes:
        fake.status = status
    with pytest.raises(raises):
        await executor.execute(work("m", {}))
    assert sum(rig.asked) == 1


def _stateful(fakes: list[Fake]) -> None:
    for fake in fakes:
        fake.config.sequence_batching.SetInParent()


async def test_a_model_with_a_state_keeps_runs_where_they_are_and_repeats_nothing(rig: Rig) -> None:
    executor = await rig.start(2, _stateful)
    assert not executor.targets()[0].idempotent
    first, second = rig.fakes
    first.status = BUSY
    for _ in range(2):
        with pytest.raises(Unavailable):
            await executor.execute(of_run(rig.run_of(first)))
    assert rig.asked == [2, 0], "its state is there"
    first.status, first.hold = None, asyncio.Event()
    tasks = [asyncio.create_task(executor.execute(of_run(rig.run_of(first)))) for _ in range(5)]
    await eventually(lambda: _is(first.asked == 7))
    first.hold.set()
    await asyncio.gather(*tasks)
    assert second.asked == 0, "however loaded it is"
    for _ in range(3):
        await executor.execute(work("m", {}))
    assert sorted([first.asked - 7, second.asked]) == [0, 3], "steps without a run share one state"


async def test_what_the_configuration_calls_not_repeatable_is_not_repeated(rig: Rig) -> None:
    executor = await rig.start(2, target={"read_only": False, "idempotent": False})
    rig.fakes[0].status = BUSY
    with pytest.raises(Unavailable):
        await executor.execute(work("m", {}))
    assert rig.asked == [1, 0]
    await executor.execute(work("m", {}))
    assert rig.asked == [1, 1]


def _streaming(fakes: list[Fake]) -> None:
    for fake in fakes:
        fake.config.model_transaction_policy.decoupled = True


async def test_a_stream_goes_elsewhere_only_before_its_first_token(rig: Rig) -> None:
    executor = await rig.start(2, _streaming)
    first, second = rig.fakes
    first.status, second.tokens = BUSY, [b"1", b"2"]
    asked = work("m", {})
    assert json.loads((await executor.execute(asked)).data) == {"tokens": [1, 2]}
    assert (rig.asked, len(asked.tokens)) == ([1, 1], 2)
    rig.clock.advance(10.0)
    first.tokens = [b"1"]
    asked = work("m", {})
    with pytest.raises(Unavailable):
        await executor.execute(asked)
    assert (rig.asked, len(asked.tokens)) == ([2, 1], 1)


async def test_a_replica_that_goes_and_comes_back(rig: Rig) -> None:
    executor = await rig.start(2)
    first = rig.fakes[0]
    address = first.address
    await first.stop()
    run = rig.run_of(first)
    assert (await executor.execute(of_run(run))).data == b"{}", "nobody has noticed yet"
    await rig.look()
    (target,) = executor.targets()
    assert (target.slots, executor.ready("m")) == (16, True)
    await first.start(int(address.rpartition(":")[2]))

    async def back() -> bool:
        await rig.look()
        return executor.targets()[0].slots == 32

    await eventually(back)
    rig.clock.advance(10.0)
    before = first.asked
    await executor.execute(of_run(run))
    assert first.asked == before + 1


async def test_one_that_is_away_at_the_start_is_waited_for_by_nobody(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake()
    rig.fakes = [fake]
    await fake.start()
    (port,) = free_ports(1)
    rig.executor = TritonExecutor(parse({"triton": {"urls": [f"127.0.0.1:{port}", fake.address]}}), "home")
    with caplog.at_level(logging.WARNING):
        await rig.executor.start()
    assert f"127.0.0.1:{port} does not answer" in caplog.text
    assert (await rig.executor.execute(work("m", {}))).data == b"{}"
    late = Fake()
    rig.fakes.append(late)
    await late.start(port)
    await eventually(lambda: _is(rig.executor.targets()[0].slots == 32))  # its own look finds it


async def test_all_away_at_the_start_names_each() -> None:
    ports = free_ports(2)
    executor = TritonExecutor(parse({"triton": {"urls": [f"127.0.0.1:{port}" for port in ports]}}), "home")
    with pytest.raises(Unavailable) as caught:
        await executor.start()
    assert all(f"127.0.0.1:{port} does not answer" in caught.value.message for port in ports)
    await executor.close()


# ---- replicas that differ ------------------------------------------------------------------------------------------------------


def _second_differs(fakes: list[Fake]) -> None:
    fakes[1].shape = [-1, 2]


async def test_the_odd_one_is_left_out_and_said_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        executor = await rig.start(3, _second_differs)
        await rig.look()
    said = [record.getMessage() for record in caplog.records]
    first, odd, third = (fake.address for fake in rig.fakes)
    assert said == [f"model m in Triton at {odd} is left out: its inputs differ from those at {first}, {third}"]
    (target,) = executor.targets()
    assert (target.slots, target.tensor_inputs[0].shape) == (32, (-1, 1))
    for run in "abcdefgh":
        await executor.execute(of_run(run))
    assert rig.asked[1] == 0


async def test_a_rolling_change_of_a_model_goes_on_with_what_most_have(rig: Rig) -> None:
    executor = await rig.start(3)
    shapes = []
    for fake, one in zip(rig.fakes, executor.replicas, strict=True):
        one.up = False  # it is started again, with the new model
        fake.shape, one.served = [-1, 2], {}
        assert executor.ready("m")
        await rig.look()
        shapes.append((executor.targets()[0].tensor_inputs[0].shape, executor.targets()[0].slots))
    assert shapes == [((-1, 1), 32), ((-1, 2), 32), ((-1, 2), 48)]


async def test_when_only_the_odd_one_is_left_it_serves(rig: Rig) -> None:
    executor = await rig.start(2, _second_differs)
    assert executor.targets()[0].tensor_inputs[0].shape == (-1, 1)
    await rig.fakes[0].stop()
    await rig.look()
    assert executor.targets()[0].tensor_inputs[0].shape == (-1, 2)
    await executor.execute(work("m", {}))
    assert rig.asked == [0, 1]


async def test_another_kind_of_state_is_another_model(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    executor = await rig.start(2, lambda fakes: _stateful(fakes[1:]))
    assert "ways to execute it" in caplog.text
    assert executor.targets()[0].read_only
    assert executor.targets()[0].slots == 16


# ---- batches -------------------------------------------------------------------------------------------------------------------


def _of_four(fakes: list[Fake]) -> None:
    for fake in fakes:
        fake.config.max_batch_size = 4


async def test_batches_are_of_one_replica_and_a_refused_one_goes_elsewhere_step_by_step(rig: Rig) -> None:
    policies: list[Full] = []
    slots: list[int] = []

    def make() -> list[Named]:
        policies.append(Full(2))
        return [Named("full", Slot.BATCHING, policies[-1], OnError.ADMIT)]

    batching = Batching(make, lambda target: slots.append(target.slots) or target.slots)  # type: ignore[func-returns-value]
    executor = await rig.start(2, _of_four, batching=batching)
    first, second = rig.fakes
    runs = [rig.run_of(first), rig.run_of(second), rig.run_of(second), rig.run_of(first)]
    rows: list[tuple[int, int]] = []

    async def infer(number: int, request: Any, context: Any) -> Any:
        rows.append((number, len(tensors.unpack_bytes(request.raw_input_contents[0]))))
        status = rig.fakes[number].status
        if status is not None:
            await context.abort(*status)
        response = service_pb2.ModelInferResponse(model_name="m")
        response.outputs.add(name="json", datatype="BYTES", shape=[rows[-1][1], 1])
        response.raw_output_contents.append(request.raw_input_contents[0])
        return response

    for number, fake in enumerate(rig.fakes):
        fake.answer = partial(infer, number)
    outputs = await asyncio.gather(*(executor.execute(of_run(run, {"n": n})) for n, run in enumerate(runs)))
    assert [json.loads(output.data) for output in outputs] == [{"n": n} for n in range(4)]
    assert sorted(rows) == [(0, 2), (1, 2)]
    assert [policy.sizes for policy in policies] == [[2], [2]], "each replica's policy learns what its own batches cost"
    assert set(slots) == {32}
    rows.clear()
    first.status = BUSY
    outputs = await asyncio.gather(*(executor.execute(of_run(runs[0], {"n": n})) for n in range(2)))
    assert [json.loads(output.data) for output in outputs] == [{"n": 0}, {"n": 1}]
    assert rows == [(0, 2), (1, 2)]


# ---- configuration -------------------------------------------------------------------------------------------------------------


def test_addresses() -> None:
    assert parse({}).triton.addresses == ()
    assert parse({"triton": {"url": "grpc://a:1"}}).triton.addresses == ("a:1",)
    assert parse({"triton": {"urls": ["grpc://a:1", "b:2"]}}).triton.addresses == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"url": "a:1", "urls": ["b:1"]}, "both given"),
        ({"urls": ["a:1", "grpc://a:1"]}, "more than once"),
        ({"urls": ["a:1", ""]}, "empty"),
    ],
)
def test_nonsense_is_refused(section: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse({"triton": section})


# ---- two real ones -------------------------------------------------------------------------------------------------------------


@pytest.mark.stack
async def test_two_real_tritons_and_one_that_is_killed(tmp_path: Path) -> None:
    need_wheel()
    servers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        server = Triton(tmp_path / name)
        for model in ("embed", "tokens"):
            (server.repository / model).unlink()
        servers.append(server)
    executor = TritonExecutor(parse({"triton": {"urls": [f"127.0.0.1:{server.grpc}" for server in servers]}}), "home")
    try:
        await asyncio.gather(*(asyncio.to_thread(server.start) for server in servers))
        await executor.start()
        slots = {target.name: target.slots for target in executor.targets()}
        assert set(slots) == {"echo", "busy"}
        runs = [f"r{number}" for number in range(20)]
        owners = [highest(f"acme/{run}", [one.address for one in executor.replicas]) for run in runs]
        assert len(Counter(owners)) == 2

        async def echo(run: str) -> object:
            asked = work("echo", {"run": run})
            asked.step = replace(asked.step, run=run)
            return json.loads((await executor.execute(asked)).data)

        assert await asyncio.gather(*map(echo, runs)) == [{"run": run} for run in runs]
        held = work("busy", {"ms": 3_000})
        held.step = replace(held.step, run=runs[owners.index(executor.replicas[0].address)])
        task = asyncio.create_task(executor.execute(held))
        await eventually(lambda: _is(executor.replicas[0].in_flight["busy"] == 1))
        await asyncio.to_thread(servers[0].kill)
        assert await asyncio.gather(*map(echo, runs)) == [{"run": run} for run in runs]
        await task  # executed again, by the other one
        assert executor.replicas[1].up
        await eventually(lambda: _is({target.name: target.slots * 2 for target in executor.targets()} == slots))
        await asyncio.to_thread(servers[0].start)
        await eventually(lambda: _is({target.name: target.slots for target in executor.targets()} == slots))
        assert all(executor.ready(name) for name in slots)
    finally:
        await executor.close()
        for server in servers:
            if server.process is not None:
                server.kill()
