"""The targets that a worker serves: what its executor offers, which of them are ready, and their queues."""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from gateway.clock import Clock
from gateway.config import Config
from gateway.ports import Delivery, Executor, Queue, WorkerBus
from gateway.types import LANES, Target
from workers.catalogue import merge_target
from workers.held import Held
from workers.lanes import Lane, TargetLanes
from workers.life import backoff_s

log = logging.getLogger("nearloop.worker")

MOST_PAUSES = 3  # a target that refuses is asked again after 1 s at most, as long as its executor calls it ready


class ServedTargets:
    """Announces targets, opens the queues of those that are ready, closes those of the others.

    `begin(held)` starts a step; `on_delivery(lanes, lane, delivery)` gets what comes, `hand_back(held)` what came
    and had not started when its queue was closed. is_taken_care_of(queue): of another region, whose own workers serve it now, so
    that it stays closed here.
    """

    def __init__(
        self,
        config: Config,
        region: str,
        bus: WorkerBus,
        executor: Executor,
        clock: Clock,
        random: Callable[[], float],
        begin: Callable[[Held], None],
        on_delivery: Callable[[TargetLanes, Lane, Delivery], None],
        hand_back: Callable[[Held], None],
        is_taken_care_of: Callable[[Queue], bool] = lambda queue: False,
    ) -> None:
        self._config = config
        self._region = region
        self._bus = bus
        self._executor = executor
        self._clock = clock
        self._random = random
        self._begin = begin
        self._on_delivery = on_delivery
        self._hand_back = hand_back
        self._is_taken_care_of = is_taken_care_of
        self._pauses: dict[str, tuple[int, float]] = {}  # target: refusals in a row, not before this time
        self.announced: tuple[Target, ...] = ()
        self.targets: dict[str, Target] = {}  # also those that the executor no longer offers: their steps may still run
        self.lanes: dict[str, TargetLanes] = {}

    def ready(self) -> list[Target]:
        return [target for target in self.announced if self._is_ready(target.name)]

    def _is_ready(self, name: str) -> bool:
        if not self._executor.ready(name):
            return False
        pause = self._pauses.get(name)
        return pause is None or pause[1] <= self._clock.now_s()

    def refused(self, name: str) -> None:
        """The executor said Unavailable: nothing more is taken for a moment."""
        refusals = self._pauses.get(name, (0, 0.0))[0] + 1
        pause_s = backoff_s(min(refusals, MOST_PAUSES), self._random())
        self._pauses[name] = (refusals, self._clock.now_s() + pause_s)
        if self.lanes[name].is_open:
            self.lanes[name].is_open = False
            log.info("%s is not available: its steps stay in their queue", self.targets[name].scope)

    def succeeded(self, name: str) -> None:
        if self._pauses:
            self._pauses.pop(name, None)

    async def announce_changes(self) -> None:
        """Raises Unavailable."""
        found = self._executor.targets()
        settled = (merge_target(self._config.target_section(target.kind, target.name), target) for target in found)
        merged = tuple(target for target in settled if not target.regions or self._region in target.regions)
        if merged == self.announced:
            return
        await self._bus.announce(merged)
        self.announced = merged
        for target in merged:
            self.targets[target.name] = target
            lanes = self.lanes.get(target.name)
            if lanes is None:
                self.lanes[target.name] = TargetLanes(target.slots, self._queues(target), self._begin)
            else:
                lanes.slots = target.slots

    def _queues(self, target: Target) -> list[Queue]:
        near = [Queue(self._region, target.kind, target.name, lane) for lane in LANES]
        if not self._config.worker.far_regions:
            return near
        others = [region for region in self._config.region_names if region != self._region]
        return near + [Queue(region, target.kind, target.name, lane, 1) for region in others for lane in LANES]

    async def open_and_close(self) -> None:
        """Raises Unavailable."""
        ready = {target.name for target in self.ready()}
        for name, lanes in self.lanes.items():
            if name in ready:
                await self._open(lanes)
            else:
                await self._close(lanes)

    async def close_all(self) -> None:
        await asyncio.gather(*(self._close(lanes) for lanes in self.lanes.values()))

    async def _open(self, lanes: TargetLanes) -> None:
        for lane in lanes.lanes:
            if lane.queue.region != self._region and self._is_taken_care_of(lane.queue):
                if lane.puller is not None:
                    puller, lane.puller = lane.puller, None
                    await puller.close()
            elif lane.puller is None:
                lane.puller = await self._bus.consume(lane.queue, partial(self._on_delivery, lanes, lane))
                lane.wanted = 0
        lanes.is_open = True
        lanes.cool_down()
        lanes.ask()

    async def _close(self, lanes: TargetLanes) -> None:
        lanes.is_open = False
        pullers = [lane.puller for lane in lanes.lanes if lane.puller is not None]
        for lane in lanes.lanes:
            lane.puller = None
        await asyncio.gather(*(puller.close() for puller in pullers))
        for held in lanes.withdraw_all():
            self._hand_back(held)
