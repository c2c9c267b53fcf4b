"""nearloop.v1 messages <-> types. Pure; checks nothing but what it cannot represent."""

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from google.protobuf import struct_pb2
from google.protobuf.message import DecodeError
from google.rpc import code_pb2

from gateway.types import (
    JSON,
    TENSORS,
    BatchCost,
    Completed,
    EventKind,
    JobState,
    JobStatus,
    Kind,
    Lane,
    Payload,
    StepEvent,
    StepResult,
    Target,
    TargetStatus,
    TensorSpec,
    Timing,
)
from nearloop.v1 import gateway_pb2 as pb

# Keys are the enums' numbers: an unknown number of a newer client is then simply not there.
KINDS: Mapping[int, Kind] = {
    pb.KIND_INFER: Kind.INFER,
    pb.KIND_TOOL: Kind.TOOL,
    pb.KIND_RETRIEVE: Kind.RETRIEVE,
    pb.KIND_RUN: Kind.RUN,
}
LANES: Mapping[int, Lane] = {
    pb.LANE_UNSPECIFIED: Lane.STANDARD,
    pb.LANE_INTERACTIVE: Lane.INTERACTIVE,
    pb.LANE_STANDARD: Lane.STANDARD,
    pb.LANE_BATCH: Lane.BATCH,
}
JOB_STATES: Mapping[int, JobState] = {pb.JobState.Value(f"JOB_STATE_{state.name}"): state for state in JobState}
_KIND_NUMBERS = {kind: cast("pb.Kind.ValueType", number) for number, kind in KINDS.items()}
_LANE_NUMBERS = {lane: cast("pb.Lane.ValueType", number) for number, lane in LANES.items() if number}
_STATE_NUMBERS = {state: cast("pb.JobState.ValueType", number) for number, state in JOB_STATES.items()}


def kind_to_proto(kind: Kind) -> "pb.Kind.ValueType":
    return _KIND_NUMBERS[kind]


def lane_to_proto(lane: Lane) -> "pb.Lane.ValueType":
    return _LANE_NUMBERS[lane]


def state_to_proto(state: JobState) -> "pb.JobState.ValueType":
    return _STATE_NUMBERS[state]


# --- payloads ---


def dump_json(value: object, sort_keys: bool = False) -> bytes:
    """Compact UTF-8. Raises ValueError for NaN and infinities, TypeError for what JSON does not have."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False, sort_keys=sort_keys).encode()


def value_from_proto(value: struct_pb2.Value) -> object:
    """A JSON value; whole numbers up to 2**53 become int, as a Struct knows only doubles. Raises ValueError for NaN and infinities."""
    which = value.WhichOneof("kind")
    if which == "string_value":
        return value.string_value
    if which == "number_value":
        number = value.number_value
        if not math.isfinite(number):
            raise ValueError("a number is not finite")
        exact = abs(number) <= 2**53 and number.is_integer() and (number or math.copysign(1, number) > 0)
        return int(number) if exact else number
    if which == "bool_value":
        return value.bool_value
    if which == "struct_value":
        return struct_from_proto(value.struct_value)
    if which == "list_value":
        return [value_from_proto(item) for item in value.list_value.values]
    return None


def struct_from_proto(message: struct_pb2.Struct) -> dict[str, object]:
    """A JSON object. Raises ValueError for NaN and infinities."""
    return {key: value_from_proto(value) for key, value in message.fields.items()}


def struct_to_proto(value: Mapping[str, Any]) -> struct_pb2.Struct:
    """Numbers become doubles. Raises ValueError for what a Struct cannot hold."""
    message = struct_pb2.Struct()
    try:
        message.update(_plain(value))
    except (TypeError, OverflowError) as error:
        raise ValueError(str(error)) from None
    return message


def _plain(value: Any) -> Any:
    """Dicts and lists all the way down: Struct.update refuses other mappings and tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def payload_from_proto(message: pb.Payload) -> Payload | None:
    """Bytes with their content type; None when nothing is set. Raises ValueError for NaN and infinities in a Struct."""
    which = message.WhichOneof("value")
    if which == "content":
        content = message.content
        # The constant, not a copy of it for each of thousands of steps in flight.
        return Payload(content.data, JSON if content.content_type == JSON else content.content_type)
    if which == "json":
        # Sorted: a Struct has no order, and the same one sent again must be the same job.
        return Payload(dump_json(struct_from_proto(message.json), sort_keys=True), JSON)
    if which == "tensors":
        return Payload(message.tensors.SerializeToString(), TENSORS)
    return None


def payload_to_proto(payload: Payload, as_struct: bool = False) -> pb.Payload:
    """Tensors as Tensors, a JSON object as a Struct when `as_struct`, everything else as Content, unchanged."""
    if payload.content_type == TENSORS:
        try:
            return pb.Payload(tensors=pb.Tensors.FromString(payload.data))
        except DecodeError:
            pass  # not ours to hide: the caller gets the bytes as they are
    elif as_struct and payload.content_type == JSON:
        try:
            value = json.loads(payload.data)
            if isinstance(value, dict):
                return pb.Payload(json=struct_to_proto(value))
        except (ValueError, RecursionError):
            pass  # a result that is no JSON, or too deep for a Struct, is still a result
    return pb.Payload(content=pb.Content(content_type=payload.content_type, data=payload.data))


