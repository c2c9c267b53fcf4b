"""The worker: pulls steps as slots allow, keeps them alive, executes them, and leaves cleanly.

One task for each step in work; beside them three for the whole worker: readiness, heartbeat and the sweep that extends what is held.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence

from gateway.clock import Clock, SystemClock
from gateway.config import Config
from gateway.errors import NearloopError, Unavailable
from gateway.ports import Delivery, Executor, Queue, Subscription, WorkerBus
from gateway.types import BatchCost, Kind, StepResult, Target, WorkerInfo
from workers.held import Held, Phase, Stop
from workers.lanes import Lane, TargetLanes
from workers.life import StepLife, backoff_s
from workers.outcome import Outcomes
from workers.served import ServedTargets

log = logging.getLogger("nearloop.worker")

LOOK_S = 0.25  # how often readiness and the executor's targets are looked at


class WorkerRuntime:
    """`start`, then `drain` and `close`. `observe(held, result)` hears how each step ended here, None when it went back.

    `batch_costs()` is what was learnt about the batches of targets, by scope, for the heartbeat; is_taken_care_of(queue): see
    `ServedTargets`.
    """

    def __init__(
        self,
        config: Config,
        kind: Kind,
        region: str,
        worker_id: str,
        bus: WorkerBus,
        executor: Executor,
        *,
        clock: Clock | None = None,
        random_source: Callable[[], float] = random.random,
        observe: Callable[[Held, StepResult | None], None] | None = None,
        batch_costs: Callable[[], Mapping[str, BatchCost]] = dict,
        is_taken_care_of: Callable[[Queue], bool] = lambda queue: False,
    ) -> None:
        self.kind = kind
        self.region = region
        self.id = worker_id
        self._config = config
        self._bus = bus
        self._executor = executor
        self._clock = clock or SystemClock()
        self._random = random_source
        self._observe = observe
        self._batch_costs = batch_costs
        self._life = StepLife(
            config,
            bus,
            executor,
            Outcomes(region, worker_id),
            self._clock,
            random_source,
            self._on_unavailable,
            self._on_end,
        )
        self._served = ServedTargets(
            config, region, bus, executor, self._clock, random_source, self._begin, self._on_delivery, self._hand_back, is_taken_care_of
        )
        self._held: dict[tuple[str, str], Held] = {}
        self._to_ask: set[TargetLanes] = set()
        self._bus_begun = self._connected = False
        self._told: tuple[str, ...] = ()  # the targets of the last heartbeat
        self._draining = False
        self._idle = asyncio.Event()
        self._hurry = asyncio.Event()
        self._look = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._handing_back: set[asyncio.Task[None]] = set()
        self._subscriptions: list[Subscription] = []

    # ---- start ---------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when the worker serves. Waits as long as the part behind the executor is not ready. Raises Unavailable of the bus."""
        self._loop = asyncio.get_running_loop()
        self._life.bind(self._loop)
        await self._start_executor()
        self._bus_begun = True
        await self._bus.start()
        self._connected = True
        await self._served.announce_changes()
        self._subscriptions.append(await self._bus.on_cancel(self._on_cancel))
        self._subscriptions.append(await self._bus.serve_replay(self._life.events.answer))
        await self._served.open_and_close()
        await self._heartbeat()
        self._tasks = [
            asyncio.create_task(self._look_after_readiness()),
            asyncio.create_task(self._forever(self._heartbeat, self._config.worker.heartbeat_s)),
            asyncio.create_task(self._forever(self._extend_held, self._config.nats.ack_wait_s / 3)),
        ]

    async def _start_executor(self) -> None:
        attempt, said = 1, ""
        while True:
            try:
                return await self._executor.start()
            except Unavailable as error:
                if error.message != said:
                    said = error.message
                    log.warning("%s worker %s is not ready and tries again: %s", self.kind.value, self.id, said)
                await asyncio.sleep(backoff_s(attempt, self._random()))
                attempt += 1

    def targets(self) -> Sequence[Target]:
        """What this worker executes, with the settings of the configuration."""
        return self._served.announced

    def info(self) -> WorkerInfo:
        ready = self._served.ready()
        return WorkerInfo(
            self.id,
            self.region,
            self.kind,
            tuple(target.scope for target in ready),
            sum(target.slots for target in ready),
            sum(lanes.running for lanes in self._served.lanes.values()),
            self._draining,
            self._batch_costs(),
        )

    # ---- steps ---------------------------------------------------------------------------------------------------------------

    def _on_delivery(self, lanes: TargetLanes, lane: Lane, delivery: Delivery) -> None:
        held = Held(delivery, lane, self._clock)
        twin = self._held.get(held.key)
        if twin is not None and twin.phase is not Phase.ENDING:
            twin.delivery = delivery  # its hold ran out while we were busy with it: go on, with the newer delivery
            return
        # A step that must not be executed in this region was taken from another one's queue: there is no free worker there now.
        if self._draining or not lanes.is_open or (held.step.regions and self.region not in held.step.regions):
            self._hand_back_soon(held)
            return
        self._held[held.key] = held
        lanes.offer(held)
        self._ask_soon(lanes)

    def _begin(self, held: Held) -> None:
        target = self._served.targets[held.step.target]
        held.task = self._loop.create_task(self._life.live(held, target))

    def _on_end(self, held: Held, result: StepResult | None) -> None:
        """A started step is over: `held` has been acknowledged or handed back."""
        if self._held.get(held.key) is held:
            del self._held[held.key]
        name = held.step.target
        lanes = self._served.lanes[name]
        lanes.finished(held)
        self._ask_soon(lanes)
        if result is not None:
            self._served.succeeded(name)
        if self._observe is not None:
            self._observe(held, result)
        if self._draining and not self._held:
            self._idle.set()

    def _ask_soon(self, lanes: TargetLanes) -> None:
        """Many deliveries come in one turn of the loop; the credits are counted once after them."""
        if not self._to_ask:
            self._loop.call_soon(self._ask)
        self._to_ask.add(lanes)

    def _ask(self) -> None:
        to_ask, self._to_ask = self._to_ask, set()
        for lanes in to_ask:
            lanes.ask()

    def _on_cancel(self, tenant: str, step_id: str) -> None:
        held = self._held.get((tenant, step_id))
        if held is None:
            return
        held.stop(Stop.CANCELLED)
        self._served.lanes[held.step.target].start_now(held)  # one that waits for a slot needs none any more, only its end

    def _on_unavailable(self, name: str) -> None:
        self._served.refused(name)
        self._look.set()

    def _hand_back(self, held: Held) -> None:
        """A step that came and has not started."""
        del self._held[held.key]
        self._hand_back_soon(held)

    def _hand_back_soon(self, held: Held) -> None:
        delay_s = 0.0 if self._draining else backoff_s(held.attempt, self._random())
        task = self._loop.create_task(self._life.hand_back(held, delay_s))
        self._handing_back.add(task)
        task.add_done_callback(self._handing_back.discard)

    # ---- signs of life -------------------------------------------------------------------------------------------------------

    async def _look_after_readiness(self) -> None:
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._look.wait()
            except TimeoutError:
                pass
            self._look.clear()
            try:
                await self._served.announce_changes()
                await self._served.open_and_close()
                now = self.info().targets
                if now != self._told:
                    log.info("%s worker %s serves %s", self.kind.value, self.id, ", ".join(now) or "nothing at the moment")
                    await self._heartbeat()
            except NearloopError as error:
                log.warning("%s worker %s: %s", self.kind.value, self.id, error.message)
            self._life.events.forget_old(self._clock.now_s())

    async def _forever(self, work: Callable[[], Awaitable[None]], every_s: float) -> None:
        while True:
            await asyncio.sleep(every_s)
            try:
                await work()
            except NearloopError as error:
                log.warning("%s worker %s: %s", self.kind.value, self.id, error.message)

    async def _heartbeat(self) -> None:
        info = self.info()
        self._told = info.targets
        await self._bus.heartbeat(info)

    async def _extend_held(self) -> None:
        """Extends what has been held since the last sweep; what came later is young enough."""
        before_s = self._clock.now_s() - self._config.nats.ack_wait_s / 3
        for held in self._held.values():
            if held.arrived_s <= before_s:
                held.delivery.in_progress()

    # ---- end -----------------------------------------------------------------------------------------------------------------

    async def drain(self) -> None:
        """Stops pulling, lets running work finish for at most drain_s, hands back the rest. `hurry` ends the wait."""
        self._draining = True
        if self._tasks:
            self._tasks[0].cancel()  # nothing is opened any more
            await asyncio.gather(self._tasks[0], return_exceptions=True)
        try:
            await self._heartbeat()
        except Unavailable as error:
            log.warning("%s worker %s: %s", self.kind.value, self.id, error.message)
        await self._served.close_all()
        if self._held:
            waits = [asyncio.create_task(event.wait()) for event in (self._idle, self._hurry)]
            await asyncio.wait(waits, timeout=self._config.worker.drain_s, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        for held in list(self._held.values()):
            held.stop(Stop.DRAIN)
        tasks = [held.task for held in self._held.values() if held.task is not None]
        await asyncio.gather(*tasks, *self._handing_back, return_exceptions=True)

    def hurry(self) -> None:
        """Lets `drain` wait no longer."""
        self._hurry.set()

    async def close(self) -> None:
        """Leaves the live list and disconnects. After `drain`."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        try:
            for subscription in self._subscriptions:
                await subscription.close()
            if self._connected:
                await self._bus.retire(self.info())
        except Unavailable as error:
            log.warning("%s worker %s: %s", self.kind.value, self.id, error.message)
        await self._executor.close()
        if self._bus_begun:
            await self._bus.close()
