"""The Session RPC: credits, answers, and what a client can do wrong."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from fake_service import ALICE, BOB, FakeService, json_step, make_config, token
from test_kernel import HandWorker

from gateway.clock import SystemClock
from gateway.config import parse
from gateway.edge import servicer, session, sessions, status
from gateway.edge.dial import CHANNEL_OPTIONS
from gateway.edge.ingress import Ingress
from gateway.edge.session_values import failure_from_proto
from gateway.errors import Cancelled, InvalidStep, NearloopError, NotFound, Rejected, StepFailed, Unavailable
from gateway.ports import StepService
from gateway.testing import MemoryBus, make_kernel
from gateway.types import Completed, Payload, Step, StepEvent
from nearloop.v1 import gateway_pb2 as pb
from nearloop.v1.gateway_pb2_grpc import GatewayStub

WINDOW = 4  # of the fake service


class Rig:
    """A gateway with what is inside, and a stub for it."""

    def __init__(self, ingress: Ingress, stub: Any) -> None:
        self.ingress, self.stub = ingress, stub

    @property
    def inside(self) -> sessions.Sessions:
        return self.ingress._servicer._sessions

    @property
    def in_flight(self) -> int:
        return self.ingress._servicer.load.count

    async def session(self, key: str = ALICE, timeout_s: float | None = None) -> "Raw":
        raw = Raw(self.stub.Session(metadata=(("x-api-key", key),), timeout=timeout_s))
        await raw.read()
        return raw


class Raw:
    """A session by hand."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.credits = 0

    async def step(self, tag: int, step: pb.Step | None = None, events: bool = False) -> None:
        await self.call.write(pb.SessionRequest(step=pb.SessionStep(tag=tag, step=step or json_step(), events=events)))

    async def cancel(self, tag: int) -> None:
        await self.call.write(pb.SessionRequest(cancel=pb.SessionCancel(tag=tag)))

    async def read(self) -> pb.SessionResponse:
        response = await self.call.read()
        assert isinstance(response, pb.SessionResponse)
        assert response.credits == 0 or response.credits > self.credits
        self.credits = response.credits or self.credits
        return response

    async def answer(self) -> tuple[int, pb.Result | NearloopError]:
        """The next answer, with its tag."""
        while True:
            response = await self.read()
            if response.HasField("result"):
                return response.result.tag, response.result.result
            if response.HasField("failure"):
                return response.failure.tag, failure_from_proto(response.failure)

    async def failure(self, tag: int) -> NearloopError:
        answered, error = await self.answer()
        assert answered == tag
        assert isinstance(error, NearloopError)
        return error

    async def rest(self) -> None:
        """Reads to the end, which is an error."""
        while True:
            await self.read()

    async def end(self) -> NearloopError | None:
        """How it ended; there must be no answer any more."""
        try:
            while (response := await self.call.read()) is not grpc.aio.EOF:
                assert response.WhichOneof("value") is None
        except grpc.aio.AioRpcError as error:
            return status.from_status(error.code(), error.details() or "", error.trailing_metadata())
        return None


@asynccontextmanager
async def rig(service: StepService, **gateway: Any) -> AsyncIterator[Rig]:
    ingress = Ingress(make_config(**gateway), service, SystemClock())
    port = await ingress.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=CHANNEL_OPTIONS) as channel:
            yield Rig(ingress, GatewayStub(channel))
    finally:
        await ingress.stop(0)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def blocking(service: FakeService) -> asyncio.Event:
    """Steps wait until the event is set."""
    release = asyncio.Event()

    async def wait(step: Step) -> Payload:
        await release.wait()
        return step.input

    service.on_execute = wait
    return release


# --- credits ---


async def test_credits_come_first_and_bound_what_is_outstanding() -> None:
    service = FakeService()
    async with rig(service) as r:
        raw = await r.session()
        assert raw.credits == WINDOW
        answered: list[int] = []
        sent = 0
        while len(answered) < 50:
            while sent < min(raw.credits, 50):
                sent += 1
                await raw.step(sent, json_step(b"%d" % sent))
            tag, result = await raw.answer()
            assert isinstance(result, pb.Result)
            assert result.output.content.data == b"%d" % tag
            answered.append(tag)
            assert raw.credits <= len(answered) + WINDOW
        assert sorted(answered) == list(range(1, 51))
        await until(lambda: r.in_flight == 0)
        await raw.call.done_writing()
        assert await raw.end() is None
    assert max(outstanding for *_, outstanding in service.windows) <= WINDOW
    assert {(tenant, sessions) for tenant, sessions, *_ in service.windows} == {("alice", 1)}


