"""What a runner writes down of a run, one event after the other. An engine that is given them again, in that order, is where it was.

Only what the engine cannot work out itself is an event: outcomes of calls, a cancellation, a timer that has fired. That a call was
started follows from the events before it. A timer for a retry need not be written down: the outcome of the attempt after it says enough.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gateway.program.model import Json


@dataclass(frozen=True, slots=True)
class Completed:
    """attempt of the call `key` gave output. cost in cost units. tokens: what the runner counted; an agent's model may say itself."""

    key: str
    attempt: int
    output: Json
    cost: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """attempt of the call `key` failed. error_code: a gRPC status name; reason: UPPER_SNAKE_CASE; retryable: it is safe to try again."""

    key: str
    attempt: int
    error_code: str
    reason: str
    message: str = ""
    retryable: bool = False
    cost: float = 0.0


@dataclass(frozen=True, slots=True)
class TimerFired:
    """The wait that the engine asked for under `key` is over."""

    key: str


@dataclass(frozen=True, slots=True)
class Cancelled:
    """Somebody wants the run to end. reason: what is told of it."""

    reason: str = "the run was cancelled"


Event = Completed | Failed | TimerFired | Cancelled

_TYPES: Mapping[str, type[Event]] = {
    "completed": Completed,
    "failed": Failed,
    "timer_fired": TimerFired,
    "cancelled": Cancelled,
}
_NAMES = {kind: name for name, kind in _TYPES.items()}


def encode(event: Event) -> dict[str, Any]:
    """As a JSON object: the event's fields and its `type`."""
    if isinstance(event, Completed):  # asdict would copy its output, which may be large
        fields = {"key": event.key, "attempt": event.attempt, "output": event.output, "cost": event.cost, "tokens": event.tokens}
    else:
        fields = asdict(event)
    return {"type": _NAMES[type(event)], **fields}


def decode(entry: Mapping[str, Any]) -> Event:
    """The event of an `encode`d entry. Raises ValueError for anything else."""
    fields = {name: value for name, value in entry.items() if name != "type"}
    try:
        return _TYPES[entry["type"]](**fields)
    except (KeyError, TypeError):
        raise ValueError("not an entry of a run's journal") from None


def completed_outputs(events: Iterable[Event]) -> dict[str, Json]:
    """By key, what every call of the run gave that completed: also in iterations that the engine no longer remembers."""
    return {event.key: event.output for event in events if isinstance(event, Completed)}
