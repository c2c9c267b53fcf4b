"""Runs that must survive what is done to the stack under them, a ledger that notes every call, and the proof that each run ended once."""

import asyncio
import hashlib
import logging
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import nats
from aiohttp import web
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from stack_support import Broker, eventually

from gateway import config, run_journal, subjects
from gateway.client import ClientRun, NearloopClient
from gateway.client_run_values import RunOutput
from gateway.errors import Rejected, Unavailable
from gateway.program.journal import Completed
from gateway.types import JobState
from gateway.up import Stack
from workers.run_calls import step_id

log = logging.getLogger(__name__)

WITHIN_S = 60.0
TIMEOUT_S = 300.0
REGIONS = ("home", "iad")

CONFIG = """
[gateway]
listen = "127.0.0.1:0"
region = "home"

[[regions]]
name = "home"

[[regions]]
name = "iad"

[nats]
ack_wait_s = 2.0
publish_timeout_s = 2.0

[worker]
heartbeat_s = 0.5

[tools]
egress_allow = ["127.0.0.0/8"]
"""

# Every step's number is that of the step before it, and one more.
PROGRAM = """
program: nearloop/v1
name: chaos
steps:
  - {id: first, tool: TOOL, input: {run: "${input.run}", step: first, n: "${input.n}"}}
  - {id: second, tool: TOOL, input: {run: "${input.run}", step: second, n: "${steps.first.output.n}"}}
  - id: fork
    parallel:
      left:
        - {id: left, tool: TOOL, input: {run: "${input.run}", step: left, n: "${steps.second.output.n}"}}
        - {id: further, tool: TOOL, input: {run: "${input.run}", step: further, n: "${steps.left.output.n}"}}
      right:
        - {id: right, tool: TOOL, input: {run: "${input.run}", step: right, n: "${steps.second.output.n}"}}
  - id: each
    map:
      over: "['a', 'b', 'c']"
      as: item
      steps:
        - {id: item, tool: TOOL, input: {run: "${input.run}", step: "item-${item}", n: "${steps.fork.output.left.n}"}}
  - {id: last, tool: TOOL, input: {run: "${input.run}", step: last, n: "${steps.each.output[2].n}"}}
output: {n: "${steps.last.output.n}", right: "${steps.fork.output.right.n}", items: "${steps.each.output.map(one, one.n)}"}
"""
STEPS = frozenset({"first", "second", "left", "further", "right", "item-a", "item-b", "item-c", "last"})


def expected_output(number: int) -> dict[str, object]:
    return {"n": number + 6, "right": number + 3, "items": [number + 5] * 3}


