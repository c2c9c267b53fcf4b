"""Steps, results, events and jobs as subject, header block and body. Pure; the body is always the payload as sent."""

from collections.abc import Mapping

from gateway import subjects as s
from gateway.edge.headers import block, escape, parse, plain, unescape
from gateway.types import EventKind, Job, Kind, Lane, Payload, Status, Step, StepEvent, StepResult

# A step's subject holds these, a job's does not.
H_KIND = "Nl-Kind"
H_TARGET = "Nl-Target"
H_LANE = "Nl-Lane"
H_CREATED = "Nl-Created-Ms"
H_CALL = "Nl-Call"  # which call wrote a job's record or a result
H_TTL = "Nats-TTL"
H_EXPECTED_SUBJECT_SEQUENCE = "Nats-Expected-Last-Subject-Sequence"

MAX_MESSAGE_CHARACTERS = 4096

# Looking up a member is several times faster than calling the enumeration.
_KINDS, _LANES = {kind.value: kind for kind in Kind}, {lane.value: lane for lane in Lane}
_STATUSES = {status.value: status for status in Status}


def _step_fields(step: Step) -> str:
    fields = [
        f"{s.H_TENANT}: {step.tenant}\r\n{s.H_DEADLINE}: {round(step.deadline_s * 1000)}\r\n"
        f"{s.H_CONTENT_TYPE}: {escape(step.input.content_type)}\r\n"
    ]
    if step.run:
        fields.append(f"{s.H_RUN}: {escape(step.run)}\r\n")
    if step.idempotency_key:
        fields.append(f"{s.H_KEY}: {escape(step.idempotency_key)}\r\n")
    if step.client_region:
        fields.append(f"{s.H_CLIENT_REGION}: {escape(step.client_region)}\r\n")
    if step.regions:
        fields.append(f"{s.H_REGIONS}: {','.join(step.regions)}\r\n")
    if step.stream:
        fields.append(f"{s.H_STREAM}: 1\r\n")
    if step.traceparent:
        fields.append(f"{s.H_TRACEPARENT}: {plain(step.traceparent)}\r\n")
    if step.tracestate:
        fields.append(f"{s.H_TRACESTATE}: {plain(step.tracestate)}\r\n")
    return "".join(fields)


def step_headers(step: Step, *, extra: str = "") -> bytes:
    """`extra` is a run of header lines that go in front."""
    return block(extra + _step_fields(step))


def dispatch_headers(step: Step, reply: str, ttl_s: int) -> bytes:
    """Of a step whose gateway waits on `reply`; the step's id makes a repeated publish harmless."""
    return block(f"{s.H_MSG_ID}: {step.id}\r\n{H_TTL}: {ttl_s}s\r\n{s.H_REPLY}: {reply}\r\n{_step_fields(step)}")


def _step(step_id: str, kind: str, target: str, lane: str, found: Mapping[str, str], body: bytes) -> Step:
    return Step(
        id=step_id,
        tenant=found[s.H_TENANT],
        kind=_KINDS[kind],
        target=target,
        input=Payload(body, unescape(found[s.H_CONTENT_TYPE])),
        deadline_s=int(found[s.H_DEADLINE]) / 1000,
        lane=_LANES[lane],
        run=unescape(found.get(s.H_RUN, "")),
        idempotency_key=unescape(found.get(s.H_KEY, "")),
        client_region=unescape(found.get(s.H_CLIENT_REGION, "")),
        stream=found.get(s.H_STREAM) == "1",
        traceparent=found.get(s.H_TRACEPARENT, ""),
        tracestate=found.get(s.H_TRACESTATE, ""),
        regions=tuple(found[s.H_REGIONS].split(",")) if s.H_REGIONS in found else (),
    )


def read_step(subject: str, found: Mapping[str, str], body: bytes) -> Step:
    """Raises ValueError or KeyError for a message that is not a step."""
    _, _, _, kind, target, lane, step_id = subject.split(".")
    return _step(step_id, kind, target, lane, found, body)


def job_headers(job: Job, *, extra: str = "") -> bytes:
    step = job.step
    return block(
        f"{extra}{H_KIND}: {step.kind.value}\r\n{H_TARGET}: {step.target}\r\n{H_LANE}: {step.lane.value}\r\n"
        f"{H_CREATED}: {round(job.created_s * 1000)}\r\n{s.H_DIGEST}: {job.digest}\r\n{_step_fields(step)}"
    )


