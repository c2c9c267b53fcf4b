"""Runs: values of `run_types` -> nearloop.v1 messages, and JSON values both ways. Pure.

A JSON value is a google.protobuf.Value, or text where the caller asks for it or a Value cannot hold it. Protobuf refuses messages nested
more than 100 deep, and an object takes three levels of them.
"""

import json
import math
from collections.abc import Callable
from typing import Any, cast

from google.protobuf import struct_pb2

from gateway.edge import convert
from gateway.program.model import Json
from gateway.program.text import depth
from gateway.run_types import (
    RUN_EVENT,
    Placement,
    RegionEstimate,
    RunEvent,
    RunStatus,
    StepEnded,
    StepRecord,
    StepStarted,
    StepToken,
    decode_event,
)
from gateway.types import Completed, EventKind, JobState, Kind, StepEvent, StepResult
from nearloop.v1 import gateway_pb2 as pb

MOST_VALUE_DEPTH = 30
ToJson = Callable[[Json], pb.JsonValue]


def json_as_value(value: Json) -> pb.JsonValue:
    """As a Value where that can hold it, else as text."""
    if depth(value) <= MOST_VALUE_DEPTH:
        holder: Any = struct_pb2.ListValue()
        try:
            holder.extend([value])
            return pb.JsonValue(value=holder.values[0])
        except (ValueError, OverflowError):  # a number beyond doubles, or text that is no Unicode
            pass
    return json_as_text(value)


def json_as_text(value: Json) -> pb.JsonValue:
    try:
        return pb.JsonValue(text=convert.dump_json(value).decode())
    except UnicodeEncodeError:
        return pb.JsonValue(text=json.dumps(value, separators=(",", ":")))  # half a surrogate pair can only be written as an escape


# --- events ---


def event_to_proto(item: RunStatus | StepEvent | Completed, last: int, to_json: ToJson) -> pb.RunEvent | None:
    """last: sequence of the event before, for a result, which has none of its own. None for what is not for clients, or not known here."""
    if isinstance(item, RunStatus):
        return pb.RunEvent(accepted=run_to_proto(item, to_json))
    if isinstance(item, Completed):
        return pb.RunEvent(sequence=last + 1, attempt=item.result.attempt, result=_result(item.result, to_json))
    event = pb.RunEvent(sequence=item.sequence, attempt=item.attempt)
    if item.kind is EventKind.STARTED:
        event.started.CopyFrom(pb.Started(region=item.region, worker=item.worker))
        return event
    if item.kind is not EventKind.TOKEN or item.payload is None or item.payload.content_type != RUN_EVENT:
        return None
    try:
        _fill(event, decode_event(item.payload.data), to_json)
    except ValueError:
        return None  # of a newer runner
    return event


def _fill(event: pb.RunEvent, what: RunEvent, to_json: ToJson) -> None:
    """Raises ValueError for a kind that is not known."""
    if isinstance(what, StepStarted):
        event.step_started.CopyFrom(
            pb.RunStepStarted(
                key=what.key, node=what.node, kind=convert.kind_to_proto(Kind(what.kind)), target=what.target, attempt=what.attempt
            )
        )
    elif isinstance(what, StepEnded):
        event.step_ended.CopyFrom(_ended(what, to_json))
    elif isinstance(what, StepToken):
        event.token.CopyFrom(pb.RunToken(key=what.key, text=what.text))
    else:
        event.summary.CopyFrom(
            pb.RunSummary(
                region=what.region,
                runner=what.runner,
                steps=what.steps,
                cost=what.cost,
                tokens=what.tokens,
                waited_us=what.waited_us,
                saved_us=what.saved_us,
                guesses=what.guesses,
                wrong_guesses=what.wrong_guesses,
            )
        )


def _ended(what: StepEnded, to_json: ToJson) -> pb.RunStepEnded:
    message = pb.RunStepEnded(
        key=what.key,
        node=what.node,
        attempt=what.attempt,
        region=what.region,
        worker=what.worker,
        took_us=what.took_us,
        replayed=what.replayed,
        speculated=what.speculated,
    )
    if what.reason or what.code:
        message.failure.CopyFrom(pb.Failure(code=convert.code_number(what.code), reason=what.reason, message=what.message))
    elif what.size_bytes:
        message.size_bytes = what.size_bytes
    else:
        message.output.CopyFrom(to_json(what.output))
    return message


# --- runs ---


def run_to_proto(status: RunStatus, to_json: ToJson) -> pb.Run:
    run = pb.Run(
        id=status.id,
        state=convert.state_to_proto(status.state),
        program=status.program,
        region=status.region,
        lane=convert.lane_to_proto(status.lane),
        steps=[_step(step, to_json) for step in status.steps],
    )
    run.create_time.FromMicroseconds(round(status.created_s * 1e6))
    run.expire_time.FromMicroseconds(round(status.deadline_s * 1e6))
    result = status.result
    if result is not None and status.state is JobState.DONE:
        run.result.CopyFrom(_result(result, to_json))
    elif result is not None:
        run.failure.CopyFrom(pb.Failure(code=convert.code_number(result.code), reason=result.reason, message=result.message))
    if status.placement is not None:
        run.placement.CopyFrom(placement_to_proto(status.placement))
    return run


def _step(step: StepRecord, to_json: ToJson) -> pb.RunStep:
    if step.size_bytes:
        return pb.RunStep(key=step.key, size_bytes=step.size_bytes)
    return pb.RunStep(key=step.key, output=to_json(step.output))


def _result(result: StepResult, to_json: ToJson) -> pb.RunResult:
    return pb.RunResult(output=to_json(cast(Json, json.loads(result.output.data))), region=result.region, worker=result.worker)


def placement_to_proto(placement: Placement) -> pb.Placement:
    return pb.Placement(region=placement.region, estimates=[_estimate(one) for one in placement.estimates])


def _estimate(one: RegionEstimate) -> pb.RegionEstimate:
    message = pb.RegionEstimate(region=one.region, why=one.why, excluded=one.excluded)
    if math.isfinite(one.dead_s):
        message.dead_time.FromNanoseconds(round(one.dead_s * 1e9))
    return message
