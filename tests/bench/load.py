"""The load generator, a process of its own: reads jobs from stdin, one JSON object a line, and answers each with one line.

It is the same for every contestant: precomputed request bytes, one channel, `in_flight` coroutines that each call, wait for the
answer and call again (a closed loop). Jobs:

    try      one call, whose answer must hold the expected bytes
    measure  calls for warmup_s + seconds; throughput and latencies of the calls that ended in the last `seconds`
    warm     opens connections and calls over each for warmup_s seconds
    hold     opens `in_flight` more calls over these connections and leaves them open
    release  cancels them and says how many had ended before
"""

import asyncio
import base64
import gc
import json
import sys
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Any

import grpc
import uvloop

CALL_TIMEOUT_S = 30.0  # for every contestant: no call may hang the run
HOLD_TIMEOUT_S = 120.0
HOLD_CHANNELS = 8  # servers may bound the calls of a channel
WARM_CALLS = 8  # at once over each of these
Call = Callable[[], Awaitable[bytes]]
Close = Callable[[], Awaitable[None]]


def connect(job: dict[str, Any]) -> grpc.aio.Channel:
    # A pool of its own, or channels to the same address would share one connection.
    return grpc.aio.insecure_channel(job["address"], options=[("grpc.use_local_subchannel_pool", 1)])


def caller(job: dict[str, Any], channel: grpc.aio.Channel, timeout_s: float) -> Call:
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(job["method"])
    request = base64.b64decode(job["request"])

    async def once() -> bytes:
        return await call(request, timeout=timeout_s)

    return once


def open_tritonclient(job: dict[str, Any]) -> tuple[Call, Close]:
    """As a user of tritonclient calls a model: the inputs are made once, the request by the library in every call."""
    import numpy as np
    from tritonclient.grpc import InferInput
    from tritonclient.grpc.aio import InferenceServerClient

    client = InferenceServerClient(job["address"])
    tensor = InferInput("json", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[base64.b64decode(job["expect"])]], dtype=np.object_))

    async def once() -> bytes:
        answer = await client.infer("echo", [tensor], client_timeout=CALL_TIMEOUT_S)
        element: bytes = answer.as_numpy("json")[0, 0]
        return element

    return once, client.close


def opened(job: dict[str, Any]) -> tuple[Call, Close]:
    if job["client"] == "tritonclient":
        return open_tritonclient(job)
    channel = connect(job)
    return caller(job, channel, CALL_TIMEOUT_S), channel.close


def reason(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return reason(error.exceptions[0])
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"


async def try_once(job: dict[str, Any]) -> dict[str, Any]:
    call, close = opened(job)
    try:
        answer = await call()
    finally:
        await close()
    if base64.b64decode(job["expect"]) not in answer:
        raise ValueError("the answer does not hold what was sent")
    return {}


async def measure(job: dict[str, Any]) -> dict[str, Any]:
    call, close = opened(job)
    latencies: list[float] = []
    calls = 0
    try:
        await call()  # the connection is not part of anybody's latency
        gc.collect()
        gc.disable()  # the collector's pauses here would count as a contestant's latency
        start = perf_counter() + job["warmup_s"]
        end = start + job["seconds"]

        async def loop() -> None:
            nonlocal calls
            while (began := perf_counter()) < end:
                await call()
                calls += 1
                ended = perf_counter()
                if start <= ended < end:
                    latencies.append(ended - began)

        async with asyncio.TaskGroup() as group:
            for _ in range(job["in_flight"]):
                group.create_task(loop())
    finally:
        gc.enable()
        await close()
    if not latencies:
        raise TimeoutError("no call ended within the measured time")
    latencies.sort()
    return {
        "per_s": len(latencies) / job["seconds"],
        "p50_ms": 1000 * latencies[len(latencies) // 2],
        "p99_ms": 1000 * latencies[min(len(latencies) - 1, len(latencies) * 99 // 100)],
        "calls": calls,
    }


class Hold:
    """Connections with calls that stay open."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.channels = [connect(job) for _ in range(HOLD_CHANNELS)]
        self.tasks: list[asyncio.Future[bytes]] = []

    async def warm(self, job: dict[str, Any]) -> None:
        end = perf_counter() + job["warmup_s"]

        async def loop(call: Call) -> None:
            while perf_counter() < end:
                await call()

        async with asyncio.TaskGroup() as group:
            for channel in self.channels * WARM_CALLS:
                group.create_task(loop(caller(job, channel, CALL_TIMEOUT_S)))

    def add(self, job: dict[str, Any]) -> None:
        calls = [caller(job, channel, HOLD_TIMEOUT_S) for channel in self.channels]
        self.tasks += [asyncio.ensure_future(calls[n % HOLD_CHANNELS]()) for n in range(job["in_flight"])]

    async def release(self) -> dict[str, Any]:
        ended = [task for task in self.tasks if task.done()]
        errors = [error for task in ended if (error := task.exception()) is not None]
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for channel in self.channels:
            await channel.close()
        return {"ended_early": len(ended), "first_error": reason(errors[0]) if errors else ""}


async def main() -> None:
    held: Hold | None = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        job = json.loads(line)
        answer: dict[str, Any] = {}
        try:
            match job["do"]:
                case "try":
                    answer = await try_once(job)
                case "measure":
                    answer = await measure(job)
                case "warm":
                    held = Hold(job)
                    await held.warm(job)
                case "hold" if held is not None:
                    held.add(job)
                case "release" if held is not None:
                    answer, held = await held.release(), None
        except Exception as error:
            answer = {"error": reason(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(main())
