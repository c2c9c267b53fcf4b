"""The gRPC server of a gateway: the Gateway service with health checking, reflection and channelz, on one port.

channelz tells every caller the addresses of all others, without a key: it is there only when gateway.listen is a loopback address. A
proxy on this machine that lets others in must not pass `grpc.channelz.v1.Channelz` on.
"""

import errno
import ipaddress
import socket
from collections.abc import Callable
from typing import Any

import grpc
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from gateway.clock import Clock
from gateway.config import Config
from gateway.edge.channelz import Channelz
from gateway.edge.health import Health
from gateway.edge.intake import random_id
from gateway.edge.run_servicer import RunServicer
from gateway.edge.servicer import GatewayServicer
from gateway.errors import ConfigError
from gateway.ports import RunService, StepService
from nearloop.v1 import gateway_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["Gateway"].full_name
# Calls beyond gateway.max_in_flight get a rich answer from the servicer, and health checks still get through; gRPC's own limit, whose
# answer has no details, is for a flood above that.
FLOOD_HEADROOM = 1024
# Inputs up to twice the limit are read, so that the answer can name the field and the limit; gRPC itself refuses larger messages.
MESSAGE_HEADROOM_BYTES = 64 * 1024


class Ingress:
    """runs: who takes runs; without one the RPCs for them answer UNIMPLEMENTED."""

    def __init__(
        self,
        config: Config,
        service: StepService,
        clock: Clock,
        new_id: Callable[[], str] = random_id,
        runs: RunService | None = None,
    ) -> None:
        self._listen = config.gateway.listen
        self._health = Health()
        self._servicer = GatewayServicer(config, service, clock, new_id)
        self._runs = RunServicer(config, service, runs, clock, self._servicer.load)
        self._limit = config.gateway.max_in_flight + config.gateway.max_sessions + FLOOD_HEADROOM
        self._options = server_options(config.gateway.max_input_bytes)
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Serves, with health NOT_SERVING; returns the bound port. Raises ConfigError when the address cannot be had."""
        port = self._listen.rpartition(":")[2]
        if not (port.isascii() and port.isdigit() and int(port) < 65536):  # gRPC takes 99999 for 34463
            raise ConfigError("gateway.listen", [f"{self._listen!r} is not an address: set gateway.listen to host:port"])
        server = grpc.aio.server(options=self._options, maximum_concurrent_rpcs=self._limit)
        handlers = self._servicer.handlers() | self._runs.handlers()
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        generic = _GenericOnly(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, generic)
        names = [SERVICE, _full_name(health_pb2, "Health"), reflection.SERVICE_NAME]
        if is_loopback(self._listen):
            channelz_pb2_grpc.add_ChannelzServicer_to_server(Channelz(), generic)
            names.append(_full_name(channelz_pb2, "Channelz"))
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(reflection.aio.ReflectionServicer(names), generic)
        try:
            bound = server.add_insecure_port(self._listen)
        except RuntimeError:
            bound = 0
        if bound == 0:
            raise ConfigError("gateway.listen", [_why_not(self._listen)])
        await server.start()
        self._server = server
        return bound

    def set_serving(self, serving: bool) -> None:
        """What health checks say from now on."""
        self._health.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        """Takes no new calls, lets those in flight end for grace_s seconds and cancels the rest. May be called twice."""
        self._health.close()
        self._servicer.drain()
        if self._server is not None:
            await self._server.stop(grace_s)
            await self._servicer.wait_ended()
            self._server = None


def is_loopback(listen: str) -> bool:
    """Can only this machine reach `host:port`? False for a name other than localhost: what it stands for can change."""
    host = listen.rpartition(":")[0].strip("[]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _full_name(module: Any, service: str) -> str:
    return str(module.DESCRIPTOR.services_by_name[service].full_name)


class _GenericOnly:
    """Lets generated code add its handlers without registering each method with core.

    For every call, grpc.aio waits anew on one future for each registered method, which cost a tenth of the throughput of small calls
    with the methods of these services. Generic handlers share one future.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: object) -> None:
        """Not needed: the generic handlers are the same ones."""


def server_options(max_input_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", 2 * max_input_bytes + MESSAGE_HEADROOM_BYTES),
        ("grpc.max_send_message_length", -1),
        # Two servers on one port would share its connections in silence.
        ("grpc.so_reuseport", 0),
        ("grpc.max_metadata_size", 8 * 1024),
        ("grpc.absolute_max_metadata_size", 16 * 1024),
        # Find dead clients; refuse clients that ping more often than every ten seconds.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.enable_channelz", 1),
    ]


def _why_not(listen: str) -> str:
    """One sentence. gRPC does not say why a bind failed, so the same address is tried with a plain socket."""
    host, _, port = listen.rpartition(":")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"{listen} is in use: stop what listens there or set gateway.listen"
        return f"{listen} cannot be listened on ({error.strerror}): set gateway.listen to an address of this machine, host:port"
    return f"{listen} cannot be listened on: set gateway.listen to another address, host:port"
