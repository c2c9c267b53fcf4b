"""A StepService for the tests of ingress and client: echoes, and records what it was given."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc

from gateway import config
from gateway.clock import SystemClock
from gateway.edge.ingress import Ingress
from gateway.errors import NotFound
from gateway.types import (
    Completed,
    EventKind,
    Job,
    JobState,
    JobStatus,
    Kind,
    Payload,
    Status,
    Step,
    StepEvent,
    StepResult,
    Target,
    TargetStatus,
    TensorSpec,
    Timing,
)
from nearloop.v1 import gateway_pb2 as pb
from nearloop.v1.gateway_pb2_grpc import GatewayStub

ALICE, BOB = "alice-key-0123456789", "bob-key-0123456789"
KEYS = [{"tenant": name, "sha256": hashlib.sha256(key.encode()).hexdigest()} for name, key in (("alice", ALICE), ("bob", BOB))]
ECHO = Target(Kind.TOOL, "echo", timeout_s=30)
DOCS = Target(
    Kind.TOOL,
    "docs",
    timeout_s=5,
    input_schema={
        "type": "object",
        "required": ["name"],
        "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "integer"}}},
    },
)
ADDER = Target(
    Kind.INFER,
    "adder",
    max_batch_size=4,
    tensor_inputs=(TensorSpec("a", "FP32", (-1, 2)), TensorSpec("label", "BYTES", (-1, 1))),
    tensor_outputs=(TensorSpec("sum", "FP32", (-1, 1)),),
)


class FakeService:
    def __init__(self) -> None:
        self.known = {(target.kind, target.name): target for target in (ECHO, DOCS, ADDER)}
        self.steps: list[Step] = []
        self.calls: list[tuple[Any, ...]] = []
        self.jobs: dict[str, JobStatus] = {}
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.closed = asyncio.Event()
        self.on_execute: Callable[[Step], Any] | None = None  # may raise, or return an awaitable for the output
        self.windows: list[tuple[Any, ...]] = []
        self.on_window: Callable[[int], int] = lambda outstanding: 4
        self.on_stream: Callable[[Any], AsyncGenerator[StepEvent | Completed, None]] | None = None

    async def execute(self, step: Step) -> Completed:
        self.steps.append(step)
        self.started.set()
        output = step.input
        try:
            if self.on_execute:
                output = await self.on_execute(step)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return done(step.id, output)

    async def stream(self, step: Step) -> AsyncGenerator[StepEvent | Completed, None]:
        self.steps.append(step)
        self.started.set()
        try:
            if self.on_stream:
                async for item in self.on_stream(step):
                    yield item
                return
            yield StepEvent(step.id, EventKind.STARTED, 1, 1, "home", "w-1")
            yield token(2, b'{"t":1}')
            yield StepEvent(step.id, EventKind.PROGRESS, 1, 3, fraction=0.5, message="half")
            yield done(step.id, step.input)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        finally:
            self.closed.set()

    async def submit(self, step: Step) -> tuple[JobStatus, bool]:
        self.steps.append(step)
        job_id = f"home-{hashlib.sha256((step.idempotency_key or step.id).encode()).hexdigest()[:32]}"
        created = job_id not in self.jobs
        if created:
            self.jobs[job_id] = JobStatus(Job(replace(step, id=job_id), "home", 1000.0, "d"), JobState.QUEUED)
        return self.jobs[job_id], created

    async def job(self, tenant: str, job_id: str) -> JobStatus:
        self.calls.append(("job", tenant, job_id))
        if job_id not in self.jobs:
            raise NotFound(f"there is no job {job_id}", reason="JOB_NOT_FOUND")
        return self.jobs[job_id]

    async def watch(self, tenant: str, job_id: str, attempt: int, after_sequence: int) -> AsyncGenerator[StepEvent | Completed, None]:
        self.calls.append(("watch", tenant, job_id, attempt, after_sequence))
        try:
            assert self.on_stream is not None
            async for item in self.on_stream((attempt, after_sequence)):
                yield item
        finally:
            self.closed.set()

    async def cancel(self, tenant: str, job_id: str) -> JobStatus:
        self.calls.append(("cancel", tenant, job_id))
        return await self.job(tenant, job_id)

    def window(self, tenant: str, sessions: int, tenant_sessions: int, granted: int, outstanding: int) -> int:
        self.windows.append((tenant, sessions, tenant_sessions, granted, outstanding))
        return self.on_window(outstanding)

    def target(self, kind: Kind, name: str) -> Target | None:
        return self.known.get((kind, name))

    def targets(self, kind: Kind | None = None) -> Sequence[TargetStatus]:
        return [TargetStatus(target, ("home",)) for target in self.known.values() if kind in (None, target.kind)]


def done(step_id: str, output: Payload, attempt: int = 1) -> Completed:
    return Completed(StepResult(step_id, "alice", Status.DONE, output, attempt, "home", "w-1"), Timing(1, 2, 3, 4))


def token(sequence: int, data: bytes, attempt: int = 1) -> StepEvent:
    return StepEvent("s", EventKind.TOKEN, attempt, sequence, payload=Payload(data))


def make_config(anonymous: str = "", **gateway: Any) -> config.Config:
    section = {"listen": "127.0.0.1:0", **gateway}
    return config.parse({"gateway": section, "auth": {"anonymous_tenant": anonymous, "keys": KEYS}})


@asynccontextmanager
async def serving(service: FakeService, anonymous: str = "", grace_s: float = 0.0, **gateway: Any) -> AsyncIterator[int]:
    """A real gRPC server on a free port; gives the port."""
    ingress = Ingress(make_config(anonymous, **gateway), service, SystemClock())
    port = await ingress.start()
    ingress.set_serving(True)
    try:
        yield port
    finally:
        await ingress.stop(grace_s)


@asynccontextmanager
async def stub_for(port: int) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield GatewayStub(channel)


def json_step(data: bytes = b'{"n":1}', target: str = "echo", **more: Any) -> pb.Step:
    content = pb.Content(content_type="application/json", data=data)
    return pb.Step(**{"kind": pb.KIND_TOOL, "target": target, "input": pb.Payload(content=content), **more})
