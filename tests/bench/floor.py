"""The floor: grpc.aio -> JetStream work queue -> pull worker -> reply, written plainly with nats-py and without any policy.

It serves the same method and the same messages as Nearloop, so that the load generator cannot tell them apart. It has no limits,
no deadlines, no retries, no tracing, and a result that is lost is lost. `--commit` adds the one thing that makes results
durable, as Nearloop's are: the worker stores the result by compare-and-set before it replies.
"""

import argparse
import asyncio

import grpc
import nats
import uvloop
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import RetentionPolicy, StorageType, StreamConfig
from nats.nuid import NUID

from nearloop.v1 import gateway_pb2

STEPS_STREAM, STEPS_SUBJECT = "FLOOR_STEPS", "floor.steps"
RESULTS_STREAM, RESULTS_SUBJECT = "FLOOR_RESULTS", "floor.result"
BATCH = 64
FETCH_TIMEOUT_S = 1.0
RESULT_KEEP_S = 300.0


async def connect(url: str) -> tuple[Client, JetStreamContext]:
    client = await nats.connect(url)
    context = client.jetstream()
    await context.add_stream(
        StreamConfig(name=STEPS_STREAM, subjects=[STEPS_SUBJECT], retention=RetentionPolicy.WORK_QUEUE, storage=StorageType.FILE)
    )
    await context.add_stream(
        StreamConfig(name=RESULTS_STREAM, subjects=[f"{RESULTS_SUBJECT}.*"], storage=StorageType.FILE, max_age=RESULT_KEEP_S)
    )
    return client, context


class FloorGateway:
    def __init__(self, client: Client, context: JetStreamContext) -> None:
        self.context = context
        self.inbox = client.new_inbox()
        self.ids = NUID()
        self.waiting: dict[str, asyncio.Future[bytes]] = {}

    async def on_reply(self, message: Msg) -> None:
        future = self.waiting.get(message.subject.rpartition(".")[2])
        if future is not None and not future.done():
            future.set_result(message.data)

    async def execute(
        self,
        request: gateway_pb2.ExecuteRequest,
        context: grpc.aio.ServicerContext[gateway_pb2.ExecuteRequest, gateway_pb2.ExecuteResponse],
    ) -> gateway_pb2.ExecuteResponse:
        step_id = self.ids.next().decode()
        future = self.waiting[step_id] = asyncio.get_running_loop().create_future()
        try:
            headers = {"Reply-To": f"{self.inbox}.{step_id}", "Step-Id": step_id}
            await self.context.publish(STEPS_SUBJECT, request.step.input.content.data, headers=headers)
            data = await future
        finally:
            del self.waiting[step_id]
        content = gateway_pb2.Content(content_type="application/json", data=data)
        return gateway_pb2.ExecuteResponse(
            result=gateway_pb2.Result(step_id=step_id, output=gateway_pb2.Payload(content=content), attempt=1)
        )


async def run_gateway(url: str, port: int) -> None:
    client, context = await connect(url)
    gateway = FloorGateway(client, context)
    await client.subscribe(f"{gateway.inbox}.*", cb=gateway.on_reply)
    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(
        gateway.execute,
        request_deserializer=gateway_pb2.ExecuteRequest.FromString,
        response_serializer=gateway_pb2.ExecuteResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("nearloop.v1.Gateway", {"Execute": handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


async def run_worker(url: str, commit: bool) -> None:
    client, context = await connect(url)

    async def handle(message: Msg) -> None:
        headers = message.headers or {}
        if commit:
            subject = f"{RESULTS_SUBJECT}.{headers['Step-Id']}"
            await context.publish(subject, message.data, headers={"Nats-Expected-Last-Subject-Sequence": "0"})
        await client.publish(headers["Reply-To"], message.data)
        await message.ack()

    queue = await context.pull_subscribe(STEPS_SUBJECT, durable="worker", stream=STEPS_STREAM)
    tasks: set[asyncio.Task[None]] = set()
    while True:
        try:
            messages = await queue.fetch(BATCH, timeout=FETCH_TIMEOUT_S)
        except TimeoutError:  # the library's own, and the plain one that it raises under load
            continue
        for message in messages:
            task = asyncio.create_task(handle(message))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["gateway", "worker"])
    parser.add_argument("--nats", required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--commit", action="store_true")
    arguments = parser.parse_args()
    if arguments.role == "gateway":
        uvloop.run(run_gateway(arguments.nats, arguments.port))
    else:
        uvloop.run(run_worker(arguments.nats, arguments.commit))
