"""`client.session()`: never overdraws, honest when it breaks."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from fake_service import ALICE, FakeService, make_config, serving

from gateway.client import ClientResult, ClientSession, NearloopClient, RetryPolicy
from gateway.client_retry import may_retry
from gateway.clock import SystemClock
from gateway.edge.ingress import Ingress
from gateway.errors import Expired, InvalidStep, Rejected, Unauthenticated, Unavailable
from gateway.types import EventKind, Payload, Step, StepEvent

FAST = RetryPolicy(attempts=2, base_s=0.001, max_wait_s=0.002)


@asynccontextmanager
async def opened(service: FakeService, **gateway: Any) -> AsyncIterator[ClientSession]:
    async with (
        serving(service, **gateway) as port,
        NearloopClient(f"127.0.0.1:{port}", ALICE, retries=FAST) as client,
        client.session() as session,
    ):
        yield session


def blocking(service: FakeService) -> asyncio.Event:
    release = asyncio.Event()

    async def wait(step: Step) -> Payload:
        await release.wait()
        return step.input

    service.on_execute = wait
    return release


async def test_many_steps_at_once_and_never_more_than_the_credits() -> None:
    service, most, now = FakeService(), 0, 0

    async def count(step: Step) -> Payload:
        nonlocal most, now
        now += 1
        most = max(most, now)
        await asyncio.sleep(0)
        now -= 1
        return step.input

    service.on_execute = count
    async with opened(service) as session:
        results = await asyncio.gather(*(session.execute("tool", "echo", {"n": n}) for n in range(200)))
        assert session.in_flight == 0
    assert [result.json for result in results] == [{"n": n} for n in range(200)]
    assert len(service.steps) == 200  # an overdrawn one would have been refused
    assert most <= 4


async def test_arguments_reach_the_step() -> None:
    service = FakeService()
    async with opened(service) as session:
        await session.execute("tool", "echo", {}, lane="batch", run="r", timeout_s=9, idempotency_key="k")
    (step,) = service.steps
    assert (step.tenant, step.lane.value, step.run, step.idempotency_key) == ("alice", "batch", "r", "k")
    assert step.deadline_s <= SystemClock().wall_s() + 9


async def test_errors_belong_to_their_step() -> None:
    service = FakeService()

    async def reject(step: Step) -> Payload:
        raise Rejected("full", scope="tool.echo", policy="p", retry_after_s=2.0)

    service.on_execute = reject
    async with opened(service) as session:
        with pytest.raises(InvalidStep) as invalid:
            await session.execute("tool", "docs", {"name": 1})
        assert invalid.value.fields[0][0] == "step.input.name"
        with pytest.raises(Rejected) as rejected:
            await session.execute("tool", "echo", {})
        assert (rejected.value.policy, rejected.value.retry_after_s) == ("p", 2.0)


async def test_a_stream_on_a_session() -> None:
    service = FakeService()
    async with opened(service) as session:
        async with aclosing(session.stream("tool", "echo", {"n": 1})) as items:
            seen = [item async for item in items]
        kinds = [item.kind for item in seen if isinstance(item, StepEvent)]
        assert kinds == [EventKind.STARTED, EventKind.TOKEN, EventKind.PROGRESS]
        assert isinstance(seen[-1], ClientResult)
        assert seen[-1].json == {"n": 1}


async def test_cancelling_the_caller_cancels_the_step_and_gives_the_credit_on() -> None:
    service = FakeService()
    release = blocking(service)
    async with opened(service) as session:
        calls = [asyncio.create_task(session.execute("tool", "echo", {"n": n})) for n in range(5)]
        while len(service.steps) < 4:
            await asyncio.sleep(0)
        calls[0].cancel()
        await service.cancelled.wait()
        release.set()
        outcomes = await asyncio.gather(*calls, return_exceptions=True)
        assert isinstance(outcomes[0], asyncio.CancelledError)
        assert all(isinstance(outcome, ClientResult) for outcome in outcomes[1:])


async def test_who_waits_for_a_credit_can_leave_or_be_too_late() -> None:
    service = FakeService()
    release = blocking(service)
    async with opened(service) as session:
        calls = [asyncio.create_task(session.execute("tool", "echo", {"n": n})) for n in range(4)]
        while len(service.steps) < 4:
            await asyncio.sleep(0)
        assert session.credits == 0
        with pytest.raises(Expired) as caught:
            await session.execute("tool", "echo", {"n": 5}, timeout_s=0.02)
        assert caught.value.reason == "NO_CREDIT"
        leaving = asyncio.create_task(session.execute("tool", "echo", {"n": 6}))
        await asyncio.sleep(0)
        leaving.cancel()
        staying = asyncio.create_task(session.execute("tool", "echo", {"n": 7}))
        release.set()
        await asyncio.gather(*calls)
        assert (await staying).json == {"n": 7}
        assert leaving.cancelled()
    assert len(service.steps) == 5


async def test_the_normal_end_waits_for_what_is_in_flight() -> None:
    service = FakeService()
    release = blocking(service)
    async with opened(service) as session:
        call = asyncio.create_task(session.execute("tool", "echo", {"n": 1}))
        await service.started.wait()
        asyncio.get_running_loop().call_soon(release.set)
    assert (await call).json == {"n": 1}
    with pytest.raises(Unavailable, match="not sent"):
        await session.execute("tool", "echo", {})


async def test_who_waits_for_a_credit_at_the_end_is_turned_away() -> None:
    service = FakeService()
    release = blocking(service)
    async with opened(service) as session:
        calls = [asyncio.create_task(session.execute("tool", "echo", {"n": n})) for n in range(6)]
        while len(service.steps) < 4:
            await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(release.set)
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, ClientResult) for outcome in outcomes[:4])
    for outcome in outcomes[4:]:
        assert isinstance(outcome, Unavailable)
        assert outcome.reason == "NOT_STORED"


async def test_an_error_inside_ends_it_at_once() -> None:
    service = FakeService()
    blocking(service)
    calls = []

    async def use() -> None:
        async with opened(service) as session:
            calls.append(asyncio.create_task(session.execute("tool", "echo", {})))
            await service.started.wait()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await use()
    with pytest.raises(Unavailable):
        await calls[0]
    await service.cancelled.wait()


async def test_a_broken_stream_is_said_and_not_repeated() -> None:
    service = FakeService()
    blocking(service)
    ingress = Ingress(make_config(), service, SystemClock())
    port = await ingress.start()
    async with NearloopClient(f"127.0.0.1:{port}", ALICE, retries=FAST) as client, client.session() as session:
        sent = [asyncio.create_task(session.execute("tool", "echo", {"n": n})) for n in range(4)]
        while len(service.steps) < 4:
            await asyncio.sleep(0)
        unsent = asyncio.create_task(session.execute("tool", "echo", {"n": 4}))
        await asyncio.sleep(0)
        await ingress.stop(0)
        for call in sent:
            with pytest.raises(Unavailable, match="not known") as unknown:
                await call
            assert not may_retry(unknown.value, repeatable=False)
        for late in (unsent, session.execute("tool", "echo", {})):
            with pytest.raises(Unavailable) as not_sent:
                await late
            assert may_retry(not_sent.value, repeatable=False)
    assert len(service.steps) == 4


async def test_opening_goes_to_the_gateway_that_is_there() -> None:
    service = FakeService()
    async with serving(service) as port:
        async with NearloopClient(["127.0.0.1:1", f"127.0.0.1:{port}"], ALICE, retries=FAST) as client, client.session() as session:
            assert (await session.execute("tool", "echo", {"n": 1})).json == {"n": 1}
        async with NearloopClient(f"127.0.0.1:{port}", "wrong-key", retries=FAST) as client:
            with pytest.raises(Unauthenticated):
                await client.session().__aenter__()
