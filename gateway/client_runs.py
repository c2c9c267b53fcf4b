"""Runs for the client: programs that the gateways execute, followed to their end.

async for item in client.run(Path("answer.yaml"), {"question": "..."}):
    ...
output = await client.run_to_end(Path("answer.yaml"), {"question": "..."})
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

from gateway.client_resume import resumed
from gateway.client_retry import RetryPolicy, may_retry
from gateway.client_run_values import (
    ClientRun,
    ProgramLike,
    RunItem,
    RunOutput,
    input_to_proto,
    item_from_proto,
    placement_from_proto,
    run_from_proto,
    source_of,
)
from gateway.edge import convert
from gateway.edge.dial import Gateways, read
from gateway.errors import NearloopError, Unavailable
from gateway.program.model import Json
from gateway.run_types import Placement
from gateway.types import Lane
from nearloop.v1 import gateway_pb2 as pb

if TYPE_CHECKING:
    from nearloop.v1.gateway_pb2_grpc import GatewayAsyncStub

T = TypeVar("T")
Metadata = Sequence[tuple[str, str]]
Items = AsyncGenerator[RunItem, None]
SCOPE = "run.program"
GRACE_S = 0.5  # the gateway answers at the run's deadline; gRPC's own deadline is for one that says nothing


class RunMethods:
    """The part of NearloopClient that is about runs."""

    _gateways: Gateways
    _metadata: tuple[tuple[str, str], ...]
    _region: str
    _retries: RetryPolicy
    _timeout_s: float

    if TYPE_CHECKING:

        async def _call(
            self,
            attempt: "Callable[[GatewayAsyncStub, float], Awaitable[T]]",
            *,
            repeatable: bool = True,
            timeout_s: float | None = None,
            scope: str = "",
        ) -> T: ...

    async def run(
        self,
        program: ProgramLike,
        input: Json,
        *,
        lane: Lane | str = Lane.STANDARD,
        timeout_s: float | None = None,
        idempotency_key: str = "",
        regions: Sequence[str] = (),
        allow: Sequence[str] = (),
        tokens: bool = False,
        speculate: int = 0,
        metadata: Metadata = (),
    ) -> Items:
        """Runs a program: a ClientRun once it is accepted, what happens in it, its RunOutput as the last item.

        From the first item on the run is durable, and goes on when nobody listens any more: `cancel_run` ends it. A gateway that is lost
        is no end, the stream goes on at the next one; before that the same run is asked for again, by its key, which is made here when
        none is given. program: see ProgramLike. regions: that it must not leave. allow: scopes such as `tool.fetch` that it may call,
        empty for all that it names. Raises the error that the run ended with, InvalidStep with all that is wrong, other NearloopErrors.
        """
        spec = self._spec(program, input, lane, idempotency_key, regions, allow, tokens, speculate)
        deadline_s = _now_s() + (self._timeout_s if timeout_s is None else timeout_s)

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> tuple[AsyncGenerator[pb.RunEvent, None], pb.RunEvent]:
            spec.timeout.FromNanoseconds(max(1, round(left_s * 1e9)))
            request = pb.RunRequest(run=spec, json_text=True)
            events = read(stub.Run(request, timeout=left_s + GRACE_S, metadata=(*self._metadata, *metadata)))
            try:
                return events, await anext(events)
            except BaseException:
                await events.aclose()
                raise

        events, first = await self._call(attempt, timeout_s=timeout_s, scope=SCOPE)
        async with aclosing(self._to_end(events, first, deadline_s)) as rest:
            async for event in rest:
                item = item_from_proto(event)
                if item is not None:
                    yield item

    async def _to_end(
        self, events: AsyncGenerator[pb.RunEvent, None], first: pb.RunEvent, deadline_s: float
    ) -> AsyncGenerator[pb.RunEvent, None]:
        """The events of an accepted run, on other streams when this one breaks."""
        position = first.attempt, first.sequence
        async with aclosing(events):
            yield first
            try:
                async for event in events:
                    position = event.attempt, event.sequence
                    yield event
                    if event.HasField("result"):
                        return
            except NearloopError as error:
                if not may_retry(error, repeatable=True):
                    raise
                if isinstance(error, Unavailable):
                    self._gateways.after(self._gateways.current, error)
        async with aclosing(self._watched(first.accepted.id, *position, deadline_s + GRACE_S)) as rest:
            async for event in rest:
                yield event

    async def run_to_end(self, program: ProgramLike, input: Json, **options: object) -> Json:
        """The run's output. options: those of `run`. Raises as `run`."""
        async with aclosing(self.run(program, input, **options)) as items:  # type: ignore[arg-type]  # checked there
            async for item in items:
                if isinstance(item, RunOutput):
                    return item.output
        raise AssertionError("a stream of a run ends with its output or raises")

    async def submit_run(
        self,
        program: ProgramLike,
        input: Json,
        *,
        lane: Lane | str = Lane.STANDARD,
        timeout_s: float | None = None,
        idempotency_key: str = "",
        regions: Sequence[str] = (),
        allow: Sequence[str] = (),
        tokens: bool = False,
        speculate: int = 0,
        metadata: Metadata = (),
    ) -> ClientRun:
        """Returns when the run is accepted. It may take timeout_s, by default as long as the gateway allows. Raises NearloopError."""
        spec = self._spec(program, input, lane, idempotency_key, regions, allow, tokens, speculate)
        if timeout_s is not None:
            spec.timeout.FromNanoseconds(round(timeout_s * 1e9))

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> ClientRun:
            request = pb.SubmitRunRequest(run=spec, json_text=True)
            answer = await stub.SubmitRun(request, timeout=left_s, metadata=(*self._metadata, *metadata))
            return run_from_proto(answer.run, answer.created)

        return await self._call(attempt, scope=f"job.{SCOPE}")

    async def watch_run(self, run_id: str, *, timeout_s: float | None = None) -> Items:
        """What happens in a run, from its beginning as far as its runner remembers it, then its RunOutput. A lost gateway is no end.

        Raises the error that the run ended with, Expired after timeout_s (default: none), other NearloopErrors.
        """
        deadline_s = None if timeout_s is None else _now_s() + timeout_s
        async with aclosing(self._watched(run_id, 0, 0, deadline_s)) as events:
            async for event in events:
                item = item_from_proto(event)
                if item is not None:
                    yield item

    def _watched(self, run_id: str, attempt: int, after_sequence: int, deadline_s: float | None) -> AsyncGenerator[pb.RunEvent, None]:
        def watch(stub: "GatewayAsyncStub", attempt: int, after_sequence: int, left_s: float | None) -> AsyncGenerator[pb.RunEvent, None]:
            request = pb.WatchRunRequest(run_id=run_id, attempt=attempt, after_sequence=after_sequence, json_text=True)
            return read(stub.WatchRun(request, timeout=left_s, metadata=self._metadata))

        return resumed(self._gateways, self._retries, watch, attempt, after_sequence, deadline_s)

    async def get_run(self, run_id: str) -> ClientRun:
        """Raises NotFound and other NearloopErrors."""

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> ClientRun:
            request = pb.GetRunRequest(run_id=run_id, json_text=True)
            return run_from_proto((await stub.GetRun(request, timeout=left_s, metadata=self._metadata)).run)

        return await self._call(attempt)

    async def cancel_run(self, run_id: str) -> ClientRun:
        """The run as it stands then; one that had ended is unchanged. Raises NearloopError."""

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> ClientRun:
            request = pb.CancelRunRequest(run_id=run_id, json_text=True)
            return run_from_proto((await stub.CancelRun(request, timeout=left_s, metadata=self._metadata)).run)

        return await self._call(attempt)

    async def place_run(
        self, program: ProgramLike, input: Json, *, regions: Sequence[str] = (), allow: Sequence[str] = (), speculate: int = 0
    ) -> Placement:
        """Where a run would be placed now, and why. dead_s is infinite where nothing can be said. Raises NearloopError."""
        spec = self._spec(program, input, Lane.STANDARD, "", regions, allow, False, speculate)

        async def attempt(stub: "GatewayAsyncStub", left_s: float) -> Placement:
            answer = await stub.PlaceRun(pb.PlaceRunRequest(run=spec), timeout=left_s, metadata=self._metadata)
            return placement_from_proto(answer.placement)

        return await self._call(attempt)

    def _spec(
        self,
        program: ProgramLike,
        input: Json,
        lane: Lane | str,
        key: str,
        regions: Sequence[str],
        allow: Sequence[str],
        tokens: bool,
        speculate: int,
    ) -> pb.RunSpec:
        return pb.RunSpec(
            source=source_of(program),
            input=input_to_proto(input),
            lane=convert.lane_to_proto(Lane(lane)),
            idempotency_key=key or uuid.uuid4().hex,
            region=self._region,
            regions=regions,
            allow=allow,
            tokens=tokens,
            speculate=speculate,
        )


def _now_s() -> float:
    return asyncio.get_running_loop().time()
