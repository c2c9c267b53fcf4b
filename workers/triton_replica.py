"""One Triton: the channel to it, which models it has ready, and what its answers mean."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from gateway.clock import Clock
from gateway.errors import Expired, NearloopError, StepFailed, Unavailable
from gateway.ports import Work
from gateway.types import Payload
from workers.gathering import Gatherer
from workers.replicas import Pause
from workers.triton_aftermath import LostProcess
from workers.triton_calls import BUSY_OR_GONE, InferCall, Metadata, channel_options, infer, infer_together, lost_process, stream, text
from workers.triton_catalogue import CALL_TIMEOUT_S, Served, TritonCatalogue
from workers.triton_codec import Form, Model, decode, join
from workers.triton_merge import rows_of

log = logging.getLogger("nearloop.worker.triton")

WITHOUT_IT = "its work goes to another replica, or stays in the queue"
REFRESH_S = 1.0
LOOK_WITHIN_S = 0.2  # at most so long after a step that failed; all that fail meanwhile cause one look


class NotTaken(Unavailable):
    """Nothing of the step's output has come. Another replica may be asked where executing twice does no harm."""


class TritonReplica:
    """`connect`, `refresh`, then `keep_fresh` as long as it is used. `changed()` is called after each look that found or lost it."""

    def __init__(
        self,
        address: str,
        home_region: str,
        max_message_bytes: int,
        clock: Clock,
        random_source: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self.address = address
        self.up = False
        self.served: dict[str, Served] = {}
        self.lost: dict[str, LostProcess] = {}  # models whose process has died while their server lives
        self.in_flight: Counter[str] = Counter()  # steps by model, also those that wait for a batch
        self.clock = clock
        self._home_region = home_region
        self._max_message_bytes = max_message_bytes
        self._random = random_source
        self._changed = changed
        self._pauses: dict[str, Pause] = {}
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._catalogue: TritonCatalogue | None = None
        self._look = asyncio.Event()

    def connect(self) -> None:
        if self._channel is None:
            self._channel = grpc.aio.insecure_channel(self.address, options=channel_options(self._max_message_bytes))
            self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
            self._catalogue = TritonCatalogue(self._stub, self._home_region)

    async def close(self) -> None:
        self.up = False
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def ready(self, model: str) -> bool:
        if not self.up or model not in self.served:
            return False
        lost = self.lost.get(model)
        return lost is None or lost.may_try(self.clock.now_s())

    def is_rested(self, model: str) -> bool:
        """It has not just refused a step for the model."""
        pause = self._pauses.get(model)
        return pause is None or pause.is_over(self.clock.now_s())

    # ---- steps ---------------------------------------------------------------------------------------------------------------

    @contextmanager
    def at_work(self, model: str) -> Iterator[None]:
        self.in_flight[model] += 1
        try:
            yield
        finally:
            self.in_flight[model] -= 1

    async def send(self, work: Work, model: Model, request: Any, form: Form, metadata: Metadata) -> Payload:
        """Raises StepFailed, Expired, NotTaken; Unavailable when a part of the output has been emitted."""
        timeout_s = min(work.remaining_s(), 3600.0)
        tokens: list[Payload] = []
        try:
            if not model.decoupled:
                return self._taken(model.name, decode(await infer(self._stub, request, metadata, timeout_s), form))
            async with aclosing(stream(self._stub, request, metadata, timeout_s)) as responses:
                async for response in responses:
                    token = decode(response, form)
                    tokens.append(token)
                    work.emit(token)
            return self._taken(model.name, join(tokens, form))
        except grpc.aio.AioRpcError as error:
            meant = self.translate(error, model.name)
            raise Unavailable(meant.message) if tokens and isinstance(meant, NotTaken) else meant from None

    async def try_again(self, work: Work, model: Model, request: Any, form: Form, metadata: Metadata) -> Payload:
        """One step finds out whether a lost process is back; it waits for no batch."""
        with self.lost[model.name].trying():
            try:
                output = await self.send(work, model, request, form, metadata)
            except StepFailed:  # the model's own answer
                self._found(model.name)
                raise
            self._found(model.name)
            return output

    async def gather(self, work: Work, gatherer: Gatherer[Any, Any], model: Model, request: Any, form: Form, metadata: Metadata) -> Payload:
        """Executes the step together with others that wait in the gatherer. Raises StepFailed, Expired, NotTaken."""
        key, rows = rows_of(request)
        left_s = work.remaining_s()
        try:
            async with asyncio.timeout(left_s):  # the merged request has the time of the one that has the most
                answer = await gatherer.call((request, metadata, rows), key, rows, left_s)
            return self._taken(model.name, decode(answer, form))
        except TimeoutError:
            raise Expired(f"model {model.name} did not answer before the deadline") from None
        except grpc.aio.AioRpcError as error:
            raise self.translate(error, model.name) from None

    async def infer_together(self, calls: Sequence[InferCall], clock: Clock) -> tuple[list[Any], bool]:
        """clock: that of the calls' deadlines."""
        return await infer_together(self._stub, calls, clock)

    def translate(self, error: grpc.aio.AioRpcError, model: str) -> NearloopError:
        code, details = error.code(), error.details() or ""
        if code in BUSY_OR_GONE:
            self._look.set()  # is it the server, the model, or only its queue?
            self._pauses.setdefault(model, Pause()).refused(self.clock.now_s(), self._random())
            return NotTaken(f"Triton at {self.address} cannot take work for model {model} now ({code.name})")
        if lost_process(error):
            self._lose(model)
            return self.no_process(model)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Expired(f"model {model} did not answer before the deadline")
        if code is grpc.StatusCode.INVALID_ARGUMENT:
            return StepFailed(text(model, details), code=code.name, reason="MODEL_REFUSED_INPUT")
        return StepFailed(text(model, details), code=code.name, reason="MODEL_FAILED")

    def _taken(self, model: str, output: Payload) -> Payload:
        if self._pauses:
            self._pauses.pop(model, None)
        return output

    # ---- models without a process ----------------------------------------------------------------------------------------------

    def _lose(self, model: str) -> None:
        lost = self.lost.get(model)
        if lost is None:
            log.warning("%s; but for one step now and then that tries it gets no work", self.no_process(model).message)
            lost = self.lost[model] = LostProcess()
        lost.failed(self.clock.now_s(), self._random())

    def _found(self, model: str) -> None:
        if self.lost.pop(model, None) is not None:
            log.info("model %s has a process again in Triton at %s", model, self.address)

    def no_process(self, model: str) -> NotTaken:
        return NotTaken(f"model {model} has lost its process in Triton at {self.address}")

    # ---- readiness -----------------------------------------------------------------------------------------------------------

    async def refresh(self) -> None:
        """Raises Unavailable."""
        assert self._catalogue is not None
        try:
            ready = await self._stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=CALL_TIMEOUT_S)
            if not ready.ready:
                raise Unavailable(f"Triton at {self.address} is not ready: it still loads a model, or failed to")
            self.served = await self._catalogue.read(self.served)
        except grpc.aio.AioRpcError as error:
            self._went_away()
            raise Unavailable(f"Triton at {self.address} does not answer ({error.code().name})") from None
        except Unavailable:
            self._went_away()
            raise
        self.up = True
        self._changed()

    def _went_away(self) -> None:
        self.up = False
        self.lost.clear()  # a server that starts again starts all its processes
        self._changed()

    async def keep_fresh(self) -> None:
        """Looks about every second, and soon after a step that it did not take."""
        was_up = self.up
        while True:
            await self._until_next_look()
            try:
                await self.refresh()
            except Unavailable as error:
                if was_up:
                    log.warning("%s; %s", error.message, WITHOUT_IT)
                was_up = False
            else:
                if not was_up:
                    log.info("Triton at %s is back", self.address)
                was_up = True

    async def _until_next_look(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(REFRESH_S * (0.75 + self._random() / 2)):
                await self._look.wait()
                await asyncio.sleep(LOOK_WITHIN_S * self._random())
        self._look.clear()
