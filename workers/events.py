"""What running steps have told: numbered from 1, the newest remembered so that a stream can be resumed.

What is remembered is bounded in number and bytes for each step, and in bytes for the worker. The oldest goes first; a replay then starts
with a later sequence number, which tells the reader that something is missing.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any

from gateway.types import EventKind, StepEvent

RING_EVENTS = 1024
LOG_BYTES = 1 << 20
BOOK_BYTES = 64 << 20
EVENT_BYTES = 256  # what an event takes beside its payload and message
KEEP_ENDED_S = 10.0  # a client that lost its stream at the end has this long to ask again
MAX_ENDED = 1024  # logs of ended steps that are kept

Key = tuple[str, str]  # tenant, step id


class EventLog:
    """The events of one attempt, in the worker's `EventBook`."""

    __slots__ = ("_book", "_events", "_sequence", "_step_id", "_tenant", "attempt", "size_bytes")

    def __init__(self, book: "EventBook", key: Key, attempt: int) -> None:
        self._book = book
        self._tenant, self._step_id = key
        self.attempt = attempt
        self.size_bytes = 0
        self._sequence = 0
        self._events: deque[StepEvent] = deque()

    @property
    def count(self) -> int:
        return len(self._events)

    def add(self, kind: EventKind, **fields: Any) -> None:
        self._sequence += 1
        book = self._book
        event = StepEvent(self._step_id, kind, self.attempt, self._sequence, book.region, book.worker, **fields)
        self._events.append(event)
        book.grew(self, size_bytes(event))
        book.publish(self._tenant, event)

    def after(self, attempt: int, sequence: int) -> Sequence[StepEvent]:
        """The remembered events after `sequence` when it belongs to this attempt, else all of them."""
        if attempt != self.attempt:
            return tuple(self._events)
        return tuple(event for event in self._events if event.sequence > sequence)

    def forget_oldest(self) -> int:
        """Returns its size in bytes."""
        freed = size_bytes(self._events.popleft())
        self.size_bytes -= freed
        return freed


def size_bytes(event: StepEvent) -> int:
    return EVENT_BYTES + len(event.message) + (len(event.payload.data) if event.payload is not None else 0)


class EventBook:
    """The logs of the steps that are executed here, and of those that ended a moment ago.

    `publish(tenant, event)` sends each event as it comes.
    """

    def __init__(
        self,
        region: str,
        worker: str,
        publish: Callable[[str, StepEvent], None],
        ring: int = RING_EVENTS,
        log_bytes: int = LOG_BYTES,
        book_bytes: int = BOOK_BYTES,
    ) -> None:
        self.region, self.worker, self.publish = region, worker, publish
        self._ring, self._log_bytes, self._book_bytes = ring, log_bytes, book_bytes
        self.size_bytes = 0
        self._logs: dict[Key, EventLog] = {}
        self._filled: OrderedDict[EventLog, None] = OrderedDict()  # those that remember something, the first filled first
        self._ended: deque[tuple[float, Key, EventLog]] = deque()

    def __len__(self) -> int:
        return len(self._logs)

    def open(self, key: Key, attempt: int) -> EventLog:
        log = self._logs[key] = EventLog(self, key, attempt)
        return log

    def grew(self, log: EventLog, by_bytes: int) -> None:
        """The log has one event more: makes room."""
        log.size_bytes += by_bytes
        self.size_bytes += by_bytes
        self._filled[log] = None
        while log.count > self._ring or log.size_bytes > self._log_bytes:
            self._shrink(log)
        while self.size_bytes > self._book_bytes:
            if self._ended:
                self._forget_oldest()
            else:
                self._shrink(next(iter(self._filled)))

    def _shrink(self, log: EventLog) -> None:
        self.size_bytes -= log.forget_oldest()
        if not log.count:
            del self._filled[log]

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
        self.size_bytes -= log.size_bytes
        self._filled.pop(log, None)
        if self._logs.get(key) is log:  # a later attempt of the step may have a log of its own by now
            del self._logs[key]
