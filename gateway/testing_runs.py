"""A run store in memory, with the promises of the real one: compare-and-set, leases that are lost, marks."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from gateway.errors import Unavailable
from gateway.ports import LeaseLost, RunJournal
from gateway.run_types import OpenRun, RunRecord


class MemoryRuns:
    """A `RunStore`. `fail(what)` may raise Unavailable before and after each write: "before append", "after append", and so on.

    `on_send(record, region)` gets the tokens.
    """

    def __init__(self, fail: Callable[[str], None] = lambda what: None) -> None:
        self._fail = fail
        self.records: dict[tuple[str, str], RunRecord] = {}
        self.bodies: dict[tuple[str, str], bytes] = {}
        self.marks: dict[tuple[str, str], OpenRun] = {}
        self.journals: dict[tuple[str, str, str], list[bytes]] = {}
        self.values: dict[tuple[str, str, str], bytes] = {}
        self.queued: dict[tuple[str, str], RunRecord] = {}  # by region and id
        self.withdrawn: list[tuple[str, str]] = []
        self.silent: set[str] = set()  # regions that do not answer
        self.on_send: Callable[[RunRecord, str], None] = lambda record, region: None

    async def accept(self, record: RunRecord) -> tuple[RunRecord, bool]:
        self._fail("before accept")
        key = (record.tenant, record.id)
        if key in self.records:
            return self.records[key], False
        self.records[key] = replace(record, body=b"")
        self.bodies[key] = record.body
        self.marks[key] = OpenRun(record.id, record.tenant, record.region)
        return record, True

    async def find(self, tenant: str, run_id: str) -> RunRecord | None:
        return self.records.get((tenant, run_id))

    async def body(self, record: RunRecord) -> RunRecord | None:
        body = self.bodies.get((record.tenant, record.id))
        return None if body is None else replace(record, body=body)

    async def mark(self, tenant: str, run_id: str) -> OpenRun | None:
        return self.marks.get((tenant, run_id))

    async def open_runs(self, origin: str) -> Sequence[OpenRun]:
        return [mark for mark in self.marks.values() if mark.id.rpartition("-")[0] == origin]

    async def move(self, run: OpenRun, region: str) -> OpenRun | None:
        key = (run.tenant, run.id)
        if self.marks.get(key) != run:
            return None
        moved = self.marks[key] = replace(run, region=region, left=(*run.left, run.region), sequence=run.sequence + 1)
        return moved

    async def close_run(self, tenant: str, run_id: str) -> None:
        self.bodies.pop((tenant, run_id), None)
        self.marks.pop((tenant, run_id), None)

    async def send(self, record: RunRecord, region: str) -> None:
        self._answer(region)
        self.queued[region, record.id] = record
        self.on_send(record, region)

    async def waits(self, record: RunRecord, region: str) -> bool:
        self._answer(region)
        return (region, record.id) in self.queued

    async def withdraw(self, record: RunRecord, region: str) -> None:
        self._answer(region)
        self.queued.pop((region, record.id), None)
        self.withdrawn.append((region, record.id))

    def _answer(self, region: str) -> None:
        if region in self.silent:
            raise Unavailable(f"region {region} does not answer")

    def journal(self, region: str, tenant: str, run_id: str, keep_s: float) -> RunJournal:
        return MemoryJournal(self.journals.setdefault((region, tenant, run_id), []), self._fail)

    async def put_value(self, tenant: str, run_id: str, data: bytes, keep_s: float) -> str:
        self._fail("before value")
        name = hashlib.sha256(data).hexdigest()
        self.values[tenant, run_id, name] = data
        return name

    async def value(self, tenant: str, run_id: str, name: str, region: str) -> bytes | None:
        return self.values.get((tenant, run_id, name))


class MemoryJournal:
    def __init__(self, entries: list[bytes], fail: Callable[[str], None]) -> None:
        self._entries = entries
        self._fail = fail
        self._known = 0  # entries that this runner knows of
        self._unsure: bytes | None = None  # stored, but nobody said so

    async def read(self) -> Sequence[bytes]:
        self._fail("before read")
        self._known = len(self._entries)
        return tuple(self._entries)

    async def append(self, entry: bytes) -> None:
        self._fail("before append")
        if self._unsure == entry and len(self._entries) == self._known + 1 and self._entries[-1] is self._unsure:
            self._known += 1  # stored by the try before
            return
        if len(self._entries) != self._known:
            raise LeaseLost
        self._entries.append(entry)
        self._unsure = entry
        self._fail("after append")
        self._known += 1
