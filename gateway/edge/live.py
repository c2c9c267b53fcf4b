"""The live catalogue: which targets there are, which workers breathe, and how far apart regions are, kept in memory."""

import logging
from collections.abc import Mapping, Sequence

from gateway import round_trips
from gateway.clock import Clock
from gateway.edge.catalogue import read_target, read_worker
from gateway.edge.follow import Entry, Follower
from gateway.edge.sites import Sites
from gateway.run_types import RoundTrip, RoundTrips
from gateway.subjects import REGIONS_BUCKET, TARGETS_BUCKET, WORKERS_BUCKET
from gateway.types import Target, WorkerInfo

log = logging.getLogger(__name__)


class LiveCatalogue:
    """Of all regions. A target that several of them announce is as the last one said."""

    def __init__(self, sites: Sites, clock: Clock, heartbeat_s: float) -> None:
        self._clock, self._fresh_s = clock, 3 * heartbeat_s
        self._targets: dict[str, Target] = {}
        self._announced_s: dict[str, float] = {}  # when, by scope; those that are gone included
        self._workers: dict[str, tuple[WorkerInfo, float]] = {}
        self._alive: tuple[WorkerInfo, ...] = ()
        self._alive_until_s = 0.0
        self._measured: dict[str, tuple[RoundTrip, float]] = {}
        self._trips = RoundTrips()
        self._trips_until_s = 0.0
        self._follower = Follower(sites, clock, (TARGETS_BUCKET, WORKERS_BUCKET, REGIONS_BUCKET), self._on_entry)

    async def start(self) -> None:
        """Raises Unavailable."""
        await self._follower.start()

    async def close(self) -> None:
        await self._follower.close()

    def targets(self) -> Mapping[str, Target]:
        return self._targets

    def workers(self) -> Sequence[WorkerInfo]:
        now_s = self._clock.now_s()
        if now_s >= self._alive_until_s:
            dead = [key for key, (_, seen_s) in self._workers.items() if seen_s + self._fresh_s <= now_s]
            for key in dead:
                log.warning("worker %s sent no heartbeat for %.0f s", key, self._fresh_s)
                del self._workers[key]
            self._alive = tuple(info for info, _ in self._workers.values())
            self._alive_until_s = min((seen_s for _, seen_s in self._workers.values()), default=now_s) + self._fresh_s
        return self._alive

    def round_trips(self) -> RoundTrips:
        now_s = self._clock.now_s()
        if now_s >= self._trips_until_s:
            oldest_s = now_s - round_trips.KEEP_S
            self._measured = {key: (trip, seen_s) for key, (trip, seen_s) in self._measured.items() if seen_s > oldest_s}
            self._trips = round_trips.collect(trip for trip, _ in self._measured.values())
            self._trips_until_s = min((seen_s for _, seen_s in self._measured.values()), default=now_s) + round_trips.KEEP_S
        return self._trips

    def _on_entry(self, entry: Entry) -> None:
        try:
            if entry.bucket == WORKERS_BUCKET:
                self._on_worker(entry)
            elif entry.bucket == REGIONS_BUCKET:
                self._on_round_trip(entry)
            else:
                self._on_target(entry)
        except (ValueError, TypeError, KeyError) as error:
            log.warning("%s in %s is not understood: %s", entry.key, entry.bucket, error)

    def _on_worker(self, entry: Entry) -> None:
        self._alive_until_s = 0.0
        if entry.data is None:
            self._workers.pop(entry.key, None)
        elif entry.age_s < self._fresh_s:
            self._workers[entry.key] = (read_worker(entry.data), self._clock.now_s() - entry.age_s)

    def _on_round_trip(self, entry: Entry) -> None:
        self._trips_until_s = 0.0
        if entry.data is None:
            self._measured.pop(entry.key, None)
        elif entry.age_s < round_trips.KEEP_S:
            self._measured[entry.key] = (round_trips.read(entry.key, entry.data), self._clock.now_s() - entry.age_s)

    def _on_target(self, entry: Entry) -> None:
        if not entry.told and entry.stored_s < self._announced_s.get(entry.key, 0.0):
            return  # another region has said something newer
        if entry.data is None:
            self._announced_s[entry.key] = entry.stored_s
            self._targets = {scope: one for scope, one in self._targets.items() if scope != entry.key}
            return
        target = read_target(entry.data)
        self._announced_s[entry.key] = entry.stored_s
        if self._targets.get(target.scope) != target:
            self._targets = self._targets | {target.scope: target}  # a new one: readers may hold the old
