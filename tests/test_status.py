import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from gateway import errors
from gateway.edge import status

ERRORS = [
    errors.InvalidStep([("step.kind", "missing"), ("step.target", "bad")]),
    errors.Unauthenticated("who?"),
    errors.NotFound("nothing", reason="UNKNOWN_TARGET", scope="tool.x"),
    errors.AlreadyExists("twice"),
    errors.Rejected("full", reason="QUEUE_FULL", scope="tool.x", policy="fixed_limit", retry_after_s=1.25),
    errors.Denied("not for you", reason="NOT_IN_PLAN", scope="tool.x", policy="plan"),
    errors.StepFailed("not in the list", code="PERMISSION_DENIED", reason="EGRESS_DENIED"),
    errors.Unavailable("a watch lasts 1 s at most", reason="WATCH_AGAIN", retry_after_s=0.0),
    errors.Expired("late"),
    errors.Cancelled("stopped"),
    errors.Unavailable("gone", reason="NO_WORKERS", retry_after_s=0.0),
    errors.StepFailed("broke", code="INTERNAL", reason="TOOL_ERROR"),
    errors.StepFailed("model is down", code="UNAVAILABLE", reason="MODEL_DOWN"),
    errors.StepFailed("bad input", code="INVALID_ARGUMENT", reason="MODEL_REFUSED"),
    errors.NearloopError("internal error 12"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{error.reason}")
def test_an_error_survives_the_way(error: errors.NearloopError) -> None:
    code, message, trailers = status.to_status(error)
    back = status.from_status(code, message, trailers)
    assert type(back) is type(error)
    for name in ("code", "message", "reason", "scope", "policy", "retry_after_s"):
        assert getattr(back, name) == getattr(error, name)
    assert getattr(back, "fields", None) == getattr(error, "fields", None)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__}-{error.reason}")
def test_details_are_the_standard_ones(error: errors.NearloopError) -> None:
    code, message, ((key, packed),) = status.to_status(error)
    assert key == "grpc-status-details-bin"
    rich = status_pb2.Status.FromString(packed)
    assert (rich.code, rich.message) == (code.value[0], message)
    kinds = [detail.TypeName() for detail in rich.details]
    assert kinds[0] == "google.rpc.ErrorInfo"
    assert ("google.rpc.BadRequest" in kinds) == isinstance(error, errors.InvalidStep)
    assert ("google.rpc.RetryInfo" in kinds) == (error.retry_after_s is not None)
    info = error_details_pb2.ErrorInfo()
    rich.details[0].Unpack(info)
    assert (info.domain, info.reason) == ("nearloop", error.reason)


def test_every_error_class_is_in_the_table_under_its_own_code() -> None:
    classes = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.NearloopError)]
    for kind in set(classes) - {errors.StepFailed}:
        assert status.ERRORS[grpc.StatusCode[kind.code]] is kind


def test_a_code_that_grpc_lacks_is_internal() -> None:
    assert status.to_status(errors.StepFailed("x", code="WORSE"))[0] is grpc.StatusCode.INTERNAL
    assert status.to_status(errors.StepFailed("x", code="OK"))[0] is grpc.StatusCode.INTERNAL


def test_the_answer_fits_into_a_clients_metadata() -> None:
    error = errors.InvalidStep([(f"step.input.{'k' * 500}[{i}]", "ü" * 4000) for i in range(200)])
    _, message, ((_, packed),) = status.to_status(error)
    assert isinstance(packed, bytes)
    percent_encoded = sum(1 if 0x20 <= byte < 0x7F else 3 for byte in message.encode())
    assert percent_encoded + len(packed) * 4 / 3 < 8 * 1024
    back = status.from_status(grpc.StatusCode.INVALID_ARGUMENT, message, ((status.DETAILS_KEY, packed),))
    assert isinstance(back, errors.InvalidStep)
    assert len(back.fields) == status.MAX_FIELDS


def test_a_lone_surrogate_in_a_message_does_not_break_the_answer() -> None:
    assert status.to_status(errors.NotFound("no \udc80"))[1] == "no ?"


@pytest.mark.parametrize("trailers", [None, (), ((status.DETAILS_KEY, b"\xff\xff\xff"),), (("other", "x"),)])
def test_a_status_of_somebody_else_is_read_as_well(trailers: status.Trailers | None) -> None:
    error = status.from_status(grpc.StatusCode.UNAVAILABLE, "connection reset", trailers)
    assert isinstance(error, errors.Unavailable)
    assert (error.message, error.reason, error.retry_after_s) == ("connection reset", "UNAVAILABLE", None)


def test_a_message_that_grpc_refused_for_its_size_is_no_overload() -> None:
    text = "SERVER: Received message larger than max (9 vs. 4)"
    error = status.from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, text, ())
    assert isinstance(error, errors.InvalidStep)
    assert error.fields == (("step.input", text),)


@pytest.mark.parametrize(
    ("code", "kind", "name"),
    [
        (1, errors.Cancelled, "CANCELLED"),
        (4, errors.Expired, "DEADLINE_EXCEEDED"),
        (14, errors.StepFailed, "UNAVAILABLE"),
        (99, errors.StepFailed, "UNKNOWN"),
    ],
)
def test_a_failure_of_a_job_is_an_error(code: int, kind: type[errors.NearloopError], name: str) -> None:
    error = status.from_failure(code, "WHY", "text")
    assert type(error) is kind
    assert (error.code, error.reason, error.message) == (name, "WHY", "text")
