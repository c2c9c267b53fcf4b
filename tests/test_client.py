import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import numpy as np
import pytest
from fake_service import ALICE, FakeService, done, serving, token

from gateway.client import ClientResult, NearloopClient, RetryPolicy
from gateway.client_retry import RetryBudget, may_retry
from gateway.clock import SystemClock
from gateway.errors import (
    AlreadyExists,
    Denied,
    Expired,
    InvalidStep,
    NearloopError,
    NotFound,
    Rejected,
    StepFailed,
    Unauthenticated,
    Unavailable,
)
from gateway.policy import Reject, ScopeView
from gateway.types import Completed, EventKind, Flow, JobState, Kind, Lane, Payload, Step, StepEvent
from plugins.token_bucket import TokenBucket, TokenBucketConfig

VIEW = ScopeView("tool.echo", 0, 8, 0, 0.0, 0.0)
FAST = RetryPolicy(attempts=4, base_s=0.001, max_wait_s=0.002)


@asynccontextmanager
async def connected(service: FakeService, api_key: str | None = ALICE, **options: Any) -> AsyncIterator[NearloopClient]:
    async with serving(service) as port, NearloopClient(f"127.0.0.1:{port}", api_key, retries=FAST, **options) as client:
        yield client


@asynccontextmanager
async def connected_to(one: FakeService, two: FakeService) -> AsyncIterator[NearloopClient]:
    """Two gateways; the first one is asked first."""
    async with (
        serving(one) as port_one,
        serving(two) as port_two,
        NearloopClient([f"127.0.0.1:{port_one}", f"127.0.0.1:{port_two}"], ALICE, retries=FAST) as client,
    ):
        yield client


def failing(*errors: NearloopError) -> Callable[[Step], Awaitable[Payload]]:
    """The errors one after the other, then an echo."""
    left = list(errors)

    async def act(step: Step) -> Payload:
        if left:
            raise left.pop(0)
        return step.input

    return act


# --- calls ---


async def test_json_goes_out_and_comes_back() -> None:
    service = FakeService()
    async with connected(service, region="near") as client:
        result = await client.execute("tool", "echo", {"n": 2**60, "ü": [1.5, None]}, lane="batch", run="r", timeout_s=9)
    (step,) = service.steps
    assert (step.tenant, step.lane, step.run, step.client_region, step.idempotency_key) == ("alice", Lane.BATCH, "r", "near", "")
    assert step.deadline_s <= SystemClock().wall_s() + 9
    assert result.json == {"n": 2**60, "ü": [1.5, None]}
    assert (result.step_id, result.attempt, result.region, result.worker) == (step.id, 1, "home", "w-1")
    assert (result.timing.admission_us, result.timing.service_us) == (1, 4)


async def test_tensors_go_out_and_come_back() -> None:
    arrays = {"a": np.arange(4, dtype=np.float32).reshape(2, 2), "label": np.array([[b"x"], [b"y"]], dtype=object)}
    async with connected(FakeService()) as client:
        result = await client.execute(Kind.INFER, "adder", arrays)
    assert list(result.tensors) == ["a", "label"]
    np.testing.assert_array_equal(result.tensors["a"], arrays["a"])
    with pytest.raises(ValueError, match="not JSON"):
        _ = result.json


async def test_bytes_go_out_and_come_back() -> None:
    async with connected(FakeService()) as client:
        result = await client.execute("tool", "echo", Payload(b"\0\1", "image/png"))
    assert result.payload == Payload(b"\0\1", "image/png")
    with pytest.raises(ValueError, match="not tensors"):
        _ = result.tensors


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        (("tool", "nothing", {}), NotFound),
        (("tool", "docs", {}), InvalidStep),
        (("tool", "echo", Payload(b"x" * 3_000_000)), InvalidStep),
    ],
)
async def test_errors_are_ours_and_not_retried(arguments: Any, kind: type[NearloopError]) -> None:
    async with connected(FakeService()) as client:
        with pytest.raises(kind):
            await client.execute(*arguments)


async def test_a_wrong_key_is_unauthenticated() -> None:
    async with connected(FakeService(), api_key="wrong") as client:
        with pytest.raises(Unauthenticated):
            await client.targets()


async def test_the_deadline_is_the_callers() -> None:
    service = FakeService()

    async def never(step: Step) -> Payload:
        await asyncio.Event().wait()
        raise AssertionError

    service.on_execute = never
    async with connected(service) as client:
        with pytest.raises(Expired):
            await client.execute("tool", "echo", {}, timeout_s=0.1)
        await service.cancelled.wait()


