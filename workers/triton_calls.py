"""The calls to Triton's gRPC service that execute something."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc

from gateway.clock import Clock
from gateway.errors import StepFailed
from workers.gathering import Call
from workers.triton_merge import merge, split

MOST_MESSAGE = 256  # characters of Triton's own text in an error
# With it Triton ends a failed stream with a gRPC status instead of a bare text.
_STREAM_STATUS = ("triton_grpc_error", "true")
# Triton or the model is not there, or the time is over: no fault of an input.
BUSY_OR_GONE = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.CANCELLED})

Metadata = list[tuple[str, str]]
InferCall = Call[tuple[Any, Metadata, int], Any]  # (ModelInferRequest, metadata, rows) -> ModelInferResponse


def channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    """The client's own defaults are no message cap, no keepalive and minutes between attempts to connect again."""
    return [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 5_000),
        ("grpc.http2.max_pings_without_data", 2),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 500),
        ("grpc.max_reconnect_backoff_ms", 2_000),
    ]


async def infer(stub: Any, request: Any, metadata: Metadata, timeout_s: float) -> Any:
    """The ModelInferResponse. Raises grpc.aio.AioRpcError."""
    call = stub.ModelInfer(request, metadata=metadata, timeout=timeout_s)
    try:
        return await call
    finally:
        if not call.done():
            call.cancel()  # the step was cancelled: so is the inference


async def infer_together(stub: Any, calls: Sequence[InferCall], clock: Clock) -> tuple[list[Any], bool]:
    """Executes calls whose requests can be merged as one inference: a ModelInferResponse or an AioRpcError for each, and whether it did.

    One wrong input makes the model refuse them all, so after an error that may be about the input each half is executed apart, down to the
    one that is wrong. The time of the whole is that of the call which has the most; the first one's trace context goes along.
    """
    if len(calls) > 1:
        request = merge([call.item[0] for call in calls])
        try:
            response = await infer(stub, request, calls[0].item[1], _left_s(calls, clock))
        except grpc.aio.AioRpcError as error:
            if not _may_be_the_input(error):
                return [error] * len(calls), False
            middle = len(calls) // 2
            first, _ = await infer_together(stub, calls[:middle], clock)
            second, _ = await infer_together(stub, calls[middle:], clock)
            return [*first, *second], False
        parts = split(response, [call.item[2] for call in calls])
        if parts is not None:
            return parts, True
    answers: list[Any] = []
    for call in calls:
        try:
            answers.append(None if call.is_over else await infer(stub, call.item[0], call.item[1], _left_s((call,), clock)))
        except grpc.aio.AioRpcError as error:
            answers.append(error)
    return answers, len(calls) == 1 and not isinstance(answers[0], Exception)


async def stream(stub: Any, request: Any, metadata: Metadata, timeout_s: float) -> AsyncGenerator[Any, None]:
    """The responses of a decoupled model. One stream for each step: on a shared one an error does not say whose it is.

    Raises grpc.aio.AioRpcError, StepFailed.
    """
    call = stub.ModelStreamInfer(metadata=[*metadata, _STREAM_STATUS], timeout=timeout_s)
    try:
        await call.write(request)
        await call.done_writing()
        async for response in call:
            if response.error_message:
                raise StepFailed(text(request.model_name, response.error_message), reason="MODEL_FAILED")
            if response.infer_response.outputs:  # the last response of a stream may be empty
                yield response.infer_response
    except asyncio.InvalidStateError:
        raise await _status(call) from None  # the call ended while the request was being written
    finally:
        if not call.done():
            call.cancel()


def lost_process(error: grpc.aio.AioRpcError) -> bool:
    """The Python backend's process for the model has died."""
    return error.code() is grpc.StatusCode.INTERNAL and "Stub process" in (error.details() or "")


def text(model: str, details: str) -> str:
    return f"model {model}: {details[:MOST_MESSAGE]}"


def _may_be_the_input(error: grpc.aio.AioRpcError) -> bool:
    code = error.code()
    return code not in BUSY_OR_GONE and code is not grpc.StatusCode.DEADLINE_EXCEEDED and not lost_process(error)


def _left_s(calls: Sequence[InferCall], clock: Clock) -> float:
    return min(max(max(call.deadline_s for call in calls) - clock.now_s(), 0.0), 3600.0)


async def _status(call: Any) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(
        await call.code(), await call.initial_metadata(), await call.trailing_metadata(), details=await call.details()
    )
