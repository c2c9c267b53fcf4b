import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Awaitable
from typing import Any

import grpc
import numpy as np
import pytest
from fake_service import ADDER, ALICE, BOB, FakeService, json_step, make_config, serving, stub_for, token
from google.protobuf import descriptor_pb2, struct_pb2
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gateway import tensors
from gateway.clock import SystemClock
from gateway.edge import refusals, servicer, status
from gateway.edge.ingress import Ingress, is_loopback
from gateway.edge.intake import Intake, random_id, trace_context
from gateway.errors import ConfigError, Expired, InvalidStep, NearloopError, Rejected
from gateway.types import Completed, Kind, Lane, Payload, Step, StepEvent
from nearloop.v1 import gateway_pb2 as pb

AS_ALICE = (("x-api-key", ALICE),)
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def refused(call: Awaitable[Any]) -> NearloopError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    trailers = error.trailing_metadata() or ()
    assert any(key == status.DETAILS_KEY for key, _ in trailers), f"{error.code()} {error.details()} has no details"
    return status.from_status(error.code(), error.details() or "", trailers)


async def everything(call: Any) -> list[pb.Event]:
    return [answer.event async for answer in call]


# --- steps become what the service sees ---


async def test_a_step_arrives_whole() -> None:
    service = FakeService()
    async with serving(service) as port, stub_for(port) as stub:
        step = json_step(b'{"n": 1 }', lane=pb.LANE_BATCH, run="run-1", idempotency_key="key_1", region="near")
        step.timeout.seconds = 7
        before = SystemClock().wall_s()
        answer = await stub.Execute(
            pb.ExecuteRequest(step=step), metadata=(("authorization", f"Bearer {BOB}"), ("traceparent", TRACE), ("tracestate", "a=1"))
        )
    (seen,) = service.steps
    assert (seen.tenant, seen.kind, seen.target, seen.lane, seen.run) == ("bob", Kind.TOOL, "echo", Lane.BATCH, "run-1")
    assert (seen.idempotency_key, seen.client_region, seen.stream) == ("key_1", "near", False)
    assert (seen.traceparent, seen.tracestate) == (TRACE, "a=1")
    assert seen.input == Payload(b'{"n": 1 }')
    assert before + 7 <= seen.deadline_s <= SystemClock().wall_s() + 7
    assert len(seen.id) == 32
    assert set(seen.id) <= set("0123456789abcdef")
    assert answer.result.output.content == step.input.content
    assert (answer.result.step_id, answer.result.attempt, answer.result.worker) == (seen.id, 1, "w-1")
    assert answer.result.timing == pb.Timing(admission_us=1, queue_us=2, network_us=3, service_us=4)


async def test_struct_is_answered_with_struct_and_tensors_with_tensors() -> None:
    service = FakeService()
    struct = struct_pb2.Struct()
    struct.update({"n": 1, "deep": {"x": [1.5, None, "ü"]}})
    arrays = {"a": np.ones((2, 2), np.float32), "label": np.array([["x"], ["y"]], dtype=object)}
    async with serving(service) as port, stub_for(port) as stub:
        request = pb.ExecuteRequest(step=pb.Step(kind=pb.KIND_TOOL, target="echo", input=pb.Payload(json=struct)))
        answer = await stub.Execute(request, metadata=AS_ALICE)
        assert answer.result.output.json == struct
        message = pb.Tensors.FromString(tensors.encode(arrays).data)
        request = pb.ExecuteRequest(step=pb.Step(kind=pb.KIND_INFER, target="adder", input=pb.Payload(tensors=message)))
        answer = await stub.Execute(request, metadata=AS_ALICE)
        assert answer.result.output.tensors == message
    assert service.steps[1].input == tensors.encode(arrays)


async def test_content_types_of_json_have_one_form() -> None:
    service = FakeService()
    async with serving(service) as port, stub_for(port) as stub:
        for content_type in ("Application/JSON", "application/json; charset=utf-8", "text/plain; charset=utf-8"):
            content = pb.Content(content_type=content_type, data=b'{"name":"x"}')
            step = pb.Step(kind=pb.KIND_TOOL, target="echo", input=pb.Payload(content=content))
            await stub.Execute(pb.ExecuteRequest(step=step), metadata=AS_ALICE)
    seen = [step.input.content_type for step in service.steps]
    assert seen == ["application/json", "application/json", "text/plain; charset=utf-8"]


