"""What the client takes and gives: Python values instead of messages."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gateway import tensors
from gateway.edge import convert, status
from gateway.errors import NearloopError
from gateway.tensors import Array
from gateway.types import JSON, EventKind, JobState, Kind, Lane, Payload, StepEvent, Timing
from nearloop.v1 import gateway_pb2 as pb

# JSON, bytes with their type, or arrays by tensor name.
Input = Mapping[str, object] | Sequence[object] | Payload | Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class ClientResult:
    """What a step ended with. `timing` is in microseconds."""

    step_id: str
    payload: Payload
    attempt: int
    region: str
    worker: str
    timing: Timing

    @property
    def json(self) -> object:
        """Raises ValueError when the output is not JSON."""
        if self.payload.content_type != JSON:
            raise ValueError(f"the output is {self.payload.content_type}, not JSON")
        return json.loads(self.payload.data)

    @property
    def tensors(self) -> dict[str, Array]:
        """Raises ValueError when the output does not hold tensors."""
        return tensors.decode(self.payload)


@dataclass(frozen=True, slots=True)
class ClientJob:
    """A job as it stood when the gateway answered. created is true when this call stored it."""

    id: str
    state: JobState
    kind: Kind
    target: str
    lane: Lane
    region: str
    created_s: float
    expires_s: float
    result: ClientResult | None = None
    failure: NearloopError | None = None
    created: bool = False

    @property
    def ended(self) -> bool:
        return self.state not in (JobState.QUEUED, JobState.RUNNING)


def input_to_proto(value: Input) -> pb.Payload:
    """JSON travels as bytes: a Struct would turn every number into a double. Raises ValueError for what is neither JSON nor tensors."""
    if isinstance(value, Payload):
        return convert.payload_to_proto(value)
    if isinstance(value, Mapping) and value and all(isinstance(item, np.ndarray) for item in value.values()):
        return convert.payload_to_proto(tensors.encode(value))  # type: ignore[arg-type]  # all() has looked at each
    try:
        return convert.payload_to_proto(Payload(convert.dump_json(value), JSON))
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the input is not JSON: {error}") from None


def result_from_proto(message: pb.Result) -> ClientResult:
    times = message.timing
    return ClientResult(
        message.step_id,
        convert.payload_from_proto(message.output) or Payload(b"", ""),
        message.attempt,
        message.region,
        message.worker,
        Timing(times.admission_us, times.queue_us, times.network_us, times.service_us),
    )


def event_from_proto(message: pb.Event) -> StepEvent | ClientResult | None:
    """None for an event of a newer gateway that this client does not know."""
    which = message.WhichOneof("value")
    event = StepEvent("", EventKind.STARTED, message.attempt, message.sequence)
    if which == "result":
        return result_from_proto(message.result)
    if which == "token":
        return replace(event, kind=EventKind.TOKEN, payload=convert.payload_from_proto(message.token))
    if which == "started":
        return replace(event, region=message.started.region, worker=message.started.worker)
    if which == "progress":
        progress = message.progress
        return replace(event, kind=EventKind.PROGRESS, fraction=progress.fraction, message=progress.message)
    return None


def job_from_proto(message: pb.Job, created: bool = False) -> ClientJob:
    failure = message.failure
    return ClientJob(
        id=message.id,
        state=convert.JOB_STATES[message.state],
        kind=convert.KINDS[message.kind],
        target=message.target,
        lane=convert.LANES[message.lane],
        region=message.region,
        created_s=message.create_time.ToMicroseconds() / 1e6,
        expires_s=message.expire_time.ToMicroseconds() / 1e6,
        result=result_from_proto(message.result) if message.HasField("result") else None,
        failure=status.from_failure(failure.code, failure.reason, failure.message) if message.HasField("failure") else None,
        created=created,
    )
