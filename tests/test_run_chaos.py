"""Every part is killed with SIGKILL at random moments while 200 runs go on: each run ends once, and no step that had ended is repeated."""

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from random import Random

import pytest
import pytest_asyncio
from run_chaos_support import REGIONS, STEPS, Case, Ledger, Streams, World, chaos_config, check_nothing_is_stuck, seed, tool_section
from stack_support import running

pytestmark = [pytest.mark.chaos, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(150)]
log = logging.getLogger(__name__)

RUNS = 40
SLOTS = 4  # few, so that steps wait while something is killed, and take both ways: through the runner itself and through a tool worker
DELAY_S = 0.1
CASES: dict[str, list[tuple[str, ...]]] = {
    "runner": [("run-home",), ("run-iad",)],
    "gateway": [("gateway",), ("gateway-2",)],
    "nats": [("nats-home",), ("nats-iad",)],
    "tool": [("tool-home",), ("tool-iad",)],
    "two": [
        ("run-home", "run-iad"),
        ("run-iad", "tool-iad"),
        ("nats-iad", "run-iad"),
        ("nats-home", "gateway"),
        ("tool-home", "run-home"),
        ("gateway", "gateway-2"),
    ],
}
# How many calls can be under way in what is killed at one time.
IN_FLIGHT = {"runner": SLOTS, "gateway": 0, "nats": 4 * SLOTS, "tool": SLOTS, "two": 4 * SLOTS}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with Ledger.serving(DELAY_S) as ledger:
        settings = chaos_config([tool_section("charge", ledger.url, f"slots = {SLOTS}")], CASES)
        workers = [(kind, region) for kind in ("tool", "run") for region in REGIONS]
        async with (
            running(settings, gateways=2, workers=workers, triton=False, regions=REGIONS) as stack,
            Streams(dict(stack.nats_urls)) as streams,
        ):
            yield World(stack, ledger, streams)


@pytest.mark.parametrize("name", CASES)
async def test_killed_at_random_moments(world: World, name: str) -> None:
    chosen = seed()
    rng = Random(f"{chosen}/{name}")
    log.warning("NEARLOOP_CHAOS_SEED=%d", chosen)
    limits: list[Sequence[str]] = [rng.choice([(), ("home",), ("iad",)]) for _ in range(RUNS)]
    case = Case(world, name, RUNS, limits=lambda number: limits[number])
    victims = [*CASES[name], *rng.choices(CASES[name], k=max(0, 4 - len(CASES[name])))]
    rng.shuffle(victims)
    running_all = asyncio.create_task(case.run_all())
    try:
        for victim in victims:
            await case.until_ready(*victim)
            done, more = case.called(), RUNS // len(victims)
            case.admit(more)
            await world.ledger.until(name, done + int(more * len(STEPS) * rng.uniform(0.05, 0.6)))
            await asyncio.sleep(rng.uniform(0.0, 2 * DELAY_S))  # not only when a call has just begun
            await case.kill(*victim)
        case.admit(RUNS)
        await running_all
    finally:
        running_all.cancel()
        await asyncio.gather(running_all, return_exceptions=True)
    await case.check_ended_once()
    repeats = await case.check_ledger()
    case.check_repeats_have_a_cause()
    assert all(kill.open_runs for kill in case.kills)
    assert repeats <= IN_FLIGHT[name] * len(victims)
    await check_nothing_is_stuck(world.streams)
