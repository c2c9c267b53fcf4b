"""The RPCs for runs, through a real server: what the service gets, what the client gets, what is refused."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import pytest
from fake_runs import PLACED, SOURCE, FakeRuns, ended, make_config, never, serving, spec, started, told
from fake_service import ALICE, BOB, ECHO, FakeService, json_step, stub_for
from google.protobuf import struct_pb2
from test_ingress import AS_ALICE, TRACE, refused

from gateway.clock import SystemClock
from gateway.edge import servicer
from gateway.edge.program_proto import program_to_proto
from gateway.edge.run_intake import RunIntake
from gateway.errors import Expired, InvalidStep, Rejected, StepFailed
from gateway.program.parse import load_text
from gateway.run_types import RUN_EVENT, RunOrder, StepEnded, StepToken
from gateway.types import Completed, EventKind, Kind, Lane, Payload, StepEvent, Target
from nearloop.v1 import gateway_pb2 as pb

UNARY = ("SubmitRun", "CancelRun", "GetRun", "PlaceRun")
STREAMS = ("Run", "WatchRun")


async def events_of(call: Any) -> list[pb.RunEvent]:
    return [answer.event async for answer in call]


async def run(stub: Any, message: pb.RunSpec, **more: Any) -> list[pb.RunEvent]:
    return await events_of(stub.Run(pb.RunRequest(run=message, **more), metadata=AS_ALICE))


# --- what the service gets ---


async def test_an_order_arrives_whole() -> None:
    runs = FakeRuns()
    more = {"regions": ["iad", "home", "iad"], "allow": ["tool.echo", "tool.docs"], "tokens": True, "speculate": 16}
    message = spec(lane=pb.LANE_BATCH, idempotency_key="key_1", region="near", **more)
    message.timeout.seconds = 7
    async with serving(runs) as port, stub_for(port) as stub:
        before = SystemClock().wall_s()
        metadata = (("x-api-key", BOB), ("traceparent", TRACE), ("tracestate", "a=1"))
        await stub.SubmitRun(pb.SubmitRunRequest(run=message), metadata=metadata)
    (order,) = runs.orders
    assert (order.id, order.tenant, order.lane, order.idempotency_key, order.client_region) == ("", "bob", Lane.BATCH, "key_1", "near")
    assert (order.regions, order.allow) == (("iad", "home"), ("tool.echo", "tool.docs"))
    assert (order.tokens, order.speculate, order.traceparent, order.tracestate) == (True, 16, TRACE, "a=1")
    assert order.program == load_text(SOURCE, "x.yaml")
    assert load_text(order.document.decode(), "x.json") == order.program
    assert order.input == {"name": "x"}
    assert before + 7 <= order.deadline_s <= SystemClock().wall_s() + 7


async def test_a_program_is_the_same_in_every_form() -> None:
    runs = FakeRuns()
    program = load_text(SOURCE, "x.yaml")
    forms = [spec(), spec(input="{}"), pb.RunSpec(program=program_to_proto(program)), pb.RunSpec(source=" \n" + json.dumps(_plain(SOURCE)))]
    async with serving(runs) as port, stub_for(port) as stub:
        for form in forms:
            await stub.SubmitRun(pb.SubmitRunRequest(run=form), metadata=AS_ALICE)
    assert [order.program for order in runs.orders] == [program] * 4
    assert len({order.document for order in runs.orders}) == 1
    assert runs.orders[0].program is runs.orders[1].program, "it is read once"
    assert [order.input for order in runs.orders[1:]] == [{}, {}, {}]


def _plain(source: str) -> Any:
    from gateway.program.dump import dump_program

    return dump_program(load_text(source, "x.yaml"))


@pytest.mark.parametrize("text", ["null", "[1,2.5]", '"ü"', "1152921504606846977", "true"])
async def test_any_json_is_an_input(text: str) -> None:
    runs = FakeRuns()
    source = "program: nearloop/v1\nname: any\nsteps: [{id: a, tool: echo, input: {}}]"
    async with serving(runs) as port, stub_for(port) as stub:
        await stub.PlaceRun(pb.PlaceRunRequest(run=spec(source, text)), metadata=AS_ALICE)
        holder: Any = struct_pb2.ListValue()
        holder.extend([json.loads(text)])
        await stub.PlaceRun(
            pb.PlaceRunRequest(run=pb.RunSpec(source=source, input=pb.JsonValue(value=holder.values[0]))), metadata=AS_ALICE
        )
    assert runs.orders[0].input == json.loads(text)
    assert runs.orders[1].input == pytest.approx(json.loads(text)) if text[0].isdigit() else runs.orders[1].input == json.loads(text)


class _Noon:
    def now_s(self) -> float:
        return 5.0

    def wall_s(self) -> float:
        return 1000.0


@pytest.mark.parametrize(
    ("timeout_s", "rpc_s", "bound_s"), [(None, None, 60), (None, 20.5, 20.5), (None, 90, 60), (20, 5, 20), (20, None, 20), (60, None, 60)]
)
async def test_the_deadline_is_the_timeout_else_the_calls_else_the_limit(
    timeout_s: int | None, rpc_s: float | None, bound_s: float
) -> None:
    intake = RunIntake(make_config(max_timeout_s=60), FakeService(), _Noon())
    message = spec()
    if timeout_s is not None:
        message.timeout.seconds = timeout_s
    assert (await intake.order(message, "alice", (), rpc_s)).deadline_s == 1000 + bound_s


async def test_a_deadline_that_has_passed_is_not_started() -> None:
    intake = RunIntake(make_config(), FakeService(), _Noon())
    with pytest.raises(Expired):
        await intake.order(spec(), "alice", (), 0.0)


async def test_the_deadline_of_the_call_bounds_the_run() -> None:
    runs = FakeRuns()
    async with serving(runs) as port, stub_for(port) as stub:
        await events_of(stub.Run(pb.RunRequest(run=spec()), metadata=AS_ALICE, timeout=10))
        await stub.SubmitRun(pb.SubmitRunRequest(run=spec()), metadata=AS_ALICE, timeout=10)
    assert runs.orders[0].deadline_s < SystemClock().wall_s() + 11
    assert runs.orders[1].deadline_s > SystemClock().wall_s() + 3000, "nobody waits for it: the call's deadline is not its own"


# --- what the client gets ---


async def test_a_run_is_told_from_its_acceptance_to_its_result() -> None:
    runs = FakeRuns()
    async with serving(runs) as port, stub_for(port) as stub:
        events = await run(stub, spec())
    assert [event.WhichOneof("value") for event in events] == (
        "accepted started step_started step_ended step_started step_ended token token step_ended summary result".split()
    )
    assert [event.sequence for event in events] == list(range(11))
    assert [event.attempt for event in events] == [0, *[1] * 10]
    accepted = events[0].accepted
    assert (accepted.id, accepted.state, accepted.program, accepted.region) == (next(iter(runs.runs)), pb.JOB_STATE_QUEUED, "greet", "iad")
    assert accepted.create_time.ToSeconds() == 1000
    assert [(one.region, one.HasField("dead_time")) for one in accepted.placement.estimates] == [
        ("iad", True),
        ("home", True),
        ("fra", False),
    ]
    assert events[1].started == pb.Started(region="iad", worker="run-1")
    assert events[2].step_started == pb.RunStepStarted(key="look", node="look", kind=pb.KIND_TOOL, target="docs", attempt=1)
    done = events[3].step_ended
    assert (done.output.value.struct_value["n"], done.region, done.worker, done.took_us) == (1, "iad", "tool-1", 2100)
    failed = events[5].step_ended
    assert (failed.attempt, failed.failure) == (2, pb.Failure(code=14, reason="DOWN", message="is down"))
    assert not failed.HasField("output")
    assert events[6].token == pb.RunToken(key="think", text="Hel")
    assert (events[8].step_ended.size_bytes, events[8].step_ended.replayed, events[8].step_ended.speculated) == (70_000, True, True)
    assert events[9].summary == pb.RunSummary(
        region="iad", runner="run-1", steps=3, cost=2.5, tokens=40, waited_us=4000, saved_us=156_000, guesses=2, wrong_guesses=1
    )
    assert (events[10].result.output.value.struct_value["text"], events[10].result.region, events[10].result.worker) == (
        "hello",
        "iad",
        "run-1",
    )


async def test_text_keeps_every_number() -> None:
    async with serving(FakeRuns()) as port, stub_for(port) as stub:
        events = await run(stub, spec(), json_text=True)
    assert json.loads(events[3].step_ended.output.text) == {"n": 1, "big": 2**60}
    assert events[10].result.output.text == '{"text":"hello","big":1152921504606846976}'


@pytest.mark.parametrize(("output", "form"), [("[" * 30 + "]" * 30, "value"), ("[" * 31 + "]" * 31, "text"), ("1" + "0" * 310, "text")])
async def test_what_a_value_cannot_hold_is_text(output: str, form: str) -> None:
    runs = FakeRuns()

    async def act(order: RunOrder) -> AsyncGenerator[StepEvent | Completed, None]:
        yield ended(output.encode())

    runs.on_run = act
    async with serving(runs) as port, stub_for(port) as stub:
        events = await run(stub, spec())
    assert events[-1].result.output.WhichOneof("form") == form


async def test_the_deepest_objects_that_are_values_can_be_read() -> None:
    runs = FakeRuns()

    async def act(order: RunOrder) -> AsyncGenerator[StepEvent | Completed, None]:
        yield ended(b'{"a":' * 30 + b"1" + b"}" * 30)

    runs.on_run = act
    async with serving(runs) as port, stub_for(port) as stub:
        events = await run(stub, spec())
    assert events[-1].result.output.WhichOneof("form") == "value"


async def test_events_that_are_not_for_clients_or_not_known_are_left_out() -> None:
    runs = FakeRuns()

    async def act(order: RunOrder) -> AsyncGenerator[StepEvent | Completed, None]:
        yield StepEvent("s", EventKind.TOKEN, 1, 1, payload=Payload(b'{"type":"of the future"}', RUN_EVENT))
        yield StepEvent("s", EventKind.TOKEN, 1, 2, payload=Payload(b"1"))
        yield StepEvent("s", EventKind.PROGRESS, 1, 3, fraction=0.5)
        yield told(4, StepToken("a", "b"))
        yield ended(b"null")

    runs.on_run = act
    async with serving(runs) as port, stub_for(port) as stub:
        events = await run(stub, spec())
    assert [(event.WhichOneof("value"), event.sequence) for event in events] == [("accepted", 0), ("token", 4), ("result", 5)]


async def test_runs_are_submitted_found_and_cancelled() -> None:
    runs = FakeRuns()
    async with serving(runs) as port, stub_for(port) as stub:
        request = pb.SubmitRunRequest(run=spec(idempotency_key="k"))
        first = await stub.SubmitRun(request, metadata=AS_ALICE)
        again = await stub.SubmitRun(request, metadata=AS_ALICE)
        assert (first.created, again.created, first.run) == (True, False, again.run)
        runs.end(first.run.id, b'{"n":1}')
        found = (await stub.GetRun(pb.GetRunRequest(run_id=first.run.id), metadata=AS_ALICE)).run
        assert (found.state, found.result.output.value.struct_value["n"]) == (pb.JOB_STATE_DONE, 1)
        assert [(step.key, step.WhichOneof("outcome")) for step in found.steps] == [("look", "output"), ("each/0/say", "size_bytes")]
        as_text = (await stub.GetRun(pb.GetRunRequest(run_id=first.run.id, json_text=True), metadata=AS_ALICE)).run
        assert as_text.steps[0].output.text == '{"n":1152921504606846976}'
        gone = (await stub.CancelRun(pb.CancelRunRequest(run_id=first.run.id), metadata=AS_ALICE)).run
        assert (gone.state, gone.failure) == (
            pb.JOB_STATE_CANCELLED,
            pb.Failure(code=1, reason="CANCELLED", message="cancelled by request"),
        )
        missing = await refused(stub.GetRun(pb.GetRunRequest(run_id="home-x"), metadata=(("x-api-key", BOB),)))
        assert (missing.code, missing.reason) == ("NOT_FOUND", "RUN_NOT_FOUND")
    assert runs.calls[-1] == ("get", "bob", "home-x")


async def test_placement() -> None:
    runs = FakeRuns()
    async with serving(runs) as port, stub_for(port) as stub:
        placement = (await stub.PlaceRun(pb.PlaceRunRequest(run=spec(regions=["iad"])), metadata=AS_ALICE)).placement
    assert runs.orders[0].regions == ("iad",)
    assert placement.region == "iad"
    assert placement.estimates[0].dead_time.ToMilliseconds() == 4
    assert list(placement.estimates[0].why) == list(PLACED.estimates[0].why)
    assert placement.estimates[2].excluded == "no runner lives there"


# --- what is refused ---


def source(steps: str = "[{id: a, tool: echo, input: {}}]", more: str = "") -> str:
    return f"program: nearloop/v1\nname: p\nsteps: {steps}\n{more}"


def big(text: str) -> str:
    return source(more=f"description: '{text}'")


REFUSALS = [
    (pb.RunSpec(), "run.source", "missing"),
    (spec("steps: ["), "run.source", "at line 1, column 9"),
    (spec('{"program": 1,}'), "run.source", "is not JSON: "),
    (spec(""), "run.source", "must be a mapping"),
    (spec(big("x" * 300_000)), "run.source", "the limit is 262144"),
    (spec(source('[{id: a, tool: echo, input: {t: "${steps.b.output}"}}]')), "run.source.steps[0].input.t", "there is no step `b`"),
    (spec(source("[{id: a, tool: ecko, input: {}}]")), "run.source.steps[0].tool", "did you mean `tool.echo`?"),
    (spec(source("[{id: a, tool: docs, input: {}}]")), "run.source.steps[0].input", "must have `name`"),
    (spec(source(more="input: {type: strange}")), "run.source.input", "is not a JSON Schema"),
    (spec(source(more="input: {$ref: 'http://127.0.0.1:1/x'}")), "run.source.input", "is not a JSON Schema"),
    (spec(source(more="regions: [hom]")), "run.source.regions[0]", "did you mean `home`?"),
    (
        spec(json.dumps({"program": "nearloop/v1", "name": "p", "steps": [{"id": "a", "tool": "echo", "input": "\ud800"}]})),
        "run.source",
        "Unicode",
    ),
    (spec(input="{"), "run.input", "is not JSON"),
    (spec(input='{"name": 1}'), "run.input.name", 'is not of type "string"'),
    (spec(input='{"nom": "x"}'), "run.input", "'nom'"),
    (spec(input='{"name": "' + "x" * 2000 + '"}'), "run.input", "more than 1024 bytes"),
    (spec(input='{"name": "' + "ü" * 600 + '"}'), "run.input", "the limit is 1024"),
    (spec(input="[" * 65 + "]" * 65), "run.input", "nests more than 64 deep"),
    (spec(input="[" * 500), "run.input", "is not JSON"),
    (spec(input="NaN"), "run.input", "NaN is not allowed"),
    (spec(input=r'"\ud800"'), "run.input", "Unicode"),
    (pb.RunSpec(source=SOURCE, input=pb.JsonValue(value=struct_pb2.Value(number_value=float("inf")))), "run.input", "not finite"),
    (spec(lane=9), "run.lane", "9 is not a lane"),
    (spec(idempotency_key="a b"), "run.idempotency_key", "is not an id"),
    (spec(region="a.b"), "run.region", "is not an id"),
    (spec(speculate=17), "run.speculate", "at most 16"),
    (spec(regions=["iad", "hom"]), "run.regions[1]", "did you mean `home`?"),
    (spec(source(more="regions: [iad]"), "{}", regions=["home"]), "run.regions", "must not leave iad"),
    (spec(allow=["tool.echo"]), "run.allow", "the program calls tool.docs"),
    (spec(allow=["tool.echo", "tool.docs", "docs"]), "run.allow[2]", "such as tool.fetch"),
    (spec(allow=["run.program"]), "run.allow[0]", "such as tool.fetch"),
    (spec(allow=["tool.*"]), "run.allow[0]", "such as tool.fetch"),
    (spec(allow=[f"tool.t{i}" for i in range(1001)]), "run.allow", "the limit is 1000"),
]


@pytest.mark.parametrize(("message", "field", "part"), REFUSALS)
async def test_a_wrong_order_is_refused_with_its_field(message: pb.RunSpec, field: str, part: str) -> None:
    runs = FakeRuns()
    async with (
        serving(runs, anonymous="guest", max_input_bytes=1024 if field == "run.input" else 1024 * 1024) as port,
        stub_for(port) as stub,
    ):
        error = await refused(stub.SubmitRun(pb.SubmitRunRequest(run=message)))
        streamed = await refused(events_of(stub.Run(pb.RunRequest(run=message))))
    assert isinstance(error, InvalidStep)
    assert any(name == field and part in text for name, text in error.fields), error.fields
    assert getattr(streamed, "fields", None) == error.fields
    assert runs.orders == []


async def test_paths_in_messages_are_those_of_the_message() -> None:
    program = load_text(SOURCE, "x.yaml")
    message = program_to_proto(program)
    message.steps[1].call.tool = "ecko"
    message.steps[0].call.input.struct_value.fields["name"].string_value = "${steps.nothing.output}"
    async with serving(FakeRuns()) as port, stub_for(port) as stub:
        error = await refused(stub.PlaceRun(pb.PlaceRunRequest(run=pb.RunSpec(program=message)), metadata=AS_ALICE))
        message.steps[1].id = "1"
        unread = await refused(stub.PlaceRun(pb.PlaceRunRequest(run=pb.RunSpec(program=message)), metadata=AS_ALICE))
    assert isinstance(error, InvalidStep)
    assert [name for name, _ in error.fields] == ["run.program.steps[0].call.input.name", "run.program.steps[1].call.tool"]
    assert isinstance(unread, InvalidStep)
    assert [name for name, _ in unread.fields] == ["run.program.steps[1].id"]


async def test_all_problems_come_at_once() -> None:
    runs = FakeRuns()
    message = spec(
        source("[{id: a, tool: ecko, input: {}}]"),
        "{",
        lane=9,
        idempotency_key="a b",
        region="\n",
        speculate=99,
        regions=["x"],
        allow=["y"],
    )
    message.timeout.seconds = -1
    async with serving(runs) as port, stub_for(port) as stub:
        error = await refused(stub.SubmitRun(pb.SubmitRunRequest(run=message), metadata=AS_ALICE))
    assert isinstance(error, InvalidStep)
    short = ["lane", "idempotency_key", "region", "speculate", "timeout", "input", "source.steps[0].tool", "allow[0]", "regions[0]"]
    assert [name for name, _ in error.fields] == [f"run.{name}" for name in short]
    assert runs.orders == []


async def test_timeouts_must_be_positive_and_within_the_limit() -> None:
    async with serving(FakeRuns(), max_timeout_s=60) as port, stub_for(port) as stub:
        for seconds, part in ((0, "must be positive"), (-5, "must be positive"), (61, "at most 60 s")):
            message = spec()
            message.timeout.FromSeconds(seconds)
            error = await refused(stub.SubmitRun(pb.SubmitRunRequest(run=message), metadata=AS_ALICE))
            assert part in dict(getattr(error, "fields"))["run.timeout"]  # noqa: B009 - InvalidStep has it, its base has not


async def test_a_program_is_checked_again_when_a_target_changes() -> None:
    service, runs = FakeService(), FakeRuns()
    request = pb.SubmitRunRequest(run=spec(source("[{id: a, tool: new, input: {}}]")))
    async with serving(runs, service) as port, stub_for(port) as stub:
        for _ in range(2):
            error = await refused(stub.SubmitRun(request, metadata=AS_ALICE))
            assert "there is no target tool.new" in error.message
        service.known[Kind.TOOL, "new"] = Target(Kind.TOOL, "new")
        await stub.SubmitRun(request, metadata=AS_ALICE)
        service.known[Kind.TOOL, "new"] = Target(Kind.TOOL, "new", input_schema={"type": "object", "required": ["n"]})
        error = await refused(stub.SubmitRun(request, metadata=AS_ALICE))
        assert "must have `n`" in error.message
    assert len(runs.orders) == 1


async def test_a_run_is_not_a_step() -> None:
    service = FakeService()
    service.known[Kind.RUN, "program"] = Target(Kind.RUN, "program")
    step = json_step(target="program")
    step.kind = pb.KIND_RUN
    async with serving(FakeRuns(), service) as port, stub_for(port) as stub:
        calls = [
            stub.Execute(pb.ExecuteRequest(step=step), metadata=AS_ALICE),
            stub.Submit(pb.SubmitRequest(step=step), metadata=AS_ALICE),
            events_of(stub.ExecuteStream(pb.ExecuteStreamRequest(step=step), metadata=AS_ALICE)),
        ]
        for call in calls:
            error = await refused(call)
            assert isinstance(error, InvalidStep)
            assert error.fields == (("step.kind", "a run is not a step: ask for it with the RPC Run, SubmitRun or PlaceRun"),)
        session = stub.Session(metadata=AS_ALICE)
        assert (await session.read()).credits > 0
        await session.write(pb.SessionRequest(step=pb.SessionStep(tag=1, step=step)))
        answer = await session.read()
        while answer.WhichOneof("value") is None:
            answer = await session.read()
        assert "with the RPC Run" in answer.failure.violations[0].description
        session.cancel()
    assert service.steps == []


@pytest.mark.parametrize("method", [*UNARY, *STREAMS])
async def test_every_method_needs_a_known_key_a_service_and_a_request(method: str) -> None:
    async def call(port: int, metadata: Any) -> Any:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            path = f"/nearloop.v1.Gateway/{method}"
            if method in UNARY:
                return await refused(channel.unary_unary(path)(b"\xff\xff", metadata=metadata))
            return await refused(_drained(channel.unary_stream(path)(b"\xff\xff", metadata=metadata)))

    async with serving(FakeRuns()) as port:
        assert (await call(port, ())).code == "UNAUTHENTICATED"
        malformed = await call(port, AS_ALICE)
        assert (malformed.code, malformed.reason) == ("INVALID_ARGUMENT", "MALFORMED_REQUEST")
    async with serving(None) as port:
        assert (await call(port, ())).code == "UNAUTHENTICATED"
        none = await call(port, AS_ALICE)
        assert (none.code, none.reason) == ("UNIMPLEMENTED", "RUNS_NOT_OFFERED")


async def _drained(call: Any) -> list[bytes]:
    return [answer async for answer in call]


@pytest.mark.parametrize("run_id", ["", "a.b", "*"])
async def test_what_is_no_id_is_refused(run_id: str) -> None:
    runs = FakeRuns()
    async with serving(runs) as port, stub_for(port) as stub:
        for call in (
            stub.GetRun(pb.GetRunRequest(run_id=run_id), metadata=AS_ALICE),
            stub.CancelRun(pb.CancelRunRequest(run_id=run_id), metadata=AS_ALICE),
            events_of(stub.WatchRun(pb.WatchRunRequest(run_id=run_id), metadata=AS_ALICE)),
        ):
            error = await refused(call)
            assert isinstance(error, InvalidStep)
            assert error.fields[0][0] == "run_id"
    assert runs.calls == []


async def test_calls_beyond_the_limit_are_refused() -> None:
    runs = FakeRuns()
    runs.on_run = never
    async with serving(runs, max_in_flight=1) as port, stub_for(port) as stub:
        first = stub.Run(pb.RunRequest(run=spec()), metadata=AS_ALICE)
        assert (await first.read()).event.HasField("accepted")
        for call in (
            stub.GetRun(pb.GetRunRequest(run_id="home-1"), metadata=AS_ALICE),
            events_of(stub.Run(pb.RunRequest(run=spec()), metadata=AS_ALICE)),
        ):
            assert (await refused(call)).reason == "TOO_MANY_IN_FLIGHT"
        first.cancel()
        await runs.closed.wait()
        while True:  # the place is given back a moment after the stream was closed
            try:
                await stub.PlaceRun(pb.PlaceRunRequest(run=spec()), metadata=AS_ALICE)
                break
            except grpc.aio.AioRpcError as error:
                assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


# --- errors, cancellation, slow readers ---


@pytest.mark.parametrize("method", STREAMS)
async def test_an_error_in_mid_stream_ends_it_with_its_details(method: str) -> None:
    runs = FakeRuns()

    async def breaks(*asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        yield told(1, StepEnded("a", "a", output=1))
        raise StepFailed("no page", code="NOT_FOUND", reason="TOOL_ERROR")

    runs.on_run = runs.on_watch = breaks
    async with serving(runs) as port, stub_for(port) as stub:
        if method == "Run":
            call = stub.Run(pb.RunRequest(run=spec()), metadata=AS_ALICE)
            assert (await call.read()).event.HasField("accepted")
        else:
            call = stub.WatchRun(pb.WatchRunRequest(run_id="home-1", after_sequence=3, attempt=2), metadata=AS_ALICE)
        assert (await call.read()).event.step_ended.key == "a"
        error = await refused(call.read())
    assert isinstance(error, StepFailed)
    assert (error.code, error.reason) == ("NOT_FOUND", "TOOL_ERROR")
    assert runs.closed.is_set()
    if method == "WatchRun":
        assert runs.calls == [("watch", "alice", "home-1", 2, 3)]


async def test_a_refusal_of_the_service_keeps_its_details() -> None:
    runs = FakeRuns()

    def full(order: RunOrder) -> None:
        raise Rejected("full", reason="QUEUE_FULL", scope="run.program", policy="fixed_limit", retry_after_s=2.5)

    runs.on_order = full
    async with serving(runs) as port, stub_for(port) as stub:
        for call in (
            stub.SubmitRun(pb.SubmitRunRequest(run=spec()), metadata=AS_ALICE),
            events_of(stub.Run(pb.RunRequest(run=spec()), metadata=AS_ALICE)),
        ):
            error = await refused(call)
            assert (error.reason, error.scope, error.policy, error.retry_after_s) == ("QUEUE_FULL", "run.program", "fixed_limit", 2.5)


@pytest.mark.parametrize("by_deadline", [True, False])
async def test_a_client_that_goes_away_closes_the_stream_and_no_more(by_deadline: bool) -> None:
    runs = FakeRuns()
    runs.on_run = never
    async with serving(runs) as port, stub_for(port) as stub:
        message = spec()
        message.timeout.seconds = 600
        call = stub.Run(pb.RunRequest(run=message), metadata=AS_ALICE, timeout=0.3 if by_deadline else None)
        assert (await call.read()).event.HasField("accepted")
        if not by_deadline:
            call.cancel()
        await runs.closed.wait()
        assert await call.code() is (grpc.StatusCode.DEADLINE_EXCEEDED if by_deadline else grpc.StatusCode.CANCELLED)
        (run_id,) = runs.runs
        found = await stub.GetRun(pb.GetRunRequest(run_id=run_id), metadata=AS_ALICE)
    assert found.run.state == pb.JOB_STATE_QUEUED
    assert not any(call[0] == "cancel" for call in runs.calls)
    assert runs.orders[0].deadline_s > SystemClock().wall_s() + 500


async def test_a_reader_that_stalls_loses_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servicer, "WRITE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(servicer, "GIVE_UP_TIMEOUT_S", 0.1)
    runs = FakeRuns()

    async def floods(order: RunOrder) -> AsyncGenerator[StepEvent | Completed, None]:
        sequence = 0
        while True:
            sequence += 1
            yield told(sequence, StepToken("a", "x" * 1_000_000))

    runs.on_run = floods
    async with serving(runs) as port, stub_for(port) as stub:
        call = stub.Run(pb.RunRequest(run=spec()), metadata=AS_ALICE)
        await runs.closed.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await events_of(call)
    assert caught.value.code() is grpc.StatusCode.ABORTED


@pytest.mark.parametrize("chatty", [False, True])
async def test_a_watch_has_a_longest_life(chatty: bool) -> None:
    runs = FakeRuns()

    async def endless(attempt: int, after: int) -> AsyncGenerator[StepEvent | Completed, None]:
        sequence = 0
        while chatty:
            sequence += 1
            yield started(sequence)
        await asyncio.Event().wait()

    runs.on_watch = endless
    async with serving(runs, max_timeout_s=0.1) as port, stub_for(port) as stub:
        error = await refused(events_of(stub.WatchRun(pb.WatchRunRequest(run_id="home-1"), metadata=AS_ALICE)))
    assert (error.code, error.reason, error.retry_after_s) == ("UNAVAILABLE", "WATCH_AGAIN", 0)
    assert runs.closed.is_set()


def test_the_fakes_key_is_known() -> None:
    assert (ALICE, ECHO.name) == (AS_ALICE[0][1], "echo")