class _Noon:
    def now_s(self) -> float:
        return 5.0

    def wall_s(self) -> float:
        return 1000.0


@pytest.mark.parametrize(
    ("target", "timeout_s", "rpc_s", "job", "bound_s"),
    [
        ("echo", None, None, False, 30),  # the target's
        ("echo", 20, None, False, 20),
        ("docs", 20, None, False, 5),
        ("docs", 20, 2.5, False, 2.5),
        ("echo", 20, 25, False, 20),
        ("echo", None, 5, True, 3000),  # a job outlives the call that submits it
        ("docs", 20, 5, True, 20),
    ],
)
async def test_the_shortest_bound_is_the_deadline(
    target: str, timeout_s: int | None, rpc_s: float | None, job: bool, bound_s: float
) -> None:
    intake = Intake(make_config(max_timeout_s=3000).gateway, FakeService(), _Noon(), random_id)
    step = json_step(b'{"name":"x"}', target)
    if timeout_s is not None:
        step.timeout.seconds = timeout_s
    assert intake.step(step, "alice", (), rpc_s, job=job).deadline_s == 1000 + bound_s


async def test_a_deadline_that_has_passed_is_not_started() -> None:
    intake = Intake(make_config().gateway, FakeService(), _Noon(), random_id)
    with pytest.raises(Expired):
        intake.step(json_step(), "alice", (), 0.0)
    assert intake.step(json_step(), "alice", (), 0.0, job=True)


async def test_the_deadline_of_the_call_bounds_the_step() -> None:
    service = FakeService()
    async with serving(service) as port, stub_for(port) as stub:
        await stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=AS_ALICE, timeout=10)
    assert service.steps[0].deadline_s < SystemClock().wall_s() + 11


# --- what is wrong is said before the service sees it ---


async def test_all_problems_come_at_once() -> None:
    service = FakeService()
    step = json_step(b"x" * 2000, "no/id", lane=9, run="a b", idempotency_key="k" * 65, region="\n")  # type: ignore[arg-type]
    step.kind = 77  # type: ignore[assignment]
    step.timeout.seconds = -1
    async with serving(service, max_input_bytes=1024) as port, stub_for(port) as stub:
        for call in (
            stub.Execute(pb.ExecuteRequest(step=step), metadata=AS_ALICE),
            stub.Submit(pb.SubmitRequest(step=step), metadata=AS_ALICE),
        ):
            error = await refused(call)
            assert isinstance(error, InvalidStep)
            names = {name for name, _ in error.fields}
            short = {"kind", "target", "lane", "run", "timeout", "idempotency_key", "input", "region"}
            assert names == {f"step.{name}" for name in short}
            assert "2000 bytes; the limit is 1024" in dict(error.fields)["step.input"]
    assert service.steps == []


@pytest.mark.parametrize(
    ("step", "field", "part"),
    [
        (pb.Step(), "step.kind", "missing"),
        (pb.Step(), "step.target", "missing"),
        (pb.Step(), "step.input", "missing"),
        (json_step(b"{"), "step.input", "is not JSON"),
        (json_step(b"[" * 50_000), "step.input", "nested too deep"),
        (json_step(b"9" * 50_000), "step.input", "too many digits"),
        (json_step(b"{}", "docs"), "step.input", '"name" is a required property'),
        (json_step(b'{"name":1}', "docs"), "step.input.name", 'is not of type "string"'),
        (json_step(b"{}", "adder"), "step.kind", "'adder' is of kind infer, not tool"),
        (pb.Step(kind=pb.KIND_TOOL, target="echo", input=pb.Payload(content=pb.Content())), "step.input.content.content_type", "missing"),
        (
            pb.Step(kind=pb.KIND_TOOL, target="echo", input=pb.Payload(content=pb.Content(content_type="a/b\r\nx: y"))),
            "step.input.content.content_type",
            "MIME type",
        ),
        (
            pb.Step(kind=pb.KIND_TOOL, target="echo", input=pb.Payload(content=pb.Content(content_type="a/" + "b" * 127))),
            "step.input.content.content_type",
            "at most 128",
        ),
        (
            pb.Step(kind=pb.KIND_INFER, target="adder", input=pb.Payload(tensors=pb.Tensors(tensors=[pb.Tensor(name="b")]))),
            "step.input.tensors[0].datatype",
            "not a KServe datatype",
        ),
    ],
)
async def test_a_wrong_step_is_refused_with_its_field(step: pb.Step, field: str, part: str) -> None:
    service = FakeService()
    async with serving(service, anonymous="guest") as port, stub_for(port) as stub:
        error = await refused(stub.Execute(pb.ExecuteRequest(step=step)))
    assert isinstance(error, InvalidStep)
    assert any(name == field and part in text for name, text in error.fields), error.fields
    assert service.steps == []


