"""Who is measured: how each one's processes are started, and how the load generator calls it."""

import base64
import importlib.util
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from gateway import subjects
from gateway.addresses import free_port
from gateway.config import DEFAULT_POLICIES
from nearloop.v1 import gateway_pb2
from tests.bench import echo_server, floor
from tests.bench.parts import BenchError, LoadGenerator, Part, Parts
from workers import triton_aftermath, triton_server

EXECUTE = "/nearloop.v1.Gateway/Execute"
# About 100 bytes of JSON, as a small tool call has.
PAYLOAD = b'{"tool":"search_docs","query":"how do I join two paths?","limit":10,"run":"agent-0007","trace":"4f2a91c3"}'
READY_TIMEOUT_S = 60.0
RATE_PER_S = 1_000_000


@dataclass(frozen=True)
class Endpoint:
    """A contestant that runs. parts are the processes whose processor time its steps cost: gateway, worker, servers."""

    parts: tuple[Part, ...]
    address: str
    method: str
    request: bytes
    client: str = "grpc"  # or tritonclient
    nats_url: str = ""
    stream: str = ""  # where its steps wait
    held_request: bytes = b""  # one that is never answered; without it, the worker has to be suspended

    @property
    def job(self) -> dict[str, Any]:
        return {
            "address": self.address,
            "method": self.method,
            "client": self.client,
            "request": base64.b64encode(self.request).decode(),
            "expect": base64.b64encode(PAYLOAD).decode(),
        }

    @property
    def held_job(self) -> dict[str, Any]:
        return self.job | {"request": base64.b64encode(self.held_request or self.request).decode()}

    def explain(self, error: BenchError) -> BenchError:
        """The end of a process explains more than the call that failed because of it."""
        try:
            for part in self.parts:
                part.check()
        except BenchError as cause:
            return cause
        return error


