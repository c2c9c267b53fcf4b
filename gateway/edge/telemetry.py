"""OpenTelemetry at the edge: W3C trace context on every step, spans where the head samplers say so.

Without an OTLP endpoint nothing is recorded, and a caller's context travels on unchanged. Inputs and outputs never enter a span.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.clock import Clock
from gateway.config import TelemetrySection
from gateway.core.containment import Containment, a_probability
from gateway.errors import NearloopError
from gateway.policy import Named
from gateway.types import Flow, Step

_PROPAGATOR = TraceContextTextMapPropagator()
_LONGEST_ATTRIBUTE = 256  # the SDK has no limit by default


def build_provider(section: TelemetrySection, role: str, name: str) -> TracerProvider | None:
    """The exporter pipeline of a process; None without an endpoint. Sampling is decided before a span is made."""
    if not section.otlp_endpoint:
        return None
    resource = Resource.create({"service.name": f"{section.service_name}-{role}", "service.instance.id": name})
    provider = TracerProvider(ALWAYS_ON, resource, span_limits=SpanLimits(max_span_attribute_length=_LONGEST_ATTRIBUTE))
    exporter = OTLPSpanExporter(section.otlp_endpoint, insecure=not section.otlp_endpoint.startswith("https://"))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


async def shut_down(provider: TracerProvider | None) -> None:
    """Exports what is left; in a thread, since the SDK blocks."""
    if provider:
        await asyncio.to_thread(provider.shutdown)


class StepTracer:
    """Implements `ports.Tracer`. The probability of recording is the largest that a head sampler gives, 0 without any."""

    def __init__(
        self, provider: TracerProvider | None, samplers: Sequence[Named], contain: Containment, clock: Clock, random: Callable[[], float]
    ) -> None:
        self._tracer = provider.get_tracer("nearloop") if provider else None
        self._samplers = samplers
        self._contain = contain
        self._clock = clock
        self._random = random

    def start(self, step: Step, flow: Flow) -> tuple[Step, object]:
        if self._tracer is None:
            return step, None
        carrier = {"traceparent": step.traceparent, "tracestate": step.tracestate} if step.traceparent else {}
        context = _PROPAGATOR.extract(carrier)
        parent = trace.get_current_span(context).get_span_context()
        if self._random() >= self._probability(flow, parent.trace_flags.sampled if parent.is_valid else None):
            return step, None
        attributes = {
            "nearloop.step.id": step.id,
            "nearloop.tenant": flow.tenant,
            "nearloop.target": flow.scope,
            "nearloop.lane": flow.lane.value,
            "nearloop.run": flow.run,
        }
        span = self._tracer.start_span(f"step {flow.scope}", context, trace.SpanKind.SERVER, attributes)
        outgoing: dict[str, str] = {}
        _PROPAGATOR.inject(outgoing, trace.set_span_in_context(span))
        return replace(step, traceparent=outgoing["traceparent"], tracestate=outgoing.get("tracestate", "")), span

    def end(self, span: object, error: BaseException | None) -> None:
        if not isinstance(span, trace.Span):
            return
        if error is not None:
            reason = error.reason if isinstance(error, NearloopError) else type(error).__name__
            span.set_attribute("error.type", reason)
            span.set_status(trace.StatusCode.ERROR)
        span.end()

    def _probability(self, flow: Flow, upstream_sampled: bool | None) -> float:
        highest = 1.0 if upstream_sampled else 0.0
        for named in self._samplers:
            probability = self._contain.call(named, "probability", a_probability, 0.0, flow, upstream_sampled, self._clock.now_s())
            if not named.shadow:
                highest = max(highest, probability)
        return highest
