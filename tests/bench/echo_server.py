"""A bare grpc.aio server that answers with the request's bytes: what gRPC and Python alone cost on this machine.

A request that starts with HOLD is never answered.
"""

import argparse
import asyncio

import grpc
import uvloop

METHOD = "/bench.Echo/Echo"
HOLD = b"hold"


async def echo(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
    if request.startswith(HOLD):
        await asyncio.get_running_loop().create_future()
    return request


async def serve(port: int) -> None:
    server = grpc.aio.server()
    service, method = METHOD.lstrip("/").split("/")
    handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(echo)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    uvloop.run(serve(parser.parse_args().port))
