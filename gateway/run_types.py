"""The words of runs as frozen values: what a client asks for, where it runs, what happened. No I/O, no clock."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gateway.program.model import Json, Program
from gateway.types import JobState, Lane, StepResult

RUN_TARGET = "program"  # the one target of kind run: what executes programs
RUN_EVENT = "application/x-nearloop-run-event"  # content type of a token that is an encoded RunEvent


@dataclass(frozen=True, slots=True)
class RunOrder:
    """A run that somebody asks for, checked, with its tenant. deadline_s is wall-clock time, as in `Step`.

    document: the program as JSON (`gateway.program.dump`), which is what travels. allow: scopes such as `tool.fetch` that the run may
    call, empty for every target of its program. regions: that it must not leave, in addition to those of the program; empty for any.
    tokens: what models stream is wanted as events. speculate: at most so many steps at a time before it is known that they are needed.
    """

    id: str
    tenant: str
    program: Program
    document: bytes
    input: Json
    deadline_s: float
    lane: Lane = Lane.STANDARD
    idempotency_key: str = ""
    client_region: str = ""
    regions: tuple[str, ...] = ()
    allow: tuple[str, ...] = ()
    tokens: bool = False
    speculate: int = 0
    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class RunRecord:
    """An accepted run, as its origin keeps it: what was promised. program: its name. body: the order as `gateway.run_record` writes it,
    which is also the input of the run's step; kept until the run has ended, and apart, so it is empty in a record that was found.
    digest: of program and input, to notice a key that is used again for something else. may_move: all that it may call is declared
    read_only or idempotent, so that running it twice does no harm. keep_s: after the deadline."""

    id: str
    tenant: str
    lane: Lane
    deadline_s: float
    created_s: float
    region: str
    program: str
    digest: str
    body: bytes = b""
    may_move: bool = False
    keep_s: float = 86_400.0
    traceparent: str = ""
    tracestate: str = ""


@dataclass(frozen=True, slots=True)
class OpenRun:
    """The mark of a run without a result: where it is placed now, and the regions that it was moved away from."""

    id: str
    tenant: str
    region: str
    left: tuple[str, ...] = ()
    sequence: int = 0  # of the mark in its stream


@dataclass(frozen=True, slots=True)
class StepStarted:
    """A call was sent. key: `read/3` as in `gateway.program.engine`; node: the id in the program; attempt from 1."""

    key: str
    node: str
    kind: str
    target: str
    attempt: int = 1


@dataclass(frozen=True, slots=True)
class StepEnded:
    """An attempt of a call has its outcome. output: None and `size_bytes` set when it is too large for an event; reason: empty when it
    succeeded. replayed: it is told again, from the journal of an earlier runner. speculated: it was started before it was needed."""

    key: str
    node: str
    attempt: int = 1
    output: Json = None
    size_bytes: int = 0
    code: str = ""
    reason: str = ""
    message: str = ""
    region: str = ""
    worker: str = ""
    took_us: int = 0
    replayed: bool = False
    speculated: bool = False


@dataclass(frozen=True, slots=True)
class StepToken:
    """A piece of what a model streams, as text."""

    key: str
    text: str


@dataclass(frozen=True, slots=True)
class Summary:
    """The last event before the result. waited_us: time in which the run waited for a call; saved_us: what the same calls, each made
    from the client's region, would have cost in round trips more, as measured; 0 when that is not known. guesses, wrong_guesses: steps
    that were started speculatively, and those of them that were not needed."""

    region: str
    runner: str
    steps: int = 0
    cost: float = 0.0
    tokens: int = 0
    waited_us: int = 0
    saved_us: int = 0
    guesses: int = 0
    wrong_guesses: int = 0


RunEvent = StepStarted | StepEnded | StepToken | Summary

_TYPES: Mapping[str, type[RunEvent]] = {"step_started": StepStarted, "step_ended": StepEnded, "token": StepToken, "summary": Summary}
_NAMES = {kind: name for name, kind in _TYPES.items()}


def encode_event(event: RunEvent) -> bytes:
    """As a JSON object: its `type` and what differs from the defaults."""
    shown: dict[str, Any] = {"type": _NAMES[type(event)]}
    for name, one in type(event).__dataclass_fields__.items():
        value = getattr(event, name)
        if value != one.default:
            shown[name] = value
    return json.dumps(shown, separators=(",", ":"), ensure_ascii=False).encode()


def decode_event(data: bytes) -> RunEvent:
    """Raises ValueError for anything but an encoded event."""
    try:
        fields = json.loads(data)
        return _TYPES[fields.pop("type")](**fields)
    except (KeyError, TypeError, AttributeError):
        raise ValueError("not an event of a run") from None


@dataclass(frozen=True, slots=True)
class RegionEstimate:
    """What running in a region would cost: expected seconds in which the run only waits for the network, and why, for a person.

    excluded: why the region cannot be chosen; empty when it can.
    """

    region: str
    dead_s: float
    why: tuple[str, ...] = ()
    excluded: str = ""


@dataclass(frozen=True, slots=True)
class Placement:
    """region: the best one, empty when none can be chosen. estimates: of every region, the best first."""

    region: str
    estimates: tuple[RegionEstimate, ...]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A completed step of a run, as its journal has it. output: None and size_bytes set when it is too large to be shown."""

    key: str
    output: Json = None
    size_bytes: int = 0


@dataclass(frozen=True, slots=True)
class RunStatus:
    """A run and where it stands. region: where it was placed. steps: completed ones, whatever became of the run; empty while the region
    that has the journal cannot be asked. result: once it has ended."""

    id: str
    tenant: str
    program: str
    state: JobState
    region: str
    lane: Lane
    created_s: float
    deadline_s: float
    steps: tuple[StepRecord, ...] = ()
    result: StepResult | None = None
    placement: Placement | None = None  # told when it was accepted


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """A measured round trip: from a region to another one, or from the workers of a region to what a target calls (`tool.fetch`)."""

    region: str
    to: str
    seconds: float
    samples: int = 1


@dataclass(frozen=True, slots=True)
class RoundTrips:
    """What is known of the network. Lookups give None for what nobody has measured."""

    regions: Mapping[tuple[str, str], float] = field(default_factory=dict)  # seconds, by (from, to)
    targets: Mapping[tuple[str, str], float] = field(default_factory=dict)  # seconds, by (region, scope)

    def between(self, one: str, other: str) -> float | None:
        """Either direction: a round trip is both. 0 within a region."""
        if one == other:
            return 0.0
        there, back = self.regions.get((one, other)), self.regions.get((other, one))
        return there if back is None else back if there is None else min(there, back)

    def to_target(self, region: str, scope: str) -> float | None:
        return self.targets.get((region, scope))