async def test_a_step_beyond_the_credits_is_told_and_not_executed() -> None:
    service = FakeService()
    release = blocking(service)
    async with rig(service) as r:
        raw = await r.session()
        for tag in range(1, WINDOW + 3):
            await raw.step(tag)
        for tag in (WINDOW + 1, WINDOW + 2):
            error = await raw.failure(tag)
            assert isinstance(error, Rejected)
            assert (error.reason, error.scope) == ("CREDITS_EXCEEDED", "session")
        release.set()
        assert {(await raw.answer())[0] for _ in range(WINDOW)} == set(range(1, WINDOW + 1))
        assert len(service.steps) == WINDOW
        await raw.step(WINDOW + 3)
        assert (await raw.answer())[0] == WINDOW + 3


async def test_who_goes_on_overdrawing_loses_the_session(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "MAX_OVERDRAWN", 3)
    service = FakeService()
    release = blocking(service)
    async with rig(service) as r:
        raw = await r.session()
        for tag in range(1, WINDOW + 5):
            await raw.step(tag)
        for tag in range(WINDOW + 1, WINDOW + 4):
            assert (await raw.failure(tag)).reason == "CREDITS_EXCEEDED"
        release.set()
        assert {(await raw.answer())[0] for _ in range(WINDOW)} == set(range(1, WINDOW + 1))
        error = await raw.end()
        assert error is not None
        assert (error.code, error.reason) == ("RESOURCE_EXHAUSTED", "CREDITS_EXCEEDED")


async def test_credits_are_never_taken_back_when_the_window_shrinks() -> None:
    service = FakeService()
    async with rig(service) as r:
        raw = await r.session()
        service.on_window = lambda outstanding: 1
        for tag in range(1, WINDOW + 1):
            await raw.step(tag)
        for _ in range(WINDOW):
            await raw.answer()
        if raw.credits == WINDOW:
            await raw.read()
        assert raw.credits == WINDOW + 1


async def test_a_larger_window_reaches_a_session_that_has_none_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "LOOK_EVERY_S", 0.01)
    service = FakeService()
    release = blocking(service)
    async with rig(service) as r:
        raw = await r.session()
        for tag in range(1, WINDOW + 1):
            await raw.step(tag)
        service.on_window = lambda outstanding: 9
        await raw.read()
        assert raw.credits == 9
        release.set()


async def test_idle_sessions_do_not_count_for_the_others() -> None:
    service = FakeService()
    async with rig(service) as r:
        idle, busy = await r.session(), await r.session(BOB)
        now_s = asyncio.get_running_loop().time()
        assert r.inside._granted == 2 * WINDOW
        r.inside._look(now_s + sessions.IDLE_S + 1)
        assert r.inside._granted == 0
        await busy.step(1)
        await busy.answer()
        await until(lambda: r.inside._granted == WINDOW)
        assert service.windows[-1][:3] == ("bob", 2, 1)
        for raw in (idle, busy):
            await raw.call.done_writing()
            assert await raw.end() is None
        await until(lambda: r.inside._granted == 0)


# --- readers that stall ---


def large(service: FakeService) -> None:
    async def act(step: Step) -> Payload:
        return Payload(b"x" * 16_000_000, "text/plain")

    service.on_execute = act


async def test_a_stalled_reader_gets_no_credits_and_loses_nothing() -> None:
    service = FakeService()
    large(service)
    async with rig(service) as r:
        raw = await r.session()
        for tag in range(1, WINDOW + 1):
            await raw.step(tag)
        await until(lambda: len(service.steps) == WINDOW)
        (inside,) = r.inside._open
        await until(lambda: not inside._running and inside.write_began_s is not None)
        for _ in range(3):
            r.inside._look(asyncio.get_running_loop().time())
            assert inside.granted <= inside.written + WINDOW
            assert inside.outstanding >= WINDOW - 1  # gRPC takes the first answer at most
            assert r.in_flight == inside.outstanding
        assert {(await raw.answer())[0] for _ in range(WINDOW)} == set(range(1, WINDOW + 1))
        await raw.step(WINDOW + 1)
        assert (await raw.answer())[0] == WINDOW + 1