async def test_cancelling_the_caller_cancels_the_step() -> None:
    service = FakeService()

    async def never(step: Step) -> Payload:
        await asyncio.Event().wait()
        raise AssertionError

    service.on_execute = never
    async with connected(service) as client:
        call = asyncio.create_task(client.execute("tool", "echo", {}))
        await service.started.wait()
        call.cancel()
        await service.cancelled.wait()
        with pytest.raises(asyncio.CancelledError):
            await call


# --- retries ---


async def test_pushback_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    service, waits, sleep = FakeService(), [], asyncio.sleep
    service.on_execute = failing(Rejected("full", retry_after_s=7.0), Rejected("full"))

    async def skip(delay_s: float) -> None:
        waits.append(delay_s)
        await sleep(0)

    async with connected(service) as client:
        monkeypatch.setattr(asyncio, "sleep", skip)
        await client.execute("tool", "echo", {})
    assert len(service.steps) == 3
    assert 7.0 <= waits[0] <= 7.0 * (1 + FAST.spread)
    assert waits[1] <= FAST.max_wait_s


async def test_attempts_are_bounded_and_the_last_error_is_raised() -> None:
    service = FakeService()
    service.on_execute = failing(*[Rejected(f"no {i}", scope="tool.echo", policy="p", retry_after_s=0.001) for i in range(9)])
    async with connected(service) as client:
        with pytest.raises(Rejected) as caught:
            await client.execute("tool", "echo", {})
    assert (caught.value.message, caught.value.scope, caught.value.policy) == ("no 3", "tool.echo", "p")
    assert len(service.steps) == FAST.attempts


async def test_a_hint_beyond_the_deadline_is_not_waited_for() -> None:
    service = FakeService()
    service.on_execute = failing(Rejected("full", retry_after_s=3600.0))
    async with connected(service) as client:
        with pytest.raises(Rejected):
            await client.execute("tool", "echo", {}, timeout_s=5)
    assert len(service.steps) == 1


@pytest.mark.parametrize(
    ("error", "key", "sent"),
    [
        (Unavailable("lost"), "", 1),
        (Unavailable("lost"), "key", 2),
        (Unavailable("no worker", reason="NO_WORKERS"), "", 2),
        (StepFailed("down", code="UNAVAILABLE"), "key", 1),
        (StepFailed("too much", code="RESOURCE_EXHAUSTED"), "key", 1),
        (AlreadyExists("other"), "key", 1),
        (Denied("not for you"), "key", 1),
        (Expired("late"), "key", 1),
    ],
)
async def test_only_what_is_safe_is_sent_again(error: NearloopError, key: str, sent: int) -> None:
    service = FakeService()
    service.on_execute = failing(error)
    async with connected(service) as client:
        if sent == 1:
            with pytest.raises(type(error)) as caught:
                await client.execute("tool", "echo", {}, idempotency_key=key)
            assert caught.value.code == error.code
        else:
            await client.execute("tool", "echo", {}, idempotency_key=key)
    assert len(service.steps) == sent


async def test_the_retry_budget_ends_retries() -> None:
    service = FakeService()
    service.on_execute = failing(*[Rejected("full")] * 1000)
    async with connected(service, throttle=None) as client:
        for _ in range(30):
            with pytest.raises(Rejected):
                await client.execute("tool", "echo", {})
    assert 30 + 10 <= len(service.steps) <= 30 + 10 + 30 * 0.1


def test_the_budget_is_a_share_of_the_calls() -> None:
    budget = RetryBudget(ratio=0.1, max_tokens=2)
    assert [budget.take() for _ in range(3)] == [True, True, False]
    for _ in range(11):  # ten tenths are not quite one in binary
        budget.called()
    assert [budget.take(), budget.take()] == [True, False]


def test_waits() -> None:
    policy = RetryPolicy(base_s=0.1, max_wait_s=1.0, spread=0.5)
    plain, hinted = Rejected("x"), Rejected("x", retry_after_s=4.0)
    assert [policy.wait_s(n, plain, lambda: 1.0) for n in (1, 2, 3, 9, 5000)] == [0.1, 0.2, 0.4, 1.0, 1.0]
    assert policy.wait_s(3, plain, lambda: 0.0) == 0.0
    assert policy.wait_s(1, hinted, lambda: 0.0) == 4.0
    assert policy.wait_s(1, hinted, lambda: 1.0) == 6.0


