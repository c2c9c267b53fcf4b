"""The life of a step, as one table.

    RECEIVED -> CLASSIFIED -> ADMITTED | REJECTED -> QUEUED -> RUNNING -> DONE | FAILED | CANCELLED | EXPIRED | DEAD

A step waits for a permit in CLASSIFIED, so cancelling and expiring start there. QUEUED means stored for a worker. A worker that dies
or hands a step back takes it from RUNNING to QUEUED again. Nothing leaves an end state: an illegal event raises and changes nothing.
"""

from enum import StrEnum


class State(StrEnum):
    RECEIVED = "received"
    CLASSIFIED = "classified"
    ADMITTED = "admitted"
    REJECTED = "rejected"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    DEAD = "dead"


class Event(StrEnum):
    CLASSIFY = "classify"
    ADMIT = "admit"
    REJECT = "reject"
    STORE = "store"
    START = "start"
    HAND_BACK = "hand_back"
    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"
    EXPIRE = "expire"
    GIVE_UP = "give_up"


TABLE: dict[State, dict[Event, State]] = {
    State.RECEIVED: {Event.CLASSIFY: State.CLASSIFIED, Event.REJECT: State.REJECTED, Event.EXPIRE: State.EXPIRED},
    State.CLASSIFIED: {
        Event.ADMIT: State.ADMITTED,
        Event.REJECT: State.REJECTED,
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
        Event.EXPIRE: State.EXPIRED,
    },
    State.ADMITTED: {
        Event.STORE: State.QUEUED,
        Event.REJECT: State.REJECTED,  # the queue was full
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
        Event.EXPIRE: State.EXPIRED,
    },
    State.QUEUED: {
        Event.START: State.RUNNING,
        Event.CANCEL: State.CANCELLED,
        Event.EXPIRE: State.EXPIRED,
        Event.GIVE_UP: State.DEAD,
        # A gateway hears of a fast step only when it has ended, and of a refusal or a lost transport after the fact.
        Event.SUCCEED: State.DONE,
        Event.FAIL: State.FAILED,
        Event.REJECT: State.REJECTED,
    },
    State.RUNNING: {
        Event.SUCCEED: State.DONE,
        Event.FAIL: State.FAILED,
        Event.CANCEL: State.CANCELLED,
        Event.EXPIRE: State.EXPIRED,
        Event.HAND_BACK: State.QUEUED,
        Event.GIVE_UP: State.DEAD,
    },
    State.DONE: {},
    State.FAILED: {},
    State.CANCELLED: {},
    State.EXPIRED: {},
    State.DEAD: {},
    State.REJECTED: {},
}

END_STATES = frozenset(state for state, events in TABLE.items() if not events)


class IllegalEvent(Exception):
    """The event is not possible in this state."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"a step that is {state} cannot {event}")
        self.state = state
        self.event = event


def advance(state: State, event: Event) -> State:
    """The state after the event. Raises IllegalEvent."""
    following = TABLE[state].get(event)
    if following is None:
        raise IllegalEvent(state, event)
    return following