async def test_a_reader_that_stalls_for_too_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(servicer, "GIVE_UP_TIMEOUT_S", 0.1)
    service = FakeService()

    async def act(step: Step) -> Payload:
        if step.run == "endless":
            await asyncio.Event().wait()
        return Payload(b"x" * 16_000_000, "text/plain")

    service.on_execute = act
    async with rig(service, session_stall_s=0.2) as r:
        raw = await r.session()
        await raw.step(1, json_step(run="endless"))
        for tag in (2, 3, 4):
            await raw.step(tag)
        await service.cancelled.wait()
        await until(lambda: not r.inside._open)
        assert r.in_flight == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await raw.rest()
    assert caught.value.code() is grpc.StatusCode.ABORTED


async def test_events_of_a_stalled_reader_stay_where_they_come_from() -> None:
    service, made = FakeService(), 0

    async def flood(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        nonlocal made
        while True:
            made += 1
            yield token(made, b"x" * 4_000_000)

    service.on_stream = flood
    async with rig(service) as r:
        raw = await r.session()
        await raw.step(1, events=True)
        await service.started.wait()
        (inside,) = r.inside._open
        await until(lambda: inside.write_began_s is not None)
        assert len(inside._out) <= 1
        assert made <= 4
        raw.call.cancel()
        await service.closed.wait()


# --- steps ---


async def test_events_come_before_the_result_when_they_are_asked_for() -> None:
    service = FakeService()
    async with rig(service) as r:
        raw = await r.session()
        await raw.step(7, events=True)
        seen = []
        while True:
            response = await raw.read()
            if response.HasField("event"):
                assert response.event.tag == 7
                seen.append(response.event.event.WhichOneof("value"))
            elif response.HasField("result"):
                break
        assert seen == ["started", "token", "progress"]
        assert response.result.tag == 7
        assert service.steps[0].stream


async def test_every_step_is_checked_and_a_wrong_one_costs_only_itself() -> None:
    service = FakeService()

    async def fails(step: Step) -> Payload:
        if step.run == "fails":
            raise StepFailed("broken", code="UNAVAILABLE", reason="TOOL_DOWN")
        raise Rejected("full", reason="QUEUE_FULL", scope="tool.echo", policy="p", retry_after_s=2.5)

    service.on_execute = fails
    async with rig(service) as r:
        raw = await r.session()
        await raw.step(1, json_step(b"{}", "docs"))
        invalid = await raw.failure(1)
        assert isinstance(invalid, InvalidStep)
        assert '"name" is a required property' in dict(invalid.fields)["step.input"]
        await raw.step(2, json_step(target="ecko"))
        missing = await raw.failure(2)
        assert isinstance(missing, NotFound)
        assert (missing.reason, missing.scope) == ("UNKNOWN_TARGET", "tool.ecko")
        await raw.step(3)
        full = await raw.failure(3)
        assert isinstance(full, Rejected)
        assert (full.reason, full.scope, full.policy, full.retry_after_s) == ("QUEUE_FULL", "tool.echo", "p", 2.5)
        await raw.step(4, json_step(run="fails"))
        failed = await raw.failure(4)
        assert isinstance(failed, StepFailed)
        assert (failed.code, failed.reason) == ("UNAVAILABLE", "TOOL_DOWN")


async def test_an_unexpected_error_gives_an_id_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    service = FakeService()

    async def crash(step: Step) -> Payload:
        raise RuntimeError(step.input.data)

    service.on_execute = crash
    async with rig(service) as r:
        raw = await r.session()
        await raw.step(1, json_step(b'"SECRET"'))
        error = await raw.failure(1)
    assert error.code == "INTERNAL"
    assert "SECRET" not in error.message + caplog.text
    assert error.message.split()[2].rstrip(":") in caplog.text


async def test_cancel_ends_one_step_and_is_answered_once() -> None:
    service = FakeService()
    release = blocking(service)
    async with rig(service) as r:
        raw = await r.session()
        await raw.step(1)
        await service.started.wait()
        await raw.step(2)
        await raw.cancel(2)  # it may not even have begun
        await raw.cancel(99)
        assert isinstance(await raw.failure(2), Cancelled)
        release.set()
        assert (await raw.answer())[0] == 1
        await raw.cancel(1)
        await raw.step(3)
        assert (await raw.answer())[0] == 3
        await raw.call.done_writing()
        assert await raw.end() is None


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (pb.SessionRequest(step=pb.SessionStep(tag=0, step=json_step())), "WRONG_TAG"),
        (pb.SessionRequest(step=pb.SessionStep(tag=5, step=json_step())), "WRONG_TAG"),
        (pb.SessionRequest(step=pb.SessionStep(tag=4, step=json_step())), "WRONG_TAG"),
        (pb.SessionRequest(), "MALFORMED_REQUEST"),
        (b"\xff\xff", "MALFORMED_REQUEST"),
    ],
)
async def test_a_wrong_request_ends_the_session_after_its_answers(request_: Any, reason: str) -> None:
    service = FakeService()
    release = blocking(service)
    async with rig(service) as r:
        raw = await r.session()
        await raw.step(5)
        await service.started.wait()
        if isinstance(request_, bytes):
            raw.call._request_serializer = lambda data: data  # to send what no message is
        await raw.call.write(request_)
        (inside,) = r.inside._open
        await until(lambda: inside._closing)
        release.set()
        assert (await raw.answer())[0] == 5
        error = await raw.end()
        assert isinstance(error, InvalidStep)
        assert error.reason == reason
        assert len(service.steps) == 1