async def test_a_cost_that_no_bucket_holds_is_not_tried_again() -> None:
    flow = Flow("alice", "echo", Kind.TOOL, Lane.STANDARD, cost=2.0)
    decision = TokenBucket(TokenBucketConfig(burst=1.0)).decide(flow, VIEW, 0.0, 0.0)
    assert isinstance(decision, Reject)
    service = FakeService()
    service.on_execute = failing(Rejected(decision.message, reason=decision.reason, scope=decision.scope))
    async with connected(service) as client:
        with pytest.raises(Rejected, match="more than a whole burst") as caught:
            await client.execute("tool", "echo", {}, idempotency_key="k")
    assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "COST_OVER_BURST")
    assert len(service.steps) == 1


def test_what_may_be_retried() -> None:
    assert not may_retry(Rejected("x", reason="COST_OVER_BURST"), repeatable=True)
    assert may_retry(Rejected("x"), repeatable=False)
    assert not may_retry(Unavailable("x"), repeatable=False)
    assert not may_retry(NearloopError("x"), repeatable=True)


# --- several gateways ---


async def test_a_dead_gateway_is_passed_over_without_a_key() -> None:
    one, two = FakeService(), FakeService()
    async with serving(one) as port_one, serving(two) as port_two:
        addresses = ["127.0.0.1:1", f"127.0.0.1:{port_one}", f"127.0.0.1:{port_two}"]
        async with NearloopClient(addresses, ALICE, retries=FAST) as client:
            for _ in range(3):
                await client.execute("tool", "echo", {})
    assert (len(one.steps), len(two.steps)) == (3, 0)


async def test_the_next_gateway_is_asked_when_one_goes() -> None:
    one, two = FakeService(), FakeService()
    one.on_execute = failing(Unavailable("transport is gone"))
    async with connected_to(one, two) as client:
        await client.execute("tool", "echo", {}, idempotency_key="k")
        await client.execute("tool", "echo", {})
    assert (len(one.steps), len(two.steps)) == (1, 2)


async def test_no_gateway_at_all_is_unavailable() -> None:
    for addresses in (["127.0.0.1:1"], ["127.0.0.1:1", "127.0.0.1:2"]):
        async with NearloopClient(addresses, retries=RetryPolicy(attempts=2, base_s=0.001)) as client:
            with pytest.raises(Unavailable) as caught:
                await client.targets()
            assert caught.value.reason == "GATEWAY_UNREACHABLE"


