"""Looks after the unfinished runs of its own region: what a gateway promised there is kept, whatever became of the gateway.

    has a result                        its mark is taken away, tokens that were left in other regions are withdrawn
    past its deadline and a moment      ended as expired
    its token is nowhere                sent again (its gateway died before it could)
    its region does not answer          placed elsewhere when running it twice does no harm, else it waits for its region

Every runner has a keeper; compare-and-set on the mark decides when two want to move the same run. A run that was moved may still be
going on in the region that is cut off: the first result that reaches the origin is the one.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence

from gateway import run_record
from gateway.clock import Clock
from gateway.errors import NearloopError, Rejected, Unavailable
from gateway.ports import GatewayBus, RunStore
from gateway.program.problems import ProgramInvalid
from gateway.run_types import OpenRun, Placement, RunOrder, RunRecord
from gateway.runs import expired

log = logging.getLogger("nearloop.keeper")

SWEEP_S = 2.0
AGAIN_S = 0.5  # until the second look at a region that did not answer
YOUNG_S = 3.0  # a run's own gateway takes care of it first
LONGEST_PAUSE_S = 60.0  # between two looks at a run that is well; one run of each region is looked at in every sweep
MOST_AT_ONCE = 16
TOKEN_KEPT_S = 120.0  # after the deadline of its run; a minute in its queue, and one more


class Keeper:
    """`place(order, silent)` says where a run could go when those regions are silent."""

    def __init__(
        self,
        region: str,
        bus: GatewayBus,
        store: RunStore,
        clock: Clock,
        random: Callable[[], float],
        place: Callable[[RunOrder, frozenset[str]], Placement],
        grace_s: float,
    ) -> None:
        self._region = region
        self._bus = bus
        self._store = store
        self._clock = clock
        self._random = random
        self._place = place
        self._grace_s = grace_s
        self._silent: set[str] = set()  # regions that did not answer in the sweep before
        self._pauses: dict[tuple[str, str], tuple[float, float]] = {}  # when to look at a run again, and the pause before that
        self.counts = {"sent_again": 0, "moved": 0, "expired": 0, "closed": 0}

    async def keep(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep((AGAIN_S if self._silent else SWEEP_S) * (0.75 + self._random() / 2))
            try:
                await self.sweep()
            except Unavailable as error:
                log.debug("the runs of region %s cannot be looked after now: %s", self._region, error.message)
            except Exception:  # what repairs must outlive its own faults
                log.exception("looking after the runs of region %s failed", self._region)

    async def sweep(self) -> None:
        """Once over all open runs. Raises Unavailable when this region's own streams do not answer."""
        runs = await self._store.open_runs(self._region)
        places = asyncio.Semaphore(MOST_AT_ONCE)
        silent: set[str] = set()

        async def look(run: OpenRun) -> None:
            async with places:
                try:
                    await self._look_after(run, silent)
                except Exception as error:  # one run that cannot be looked after must not stop the others
                    log.warning("run %s could not be looked after: %s", run.id, type(error).__name__)

        await asyncio.gather(*(look(run) for run in self._due(runs)))
        self._silent = silent

    def _due(self, runs: Sequence[OpenRun]) -> list[OpenRun]:
        now_s = self._clock.now_s()
        known, self._pauses = self._pauses, {}
        due: list[OpenRun] = []
        regions: set[str] = set()
        for run in runs:
            key = (run.tenant, run.id)
            next_s, pause_s = known.get(key, (now_s, SWEEP_S / 2))
            if next_s <= now_s or run.region not in regions or run.region in self._silent:
                due.append(run)
                pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
                next_s = now_s + pause_s
            regions.add(run.region)
            self._pauses[key] = (next_s, pause_s)
        return due

    async def _look_after(self, run: OpenRun, silent: set[str]) -> None:
        record = await self._store.find(run.tenant, run.id)
        if record is None:
            await self._store.close_run(run.tenant, run.id)
            return
        now_s = self._clock.wall_s()
        if now_s - record.created_s < YOUNG_S:
            return
        if await self._bus.result(run.tenant, run.id) is not None:
            await self._close(run, record)
        elif now_s > record.deadline_s + self._grace_s:
            await self._expire(run, record)
        else:
            await self._see_to_token(run, record, silent)

    async def _see_to_token(self, run: OpenRun, record: RunRecord, silent: set[str]) -> None:
        if run.region in silent:
            await self._move(run, record, silent)
            return
        try:
            if await self._store.waits(record, run.region):
                return
            whole = await self._store.body(record)
            if whole is not None and await self._bus.result(run.tenant, run.id) is None:  # it may have ended between the two looks
                await self._store.send(whole, run.region)
                self.counts["sent_again"] += 1
                log.info("run %s: its token was sent to region %s again", run.id, run.region)
        except Rejected as error:
            log.debug("run %s: region %s does not take it now: %s", run.id, run.region, error.message)
        except Unavailable as error:
            log.debug("run %s: region %s does not answer: %s", run.id, run.region, error.message)
            silent.add(run.region)
            await self._move(run, record, silent)

    async def _move(self, run: OpenRun, record: RunRecord, silent: set[str]) -> None:
        """One silent look is no proof: the region has to be silent in two sweeps."""
        if run.region == self._region or run.region not in self._silent or not record.may_move:
            return
        whole = await self._store.body(record)
        if whole is None:
            return
        try:
            placement = self._place(run_record.order_of(whole), frozenset(silent | self._silent))
        except (ValueError, ProgramInvalid) as error:
            log.error("run %s cannot be read: %s", run.id, type(error).__name__)
            return
        if not placement.region or placement.region == run.region:
            return
        moved = await self._store.move(run, placement.region)
        if moved is not None:
            self.counts["moved"] += 1
            log.warning("run %s moves from region %s, which is silent, to %s", run.id, run.region, placement.region)
            try:
                await self._store.send(whole, placement.region)
            except NearloopError as error:
                log.debug("run %s: its token follows later: %s", run.id, error.message)

    async def _expire(self, run: OpenRun, record: RunRecord) -> None:
        result = expired(record)
        if await self._bus.commit(result, record.keep_s + 60):
            self.counts["expired"] += 1
        await self._close(run, record)

    async def _close(self, run: OpenRun, record: RunRecord) -> None:
        """A region may still have its token, where it would be executed. The mark stays until all have answered, or the token is gone."""
        for region in (*run.left, run.region):
            try:
                await self._store.withdraw(record, region)
            except Unavailable:
                if self._clock.wall_s() < record.deadline_s + TOKEN_KEPT_S:
                    return
        await self._store.close_run(run.tenant, run.id)
        self.counts["closed"] += 1
