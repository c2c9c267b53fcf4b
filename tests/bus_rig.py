"""What the bus contract needs of a transport, and small helpers for its tests."""

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from gateway import subjects
from gateway.clock import Clock
from gateway.config import Config
from gateway.ports import Delivery, GatewayBus, Puller, Queue, WorkerBus
from gateway.types import Kind, Lane, Payload, Status, Step, StepResult, Target

WAIT_S = 20.0  # a limit for what must happen, never a pause


@dataclass(frozen=True)
class DeadEntry:
    count: int
    body: bytes
    reason: str
    message: str


class Rig(Protocol):
    """A transport with regions, a tenant and a target that no other test uses."""

    config: Config
    clock: Clock
    region: str
    other_region: str
    tenant: str
    target: Target

    async def gateway(self, name: str = "g1") -> GatewayBus: ...

    async def worker(self, name: str = "w1") -> WorkerBus: ...

    def pass_time(self, seconds: float) -> None:
        """Moves the clock where it can be moved; a real one moves by itself."""
        ...

    async def dead(self, subject: str) -> DeadEntry: ...


MakeRig = Callable[..., Awaitable[Rig]]


def make_step(rig: Rig, **changes: object) -> Step:
    fields: dict[str, object] = {
        "id": f"s-{secrets.token_hex(8)}",
        "tenant": rig.tenant,
        "kind": Kind.TOOL,
        "target": rig.target.name,
        "input": Payload(b'{"word": "near"}'),
        "deadline_s": round(rig.clock.wall_s() + 60.0, 3),
    }
    return Step(**(fields | changes))  # type: ignore[arg-type]


def make_result(step: Step, **changes: object) -> StepResult:
    fields: dict[str, object] = {
        "step_id": step.id,
        "tenant": step.tenant,
        "status": Status.DONE,
        "output": Payload(b'{"echo": "near"}'),
        "attempt": 1,
        "region": "home",
        "worker": "w1",
        "queue_us": 12,
        "service_us": 345,
    }
    return StepResult(**(fields | changes))  # type: ignore[arg-type]


class Inbox:
    """Deliveries of a puller, one after the other."""

    def __init__(self) -> None:
        self.waiting: asyncio.Queue[Delivery] = asyncio.Queue()
        self.puller: Puller

    async def next(self) -> Delivery:
        return await asyncio.wait_for(self.waiting.get(), WAIT_S)


async def pull(rig: Rig, worker: WorkerBus, credits: int, *, lane: Lane = Lane.STANDARD, priority: int = 0, region: str = "") -> Inbox:
    inbox = Inbox()
    queue = Queue(region or rig.region, rig.target.kind, rig.target.name, lane, priority)
    inbox.puller = await worker.consume(queue, inbox.waiting.put_nowait)
    inbox.puller.want(credits)
    return inbox


async def eventually(condition: Callable[[], bool]) -> None:
    """For what a transport does in its own time."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def eventually_true(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not await condition():
            await asyncio.sleep(0.01)


async def done(future: "asyncio.Future[StepResult]") -> StepResult:
    return await asyncio.wait_for(future, WAIT_S)


async def finish(worker: WorkerBus, delivery: Delivery, result: StepResult) -> bool:
    """What a worker does at the end of a step."""
    first = await worker.commit(result, 60.0, subjects.result_region(delivery.step.id, delivery.queue.region))
    if delivery.reply_to and not delivery.answered_by_commit:
        worker.reply(delivery.reply_to, result)
    delivery.ack()
    return first
