"""One session: many steps on one stream, as many as it has credits for, each answered exactly once.

One task reads, one writes, and each step in flight has one. A step is outstanding from being taken until its answer was written, so a
reader that stalls gets no new credits, and no more than its window of answers waits for it.
"""

import asyncio
from collections import deque
from collections.abc import Iterable
from contextlib import aclosing
from functools import partial
from typing import NamedTuple, Protocol

import grpc

from gateway.edge import convert
from gateway.edge.intake import Intake
from gateway.edge.refusals import Load, Stalled, as_ours, parse
from gateway.edge.session_values import failure_to_proto
from gateway.errors import Cancelled, InvalidStep, NearloopError, Rejected, Unavailable
from gateway.ports import StepService
from gateway.types import Completed, Step
from nearloop.v1 import gateway_pb2 as pb

Context = grpc.aio.ServicerContext[bytes, bytes]
MAX_OVERDRAWN = 1000  # steps beyond the credits that are told so; each step within them forgives one. Then the session ends


class Pool(Protocol):
    """What a session needs of the others."""

    def window(self, session: "Session") -> int:
        """How many steps the session may have outstanding."""
        ...

    def hold(self, session: "Session", change: int) -> None:
        """The session holds so many more credits."""
        ...

    def active(self, session: "Session") -> None:
        """The session uses its credits."""
        ...


class _Out(NamedTuple):
    """A response that waits to be written. answers: it ends a step that has a credit."""

    message: pb.SessionResponse
    answers: bool = False
    written: "asyncio.Future[None] | None" = None