def read_job(subject: str, raw: bytes, body: bytes) -> Job:
    """Raises ValueError or KeyError for a message that is not a job record."""
    _, _, region, _, step_id = subject.split(".")
    found = parse(raw)
    step = _step(step_id, found[H_KIND], found[H_TARGET], found[H_LANE], found, body)
    return Job(step=step, region=region, created_s=int(found[H_CREATED]) / 1000, digest=found.get(s.H_DIGEST, ""))


def result_headers(result: StepResult, *, extra: str = "") -> bytes:
    fields = (
        f"{extra}{s.H_TENANT}: {result.tenant}\r\n{s.H_STATUS}: {result.status.value}\r\n{s.H_ATTEMPT}: {result.attempt}\r\n"
        f"{s.H_REGION}: {result.region}\r\n{s.H_WORKER}: {escape(result.worker)}\r\n{s.H_QUEUE_US}: {result.queue_us}\r\n"
        f"{s.H_SERVICE_US}: {result.service_us}\r\n{s.H_CONTENT_TYPE}: {escape(result.output.content_type)}\r\n"
    )
    if result.worker_wait_us:
        fields += f"{s.H_WORKER_WAIT_US}: {result.worker_wait_us}\r\n"
    if result.code:
        fields += f"{s.H_CODE}: {result.code}\r\n"
    if result.reason:
        fields += f"{s.H_REASON}: {escape(result.reason)}\r\n"
    if result.message:
        fields += f"{s.H_MESSAGE}: {escape(result.message[:MAX_MESSAGE_CHARACTERS])}\r\n"
    return block(fields)


def read_result(subject: str, raw: bytes, body: bytes) -> StepResult:
    """Of a stored result or a reply: both subjects end with the step's id. Raises ValueError or KeyError."""
    found = parse(raw)
    return StepResult(
        step_id=subject.rpartition(".")[2],
        tenant=found[s.H_TENANT],
        status=_STATUSES[found[s.H_STATUS]],
        output=Payload(body, unescape(found[s.H_CONTENT_TYPE])),
        attempt=int(found[s.H_ATTEMPT]),
        region=found.get(s.H_REGION, ""),
        worker=unescape(found.get(s.H_WORKER, "")),
        queue_us=int(found[s.H_QUEUE_US]),
        service_us=int(found[s.H_SERVICE_US]),
        code=found.get(s.H_CODE, ""),
        reason=unescape(found.get(s.H_REASON, "")),
        message=unescape(found.get(s.H_MESSAGE, "")),
        worker_wait_us=int(found.get(s.H_WORKER_WAIT_US, "0")),
    )


def event_headers(event: StepEvent) -> bytes:
    fields = (
        f"{s.H_EVENT}: {event.kind.value}\r\n{s.H_ATTEMPT}: {event.attempt}\r\n{s.H_SEQUENCE}: {event.sequence}\r\n"
        f"{s.H_REGION}: {event.region}\r\n{s.H_WORKER}: {escape(event.worker)}\r\n"
    )
    if event.payload is not None:
        fields += f"{s.H_CONTENT_TYPE}: {escape(event.payload.content_type)}\r\n"
    if event.fraction:
        fields += f"{s.H_FRACTION}: {event.fraction!r}\r\n"
    if event.message:
        fields += f"{s.H_MESSAGE}: {escape(event.message[:MAX_MESSAGE_CHARACTERS])}\r\n"
    return block(fields)


def read_event(step_id: str, raw: bytes, body: bytes) -> StepEvent:
    """Raises ValueError or KeyError for a message that is not an event."""
    found = parse(raw)
    content_type = found.get(s.H_CONTENT_TYPE)
    return StepEvent(
        step_id=step_id,
        kind=EventKind(found[s.H_EVENT]),
        attempt=int(found[s.H_ATTEMPT]),
        sequence=int(found[s.H_SEQUENCE]),
        region=found.get(s.H_REGION, ""),
        worker=unescape(found.get(s.H_WORKER, "")),
        payload=None if content_type is None else Payload(body, unescape(content_type)),
        fraction=float(found.get(s.H_FRACTION, "0")),
        message=unescape(found.get(s.H_MESSAGE, "")),
    )