async def test_timeouts_must_be_positive_and_within_the_limit() -> None:
    async with serving(FakeService(), max_timeout_s=60) as port, stub_for(port) as stub:
        for seconds, part in ((0, "must be positive"), (-5, "must be positive"), (61, "at most 60 s")):
            step = json_step()
            step.timeout.FromSeconds(seconds)
            error = await refused(stub.Execute(pb.ExecuteRequest(step=step), metadata=AS_ALICE))
            assert part in dict(getattr(error, "fields"))["step.timeout"]  # noqa: B009 - InvalidStep has it, its base has not


async def test_an_unknown_target_is_not_found_with_the_nearest_name() -> None:
    async with serving(FakeService()) as port, stub_for(port) as stub:
        error = await refused(stub.Execute(pb.ExecuteRequest(step=json_step(target="ecko")), metadata=AS_ALICE))
    assert (error.code, error.reason, error.scope) == ("NOT_FOUND", "UNKNOWN_TARGET", "tool.ecko")
    assert "did you mean 'echo'?" in error.message


async def test_a_message_beyond_the_servers_limit_says_so() -> None:
    async with serving(FakeService(), max_input_bytes=1024) as port, stub_for(port) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Execute(pb.ExecuteRequest(step=json_step(b"x" * 1_000_000)), metadata=AS_ALICE)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (caught.value.details() or "")


async def test_bytes_that_are_no_request_are_refused() -> None:
    async with serving(FakeService()) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        for method in ("Execute", "Submit", "GetJob", "CancelJob", "ListTargets"):
            error = await refused(channel.unary_unary(f"/nearloop.v1.Gateway/{method}")(b"\xff\xff", metadata=AS_ALICE))
            assert (error.code, error.reason) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST")


@pytest.mark.parametrize("method", ["Execute", "ExecuteStream", "Submit", "GetJob", "WatchJob", "CancelJob", "ListTargets"])
@pytest.mark.parametrize("metadata", [(), (("x-api-key", "wrong-key"),)])
async def test_every_method_needs_a_known_key(method: str, metadata: tuple[tuple[str, str], ...]) -> None:
    anonymous = "guest" if metadata else ""
    async with serving(FakeService(), anonymous) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        if method in ("ExecuteStream", "WatchJob"):
            error = await refused(everything(channel.unary_stream(f"/nearloop.v1.Gateway/{method}")(b"", metadata=metadata)))
        else:
            error = await refused(channel.unary_unary(f"/nearloop.v1.Gateway/{method}")(b"", metadata=metadata))
    assert error.code == "UNAUTHENTICATED"
    assert "wrong-key" not in error.message


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ([("traceparent", TRACE)], (TRACE, "")),
        ([("traceparent", TRACE), ("tracestate", "a=1"), ("tracestate", "b=2")], (TRACE, "a=1,b=2")),
        ([("traceparent", "01" + TRACE[2:] + "-new")], ("01" + TRACE[2:] + "-new", "")),
        ([("traceparent", TRACE), ("tracestate", "a" * 513)], (TRACE, "")),
        ([("traceparent", TRACE), ("tracestate", "a=\n")], (TRACE, "")),
        ([("tracestate", "a=1")], ("", "")),
        ([("traceparent", TRACE + "-new")], ("", "")),
        ([("traceparent", TRACE.upper())], ("", "")),
        ([("traceparent", "ff" + TRACE[2:])], ("", "")),
        ([("traceparent", "00-" + "0" * 32 + TRACE[35:])], ("", "")),
        ([("traceparent", TRACE[:36] + "0" * 16 + "-01")], ("", "")),
        ([("traceparent", TRACE + "\n")], ("", "")),
    ],
)
def test_trace_context_is_continued_when_it_is_valid(metadata: list[tuple[str, str | bytes]], expected: tuple[str, str]) -> None:
    assert trace_context(metadata) == expected


