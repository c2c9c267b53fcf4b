"""Jobs that must survive what is done to the stack under them, and the proof that each of them ended once."""

import asyncio
import hashlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stack_support import Broker, eventually, running

from gateway import addresses, config, parts, subjects
from gateway.client import ClientJob, ClientResult, NearloopClient, RetryPolicy
from gateway.edge import probes
from gateway.errors import Rejected, Unavailable
from gateway.supervisor import Part
from gateway.types import JobState
from gateway.up import Stack

log = logging.getLogger(__name__)

JOBS = 300
CASES = ("worker", "hang", "gateway", "nats", "triton")
AT_ONCE = 32
CALL_DELAY_MS = 100
WITHIN_S = 60.0

CONFIG = """
[gateway]
listen = "127.0.0.1:0"
region = "home"

[[regions]]
name = "home"
round_trip_ms = { iad = 80 }

[[regions]]
name = "iad"

[nats]
ack_wait_s = 2.0

[worker]
heartbeat_s = 0.5

[tools]
egress_allow = ["127.0.0.0/8"]

# Few slots, so that there is work in hand whenever something is killed.
[[tools.http]]
name = "charge"
method = "POST"
url = "LEDGER/v1/ledger?delay_ms=DELAY"

[[targets]]
kind = "tool"
name = "charge"
home_region = "home"
slots = 2

[[targets]]
kind = "infer"
name = "busy"
home_region = "home"
slots = 2
"""


def api_key(tenant: str) -> str:
    return f"key-of-{tenant}"


def chaos_config(ledger_url: str) -> config.Config:
    text = CONFIG.replace("LEDGER", ledger_url).replace("DELAY", str(CALL_DELAY_MS))
    for tenant in CASES:
        text += f'\n[[auth.keys]]\ntenant = "{tenant}"\nsha256 = "{hashlib.sha256(api_key(tenant).encode()).hexdigest()}"\n'
    return config.loads(text, "chaos")


def ledger_part(port: int, file: Path) -> Part:
    return parts.python_part(
        "ledger",
        *("gateway.demo.docs_api", "--port", str(port), "--ledger-file", str(file)),
        probe=lambda: probes.http_ready(f"http://127.0.0.1:{port}/healthz"),
        address=f"http://127.0.0.1:{port}",
    )


@dataclass
class World:
    """The stack that everything is done to; each case has a tenant of its own in it, so that no case sees another's jobs."""

    stack: Stack
    broker: Broker
    ledger: Path  # a line, the idempotency key, for each call


@asynccontextmanager
async def world(ledger: Path) -> AsyncIterator[World]:
    """Two gateways, a Triton worker, tool workers in two regions, and the ledger that their tool writes to."""
    port = addresses.free_port()
    workers = [("infer", "home"), ("tool", "home"), ("tool", "iad")]
    async with (
        running(chaos_config(f"http://127.0.0.1:{port}"), gateways=2, workers=workers, extra=[ledger_part(port, ledger)]) as stack,
        Broker(stack.nats_url) as broker,
    ):
        yield World(stack, broker, ledger)


@dataclass
class Submitted:
    """What came of submitting: ids by key, and which keys this call was the first to store."""

    ids: dict[str, str] = field(default_factory=dict)
    created: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)


