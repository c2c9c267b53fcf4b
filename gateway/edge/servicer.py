"""The RPCs of nearloop.v1.Gateway: who calls, is the request right, ask the service, answer or say why not.

Requests and answers are bytes at this level: a message is parsed, used and dropped, so that thousands of calls that wait for their
result keep their input once and not three times.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import NoReturn, TypeVar

import grpc
from google.protobuf.message import Message

from gateway.clock import Clock
from gateway.config import Config
from gateway.edge import convert, status
from gateway.edge.auth import Authenticator
from gateway.edge.intake import Intake, check_job_id
from gateway.edge.refusals import Load, Stalled, as_ours, parse
from gateway.edge.sessions import Sessions
from gateway.errors import InvalidStep, StepFailed, Unavailable
from gateway.ports import StepService
from gateway.types import Completed, Step, StepEvent
from nearloop.v1 import gateway_pb2 as pb

Context = grpc.aio.ServicerContext[bytes, bytes]
T = TypeVar("T")

# A reader that stalls is given some megabytes by gRPC before a write waits. One that takes nothing for this long has lost its
# stream: the permit and the subscription behind it are worth more than the rest of its answer.
WRITE_TIMEOUT_S = 30.0
# How long to wait until such a reader has been told; core delivers the status later by itself when the reader comes back.
GIVE_UP_TIMEOUT_S = 1.0


class GatewayServicer:
    def __init__(self, config: Config, service: StepService, clock: Clock, new_id: Callable[[], str]) -> None:
        self._service = service
        self._auth = Authenticator(config.auth)
        self._intake = Intake(config.gateway, service, clock, new_id)
        self.load = Load(config.gateway.max_in_flight)
        self._max_watch_s = config.gateway.max_timeout_s
        self._sessions = Sessions(config.gateway, service, self._intake, self.load)

    def handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        return {
            "Execute": unary(self.execute),
            "ExecuteStream": stream(self.execute_stream),
            "Session": grpc.stream_stream_rpc_method_handler(self.session),
            "Submit": unary(self.submit),
            "GetJob": unary(self.get_job),
            "WatchJob": stream(self.watch_job),
            "CancelJob": unary(self.cancel_job),
            "ListTargets": unary(self.list_targets),
        }

    # --- steps ---

    async def execute(self, raw: bytes, context: Context) -> bytes:
        self.load.count += 1
        try:
            step, as_struct = self._take(parse(pb.ExecuteRequest, raw).step, context)
            done = await self._service.execute(step)
            answer = pb.ExecuteResponse(result=convert.result_to_proto(done.result, done.timing, as_struct))
            return answer.SerializeToString()
        except Exception as error:
            return refuse(context, error, "Execute")
        finally:
            self.load.count -= 1

    async def execute_stream(self, raw: bytes, context: Context) -> None:
        self.load.count += 1
        try:
            step, as_struct = self._take(parse(pb.ExecuteStreamRequest, raw).step, context, stream=True)
            await self._send(context, self._service.stream(step), pb.ExecuteStreamResponse, as_struct)
        except Exception as error:
            await fail(context, error, "ExecuteStream")
        finally:
            self.load.count -= 1

    async def session(self, _requests: object, context: Context) -> None:
        try:
            metadata = context.invocation_metadata() or ()
            await self._sessions.serve(self._auth.tenant(metadata), metadata, context)
        except Exception as error:
            await fail(context, error, "Session")

    def drain(self) -> None:
        """Sessions get no more credits and end once they have answered what is in flight; new ones are refused."""
        self._sessions.drain()

    async def wait_ended(self) -> None:
        """After the server was stopped: returns when its sessions have given back what they held."""
        await self._sessions.wait_ended()

    async def submit(self, raw: bytes, context: Context) -> bytes:
        self.load.count += 1
        try:
            step, _ = self._take(parse(pb.SubmitRequest, raw).step, context, job=True)
            job, created = await self._service.submit(step)
            return pb.SubmitResponse(job=convert.job_to_proto(job), created=created).SerializeToString()
        except Exception as error:
            return refuse(context, error, "Submit")
        finally:
            self.load.count -= 1

    def _take(self, message: pb.Step, context: Context, *, stream: bool = False, job: bool = False) -> tuple[Step, bool]:
        """The checked step, and whether the caller speaks Struct."""
        metadata = context.invocation_metadata() or ()
        tenant = self._auth.tenant(metadata)
        self.load.check()
        step = self._intake.step(message, tenant, metadata, context.time_remaining(), stream=stream, job=job)
        return step, message.input.HasField("json")

    # --- jobs ---

    async def get_job(self, raw: bytes, context: Context) -> bytes:
        return await self._answer(context, "GetJob", self._get_job, raw)

    async def cancel_job(self, raw: bytes, context: Context) -> bytes:
        return await self._answer(context, "CancelJob", self._cancel_job, raw)

    async def list_targets(self, raw: bytes, context: Context) -> bytes:
        return await self._answer(context, "ListTargets", self._list_targets, raw)

    async def watch_job(self, raw: bytes, context: Context) -> None:
        self.load.count += 1
        try:
            request = parse(pb.WatchJobRequest, raw)
            tenant = self._tenant(context)
            check_job_id(request.job_id)
            items = self._service.watch(tenant, request.job_id, request.attempt, request.after_sequence)
            await self._send(context, for_at_most(self._max_watch_s, items), pb.WatchJobResponse, as_struct=False)
        except Exception as error:
            await fail(context, error, "WatchJob")
        finally:
            self.load.count -= 1

    async def _get_job(self, raw: bytes, tenant: str) -> Message:
        request = parse(pb.GetJobRequest, raw)
        check_job_id(request.job_id)
        return pb.GetJobResponse(job=convert.job_to_proto(await self._service.job(tenant, request.job_id)))

    async def _cancel_job(self, raw: bytes, tenant: str) -> Message:
        request = parse(pb.CancelJobRequest, raw)
        check_job_id(request.job_id)
        return pb.CancelJobResponse(job=convert.job_to_proto(await self._service.cancel(tenant, request.job_id)))

    async def _list_targets(self, raw: bytes, tenant: str) -> Message:
        request = parse(pb.ListTargetsRequest, raw)
        if request.kind and request.kind not in convert.KINDS:
            raise InvalidStep([("kind", f"{request.kind} is not a kind")])
        known = self._service.targets(convert.KINDS.get(request.kind))
        ordered = sorted(known, key=lambda item: (convert.kind_to_proto(item.target.kind), item.target.name))
        return pb.ListTargetsResponse(targets=[convert.target_to_proto(item) for item in ordered])

    # --- what they share ---

    def _tenant(self, context: Context) -> str:
        tenant = self._auth.tenant(context.invocation_metadata() or ())
        self.load.check()
        return tenant

    async def _answer(self, context: Context, method: str, act: Callable[[bytes, str], Awaitable[Message]], raw: bytes) -> bytes:
        self.load.count += 1
        try:
            return (await act(raw, self._tenant(context))).SerializeToString()
        except Exception as error:
            return refuse(context, error, method)
        finally:
            self.load.count -= 1

    async def _send(
        self,
        context: Context,
        items: AsyncGenerator[StepEvent | Completed, None],
        answer: "type[pb.ExecuteStreamResponse] | type[pb.WatchJobResponse]",
        as_struct: bool,
    ) -> None:
        """Writes events until the result; closes the service's stream whatever happens, before the caller is told."""
        sequence = 0
        async with aclosing(items):
            async for item in items:
                sequence = item.sequence if isinstance(item, StepEvent) else sequence + 1
                event = convert.event_to_proto(item, sequence, as_struct)
                if event is not None:
                    await write(context, answer(event=event).SerializeToString())


