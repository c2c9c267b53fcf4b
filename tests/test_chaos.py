"""Every part is killed with SIGKILL in mid-work; 300 jobs each time, and each of them ends in exactly one result."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from chaos_support import JOBS, Case, World, world
from stack_support import eventually

from gateway.errors import NotFound

pytestmark = [pytest.mark.chaos, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with world(tmp_path_factory.mktemp("chaos") / "ledger") as started:
        yield started


async def kill(shared: World, name: str) -> None:
    await asyncio.wait_for(shared.stack.wait_ready(name), 30)
    part = shared.stack.part(name)
    pid = part.pid
    assert pid
    await shared.stack.kill(name)
    assert part.pid != pid


async def test_workers_are_killed_in_mid_step(shared: World) -> None:
    case, gateways = Case(shared, "worker"), shared.stack.gateway_addresses
    submitted = await case.submit(gateways)
    for count, name in ((20, "tool-home"), (80, "tool-iad"), (140, "tool-home"), (200, "tool-iad")):
        await case.until_called(count)
        await kill(shared, name)
    jobs = await case.until_ended(gateways, list(submitted.ids.values()))
    await case.check_each_ended_once(jobs)
    await case.check_ledger()
    results = [job.result for job in jobs if job.result is not None]
    assert {result.region for result in results} == {"home", "iad"}
    assert max(result.attempt for result in results) > 1  # a kill did hit a step in the middle
    assert (await case.calls()).total() > JOBS


async def test_a_worker_hangs_and_comes_back_with_late_results(shared: World) -> None:
    case, gateways = Case(shared, "hang"), shared.stack.gateway_addresses
    submitted = await case.submit(gateways)
    await case.until_called(JOBS // 10)
    await asyncio.wait_for(shared.stack.wait_ready("tool-home"), 30)
    part = shared.stack.part("tool-home")
    restarts = part.restarts
    os.kill(part.pid, signal.SIGSTOP)
    try:
        await case.until_results(JOBS)  # the other worker has executed its steps as well
    finally:
        os.kill(part.pid, signal.SIGCONT)
    before = await case.until_ended(gateways, list(submitted.ids.values()))
    # It tries to store what it had in hand, is refused, and has done so when it ends.
    os.kill(part.pid, signal.SIGTERM)

    async def ended() -> int:
        return part.restarts

    await eventually(ended, lambda count: count > restarts, 30, "the worker has ended")
    jobs = await case.until_ended(gateways, list(submitted.ids.values()))
    assert jobs == before
    await case.check_each_ended_once(jobs)
    await case.check_ledger()
    assert (await case.calls()).total() > JOBS


async def test_a_gateway_is_killed_and_another_one_asked(shared: World) -> None:
    case, (first, other) = Case(shared, "gateway"), shared.stack.gateway_addresses
    enough = asyncio.Event()
    submitting = asyncio.create_task(
        case.submit([first], insist=False, on_stored=lambda count: enough.set() if count == JOBS // 3 else None)
    )
    await asyncio.wait_for(enough.wait(), 30)
    await kill(shared, "gateway")
    before = await submitting
    assert before.failed
    again = await case.submit([other])
    assert len(set(again.ids.values())) == JOBS
    assert before.ids.items() <= again.ids.items()  # the same key is the same job
    assert not again.created & before.ids.keys()
    # Now the other one goes, while every job is watched through it: the watches go on at the first, which is back.
    watching = asyncio.create_task(case.until_ended([other, first], list(again.ids.values())))
    await case.until_results(JOBS * 2 // 3)
    await kill(shared, "gateway-2")
    jobs = await watching
    await case.check_each_ended_once(jobs)
    await case.check_ledger()
    async with case.client([first]) as client:
        assert (await client.get_job(jobs[0].id)).result == jobs[0].result
        with pytest.raises(NotFound):
            await client.get_job("home-" + "0" * 32)


async def test_nats_is_killed_in_the_middle_of_submits_and_executions(shared: World) -> None:
    case, gateways = Case(shared, "nats"), shared.stack.gateway_addresses
    enough = asyncio.Event()
    submitting = asyncio.create_task(case.submit(gateways, on_stored=lambda count: enough.set() if count == JOBS // 3 else None))
    await asyncio.wait_for(enough.wait(), 30)
    await kill(shared, "nats")
    submitted = await submitting
    assert len(set(submitted.ids.values())) == JOBS
    for count in (JOBS // 2, JOBS * 2 // 3):
        await case.until_called(count)
        await kill(shared, "nats")
    jobs = await case.until_ended(gateways, list(submitted.ids.values()))
    await case.check_each_ended_once(jobs)
    await case.check_ledger()


async def test_triton_is_killed_with_its_models_at_work(shared: World) -> None:
    case, gateways = Case(shared, "triton", "infer", "busy"), shared.stack.gateway_addresses
    submitted = await case.submit(gateways)
    for count in (JOBS // 10, JOBS // 2):
        await case.until_results(count)
        await kill(shared, "triton")
    jobs = await case.until_ended(gateways, list(submitted.ids.values()))
    await case.check_each_ended_once(jobs)
    assert max(job.result.attempt for job in jobs if job.result is not None) > 1
