"""The inner calls of a run: each one a step of its own, through the same kernel and so past the same policies.

A call's step id follows from run, key and attempt. Whoever asks again, this runner or one that takes the run over, asks for the same
step: its result is found where it was stored, and it is executed again only when nobody knows of it. So a refusal, an outage or a lost
answer is waited out here, until the call's time is over, and only what the target itself said becomes an outcome.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol

from gateway.clock import Clock
from gateway.errors import Denied, NearloopError, Rejected, Unavailable
from gateway.program.commands import StartCall
from gateway.program.journal import Completed, Failed
from gateway.program.model import Json
from gateway.run_types import RunOrder, StepEnded, StepStarted, StepToken
from gateway.subjects import MARK_LENGTH
from gateway.types import JSON, EventKind, Kind, Payload, Step, StepEvent, Target
from gateway.types import Completed as StepCompleted

log = logging.getLogger("nearloop.runner")

RETRY_FIRST_S = 0.05
RETRY_MOST_S = 2.0
SHOWN_OUTPUT_BYTES = 64 * 1024  # of an output in an event; the rest is in the run's journal
MOST_OUTPUT_BYTES = 4 * 1024 * 1024  # of one step; an expression could not look into more in reasonable time
_NOT_STORED = frozenset({"NOT_STORED", "NO_WORKERS", "NO_REGION"})
# What a target that may be called twice is asked again for: it says nothing about the input.
_PASSING = frozenset({"UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL", "DEADLINE_EXCEEDED", "UNKNOWN"})


class CallService(Protocol):
    """What a run needs of the kernel."""

    async def call(self, step: Step, again: bool, on_event: Callable[[StepEvent], None] | None = None) -> StepCompleted: ...

    async def abandon(self, step: Step) -> None:
        """Nobody needs the step any more: takes it out of its queue and tells the worker that executes it to stop."""
        ...

    def target(self, kind: Kind, name: str) -> Target | None: ...


def mark_of(run_id: str) -> str:
    """With which the ids of a run's steps begin, whoever runs it."""
    return hashlib.sha256(run_id.encode()).hexdigest()[:MARK_LENGTH]


