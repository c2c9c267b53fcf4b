"""Errors of `gateway.errors` <-> gRPC status with google.rpc details: ErrorInfo always, BadRequest and RetryInfo where they apply."""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import error_details_pb2, status_pb2

from gateway import errors

DOMAIN = "nearloop"
DETAILS_KEY = "grpc-status-details-bin"
# Clients refuse answers with more than 8 KiB of metadata, at their default. The message is in there twice, once percent-encoded.
MAX_MESSAGE_BYTES = 600
MAX_FIELDS = 10
MAX_FIELD_BYTES = 100
MAX_DESCRIPTION_BYTES = 150
# In ErrorInfo.metadata: the step's target failed, not the gateway. Then UNAVAILABLE is an answer and no reason to try again.
SOURCE, SOURCE_TARGET = "source", "target"

Trailers = tuple[tuple[str, str | bytes], ...]

# The one table: a status and the error behind it, in both directions. Everything else is a StepFailed that carries its code.
ERRORS: Mapping[grpc.StatusCode, type[errors.NearloopError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidStep,
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.Rejected,
    grpc.StatusCode.PERMISSION_DENIED: errors.Denied,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.Expired,
    grpc.StatusCode.CANCELLED: errors.Cancelled,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: errors.TopologyMismatch,
    grpc.StatusCode.INTERNAL: errors.NearloopError,
}
_CODES = {code.name: code for code in grpc.StatusCode if code is not grpc.StatusCode.OK}
_BY_NUMBER = {code.value[0]: code for code in _CODES.values()}


def to_status(error: errors.NearloopError) -> tuple[grpc.StatusCode, str, Trailers]:
    """Code, message and trailing metadata, as `context.abort` takes them. A code that gRPC does not have becomes INTERNAL."""
    code = _CODES.get(error.code, grpc.StatusCode.INTERNAL)
    message = cut(error.message, MAX_MESSAGE_BYTES)
    details: list[Message] = []
    if isinstance(error, errors.InvalidStep):
        details.append(_bad_request(error.fields))
    if error.retry_after_s is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(max(0, round(error.retry_after_s * 1e9)))
        details.append(retry)
    status = status_pb2.Status(code=code.value[0], message=message, details=[_pack(detail) for detail in details])
    # Serialised messages are merged by writing them one after the other: the part that is often the same is kept ready.
    info = _info(error.reason, error.scope, error.policy, isinstance(error, errors.StepFailed))
    return code, message, ((DETAILS_KEY, info + status.SerializeToString()),)


@lru_cache(maxsize=1024)
def _info(reason: str, scope: str, policy: str, from_target: bool) -> bytes:
    """A serialised Status with nothing but the ErrorInfo."""
    info = error_details_pb2.ErrorInfo(reason=cut(reason, MAX_FIELD_BYTES), domain=DOMAIN)
    for key, text in (("scope", scope), ("policy", policy)):
        if text:
            info.metadata[key] = cut(text, MAX_DESCRIPTION_BYTES)
    if from_target:
        info.metadata[SOURCE] = SOURCE_TARGET
    packed: bytes = status_pb2.Status(details=[_pack(info)]).SerializeToString()
    return packed


def from_status(code: grpc.StatusCode, message: str, trailers: Iterable[tuple[str, str | bytes]] | None) -> errors.NearloopError:
    """The error behind a status, also one that comes from gRPC itself or from a proxy and has no details."""
    info, bad, retry_after_s = _details(trailers or ())
    target_failed = info is not None and info.metadata.get(SOURCE) == SOURCE_TARGET
    kind = errors.StepFailed if target_failed else ERRORS.get(code, errors.StepFailed)
    if kind is errors.InvalidStep:
        fields = [(field.field, field.description) for field in bad.field_violations]
        error: errors.NearloopError = errors.InvalidStep(fields or [("step", message)])
    elif "larger than max" in message and kind is errors.Rejected:
        # gRPC refused the message before the gateway saw it; its code for that is the one of overload, but waiting cannot help.
        error = errors.InvalidStep([("step.input", message)], reason="MESSAGE_TOO_LARGE")
    elif issubclass(kind, errors.StepFailed):
        error = errors.StepFailed(message, code=code.name)
    else:
        error = kind(message)
    if info is not None:
        error.reason = info.reason
        error.scope = info.metadata.get("scope", "")
        error.policy = info.metadata.get("policy", "")
    error.retry_after_s = retry_after_s
    return error


def from_failure(code: int, reason: str, message: str) -> errors.NearloopError:
    """The error that an ended job's Failure stands for."""
    status = _BY_NUMBER.get(code, grpc.StatusCode.UNKNOWN)
    if status is grpc.StatusCode.CANCELLED:
        return errors.Cancelled(message, reason=reason)
    if status is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.Expired(message, reason=reason)
    return errors.StepFailed(message, code=status.name, reason=reason)


def _bad_request(fields: Sequence[tuple[str, str]]) -> error_details_pb2.BadRequest:
    shown = [
        error_details_pb2.BadRequest.FieldViolation(
            field=cut(name, MAX_FIELD_BYTES),
            description=cut(text, MAX_DESCRIPTION_BYTES),
        )
        for name, text in fields[:MAX_FIELDS]
    ]
    return error_details_pb2.BadRequest(field_violations=shown)


def _details(
    trailers: Iterable[tuple[str, str | bytes]],
) -> tuple[error_details_pb2.ErrorInfo | None, error_details_pb2.BadRequest, float | None]:
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    retry = error_details_pb2.RetryInfo()
    known, retry_after_s = False, None
    packed = next((value for key, value in trailers if key == DETAILS_KEY and isinstance(value, bytes)), b"")
    try:
        for detail in status_pb2.Status.FromString(packed).details:
            if detail.Unpack(info):
                known = info.domain == DOMAIN
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToNanoseconds() / 1e9
            else:
                detail.Unpack(bad)
    except DecodeError:
        pass  # details of somebody else; code and message still say what happened
    return info if known else None, bad, retry_after_s


def _pack(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed


def cut(text: str, limit_bytes: int) -> str:
    """At most limit_bytes of UTF-8, with a sign that something is missing."""
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit_bytes:
        return raw.decode()
    return raw[: limit_bytes - 3].decode("utf-8", "ignore") + "..."