def seed() -> int:
    """Of every random choice: NEARLOOP_CHAOS_SEED, or a new one."""
    return int(os.environ.get("NEARLOOP_CHAOS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 32)


def api_key(tenant: str) -> str:
    return f"key-of-{tenant}"


def tool_section(name: str, ledger_url: str, more: str = "") -> str:
    """An HTTP tool at the ledger; `more` are lines of its [[targets]] entry."""
    return f"""
[[tools.http]]
name = "{name}"
method = "POST"
url = "{ledger_url}"

[[targets]]
kind = "tool"
name = "{name}"
home_region = "home"
{more}
"""


def chaos_config(tools: Iterable[str], tenants: Iterable[str], settings: str = "") -> config.Config:
    text = CONFIG + settings + "".join(tools)
    for tenant in tenants:
        text += f'\n[[auth.keys]]\ntenant = "{tenant}"\nsha256 = "{hashlib.sha256(api_key(tenant).encode()).hexdigest()}"\n'
    return config.loads(text, "run chaos")


# ---- the ledger ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """key: the Idempotency-Key. identity: which step of which run it is, in the words of the program. at_s: wall clock."""

    key: str
    identity: tuple[str, str]
    at_s: float


class Ledger:
    """An API whose effects happen once for each idempotency key, in this process, which is never killed.

    POST with {"run", "step", "n"} answers {"n": n + 1, "serial"} after delay_s; a known key gets the first answer again.
    """

    def __init__(self, delay_s: float) -> None:
        self.url = ""
        self.calls: list[Call] = []
        self.effects: dict[str, dict[str, object]] = {}
        self._delay_s = delay_s
        self._more = asyncio.Condition()

    @classmethod
    @asynccontextmanager
    async def serving(cls, delay_s: float) -> AsyncIterator[Self]:
        ledger, app = cls(delay_s), web.Application()
        app.router.add_post("/ledger", ledger._post)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            ledger.url = f"http://127.0.0.1:{runner.addresses[0][1]}/ledger"
            yield ledger
        finally:
            await runner.cleanup()

    async def _post(self, request: web.Request) -> web.Response:
        body, key = await request.json(), request.headers["Idempotency-Key"]
        self.calls.append(Call(key, (body["run"], body["step"]), time.time()))
        answer = self.effects.setdefault(key, {"n": body["n"] + 1, "serial": len(self.effects)})
        async with self._more:
            self._more.notify_all()
        await asyncio.sleep(self._delay_s)  # the effect is there, its answer is not: the moment in which a caller must not die
        return web.json_response(answer)

    def of(self, tenant: str) -> list[Call]:
        return [call for call in self.calls if call.identity[0].startswith(f"{tenant}-")]

    async def until(self, tenant: str, steps: int) -> None:
        """Until so many different steps of the tenant have been called."""
        async with asyncio.timeout(WITHIN_S), self._more:
            await self._more.wait_for(lambda: len({call.key for call in self.of(tenant)}) >= steps)


# ---- what is stored ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    subject: str
    data: bytes
    at_s: float


class Streams:
    """Looks into the streams of all regions, past the gateways."""

    def __init__(self, urls: dict[str, str]) -> None:
        self._urls = urls
        self._brokers: dict[str, Broker] = {}
        self._clients: list[Client] = []
        self._exits = AsyncExitStack()

    async def __aenter__(self) -> Self:
        for region, url in self._urls.items():
            self._brokers[region] = await self._exits.enter_async_context(Broker(url))
            client = await nats.connect(url, max_reconnect_attempts=-1, reconnect_time_wait=0.2, error_cb=_ignore)
            self._exits.push_async_callback(client.close)
            self._clients.append(client)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exits.aclose()

    async def subjects(self, stream: str, subject_filter: str) -> dict[str, int]:
        """How many messages each subject has, in all regions. In `stream` a * stands for the region's part of the name."""
        found: dict[str, int] = {}
        for region, broker in self._brokers.items():
            found |= await broker.subjects(stream.replace("*", region.upper()), subject_filter)
        return found

    async def read(self, stream: str, subject_filter: str) -> list[Stored]:
        """All messages, with the time at which the server stored them."""
        found: list[Stored] = []
        for client in self._clients:

            async def read(client: Client = client) -> list[Stored] | NatsError:
                try:
                    return await _read(client, stream, subject_filter)
                except NatsError as error:  # a server that was killed is on its way back
                    return error

            some = await eventually(read, lambda some: isinstance(some, list), 15, f"{stream} can be read")
            assert isinstance(some, list)
            found += some
        return found

    async def stuck(self) -> list[str]:
        """What a system at rest does not have: steps, messages without an acknowledgement, marks of open runs, dead letters."""
        found = [*await self.subjects("NL_STEPS_*", "nl.step.>"), *await self.subjects("NL_RUNS", "nl.run.*.*.*.open")]
        found += await self.subjects("NL_DEAD", "nl.dead.>")
        for region, broker in self._brokers.items():
            listed = await broker.api(f"CONSUMER.LIST.NL_STEPS_{region.upper()}")
            for one in listed["consumers"] or ():
                if one["num_ack_pending"] or one["num_pending"]:
                    found.append(f"{region} {one['name']}: {one['num_ack_pending']} not acknowledged, {one['num_pending']} waiting")
        return found


async def _read(client: Client, stream: str, subject_filter: str) -> list[Stored]:
    js = client.jetstream(timeout=5)
    how = ConsumerConfig(deliver_policy=DeliverPolicy.ALL, ack_policy=AckPolicy.NONE)
    subscription = await js.pull_subscribe(subject_filter, stream=stream, config=how)
    found: list[Stored] = []
    left = (await subscription.consumer_info()).num_pending or 0
    while left:
        messages = await subscription.fetch(min(left, 500), timeout=5)
        found += [Stored(one.subject, one.data, one.metadata.timestamp.timestamp()) for one in messages]
        left = messages[-1].metadata.num_pending
    await subscription.unsubscribe()
    return found


async def _ignore(error: Exception) -> None:
    """nats-py logs every lost connection otherwise."""


# ---- a case --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class World:
    """The stack that everything is done to; each case has a tenant of its own in it, so that no case sees another's runs."""

    stack: Stack
    ledger: Ledger
    streams: Streams


@dataclass(frozen=True, slots=True)
class Kill:
    """names: the parts that were killed at the same time. stored: keys whose outcome was stored before. at_s: wall clock, when `stored`
    had been read. open_runs: those that nobody had heard the end of."""

    names: tuple[str, ...]
    at_s: float
    over_s: float
    stored: frozenset[str]
    open_runs: int


@dataclass
class Case:
    """Runs of one tenant. limits(number): the regions that a run must not leave."""

    world: World
    tenant: str
    count: int
    tool: str = "charge"
    limits: Callable[[int], Sequence[str]] = lambda number: ()
    ids: dict[int, str] = field(default_factory=dict)
    outputs: dict[int, object] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)
    ended_s: dict[int, float] = field(default_factory=dict)  # wall clock, as the client heard it
    admitted: int = 0
    _room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))

    @property
    def steps(self) -> int:
        return self.count * len(STEPS)

    def client(self, gateways: Sequence[str] = ()) -> NearloopClient:
        return NearloopClient(gateways or self.world.stack.gateway_addresses, api_key=api_key(self.tenant))

    def called(self) -> int:
        """How many different steps have been called."""
        return len({call.key for call in self.world.ledger.of(self.tenant)})

    # ---- load ----

    def admit(self, count: int) -> None:
        """So many more runs may begin."""
        for _ in range(min(count, self.count - self.admitted)):
            self.admitted += 1
            self._room.release()

    async def run_all(self) -> None:
        """Every run to its end, half of them by `run`, half by `submit_run` and `watch_run`; a refusal or an outage is waited out."""
        async with self.client() as client, asyncio.TaskGroup() as group:

            async def one(number: int) -> None:
                await self._room.acquire()
                await self._insist(lambda: self._one(client, number))
                self.ended_s[number] = time.time()

            for number in range(self.count):
                group.create_task(one(number))

    async def submit(self, client: NearloopClient, number: int) -> ClientRun:
        found: list[ClientRun] = []

        async def once() -> None:
            found.append(await client.submit_run(*self.order(number), **self._options(number)))

        await self._insist(once)
        self._accepted(number, found[0])
        return found[0]

    async def watch(self, client: NearloopClient, number: int) -> None:
        async def once() -> None:
            async with aclosing(client.watch_run(self.ids[number], timeout_s=WITHIN_S)) as items:
                async for item in items:
                    if isinstance(item, RunOutput):
                        self.outputs[number] = item.output

        await self._insist(once)
        self.ended_s[number] = time.time()

    async def _one(self, client: NearloopClient, number: int) -> None:
        if number % 2:
            await self.submit(client, number)
            await self.watch(client, number)
            return
        async with aclosing(client.run(*self.order(number), **self._options(number))) as items:
            async for item in items:
                if isinstance(item, ClientRun):
                    self._accepted(number, item)
                elif isinstance(item, RunOutput):
                    self.outputs[number] = item.output

    def order(self, number: int) -> tuple[str, Any]:
        return PROGRAM.replace("TOOL", self.tool), {"run": f"{self.tenant}-{number}", "n": number}

    def _options(self, number: int) -> dict[str, Any]:
        return {"idempotency_key": f"{self.tenant}-{number}", "timeout_s": TIMEOUT_S, "regions": self.limits(number)}

    def _accepted(self, number: int, run: ClientRun) -> None:
        assert self.ids.setdefault(number, run.id) == run.id, "the same key is the same run"

    async def _insist(self, ask: Callable[[], Awaitable[None]]) -> None:
        give_up_s = asyncio.get_running_loop().time() + WITHIN_S
        while True:
            try:
                return await ask()
            except (Unavailable, Rejected):
                if asyncio.get_running_loop().time() > give_up_s:
                    raise
                await asyncio.sleep(0.1)

    # ---- faults ----

    async def until_ready(self, *names: str) -> None:
        for name in names:
            await asyncio.wait_for(self.world.stack.wait_ready(name), 30)

    async def kill(self, *names: str, for_good: bool = False) -> None:
        """SIGKILL to all of them at the same time, once they are ready; notes what was stored before. for_good: until somebody starts
        them."""
        stack = self.world.stack
        await self.until_ready(*names)
        pids = {name: stack.part(name).pid for name in names}
        stored, at_s = await self.stored(), time.time()
        await asyncio.gather(*(stack.kill(name) for name in names))
        if for_good:
            await asyncio.gather(*(stack.part(name).stop() for name in names))
        assert all(pids.values())
        assert all(stack.part(name).pid != pid for name, pid in pids.items())
        self.kills.append(Kill(names, at_s, time.time(), frozenset(stored), self.admitted - len(self.ended_s)))

    async def stored(self) -> dict[str, float]:
        """The keys of steps whose outcome is stored, as a result or in a journal, and since when (wall clock, the earlier of both)."""
        of_step = {_step_of(call.key): call.key for call in self.world.ledger.of(self.tenant)}
        found: dict[str, float] = {}
        for result in await self.world.streams.read("NL_RESULTS", f"nl.result.*.{self.tenant}.*"):
            key = of_step.get(result.subject.rpartition(".")[2])
            if key is not None:
                found[key] = min(result.at_s, found.get(key, result.at_s))
        for entry in await self.world.streams.read("NL_RUNS", f"nl.run.*.{self.tenant}.*.journal"):
            run_id = entry.subject.split(".")[4]
            for event, _ in run_journal.read(entry.data).events:
                if isinstance(event, Completed):
                    key = f"{run_id}/{event.key}"
                    found[key] = min(entry.at_s, found.get(key, entry.at_s))
        return found

    # ---- checks ----

    async def check_ended_once(self) -> dict[int, ClientRun]:
        """Every run is done with the right output, told by each gateway, and has one stored result. Returns the runs by their number."""
        assert len(set(self.ids.values())) == self.count == len(self.outputs)
        assert self.outputs == {number: expected_output(number) for number in range(self.count)}
        await self.until_ready(*self.world.stack.part_names)
        told: list[ClientRun] = []
        for address in self.world.stack.gateway_addresses:
            async with self.client([address]) as client:
                told = await asyncio.gather(*(client.get_run(run_id) for run_id in self.ids.values()))
                assert Counter(run.state for run in told) == {JobState.DONE: self.count}
                outputs = [run.result.output for run in told if run.result is not None]
                assert outputs == [expected_output(number) for number in self.ids]
        results = await self.world.streams.subjects("NL_RESULTS", f"nl.result.*.{self.tenant}.*")
        of_runs = {subject: count for subject, count in results.items() if subjects.job_region(subject.rpartition(".")[2])}
        assert of_runs == {subjects.result(subjects.job_region(one), self.tenant, one): 1 for one in self.ids.values()}
        return dict(zip(self.ids, told, strict=True))

    async def check_ledger(self, *, moved: Collection[str] = ()) -> int:
        """Every step had its effect, under one key, and a step whose outcome was stored before a kill was not called again. Returns how
        many calls were repeated. moved: ids of runs that another region had to begin anew."""
        calls = self.world.ledger.of(self.tenant)
        keys: dict[tuple[str, str], set[str]] = defaultdict(set)
        for call in calls:
            keys[call.identity].add(call.key)
        assert set(keys) == {(f"{self.tenant}-{number}", step) for number in range(self.count) for step in STEPS}
        assert {identity: found for identity, found in keys.items() if len(found) > 1} == {}  # one key, so one effect
        stored = await self.stored()
        not_moved = [call for call in calls if call.key.partition("/")[0] not in moved]
        for kill in self.kills:
            again = [call for call in not_moved if call.at_s > kill.at_s and call.key in kill.stored]
            assert again == [], f"called after {kill.names} were killed, though stored before: {self._history(again, stored)}"
        late = [(call, stored[call.key]) for call in not_moved if call.at_s > stored.get(call.key, call.at_s)]
        repeats = len(calls) - len({call.key for call in calls})
        log.warning(
            "%s: %d runs, %d calls, %d of them repeated, %d after the outcome was stored; killed: %s",
            self.tenant,
            self.count,
            len(calls),
            repeats,
            len(late),
            ", ".join(" and ".join(kill.names) for kill in self.kills) or "nothing",
        )
        if late:
            log.warning("%s", self._history([call for call, _ in late], stored))
        # What was under way in the moment of a kill can be stored by one worker while another one begins it.
        assert len(late) <= len(self.kills), self._history([call for call, _ in late], stored)
        return repeats

    def _history(self, calls: Sequence[Call], stored: Mapping[str, float]) -> str:
        """What happened around these calls, for the person who reads the failure."""
        first_s = min(kill.at_s for kill in self.kills) if self.kills else 0.0
        lines = [f"{kill.at_s - first_s:.3f}-{kill.over_s - first_s:.3f} killed {' and '.join(kill.names)}" for kill in self.kills]
        for key in {call.key for call in calls}:
            times = [f"{call.at_s - first_s:.3f}" for call in self.world.ledger.of(self.tenant) if call.key == key]
            lines.append(f"{key}: called at {', '.join(times)}; stored at {stored[key] - first_s:.3f}")
        return "\n".join(lines)

    def check_repeats_have_a_cause(self) -> None:
        """Between two calls with the same key something was killed."""
        before: dict[str, Call] = {}
        for call in self.world.ledger.of(self.tenant):
            first = before.get(call.key)
            if first is not None:
                assert any(first.at_s <= kill.over_s and call.at_s >= kill.at_s for kill in self.kills), (first, call)
            before[call.key] = call


async def check_nothing_is_stuck(streams: Streams, within_s: float = 45.0) -> None:
    await eventually(streams.stuck, lambda found: not found, within_s, "nothing is stuck")


def _step_of(key: str) -> str:
    run_id, _, step = key.partition("/")
    return step_id(run_id, step, 1)