# --- results, events, jobs ---


def result_to_proto(result: StepResult, timing: Timing | None = None, as_struct: bool = False) -> pb.Result:
    times = timing or Timing(queue_us=result.queue_us, service_us=result.service_us)
    return pb.Result(
        step_id=result.step_id,
        output=payload_to_proto(result.output, as_struct),
        attempt=result.attempt,
        region=result.region,
        worker=result.worker,
        timing=pb.Timing(
            admission_us=times.admission_us,
            queue_us=times.queue_us,
            network_us=times.network_us,
            service_us=times.service_us,
        ),
    )


def event_to_proto(item: StepEvent | Completed, sequence: int, as_struct: bool = False) -> pb.Event | None:
    """An event; `sequence` is the position for a result, which has none of its own. None for an event that is not for clients."""
    if isinstance(item, Completed):
        result = result_to_proto(item.result, item.timing, as_struct)
        return pb.Event(sequence=sequence, attempt=item.result.attempt, result=result)
    event = pb.Event(sequence=item.sequence, attempt=item.attempt)
    if item.kind is EventKind.TOKEN:
        event.token.CopyFrom(payload_to_proto(item.payload or Payload(), as_struct))
    elif item.kind is EventKind.STARTED:
        event.started.region = item.region
        event.started.worker = item.worker
    elif item.kind is EventKind.PROGRESS:
        event.progress.fraction = item.fraction
        event.progress.message = item.message
    else:
        return None
    return event


def job_to_proto(status: JobStatus) -> pb.Job:
    step, result = status.job.step, status.result
    job = pb.Job(
        id=step.id,
        state=_STATE_NUMBERS[status.state],
        kind=_KIND_NUMBERS[step.kind],
        target=step.target,
        lane=_LANE_NUMBERS[step.lane],
        region=status.job.region,
    )
    job.create_time.FromMicroseconds(round(status.job.created_s * 1e6))
    job.expire_time.FromMicroseconds(round(step.deadline_s * 1e6))
    if result is not None and status.state is JobState.DONE:
        job.result.CopyFrom(result_to_proto(result))
    elif result is not None:
        job.failure.code = code_number(result.code)
        job.failure.reason = result.reason
        job.failure.message = result.message
    return job


def code_number(name: str) -> int:
    """The number of a gRPC status name; INTERNAL for a name that is none."""
    return int(code_pb2.Code.Value(name)) if name in code_pb2.Code.keys() else int(code_pb2.INTERNAL)  # noqa: SIM118 - not a dict


def code_name(number: int) -> str:
    """The name of a gRPC status number; INTERNAL for a number that is none."""
    return str(code_pb2.Code.Name(number)) if number in code_pb2.Code.values() else "INTERNAL"


# --- targets ---


def target_to_proto(status: TargetStatus) -> pb.Target:
    target = status.target
    message = pb.Target(
        kind=_KIND_NUMBERS[target.kind],
        name=target.name,
        description=target.description,
        home_region=target.home_region,
        live_regions=status.live_regions,
        read_only=target.read_only,
        idempotent=target.idempotent,
        tensor_inputs=[_spec_to_proto(spec) for spec in target.tensor_inputs],
        tensor_outputs=[_spec_to_proto(spec) for spec in target.tensor_outputs],
    )
    message.timeout.FromMicroseconds(round(target.timeout_s * 1e6))
    if target.input_schema is not None:
        message.input_schema.CopyFrom(struct_to_proto(target.input_schema))
    if status.batch_cost is not None:
        message.batch_cost.fixed.FromNanoseconds(round(status.batch_cost.fixed_s * 1e9))
        message.batch_cost.each.FromNanoseconds(round(status.batch_cost.each_s * 1e9))
        message.batch_cost.batches = status.batch_cost.batches
    return message


def target_from_proto(message: pb.Target) -> TargetStatus:
    """What a client can know of a target; settings that are not in the message have their defaults. Raises ValueError."""
    if message.kind not in KINDS:
        raise ValueError(f"kind {message.kind} is not known here")
    target = Target(
        kind=KINDS[message.kind],
        name=message.name,
        description=message.description,
        home_region=message.home_region,
        timeout_s=message.timeout.ToMicroseconds() / 1e6,
        read_only=message.read_only,
        idempotent=message.idempotent,
        input_schema=struct_from_proto(message.input_schema) if message.HasField("input_schema") else None,
        tensor_inputs=tuple(_spec_from_proto(tensor) for tensor in message.tensor_inputs),
        tensor_outputs=tuple(_spec_from_proto(tensor) for tensor in message.tensor_outputs),
    )
    cost = message.batch_cost
    learnt = BatchCost(cost.fixed.ToNanoseconds() / 1e9, cost.each.ToNanoseconds() / 1e9, cost.batches)
    return TargetStatus(target, tuple(message.live_regions), learnt if message.HasField("batch_cost") else None)


def _spec_to_proto(spec: TensorSpec) -> pb.Tensor:
    return pb.Tensor(name=spec.name, datatype=spec.datatype, shape=spec.shape)


def _spec_from_proto(tensor: pb.Tensor) -> TensorSpec:
    return TensorSpec(tensor.name, tensor.datatype, tuple(tensor.shape))