# --- errors, cancellation, streams ---


async def test_errors_of_the_service_keep_their_details() -> None:
    service = FakeService()

    async def reject(step: Step) -> Payload:
        raise Rejected("full", reason="QUEUE_FULL", scope="tool.echo", policy="fixed_limit", retry_after_s=2.5)

    service.on_execute = reject
    async with serving(service) as port, stub_for(port) as stub:
        error = await refused(stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=AS_ALICE))
    assert isinstance(error, Rejected)
    assert (error.reason, error.scope, error.policy, error.retry_after_s) == ("QUEUE_FULL", "tool.echo", "fixed_limit", 2.5)


async def test_an_unexpected_error_gives_an_id_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService()

    async def crash(step: Step) -> Payload:
        raise RuntimeError(step.input.data)

    service.on_execute = crash
    async with serving(service) as port, stub_for(port) as stub:
        error = await refused(stub.Execute(pb.ExecuteRequest(step=json_step(b'"SECRET"')), metadata=AS_ALICE))
    assert error.code == "INTERNAL"
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    error_id = error.message.split()[2].rstrip(":")
    assert error_id in record.getMessage()
    assert "RuntimeError" in record.getMessage()
    assert "SECRET" not in error.message + caplog.text
    assert ALICE not in caplog.text


@pytest.mark.parametrize("by_deadline", [True, False])
@pytest.mark.parametrize("streaming", [True, False])
async def test_cancellation_and_deadline_reach_the_service(by_deadline: bool, streaming: bool) -> None:
    service = FakeService()

    async def never(step: Step) -> Payload:
        await asyncio.Event().wait()
        raise AssertionError

    async def silent(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        await asyncio.Event().wait()
        yield token(1, b"1")

    service.on_execute, service.on_stream = never, silent
    async with serving(service) as port, stub_for(port) as stub:
        timeout_s = 0.3 if by_deadline else None
        if streaming:
            call = stub.ExecuteStream(pb.ExecuteStreamRequest(step=json_step()), metadata=AS_ALICE, timeout=timeout_s)
        else:
            call = stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=AS_ALICE, timeout=timeout_s)
        await service.started.wait()
        if not by_deadline:
            call.cancel()
        await service.cancelled.wait()
        assert await call.code() is (grpc.StatusCode.DEADLINE_EXCEEDED if by_deadline else grpc.StatusCode.CANCELLED)


async def test_a_stream_carries_events_and_ends_with_the_result() -> None:
    service = FakeService()
    async with serving(service) as port, stub_for(port) as stub:
        events = await everything(stub.ExecuteStream(pb.ExecuteStreamRequest(step=json_step()), metadata=AS_ALICE))
    assert [event.WhichOneof("value") for event in events] == ["started", "token", "progress", "result"]
    assert [event.sequence for event in events] == [1, 2, 3, 4]
    assert events[1].token.content.data == b'{"t":1}'
    assert events[3].result.output.content.data == b'{"n":1}'
    assert service.steps[0].stream
    assert service.closed.is_set()


