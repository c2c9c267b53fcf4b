import json
import math
from typing import Any

import numpy as np
import pytest
from google.protobuf import struct_pb2
from hypothesis import given
from hypothesis import strategies as st

from gateway import tensors
from gateway.client_values import event_from_proto, input_to_proto, job_from_proto, result_from_proto
from gateway.edge import convert
from gateway.errors import Expired, StepFailed
from gateway.types import (
    JSON,
    TENSORS,
    Completed,
    EventKind,
    Job,
    JobState,
    JobStatus,
    Kind,
    Lane,
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

ids = st.text("abcXYZ019_-", min_size=1, max_size=64)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
micros = st.integers(0, 2**53)
scalars = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=20)
objects = st.dictionaries(texts, values, max_size=5)
payloads = st.builds(Payload, st.binary(max_size=50), st.sampled_from([JSON, "text/plain", "image/png"]))
timings = st.builds(Timing, micros, micros, micros, micros)
results = st.builds(
    StepResult, ids, ids, st.just(Status.DONE), payloads, st.integers(1, 2**31), ids, ids, queue_us=micros, service_us=micros
)


@given(objects)
def test_a_struct_keeps_the_value(value: dict[str, Any]) -> None:
    assert convert.struct_from_proto(convert.struct_to_proto(value)) == value


@given(objects)
def test_struct_input_is_json_bytes(value: dict[str, Any]) -> None:
    payload = convert.payload_from_proto(pb.Payload(json=convert.struct_to_proto(value)))
    assert payload is not None
    assert payload.content_type == JSON
    assert json.loads(payload.data) == value
    assert convert.payload_to_proto(payload, as_struct=True).json == convert.struct_to_proto(value)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_struct_with_a_number_that_json_lacks_is_refused(number: float) -> None:
    message = struct_pb2.Struct()
    message.fields["x"].number_value = number
    with pytest.raises(ValueError, match="not finite"):
        convert.payload_from_proto(pb.Payload(json=message))


def test_whole_numbers_of_a_struct_are_integers() -> None:
    value = convert.struct_from_proto(convert.struct_to_proto({"n": 3, "x": 3.5, "t": True}))
    assert {key: type(item) for key, item in value.items()} == {"n": int, "x": float, "t": bool}


def test_the_same_struct_is_always_the_same_bytes() -> None:
    one = convert.struct_to_proto({"b": 1, "a": {"d": 1, "c": 2}})
    other = convert.struct_to_proto({"a": {"c": 2, "d": 1}, "b": 1})
    assert convert.payload_from_proto(pb.Payload(json=one)) == convert.payload_from_proto(pb.Payload(json=other))


@given(payloads)
def test_content_passes_unchanged(payload: Payload) -> None:
    message = convert.payload_to_proto(payload)
    assert message.WhichOneof("value") == "content"
    assert convert.payload_from_proto(message) == payload


@pytest.mark.parametrize("data", [b"[1]", b"1", b"{", b"\xff", b"NaN", b"[" * 100_000])
def test_json_that_no_struct_can_hold_is_content(data: bytes) -> None:
    message = convert.payload_to_proto(Payload(data), as_struct=True)
    assert message.content.data == data


def test_nothing_set_is_none() -> None:
    assert convert.payload_from_proto(pb.Payload()) is None


def test_broken_tensors_are_content() -> None:
    assert convert.payload_to_proto(Payload(b"\xff\xff", TENSORS)).content.data == b"\xff\xff"


dtypes = st.sampled_from([*tensors.NUMPY_TYPES.values(), ">f4", ">i8"])


