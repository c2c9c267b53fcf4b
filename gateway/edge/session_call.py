"""The client's end of a session's stream, with its errors as ours."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

import grpc

from gateway.edge.dial import translate
from gateway.errors import Unavailable
from nearloop.v1 import gateway_pb2 as pb

if TYPE_CHECKING:
    from nearloop.v1.gateway_pb2_grpc import GatewayAsyncStub


class SessionCall:
    """`first` is the first response, which has the first credits. Writing is for one task at a time, and so is reading."""

    def __init__(self, call: "grpc.aio.StreamStreamCall[pb.SessionRequest, pb.SessionResponse]") -> None:
        self._call = call
        self.first = pb.SessionResponse()

    @classmethod
    async def open(cls, stub: "GatewayAsyncStub", metadata: Sequence[tuple[str, str]], timeout_s: float) -> Self:
        """Returns once the gateway has taken the session. Raises AioRpcError, Unavailable when it says nothing for timeout_s."""
        made = cls(stub.Session(metadata=tuple(metadata)))
        try:
            async with asyncio.timeout(timeout_s):
                first = await made._call.read()
            if not isinstance(first, pb.SessionResponse):
                raise Unavailable("the gateway ended the session before it began", reason="NOT_STORED")
            made.first = first
        except TimeoutError:
            made.cancel()
            raise Unavailable(f"the gateway gave no credits within {timeout_s:g} s", reason="NOT_STORED") from None
        except BaseException:
            made.cancel()
            raise
        return made

    async def read(self) -> pb.SessionResponse | None:
        """None at the end. Raises NearloopError."""
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise translate(error) from None
        except asyncio.CancelledError:
            if self._call.cancelled():
                raise Unavailable("the connection was closed here", reason="CLOSED") from None
            raise
        return response if isinstance(response, pb.SessionResponse) else None

    async def write(self, request: pb.SessionRequest) -> bool:
        """False when the stream has ended; `read` says why."""
        try:
            await self._call.write(request)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return False
        return True

    async def done_writing(self) -> None:
        if not self._call.done():
            await self._call.done_writing()

    def cancel(self) -> None:
        """An abandoned call is never collected."""
        self._call.cancel()