async def test_half_close_ends_with_all_answers() -> None:
    service = FakeService()
    release = blocking(service)
    async with rig(service) as r:
        raw = await r.session()
        await raw.step(1)
        await raw.step(2)
        await raw.call.done_writing()
        (inside,) = r.inside._open
        await until(lambda: inside._closing)
        release.set()
        assert {(await raw.answer())[0] for _ in range(2)} == {1, 2}
        assert await raw.end() is None


async def test_a_client_that_leaves_takes_its_steps_along() -> None:
    service = FakeService()
    blocking(service)
    async with rig(service) as r:
        raw = await r.session()
        await raw.step(1)
        await service.started.wait()
        raw.call.cancel()
        await service.cancelled.wait()
        await until(lambda: r.in_flight == 0 and r.inside._granted == 0 and not r.inside._open)


async def test_the_deadline_of_the_call_does_not_bound_a_step() -> None:
    service = FakeService()
    async with rig(service) as r:
        raw = await r.session(timeout_s=20)
        await raw.step(1)
        await raw.answer()
    assert service.steps[0].deadline_s > SystemClock().wall_s() + 25


# --- the gateway ---


async def test_outstanding_steps_count_among_those_in_flight() -> None:
    service = FakeService()
    release = blocking(service)
    async with rig(service, max_in_flight=2) as r:
        raw = await r.session()
        for tag in (1, 2, 3):
            await raw.step(tag)
        error = await raw.failure(3)
        assert (error.code, error.reason, error.scope) == ("RESOURCE_EXHAUSTED", "TOO_MANY_IN_FLIGHT", "gateway")
        with pytest.raises(grpc.aio.AioRpcError):
            await r.stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=(("x-api-key", ALICE),))
        release.set()
        await raw.answer()
        await raw.answer()
        await until(lambda: r.in_flight == 0)
        await r.stub.Execute(pb.ExecuteRequest(step=json_step()), metadata=(("x-api-key", ALICE),))


async def test_sessions_are_limited_for_all_and_for_each_tenant() -> None:
    async with rig(FakeService(), max_sessions=4) as r:
        first, second = await r.session(), await r.session()
        refused = await Raw(r.stub.Session(metadata=(("x-api-key", ALICE),))).end()
        assert isinstance(refused, Rejected)
        assert (refused.reason, refused.scope) == ("TOO_MANY_SESSIONS", "tenant:alice")
        await r.session(BOB)
        await r.session(BOB)
        refused = await Raw(r.stub.Session(metadata=(("x-api-key", BOB),))).end()
        assert refused is not None
        assert refused.scope == "gateway"
        await first.call.done_writing()
        assert await first.end() is None
        await r.session()
        second.call.cancel()