async def for_at_most(life_s: float, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The items, until life_s is over: a watch without a deadline must not hold its place among gateway.max_in_flight for ever.

    Then raises Unavailable, WATCH_AGAIN: the caller goes on with a new watch, after the last event it has.
    """
    now_s = asyncio.get_running_loop().time
    end_s = now_s() + life_s
    async with aclosing(items):
        while now_s() < end_s:
            waiting = asyncio.timeout_at(end_s)
            try:
                async with waiting:
                    item = await anext(items)
            except StopAsyncIteration:
                return
            except TimeoutError:
                if waiting.expired():
                    break
                raise
            yield item
    raise Unavailable(f"a watch lasts {life_s:g} s at most: watch again", reason="WATCH_AGAIN", retry_after_s=0.0)


async def write(context: Context, data: bytes) -> None:
    """Raises Stalled for a reader that takes nothing for WRITE_TIMEOUT_S."""
    try:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await context.write(data)
    except TimeoutError:
        raise Stalled(WRITE_TIMEOUT_S) from None


def refuse(context: Context, error: Exception, method: str) -> bytes:
    """Ends a unary call with the error's status; to be returned as its answer.

    `context.abort` raises through gRPC and costs a little more, and refusals come when there is no time to spare.
    """
    if isinstance(error, grpc.aio.BaseError):
        raise error  # the connection is gone, or gRPC aborts already
    code, message, trailers = status.to_status(as_ours(error, method))
    context.set_code(code)
    context.set_details(message)
    context.set_trailing_metadata(trailers)
    return b""


async def fail(context: Context, error: Exception, method: str) -> NoReturn:
    """Ends the call with the error's status."""
    if isinstance(error, grpc.aio.BaseError):
        raise error  # the connection is gone, or gRPC aborts already
    if isinstance(error, Stalled):
        late = StepFailed(f"the reader took nothing for {error.after_s:g} s", code="ABORTED", reason="READER_STALLED")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GIVE_UP_TIMEOUT_S):
                await context.abort(*status.to_status(late))
        raise asyncio.CancelledError
    await context.abort(*status.to_status(as_ours(error, method)))
    raise AssertionError("abort always raises")
