"""Steps, results, events and jobs come back as they were, whatever they hold."""

import string
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import subjects
from gateway.edge import catalogue, codec
from gateway.edge import headers as h
from gateway.edge.delivery import AckInfo, read_ack
from gateway.types import EventKind, Job, Kind, Lane, Payload, Status, Step, StepEvent, StepResult, Target, TensorSpec, WorkerInfo

ids = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=64)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
names = st.text(string.ascii_uppercase + "_", max_size=20)
printable = st.text(string.ascii_letters + string.digits + "-=,;/", max_size=60)
milliseconds = st.integers(0, 4_000_000_000_000).map(lambda value: value / 1000)
counts = st.integers(0, 2**40)
payloads = st.builds(Payload, st.binary(max_size=200), texts)
steps = st.builds(
    Step,
    id=ids,
    tenant=ids,
    kind=st.sampled_from(Kind),
    target=ids,
    input=payloads,
    deadline_s=milliseconds,
    lane=st.sampled_from(Lane),
    run=st.just("") | ids,
    idempotency_key=texts,
    client_region=st.just("") | ids,
    stream=st.booleans(),
    traceparent=printable,
    tracestate=printable,
    regions=st.lists(ids, max_size=3, unique=True).map(tuple),
)
results = st.builds(
    StepResult,
    step_id=ids,
    tenant=ids,
    status=st.sampled_from(Status),
    output=payloads,
    attempt=st.integers(1, 1000),
    region=st.just("") | ids,
    worker=texts,
    queue_us=counts,
    service_us=counts,
    code=names,
    reason=texts,
    message=texts,
    worker_wait_us=st.just(0) | counts,
)
events = st.builds(
    StepEvent,
    step_id=ids,
    kind=st.sampled_from(EventKind),
    attempt=st.integers(1, 1000),
    sequence=counts,
    region=st.just("") | ids,
    worker=texts,
    payload=st.none() | payloads,
    fraction=st.floats(0, 1),
    message=texts,
)


def _lines(raw: bytes) -> list[bytes]:
    assert raw.startswith(b"NATS/1.0\r\n")
    assert raw.endswith(b"\r\n\r\n")
    return raw[:-4].split(b"\r\n")[1:]


@given(steps)
def test_a_step_comes_back(step: Step) -> None:
    raw = codec.dispatch_headers(step, "nl.reply.g1.x", 90)
    subject = subjects.step("home", step.kind, step.target, step.lane, step.id)
    assert codec.read_step(subject, h.parse(raw), step.input.data) == step
    assert h.parse(raw)[subjects.H_REPLY] == "nl.reply.g1.x"
    assert h.parse(raw)[subjects.H_MSG_ID] == step.id


@given(steps, milliseconds)
def test_a_job_comes_back(step: Step, created_s: float) -> None:
    job = Job(step, "far-away", created_s, "0123456789abcdef")
    raw = codec.job_headers(job, extra="Nats-Batch-Sequence: 1\r\n")
    assert codec.read_job(subjects.job("far-away", step.tenant, step.id), raw, step.input.data) == job


@given(results)
def test_a_result_comes_back(result: StepResult) -> None:
    raw = codec.result_headers(result)
    for subject in (subjects.result("home", result.tenant, result.step_id), subjects.reply("g1", result.step_id)):
        assert codec.read_result(subject, raw, result.output.data) == result


def test_a_wait_of_nothing_costs_no_header() -> None:
    result = StepResult("s", "t", Status.DONE)
    assert b"Wait" not in codec.result_headers(result)
    assert b"Nl-Worker-Wait-Us: 7" in codec.result_headers(replace(result, worker_wait_us=7))


@given(events)
def test_an_event_comes_back(event: StepEvent) -> None:
    body = event.payload.data if event.payload else b""
    assert codec.read_event(event.step_id, codec.event_headers(event), body) == event


@given(texts)
def test_no_text_adds_a_header(text: str) -> None:
    result = StepResult("s", "t", Status.FAILED, message=text, reason=text, worker=text)
    plain = StepResult("s", "t", Status.FAILED, message="m", reason="r", worker="w")
    found = _lines(codec.result_headers(result))
    assert len(found) <= len(_lines(codec.result_headers(plain)))
    assert all(b": " in line and b"\n" not in line and b"\r" not in line and b"\0" not in line for line in found)