@given(st.lists(st.tuples(ids, dtypes, st.lists(st.integers(0, 3), max_size=3), st.binary(min_size=8 * 27)), max_size=3))
def test_arrays_survive(drawn: list[tuple[str, str, list[int], bytes]]) -> None:
    arrays = {}
    for name, dtype, shape, data in drawn:
        count = math.prod(shape)
        bits = np.frombuffer(data[: count * np.dtype(dtype).itemsize], np.uint8)
        arrays[name] = (bits % 2 if dtype == "|b1" else bits).view(dtype)[:count].reshape(shape)
    message = convert.payload_to_proto(tensors.encode(arrays))
    payload = convert.payload_from_proto(message)
    assert payload is not None
    back = tensors.decode(payload)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype.newbyteorder("<")
        np.testing.assert_array_equal(back[name], array)


@given(st.lists(st.binary(max_size=20), max_size=10))
def test_bytes_elements_survive(items: list[bytes]) -> None:
    array = np.array([*items, None], dtype=np.object_)[:-1].reshape(len(items), 1)
    back = tensors.from_tensor(tensors.to_tensor("x", array))
    assert (back.shape, back.reshape(-1).tolist()) == ((len(items), 1), items)


def test_texts_are_utf8_bytes() -> None:
    assert tensors.from_tensor(tensors.to_tensor("x", np.array(["ü", "b"]))).tolist() == ["ü".encode(), b"b"]


def test_bf16_becomes_float32() -> None:
    tensor = pb.Tensor(name="x", datatype="BF16", shape=[2], contents=b"\x80\x3f\x00\xc0")
    assert tensors.from_tensor(tensor).tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    "tensor",
    [
        pb.Tensor(datatype="FP32", shape=[2], contents=b"\0" * 4),
        pb.Tensor(datatype="FP32", shape=[1], contents=b"\0" * 3),
        pb.Tensor(datatype="WHAT", shape=[1], contents=b"\0" * 4),
        pb.Tensor(datatype="BYTES", shape=[1], contents=b"\1\0\0"),
        pb.Tensor(datatype="BYTES", shape=[1], contents=b"\2\0\0\0a"),
        pb.Tensor(datatype="BYTES", shape=[2], contents=b"\1\0\0\0a"),
    ],
)
def test_tensors_that_are_wrong_raise(tensor: pb.Tensor) -> None:
    with pytest.raises(ValueError):
        tensors.from_tensor(tensor)


@pytest.mark.parametrize("array", [np.array([1j]), np.array([1], dtype="M8[s]"), np.array([1, None], dtype=object)])
def test_arrays_without_a_datatype_raise(array: tensors.Array) -> None:
    with pytest.raises(ValueError):
        tensors.to_tensor("x", array)


@given(results, timings)
def test_results_survive(result: StepResult, timing: Timing) -> None:
    back = result_from_proto(convert.result_to_proto(result, timing))
    assert (back.step_id, back.payload, back.attempt) == (result.step_id, result.output, result.attempt)
    assert (back.region, back.worker, back.timing) == (result.region, result.worker, timing)


events = st.builds(StepEvent, st.just(""), st.just(EventKind.STARTED), st.integers(1, 2**31), st.integers(1, 2**63), ids, ids) | st.builds(
    StepEvent, st.just(""), st.just(EventKind.TOKEN), st.integers(1, 2**31), st.integers(1, 2**63), payload=payloads
)


@given(events)
def test_events_survive(event: StepEvent) -> None:
    message = convert.event_to_proto(event, event.sequence)
    assert message is not None
    assert event_from_proto(message) == event


def test_progress_and_result_are_events_and_ended_is_not() -> None:
    progress = StepEvent("", EventKind.PROGRESS, 2, 7, fraction=0.25, message="a quarter")
    message = convert.event_to_proto(progress, 7)
    assert message is not None
    assert event_from_proto(message) == progress
    done = convert.event_to_proto(Completed(StepResult("s", "t", Status.DONE, attempt=3), Timing()), 8)
    assert done is not None
    assert (done.sequence, done.attempt, done.result.step_id) == (8, 3, "s")
    assert convert.event_to_proto(StepEvent("s", EventKind.ENDED, 1, 9), 9) is None
    assert event_from_proto(pb.Event(sequence=1)) is None


