"""A span for each executed step of a trace that is recorded upstream. Inputs and outputs stay out of it."""

import dataclasses
from collections.abc import Sequence

from opentelemetry import trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.errors import NearloopError
from gateway.ports import Executor, Work
from gateway.types import Payload, Step, Target

_PROPAGATOR = TraceContextTextMapPropagator()


class _ChildWork:
    """The same work, whose step carries the span as its parent."""

    def __init__(self, work: Work, step: Step) -> None:
        self.step = step
        self.attempt = work.attempt
        self.again = work.again
        self.queue_region = work.queue_region
        self._work = work
        self.remaining_s = work.remaining_s
        self.emit = work.emit
        self.progress = work.progress

    @property
    def leaving(self) -> bool:
        return self._work.leaving


class TracedExecutor:
    """Wraps an executor; used only where an exporter is configured."""

    def __init__(self, executor: Executor, provider: trace.TracerProvider, region: str, worker: str) -> None:
        self._executor = executor
        self._tracer = provider.get_tracer("nearloop")
        self._attributes = {"nearloop.region": region, "nearloop.worker": worker}

    async def start(self) -> None:
        await self._executor.start()

    async def close(self) -> None:
        await self._executor.close()

    def targets(self) -> Sequence[Target]:
        return self._executor.targets()

    def ready(self, target: str) -> bool:
        return self._executor.ready(target)

    async def execute(self, work: Work) -> Payload:
        step = work.step
        if not step.traceparent:
            return await self._executor.execute(work)
        context = _PROPAGATOR.extract({"traceparent": step.traceparent, "tracestate": step.tracestate})
        if not trace.get_current_span(context).get_span_context().trace_flags.sampled:
            return await self._executor.execute(work)
        attributes = self._attributes | {"nearloop.step.id": step.id, "nearloop.target": step.target, "nearloop.attempt": str(work.attempt)}
        span = self._tracer.start_span(f"nearloop.worker {step.kind.value}", context, trace.SpanKind.CONSUMER, attributes)
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(span, context))
        child = dataclasses.replace(step, traceparent=carrier["traceparent"], tracestate=carrier.get("tracestate", ""))
        try:
            return await self._executor.execute(_ChildWork(work, child))
        except BaseException as error:
            span.set_attribute("error.type", error.reason if isinstance(error, NearloopError) else type(error).__name__)
            span.set_status(trace.StatusCode.ERROR)
            raise
        finally:
            span.end()
