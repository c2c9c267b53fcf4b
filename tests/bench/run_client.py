"""What the benches of runs share: a closed loop of clients, runs and single steps as a client sees them, medians and verdicts."""

import asyncio
import json
import re
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter as now_s  # the loop's own clock counts milliseconds
from typing import Any, Generic, TypeVar

import grpc
import psutil

from gateway.addresses import free_port
from gateway.errors import NearloopError
from nearloop.v1 import gateway_pb2 as pb
from nearloop.v1 import gateway_pb2_grpc as pb_grpc
from tests.bench import machine
from tests.bench.open_loop import percentile
from tests.bench.parts import BenchError, Part, Parts, wait_for_port
from tests.bench.report import NOISE

T = TypeVar("T")
TIMEOUT_S = 60.0
READY_S = 30.0
LOOK_EVERY_S = 0.25
_NUMBER = re.compile(r"[\d.]+")


# ---- one after the other, or many at once ----------------------------------------------------------------------------------------


@dataclass
class Closed(Generic[T]):
    """What a closed loop did in its measured time. failed: texts of errors, with how often they came."""

    seconds: float
    latencies_s: list[float] = field(default_factory=list)
    results: list[T] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)

    @property
    def per_s(self) -> float:
        return len(self.latencies_s) / self.seconds

    def ms(self, share: float) -> float:
        return 1000 * percentile(self.latencies_s, share)


async def closed(
    once: Callable[[], Awaitable[T]], in_flight: int, warmup_s: float, seconds: float, may_be_empty: bool = False
) -> Closed[T]:
    """`in_flight` clients that each call, wait for the end and call again. Counted is what ended in the last `seconds`; a call that
    fails is counted apart and its client goes on. Raises BenchError when nothing ended, unless that may be."""
    start_s = now_s() + warmup_s
    end_s = start_s + seconds
    found: Closed[T] = Closed(seconds)

    async def loop() -> None:
        while (began_s := now_s()) < end_s:
            try:
                result = await once()
            except (grpc.aio.AioRpcError, NearloopError) as error:
                code, text = (error.code, error.message) if isinstance(error, NearloopError) else (error.code().name, error.details())
                said = f"{code}: {_NUMBER.sub('#', text or '')}"
                found.failed[said] = found.failed.get(said, 0) + 1
                await asyncio.sleep(0.05)
                continue
            ended_s = now_s()
            if start_s <= ended_s < end_s:
                found.latencies_s.append(ended_s - began_s)
                found.results.append(result)

    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(loop())
    if not found.latencies_s and not may_be_empty:
        raise BenchError(f"nothing ended in the measured {seconds:g} s; {found.failed or 'nothing failed either'}")
    return found


# ---- runs and steps, as their client sees them -----------------------------------------------------------------------------------


@dataclass
class SeenRun:
    """Times are seconds since the run was asked for. steps: (key, seconds from being sent to its outcome, as the runner measured it,
    when its end was seen here)."""

    took_s: float = 0.0
    accepted_s: float = 0.0
    started_s: float = 0.0
    region: str = ""
    placement: pb.Placement | None = None
    steps: list[tuple[str, float, float]] = field(default_factory=list)
    summary: pb.RunSummary | None = None
    summary_s: float = 0.0
    workers: set[str] = field(default_factory=set)


