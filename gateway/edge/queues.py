"""The queues that a worker needs: made in its own region at once, in others when they answer. The log hears once that one is away."""

import asyncio
import logging
import random
from collections.abc import Sequence

from gateway.config import Config
from gateway.edge import topology
from gateway.edge.sites import Sites
from gateway.errors import TopologyMismatch, Unavailable
from gateway.ports import Queue
from gateway.types import LANES, Target

log = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0


class QueueMaker:
    def __init__(self, config: Config, sites: Sites) -> None:
        self._config, self._sites = config, sites
        self._far: set[asyncio.Task[None]] = set()
        self._away: set[str] = set()

    async def make(self, targets: Sequence[Target]) -> None:
        """Returns when those of the own servers are there. Raises TopologyMismatch, Unavailable."""
        await topology.ensure_consumers(self._sites.own, self._config, targets, self._sites.own_regions)
        for region in self._config.region_names:
            if region not in self._sites.own_regions:
                task = asyncio.create_task(self._make_far(region, targets), name=f"make the queues of {region}")
                self._far.add(task)
                task.add_done_callback(self._far.discard)

    async def ensure(self, queue: Queue) -> None:
        """Raises TopologyMismatch, Unavailable."""
        region = queue.region
        try:
            await topology.ensure_consumer(self._sites.js_of(region), self._config, region, queue.kind, queue.target, queue.lane)
        except Unavailable as error:
            if region not in self._away:
                log.warning("queues of region %s wait for it: %s", region, error.message)
            self._away.add(region)
            raise
        if region in self._away:
            log.info("region %s answers again", region)
            self._away.discard(region)

    async def _make_far(self, region: str, targets: Sequence[Target]) -> None:
        failures = 0
        js, first = self._sites.js_of(region), next(iter(targets), None)
        while first is not None:
            try:
                # One alone, which says whether the region answers; then all at once.
                await self.ensure(Queue(region, first.kind, first.name, LANES[0]))
                await topology.ensure_consumers(js, self._config, targets, [region])
                return
            except TopologyMismatch as error:
                log.error("queues of region %s: %s", region, error.message)
                return
            except Unavailable:
                pass
            await asyncio.sleep(random.uniform(0.5, 1.0) * min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**failures))
            failures = min(failures + 1, 16)

    async def close(self) -> None:
        tasks = list(self._far)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