class Case:
    """300 jobs of one tenant for one target."""

    def __init__(self, world: World, tenant: str, kind: str = "tool", target: str = "charge") -> None:
        self._world, self.tenant, self._kind, self._target = world, tenant, kind, target
        self.keys = [f"{tenant}-{number}" for number in range(JOBS)]

    def client(self, gateways: Sequence[str], retries: RetryPolicy | None = None) -> NearloopClient:
        return NearloopClient(gateways, api_key=api_key(self.tenant), retries=retries)

    async def submit(self, gateways: Sequence[str], *, insist: bool = True, on_stored: Callable[[int], None] = lambda _: None) -> Submitted:
        """Submits every key. Insisting, a key whose outcome is unknown is submitted again until it is known."""
        done, room = Submitted(), asyncio.Semaphore(AT_ONCE)
        deadline_s = asyncio.get_running_loop().time() + WITHIN_S
        async with self.client(gateways, None if insist else RetryPolicy(attempts=1)) as client:

            async def one(key: str) -> None:
                async with room:
                    while True:
                        try:
                            job = await client.submit(self._kind, self._target, self._input(key), idempotency_key=key, timeout_s=300)
                        except (Unavailable, Rejected):
                            if not insist:
                                done.failed.add(key)
                                return
                            assert asyncio.get_running_loop().time() < deadline_s, f"{key} could not be submitted within {WITHIN_S:g} s"
                            await asyncio.sleep(0.1)
                            continue
                        done.ids[key] = job.id
                        done.created |= {key} if job.created else set()
                        on_stored(len(done.ids))
                        return

            async with asyncio.TaskGroup() as group:
                for key in self.keys:
                    group.create_task(one(key))
        return done

    def _input(self, key: str) -> dict[str, object]:
        return {"ms": 20} if self._kind == "infer" else {"key": key}

    async def until_ended(self, gateways: Sequence[str], ids: Sequence[str]) -> list[ClientJob]:
        """Watches every job to its result, then asks for all of them again."""
        async with self.client(gateways) as client:

            async def watch(job_id: str) -> ClientResult:
                async with aclosing(client.watch(job_id, timeout_s=WITHIN_S)) as items:
                    async for item in items:
                        if isinstance(item, ClientResult):
                            return item
                raise AssertionError(f"{job_id}: the watch ended without a result")

            await asyncio.gather(*(watch(job_id) for job_id in ids))
            return await asyncio.gather(*(client.get_job(job_id) for job_id in ids))

    async def calls(self) -> Counter[str]:
        """How often each key of this case was seen by the ledger."""
        return Counter(key for key in self._world.ledger.read_text().split() if key.startswith(f"{self.tenant}-"))

    async def results(self) -> dict[str, int]:
        return await self._world.broker.subjects("NL_RESULTS", f"nl.result.*.{self.tenant}.>")

    async def until_called(self, count: int) -> None:
        await eventually(self.calls, lambda calls: len(calls) >= count, WITHIN_S, f"{count} calls at the ledger")

    async def until_results(self, count: int) -> None:
        await eventually(self.results, lambda results: len(results) >= count, WITHIN_S, f"{count} results")

    async def check_each_ended_once(self, jobs: Sequence[ClientJob]) -> None:
        """Every job is done, has one stored result, and left neither a step nor a dead letter."""
        assert Counter(job.state for job in jobs) == {JobState.DONE: JOBS}
        assert await self.results() == {subjects.result(subjects.job_region(job.id), self.tenant, job.id): 1 for job in jobs}
        await eventually(self._steps_left, lambda left: not left, 30, "the queues are empty")
        broker = self._world.broker
        records = await broker.subjects("NL_STEPS_HOME", f"nl.job.home.{self.tenant}.>")
        assert records == {f"nl.job.home.{self.tenant}.{job.id}": 1 for job in jobs}
        assert (await broker.state("NL_DEAD"))[0][0] == 0

    async def _steps_left(self) -> dict[str, int]:
        broker = self._world.broker
        return await broker.subjects("NL_STEPS_HOME", "nl.step.>") | await broker.subjects("NL_STEPS_IAD", "nl.step.>")

    async def check_ledger(self) -> None:
        """Every key had its effect; a key that was seen twice is a step that was executed again, which is allowed."""
        calls = await self.calls()
        assert set(calls) == set(self.keys)
        repeated = sum(count > 1 for count in calls.values())
        log.warning("%s: %d calls for %d keys, %d of them repeated", self.tenant, calls.total(), len(calls), repeated)
