"""The async client: honours pushback, retries what is safe to repeat, fails over between gateways, resumes streams.

async with NearloopClient("127.0.0.1:50051") as client:
    result = await client.execute("tool", "echo", {"text": "hello"}, timeout_s=5)
    print(result.json)
"""

import asyncio
import random
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

import grpc

from gateway.client_pushback import Pushback
from gateway.client_resume import resumed
from gateway.client_retry import RetryBudget, RetryPolicy
from gateway.client_run_values import ClientRun, RunItem, RunOutput, RunStarted
from gateway.client_runs import RunMethods
from gateway.client_session import ClientSession
from gateway.client_throttle import ThrottlePolicy
from gateway.client_values import ClientJob, ClientResult, Input, event_from_proto, input_to_proto, job_from_proto, result_from_proto
from gateway.edge import convert
from gateway.edge.calls import Calls
from gateway.edge.dial import Gateways, read
from gateway.edge.session_call import SessionCall
from gateway.types import Kind, Lane, StepEvent, TargetStatus
from nearloop.v1 import gateway_pb2 as pb

if TYPE_CHECKING:
    from nearloop.v1.gateway_pb2_grpc import GatewayAsyncStub

__all__ = [
    "ClientJob",
    "ClientResult",
    "ClientRun",
    "ClientSession",
    "NearloopClient",
    "RetryPolicy",
    "RunItem",
    "RunOutput",
    "RunStarted",
    "ThrottlePolicy",
]

T = TypeVar("T")
Items = AsyncGenerator[StepEvent | ClientResult, None]

# The gateway answers at the step's deadline with what it knows; gRPC's own deadline comes later, for a gateway that says nothing.
GRACE_S = 0.5