async def test_a_session_needs_a_known_key() -> None:
    async with rig(FakeService()) as r:
        for metadata in ((), (("x-api-key", "wrong-key"),)):
            error = await Raw(r.stub.Session(metadata=metadata)).end()
            assert error is not None
            assert error.code == "UNAUTHENTICATED"


async def test_a_gateway_that_drains_answers_what_is_in_flight() -> None:
    service = FakeService()
    release = blocking(service)
    async with rig(service) as r:
        raw, idle = await r.session(), await r.session()
        await raw.step(1)
        await service.started.wait()
        stopping = asyncio.create_task(r.ingress.stop(60))
        error = await idle.end()
        assert isinstance(error, Unavailable)
        assert error.reason == "GATEWAY_DRAINS"
        await raw.step(2)
        late = await raw.failure(2)
        assert isinstance(late, Unavailable)
        assert late.reason == "NOT_STORED"
        release.set()
        assert (await raw.answer())[0] == 1
        error = await raw.end()
        assert error is not None
        assert error.reason == "GATEWAY_DRAINS"
        assert raw.credits == WINDOW
        await stopping
    assert len(service.steps) == 1


# --- over the real kernel ---


@asynccontextmanager
async def real(policies: list[dict[str, Any]]) -> AsyncIterator[tuple[Rig, HandWorker]]:
    clock = SystemClock()
    bus = MemoryBus(parse({}), clock)
    kernel = make_kernel(bus, clock, policies=policies)
    worker: Any = HandWorker(bus.worker("w", "home"))
    await kernel._bus.start()
    await worker.start("home", clock)
    async with rig(kernel) as r:
        yield r, worker
    for puller in worker.pullers:
        await puller.close()
    await kernel.close()


async def serve(worker: HandWorker, count: int) -> None:
    for _ in range(count):
        await worker.end(await worker.deliveries.get())


async def test_steps_of_a_session_go_the_whole_way() -> None:
    async with real([{"use": "breakwater", "idle_window": 8}]) as (r, worker):
        raw = await r.session()
        assert raw.credits == 8
        serving = asyncio.create_task(serve(worker, 40))
        sent, answered = 0, set()
        while len(answered) < 40:
            while sent < min(raw.credits, 40):
                sent += 1
                await raw.step(sent)
            tag, result = await raw.answer()
            assert isinstance(result, pb.Result)
            assert tag not in answered
            answered.add(tag)
        await serving
        await raw.call.done_writing()
        assert await raw.end() is None


async def test_a_session_that_holds_the_pool_cannot_starve_another() -> None:
    pool = {"use": "breakwater", "initial_credits": 8, "min_credits": 8, "max_credits": 8, "idle_window": 8}
    async with real([pool]) as (r, worker):
        greedy = await r.session()
        for tag in range(1, greedy.credits + 1):
            await greedy.step(tag)
        await until(lambda: worker.deliveries.qsize() >= 8)
        modest = await r.session(BOB)
        assert modest.credits >= 1
        for tag in range(1, 6):
            await modest.step(tag)
            while True:
                delivery = await worker.deliveries.get()
                if delivery.step.tenant == "bob":
                    await worker.end(delivery)
                    break
                worker.deliveries.put_nowait(delivery)
                await asyncio.sleep(0)
            answered, result = await modest.answer()
            assert answered == tag
            assert isinstance(result, pb.Result)
            while modest.credits <= tag:
                await modest.read()
        greedy.call.cancel()


async def test_cancelling_withdraws_the_step_from_its_queue() -> None:
    async with real([{"use": "fixed_limit", "limit": 1}, {"use": "bounded_wait"}]) as (r, worker):
        raw = await r.session()
        await raw.step(1)
        held = await worker.deliveries.get()
        await raw.step(2)  # waits for the permit of the first
        await raw.cancel(2)
        assert isinstance(await raw.failure(2), Cancelled)
        await raw.cancel(1)
        assert isinstance(await raw.failure(1), Cancelled)
        await raw.step(3)
        await worker.end(await worker.deliveries.get())
        tag, result = await raw.answer()
        assert (tag, isinstance(result, pb.Result)) == (3, True)
        held.ack()
