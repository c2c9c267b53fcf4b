"""A generic gRPC client that knows the address and nothing else: what it calls it has learned from the server."""

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from stack_support import running

from gateway import config

pytestmark = pytest.mark.stack

CONFIG = """
[gateway]
listen = "127.0.0.1:0"

[auth]
anonymous_tenant = "local"

[tools]
modules = ["workers.builtin_tools"]
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address() -> AsyncIterator[str]:
    async with running(config.loads(CONFIG, "reflection"), triton=False) as stack:
        yield stack.gateway_address


class Generic:
    """Finds services by reflection and calls them with JSON, as grpcurl does."""

    def __init__(self, address: str) -> None:
        self.channel = grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)])
        self.database = ProtoReflectionDescriptorDatabase(self.channel)
        self.pool = DescriptorPool(self.database)

    def method(self, service: str, name: str) -> MethodDescriptor:
        return self.pool.FindServiceByName(service).methods_by_name[name]

    def call(self, service: str, name: str, request: dict[str, Any]) -> dict[str, Any]:
        method = self.method(service, name)
        answer = GetMessageClass(method.output_type)
        stub: Any = self.channel.unary_unary(
            f"/{service}/{name}", request_serializer=lambda message: message.SerializeToString(), response_deserializer=answer.FromString
        )
        message = json_format.ParseDict(request, GetMessageClass(method.input_type)())
        return json_format.MessageToDict(stub(message, timeout=10), descriptor_pool=self.pool)


@pytest.fixture
def generic(address: str) -> Any:
    client = Generic(address)
    yield client
    client.channel.close()


def test_services_are_listed(generic: Generic) -> None:
    assert set(generic.database.get_services()) == {
        "nearloop.v1.Gateway",
        "grpc.health.v1.Health",
        "grpc.channelz.v1.Channelz",
        "grpc.reflection.v1alpha.ServerReflection",
    }


def test_execute_is_found_and_called(generic: Generic) -> None:
    assert not generic.method("nearloop.v1.Gateway", "Execute").server_streaming
    assert generic.method("nearloop.v1.Gateway", "ExecuteStream").server_streaming
    step = {"kind": "KIND_TOOL", "target": "echo", "input": {"json": {"hello": "world", "n": 1.5}}}
    result = generic.call("nearloop.v1.Gateway", "Execute", {"step": step})["result"]
    assert result["output"] == {"json": {"hello": "world", "n": 1.5}}
    assert result["attempt"] == 1
    assert result["region"] == "home"
    assert int(result["timing"]["serviceUs"]) > 0


def test_targets_are_listed(generic: Generic) -> None:
    targets = generic.call("nearloop.v1.Gateway", "ListTargets", {})["targets"]
    assert [(target["kind"], target["name"], target["liveRegions"]) for target in targets] == [("KIND_TOOL", "echo", ["home"])]


@pytest.mark.parametrize("service", ["", "nearloop.v1.Gateway"])
def test_health_says_serving(generic: Generic, service: str) -> None:
    assert generic.call("grpc.health.v1.Health", "Check", {"service": service}) == {"status": "SERVING"}


def test_channelz_answers(generic: Generic) -> None:
    servers = generic.call("grpc.channelz.v1.Channelz", "GetServers", {})["server"]
    assert int(servers[0]["data"]["callsStarted"]) >= 1


def test_an_error_has_details_that_a_generic_client_can_read(generic: Generic) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        generic.call("nearloop.v1.Gateway", "Execute", {"step": {"kind": "KIND_TOOL", "target": "ecko", "input": {"json": {}}}})
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert "did you mean 'echo'" in (caught.value.details() or "")
    assert "grpc-status-details-bin" in [item.key for item in caught.value.trailing_metadata() or ()]