async def test_an_error_in_mid_stream_ends_it_and_closes_the_service() -> None:
    service = FakeService()

    async def breaks(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        yield token(1, b"1")
        raise Rejected("no more", retry_after_s=1)

    service.on_stream = breaks
    async with serving(service) as port, stub_for(port) as stub:
        call = stub.WatchJob(pb.WatchJobRequest(job_id="home-1", after_sequence=3, attempt=2), metadata=AS_ALICE)
        assert (await call.read()).event.sequence == 1
        error = await refused(call.read())
    assert isinstance(error, Rejected)
    assert service.closed.is_set()
    assert service.calls == [("watch", "alice", "home-1", 2, 3)]


async def test_a_reader_that_stalls_loses_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "WRITE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(servicer, "GIVE_UP_TIMEOUT_S", 0.1)
    service = FakeService()

    async def floods(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        sequence = 0
        while True:
            sequence += 1
            yield token(sequence, b"x" * 1_000_000)

    service.on_stream = floods
    async with serving(service) as port, stub_for(port) as stub:
        call = stub.ExecuteStream(pb.ExecuteStreamRequest(step=json_step()), metadata=AS_ALICE)
        await service.closed.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await everything(call)
    assert caught.value.code() is grpc.StatusCode.ABORTED


async def test_calls_beyond_the_limit_are_refused_and_health_still_answers() -> None:
    service, release = FakeService(), asyncio.Event()

    async def wait(step: Step) -> Payload:
        await release.wait()
        return step.input

    service.on_execute = wait
    async with serving(service, max_in_flight=1) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, stub_for(port) as stub:
        first = stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=AS_ALICE)
        await service.started.wait()
        error = await refused(stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=AS_ALICE))
        assert (error.code, error.reason, error.retry_after_s) == ("RESOURCE_EXHAUSTED", "TOO_MANY_IN_FLIGHT", refusals.OVERLOADED_RETRY_S)
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        release.set()
        await first
        await stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=AS_ALICE)


# --- jobs and targets ---


async def test_jobs() -> None:
    service = FakeService()
    async with serving(service) as port, stub_for(port) as stub:
        request = pb.SubmitRequest(step=json_step(idempotency_key="k"))
        first = await stub.Submit(request, metadata=AS_ALICE)
        second = await stub.Submit(request, metadata=AS_ALICE)
        assert (first.created, second.created, first.job) == (True, False, second.job)
        assert (first.job.state, first.job.target, first.job.region) == (pb.JOB_STATE_QUEUED, "echo", "home")
        got = await stub.GetJob(pb.GetJobRequest(job_id=first.job.id), metadata=AS_ALICE)
        cancelled = await stub.CancelJob(pb.CancelJobRequest(job_id=first.job.id), metadata=AS_ALICE)
        assert got.job == cancelled.job
        missing = await refused(stub.GetJob(pb.GetJobRequest(job_id="home-x"), metadata=(("x-api-key", BOB),)))
        assert missing.code == "NOT_FOUND"
        for bad in ("", "a.b", "*"):
            assert isinstance(await refused(stub.GetJob(pb.GetJobRequest(job_id=bad), metadata=AS_ALICE)), InvalidStep)
            assert isinstance(await refused(stub.CancelJob(pb.CancelJobRequest(job_id=bad), metadata=AS_ALICE)), InvalidStep)
    assert service.calls[-1] == ("job", "bob", "home-x")


