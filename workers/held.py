"""A step that this worker holds, from its delivery until it is acknowledged or handed back."""

import asyncio
from enum import Enum, auto
from typing import TYPE_CHECKING

from gateway.clock import Clock
from gateway.ports import Delivery
from gateway.types import EventKind, Payload, Step
from workers.events import EventLog

if TYPE_CHECKING:
    from workers.lanes import Lane


class Stop(Enum):
    """Why a step was told to stop."""

    CANCELLED = auto()  # the client withdrew it
    DEADLINE = auto()  # its time is over
    TIMEOUT = auto()  # the target's time-out is over
    DRAIN = auto()  # the worker stops


class Phase(Enum):
    WAITING = auto()  # not started
    EXECUTING = auto()
    ENDING = auto()  # it has an outcome; nothing stops it any more


class Held:
    """What the runtime knows of a step, and the `Work` that its executor gets."""

    __slots__ = (
        "_clock",
        "again",
        "arrived_s",
        "attempt",
        "delivery",
        "found_full",
        "key",
        "lane",
        "log",
        "phase",
        "queue_us",
        "service_s",
        "step",
        "stop_cause",
        "task",
    )

    def __init__(self, delivery: Delivery, lane: "Lane", clock: Clock) -> None:
        step = delivery.step
        self.lane = lane
        self.delivery = delivery
        self.step: Step = step
        self.attempt: int = delivery.attempt
        self.again: bool = delivery.again
        self.queue_us = delivery.queued_us  # the wait for a slot is added when it starts
        self.key = (step.tenant, step.id)
        self.arrived_s = clock.now_s()
        self.found_full = False  # its target had hardly a free slot here when it came: what it waited was for one
        self.phase = Phase.WAITING
        self.stop_cause: Stop | None = None
        self.service_s = 0.0
        self.log: EventLog | None = None  # only for streams and jobs
        self.task: asyncio.Task[None] | None = None
        self._clock = clock

    @property
    def is_job(self) -> bool:
        """Nobody waits for the reply: the step was submitted."""
        return not self.delivery.reply_to

    @property
    def queue_region(self) -> str:
        return self.delivery.queue.region

    @property
    def leaving(self) -> bool:
        """Also when the loop itself ends."""
        return self.stop_cause in (None, Stop.DRAIN)

    def remaining_s(self) -> float:
        return max(self.step.deadline_s - self._clock.wall_s(), 0.0)

    def emit(self, token: Payload) -> None:
        if self.log is not None:
            self.log.add(EventKind.TOKEN, payload=token)

    def progress(self, fraction: float, message: str) -> None:
        if self.log is not None:
            self.log.add(EventKind.PROGRESS, fraction=fraction, message=message)

    def stop(self, cause: Stop) -> None:
        """Interrupts the execution; before it, only notes the cause; after it, does nothing. The first cause counts."""
        if self.phase is Phase.ENDING or self.stop_cause is not None:
            return
        self.stop_cause = cause
        if self.phase is Phase.EXECUTING and self.task is not None:
            self.task.cancel()
