"""The life of one step in a worker: check, execute, commit the result, answer, acknowledge. In this order.

The result is committed before anything else is told, so that whoever sees an answer can find it again; the acknowledgement is last, so
that a worker that dies anywhere before it has the step delivered again, and the next worker finds the result.
"""

import asyncio
import logging
from collections.abc import Callable

from gateway import subjects
from gateway.clock import Clock
from gateway.config import Config
from gateway.errors import InvalidStep, Unavailable
from gateway.ports import Executor, LeaseLost, NotHere, WorkerBus
from gateway.types import EventKind, Kind, Payload, Status, StepResult, Target
from workers.events import EventBook, EventLog
from workers.held import Held, Phase, Stop
from workers.outcome import DEAD_REASON, Outcomes, dead_message

log = logging.getLogger("nearloop.worker")

BACKOFF_FIRST_S = 0.25
BACKOFF_MAX_S = 10.0
JOB_RESULT_KEEP_S = 60.0  # a job's result outlives its record: a job whose record is there and whose result is not reads as expired


def backoff_s(attempt: int, random: float) -> float:
    """Full-jitter exponential backoff: between half and all of 0.25 s doubled with each attempt, at most 10 s; random in [0, 1)."""
    ceiling = min(BACKOFF_FIRST_S * 2.0 ** min(attempt - 1, 16), BACKOFF_MAX_S)
    return ceiling * (0.5 + random / 2)


class _HandBackError(Exception):
    """The step goes back to its queue, because this worker stops."""


