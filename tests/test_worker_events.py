"""What a worker remembers of events: bounded in number, in bytes for a step, and in bytes for all."""

from gateway.types import EventKind, Payload, StepEvent
from workers.events import EVENT_BYTES, KEEP_ENDED_S, EventBook, EventLog


class Rig:
    def __init__(self, **limits: int) -> None:
        self.sent: list[StepEvent] = []
        self.book = EventBook("home", "w1", lambda _, event: self.sent.append(event), **limits)

    def open(self, name: str) -> EventLog:
        return self.book.open(("acme", name), 1)

    def numbers(self, name: str) -> list[int]:
        return [event.sequence for event in self.book.answer("acme", name, 1, 0) or ()]


def tell(log: EventLog, count: int, size_bytes: int) -> None:
    for _ in range(count):
        log.add(EventKind.TOKEN, payload=Payload(b"x" * size_bytes))


def test_a_log_forgets_its_oldest_events_beyond_its_count() -> None:
    rig = Rig(ring=3)
    tell(rig.open("s1"), 5, 1)
    assert rig.numbers("s1") == [3, 4, 5]
    assert [event.sequence for event in rig.sent] == [1, 2, 3, 4, 5]


def test_a_log_forgets_its_oldest_events_beyond_its_bytes() -> None:
    rig = Rig(log_bytes=3 * (EVENT_BYTES + 100))
    log = rig.open("s1")
    tell(log, 5, 100)
    assert rig.numbers("s1") == [3, 4, 5]
    assert rig.book.size_bytes == 3 * (EVENT_BYTES + 100)
    log.add(EventKind.PROGRESS, message="m" * 200)
    assert rig.numbers("s1") == [5, 6]
    tell(log, 1, 10_000)  # larger than all that may be remembered
    assert rig.numbers("s1") == []
    assert rig.book.size_bytes == 0
    log.add(EventKind.ENDED)
    assert rig.numbers("s1") == [8]


def test_a_worker_forgets_ended_steps_first_then_the_oldest_events() -> None:
    rig = Rig(book_bytes=6 * (EVENT_BYTES + 100))
    oldest, ended, newest = rig.open("s1"), rig.open("s2"), rig.open("s3")
    for log in (oldest, ended, newest):
        tell(log, 2, 100)
    rig.book.ended(("acme", "s2"), ended, 0.0)
    tell(newest, 1, 100)
    assert (rig.numbers("s1"), rig.book.answer("acme", "s2", 1, 0), rig.numbers("s3")) == ([1, 2], None, [1, 2, 3])
    tell(newest, 4, 100)
    assert (rig.numbers("s1"), rig.numbers("s3")) == ([], [2, 3, 4, 5, 6, 7])
    tell(oldest, 1, 100)  # what it says from now on is remembered again
    assert (rig.numbers("s1"), rig.numbers("s3")) == ([3], [3, 4, 5, 6, 7])
    assert rig.book.size_bytes == 6 * (EVENT_BYTES + 100)


def test_an_ended_step_gives_its_bytes_back() -> None:
    rig = Rig()
    first = rig.open("s1")
    tell(first, 2, 100)
    again = rig.open("s1")  # a later attempt
    tell(again, 1, 100)
    rig.book.ended(("acme", "s1"), first, 0.0)
    rig.book.forget_old(KEEP_ENDED_S + 1)
    assert rig.numbers("s1") == [1]
    assert rig.book.size_bytes == EVENT_BYTES + 100
    rig.book.ended(("acme", "s1"), again, 0.0)
    rig.book.forget_old(KEEP_ENDED_S + 1)
    assert (len(rig.book), rig.book.size_bytes) == (0, 0)
