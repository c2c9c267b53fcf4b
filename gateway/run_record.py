"""A run's order as bytes and back: the body of its record and of the step that a runner gets."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gateway.program.bounds import scopes
from gateway.program.model import Program
from gateway.program.parse import parse_program
from gateway.run_types import RunOrder, RunRecord
from gateway.types import Kind, Lane, Target

_OPTIONS = ("client_region", "regions", "allow", "tokens", "speculate", "idempotency_key")


def write(order: RunOrder) -> bytes:
    options = {name: value for name in _OPTIONS if (value := getattr(order, name))}
    head = json.dumps({"input": order.input, "options": options}, separators=(",", ":"), ensure_ascii=False)
    return b'{"program":%b,%b' % (order.document, head[1:].encode())


def read(
    body: bytes, *, id: str, tenant: str, deadline_s: float, lane: Lane, parse: Callable[[object], Program] = parse_program
) -> RunOrder:
    """Raises ValueError or ProgramInvalid for what no gateway wrote. parse: may know the program already."""
    found: dict[str, Any] = json.loads(body)
    options = found.get("options", {})
    for name in ("regions", "allow"):
        if name in options:
            options[name] = tuple(options[name])
    program = parse(found["program"])
    document = json.dumps(found["program"], separators=(",", ":"), ensure_ascii=False).encode()
    return RunOrder(id, tenant, program, document, found.get("input"), deadline_s, lane, **options)


def digest(order: RunOrder) -> str:
    """Tells two uses of one key apart: what program and input say, and not the order of their keys."""
    said = json.dumps([json.loads(order.document), order.input, sorted(order.allow), sorted(order.regions)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()


def record(order: RunOrder, region: str, created_s: float, keep_s: float, may_move: bool) -> RunRecord:
    return RunRecord(
        order.id,
        order.tenant,
        order.lane,
        order.deadline_s,
        created_s,
        region,
        order.program.name,
        digest(order),
        write(order),
        may_move,
        keep_s,
        order.traceparent,
        order.tracestate,
    )


def order_of(record: RunRecord) -> RunOrder:
    """Raises ValueError or ProgramInvalid."""
    order = read(record.body, id=record.id, tenant=record.tenant, deadline_s=record.deadline_s, lane=record.lane)
    return replace(order, traceparent=record.traceparent, tracestate=record.tracestate)


def is_safe_twice(program: Program, find: Callable[[str], Target | None]) -> bool:
    """Would it do no harm to run it in two places? Only when every tool that it may call is declared so. Models change nothing, and
    what is written to a vector store is written by id. find: a target by its scope."""
    for scope in scopes(program):
        target = find(scope)
        if target is None or (target.kind is Kind.TOOL and not (target.read_only or target.idempotent)):
            return False
    return True
