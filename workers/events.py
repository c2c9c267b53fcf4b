"""What a running step has told: numbered from 1, remembered in a bounded ring so that a stream can be resumed."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from gateway.types import EventKind, StepEvent

RING_EVENTS = 1024
KEEP_ENDED_S = 10.0  # a client that lost its stream at the end has this long to ask again
MAX_ENDED = 1024  # logs of ended steps that are kept

Key = tuple[str, str]  # tenant, step id


class EventLog:
    """The events of one attempt. `publish(tenant, event)` sends each one as it comes."""

    __slots__ = ("_events", "_publish", "_region", "_sequence", "_step_id", "_tenant", "_worker", "attempt")

    def __init__(
        self, key: Key, attempt: int, region: str, worker: str, publish: Callable[[str, StepEvent], None], ring: int = RING_EVENTS
    ) -> None:
        self._tenant, self._step_id = key
        self.attempt = attempt
        self._region = region
        self._worker = worker
        self._publish = publish
        self._sequence = 0
        self._events: deque[StepEvent] = deque(maxlen=ring)

    def add(self, kind: EventKind, **fields: Any) -> None:
        self._sequence += 1
        event = StepEvent(self._step_id, kind, self.attempt, self._sequence, self._region, self._worker, **fields)
        self._events.append(event)
        self._publish(self._tenant, event)

    def after(self, attempt: int, sequence: int) -> Sequence[StepEvent]:
        """The remembered events after `sequence` when it belongs to this attempt, else all of them."""
        if attempt != self.attempt:
            return tuple(self._events)
        return tuple(event for event in self._events if event.sequence > sequence)


class EventBook:
    """The logs of the steps that are executed here, and of those that ended a moment ago."""

    def __init__(self) -> None:
        self._logs: dict[Key, EventLog] = {}
        self._ended: deque[tuple[float, Key, EventLog]] = deque()

    def __len__(self) -> int:
        return len(self._logs)

    def open(self, key: Key, log: EventLog) -> None:
        self._logs[key] = log

    def ended(self, key: Key, log: EventLog, now_s: float) -> None:
        self._ended.append((now_s, key, log))
        if len(self._ended) > MAX_ENDED:
            self._forget_oldest()

    def forget_old(self, now_s: float) -> None:
        while self._ended and now_s - self._ended[0][0] > KEEP_ENDED_S:
            self._forget_oldest()

    def answer(self, tenant: str, step_id: str, attempt: int, after_sequence: int) -> Sequence[StepEvent] | None:
        """None for a step that is not executed here."""
        log = self._logs.get((tenant, step_id))
        return None if log is None else log.after(attempt, after_sequence)

    def _forget_oldest(self) -> None:
        _, key, log = self._ended.popleft()
        if self._logs.get(key) is log:  # a later attempt of the step may have a log of its own by now
            del self._logs[key]