class Client:
    """A gRPC client of a gateway without retries: what fails is to be seen. watch(event): sees each event of each run."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
        self._stub = pb_grpc.GatewayStub(self._channel)
        self.watch: Callable[[pb.RunEvent], None] = lambda event: None

    async def close(self) -> None:
        await self._channel.close()

    async def run(self, program: str, regions: Sequence[str] = ()) -> SeenRun:
        """Raises grpc.aio.AioRpcError."""
        began_s = now_s()
        seen = SeenRun()
        spec = pb.RunSpec(source=program, regions=regions)
        async for answer in self._stub.Run(pb.RunRequest(run=spec, json_text=True), timeout=TIMEOUT_S):
            at_s, event = now_s() - began_s, answer.event
            self.watch(event)
            match event.WhichOneof("value"):
                case "accepted":
                    seen.accepted_s, seen.region, seen.placement = at_s, event.accepted.region, event.accepted.placement
                case "started":
                    seen.started_s, seen.region = at_s, event.started.region
                case "step_ended":
                    seen.steps.append((event.step_ended.key, event.step_ended.took_us / 1e6, at_s))
                    seen.workers.add(event.step_ended.worker)
                case "summary":
                    seen.summary, seen.summary_s = event.summary, at_s
                case "result":
                    seen.took_s = at_s
        return seen

    async def execute(self, kind: "pb.Kind.ValueType", target: str, input: dict[str, Any]) -> Any:
        """Raises grpc.aio.AioRpcError."""
        content = pb.Content(content_type="application/json", data=json.dumps(input).encode())
        step = pb.Step(kind=kind, target=target, input=pb.Payload(content=content))
        answer = await self._stub.Execute(pb.ExecuteRequest(step=step), timeout=TIMEOUT_S)
        return json.loads(answer.result.output.content.data)

    async def place(self, program: str) -> pb.Placement:
        """Raises grpc.aio.AioRpcError."""
        return (await self._stub.PlaceRun(pb.PlaceRunRequest(run=pb.RunSpec(source=program)))).placement


async def until(look: Callable[[], Awaitable[bool]], what: str, within_s: float = READY_S) -> None:
    """Waits for a condition; an error of gRPC is no. Raises BenchError."""
    end_s, last = now_s() + within_s, ""
    while now_s() < end_s:
        try:
            if await look():
                return
        except grpc.aio.AioRpcError as error:
            last = f": {error.code().name}: {error.details()}"
        await asyncio.sleep(LOOK_EVERY_S)
    raise BenchError(f"{what}: not within {within_s:g} s{last}")


def start_on_port(parts: Parts, name: str, module: str, *arguments: str) -> tuple[Part, int]:
    """A module of this package that takes `--port`, once it listens."""
    port = free_port()
    part = parts.start_module(name, module, "--port", str(port), *arguments)
    wait_for_port(part, port)
    return part, port


# ---- saying it -------------------------------------------------------------------------------------------------------------------


@dataclass
class Verdict:
    what: str
    value: float
    target: float
    at_most: bool
    unit: str = ""

    def line(self) -> str:
        reached = self.value <= self.target if self.at_most else self.value >= self.target
        sign = "<=" if self.at_most else ">="
        return f"{self.what:<70}{self.value:>9.2f} {self.unit:<3}target {sign} {self.target:<8.4g}{'reached' if reached else 'MISSED'}"


class Others:
    """What other programs, the kernel and the hypervisor take of the cores from now on."""

    def __init__(self) -> None:
        self._began = now_s(), machine.busy_s(), self._own_s()

    @staticmethod
    def _own_s() -> float:
        """Processor time of this process and of all that it started and that is still there."""
        root = psutil.Process()
        total = 0.0
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
            except psutil.NoSuchProcess:
                continue
            total += times.user + times.system
        return total

    def line(self) -> str:
        began_s, busy_s, own_s = self._began
        capacity_s = (now_s() - began_s) * machine.cores()
        share = max(0.0, machine.busy_s() - busy_s - (self._own_s() - own_s)) / capacity_s
        warning = ": too much to compare by" if share > NOISE else ""
        return f"other programs took {share:.0%} of the cores meanwhile{warning}"


def progress(text: str = "") -> None:
    """One line that the next one replaces, for a person who watches; empty at the end."""
    if sys.stderr.isatty():
        print(f"\r{text:<78}\r", end="", file=sys.stderr, flush=True)


def failures(found: Closed[Any]) -> str:
    """How many calls failed, and of what most of them did."""
    if not found.failed:
        return ""
    text, count = max(found.failed.items(), key=lambda one: one[1])
    return f"   {sum(found.failed.values())} failed, {count} of them {text}"


def middle(values: Sequence[float]) -> float:
    return median(values) if values else float("nan")


def say_machine() -> dict[str, str]:
    about = machine.describe()
    print(f"{about['cpu']}, {about['cores']} cores ({about['memory']}), Python {about['python']}, nats-server {about['nats-server']};")
    print("the client and everything else share the cores", flush=True)
    return about