class NearloopClient(RunMethods):
    """One or several gateways that are equal. Errors are those of `gateway.errors`, with reason, scope, retry_after_s and fields.

    tls is True for the machine's certificate authorities, or credentials of your own. timeout_s is for calls that name none. throttle:
    in a long overload a part of the steps is refused here, with reason CLIENT_THROTTLED, instead of being sent; None switches it off.
    """

    def __init__(
        self,
        address: str | Sequence[str] = "127.0.0.1:50051",
        api_key: str | None = None,
        *,
        tls: bool | grpc.ChannelCredentials = False,
        region: str = "",
        retries: RetryPolicy | None = None,
        throttle: ThrottlePolicy | None = ThrottlePolicy(),  # noqa: B008 - frozen
        timeout_s: float = 60.0,
    ) -> None:
        self._gateways = Gateways((address,) if isinstance(address, str) else address, tls)
        self._metadata = (("x-api-key", api_key),) if api_key else ()
        self._region = region
        self._retries = retries or RetryPolicy()
        self._timeout_s = timeout_s
        self._calls = Calls(self._gateways, Pushback(self._retries, throttle, RetryBudget(), random.random))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancels what is in flight."""
        await self._gateways.close()

    # --- steps ---

    async def execute(
        self,
        kind: Kind | str,
        target: str,
        input: Input,
        *,
        lane: Lane | str = Lane.STANDARD,
        run: str = "",
        timeout_s: float | None = None,
        idempotency_key: str = "",
        metadata: Sequence[tuple[str, str]] = (),
    ) -> ClientResult:
        """Runs one step. With an idempotency_key it is retried also when the outcome of an attempt is unknown.

        metadata is sent along, a `traceparent` for example. Raises NearloopError.
        """
        step = self._step(kind, target, input, lane, run, idempotency_key)

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> ClientResult:
            _set_timeout(step, None if timeout_s is None else left_s)
            request = pb.ExecuteRequest(step=step)
            answer = await stub.Execute(request, timeout=left_s + GRACE_S, metadata=(*self._metadata, *metadata))
            return result_from_proto(answer.result)

        return await self._call(attempt, repeatable=bool(idempotency_key), timeout_s=timeout_s, scope=_scope(kind, target))

    async def stream(
        self,
        kind: Kind | str,
        target: str,
        input: Input,
        *,
        lane: Lane | str = Lane.STANDARD,
        run: str = "",
        timeout_s: float | None = None,
        idempotency_key: str = "",
        metadata: Sequence[tuple[str, str]] = (),
    ) -> Items:
        """Events as they come, then the ClientResult. Retried only before the first event. Close it (`aclosing`) to stop early.

        Raises NearloopError.
        """
        step = self._step(kind, target, input, lane, run, idempotency_key)

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> tuple[Items, StepEvent | ClientResult]:
            _set_timeout(step, None if timeout_s is None else left_s)
            request = pb.ExecuteStreamRequest(step=step)
            items = _values(read(stub.ExecuteStream(request, timeout=left_s + GRACE_S, metadata=(*self._metadata, *metadata))))
            try:
                return items, await anext(items)
            except BaseException:
                await items.aclose()
                raise

        items, first = await self._call(attempt, repeatable=bool(idempotency_key), timeout_s=timeout_s, scope=_scope(kind, target))
        async with aclosing(items):
            yield first
            async for item in items:
                yield item

    async def submit(
        self,
        kind: Kind | str,
        target: str,
        input: Input,
        *,
        lane: Lane | str = Lane.STANDARD,
        run: str = "",
        timeout_s: float | None = None,
        idempotency_key: str = "",
        metadata: Sequence[tuple[str, str]] = (),
    ) -> ClientJob:
        """Stores a job that may take timeout_s (default: as long as the gateway allows) and returns when it is durable.

        Without a key one is made, so that a retry of this call finds the same job. Raises NearloopError.
        """
        step = self._step(kind, target, input, lane, run, idempotency_key or uuid.uuid4().hex)
        _set_timeout(step, timeout_s)

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> ClientJob:
            answer = await stub.Submit(pb.SubmitRequest(step=step), timeout=left_s, metadata=(*self._metadata, *metadata))
            return job_from_proto(answer.job, answer.created)

        # Apart from steps that are executed at once: jobs wait elsewhere.
        return await self._call(attempt, scope=f"job.{_scope(kind, target)}")

    def session(self, *, metadata: Sequence[tuple[str, str]] = ()) -> ClientSession:
        """Many steps at once on one stream, under the gateway's credits; use it with `async with`, which raises NearloopError."""

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> SessionCall:
            return await SessionCall.open(stub, (*self._metadata, *metadata), left_s)

        return ClientSession(lambda: self._call(attempt), self._step, self._timeout_s)

    # --- jobs ---

    async def get_job(self, job_id: str) -> ClientJob:
        """Raises NotFound and other NearloopErrors."""

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> ClientJob:
            return job_from_proto((await stub.GetJob(pb.GetJobRequest(job_id=job_id), timeout=left_s, metadata=self._metadata)).job)

        return await self._call(attempt)

    async def cancel(self, job_id: str) -> ClientJob:
        """The job as it stands then; one that had ended is unchanged. Raises NearloopError."""

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> ClientJob:
            request = pb.CancelJobRequest(job_id=job_id)
            return job_from_proto((await stub.CancelJob(request, timeout=left_s, metadata=self._metadata)).job)

        return await self._call(attempt)

    async def watch(self, job_id: str, *, attempt: int = 0, after_sequence: int = 0, timeout_s: float | None = None) -> Items:
        """A job's events after that position, then its ClientResult. A lost gateway is no end: it goes on where it was, at the next one.

        Raises the error that the job ended with, Expired after timeout_s (default: none), other NearloopErrors.
        """

        def watch(stub: "GatewayAsyncStub", attempt: int, after_sequence: int, left_s: float | None) -> AsyncGenerator[pb.Event, None]:
            request = pb.WatchJobRequest(job_id=job_id, attempt=attempt, after_sequence=after_sequence)
            return read(stub.WatchJob(request, timeout=left_s, metadata=self._metadata))

        deadline_s = None if timeout_s is None else _now_s() + timeout_s
        async with aclosing(_values(resumed(self._gateways, self._retries, watch, attempt, after_sequence, deadline_s))) as items:
            async for item in items:
                yield item

    # --- targets ---

    async def targets(self, kind: Kind | str | None = None) -> list[TargetStatus]:
        """What steps can be for; what a gateway does not tell has its default. Raises NearloopError."""
        request = pb.ListTargetsRequest(kind=convert.kind_to_proto(Kind(kind)) if kind else pb.KIND_UNSPECIFIED)

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> list[TargetStatus]:
            answer = await stub.ListTargets(request, timeout=left_s, metadata=self._metadata)
            return [convert.target_from_proto(target) for target in answer.targets]

        return await self._call(attempt)

    # --- how it calls ---

    def _step(self, kind: Kind | str, target: str, input: Input, lane: Lane | str, run: str, key: str) -> pb.Step:
        return pb.Step(
            kind=convert.kind_to_proto(Kind(kind)),
            target=target,
            lane=convert.lane_to_proto(Lane(lane)),
            run=run,
            idempotency_key=key,
            input=input_to_proto(input),
            region=self._region,
        )

    async def _call(
        self,
        attempt: "Callable[[GatewayAsyncStub, float], Awaitable[T]]",
        *,
        repeatable: bool = True,
        timeout_s: float | None = None,
        scope: str = "",
    ) -> T:
        return await self._calls.call(attempt, repeatable, self._timeout_s if timeout_s is None else timeout_s, scope)


async def _values(events: AsyncGenerator[pb.Event, None]) -> Items:
    """Events as values; closes the stream behind them. What this client does not know yet is left out."""
    async with aclosing(events):
        async for event in events:
            item = event_from_proto(event)
            if item is not None:
                yield item


def _scope(kind: Kind | str, target: str) -> str:
    return f"{Kind(kind).value}.{target}"


def _set_timeout(step: pb.Step, timeout_s: float | None) -> None:
    if timeout_s is not None:
        step.timeout.FromNanoseconds(round(timeout_s * 1e9))


def _now_s() -> float:
    return asyncio.get_running_loop().time()
