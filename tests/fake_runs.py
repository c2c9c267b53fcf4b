"""A RunService for the tests of ingress, client and command line: plays events, and records what it was given."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fake_service import KEYS, FakeService

from gateway import config
from gateway.clock import SystemClock
from gateway.edge.ingress import Ingress
from gateway.errors import NotFound
from gateway.ports import RunService
from gateway.run_types import (
    RUN_EVENT,
    Placement,
    RegionEstimate,
    RunEvent,
    RunOrder,
    RunStatus,
    StepEnded,
    StepRecord,
    StepStarted,
    StepToken,
    Summary,
    encode_event,
)
from gateway.types import Completed, EventKind, JobState, Payload, Status, StepEvent, StepResult, Timing
from nearloop.v1 import gateway_pb2 as pb

Events = AsyncGenerator[StepEvent | Completed, None]
SOURCE = """\
program: nearloop/v1
name: greet
input: {type: object, properties: {name: {type: string}}, additionalProperties: false}
steps:
  - {id: look, tool: docs, input: {name: "${input.name}"}}
  - {id: say, tool: echo, input: {text: "${steps.look.output}"}}
"""
PLACED = Placement(
    "iad",
    (
        RegionEstimate("iad", 0.004, ("tool.docs 2.0 ms, 2 times",)),
        RegionEstimate("home", 0.16, ("tool.docs 80.0 ms, 2 times",)),
        RegionEstimate("fra", float("inf"), (), "no runner lives there"),
    ),
)


class FakeRuns:
    def __init__(self) -> None:
        self.orders: list[RunOrder] = []
        self.calls: list[tuple[Any, ...]] = []
        self.runs: dict[str, RunStatus] = {}
        self.on_run: Callable[[RunOrder], Events] = usual
        self.on_watch: Callable[[int, int], Events] | None = None
        self.on_order: Callable[[RunOrder], None] = lambda order: None  # may raise
        self.accepted = asyncio.Event()
        self.closed = asyncio.Event()

    async def run(self, order: RunOrder) -> AsyncGenerator[RunStatus | StepEvent | Completed, None]:
        try:
            status, _ = await self.submit_run(order)
            yield replace(status, placement=PLACED)
            async for item in self.on_run(order):
                yield item
        finally:
            self.closed.set()

    async def submit_run(self, order: RunOrder) -> tuple[RunStatus, bool]:
        self.orders.append(order)
        self.on_order(order)
        run_id = f"home-{hashlib.sha256(order.idempotency_key.encode() or str(len(self.orders)).encode()).hexdigest()[:32]}"
        created = run_id not in self.runs
        if created:
            self.runs[run_id] = RunStatus(
                run_id, order.tenant, order.program.name, JobState.QUEUED, "iad", order.lane, 1000.0, order.deadline_s, placement=PLACED
            )
        self.accepted.set()
        return self.runs[run_id], created

    async def run_status(self, tenant: str, run_id: str) -> RunStatus:
        self.calls.append(("get", tenant, run_id))
        if run_id not in self.runs:
            raise NotFound(f"there is no run {run_id}", reason="RUN_NOT_FOUND")
        return self.runs[run_id]

    async def watch_run(self, tenant: str, run_id: str, attempt: int, after_sequence: int) -> Events:
        self.calls.append(("watch", tenant, run_id, attempt, after_sequence))
        try:
            assert self.on_watch is not None
            async for item in self.on_watch(attempt, after_sequence):
                yield item
        finally:
            self.closed.set()

    async def cancel_run(self, tenant: str, run_id: str) -> RunStatus:
        status = await self.run_status(tenant, run_id)
        cancelled = StepResult(run_id, tenant, Status.CANCELLED, code="CANCELLED", reason="CANCELLED", message="cancelled by request")
        self.runs[run_id] = replace(status, state=JobState.CANCELLED, result=cancelled)
        return self.runs[run_id]

    async def place(self, order: RunOrder) -> Placement:
        self.orders.append(order)
        return PLACED

    def end(self, run_id: str, output: bytes) -> None:
        steps = (StepRecord("look", {"n": 2**60}), StepRecord("each/0/say", size_bytes=70_000))
        self.runs[run_id] = replace(self.runs[run_id], state=JobState.DONE, steps=steps, result=ended(output).result)


def started(sequence: int = 1, attempt: int = 1) -> StepEvent:
    return StepEvent("s", EventKind.STARTED, attempt, sequence, "iad", "run-1")


def told(sequence: int, what: RunEvent, attempt: int = 1) -> StepEvent:
    return StepEvent("s", EventKind.TOKEN, attempt, sequence, payload=Payload(encode_event(what), RUN_EVENT))


def ended(output: bytes, attempt: int = 1) -> Completed:
    return Completed(StepResult("s", "alice", Status.DONE, Payload(output), attempt, "iad", "run-1"), Timing(1, 2, 3, 4))


async def usual(order: RunOrder) -> Events:
    """One of everything."""
    yield started()
    yield told(2, StepStarted("look", "look", "tool", "docs"))
    yield told(3, StepEnded("look", "look", output={"n": 1, "big": 2**60}, region="iad", worker="tool-1", took_us=2100))
    yield told(4, StepStarted("each/0/say", "say", "tool", "echo", attempt=2))
    yield told(5, StepEnded("each/0/say", "say", 2, code="UNAVAILABLE", reason="DOWN", message="is down", took_us=50))
    yield told(6, StepToken("think", "Hel"))
    yield told(7, StepToken("think", "lo"))
    yield told(8, StepEnded("large", "large", size_bytes=70_000, replayed=True, speculated=True))
    yield told(9, Summary("iad", "run-1", 3, 2.5, 40, 4_000, 156_000, 2, 1))
    yield ended(b'{"text":"hello","big":1152921504606846976}')


async def never(order: RunOrder) -> Events:
    yield started()
    await asyncio.Event().wait()


def make_config(anonymous: str = "", **gateway: Any) -> config.Config:
    regions = [{"name": name} for name in ("home", "iad", "fra")]
    section = {"listen": "127.0.0.1:0", **gateway}
    return config.parse({"gateway": section, "regions": regions, "auth": {"anonymous_tenant": anonymous, "keys": KEYS}})


@asynccontextmanager
async def serving(runs: RunService | None, service: FakeService | None = None, anonymous: str = "", **gateway: Any) -> AsyncIterator[int]:
    """A real gRPC server on a free port; gives the port."""
    ingress = Ingress(make_config(anonymous, **gateway), service or FakeService(), SystemClock(), runs=runs)
    port = await ingress.start()
    ingress.set_serving(True)
    try:
        yield port
    finally:
        await ingress.stop(0.0)


def spec(source: str = SOURCE, input: str = '{"name":"x"}', **more: Any) -> pb.RunSpec:
    return pb.RunSpec(source=source, input=pb.JsonValue(text=input), **more)
