"""A run's journal as bytes: entries of events, each with the wall-clock time at which it was written. Pure.

    {"at": 1763872000.1, "runner": "run-a-17", "events": [{"type": "completed", "key": "read/3", "attempt": 1, "output": ...}, ...]}

An output above the limit is kept apart, and the entry holds `{"value": NAME, "bytes": n}` as `output_ref` instead of `output`: journals are
read whole whenever a run is taken over. The first entry of each runner that takes a run over has no events: it is the fence behind which
an earlier runner cannot append any more.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.program.journal import Completed, Event, decode, encode
from gateway.run_types import StepRecord


@dataclass(frozen=True, slots=True)
class Large:
    """An output that is kept apart."""

    name: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Entry:
    """events: those with a `Large` output still need it filled in."""

    at_s: float
    runner: str
    events: tuple[tuple[Event, Large | None], ...]


def write(at_s: float, runner: str, events: Iterable[tuple[Event, Large | None]]) -> bytes:
    return json.dumps(
        {"at": at_s, "runner": runner, "events": [_written(event, large) for event, large in events]},
        separators=(",", ":"),
        ensure_ascii=False,
    ).encode()


def _written(event: Event, large: Large | None) -> dict[str, Any]:
    fields = encode(event)
    if large is not None:
        del fields["output"]
        fields["output_ref"] = {"value": large.name, "bytes": large.size_bytes}
    return fields


def read(data: bytes) -> Entry:
    """Raises ValueError for what no runner wrote."""
    try:
        found = json.loads(data)
        return Entry(float(found["at"]), str(found["runner"]), tuple(_read(event) for event in found["events"]))
    except (KeyError, TypeError):
        raise ValueError("not an entry of a run's journal") from None


def _read(fields: dict[str, Any]) -> tuple[Event, Large | None]:
    reference = fields.pop("output_ref", None)
    if reference is None:
        return decode(fields), None
    return decode({**fields, "output": None}), Large(reference["value"], reference["bytes"])


def completed_steps(entries: Sequence[bytes], shown_bytes: int, all_bytes: int) -> tuple[StepRecord, ...]:
    """What completed, in the order in which it did; an output above shown_bytes by its size alone, and so all once they have all_bytes."""
    found = []
    for data in entries:
        for event, large in read(data).events:
            if not isinstance(event, Completed):
                continue
            size_bytes = large.size_bytes if large else len(json.dumps(event.output, separators=(",", ":"), ensure_ascii=False).encode())
            shown = large is None and size_bytes <= min(shown_bytes, all_bytes)
            all_bytes -= size_bytes if shown else 0
            found.append(StepRecord(event.key, event.output if shown else None, 0 if shown else size_bytes))
    return tuple(found)
