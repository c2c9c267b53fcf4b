"""Streams that go on where they were, at the next gateway, when the one that has them is gone."""

import asyncio
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeVar

from gateway.client_retry import RetryPolicy, may_retry
from gateway.edge.dial import CONNECT_TIMEOUT_S, Gateways
from gateway.errors import NearloopError
from nearloop.v1 import gateway_pb2 as pb

if TYPE_CHECKING:
    from nearloop.v1.gateway_pb2_grpc import GatewayAsyncStub

E = TypeVar("E", pb.Event, pb.RunEvent)


async def resumed(
    gateways: Gateways,
    retries: RetryPolicy,
    watch: "Callable[[GatewayAsyncStub, int, int, float | None], AsyncGenerator[E, None]]",
    attempt: int = 0,
    after_sequence: int = 0,
    deadline_s: float | None = None,
) -> AsyncGenerator[E, None]:
    """Events after that position, each once, up to the result. deadline_s is by the loop's clock.

    watch(stub, attempt, after_sequence, timeout_s) opens a stream. Raises the error that the work ended with, Expired after the deadline,
    other NearloopErrors.
    """
    now_s = asyncio.get_running_loop().time
    failures, index = 0, gateways.current
    while True:
        left_s = None if deadline_s is None else max(0.001, deadline_s - now_s())
        try:
            stub = await gateways.stub(index, CONNECT_TIMEOUT_S if left_s is None else left_s)
            async with aclosing(watch(stub, attempt, after_sequence, left_s)) as events:
                async for event in events:
                    failures = 0
                    if event.HasField("result"):
                        yield event
                        return
                    if (event.attempt, event.sequence) > (attempt, after_sequence):
                        attempt, after_sequence = event.attempt, event.sequence
                        yield event
        except NearloopError as error:
            if not may_retry(error, repeatable=True):
                raise
            failures, index = failures + 1, gateways.after(index, error)
            wait_s = retries.wait_s(failures, error, random.random)
            if deadline_s is not None and now_s() + wait_s >= deadline_s:
                raise
            await asyncio.sleep(wait_s)
