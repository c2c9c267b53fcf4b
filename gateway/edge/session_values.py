"""Answers of a session: errors of `gateway.errors` <-> SessionFailure, with all that a gRPC status with details would say."""

from typing import Any

import grpc

from gateway import errors
from gateway.edge import status
from gateway.edge.convert import code_number
from nearloop.v1 import gateway_pb2 as pb

_CODES: dict[Any, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}


def failure_to_proto(tag: int, error: errors.NearloopError) -> pb.SessionFailure:
    message = pb.SessionFailure(
        tag=tag,
        failure=pb.Failure(code=code_number(error.code), reason=error.reason, message=status.cut(error.message, status.MAX_MESSAGE_BYTES)),
        scope=error.scope,
        policy=error.policy,
        from_target=isinstance(error, errors.StepFailed),
    )
    if error.retry_after_s is not None:
        message.retry_after.FromNanoseconds(max(0, round(error.retry_after_s * 1e9)))
    if isinstance(error, errors.InvalidStep):
        for field, description in error.fields[: status.MAX_FIELDS]:
            message.violations.add(
                field=status.cut(field, status.MAX_FIELD_BYTES),
                description=status.cut(description, status.MAX_DESCRIPTION_BYTES),
            )
    return message


def failure_from_proto(message: pb.SessionFailure) -> errors.NearloopError:
    failure = message.failure
    code = _CODES.get(failure.code, grpc.StatusCode.UNKNOWN)
    kind = errors.StepFailed if message.from_target else status.ERRORS.get(code, errors.StepFailed)
    if kind is errors.InvalidStep:
        fields = [(violation.field, violation.description) for violation in message.violations]
        error: errors.NearloopError = errors.InvalidStep(fields or [("step", failure.message)])
    elif issubclass(kind, errors.StepFailed):
        error = errors.StepFailed(failure.message, code=code.name)
    else:
        error = kind(failure.message)
    error.reason, error.scope, error.policy = failure.reason, message.scope, message.policy
    error.retry_after_s = message.retry_after.ToNanoseconds() / 1e9 if message.HasField("retry_after") else None
    return error
