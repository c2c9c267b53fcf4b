"""Is it there, and is it ready? Small questions to the outside parts, asked without their heavy clients."""

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

_TRITON_READY = "/inference.GRPCInferenceService/ServerReady"
_TRUE = b"\x08\x01"  # a message whose first field is the boolean true


async def nats_info(url: str, timeout_s: float = 2.0) -> dict[str, Any]:
    """What a nats-server says of itself when one connects: version, jetstream, max_payload, ... Raises OSError, TimeoutError.

    It listens only after JetStream has recovered, so a server that answers is ready.
    """
    parts = urlsplit(url if "://" in url else f"nats://{url}")
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 4222)
        try:
            line = await reader.readline()
        finally:
            writer.close()
    if not line.startswith(b"INFO "):
        raise OSError(f"{url} is no NATS server")
    info: dict[str, Any] = json.loads(line[5:])
    return info


async def nats_ready(url: str) -> bool:
    return bool((await nats_info(url)).get("jetstream"))


async def http_ready(url: str, timeout_s: float = 2.0) -> bool:
    """True when a GET is answered with a 2xx status. Raises OSError, TimeoutError."""
    parts = urlsplit(url)
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port or 80)
        try:
            writer.write(f"GET {parts.path or '/'} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
            status = (await reader.readline()).split()
        finally:
            writer.close()
    return len(status) > 1 and status[1].startswith(b"2")


def _channel(address: str) -> grpc.aio.Channel:
    # A pool of its own: a shared one would remember that the last attempt failed, and wait.
    return grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)])


async def triton_ready(address: str, timeout_s: float = 2.0) -> bool:
    """True when the server and all its models are ready. Raises grpc.aio.AioRpcError."""
    async with _channel(address) as channel:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_TRITON_READY)
        answer = await ask(b"", timeout=timeout_s)
        return answer == _TRUE


async def grpc_serving(address: str, timeout_s: float = 2.0) -> bool:
    """True when the standard health check answers SERVING. Raises grpc.aio.AioRpcError."""
    async with _channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
