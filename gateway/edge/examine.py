"""What the outside parts say about themselves, for `nearloop doctor`. Every function answers in seconds and raises what went wrong."""

import asyncio
import json
import ssl
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import grpc.aio
import nats
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from gateway.config import NatsSection
from gateway.edge import probes

_TIMEOUT_S = 2.0
_SERVICES_WITHIN_S = 0.4


@dataclass(frozen=True, slots=True)
class NatsReport:
    """streams: name -> messages, bytes, consumers. services: name -> (instances, version). skew_s: its clock minus ours."""

    version: str
    jetstream: bool
    max_payload_bytes: int
    max_storage_bytes: int  # -1: no limit
    streams: dict[str, tuple[int, int, int]]
    services: dict[str, tuple[int, str]]
    skew_s: float | None


async def examine_nats(settings: NatsSection, urls: tuple[str, ...]) -> NatsReport:
    """Raises OSError, TimeoutError or an error of nats-py."""
    options: dict[str, Any] = {}
    if settings.credentials:
        options["user_credentials"] = settings.credentials
    if settings.tls_ca:
        options["tls"] = ssl.create_default_context(cafile=settings.tls_ca)
    failures: list[Exception] = []

    async def remember(error: Exception) -> None:
        failures.append(error)

    try:
        client = await nats.connect(
            list(urls), allow_reconnect=False, connect_timeout=2, max_reconnect_attempts=1, error_cb=remember, **options
        )
    except nats.errors.NoServersError:
        raise (failures[-1] if failures else OSError("no server answers")) from None
    try:
        info = client._server_info
        jetstream = bool(info.get("jetstream"))
        account: dict[str, Any] = json.loads((await client.request("$JS.API.INFO", timeout=_TIMEOUT_S)).data) if jetstream else {}
        listing: dict[str, Any] = json.loads((await client.request("$JS.API.STREAM.LIST", timeout=_TIMEOUT_S)).data) if jetstream else {}
        streams = listing.get("streams") or []
        now = datetime.now(UTC)
        return NatsReport(
            version=str(info.get("version", "?")),
            jetstream=jetstream,
            max_payload_bytes=int(info.get("max_payload", 0)),
            max_storage_bytes=int(account.get("limits", {}).get("max_storage", -1)),
            streams={
                stream["config"]["name"]: (stream["state"]["messages"], stream["state"]["bytes"], stream["state"]["consumer_count"])
                for stream in streams
            },
            services=await _services(client),
            skew_s=(datetime.fromisoformat(streams[0]["ts"]) - now).total_seconds() if streams else None,
        )
    finally:
        await client.close()


async def _services(client: Any) -> dict[str, tuple[int, str]]:
    """Who answers the NATS micro protocol. Nobody knows how many will, so it waits a moment."""
    found: dict[str, tuple[int, str]] = {}

    async def note(message: Any) -> None:
        answer = json.loads(message.data)
        name = str(answer.get("name", "?"))
        found[name] = (found.get(name, (0, ""))[0] + 1, str(answer.get("version", "?")))

    inbox = client.new_inbox()
    await client.subscribe(inbox, cb=note)
    await client.publish("$SRV.PING", reply=inbox)
    await asyncio.sleep(_SERVICES_WITHIN_S)
    return found


async def js_ack_fc_v2(monitoring_url: str) -> bool | None:
    """Whether the server at this monitoring address has the setting on; None when it does not say."""

    def ask() -> bool | None:
        with urllib.request.urlopen(f"{monitoring_url}/varz", timeout=_TIMEOUT_S) as answer:
            flag = json.load(answer).get("feature_flags", {}).get("js_ack_fc_v2")
        return flag if isinstance(flag, bool) else None

    return await asyncio.to_thread(ask)


@dataclass(frozen=True, slots=True)
class TritonReport:
    """models: name -> (state, reason)."""

    version: str
    ready: bool
    models: dict[str, tuple[str, str]]


async def examine_triton(address: str) -> TritonReport:
    """Raises grpc.aio.AioRpcError."""
    from tritonclient.grpc import service_pb2, service_pb2_grpc

    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        server = await stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=_TIMEOUT_S)
        ready = await stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=_TIMEOUT_S)
        index = await stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=_TIMEOUT_S)
    models = {model.name: (model.state or "not loaded", model.reason) for model in index.models}
    return TritonReport(server.version, bool(ready.ready), models)


@dataclass(frozen=True, slots=True)
class GatewayReport:
    serving: bool
    services: tuple[str, ...]  # by reflection; empty when it is off


async def examine_gateway(address: str) -> GatewayReport:
    """Raises grpc.aio.AioRpcError when nothing answers there."""
    serving = await probes.grpc_serving(address)
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(timeout=_TIMEOUT_S)
        try:
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            answer = await call.read()
            names = tuple(service.name for service in answer.list_services_response.service)
        except (grpc.aio.AioRpcError, AttributeError):
            names = ()
        finally:
            call.cancel()
    return GatewayReport(serving, names)
