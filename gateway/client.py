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

from gateway.client_retry import RetryBudget, RetryPolicy, may_retry
from gateway.client_values import ClientJob, ClientResult, Input, event_from_proto, input_to_proto, job_from_proto, result_from_proto
from gateway.edge import convert
from gateway.edge.dial import CONNECT_TIMEOUT_S, UNREACHABLE, Gateways, read, translate
from gateway.errors import NearloopError
from gateway.types import Kind, Lane, StepEvent, TargetStatus
from nearloop.v1 import gateway_pb2 as pb

if TYPE_CHECKING:
    from nearloop.v1.gateway_pb2_grpc import GatewayAsyncStub

__all__ = ["ClientJob", "ClientResult", "NearloopClient", "RetryPolicy"]

T = TypeVar("T")
Items = AsyncGenerator[StepEvent | ClientResult, None]

# The gateway answers at the step's deadline with what it knows; gRPC's own deadline comes later, for a gateway that says nothing.
GRACE_S = 0.5


class NearloopClient:
    """One or several gateways that are equal. Errors are those of `gateway.errors`, with reason, scope, retry_after_s and fields.

    tls is True for the machine's certificate authorities, or credentials of your own. timeout_s is for calls that name none.
    """

    def __init__(
        self,
        address: str | Sequence[str] = "127.0.0.1:50051",
        api_key: str | None = None,
        *,
        tls: bool | grpc.ChannelCredentials = False,
        region: str = "",
        retries: RetryPolicy | None = None,
        timeout_s: float = 60.0,
    ) -> None:
        self._gateways = Gateways((address,) if isinstance(address, str) else address, tls)
        self._metadata = (("x-api-key", api_key),) if api_key else ()
        self._region = region
        self._retries = retries or RetryPolicy()
        self._timeout_s = timeout_s
        self._budget = RetryBudget()

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

        return await self._call(attempt, repeatable=bool(idempotency_key), timeout_s=timeout_s)

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

        items, first = await self._call(attempt, repeatable=bool(idempotency_key), timeout_s=timeout_s)
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

        return await self._call(attempt)

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
        deadline_s = None if timeout_s is None else _now_s() + timeout_s
        failures, index = 0, self._gateways.current
        while True:
            left_s = None if deadline_s is None else max(0.001, deadline_s - _now_s())
            try:
                stub = await self._gateways.stub(index, CONNECT_TIMEOUT_S if left_s is None else left_s)
                request = pb.WatchJobRequest(job_id=job_id, attempt=attempt, after_sequence=after_sequence)
                async with aclosing(_values(read(stub.WatchJob(request, timeout=left_s, metadata=self._metadata)))) as items:
                    async for item in items:
                        failures = 0
                        if isinstance(item, ClientResult):
                            yield item
                            return
                        if (item.attempt, item.sequence) > (attempt, after_sequence):
                            attempt, after_sequence = item.attempt, item.sequence
                            yield item
            except NearloopError as error:
                if not may_retry(error, repeatable=True):
                    raise
                failures, index = failures + 1, self._gateways.after(index, error)
                wait_s = self._retries.wait_s(failures, error, random.random)
                if deadline_s is not None and _now_s() + wait_s >= deadline_s:
                    raise
                await asyncio.sleep(wait_s)

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
    ) -> T:
        """Attempts until one succeeds, or no more is sensible: not safe, out of attempts, of budget or of time."""
        deadline_s = _now_s() + (self._timeout_s if timeout_s is None else timeout_s)
        self._budget.called()
        index, failures, unreachable = self._gateways.current, 0, 0
        while True:
            left_s = max(0.001, deadline_s - _now_s())
            try:
                return await attempt(await self._gateways.stub(index, left_s), left_s)
            except grpc.aio.AioRpcError as rpc_error:
                error = translate(rpc_error)
            except NearloopError as raised:
                error = raised
            if not may_retry(error, repeatable):
                raise error
            index = self._gateways.after(index, error)
            if error.reason == UNREACHABLE:
                unreachable += 1
                if unreachable < len(self._gateways):
                    continue  # nothing was sent: the next gateway may be asked at once, and that is no retry
                unreachable = 0
            failures += 1
            wait_s = self._retries.wait_s(failures, error, random.random)
            if failures >= self._retries.attempts or _now_s() + wait_s >= deadline_s or not self._budget.take():
                raise error
            await asyncio.sleep(wait_s)


async def _values(events: AsyncGenerator[pb.Event, None]) -> Items:
    """Events as values; closes the stream behind them. What this client does not know yet is left out."""
    async with aclosing(events):
        async for event in events:
            item = event_from_proto(event)
            if item is not None:
                yield item


def _set_timeout(step: pb.Step, timeout_s: float | None) -> None:
    if timeout_s is not None:
        step.timeout.FromNanoseconds(round(timeout_s * 1e9))


def _now_s() -> float:
    return asyncio.get_running_loop().time()