@pytest.mark.parametrize("chatty", [False, True])
@pytest.mark.parametrize("timeout_s", [None, 3600])
async def test_a_watch_has_a_longest_life(chatty: bool, timeout_s: float | None) -> None:
    service = FakeService()

    async def endless(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        sequence = 0
        while chatty:
            sequence += 1
            yield token(sequence, b"1")
        await asyncio.Event().wait()

    service.on_stream = endless
    async with serving(service, max_timeout_s=0.1) as port, stub_for(port) as stub:
        call = stub.WatchJob(pb.WatchJobRequest(job_id="home-1"), metadata=AS_ALICE, timeout=timeout_s)
        error = await refused(everything(call))
    assert (error.code, error.reason, error.retry_after_s) == ("UNAVAILABLE", "WATCH_AGAIN", 0)
    assert service.closed.is_set()


async def test_a_timeout_of_the_service_is_not_the_end_of_a_watchs_life() -> None:
    service = FakeService()

    async def late(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        raise TimeoutError
        yield

    service.on_stream = late
    async with serving(service) as port, stub_for(port) as stub:
        error = await refused(everything(stub.WatchJob(pb.WatchJobRequest(job_id="home-1"), metadata=AS_ALICE)))
    assert error.code == "INTERNAL"


async def test_targets_are_listed_in_order() -> None:
    async with serving(FakeService()) as port, stub_for(port) as stub:
        listed = await stub.ListTargets(pb.ListTargetsRequest(), metadata=AS_ALICE)
        tools = await stub.ListTargets(pb.ListTargetsRequest(kind=pb.KIND_TOOL), metadata=AS_ALICE)
        error = await refused(stub.ListTargets(pb.ListTargetsRequest(kind=50), metadata=AS_ALICE))
    assert [target.name for target in listed.targets] == ["adder", "docs", "echo"]
    assert listed.targets[0].tensor_inputs[0].shape == list(ADDER.tensor_inputs[0].shape)
    assert [target.name for target in tools.targets] == ["docs", "echo"]
    assert isinstance(error, InvalidStep)


# --- the server ---


async def test_health_follows_readiness_and_every_watcher_hears_it() -> None:
    ingress = Ingress(make_config(), FakeService(), SystemClock())
    port = await ingress.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status_of(service: str) -> int:
            return int((await stub.Check(health_pb2.HealthCheckRequest(service=service))).status)

        assert await status_of("") == health_pb2.HealthCheckResponse.NOT_SERVING
        watchers = [stub.Watch(health_pb2.HealthCheckRequest(service="nearloop.v1.Gateway")) for _ in range(3)]
        for watcher in watchers:
            assert (await watcher.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watchers.pop().cancel()
        ingress.set_serving(True)
        for watcher in watchers:
            assert (await watcher.read()).status == health_pb2.HealthCheckResponse.SERVING
        assert await status_of("nearloop.v1.Gateway") == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError):
            await status_of("other")
        await ingress.stop(60)
        for watcher in watchers:
            assert (await watcher.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert await watcher.read() is grpc.aio.EOF


async def test_reflection_lists_and_describes_the_service() -> None:
    async with serving(FakeService()) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        asks = [
            reflection_pb2.ServerReflectionRequest(list_services=""),
            reflection_pb2.ServerReflectionRequest(file_containing_symbol="nearloop.v1.Gateway"),
        ]
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter(asks))
        listed, described = [answer async for answer in call]
    names = {service.name for service in listed.list_services_response.service}
    assert {"nearloop.v1.Gateway", "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"} < names
    files = [descriptor_pb2.FileDescriptorProto.FromString(raw) for raw in described.file_descriptor_response.file_descriptor_proto]
    assert "nearloop/v1/gateway.proto" in {file.name for file in files}


async def test_channelz_counts_the_calls_and_shows_the_connections() -> None:
    async with serving(FakeService()) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, stub_for(port) as stub:
        await stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=AS_ALICE)
        channelz = channelz_pb2_grpc.ChannelzStub(channel)
        servers = (await channelz.GetServers(channelz_pb2.GetServersRequest())).server
        assert max(server.data.calls_succeeded for server in servers) >= 1
        (mine,) = [server for server in servers if await sockets_of(channelz, server, port)]
        same = (await channelz.GetServer(channelz_pb2.GetServerRequest(server_id=mine.ref.server_id))).server
        assert same.ref == mine.ref
        served = [found.data.messages_received for found in await sockets_of(channelz, mine, port)]
    assert sum(served) >= 1


async def sockets_of(channelz: channelz_pb2_grpc.ChannelzStub, server: channelz_pb2.Server, port: int) -> list[channelz_pb2.Socket]:
    """The connections of a server that came in at this port."""
    request = channelz_pb2.GetServerSocketsRequest(server_id=server.ref.server_id)
    found = []
    for ref in (await channelz.GetServerSockets(request)).socket_ref:
        socket_ = (await channelz.GetSocket(channelz_pb2.GetSocketRequest(socket_id=ref.socket_id))).socket
        if socket_.local.tcpip_address.port == port:
            found.append(socket_)
    return found


async def test_channelz_shows_channels() -> None:
    async with serving(FakeService()) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        channelz = channelz_pb2_grpc.ChannelzStub(channel)
        tops = (await channelz.GetTopChannels(channelz_pb2.GetTopChannelsRequest())).channel
        (mine,) = [top for top in tops if top.data.target.endswith(f":{port}")]
        top = (await channelz.GetChannel(channelz_pb2.GetChannelRequest(channel_id=mine.ref.channel_id))).channel
        for ref in top.subchannel_ref:
            sub = await channelz.GetSubchannel(channelz_pb2.GetSubchannelRequest(subchannel_id=ref.subchannel_id))
            assert sub.subchannel.ref.subchannel_id == ref.subchannel_id
    assert top.subchannel_ref


async def test_channelz_says_what_is_not_there() -> None:
    async with serving(FakeService()) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        channelz = channelz_pb2_grpc.ChannelzStub(channel)
        for call in (
            channelz.GetServer(channelz_pb2.GetServerRequest(server_id=2**40)),
            channelz.GetServerSockets(channelz_pb2.GetServerSocketsRequest(server_id=2**40)),
            channelz.GetSocket(channelz_pb2.GetSocketRequest(socket_id=2**40)),
            channelz.GetChannel(channelz_pb2.GetChannelRequest(channel_id=2**40)),
            channelz.GetSubchannel(channelz_pb2.GetSubchannelRequest(subchannel_id=2**40)),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0"])
async def test_channelz_is_not_there_for_callers_from_elsewhere(listen: str) -> None:
    async with serving(FakeService(), listen=listen) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channelz_pb2_grpc.ChannelzStub(channel).GetServers(channelz_pb2.GetServersRequest())
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([reflection_pb2.ServerReflectionRequest(list_services="")])
        )
        (listed,) = [answer async for answer in call]
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "grpc.channelz.v1.Channelz" not in {service.name for service in listed.list_services_response.service}


@pytest.mark.parametrize(
    ("listen", "local"),
    [
        ("127.0.0.1:1", True),
        ("127.9.9.9:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.0.2.1:1", False),
        ("gateway.example:1", False),
        ("localhost.example:1", False),
        (":1", False),
    ],
)
def test_which_addresses_are_of_this_machine_alone(listen: str, local: bool) -> None:
    assert is_loopback(listen) is local


async def test_a_health_check_does_not_repeat_a_long_name() -> None:
    async with serving(FakeService()) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="x" * 50_000))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert len(caught.value.details() or "") < 200