@given(texts)
def test_trace_context_cannot_break_out(text: str) -> None:
    step = Step("s", "t", Kind.TOOL, "x", Payload(), 1.0, traceparent=text or "-", tracestate=text or "-")
    assert [line.split(b":")[0] for line in _lines(codec.step_headers(step))] == [
        b"Nl-Tenant",
        b"Nl-Deadline-Ms",
        b"Nl-Content-Type",
        b"traceparent",
        b"tracestate",
    ]


def test_long_messages_are_cut() -> None:
    result = StepResult("s", "t", Status.FAILED, message="x" * 100_000)
    assert len(codec.result_headers(result)) < 2 * codec.MAX_MESSAGE_CHARACTERS


def test_readable_text_stays_readable() -> None:
    assert h.escape("größe 12 ✓") == "größe 12 ✓"
    assert h.escape("50%\n") == "50%25%0A"


@pytest.mark.parametrize("raw", [b"", b"NATS/1.0\r\n\r\n"])
def test_what_is_not_a_step_is_an_error(raw: bytes) -> None:
    with pytest.raises((ValueError, KeyError)):
        codec.read_step("nl.step.home.tool.x.batch.id", h.parse(raw), b"")
    with pytest.raises((ValueError, KeyError)):
        codec.read_result("nl.result.home.t.id", raw, b"")
    with pytest.raises((ValueError, KeyError)):
        codec.read_event("id", raw, b"")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"", (0, "")),
        (b"NATS/1.0\r\nA: b\r\n\r\n", (0, "")),
        (b"NATS/1.0 503\r\n\r\n", (503, "")),
        (b"NATS/1.0 408 Request Timeout\r\nNats-Pending-Messages: 3\r\n\r\n", (408, "Request Timeout")),
    ],
)
def test_status_lines(raw: bytes, expected: tuple[int, str]) -> None:
    assert h.status(raw) == expected


@pytest.mark.parametrize(
    "subject",
    [
        "$JS.ACK.NL_STEPS_HOME.tool-x-batch.3.17.19.1700000000123456789.5",
        "$JS.ACK._.ACCHASH.NL_STEPS_HOME.tool-x-batch.3.17.19.1700000000123456789.5",
        "$JS.ACK.hub.ACCHASH.NL_STEPS_HOME.tool-x-batch.3.17.19.1700000000123456789.5.rAnDoM",
    ],
)
def test_both_forms_of_the_acknowledgement_subject(subject: str) -> None:
    assert read_ack(subject) == AckInfo(delivered=3, sequence=17, stored_ns=1_700_000_000_123_456_789, pending=5)


@pytest.mark.parametrize("subject", ["", "$JS.ACK.a.b", "_INBOX.x.1", "$JS.ACK.s.c.x.1.2.3.4"])
def test_other_subjects_are_not_acknowledgements(subject: str) -> None:
    with pytest.raises(ValueError):
        read_ack(subject)


def test_targets_and_workers_come_back() -> None:
    spec = TensorSpec("TEXT", "BYTES", (-1, 1))
    target = Target(Kind.INFER, "embed", input_schema={"type": "object", "x": [1, {"y": None}]}, tensor_inputs=(spec,), cost=0.5)
    assert catalogue.read_target(catalogue.write_target(target)) == target
    assert catalogue.read_target(catalogue.write_target(replace(target, input_schema=None))).input_schema is None
    worker = WorkerInfo("w1", "home", Kind.TOOL, ("tool.a", "tool.b"), 4, 2, True)
    assert catalogue.read_worker(catalogue.write_worker(worker)) == worker


def test_a_catalogue_of_a_newer_version_is_read() -> None:
    data = catalogue.write_worker(WorkerInfo("w1", "home", Kind.TOOL, ()))[:-1] + b', "from_the_future": 1}'
    assert catalogue.read_worker(data) == WorkerInfo("w1", "home", Kind.TOOL, ())
    for broken in (b"", b"[]", b"{}", b'{"kind": "nonsense"}'):
        with pytest.raises((ValueError, TypeError, KeyError)):
            catalogue.read_target(broken)