async def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("grpc_proxy", "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    async with connected(FakeService()) as client:
        assert await client.targets()


def test_an_address_is_needed() -> None:
    with pytest.raises(ValueError, match="address"):
        NearloopClient([])


# --- streams and jobs ---


async def test_a_stream_gives_events_and_the_result() -> None:
    service = FakeService()
    async with connected(service) as client:
        items = [item async for item in client.stream("tool", "echo", {"n": 1})]
    assert [item.kind for item in items[:-1] if isinstance(item, StepEvent)] == [EventKind.STARTED, EventKind.TOKEN, EventKind.PROGRESS]
    assert isinstance(items[-1], ClientResult)
    assert items[-1].json == {"n": 1}
    assert service.steps[0].stream


async def test_a_stream_is_tried_again_before_its_first_event_only() -> None:
    service, tries = FakeService(), []

    async def act(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        tries.append(1)
        if len(tries) == 1:
            raise Rejected("full", retry_after_s=0.001)
        yield token(1, b"1")
        raise Rejected("broken off")

    service.on_stream = act
    async with connected(service) as client:
        items = client.stream("tool", "echo", {})
        assert isinstance(await anext(items), StepEvent)
        with pytest.raises(Rejected, match="broken off"):
            await anext(items)
    assert len(tries) == 2


async def test_leaving_a_stream_cancels_the_step() -> None:
    service = FakeService()

    async def act(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        yield token(1, b"1")
        await asyncio.Event().wait()

    service.on_stream = act
    async with connected(service) as client:
        async with aclosing(client.stream("tool", "echo", {})) as items:
            await anext(items)
        await service.closed.wait()


async def test_jobs() -> None:
    service = FakeService()
    async with connected(service) as client:
        job = await client.submit("tool", "echo", {"n": 1}, idempotency_key="k", timeout_s=600)
        again = await client.submit("tool", "echo", {"n": 1}, idempotency_key="k")
        other = await client.submit("tool", "echo", {"n": 1})
        assert (job.created, again.created, other.created) == (True, False, True)
        assert job.id == again.id != other.id
        assert (job.state, job.ended, job.kind, job.target) == (JobState.QUEUED, False, Kind.TOOL, "echo")
        assert 590 < job.expires_s - SystemClock().wall_s() <= 600
        assert (await client.get_job(job.id)).id == (await client.cancel(job.id)).id == job.id
        with pytest.raises(NotFound):
            await client.get_job("home-nothing")
    assert service.steps[2].idempotency_key


async def test_a_watch_goes_on_at_the_next_gateway_where_it_was() -> None:
    one, two = FakeService(), FakeService()

    async def first(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        yield token(1, b"1", attempt=1)
        yield token(1, b"1", attempt=2)
        yield token(2, b"2", attempt=2)
        raise Unavailable("the gateway goes")

    async def second(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        yield token(2, b"2", attempt=2)  # once more: the client has it already
        yield token(3, b"3", attempt=2)
        yield done("home-1", Payload(b'"end"'), attempt=2)

    one.on_stream, two.on_stream = first, second
    async with connected_to(one, two) as client:
        items = await collect(client.watch("home-1"))
    assert one.calls == [("watch", "alice", "home-1", 0, 0)]
    assert two.calls == [("watch", "alice", "home-1", 2, 2)]
    events = [(item.attempt, item.sequence) for item in items if isinstance(item, StepEvent)]
    assert events == [(1, 1), (2, 1), (2, 2), (2, 3)]
    assert isinstance(items[-1], ClientResult)
    assert items[-1].json == "end"


async def test_a_watch_survives_a_gateway_that_is_stopped_and_started_again() -> None:
    service, streaming = FakeService(), asyncio.Event()

    async def first(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        yield token(1, b"1")
        streaming.set()
        await asyncio.Event().wait()

    async def second(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        yield done("home-1", Payload(b"1"))

    service.on_stream = first
    async with serving(service) as port:
        client = NearloopClient(f"127.0.0.1:{port}", ALICE, retries=FAST)
        watched = asyncio.create_task(collect(client.watch("home-1")))
        await streaming.wait()
    service.on_stream = second
    async with client, serving(service, listen=f"127.0.0.1:{port}"):
        items = await watched
    assert [call[3:] for call in service.calls] == [(0, 0), (1, 1)]
    assert isinstance(items[-1], ClientResult)


async def test_a_watch_that_the_gateway_ends_for_its_age_goes_on() -> None:
    service, watches = FakeService(), 0

    async def act(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        nonlocal watches
        watches += 1
        if watches == 7:  # more than RetryPolicy.attempts
            yield done("home-1", Payload(b"1"))
        yield token(watches, b"1")
        await asyncio.Event().wait()

    service.on_stream = act
    async with (
        serving(service, max_timeout_s=0.05) as port,
        NearloopClient(f"127.0.0.1:{port}", ALICE, retries=FAST) as client,
    ):
        items = await collect(client.watch("home-1"))
    assert [item.sequence for item in items[:-1] if isinstance(item, StepEvent)] == [1, 2, 3, 4, 5, 6]
    assert isinstance(items[-1], ClientResult)
    assert [call[4] for call in service.calls] == [0, 1, 2, 3, 4, 5, 6]


async def collect(items: AsyncGenerator[Any, None]) -> list[Any]:
    return [item async for item in items]


@pytest.mark.parametrize("error", [StepFailed("x", code="UNAVAILABLE"), NotFound("x"), Expired("x")])
async def test_a_watch_ends_with_the_jobs_error(error: NearloopError) -> None:
    service = FakeService()

    async def act(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        raise error
        yield

    service.on_stream = act
    async with connected(service) as client:
        with pytest.raises(type(error)):
            await collect(client.watch("home-1"))
    assert len(service.calls) == 1


async def test_a_watch_has_a_deadline_when_it_is_given_one() -> None:
    service = FakeService()

    async def act(asked: Any) -> AsyncGenerator[StepEvent | Completed, None]:
        await asyncio.Event().wait()
        yield token(1, b"")

    service.on_stream = act
    async with connected(service) as client:
        with pytest.raises(Expired):
            await collect(client.watch("home-1", timeout_s=0.1))


async def test_targets() -> None:
    async with connected(FakeService()) as client:
        assert [status.target.name for status in await client.targets()] == ["adder", "docs", "echo"]
        (model,) = await client.targets("infer")
    assert (model.target.tensor_inputs[0].shape, model.live_regions) == ((-1, 2), ("home",))


async def test_a_closed_client_cancels_what_is_in_flight() -> None:
    service = FakeService()

    async def never(step: Step) -> Payload:
        await asyncio.Event().wait()
        raise AssertionError

    service.on_execute = never
    async with connected(service) as client:
        call = asyncio.create_task(client.execute("tool", "echo", {}))
        await service.started.wait()
        await client.close()
        with pytest.raises((asyncio.CancelledError, grpc.aio.AioRpcError, NearloopError)):
            await call
        await service.cancelled.wait()
