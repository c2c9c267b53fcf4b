"""The client's side of a session: many steps at once on one stream, none sent without a credit.

async with client.session() as session:
    results = await asyncio.gather(*(session.execute("tool", "echo", {"n": n}) for n in range(100)))
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from types import TracebackType
from typing import Self

from gateway.client_values import ClientResult, Input, event_from_proto, result_from_proto
from gateway.edge.session_call import SessionCall
from gateway.edge.session_values import failure_from_proto
from gateway.errors import Expired, InvalidStep, NearloopError, Unavailable
from gateway.types import Kind, Lane, StepEvent
from nearloop.v1 import gateway_pb2 as pb

GRACE_S = 0.5  # the gateway answers at the step's deadline; one that says nothing is not waited for much longer
MakeStep = Callable[[Kind | str, str, Input, Lane | str, str, str], pb.Step]
_LONGEST_S = 366 * 86_400.0  # of a step's time-out; the gateway takes less
_Item = StepEvent | ClientResult | NearloopError


class ClientSession:
    """Made by `NearloopClient.session`; use it with `async with`, whose normal end waits for what is in flight.

    It is one stream to one gateway. When that breaks, nothing is repeated or opened again silently: calls that wait for an answer raise
    Unavailable, and it is not known whether their steps were executed; calls that were not sent raise Unavailable with reason NOT_STORED.
    """

    def __init__(self, open_call: Callable[[], Awaitable[SessionCall]], make_step: MakeStep, timeout_s: float) -> None:
        self._open_call, self._make_step, self._timeout_s = open_call, make_step, timeout_s
        self._call: SessionCall | None = None
        self._credits = self._sent = self._last_tag = 0
        self._credit_waiters: deque[asyncio.Future[None]] = deque()
        self._pending: dict[int, Callable[[_Item], None]] = {}  # who gets what comes for a tag
        self._requests: deque[pb.SessionRequest] = deque()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False
        self._ended: NearloopError | None = None

    @property
    def credits(self) -> int:
        """Steps that could be sent now."""
        return self._credits - self._sent

    @property
    def in_flight(self) -> int:
        """Steps that were sent and are not answered."""
        return len(self._pending)

    async def __aenter__(self) -> Self:
        """Raises NearloopError when no gateway takes the session."""
        self._call = await self._open_call()
        self._on_response(self._call.first)
        self._tasks = [asyncio.create_task(self._read(self._call)), asyncio.create_task(self._write(self._call))]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closing = True
        self._wake.set()
        self._turn_away()
        try:
            if error is None:
                await asyncio.wait(self._tasks[:1])
        finally:
            if self._call is not None:
                self._call.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self._end(Unavailable("it was closed", reason="CLOSED"))

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
    ) -> ClientResult:
        """Waits for a credit, sends the step, and answers with its result. It is not repeated. Cancelling the caller cancels the step.

        Raises NearloopError; Expired with reason NO_CREDIT when there was no credit within timeout_s and nothing was sent.
        """
        answer: asyncio.Future[ClientResult] = asyncio.get_running_loop().create_future()

        def take(item: _Item) -> None:
            if answer.done():
                return
            if isinstance(item, ClientResult):
                answer.set_result(item)
            elif isinstance(item, NearloopError):
                answer.set_exception(item)

        step = self._make_step(kind, target, input, lane, run, idempotency_key)
        tag, deadline_s = await self._send(step, timeout_s, take, events=False)
        try:
            async with asyncio.timeout_at(deadline_s + GRACE_S):
                return await answer
        except TimeoutError:
            raise Expired("the gateway did not answer in time") from None
        finally:
            self._leave(tag)

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
    ) -> AsyncGenerator[StepEvent | ClientResult, None]:
        """As `execute`, with the step's events before its result. Close it (`aclosing`) to stop early. Raises NearloopError."""
        items: asyncio.Queue[_Item] = asyncio.Queue()
        step = self._make_step(kind, target, input, lane, run, idempotency_key)
        tag, deadline_s = await self._send(step, timeout_s, items.put_nowait, events=True)
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline_s + GRACE_S):
                        item = await items.get()
                except TimeoutError:
                    raise Expired("the gateway did not answer in time") from None
                if isinstance(item, NearloopError):
                    raise item
                yield item
                if isinstance(item, ClientResult):
                    return
        finally:
            self._leave(tag)

    # ---- sending ---------------------------------------------------------------------------------------------------------------

    async def _send(self, step: pb.Step, timeout_s: float | None, take: Callable[[_Item], None], events: bool) -> tuple[int, float]:
        """The tag and when the time of the step is over, by the loop's clock."""
        now_s = asyncio.get_running_loop().time
        deadline_s = now_s() + (self._timeout_s if timeout_s is None else timeout_s)
        if not 0 < deadline_s - now_s() < _LONGEST_S:
            raise InvalidStep([("timeout_s", f"must be positive and at most {_LONGEST_S:g}, not {timeout_s}")])
        await self._take_credit(deadline_s)
        if self._ended or self._closing:  # since the credit was given
            raise self._not_sent()
        if timeout_s is not None:
            step.timeout.FromNanoseconds(max(1, round((deadline_s - now_s()) * 1e9)))
        self._last_tag += 1
        self._pending[self._last_tag] = take
        self._request(pb.SessionRequest(step=pb.SessionStep(tag=self._last_tag, step=step, events=events)))
        return self._last_tag, deadline_s

    async def _take_credit(self, deadline_s: float) -> None:
        """First come, first served."""
        if self._ended or self._closing:
            raise self._not_sent()
        if self.credits > 0 and not self._credit_waiters:
            self._sent += 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._credit_waiters.append(waiter)
        try:
            async with asyncio.timeout_at(deadline_s):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled() and not waiter.exception():
                self._sent -= 1
                self._hand_out()
            if isinstance(error, TimeoutError):
                raise Expired("the session had no credit for the step in time: it was not sent", reason="NO_CREDIT") from None
            raise

    def _hand_out(self) -> None:
        while self._credit_waiters and self.credits > 0:
            waiter = self._credit_waiters.popleft()
            if not waiter.done():
                self._sent += 1
                waiter.set_result(None)

    def _leave(self, tag: int) -> None:
        """The caller goes; a step that is not answered yet is cancelled."""
        if self._pending.pop(tag, None) and not self._ended:
            self._request(pb.SessionRequest(cancel=pb.SessionCancel(tag=tag)))

    def _request(self, request: pb.SessionRequest) -> None:
        self._requests.append(request)
        self._wake.set()

    async def _write(self, call: SessionCall) -> None:
        while True:
            while not self._requests:
                if self._closing:
                    return await call.done_writing()
                self._wake.clear()
                await self._wake.wait()
            if not await call.write(self._requests.popleft()):
                return None

    # ---- receiving -------------------------------------------------------------------------------------------------------------

    async def _read(self, call: SessionCall) -> None:
        try:
            while (response := await call.read()) is not None:
                self._on_response(response)
            self._end(Unavailable("the gateway ended it", reason="SESSION_ENDED"))
        except NearloopError as error:
            self._end(error)

    def _on_response(self, response: pb.SessionResponse) -> None:
        if response.credits > self._credits:
            self._credits = response.credits
            self._hand_out()
        which = response.WhichOneof("value")
        if which == "result":
            self._answer(response.result.tag, result_from_proto(response.result.result))
        elif which == "failure":
            self._answer(response.failure.tag, failure_from_proto(response.failure))
        elif which == "event" and (take := self._pending.get(response.event.tag)):
            item = event_from_proto(response.event.event)
            if item is not None:
                take(item)

    def _answer(self, tag: int, item: _Item) -> None:
        take = self._pending.pop(tag, None)  # None: its caller has left
        if take is not None:
            take(item)

    def _end(self, error: NearloopError) -> None:
        if self._ended is not None:
            return
        self._ended = error
        pending, self._pending = self._pending, {}
        for take in pending.values():
            message = f"the session ended before the step was answered, whether it was executed is not known: {error.message}"
            take(Unavailable(message, reason=error.reason, retry_after_s=error.retry_after_s))
        self._turn_away()

    def _turn_away(self) -> None:
        """Those who wait for a credit."""
        while self._credit_waiters:
            waiter = self._credit_waiters.popleft()
            if not waiter.done():
                waiter.set_exception(self._not_sent())

    def _not_sent(self) -> Unavailable:
        why = self._ended.message if self._ended else "it is being closed"
        return Unavailable(f"the session has ended, the step was not sent: {why}", reason="NOT_STORED")
