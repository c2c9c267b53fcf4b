"""The standard grpc.channelz.v1 service: calls, channels and connections of this process, as grpcdebug shows them.

The servicer of grpcio-channelz is not used: it refuses its own core's answers as soon as they have a field that its proto lacks, and
GetSocket of grpcio 1.85 has one (`peerMaxConcurrentStreams`).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from google.protobuf import json_format
from google.protobuf.message import Message
from grpc._cython import cygrpc  # type: ignore[attr-defined]  # an extension module; grpcio-channelz asks it as well
from grpc_channelz.v1 import channelz_pb2 as pb
from grpc_channelz.v1 import channelz_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]
M = TypeVar("M", bound=Message)


class Channelz(channelz_pb2_grpc.ChannelzServicer):  # type: ignore[misc]  # the package has no types
    """Callers are not authenticated and see the addresses of all peers: for a server that only this machine can reach."""

    async def GetTopChannels(self, request: pb.GetTopChannelsRequest, context: Context) -> pb.GetTopChannelsResponse:
        return await _answer(context, pb.GetTopChannelsResponse(), cygrpc.channelz_get_top_channels, request.start_channel_id)

    async def GetServers(self, request: pb.GetServersRequest, context: Context) -> pb.GetServersResponse:
        return await _answer(context, pb.GetServersResponse(), cygrpc.channelz_get_servers, request.start_server_id)

    async def GetServer(self, request: pb.GetServerRequest, context: Context) -> pb.GetServerResponse:
        return await _answer(context, pb.GetServerResponse(), cygrpc.channelz_get_server, request.server_id)

    async def GetServerSockets(self, request: pb.GetServerSocketsRequest, context: Context) -> pb.GetServerSocketsResponse:
        page = request.server_id, request.start_socket_id, request.max_results
        return await _answer(context, pb.GetServerSocketsResponse(), cygrpc.channelz_get_server_sockets, *page)

    async def GetChannel(self, request: pb.GetChannelRequest, context: Context) -> pb.GetChannelResponse:
        return await _answer(context, pb.GetChannelResponse(), cygrpc.channelz_get_channel, request.channel_id)

    async def GetSubchannel(self, request: pb.GetSubchannelRequest, context: Context) -> pb.GetSubchannelResponse:
        return await _answer(context, pb.GetSubchannelResponse(), cygrpc.channelz_get_subchannel, request.subchannel_id)

    async def GetSocket(self, request: pb.GetSocketRequest, context: Context) -> pb.GetSocketResponse:
        return await _answer(context, pb.GetSocketResponse(), cygrpc.channelz_get_socket, request.socket_id)


async def _answer(context: Context, answer: M, ask: Callable[..., bytes], *numbers: int) -> M:
    """What core says in JSON, without fields that are newer than the proto. Ends the call with NOT_FOUND when core knows no such thing."""
    try:
        found = ask(*numbers)
    except ValueError as error:
        await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
    return json_format.Parse(found, answer, ignore_unknown_fields=True)
