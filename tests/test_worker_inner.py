"""What wraps an executor: inner steps and spans."""

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.errors import StepFailed
from gateway.ports import Executor, Work
from gateway.types import Completed, Kind, Lane, Payload, Status, Step, StepResult, Target, Timing
from workers.inner import InnerCalls
from workers.tracing import TracedExecutor

TRACE = "00-" + "a" * 32 + "-" + "b" * 16 + "-01"
OUTER = Step("s1", "acme", Kind.RETRIEVE, "docs", Payload(b"{}"), 4e9, lane=Lane.BATCH, run="r1", idempotency_key="k1", traceparent=TRACE)


class OneWork:
    def __init__(self, step: Step) -> None:
        self.step = step
        self.attempt = 1
        self.again = False
        self.queue_region = "home"
        self.leaving = False

    def remaining_s(self) -> float:
        return 5.0

    def emit(self, token: Payload) -> None: ...

    def progress(self, fraction: float, message: str) -> None: ...


class OneExecutor:
    def __init__(self, work: Any) -> None:
        self.work = work

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    def targets(self) -> Sequence[Target]:
        return ()

    def ready(self, target: str) -> bool:
        return True

    async def execute(self, work: Work) -> Payload:
        return Payload(await self.work(work.step))


class Service:
    """Echoes; keeps the steps that it got."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    async def execute(self, step: Step) -> Completed:
        self.steps.append(step)
        await asyncio.sleep(0)
        return Completed(StepResult(step.id, step.tenant, Status.DONE, step.input), Timing())

    def target(self, kind: Kind, name: str) -> Target:
        return Target(kind, name)


async def test_inner_steps_belong_to_the_outer_step_also_side_by_side() -> None:
    service = Service()
    calls = InnerCalls(service, "home", (f"inner-{number}" for number in itertools.count()).__next__)  # type: ignore[arg-type]

    async def embed(step: Step) -> bytes:
        return (await calls.infer("embed", Payload(step.tenant.encode()))).data

    executor = calls.wrap(OneExecutor(embed))
    outers = [replace(OUTER, id=f"s{index}", tenant=f"t{index}") for index in range(5)]
    answers = await asyncio.gather(*(asyncio.create_task(_run(executor, outer)) for outer in outers))
    assert [answer.data.decode() for answer in answers] == [outer.tenant for outer in outers]
    for outer, inner in zip(outers, service.steps, strict=True):
        assert (inner.kind, inner.target, inner.tenant) == (Kind.INFER, "embed", outer.tenant)
        assert (inner.lane, inner.run, inner.deadline_s, inner.traceparent) == (outer.lane, outer.run, outer.deadline_s, TRACE)
        assert inner.idempotency_key == ""  # that is the outer step's
    assert len({inner.id for inner in service.steps} | {outer.id for outer in outers}) == 10


async def test_a_collection_is_asked_with_a_deadline_of_its_own() -> None:
    service = Service()
    calls = InnerCalls(service, "home", iter(["i1", "i2"]).__next__)  # type: ignore[arg-type]

    async def ask(step: Step) -> bytes:
        return (await asyncio.gather(*(calls.retrieve(name, Payload(b"{}"), 2.5) for name in ("docs-0", "docs-1"))))[0].data

    await _run(calls.wrap(OneExecutor(ask)), OUTER)
    assert [(step.id, step.kind, step.target) for step in service.steps] == [
        ("i1", Kind.RETRIEVE, "docs-0"),
        ("i2", Kind.RETRIEVE, "docs-1"),
    ]
    for inner in service.steps:
        assert (inner.tenant, inner.lane, inner.run, inner.deadline_s) == (OUTER.tenant, OUTER.lane, OUTER.run, OUTER.deadline_s - 2.5)
        assert inner.idempotency_key == ""
    assert calls.collection("docs-0") == Target(Kind.RETRIEVE, "docs-0")


async def _run(executor: Executor, step: Step) -> Payload:
    return await executor.execute(OneWork(step))


@pytest.fixture
def spans() -> tuple[TracerProvider, InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider, exporter


async def test_a_sampled_step_gets_a_span_that_its_call_continues(spans: tuple[TracerProvider, InMemorySpanExporter]) -> None:
    provider, exporter = spans
    seen: list[str] = []

    async def note(step: Step) -> bytes:
        seen.append(step.traceparent)
        return b"{}"

    executor = TracedExecutor(OneExecutor(note), provider, "home", "w1")
    await executor.execute(OneWork(OUTER))
    (span,) = exporter.get_finished_spans()
    assert span.name == "nearloop.worker retrieve"
    assert span.parent is not None
    assert format(span.parent.span_id, "016x") == "b" * 16
    assert seen == [f"00-{'a' * 32}-{format(span.context.span_id, '016x')}-01"]


async def test_what_is_not_sampled_has_no_span_and_keeps_its_context(spans: tuple[TracerProvider, InMemorySpanExporter]) -> None:
    provider, exporter = spans
    seen: list[str] = []

    async def note(step: Step) -> bytes:
        seen.append(step.traceparent)
        return b"{}"

    executor = TracedExecutor(OneExecutor(note), provider, "home", "w1")
    unsampled = TRACE[:-1] + "0"
    for traceparent in ("", unsampled):
        await executor.execute(OneWork(replace(OUTER, traceparent=traceparent)))
    assert seen == ["", unsampled]
    assert exporter.get_finished_spans() == ()


async def test_a_failed_step_marks_its_span_with_the_reason_only(spans: tuple[TracerProvider, InMemorySpanExporter]) -> None:
    provider, exporter = spans

    async def fail(step: Step) -> bytes:
        raise StepFailed("quotes a secret", reason="HTTP_404")

    with pytest.raises(StepFailed):
        await TracedExecutor(OneExecutor(fail), provider, "home", "w1").execute(OneWork(OUTER))
    (span,) = exporter.get_finished_spans()
    assert span.attributes is not None
    assert span.attributes["error.type"] == "HTTP_404"
    assert "secret" not in span.to_json()