class Site:
    """Where contestants are started."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts

    @cached_property
    def triton(self) -> tuple[Part, str]:
        """One Triton with the echo model, for everybody who needs it; the process and its gRPC address."""
        repository = self.parts.folder / "models"
        shutil.copytree(triton_server.MODEL_REPOSITORY / "echo", repository / "echo")
        ports = [free_port() for _ in range(3)]
        prefix = f"nlbench{ports[1]}"
        try:
            backends = triton_server.prepare(self.parts.folder / "triton")
            argv, env = triton_server.command(repository, backends, *ports, shm_prefix=prefix)
        except triton_server.TritonSetupError as error:
            raise BenchError(str(error)) from None
        self.parts.after_stop.append(lambda: triton_aftermath.remove_shared_memory(prefix))
        return self.parts.start("triton", argv, env), f"127.0.0.1:{ports[1]}"


def execute_request(kind: "gateway_pb2.Kind.ValueType", target: str) -> bytes:
    content = gateway_pb2.Content(content_type="application/json", data=PAYLOAD)
    step = gateway_pb2.Step(kind=kind, target=target, input=gateway_pb2.Payload(content=content))
    return gateway_pb2.ExecuteRequest(step=step).SerializeToString()


def start_echo(site: Site) -> Endpoint:
    port = free_port()
    server = site.parts.start_module("server", "tests.bench.echo_server", "--port", str(port))
    return Endpoint((server,), f"127.0.0.1:{port}", echo_server.METHOD, PAYLOAD, held_request=echo_server.HOLD + PAYLOAD)


def start_floor(site: Site, *, commit: bool = False) -> Endpoint:
    nats_server, url = site.parts.start_nats_server()
    port = free_port()
    gateway = site.parts.start_module("gateway", "tests.bench.floor", "gateway", "--nats", url, "--port", str(port))
    worker = site.parts.start_module("worker", "tests.bench.floor", "worker", "--nats", url, *(["--commit"] if commit else []))
    request = execute_request(gateway_pb2.KIND_TOOL, "echo")
    return Endpoint((gateway, worker, nats_server), f"127.0.0.1:{port}", EXECUTE, request, nats_url=url, stream=floor.STEPS_STREAM)


def start_triton(site: Site) -> Endpoint:
    triton, address = site.triton
    return Endpoint((triton,), address, "", PAYLOAD, client="tritonclient")


# Nobody is to be refused here, in a closed loop that asks for all that the machine can do: the policies decide about every step as always,
# with bounds that no machine reaches.
NEVER_REACHED: dict[str, dict[str, Any]] = {
    "token_bucket": {"rate_per_s": RATE_PER_S, "burst": RATE_PER_S},
    "vegas": {"initial": 20_000, "min_limit": 20_000, "max_limit": 20_000},
}


def policies(**limits: dict[str, Any]) -> str:
    """The default ones, all on, as TOML."""
    tables = []
    for section in DEFAULT_POLICIES:
        parameters = section.model_dump(exclude_defaults=True) | NEVER_REACHED.get(section.use, {}) | limits.get(section.use, {})
        tables.append("\n".join(["[[policies]]", *(f"{key} = {json.dumps(value)}" for key, value in parameters.items())]))
    return "\n".join(tables) + "\n"


NO_POLICIES = "policies = []\n"
# So that thousands of steps are admitted and stay in flight: a higher limit, and a suspended worker is not soon thought dead.
ROOMY = "[worker]\nheartbeat_s = 60\n" + policies()


def start_nearloop(site: Site, *, kind: str = "tool", settings: str = "") -> Endpoint:
    """The real gateway and worker, as `nearloop gateway` and `nearloop worker` run them; settings: more configuration, TOML."""
    for module in ("gateway.cli", "workers.serve"):
        if importlib.util.find_spec(module) is None:
            raise BenchError(f"not available: there is no {module}")
    nats_server, url = site.parts.start_nats_server()
    triton = [site.triton] if kind == "infer" else []
    port = free_port()
    config = site.parts.folder / f"nearloop-{port}.toml"
    config.write_text(
        f'''{settings or policies()}
[gateway]
listen = "127.0.0.1:{port}"
[auth]
anonymous_tenant = "bench"
[nats]
urls = ["{url}"]
[tools]
modules = ["workers.builtin_tools"]
[triton]
url = "{triton[0][1] if triton else ""}"
'''
    )
    where = ("--config", str(config))
    worker = site.parts.start_module("worker", "workers.serve", "--kind", kind, "--region", "home", *where)
    gateway = site.parts.start_module("gateway", "gateway.cli", "gateway", *where)
    request = execute_request(gateway_pb2.KIND_INFER if kind == "infer" else gateway_pb2.KIND_TOOL, "echo")
    parts = (gateway, worker, nats_server, *(part for part, _ in triton))
    return Endpoint(parts, f"127.0.0.1:{port}", EXECUTE, request, nats_url=url, stream=subjects.steps_stream("home"))


@dataclass(frozen=True)
class Contestant:
    name: str
    title: str
    start: Callable[[Site], Endpoint]
    start_roomy: Callable[[Site], Endpoint] | None = None  # for thousands of steps in flight


CONTESTANTS = (
    Contestant("echo", "grpc.aio echo", start_echo, start_echo),
    Contestant("floor", "floor: plain grpc.aio + JetStream", start_floor, start_floor),
    Contestant("floor-commit", "floor that stores results", lambda site: start_floor(site, commit=True)),
    Contestant("nearloop", "Nearloop, tool echo", start_nearloop, lambda site: start_nearloop(site, settings=ROOMY)),
    Contestant("nearloop-bare", "Nearloop without policies", lambda site: start_nearloop(site, settings=NO_POLICIES)),
    Contestant("triton", "Triton echo, tritonclient directly", start_triton),
    Contestant("nearloop-triton", "Nearloop, Triton echo", lambda site: start_nearloop(site, kind="infer")),
)


def wait_until_ready(endpoint: Endpoint, generator: LoadGenerator, patience_s: float = READY_TIMEOUT_S) -> None:
    """Calls until an answer is right. Raises BenchError with the last reason."""
    until = time.monotonic() + patience_s
    while True:
        for part in endpoint.parts:
            part.check()
        try:
            generator.ask(do="try", **endpoint.job)
        except BenchError as error:
            if time.monotonic() > until:
                raise BenchError(f"no right answer within {patience_s:g} s; the last one: {error}") from None
            time.sleep(0.2)
        else:
            return