async def test_a_port_in_use_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ConfigError) as caught:
            await Ingress(make_config(listen=address), FakeService(), SystemClock()).start()
    assert caught.value.problems == (f"{address} is in use: stop what listens there or set gateway.listen",)


async def test_a_second_gateway_cannot_share_a_port() -> None:
    async with serving(FakeService()) as port:
        with pytest.raises(ConfigError, match="is in use"):
            await Ingress(make_config(listen=f"127.0.0.1:{port}"), FakeService(), SystemClock()).start()


@pytest.mark.parametrize("listen", ["192.0.2.1:0", "127.0.0.1:99999", "127.0.0.1:", "nonsense"])
async def test_an_address_that_cannot_be_had_is_one_sentence(listen: str) -> None:
    with pytest.raises(ConfigError, match=r"gateway\.listen: 1 mistake\n  - [^\n]* host:port$"):
        await Ingress(make_config(listen=listen), FakeService(), SystemClock()).start()


async def test_stopping_lets_calls_end_and_refuses_new_ones() -> None:
    service, release = FakeService(), asyncio.Event()

    async def wait(step: Step) -> Payload:
        await release.wait()
        return step.input

    service.on_execute = wait
    ingress = Ingress(make_config(), service, SystemClock())
    port = await ingress.start()
    async with stub_for(port) as stub:
        call = stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=AS_ALICE)
        await service.started.wait()
        stopping = asyncio.create_task(ingress.stop(60))
        await asyncio.wait({stopping}, timeout=0)
        release.set()
        assert (await call).result.step_id == service.steps[0].id
        await stopping
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=AS_ALICE)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await ingress.stop(0)


async def test_a_result_that_is_no_object_is_content_even_for_struct() -> None:
    service = FakeService()

    async def listing(step: Step) -> Payload:
        return Payload(b"[1]")

    service.on_execute = listing
    async with serving(service) as port, stub_for(port) as stub:
        step = pb.Step(kind=pb.KIND_TOOL, target="echo", input=pb.Payload(json=struct_pb2.Struct()))
        answer = await stub.Execute(pb.ExecuteRequest(step=step), metadata=AS_ALICE)
    assert answer.result.output.content.data == b"[1]"
