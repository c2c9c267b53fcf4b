"""The shortest way to an API: a runner makes the HTTP calls of its runs itself, when they are for its own region.

The kernel has decided about the step as about every other, so the same policies hold; what is left out is the way to another process of
the region and back, through a queue that exists to survive the caller: here the run's journal does. Nothing is stored for such a step
but its outcome in the journal, which is therefore written before the run goes on. Functions stay in the tool workers, since one that
blocks or crashes would take all runs with it. A runner with more than `near_calls` calls under way leaves HTTP calls to them, too: what is
short then is this process's time.
"""

import asyncio
from collections import Counter

from gateway.clock import Clock
from gateway.config import Config
from gateway.edge.bus import NatsGatewayBus
from gateway.errors import NearloopError, Unavailable
from gateway.types import Kind, Payload, Status, Step, StepResult, Target
from workers.catalogue import merge_target
from workers.outcome import failed_result
from workers.tools import ToolsExecutor


class NearWork:
    """The `Work` of a step that is executed here."""

    attempt = 1
    again = False
    leaving = False

    def __init__(self, step: Step, region: str, clock: Clock) -> None:
        self.step = step
        self.queue_region = region
        self._clock = clock

    def remaining_s(self) -> float:
        return max(self.step.deadline_s - self._clock.wall_s(), 0.0)

    def emit(self, token: Payload) -> None:
        """HTTP tools stream nothing."""

    def progress(self, fraction: float, message: str) -> None: ...


class NearTools:
    """Executes HTTP tools of `config` in this process, at most `slots` steps of each target at a time."""

    def __init__(self, config: Config, worker: str, clock: Clock) -> None:
        self._config = config
        self._region = config.gateway.region
        self._worker = worker
        self._clock = clock
        self._executor = ToolsExecutor(config.model_copy(update={"tools": config.tools.model_copy(update={"modules": ()})}))
        self._targets: dict[str, Target] = {}
        self._running: Counter[str] = Counter()  # by target

    async def start(self) -> None:
        await self._executor.start()
        for found in self._executor.targets():
            target = merge_target(self._config.target_section(found.kind, found.name), found)
            if not target.regions or self._region in target.regions:
                self._targets[target.name] = target

    async def close(self) -> None:
        await self._executor.close()

    def takes(self, step: Step) -> bool:
        if step.kind is not Kind.TOOL or step.stream:
            return False
        target = self._targets.get(step.target)
        if target is None or not (target.read_only or target.idempotent):  # one that is cut off in the middle is made again
            return False
        return self._running[step.target] < target.slots and self._executor.ready(step.target)

    def execute(self, step: Step) -> "asyncio.Task[StepResult]":
        """Ends with the result, whatever its status. Raises Unavailable when what is called cannot be reached."""
        self._running[step.target] += 1
        task = asyncio.get_running_loop().create_task(self._execute(step), name="near call")
        task.add_done_callback(lambda _: self._running.subtract([step.target]))  # also of one that was cancelled before it began
        return task

    async def _execute(self, step: Step) -> StepResult:
        work = NearWork(step, self._region, self._clock)
        began_s = self._clock.now_s()
        limit = asyncio.timeout(min(work.remaining_s(), self._targets[step.target].timeout_s))
        try:
            async with limit:
                output = await self._executor.execute(work)
            return self._result(step, Status.DONE, began_s, output)
        except Unavailable:
            raise
        except NearloopError as error:
            return self._failed(step, began_s, error)
        except TimeoutError as error:
            if not limit.expired():
                return self._failed(step, began_s, error)
            message = "the time for the step was over before it ended"
            return self._result(step, Status.EXPIRED, began_s, Payload(b""), "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", message)
        except Exception as error:
            return self._failed(step, began_s, error)

    def _failed(self, step: Step, began_s: float, error: Exception) -> StepResult:
        status, code, reason, message = failed_result(error)
        return self._result(step, status, began_s, Payload(b""), code, reason, message)

    def _result(
        self, step: Step, status: Status, began_s: float, output: Payload, code: str = "", reason: str = "", message: str = ""
    ) -> StepResult:
        service_us = int((self._clock.now_s() - began_s) * 1e6)
        return StepResult(step.id, step.tenant, status, output, 1, self._region, self._worker, 0, service_us, code, reason, message)


class NearBus(NatsGatewayBus):
    """A `GatewayBus` that executes what `near` takes, and sends the rest."""

    def __init__(self, config: Config, bus_id: str, clock: Clock, near: NearTools) -> None:
        super().__init__(config, bus_id, clock)
        self._region = config.gateway.region
        self._near = near
        self._most = config.worker.near_calls
        self._under_way = 0

    async def start(self) -> None:
        await self._near.start()
        await super().start()

    async def close(self) -> None:
        await super().close()
        await self._near.close()

    def execute(self, step: Step, region: str) -> "asyncio.Future[StepResult]":
        self._under_way += 1
        near = self._under_way <= self._most and region == self._region and self._near.takes(step)
        waiting = self._near.execute(step) if near else super().execute(step, region)
        waiting.add_done_callback(self._ended)
        return waiting

    def _ended(self, _: "asyncio.Future[StepResult]") -> None:
        self._under_way -= 1
