"""A region is cut off, or loses all its workers, while runs go on: nothing that was accepted is lost, and what may move does."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from run_chaos_support import REGIONS, Case, Ledger, Streams, World, chaos_config, check_nothing_is_stuck
from stack_support import eventually, running

from gateway.client import ClientRun

pytestmark = [pytest.mark.chaos, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]
log = logging.getLogger(__name__)

RUNS = 12
CUT_S = 10.0
DELAY_S = 0.1
MODULES = 'modules = ["ledger_tools"]\n'
TENANTS = ("moves", "stays", "bound", "near", "later", "queued", "tied", "back")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with Ledger.serving(DELAY_S) as ledger:
        settings = chaos_config([], TENANTS, MODULES)
        workers = [(kind, region) for kind in ("tool", "run") for region in REGIONS]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent))
            patch.setenv("LEDGER_URL", ledger.url)
            async with (
                running(settings, workers=workers, triton=False, regions=REGIONS, wan={"iad": 0.04}) as stack,
                Streams(dict(stack.nats_urls)) as streams,
            ):
                yield World(stack, ledger, streams)


async def until_placed(case: Case, region: str, within_s: float) -> None:
    """New runs of the case are placed in the region."""
    async with case.client() as client:

        async def place() -> str:
            return (await client.place_run(*case.order(0), regions=case.limits(0))).region

        await eventually(place, lambda found: found == region, within_s, f"runs of {case.tenant} are placed in {region}")


async def placed(case: Case, numbers: Sequence[int]) -> list[str]:
    """Accepts the runs; returns where they were placed."""
    async with case.client() as client:
        return [run.region for run in await asyncio.gather(*(case.submit(client, number) for number in numbers))]


async def watch_all(case: Case) -> None:
    async with case.client() as client, asyncio.TaskGroup() as group:
        for number in case.ids:
            group.create_task(case.watch(client, number))


@asynccontextmanager
async def watched(*cases: Case) -> AsyncIterator[asyncio.Task[None]]:
    """Their runs are watched to the end meanwhile."""

    async def all_of_them() -> None:
        await asyncio.gather(*(watch_all(case) for case in cases))

    task = asyncio.create_task(all_of_them())
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def executed_in(runs: Mapping[int, ClientRun]) -> dict[int, str]:
    return {number: run.result.region for number, run in runs.items() if run.result is not None}


async def test_a_region_is_cut_off_for_ten_seconds(world: World) -> None:
    moves = Case(world, "moves", RUNS, tool="fetch")
    stays = Case(world, "stays", RUNS, tool="charge")
    bound = Case(world, "bound", RUNS, tool="fetch", limits=lambda number: ("iad",))
    near = Case(world, "near", RUNS, tool="local")
    later = Case(world, "later", RUNS, tool="fetch")
    for case in (moves, stays, bound):
        await until_placed(case, "iad", 30)
    far = (moves, stays, bound)
    for case in far:
        assert set(await placed(case, range(RUNS))) == {"iad"}
    assert set(await placed(near, range(RUNS))) == {"home"}
    async with watched(*far, near) as watching:
        await asyncio.gather(*(world.ledger.until(case.tenant, RUNS) for case in far))
        world.stack.cut("iad")
        cut_s = time.time()
        try:
            await until_placed(later, "home", 10)
            assert set(await placed(later, range(RUNS))) == {"home"}
            placed_s = time.time() - cut_s
            async with watched(later) as others:
                await others
            later_s = time.time() - cut_s
            await asyncio.sleep(max(0.0, CUT_S - (time.time() - cut_s)))  # so long it lasts
            await eventually(lambda: _ended(moves), lambda count: count > 0, 20, "runs have moved and ended")
        finally:
            world.stack.heal("iad")
        healed_s = time.time()
        await watching
    ended_s = time.time() - healed_s
    moved = [number for number, at_s in moves.ended_s.items() if cut_s < at_s < healed_s]
    log.warning(
        "cut for %.1f s: new runs placed elsewhere after %.1f s and ended after %.1f s; %d of %d moved and ended, the first after %.1f s;"
        " all had ended %.1f s after the cut",
        *(healed_s - cut_s, placed_s, later_s, len(moved), RUNS, min(moves.ended_s[one] for one in moved) - cut_s, ended_s),
    )
    assert max(near.ended_s.values()) < healed_s
    assert min([*stays.ended_s.values(), *bound.ended_s.values()]) > healed_s
    regions = {case.tenant: executed_in(await case.check_ended_once()) for case in (*far, near, later)}
    assert {regions["moves"][number] for number in moved} == {"home"}
    assert set(regions["stays"].values()) == set(regions["bound"].values()) == {"iad"}
    assert set(regions["near"].values()) == set(regions["later"].values()) == {"home"}
    await moves.check_ledger(moved=moves.ids.values())
    for case in (stays, bound, near, later):
        assert await case.check_ledger() == 0
    await check_nothing_is_stuck(world.streams, 60)


async def _ended(case: Case) -> int:
    return len(case.ended_s)


async def test_a_region_without_workers_is_helped_out_and_comes_back(world: World) -> None:
    queued = Case(world, "queued", RUNS, tool="charge")
    tied = Case(world, "tied", RUNS, tool="fetch", limits=lambda number: ("iad",))
    back = Case(world, "back", 1, tool="fetch")
    for case in (queued, tied, back):
        await until_placed(case, "iad", 30)
        assert set(await placed(case, range(case.count))) == {"iad"}
    parts = [world.stack.part(name) for name in ("run-iad", "tool-iad")]
    await world.ledger.until(queued.tenant, RUNS)
    await queued.kill(*(part.part.name for part in parts), for_good=True)
    async with watched(queued, tied, back) as watching:
        await eventually(lambda: _ended(queued), lambda count: count == RUNS, 45, "the far runner has ended what was queued")
        waiting = RUNS - len(tied.ended_s)
        await until_placed(back, "home", 15)
        for part in parts:
            part.start(())
        await until_placed(back, "iad", 45)
        await watching
    log.warning("%d runs that must not leave waited for their region", waiting)
    regions = executed_in(await queued.check_ended_once())
    assert "home" in regions.values()
    assert set(executed_in(await tied.check_ended_once()).values()) == {"iad"}
    for case in (queued, tied, back):
        await case.check_ledger()
    queued.check_repeats_have_a_cause()
    await check_nothing_is_stuck(world.streams, 60)
