"""The standard grpc.health.v1 service: readiness that can be set from anywhere on the loop.

The servicer of grpcio-health-checking is not used: when one of its watchers leaves, the others hear nothing any more, and a
watcher keeps a server from stopping until the grace period ends.
"""

import asyncio

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from nearloop.v1 import gateway_pb2 as pb

SERVICES = ("", pb.DESCRIPTOR.services_by_name["Gateway"].full_name)
_MAX_SHOWN_CHARS = 100
_Status = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # the package has no types
    """NOT_SERVING until it is told otherwise; the whole server and the Gateway service are always in the same state."""

    def __init__(self) -> None:
        self._serving = False
        self._closing = False
        self._watchers: set[asyncio.Event] = set()

    def set_serving(self, serving: bool) -> None:
        self._serving = serving
        self._notify()

    def close(self) -> None:
        """NOT_SERVING for good; the watchers are told, and their streams end."""
        self._closing = True
        self.set_serving(False)

    def _notify(self) -> None:
        for changed in self._watchers:
            changed.set()

    def _status(self, service: str) -> int:
        if service not in SERVICES:
            return int(_Status.SERVICE_UNKNOWN)
        return int(_Status.SERVING if self._serving else _Status.NOT_SERVING)

    async def Check(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in SERVICES:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {request.service[:_MAX_SHOWN_CHARS]!r}")
        return _Status(status=self._status(request.service))

    async def Watch(
        self,
        request: health_pb2.HealthCheckRequest,
        context: grpc.aio.ServicerContext[health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse],
    ) -> None:
        changed, told = asyncio.Event(), None
        self._watchers.add(changed)
        try:
            while True:
                changed.clear()
                status = self._status(request.service)
                if status != told:
                    await context.write(_Status(status=status))
                    told = status
                elif self._closing:
                    return
                else:
                    await changed.wait()
        finally:
            self._watchers.discard(changed)