class Session:
    """Counters are since the session began: credits `granted`, those the client was `told` of, steps `taken`, answers `written`."""

    def __init__(
        self,
        tenant: str,
        context: Context,
        metadata: Iterable[tuple[str, str | bytes]],
        service: StepService,
        intake: Intake,
        load: Load,
        pool: Pool,
    ) -> None:
        self.tenant = tenant
        self.granted = self.told = self.taken = self.written = 0
        self.write_began_s: float | None = None  # by the loop's clock, while one is pending
        self.active_s, self.counts = 0.0, True  # kept by the pool: when it took its last step, and whether its credits count
        self._context, self._metadata = context, metadata
        self._service, self._intake, self._load, self._pool = service, intake, load, pool
        self._last_tag = self._overdrawn = 0
        self._running: dict[int, asyncio.Task[Completed]] = {}
        self._out: deque[_Out] = deque()
        self._wake = asyncio.Event()
        self._closing = False
        self._error: Exception | None = None
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def outstanding(self) -> int:
        return self.taken - self.written

    @property
    def left(self) -> int:
        """Credits that the client knows of and has not used."""
        return self.told - self.taken

    @property
    def held(self) -> int:
        """Credits that are not used yet, or by steps that are outstanding."""
        return self.granted - self.written

    async def run(self) -> None:
        """Returns when the client has ended its requests and has all answers. Raises what ended the session otherwise."""
        self.renew()
        tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._write())]
        for task in tasks:
            task.add_done_callback(self._failed)
        try:
            await self._over
        finally:
            ending: list[asyncio.Task[None] | asyncio.Task[Completed]] = [*tasks, *self._running.values()]
            for one in ending:
                one.cancel()
            await asyncio.gather(*ending, return_exceptions=True)
            self._load.count -= self.outstanding
        if self._error is not None:
            raise self._error

    def close(self, error: Exception | None) -> None:
        """No more credits and steps; what is in flight is answered, then the session ends with the error."""
        if not self._closing:
            self._closing, self._error = True, error
            self._end_if_done()

    def stalled(self, after_s: float) -> None:
        """The reader has taken nothing for so long that the session is given up."""
        if not self._over.done():
            self._over.set_exception(Stalled(after_s))

    # ---- credits ---------------------------------------------------------------------------------------------------------------

    def renew(self) -> None:
        """Grants what the window allows; what was granted is never taken back."""
        if self._closing:
            return
        granted = self.written + self._pool.window(self)
        if granted > self.granted:
            self._pool.hold(self, granted - self.granted)
            self.granted = granted
        if self._is_news():
            self._wake.set()

    def _is_news(self) -> bool:
        """Worth a message of its own: the client has fewer credits left than it would be told of. Otherwise the next answer tells it."""
        return not self._closing and self.granted - self.told > self.left

    # ---- requests --------------------------------------------------------------------------------------------------------------

    async def _read(self) -> None:
        while isinstance(raw := await self._context.read(), bytes):  # else it is EOF
            try:
                self._take(parse(pb.SessionRequest, raw))
            except NearloopError as error:
                return self.close(error)
        return self.close(None)

    def _take(self, request: pb.SessionRequest) -> None:
        """Raises what ends the session: InvalidStep for a request that is no use, Rejected for a client that ignores its credits."""
        which = request.WhichOneof("value")
        if which == "step":
            self._take_step(request.step)
        elif which == "cancel":
            if task := self._running.get(request.cancel.tag):
                task.cancel()
        else:
            raise InvalidStep([("request", "has neither a step nor a cancel")], reason="MALFORMED_REQUEST")

    def _take_step(self, request: pb.SessionStep) -> None:
        tag = request.tag
        if tag <= self._last_tag:
            raise InvalidStep([("step.tag", f"{tag} is not larger than {self._last_tag}, the tag before it")], reason="WRONG_TAG")
        self._last_tag = tag
        if self.taken >= self.told:
            return self._overdraw(tag)
        self._overdrawn = max(0, self._overdrawn - 1)
        self.taken += 1
        self._load.count += 1
        self._pool.active(self)
        try:
            if self._closing:
                raise Unavailable("this gateway drains and did not take the step", reason="NOT_STORED", retry_after_s=0.0)
            self._load.check()
            step = self._intake.step(request.step, self.tenant, self._metadata, None, stream=request.events)
            as_struct = request.step.input.HasField("json")
        except Exception as error:
            return self._fail(tag, error)
        execute = self._stream(tag, step, as_struct) if request.events else self._service.execute(step)
        task = self._running[tag] = asyncio.create_task(execute)
        task.add_done_callback(partial(self._done, tag, as_struct))
        if self.left == 0 and self.granted == self.told:
            self.renew()
        elif self._is_news():
            self._wake.set()
        return None

    def _overdraw(self, tag: int) -> None:
        self._overdrawn += 1
        if self._overdrawn > MAX_OVERDRAWN:
            raise Rejected("the client goes on sending steps that it has no credits for", reason="CREDITS_EXCEEDED", scope="session")
        message = f"the session had {self.told} credits and all were used: the step was not executed"
        self._fail(tag, Rejected(message, reason="CREDITS_EXCEEDED", scope="session"), answers=False)

    # ---- steps -----------------------------------------------------------------------------------------------------------------

    async def _stream(self, tag: int, step: Step, as_struct: bool) -> Completed:
        """Sends events as the reader takes them: one of each step waits, the others stay where they come from."""
        async with aclosing(self._service.stream(step)) as items:
            async for item in items:
                if isinstance(item, Completed):
                    return item
                event = convert.event_to_proto(item, item.sequence, as_struct)
                if event is not None:
                    written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._put(_Out(pb.SessionResponse(event=pb.SessionEvent(tag=tag, event=event)), written=written))
                    await written
        raise Unavailable("the events ended without a result")

    def _done(self, tag: int, as_struct: bool, task: "asyncio.Task[Completed]") -> None:
        del self._running[tag]
        if task.cancelled():
            self._fail(tag, Cancelled("cancelled by the client"))
        elif error := task.exception():
            self._fail(tag, error)
        else:
            done = task.result()
            result = pb.SessionResult(tag=tag, result=convert.result_to_proto(done.result, done.timing, as_struct))
            self._put(_Out(pb.SessionResponse(result=result), answers=True))

    def _fail(self, tag: int, error: BaseException, *, answers: bool = True) -> None:
        if self._over.done():  # nobody reads it
            return
        self._put(_Out(pb.SessionResponse(failure=failure_to_proto(tag, as_ours(error, "Session"))), answers))

    # ---- responses -------------------------------------------------------------------------------------------------------------

    def _put(self, out: _Out) -> None:
        self._out.append(out)
        self._wake.set()

    async def _write(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            while not self._out and not self._is_news():
                self._wake.clear()
                await self._wake.wait()
            out = self._out.popleft() if self._out else _Out(pb.SessionResponse())
            if self.granted > self.told and not self._closing:
                out.message.credits = self.told = self.granted  # before it is written: the client may answer at once
            self.write_began_s = loop.time()
            await self._context.write(out.message.SerializeToString())
            self.write_began_s = None
            if out.answers:
                self.written += 1
                self._load.count -= 1
                self._pool.hold(self, -1)
                self.renew()
            if out.written is not None and not out.written.done():
                out.written.set_result(None)
            self._end_if_done()

    def _end_if_done(self) -> None:
        writing = self.write_began_s is not None
        if self._closing and not (self.outstanding or self._out or writing or self._over.done()):
            self._over.set_result(None)

    def _failed(self, task: "asyncio.Task[None]") -> None:
        """Reading or writing failed: the connection is gone."""
        if not task.cancelled() and (error := task.exception()) and not self._over.done():
            self._over.set_exception(error)
