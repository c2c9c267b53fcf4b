"""How a client calls: attempts until one succeeds, on the gateway that is there, or until no more is sensible."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

import grpc

from gateway.client_pushback import Pushback
from gateway.client_retry import may_retry
from gateway.edge.dial import UNREACHABLE, Gateways, translate
from gateway.errors import NearloopError, Rejected

if TYPE_CHECKING:
    from nearloop.v1.gateway_pb2_grpc import GatewayAsyncStub

T = TypeVar("T")
THROTTLED = "CLIENT_THROTTLED"


class Calls:
    """The calls of one client."""

    def __init__(self, gateways: Gateways, pushback: Pushback) -> None:
        self._gateways = gateways
        self._pushback = pushback

    async def call(
        self, attempt: "Callable[[GatewayAsyncStub, float], Awaitable[T]]", repeatable: bool, timeout_s: float, scope: str = ""
    ) -> T:
        """Raises NearloopError: the last one, when no more is sensible; Rejected with reason THROTTLED when nothing was sent."""
        deadline_s, pushback = _now_s() + timeout_s, self._pushback
        if not pushback.begins(scope, _now_s()):
            raise Rejected(f"so many steps for {scope} were refused lately that this client did not send it", reason=THROTTLED, scope=scope)
        index, failures, unreachable = self._gateways.current, 0, 0
        while True:
            left_s = max(0.001, deadline_s - _now_s())
            try:
                answer = await attempt(await self._gateways.stub(index, left_s), left_s)
            except grpc.aio.AioRpcError as rpc_error:
                error = translate(rpc_error)
            except NearloopError as raised:
                error = raised
            else:
                pushback.answered(scope, None, _now_s())
                return answer
            if error.reason != UNREACHABLE:
                pushback.answered(scope, error, _now_s())
            if not may_retry(error, repeatable):
                raise error
            index = self._gateways.after(index, error)
            if error.reason == UNREACHABLE:
                unreachable += 1
                if unreachable < len(self._gateways):
                    continue  # nothing was sent: the next gateway may be asked at once, and that is no retry
                unreachable = 0
            failures += 1
            wait_s = pushback.wait_s(error, failures, repeatable, deadline_s - _now_s())
            if wait_s is None:
                raise error
            await asyncio.sleep(wait_s)
            if not pushback.lets(scope, _now_s()):
                raise error


def _now_s() -> float:
    return asyncio.get_running_loop().time()
