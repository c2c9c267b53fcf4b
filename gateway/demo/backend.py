"""The demo's calls, through the gateway: each is one step for a target."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from gateway.client import NearloopClient
from gateway.demo.agent import Body
from gateway.demo.corpus import Entry
from gateway.errors import NearloopError
from gateway.types import Kind, Timing

INDEX_BATCH = 256
INDEX_AT_ONCE = 4
CALL_TIMEOUT_S = 20.0


@dataclass(slots=True)
class Spent:
    """Where the time of a target's steps went, microseconds."""

    region: str = ""
    steps: int = 0
    admission_us: int = 0
    queue_us: int = 0
    network_us: int = 0
    service_us: int = 0

    def add(self, region: str, timing: Timing) -> None:
        self.region = region
        self.steps += 1
        self.admission_us += timing.admission_us
        self.queue_us += timing.queue_us
        self.network_us += timing.network_us
        self.service_us += timing.service_us

    @property
    def total_us(self) -> int:
        return self.admission_us + self.queue_us + self.network_us + self.service_us


@dataclass(slots=True)
class Ledger:
    """The timing records of all steps, by target."""

    by_target: dict[str, Spent] = field(default_factory=dict)

    def add(self, target: str, region: str, timing: Timing) -> None:
        self.by_target.setdefault(f"{target} @ {region}", Spent()).add(region, timing)


class Backend:
    """What an agent needs, as steps; `run` groups the steps of one agent."""

    def __init__(self, client: NearloopClient, ledger: Ledger, run: str) -> None:
        self._client = client
        self._ledger = ledger
        self._run = run

    async def plan(self, conversation: Body) -> Body:
        return dict(await self._call(Kind.INFER, "plan", conversation))

    async def judge(self, question: Body) -> Body:
        return dict(await self._call(Kind.INFER, "judge", question))

    async def search(self, query: str, limit: int) -> list[Body]:
        found = await self._call(Kind.RETRIEVE, "stdlib", {"op": "query", "text": query, "limit": limit})
        return [{**hit["payload"], "score": hit["score"]} for hit in found["hits"]]

    async def lookup(self, name: str) -> Body | None:
        try:
            return dict(await self._call(Kind.TOOL, "docs", {"name": name}))
        except NearloopError as error:
            if error.code == "NOT_FOUND" and error.reason != "TARGET_NOT_FOUND":
                return None
            raise

    async def _call(self, kind: Kind, target: str, body: Body) -> Any:
        result = await self._client.execute(kind, target, body, run=self._run, timeout_s=CALL_TIMEOUT_S)
        self._ledger.add(f"{kind.value} {target}", result.region, result.timing)
        return result.json


async def index(client: NearloopClient, entries: Sequence[Entry], on_progress: Callable[[int], None]) -> None:
    """Embeds and stores all entries through the `stdlib` target; on_progress gets how many are done."""
    done = 0
    room = asyncio.Semaphore(INDEX_AT_ONCE)

    async def store(batch: Sequence[Entry]) -> None:
        nonlocal done
        points = [{"id": entry.name, "text": entry.text, "payload": {"name": entry.name, "summary": entry.summary}} for entry in batch]
        async with room:
            await client.execute(Kind.RETRIEVE, "stdlib", {"op": "upsert", "points": points}, timeout_s=60)
        done += len(batch)
        on_progress(done)

    async with asyncio.TaskGroup() as group:
        for start in range(0, len(entries), INDEX_BATCH):
            group.create_task(store(entries[start : start + INDEX_BATCH]))
