"""The RPCs of nearloop.v1.Gateway for runs: who calls, is the order right, ask the service, answer or say why not."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import grpc
from google.protobuf.message import Message

from gateway.clock import Clock
from gateway.config import Config
from gateway.edge import run_convert
from gateway.edge.auth import Authenticator
from gateway.edge.refusals import Load, parse
from gateway.edge.run_intake import RunIntake, check_run_id
from gateway.edge.servicer import Context, fail, for_at_most, refuse, write
from gateway.errors import StepFailed
from gateway.ports import RunService, StepService
from gateway.run_types import RunOrder, RunStatus
from gateway.types import Completed, StepEvent
from nearloop.v1 import gateway_pb2 as pb

Items = AsyncGenerator[RunStatus | StepEvent | Completed, None]
# A run that is over at its deadline is told so by its result; a stream that hears of none must not hold its place for ever.
OVERTIME_S = 60.0


class RunServicer:
    """runs None: they are refused. load: of the whole gateway, since a stream of a run holds a place as any other call."""

    def __init__(self, config: Config, service: StepService, runs: RunService | None, clock: Clock, load: Load) -> None:
        self._maybe_runs = runs
        self._auth = Authenticator(config.auth)
        self._intake = RunIntake(config, service, clock)
        self._clock = clock
        self._load = load
        self._max_watch_s = config.gateway.max_timeout_s

    def handlers(self) -> dict[str, "grpc.RpcMethodHandler[bytes, bytes]"]:
        stream = grpc.unary_stream_rpc_method_handler
        return {
            "Run": stream(self.run),
            "WatchRun": stream(self.watch_run),
            "SubmitRun": self._unary("SubmitRun", self._submit_run),
            "CancelRun": self._unary("CancelRun", self._cancel_run),
            "GetRun": self._unary("GetRun", self._get_run),
            "PlaceRun": self._unary("PlaceRun", self._place_run),
        }

    # --- streams ---

    async def run(self, raw: bytes, context: Context) -> None:
        self._load.count += 1
        try:
            tenant, runs = self._enter(context)
            request = parse(pb.RunRequest, raw)
            order = await self._order(request.run, tenant, context, context.time_remaining())
            life_s = order.deadline_s - self._clock.wall_s() + OVERTIME_S
            await _send(context, for_at_most(life_s, runs.run(order)), pb.RunResponse, request.json_text)
        except Exception as error:
            await fail(context, error, "Run")
        finally:
            self._load.count -= 1

    async def watch_run(self, raw: bytes, context: Context) -> None:
        self._load.count += 1
        try:
            tenant, runs = self._enter(context)
            request = parse(pb.WatchRunRequest, raw)
            check_run_id(request.run_id)
            items = runs.watch_run(tenant, request.run_id, request.attempt, request.after_sequence)
            await _send(context, for_at_most(self._max_watch_s, items), pb.WatchRunResponse, request.json_text)
        except Exception as error:
            await fail(context, error, "WatchRun")
        finally:
            self._load.count -= 1

    # --- one answer ---

    async def _submit_run(self, raw: bytes, tenant: str, runs: RunService, context: Context) -> Message:
        request = parse(pb.SubmitRunRequest, raw)
        status, created = await runs.submit_run(await self._order(request.run, tenant, context, None))
        return pb.SubmitRunResponse(run=_run(status, request.json_text), created=created)

    async def _cancel_run(self, raw: bytes, tenant: str, runs: RunService, context: Context) -> Message:
        request = parse(pb.CancelRunRequest, raw)
        check_run_id(request.run_id)
        return pb.CancelRunResponse(run=_run(await runs.cancel_run(tenant, request.run_id), request.json_text))

    async def _get_run(self, raw: bytes, tenant: str, runs: RunService, context: Context) -> Message:
        request = parse(pb.GetRunRequest, raw)
        check_run_id(request.run_id)
        return pb.GetRunResponse(run=_run(await runs.run_status(tenant, request.run_id), request.json_text))

    async def _place_run(self, raw: bytes, tenant: str, runs: RunService, context: Context) -> Message:
        order = await self._order(parse(pb.PlaceRunRequest, raw).run, tenant, context, None)
        return pb.PlaceRunResponse(placement=run_convert.placement_to_proto(await runs.place(order)))

    # --- what they share ---

    def _enter(self, context: Context) -> tuple[str, RunService]:
        """Who calls, and who takes runs. Raises Unauthenticated, Rejected, StepFailed."""
        tenant = self._auth.tenant(context.invocation_metadata() or ())
        self._load.check()
        if self._maybe_runs is None:
            raise StepFailed("this gateway takes no runs", code="UNIMPLEMENTED", reason="RUNS_NOT_OFFERED")
        return tenant, self._maybe_runs

    async def _order(self, message: pb.RunSpec, tenant: str, context: Context, remaining_s: float | None) -> RunOrder:
        return await self._intake.order(message, tenant, context.invocation_metadata() or (), remaining_s)

    def _unary(
        self, method: str, act: Callable[[bytes, str, RunService, Context], Awaitable[Message]]
    ) -> "grpc.RpcMethodHandler[bytes, bytes]":
        async def answer(raw: bytes, context: Context) -> bytes:
            self._load.count += 1
            try:
                return (await act(raw, *self._enter(context), context)).SerializeToString()
            except Exception as error:
                return refuse(context, error, method)
            finally:
                self._load.count -= 1

        return grpc.unary_unary_rpc_method_handler(answer)


async def _send(context: Context, items: Items, answer: "type[pb.RunResponse] | type[pb.WatchRunResponse]", json_text: bool) -> None:
    """Writes events until the result; closes the service's stream whatever happens, before the caller is told."""
    to_json, sequence = _form(json_text), 0
    async with aclosing(items):
        async for item in items:
            event = run_convert.event_to_proto(item, sequence, to_json)
            if event is not None:
                sequence = event.sequence
                await write(context, answer(event=event).SerializeToString())


def _run(status: RunStatus, json_text: bool) -> pb.Run:
    return run_convert.run_to_proto(status, _form(json_text))


def _form(json_text: bool) -> run_convert.ToJson:
    return run_convert.json_as_text if json_text else run_convert.json_as_value