def step_id(run_id: str, key: str, attempt: int) -> str:
    named = hashlib.sha256(f"{run_id}/{key}/{attempt}".encode()).hexdigest()
    return mark_of(run_id) + named[: 32 - MARK_LENGTH]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a call ended with: for the engine, and for those who watch. stored: it can be found again by whoever asks again."""

    event: Completed | Failed
    told: StepEnded
    stored: bool


class RunCalls:
    """Makes the calls of one run. check(target, payload) says what is wrong with an input."""

    def __init__(
        self,
        order: RunOrder,
        region: str,
        runner: str,
        service: CallService,
        clock: Clock,
        random: Callable[[], float],
        check: Callable[[Target, Payload], list[tuple[str, str]]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._order = order
        self._region = region
        self._runner = runner  # what this process executed itself is in no results stream
        self._service = service
        self._clock = clock
        self._random = random
        self._check = check
        self._sleep = sleep
        limits = [set(some) for some in (order.regions, order.program.regions) if some]
        self._within = tuple(sorted(set.intersection(*limits))) if limits else ()  # what the run must not leave, its steps must not either
        self._steps: dict[str, Step] = {}  # that were asked for and have no outcome, by key

    def started(self, start: StartCall) -> StepStarted:
        return StepStarted(start.key, start.node_id, start.kind.value, start.target, start.attempt)

    async def make(self, start: StartCall, again: bool, on_token: Callable[[StepToken], None] | None = None) -> Outcome:
        """again: another runner may have made it. on_token: gets what a model streams. Raises nothing but CancelledError: then the step
        is still under way, and `abandon` or another runner takes care of it."""
        began_s = self._clock.now_s()
        target = self._service.target(start.kind, start.target)
        cost = target.cost if target else 1.0
        tokens = 0

        def on_event(event: StepEvent) -> None:
            nonlocal tokens
            if event.kind is EventKind.TOKEN and event.payload is not None and on_token is not None:
                tokens += 1
                on_token(StepToken(start.key, event.payload.data.decode(errors="replace")))

        try:
            step = self._step(start, target)
            if on_token is not None and start.kind is Kind.INFER:
                step = replace(step, stream=True)
            self._steps[start.key] = step
            completed = await self._asked(step, again, on_event if step.stream else None)
            output = _output(completed.result.output)
        except NearloopError as error:
            self._steps.pop(start.key, None)
            return self._failed(start, error, target, cost, began_s, again)
        self._steps.pop(start.key, None)
        result = completed.result
        event = Completed(start.key, start.attempt, output, cost, tokens)
        size_bytes = len(result.output.data)
        told = StepEnded(
            start.key,
            start.node_id,
            start.attempt,
            output if size_bytes <= SHOWN_OUTPUT_BYTES else None,
            0 if size_bytes <= SHOWN_OUTPUT_BYTES else size_bytes,
            region=result.region,
            worker=result.worker,
            took_us=self._us_since(began_s),
        )
        # What this process executed itself is in no results stream; where nothing was changed, asking again finds it just as well.
        found_again = result.worker != self._runner or (target is not None and target.read_only)
        return Outcome(event, told, found_again)

    async def abandon(self, key: str) -> None:
        """For a call whose `make` was cancelled because its outcome is not needed. What cannot be reached ends by its deadline."""
        step = self._steps.pop(key, None)
        if step is not None:
            try:
                await self._service.abandon(step)
            except Unavailable as error:
                log.debug("step %s of run %s could not be withdrawn: %s", step.id, self._order.id, error.message)

    def _step(self, start: StartCall, target: Target | None) -> Step:
        """Raises NearloopError for an input that the target does not take, or a target that the run must not call."""
        scope = f"{start.kind.value}.{start.target}"
        if self._order.allow and scope not in self._order.allow:
            raise _Refused(f"{scope} is not on the run's allow-list", code="PERMISSION_DENIED", reason="NOT_ALLOWED")
        payload = Payload(json.dumps(start.input, separators=(",", ":"), ensure_ascii=False).encode())
        if target is not None and (problems := self._check(target, payload)):
            said = "; ".join(f"{field}: {text}" for field, text in problems)
            raise _Refused(f"{scope} does not take this input: {said}", code="INVALID_ARGUMENT", reason="INVALID_INPUT")
        order, now_s = self._order, self._clock.wall_s()
        timeout_s = start.timeout_s if start.timeout_s is not None else target.timeout_s if target else 30.0
        return Step(
            id=step_id(order.id, start.key, start.attempt),
            tenant=order.tenant,
            kind=start.kind,
            target=start.target,
            input=payload,
            deadline_s=min(order.deadline_s, now_s + timeout_s),
            lane=start.lane or order.lane,
            run=order.id,
            idempotency_key=f"{order.id}/{start.key}",
            client_region=self._region,
            traceparent=order.traceparent,
            tracestate=order.tracestate,
            regions=self._within,
        )

    async def _asked(self, step: Step, again: bool, on_event: Callable[[StepEvent], None] | None) -> StepCompleted:
        """Waits out whatever keeps the step from being executed. Raises what the target, a policy that denies, or time says."""
        pause_s = RETRY_FIRST_S
        unknown: Unavailable | None = None  # after which the step may have been stored
        while True:
            try:
                return await self._service.call(step, again, on_event)
            except Denied:
                raise
            except Rejected as error:
                hint_s = error.retry_after_s or 0.0
                last: NearloopError = unknown or error
            except Unavailable as error:
                if error.reason not in _NOT_STORED:
                    again, unknown = True, error
                hint_s, last = 0.0, unknown or error
            jitter, left_s = 0.5 + self._random() / 2, step.deadline_s - self._clock.wall_s()
            if pause_s * jitter >= left_s:
                raise last
            wait_s = max(hint_s, pause_s) * jitter
            if wait_s >= left_s:  # a hint is an estimate, made perhaps while nothing moved: no reason to give up now
                wait_s = pause_s * jitter
            await self._sleep(wait_s)
            pause_s = min(2 * pause_s, RETRY_MOST_S)

    def _failed(self, start: StartCall, error: NearloopError, target: Target | None, cost: float, began_s: float, again: bool) -> Outcome:
        """A step that was refused or never stored was not executed, unless another runner had it: it may be tried again whatever its
        target is."""
        untouched = not again and ((isinstance(error, Rejected) and not isinstance(error, Denied)) or error.reason in _NOT_STORED)
        safe = target is not None and (target.read_only or target.idempotent)
        retryable = untouched or (safe and error.code in _PASSING)
        event = Failed(start.key, start.attempt, error.code, error.reason, error.message, retryable, 0.0 if untouched else cost)
        told = StepEnded(
            start.key,
            start.node_id,
            start.attempt,
            code=error.code,
            reason=error.reason,
            message=error.message,
            took_us=self._us_since(began_s),
        )
        return Outcome(event, told, stored=False)

    def _us_since(self, began_s: float) -> int:
        return int((self._clock.now_s() - began_s) * 1e6)


class _Refused(NearloopError):
    def __init__(self, message: str, *, code: str, reason: str) -> None:
        super().__init__(message, reason=reason)
        self.code = code


def _output(payload: Payload) -> Json:
    """A step's output as a value of the run: JSON, or text as a string. Raises NearloopError for anything else."""
    size_bytes = len(payload.data)
    if size_bytes > MOST_OUTPUT_BYTES:
        said = f"its output has {size_bytes} bytes; a run takes {MOST_OUTPUT_BYTES} from a step"
        raise _Refused(said, code="FAILED_PRECONDITION", reason="OUTPUT_TOO_LARGE")
    try:
        if payload.content_type == JSON:
            value: Json = json.loads(payload.data)
            return value
        if payload.content_type.startswith("text/"):
            return payload.data.decode()
    except ValueError:
        pass
    said = f"its output is {payload.content_type}, and not JSON or text"
    raise _Refused(said, code="FAILED_PRECONDITION", reason="OUTPUT_NOT_JSON")
