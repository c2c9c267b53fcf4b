"""Connections from a client to gateways that are equal: which one is asked, is it there, and its errors as ours."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import grpc

from gateway.edge import status
from gateway.errors import NearloopError, Unavailable
from nearloop.v1 import gateway_pb2 as pb
from nearloop.v1.gateway_pb2_grpc import GatewayStub

if TYPE_CHECKING:
    from nearloop.v1.gateway_pb2_grpc import GatewayAsyncStub

UNREACHABLE = "GATEWAY_UNREACHABLE"
CONNECT_TIMEOUT_S = 5.0
CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    ("grpc.enable_http_proxy", 0),  # an http_proxy in the environment is for the web
    ("grpc.max_receive_message_length", -1),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 1_000),  # short, as a channel that waits to connect again fails calls at once
    ("grpc.max_metadata_size", 16 * 1024),
)
E = TypeVar("E", pb.Event, pb.RunEvent)
E_co = TypeVar("E_co", covariant=True)
_COMING = (grpc.ChannelConnectivity.IDLE, grpc.ChannelConnectivity.CONNECTING)


class EventAnswer(Protocol[E_co]):
    """ExecuteStreamResponse, WatchJobResponse, RunResponse and WatchRunResponse."""

    @property
    def event(self) -> E_co: ...


class EventCall(AsyncIterable[EventAnswer[E_co]], Protocol[E_co]):
    def cancel(self) -> bool: ...


class Gateways:
    """Channels to the gateways, opened when they are needed. `current` is the one that answered last."""

    def __init__(self, addresses: Sequence[str], tls: bool | grpc.ChannelCredentials) -> None:
        if not addresses:
            raise ValueError("address: at least one is needed")
        self._addresses = tuple(addresses)
        self._tls = grpc.ssl_channel_credentials() if tls is True else tls or None
        self._channels: dict[int, tuple[grpc.aio.Channel, GatewayAsyncStub]] = {}
        self.current = 0

    def __len__(self) -> int:
        return len(self._addresses)

    async def close(self) -> None:
        """Cancels what is in flight."""
        channels, self._channels = self._channels, {}
        for channel, _ in channels.values():
            await channel.close()

    def after(self, index: int, error: NearloopError) -> int:
        """The gateway to ask next: another one when this one is gone, else the same."""
        if isinstance(error, Unavailable):
            self.current = index = (index + 1) % len(self._addresses)
        return index

    async def stub(self, index: int, left_s: float) -> "GatewayAsyncStub":
        """The stub of a gateway that is connected; waits at most CONNECT_TIMEOUT_S for that.

        So a call that ends with UNAVAILABLE may have been received: what was certainly not sent has a reason of its own.
        Raises Unavailable, reason UNREACHABLE.
        """
        channel, stub = self._open(index)
        state = channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            return stub
        try:
            async with asyncio.timeout(min(CONNECT_TIMEOUT_S, left_s)):
                while state in _COMING:
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except TimeoutError:
            pass
        if state is grpc.ChannelConnectivity.READY:
            return stub
        raise Unavailable(f"no gateway answers at {self._addresses[index]}", reason=UNREACHABLE)

    def _open(self, index: int) -> "tuple[grpc.aio.Channel, GatewayAsyncStub]":
        if index not in self._channels:
            address = self._addresses[index]
            if self._tls is None:
                channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
            else:
                channel = grpc.aio.secure_channel(address, self._tls, options=CHANNEL_OPTIONS)
            self._channels[index] = channel, GatewayStub(channel)
        return self._channels[index]


async def read(call: EventCall[E]) -> AsyncGenerator[E, None]:
    """The events of a stream up to its result. Raises NearloopError; a stream that ends without one is a gateway that went away."""
    try:
        async for answer in call:
            yield answer.event
            if answer.event.HasField("result"):
                return
        raise Unavailable("the stream ended without a result", reason="STREAM_CUT")
    except grpc.aio.AioRpcError as error:
        raise translate(error) from None
    finally:
        call.cancel()  # an abandoned call is never collected


def translate(error: grpc.aio.AioRpcError) -> NearloopError:
    return status.from_status(error.code(), error.details() or "", error.trailing_metadata())