class StepLife:
    """Takes held steps from delivery to acknowledgement.

    `unavailable(target)` hears that the executor said Unavailable; `count(held, result)` hears each result, None for a step that
    went back.
    """

    def __init__(
        self,
        config: Config,
        bus: WorkerBus,
        executor: Executor,
        outcomes: Outcomes,
        clock: Clock,
        random: Callable[[], float],
        unavailable: Callable[[str], None],
        count: Callable[[Held, StepResult | None], None],
    ) -> None:
        self._bus = bus
        self._executor = executor
        self._outcomes = outcomes
        self._clock = clock
        self._random = random
        self._unavailable = unavailable
        self._count = count
        self._keep_s = config.nats.result_keep_s
        self._job_keep_s = config.nats.job_keep_s
        self.events = EventBook(outcomes.region, outcomes.worker, bus.publish_event)

    def bind(self, loop: asyncio.AbstractEventLoop) -> None:
        """Kept, since asking for the running loop costs a system call in Python 3.11."""
        self._loop = loop

    async def live(self, held: Held, target: Target) -> None:
        """Ends the delivery in exactly one of ack and nak. Raises nothing but CancelledError of the loop's end."""
        result: StepResult | None = None
        try:
            result = self._before(held)
            # A job's first delivery too: it may have been cancelled while the delivery was on its way.
            # A run's result is in its origin, perhaps far away: its first delivery is not worth that way.
            if result is None and (held.again or (held.is_job and held.step.kind is not Kind.RUN)):
                stored = await self._bus.result(held.step.tenant, held.step.id, _result_region(held))
                if stored is not None:
                    held.phase = Phase.ENDING
                    self._answer(held, stored if held.delivery.reply_to else None)
                    return
                if await self._failed_too_often(held, target):
                    await self._bus.bury(held.delivery, DEAD_REASON, dead_message(target.max_deliver))
                    result = self._outcomes.dead(held, target.max_deliver)
                else:
                    result = self._before(held)  # again: looking took time
            if result is None:
                result = await self._execute(held, target)
            held.phase = Phase.ENDING
            result, first = await self._commit(held, result)
            tell = first and held.delivery.reply_to and not held.delivery.answered_by_commit
            self._answer(held, result if tell else None)
        except Unavailable as error:
            result = None
            log.debug("step %s for %s goes back to its queue: %s", held.step.id, target.scope, error.message)
            await self.hand_back(held, backoff_s(held.attempt, self._random()))
        except NotHere:
            result = None
            await self.hand_back(held, backoff_s(held.attempt, self._random()))
        except _HandBackError:
            await self.hand_back(held, 0.0)
        except LeaseLost:
            result = None
            log.info("run %s goes on in another runner", held.step.id)
            held.delivery.let_go()  # a word from here would disturb that one
        except Exception as error:
            # A fault of this file: without a result nothing may be acknowledged. It counts as a failed delivery, for it may not pass.
            result = None
            log.error("step %s for %s goes back to its queue after %s", held.step.id, target.scope, type(error).__name__)
            held.delivery.nak(backoff_s(held.attempt, self._random()))
        finally:
            held.phase = Phase.ENDING
            if held.log is not None:
                self.events.ended(held.key, held.log, self._clock.now_s())
            self._count(held, result)

    async def hand_back(self, held: Held, delay_s: float) -> None:
        """The step comes back after delay_s, or when its time is over: then it is ended."""
        held.phase = Phase.ENDING
        await self._bus.hand_back(held.delivery, min(delay_s, held.remaining_s()))

    async def _failed_too_often(self, held: Held, target: Target) -> bool:
        """Deliveries that were handed back do not count; how many they were is asked only when it matters. Raises Unavailable."""
        if held.attempt <= target.max_deliver:
            return False
        step = held.step
        return held.attempt - await self._bus.hand_backs(step.tenant, step.id, held.delivery.queue.region) > target.max_deliver

    def _before(self, held: Held) -> StepResult | None:
        """The result of a step that must not start."""
        if held.stop_cause is Stop.DRAIN:
            raise _HandBackError
        if held.stop_cause is not None:
            return self._outcomes.stopped(held, held.stop_cause)
        if held.step.deadline_s <= self._clock.wall_s():
            return self._outcomes.expired_before_start(held)
        return None

    async def _execute(self, held: Held, target: Target) -> StepResult:
        """Raises Unavailable and _HandBackError when the step goes back."""
        step = held.step
        if step.stream or held.is_job:
            self._open_log(held)
        left_s = held.remaining_s()
        if left_s <= target.timeout_s:
            timer = self._loop.call_later(left_s, held.stop, Stop.DEADLINE)
        else:
            timer = self._loop.call_later(target.timeout_s, held.stop, Stop.TIMEOUT)
        started_s = self._clock.now_s()
        held.queue_us += int((started_s - held.arrived_s) * 1e6)
        if held.attempt == 1 and not held.is_job:  # a job may wait for hours, and an earlier attempt is no wait
            self._outcomes.waits.add(step.target, held.queue_us if held.found_full else 0, started_s)
        held.phase = Phase.EXECUTING
        output: Payload | None = None
        failure: Exception | None = None
        try:
            output = await self._executor.execute(held)
        except asyncio.CancelledError:
            if held.stop_cause is None:
                raise  # the loop ends
            if held.task is not None:
                held.task.uncancel()
        except (LeaseLost, NotHere):
            raise
        except Exception as error:
            failure = error
        finally:
            held.phase = Phase.ENDING
            timer.cancel()
            held.service_s = self._clock.now_s() - started_s
        if output is not None:
            return self._outcomes.done(held, output)
        if held.stop_cause is Stop.DRAIN:
            raise _HandBackError
        if failure is None or held.stop_cause is not None:
            return self._outcomes.stopped(held, held.stop_cause or Stop.CANCELLED)
        if isinstance(failure, Unavailable):
            self._unavailable(step.target)
            raise failure
        result = self._outcomes.failed(held, failure)
        if result.reason == "EXECUTOR_ERROR":
            log.error("step %s for %s failed: %s", step.id, target.scope, result.message)
        return result

    async def _commit(self, held: Held, result: StepResult) -> tuple[StepResult, bool]:
        """The result as it was offered, and whether it is the one that counts."""
        keep_s, region = self._keep_s, _result_region(held)
        if held.is_job:
            keep_s = self._job_keep_s + held.remaining_s() + JOB_RESULT_KEEP_S
        try:
            return result, await self._bus.commit(result, keep_s, region)
        except InvalidStep as error:
            if result.status is not Status.DONE:
                raise
            result = self._outcomes.failed(held, error)
            return result, await self._bus.commit(result, keep_s, region)

    def _answer(self, held: Held, result: StepResult | None) -> None:
        """None when nobody has to be told: no gateway waits, the commit told it, or another result was first and its worker tells."""
        if result is not None:
            self._bus.reply(held.delivery.reply_to, result)
        if held.step.stream or held.is_job:
            self._open_log(held).add(EventKind.ENDED)
        held.delivery.ack()

    def _open_log(self, held: Held) -> EventLog:
        """The step's log; a new one begins with STARTED when the step is about to execute."""
        if held.log is None:
            held.log = self.events.open(held.key, held.attempt)
            if held.phase is Phase.WAITING:
                held.log.add(EventKind.STARTED)
        return held.log


def _result_region(held: Held) -> str:
    return subjects.result_region(held.step.id, held.delivery.queue.region)
