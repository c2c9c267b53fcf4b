"""What a worker of kind run consists of: the executor of programs, and the keeper of the region's runs."""

import asyncio
import logging
from collections.abc import Callable

from gateway.clock import Clock
from gateway.config import Config
from gateway.edge.bus import NatsGatewayBus
from gateway.edge.run_store import NatsRunStore
from gateway.edge.schema import InputChecker
from gateway.errors import Unavailable
from gateway.kernel import Kernel
from gateway.placing import Placer
from gateway.types import StepResult
from workers.held import Held
from workers.keeper import Keeper
from workers.run_guesses import CALM_S
from workers.runner import ProgramExecutor

log = logging.getLogger("nearloop.runner")


class RunParts(ProgramExecutor):
    """The executor, with its keeper while it is started. `config` is that of the kernel in this process: its region is this runner's."""

    def __init__(self, config: Config, name: str, bus: NatsGatewayBus, kernel: Kernel, clock: Clock, random: Callable[[], float]) -> None:
        region = config.gateway.region
        self._runs = NatsRunStore(bus.js_of, region, clock)
        placer = Placer(config, bus, kernel.target)
        check = InputChecker().problems
        super().__init__(
            config,
            name,
            region,
            kernel,
            bus,
            self._runs,
            clock,
            random,
            check,
            lambda order: placer.savings(order, region),
            may_run=lambda order: region in placer.allowed(order),
            is_strained=lambda: kernel.permits.is_strained(clock.now_s(), CALM_S),
        )
        self.keeper = Keeper(region, bus, self._runs, clock, random, placer.place, config.nats.ack_wait_s)
        self._keeping: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._keeping = asyncio.create_task(self.keeper.keep(), name="keep runs")

    async def close(self) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def observe(self, held: Held, result: StepResult | None) -> None:
        """A run that has its result is open no more; nobody waits for that, and the keeper finds what is missed."""
        if result is not None:
            task = asyncio.create_task(self._close_run(held.step.tenant, held.step.id), name="close a run")
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def _close_run(self, tenant: str, run_id: str) -> None:
        try:
            await self._runs.close_run(tenant, run_id)
        except Unavailable as error:
            log.debug("run %s is closed by a keeper: %s", run_id, error.message)
