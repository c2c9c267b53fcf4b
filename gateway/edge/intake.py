"""A nearloop.v1.Step and the call's metadata -> a frozen Step that is checked all through, or one error that says all that is wrong."""

import difflib
import re
from collections.abc import Callable, Iterable
from random import getrandbits

from gateway import subjects
from gateway.clock import Clock
from gateway.config import GatewaySection
from gateway.edge import convert
from gateway.edge.schema import InputChecker
from gateway.edge.tensor_checks import Problems
from gateway.errors import Expired, InvalidStep, NotFound
from gateway.ports import StepService
from gateway.types import JSON, TENSORS, Kind, Payload, Step, Target
from nearloop.v1 import gateway_pb2 as pb

Metadata = Iterable[tuple[str, str | bytes]]

MAX_CONTENT_TYPE_CHARS = 128
MAX_TRACESTATE_CHARS = 512  # W3C Trace Context, 3.3.1.1: what a vendor must propagate at least
_CONTENT_TYPE = re.compile(r"[\w!#$&^.+-]+/[\w!#$&^.+-]+( *;[ -~]*)?", re.ASCII)
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_TRACESTATE = re.compile(r"[ -~\t]*")
_NOT_AN_ID = f"is not an id: {subjects.ID_RULE}"


def random_id() -> str:
    return f"{getrandbits(128):032x}"


class Intake:
    """Turns requests into steps. Nothing is stored and no policy is asked before a step has passed here."""

    def __init__(self, section: GatewaySection, service: StepService, clock: Clock, new_id: Callable[[], str]) -> None:
        self._section = section
        self._service = service
        self._clock = clock
        self._inputs = InputChecker()
        self._new_id = new_id

    def step(
        self,
        message: pb.Step,
        tenant: str,
        metadata: Metadata,
        rpc_remaining_s: float | None,
        *,
        stream: bool = False,
        job: bool = False,
    ) -> Step:
        """The step of `tenant`. rpc_remaining_s is the RPC's own deadline; a job outlives it, so it does not bound a job.

        Raises InvalidStep with every problem, NotFound for an unknown target when nothing else is wrong, Expired.
        """
        problems: Problems = []
        kind = convert.KINDS.get(message.kind)
        if kind is None:
            problems.append(("step.kind", f"{message.kind} is not a kind" if message.kind else "missing"))
        elif kind is Kind.RUN:
            problems.append(("step.kind", "a run is not a step: ask for it with the RPC Run, SubmitRun or PlaceRun"))
            kind = None
        lane = convert.LANES.get(message.lane)
        if lane is None:
            problems.append(("step.lane", f"{message.lane} is not a lane"))
        run, key, region = message.run, message.idempotency_key, message.region
        if run or key or region:
            ids = (("run", run), ("idempotency_key", key), ("region", region))
            problems += [(f"step.{name}", _NOT_AN_ID) for name, text in ids if text and not subjects.is_id(text)]
        timeout_s = self._timeout_s(message, problems)
        payload = self._payload(message, problems)
        target = self._target(kind, message.target, problems)
        if target is not None and payload is not None:
            problems += self._inputs.problems(target, payload)
        if problems or payload is None or kind is None or lane is None:
            raise InvalidStep(problems)
        if target is None:
            raise self._unknown(kind, message.target)
        if not job:
            timeout_s = min(timeout_s, target.timeout_s)
            if rpc_remaining_s is not None:
                if rpc_remaining_s <= 0:
                    raise Expired("the deadline has passed already", scope=target.scope)
                timeout_s = min(timeout_s, rpc_remaining_s)
        traceparent, tracestate = trace_context(metadata)
        return Step(
            id=self._new_id(),
            tenant=tenant,
            kind=kind,
            target=target.name,
            input=payload,
            deadline_s=self._clock.wall_s() + timeout_s,
            lane=lane,
            run=run,
            idempotency_key=key,
            client_region=region,
            stream=stream,
            traceparent=traceparent,
            tracestate=tracestate,
        )

    def _timeout_s(self, message: pb.Step, problems: Problems) -> float:
        limit_s = self._section.max_timeout_s
        if not message.HasField("timeout"):
            return limit_s
        timeout_s = message.timeout.seconds + message.timeout.nanos / 1e9
        if timeout_s <= 0:
            problems.append(("step.timeout", f"must be positive, not {timeout_s:g} s"))
        elif timeout_s > limit_s:
            problems.append(("step.timeout", f"must be at most {limit_s:g} s, not {timeout_s:g} s"))
        return timeout_s

    def _payload(self, message: pb.Step, problems: Problems) -> Payload | None:
        """The input with its content type in normal form, so that nobody downstream takes for opaque what was checked as JSON."""
        try:
            payload = convert.payload_from_proto(message.input)
        except (ValueError, RecursionError) as error:
            problems.append(("step.input.json", str(error)))
            return None
        if payload is None:
            problems.append(("step.input", "missing"))
            return None
        limit_bytes = self._section.max_input_bytes
        if len(payload.data) > limit_bytes:
            problems.append(("step.input", f"has {len(payload.data)} bytes; the limit is {limit_bytes} (gateway.max_input_bytes)"))
            return None
        content_type = payload.content_type
        if content_type in (JSON, TENSORS):
            return payload
        field = "step.input.content.content_type"
        if not content_type:
            problems.append((field, f"missing; for JSON it is {JSON}"))
            return None
        if len(content_type) > MAX_CONTENT_TYPE_CHARS or not _CONTENT_TYPE.fullmatch(content_type):
            problems.append((field, f"must be a MIME type of at most {MAX_CONTENT_TYPE_CHARS} characters, such as {JSON}"))
            return None
        base = content_type.partition(";")[0].strip().lower()
        return Payload(payload.data, base) if base in (JSON, TENSORS) else payload

    def _target(self, kind: Kind | None, name: str, problems: Problems) -> Target | None:
        if not subjects.is_id(name):
            problems.append(("step.target", _NOT_AN_ID if name else "missing"))
            return None
        if kind is None:
            return None
        target = self._service.target(kind, name)
        if target is None:
            others = [other.value for other in Kind if other is not kind and self._service.target(other, name)]
            if others:
                problems.append(("step.kind", f"{name!r} is of kind {' or '.join(others)}, not {kind.value}"))
        return target

    def _unknown(self, kind: Kind, name: str) -> NotFound:
        known = [status.target.name for status in self._service.targets(kind)]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        return NotFound(f"there is no target {name!r} of kind {kind.value}{hint}", reason="UNKNOWN_TARGET", scope=f"{kind.value}.{name}")


def trace_context(metadata: Metadata) -> tuple[str, str]:
    """W3C traceparent and tracestate; empty when they are not there or not valid (then a new trace begins, as the standard says)."""
    parent, states = "", []
    for name, value in metadata:
        if name == "traceparent" and isinstance(value, str):
            parent = value
        elif name == "tracestate" and isinstance(value, str):
            states.append(value)
    if not parent:
        return "", ""
    match = _TRACEPARENT.fullmatch(parent)
    if match is None or (match[1] == "00" and match[2]):  # only later versions may have more parts
        return "", ""
    state = ",".join(states)
    return parent, state if len(state) <= MAX_TRACESTATE_CHARS and _TRACESTATE.fullmatch(state) else ""


def check_job_id(job_id: str) -> None:
    """Raises InvalidStep for what cannot be the id of a job."""
    if not subjects.is_id(job_id):
        raise InvalidStep([("job_id", _NOT_AN_ID if job_id else "missing")])
