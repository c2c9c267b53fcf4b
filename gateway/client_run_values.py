"""What the client takes and gives for runs: Python values instead of messages."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from gateway.edge import convert, status
from gateway.errors import NearloopError
from gateway.program.model import Json, Program
from gateway.run_types import Placement, RegionEstimate, StepEnded, StepRecord, StepStarted, StepToken, Summary
from gateway.types import JobState, Lane
from nearloop.v1 import gateway_pb2 as pb

# A program; its text, YAML or JSON; a file with that; or its plain form.
ProgramLike = Program | str | Path | Mapping[str, object]


@dataclass(frozen=True, slots=True)
class RunOutput:
    """What a run ended with, the last item of its stream."""

    output: Json
    region: str
    worker: str


@dataclass(frozen=True, slots=True)
class ClientRun:
    """A run as it stood when the gateway answered, the first item of its stream.

    steps: completed ones. placement: why it runs in that region, when it has just been accepted. created: this call was what made it.
    """

    id: str
    state: JobState
    program: str
    region: str
    lane: Lane
    created_s: float
    expires_s: float
    steps: tuple[StepRecord, ...] = ()
    result: RunOutput | None = None
    failure: NearloopError | None = None
    placement: Placement | None = None
    created: bool = False

    @property
    def ended(self) -> bool:
        return self.state not in (JobState.QUEUED, JobState.RUNNING)


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A runner has the run. attempt above 1: it went on on another runner, which tells the steps that had ended once more, as replayed."""

    region: str
    worker: str
    attempt: int


RunItem = ClientRun | RunStarted | StepStarted | StepEnded | StepToken | Summary | RunOutput


def source_of(program: ProgramLike) -> str:
    """As text: numbers in JSON stay what they are. Raises OSError, ValueError for what is no JSON."""
    if isinstance(program, str):
        return program
    if isinstance(program, Path):
        return program.read_text(encoding="utf-8")
    if isinstance(program, Program):
        from gateway.program.dump import dump_program

        program = dump_program(program)
    try:
        return convert.dump_json(program).decode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the program is not JSON: {error}") from None


def input_to_proto(value: Json) -> pb.JsonValue:
    """Raises ValueError for what is no JSON."""
    try:
        return pb.JsonValue(text=convert.dump_json(value).decode())
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the input is not JSON: {error}") from None


def json_from_proto(message: pb.JsonValue) -> Json:
    if message.WhichOneof("form") == "text":
        return cast(Json, json.loads(message.text))
    return cast(Json, convert.value_from_proto(message.value))


def item_from_proto(event: pb.RunEvent) -> RunItem | None:
    """None for an event of a newer gateway that this client does not know."""
    which = event.WhichOneof("value")
    if which == "accepted":
        return run_from_proto(event.accepted)
    if which == "started":
        return RunStarted(event.started.region, event.started.worker, event.attempt)
    if which == "step_started":
        begun = event.step_started
        kind = convert.KINDS.get(begun.kind)
        return StepStarted(begun.key, begun.node, kind.value if kind else "", begun.target, begun.attempt)
    if which == "step_ended":
        return _ended(event.step_ended)
    if which == "token":
        return StepToken(event.token.key, event.token.text)
    if which == "summary":
        s = event.summary
        return Summary(s.region, s.runner, s.steps, s.cost, s.tokens, s.waited_us, s.saved_us, s.guesses, s.wrong_guesses)
    return _output(event.result) if which == "result" else None


def _ended(message: pb.RunStepEnded) -> StepEnded:
    failure = message.failure
    return StepEnded(
        key=message.key,
        node=message.node,
        attempt=message.attempt,
        output=json_from_proto(message.output) if message.HasField("output") else None,
        size_bytes=message.size_bytes,
        code=convert.code_name(failure.code) if message.HasField("failure") else "",
        reason=failure.reason,
        message=failure.message,
        region=message.region,
        worker=message.worker,
        took_us=message.took_us,
        replayed=message.replayed,
        speculated=message.speculated,
    )


def run_from_proto(message: pb.Run, created: bool = False) -> ClientRun:
    failure = message.failure
    return ClientRun(
        id=message.id,
        state=convert.JOB_STATES[message.state],
        program=message.program,
        region=message.region,
        lane=convert.LANES[message.lane],
        created_s=message.create_time.ToMicroseconds() / 1e6,
        expires_s=message.expire_time.ToMicroseconds() / 1e6,
        steps=tuple(_step(step) for step in message.steps),
        result=_output(message.result) if message.HasField("result") else None,
        failure=status.from_failure(failure.code, failure.reason, failure.message) if message.HasField("failure") else None,
        placement=placement_from_proto(message.placement) if message.HasField("placement") else None,
        created=created,
    )


def _step(message: pb.RunStep) -> StepRecord:
    return StepRecord(message.key, json_from_proto(message.output) if message.HasField("output") else None, message.size_bytes)


def _output(message: pb.RunResult) -> RunOutput:
    return RunOutput(json_from_proto(message.output), message.region, message.worker)


def placement_from_proto(message: pb.Placement) -> Placement:
    return Placement(message.region, tuple(_estimate(one) for one in message.estimates))


def _estimate(one: pb.RegionEstimate) -> RegionEstimate:
    dead_s = one.dead_time.ToNanoseconds() / 1e9 if one.HasField("dead_time") else math.inf
    return RegionEstimate(one.region, dead_s, tuple(one.why), one.excluded)
