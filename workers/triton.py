"""The executor for models in Triton Inference Server.

One channel. For a model with a batcher of Triton's own, steps are separate requests; the batching policy may hold them back so that they
arrive there together, and the slots of the target bound how many are there. For one that takes batches and has none, the worker is the
batcher: steps that can be are merged into one request, and no more executions are in Triton than the model has instances.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.clock import Clock, SystemClock
from gateway.config import Config
from gateway.errors import Expired, InvalidStep, NearloopError, StepFailed, Unavailable
from gateway.ports import Work
from gateway.types import Payload, Target
from workers.batching import Batching
from workers.gathering import Gatherer
from workers.triton_aftermath import LostProcess
from workers.triton_calls import BUSY_OR_GONE, InferCall, channel_options, infer, infer_together, lost_process, stream, text
from workers.triton_catalogue import CALL_TIMEOUT_S, Served, TritonCatalogue
from workers.triton_codec import Form, decode, encode, join
from workers.triton_merge import rows_of

log = logging.getLogger("nearloop.worker.triton")

REFRESH_S = 1.0
LOOK_WITHIN_S = 0.2  # at most so long after a step that failed; all that fail meanwhile cause one look


class TritonExecutor:
    """Serves every ready model of one Triton; models that come and go later are noticed within about a second."""

    def __init__(
        self,
        config: Config,
        region: str,
        *,
        batching: Batching | None = None,
        clock: Clock | None = None,
        random_source: Callable[[], float] = random.random,
    ) -> None:
        """region is where this worker is; the models' home is the region of the configuration's [triton]."""
        self._address = config.triton.url.removeprefix("grpc://")
        self._max_message_bytes = config.triton.max_message_bytes
        self._home_region = config.triton.region
        self._region = region
        self._batching = batching
        self._clock = clock or SystemClock()
        self._random = random_source
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._catalogue: TritonCatalogue | None = None
        self._served: dict[str, Served] = {}
        self._announced: dict[str, Target] = {}  # a model that is gone stays a target: its steps wait in their queue
        self._lost: dict[str, LostProcess] = {}  # models whose process has died while their server lives
        self._up = False
        self._look = asyncio.Event()
        self._refresher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises Unavailable while Triton is not ready or serves no model."""
        if not self._address:
            raise Unavailable("no Triton is configured: give its gRPC address as [triton] url or --triton")
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=channel_options(self._max_message_bytes))
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
            self._catalogue = TritonCatalogue(self._stub, self._home_region)
        await self._refresh()
        if not self._served:
            raise Unavailable(f"Triton at {self._address} serves no model")
        self._refresher = asyncio.create_task(self._keep_fresh())

    async def close(self) -> None:
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)
            self._refresher = None
        self._up = False
        if self._batching is not None:
            await self._batching.close()
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def targets(self) -> Sequence[Target]:
        return tuple(self._announced.values())

    def ready(self, target: str) -> bool:
        if not self._up or target not in self._served:
            return False
        lost = self._lost.get(target)
        return lost is None or lost.may_try(self._clock.now_s())

    async def execute(self, work: Work) -> Payload:
        """Raises InvalidStep, StepFailed, Expired; Unavailable while Triton or the model is away."""
        step = work.step
        served = self._served.get(step.target)
        if served is None or not self._up:
            raise Unavailable(f"model {step.target} is not ready in Triton at {self._address}")
        lost = self._lost.get(step.target)
        if lost is not None and not lost.may_try(self._clock.now_s()):
            raise self._no_process(step.target)
        request, form = encode(served.model, step.input, step.id)
        if len(step.input.data) > self._max_message_bytes // 2 and request.ByteSize() > self._max_message_bytes:
            raise InvalidStep([("input", f"is larger than the {self._max_message_bytes} bytes that go to Triton in one message")])
        metadata = [("traceparent", step.traceparent)] if step.traceparent else []
        if step.tracestate:
            metadata.append(("tracestate", step.tracestate))
        if lost is not None:
            with lost.trying():
                return await self._try_again(work, served, request, form, metadata)
        if self._batching is None:
            return await self._send(work, served, request, form, metadata)
        if served.merges:
            gatherer = self._batching.gatherer(served.target, served.view, self._infer_together)
            if gatherer is not None:
                return await self._gather(work, gatherer, request, form, metadata)
        batcher = self._batching.batcher(served.target, served.view)
        if batcher is None:
            return await self._send(work, served, request, form, metadata)
        batch, answered = await batcher.enter(work.remaining_s()), False
        try:
            output = await self._send(work, served, request, form, metadata)
            answered = True
            return output
        finally:
            batcher.leave(batch, answered=answered)

    async def _try_again(self, work: Work, served: Served, request: Any, form: Form, metadata: list[tuple[str, str]]) -> Payload:
        """One step finds out whether a lost process is back; it waits for no batch."""
        model = work.step.target
        try:
            output = await self._send(work, served, request, form, metadata)
        except StepFailed:  # the model's own answer
            self._found(model)
            raise
        self._found(model)
        return output

    async def _send(self, work: Work, served: Served, request: Any, form: Form, metadata: list[tuple[str, str]]) -> Payload:
        timeout_s = min(work.remaining_s(), 3600.0)
        try:
            if not served.model.decoupled:
                return decode(await infer(self._stub, request, metadata, timeout_s), form)
            tokens: list[Payload] = []
            async with aclosing(stream(self._stub, request, metadata, timeout_s)) as responses:
                async for response in responses:
                    token = decode(response, form)
                    tokens.append(token)
                    work.emit(token)
            return join(tokens, form)
        except grpc.aio.AioRpcError as error:
            raise self._translate(error, work.step.target) from None

    async def _gather(self, work: Work, gatherer: Gatherer[Any, Any], request: Any, form: Form, metadata: list[tuple[str, str]]) -> Payload:
        key, rows = rows_of(request)
        left_s = work.remaining_s()
        try:
            async with asyncio.timeout(left_s):  # the merged request has the time of the one that has the most
                return decode(await gatherer.call((request, metadata, rows), key, rows, left_s), form)
        except TimeoutError:
            raise Expired(f"model {work.step.target} did not answer before the deadline") from None
        except grpc.aio.AioRpcError as error:
            raise self._translate(error, work.step.target) from None

    async def _infer_together(self, calls: Sequence[InferCall]) -> tuple[list[Any], bool]:
        assert self._batching is not None
        return await infer_together(self._stub, calls, self._batching.clock)

    def _translate(self, error: grpc.aio.AioRpcError, model: str) -> NearloopError:
        code, details = error.code(), error.details() or ""
        if code in BUSY_OR_GONE:
            self._look.set()  # is it the server, the model, or only its queue?
            return Unavailable(f"Triton at {self._address} cannot take work for model {model} now ({code.name})")
        if lost_process(error):
            self._lose(model)
            return self._no_process(model)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Expired(f"model {model} did not answer before the deadline")
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            return StepFailed(text(model, details), code=code.name, reason="MODEL_REFUSED_INPUT")
        return StepFailed(text(model, details), code=code.name, reason="MODEL_FAILED")

    # ---- models without a process ----------------------------------------------------------------------------------------------

    def _lose(self, model: str) -> None:
        lost = self._lost.get(model)
        if lost is None:
            log.warning("%s; its work stays in the queue but for one step now and then that tries", self._no_process(model).message)
            lost = self._lost[model] = LostProcess()
        lost.failed(self._clock.now_s(), self._random())

    def _found(self, model: str) -> None:
        if self._lost.pop(model, None) is not None:
            log.info("model %s has a process again in Triton at %s", model, self._address)

    def _no_process(self, model: str) -> Unavailable:
        return Unavailable(f"model {model} has lost its process in Triton at {self._address}")

    # ---- readiness -----------------------------------------------------------------------------------------------------------

    async def _refresh(self) -> None:
        """Raises Unavailable."""
        assert self._catalogue is not None
        try:
            ready = await self._stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=CALL_TIMEOUT_S)
            if not ready.ready:
                raise Unavailable(f"Triton at {self._address} is not ready: it still loads a model, or failed to")
            self._served = await self._catalogue.read(self._served)
        except grpc.aio.AioRpcError as error:
            self._went_away()
            raise Unavailable(f"Triton at {self._address} does not answer ({error.code().name})") from None
        except Unavailable:
            self._went_away()
            raise
        self._announced |= {name: served.target for name, served in self._served.items()}
        self._up = True

    def _went_away(self) -> None:
        self._up = False
        self._lost.clear()  # a server that starts again starts all its processes

    async def _keep_fresh(self) -> None:
        was_up = True
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(REFRESH_S * (0.75 + self._random() / 2)):
                    await self._look.wait()
                    await asyncio.sleep(LOOK_WITHIN_S * self._random())
            self._look.clear()
            try:
                await self._refresh()
            except Unavailable as error:
                if was_up:
                    log.warning("%s; its work stays in the queue", error.message)
                was_up = False
            else:
                if not was_up:
                    log.info("Triton at %s is back", self._address)
                was_up = True
