"""How far away is everything? Round trips as workers measure them, for choosing regions (`gateway.core.routing`, `gateway.core.placement`).

    between regions     a worker of kind run asks a worker of each other region over NATS, every 5 s: the least of three, since waiting
                        can only add to a round trip; of the last eight the median, which neither one bad moment nor a lucky one moves
    to what a target    an executor that can tell (`Measured`; HTTP tools do): the least time in which it was answered in the last
    calls               minutes, an upper bound of the round trip that comes close to it as soon as one answer was quick

An estimate is told when it is new, when it has changed by more than a tenth, and each minute, since what nobody repeats is forgotten.
What cannot be measured is not told, and nothing here can fail a step.
"""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from statistics import median
from typing import NamedTuple, Protocol, runtime_checkable

from gateway.clock import Clock
from gateway.errors import NearloopError
from gateway.ports import Subscription
from gateway.run_types import RoundTrip
from gateway.types import Kind

log = logging.getLogger("nearloop.worker")

PING_EVERY_S = 5.0
PINGS = 3
MEDIAN_OF = 8
PROBE_EVERY_S = 60.0
LOOK_EVERY_S = 5.0
BUCKET_S = 10.0
BUCKETS = 15  # two probes and a half
TOLD_EVERY_S = 60.0
CHANGE = 0.1


class Measurement(NamedTuple):
    """to: a region, or the scope of a target."""

    to: str
    seconds: float
    samples: int


@runtime_checkable
class Measured(Protocol):
    """An executor that knows how far away it is to what its targets call."""

    async def probe(self) -> None:
        """Measures without being asked for a step. What fails is left out."""
        ...

    def answered(self) -> Sequence[Measurement]:
        """By scope; those about which something is known."""
        ...


class MeasuringBus(Protocol):
    """The part of `ports.WorkerBus` that this needs."""

    async def ping(self, region: str) -> float: ...

    async def serve_ping(self) -> Subscription: ...

    async def publish_round_trip(self, trip: RoundTrip) -> None: ...


# ---- estimates -----------------------------------------------------------------------------------------------------------------


class LeastOfLate:
    """The smallest of the values of the last 140 to 150 s, kept as the smallest of each 10 s, so that its size has a bound."""

    def __init__(self) -> None:
        self._buckets: deque[tuple[int, float, int]] = deque(maxlen=BUCKETS)  # number, smallest, how many

    def add(self, value: float, now_s: float) -> None:
        number = int(now_s // BUCKET_S)
        if self._buckets and self._buckets[-1][0] == number:
            _, least, count = self._buckets.pop()
            self._buckets.append((number, min(least, value), count + 1))
        else:
            self._buckets.append((number, value, 1))

    def measurement(self, to: str, now_s: float) -> Measurement | None:
        oldest = int(now_s // BUCKET_S) - BUCKETS
        fresh = [(least, count) for number, least, count in self._buckets if number > oldest]
        return Measurement(to, min(least for least, _ in fresh), sum(count for _, count in fresh)) if fresh else None


class Answers:
    """The least time in which what each target calls has answered."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._least: dict[str, LeastOfLate] = {}

    def add(self, scope: str, seconds: float) -> None:
        self._least.setdefault(scope, LeastOfLate()).add(seconds, self._now_s())

    def all(self) -> list[Measurement]:
        now_s = self._now_s()
        found = (least.measurement(scope, now_s) for scope, least in self._least.items())
        return [one for one in found if one is not None]


class Told:
    """Decides whether an estimate is worth telling."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float]] = {}  # by `to`: what was told, and when

    def is_due(self, one: Measurement, now_s: float) -> bool:
        last = self._last.get(one.to)
        return last is None or abs(one.seconds - last[0]) > CHANGE * last[0] or now_s - last[1] >= TOLD_EVERY_S

    def told(self, one: Measurement, now_s: float) -> None:
        self._last[one.to] = one.seconds, now_s


# ---- measuring -----------------------------------------------------------------------------------------------------------------


class Measuring:
    """The tasks of one worker; it answers other regions' pings as well. pinged: regions that it measures; measured: its executor."""

    def __init__(
        self,
        region: str,
        bus: MeasuringBus,
        clock: Clock,
        *,
        pinged: Sequence[str] = (),
        measured: Measured | None = None,
        random_source: Callable[[], float] = random.random,
    ) -> None:
        self._region = region
        self._bus = bus
        self._clock = clock
        self._pinged = tuple(pinged)
        self._measured = measured
        self._random = random_source
        self._pings: dict[str, deque[float]] = {other: deque(maxlen=MEDIAN_OF) for other in self._pinged}
        self._told = Told()
        self._tasks: list[asyncio.Task[None]] = []
        self._answering: Subscription | None = None

    async def start(self) -> None:
        """Raises Unavailable."""
        self._answering = await self._bus.serve_ping()
        if self._pinged:
            self._tasks.append(asyncio.create_task(self._forever(self.look_at_regions, PING_EVERY_S), name="measure regions"))
        if self._measured is not None:
            self._tasks.append(asyncio.create_task(self._forever(self._measured.probe, PROBE_EVERY_S), name="probe targets"))
            self._tasks.append(asyncio.create_task(self._forever(self.look_at_targets, LOOK_EVERY_S), name="measure targets"))

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._answering is not None:
            try:
                await self._answering.close()
            except NearloopError as error:
                log.debug("the subscription to pings was not closed: %s", error.message)

    async def look_at_regions(self) -> None:
        await asyncio.gather(*(self._look_at(other) for other in self._pinged))

    async def _look_at(self, other: str) -> None:
        """Raises nothing for a region that does not answer: the others are told all the same."""
        last = self._pings[other]
        try:
            last.append(min([await self._bus.ping(other) for _ in range(PINGS)]))
            await self._tell(Measurement(other, median(last), len(last)))
        except NearloopError as error:
            log.debug("region %s was not measured: %s", other, error.message)

    async def look_at_targets(self) -> None:
        if self._measured is not None:
            for one in self._measured.answered():
                await self._tell(one)

    async def _tell(self, one: Measurement) -> None:
        now_s = self._clock.now_s()
        if self._told.is_due(one, now_s):
            await self._bus.publish_round_trip(RoundTrip(self._region, one.to, one.seconds, one.samples))
            self._told.told(one, now_s)

    async def _forever(self, look: Callable[[], Awaitable[None]], every_s: float) -> None:
        """The first time at once. With jitter, so that workers that started together do not all measure in the same moment."""
        while True:
            try:
                await look()
            except NearloopError as error:
                log.debug("nothing was measured: %s", error.message)
            except Exception as error:  # an executor's own code may raise anything; its text may quote an address
                log.warning("measuring round trips failed: %s", type(error).__name__)
            await asyncio.sleep(every_s * (0.8 + 0.4 * self._random()))


async def start_measuring(
    kind: Kind,
    region: str,
    regions: Sequence[str],
    bus: MeasuringBus,
    executor: object,
    clock: Clock,
) -> Measuring | None:
    """For a worker that is ready; None when the transport does not let it begin. To be closed before the bus."""
    pinged = [other for other in regions if other != region] if kind is Kind.RUN else []
    measuring = Measuring(region, bus, clock, pinged=pinged, measured=executor if isinstance(executor, Measured) else None)
    try:
        await measuring.start()
    except NearloopError as error:
        log.warning("round trips are not measured: %s", error.message)
        return None
    return measuring