STEP = Step("home-1", "alice", Kind.RETRIEVE, "docs", Payload(), 1_800_000_000.25, Lane.BATCH)


@pytest.mark.parametrize("state", list(JobState))
def test_jobs_survive(state: JobState) -> None:
    result = None
    if state is JobState.DONE:
        result = StepResult("home-1", "alice", Status.DONE, Payload(b"1"), 2, "home", "w", 5, 6)
    elif state not in (JobState.QUEUED, JobState.RUNNING):
        code = "DEADLINE_EXCEEDED" if state is JobState.EXPIRED else "DATA_LOSS"
        result = StepResult("home-1", "alice", Status(state.value), code=code, reason="WHY", message="text")
    job = job_from_proto(convert.job_to_proto(JobStatus(Job(STEP, "near", 1_700_000_000.5, "d"), state, result)), created=True)
    assert (job.id, job.state, job.kind, job.target, job.lane, job.region) == ("home-1", state, Kind.RETRIEVE, "docs", Lane.BATCH, "near")
    assert (job.created_s, job.expires_s, job.created) == (1_700_000_000.5, 1_800_000_000.25, True)
    assert job.ended == (state not in (JobState.QUEUED, JobState.RUNNING))
    if state is JobState.DONE:
        assert job.result is not None
        assert (job.result.json, job.result.timing) == (1, Timing(queue_us=5, service_us=6))
    elif job.ended:
        assert type(job.failure) is (Expired if state is JobState.EXPIRED else StepFailed)
        assert job.failure is not None
        assert (job.failure.code, job.failure.reason, job.failure.message) == (code, "WHY", "text")


def test_targets_survive() -> None:
    target = Target(
        Kind.INFER,
        "plan",
        "chooses",
        home_region="far",
        timeout_s=2.5,
        read_only=True,
        idempotent=True,
        input_schema={"type": "object", "required": ("a",), "maxProperties": 3},
        tensor_inputs=(TensorSpec("x", "FP32", (-1, 4)),),
        tensor_outputs=(TensorSpec("y", "BYTES", (1,)),),
    )
    back = convert.target_from_proto(convert.target_to_proto(TargetStatus(target, ("far", "home"))))
    assert back.live_regions == ("far", "home")
    assert back.target.input_schema == {"type": "object", "required": ["a"], "maxProperties": 3}
    for name in ("scope", "description", "home_region", "timeout_s", "read_only", "idempotent", "tensor_inputs", "tensor_outputs"):
        assert getattr(back.target, name) == getattr(target, name)


def test_every_kind_lane_and_state_has_a_number() -> None:
    assert set(convert.KINDS.values()) == set(Kind)
    assert set(convert.LANES.values()) == set(Lane)
    assert set(convert.JOB_STATES.values()) == set(JobState)
    assert [convert.KINDS[convert.kind_to_proto(kind)] for kind in Kind] == list(Kind)
    assert [convert.LANES[convert.lane_to_proto(lane)] for lane in Lane] == list(Lane)


def test_code_numbers() -> None:
    assert (convert.code_number("UNAVAILABLE"), convert.code_number("nonsense"), convert.code_number("")) == (14, 13, 13)


def test_the_clients_input_forms() -> None:
    assert input_to_proto({"n": 2**60}).content.data == b'{"n":1152921504606846976}'
    assert input_to_proto([1]).content.content_type == JSON
    assert input_to_proto({}).content.data == b"{}"
    assert input_to_proto(Payload(b"x", "text/plain")).content.content_type == "text/plain"
    assert input_to_proto({"a": np.zeros((1, 2), np.float32)}).tensors.tensors[0].datatype == "FP32"


@pytest.mark.parametrize("value", [{"x": object()}, {"x": math.nan}, {"a": np.zeros(1), "b": 1}])
def test_input_that_is_neither_json_nor_tensors_raises(value: Any) -> None:
    with pytest.raises(ValueError):
        input_to_proto(value)
