"""The promises of a run store, kept by the one in memory and by NATS."""

import secrets
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from bus_rig import eventually_true
from nats_process import NatsProcess

from gateway import config, subjects
from gateway.clock import SystemClock
from gateway.edge.bus import NatsGatewayBus
from gateway.edge.run_store import NatsRunStore
from gateway.ports import LeaseLost, RunStore
from gateway.run_types import RunRecord
from gateway.testing_runs import MemoryRuns
from gateway.types import Kind, Lane


class Rig:
    """A store, and a second one as another process has it."""

    def __init__(self, store: RunStore, other: RunStore, origin: str) -> None:
        self.store, self.other, self.origin = store, other, origin
        self.tenant = f"t-{secrets.token_hex(4)}"

    def record(self, **more: Any) -> RunRecord:
        now_s = SystemClock().wall_s()
        run_id = subjects.job_id(self.origin, self.tenant, Kind.RUN, "program", secrets.token_hex(4))
        body = b'{"program":{"name":"p"},"input":null}'
        record = RunRecord(
            run_id, self.tenant, Lane.BATCH, now_s + 60, now_s, self.origin, "p", "digest", body, True, 60.0, "00-a-b-01", "x=y"
        )
        return replace(record, **more)


@pytest.fixture(params=["memory", "nats"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    if request.param == "memory":
        store = MemoryRuns()
        yield Rig(store, store, "home")
        return
    server: NatsProcess = request.getfixturevalue("nats_server")
    origin = f"o-{secrets.token_hex(4)}"
    settings = config.parse(
        {"nats": {"urls": [server.url]}, "gateway": {"region": origin}, "triton": {"region": origin}, "regions": [{"name": origin}]}
    )
    clock = SystemClock()
    buses = [NatsGatewayBus(settings, f"{name}-{origin}", clock) for name in ("g1", "g2")]
    for bus in buses:
        await bus.start()
    yield Rig(NatsRunStore(buses[0].js_of, origin, clock), NatsRunStore(buses[1].js_of, origin, clock), origin)
    await buses[0].js_of(origin).api(f"STREAM.DELETE.{subjects.steps_stream(origin)}")
    for bus in buses:
        await bus.close()


async def test_a_run_is_accepted_once(rig: Rig) -> None:
    record = rig.record()
    assert await rig.store.accept(record) == (record, True)
    found = replace(record, body=b"")
    assert await rig.other.accept(replace(record, digest="other")) == (found, False)
    assert await rig.other.find(rig.tenant, record.id) == found
    assert await rig.other.body(found) == record


async def test_nobody_elses_run_is_found(rig: Rig) -> None:
    record = rig.record()
    await rig.store.accept(record)
    assert await rig.store.find("somebody", record.id) is None
    assert await rig.store.find(rig.tenant, rig.record().id) is None


async def test_the_mark_says_where_a_run_is_until_it_is_closed(rig: Rig) -> None:
    record = rig.record()
    await rig.store.accept(record)
    mark = await rig.store.mark(rig.tenant, record.id)
    assert mark is not None
    assert (mark.region, mark.left) == (rig.origin, ())
    moved = await rig.other.move(mark, "iad")
    assert moved is not None
    assert (moved.region, moved.left) == ("iad", (rig.origin,))
    assert await rig.store.move(mark, "sjc") is None  # it knew of an older mark
    assert [one for one in await rig.store.open_runs(rig.origin) if one.id == record.id] == [moved]
    await rig.store.close_run(rig.tenant, record.id)
    assert await rig.store.mark(rig.tenant, record.id) is None
    assert record.id not in {one.id for one in await rig.store.open_runs(rig.origin)}
    assert await rig.store.find(rig.tenant, record.id) == replace(record, body=b"")
    assert await rig.store.body(record) is None


async def test_a_token_waits_until_it_is_withdrawn(rig: Rig) -> None:
    record = rig.record()
    assert not await rig.store.waits(record, rig.origin)
    await rig.store.send(record, rig.origin)
    await rig.store.send(record, rig.origin)
    await eventually_true(lambda: rig.other.waits(record, rig.origin))
    await rig.store.withdraw(record, rig.origin)
    assert not await rig.store.waits(record, rig.origin)


async def test_a_journal_is_read_as_it_was_written(rig: Rig) -> None:
    record = rig.record()
    journal = rig.store.journal(rig.origin, rig.tenant, record.id, 60.0)
    entries = [b"%d" % number for number in range(300)]  # more than a page
    for entry in entries:
        await journal.append(entry)
    assert list(await rig.other.journal(rig.origin, rig.tenant, record.id, 60.0).read()) == entries


async def test_who_reads_a_journal_can_go_on_and_who_had_it_cannot(rig: Rig) -> None:
    record = rig.record()
    first = rig.store.journal(rig.origin, rig.tenant, record.id, 60.0)
    await first.append(b"one")
    second = rig.other.journal(rig.origin, rig.tenant, record.id, 60.0)
    assert list(await second.read()) == [b"one"]
    await second.append(b"fence")
    with pytest.raises(LeaseLost):
        await first.append(b"two")
    await second.append(b"three")
    assert list(await second.read()) == [b"one", b"fence", b"three"]


async def test_two_beginners_cannot_both_begin(rig: Rig) -> None:
    record = rig.record()
    first, second = (store.journal(rig.origin, rig.tenant, record.id, 60.0) for store in (rig.store, rig.other))
    await first.append(b"one")
    with pytest.raises(LeaseLost):
        await second.append(b"one")  # the same words, but not the same call


async def test_large_values_are_kept_apart(rig: Rig) -> None:
    record = rig.record()
    data = secrets.token_bytes(100_000)
    name = await rig.store.put_value(rig.tenant, record.id, data, 60.0)
    assert await rig.store.put_value(rig.tenant, record.id, data, 60.0) == name
    assert await rig.other.value(rig.tenant, record.id, name, rig.origin) == data
    assert await rig.other.value("somebody", record.id, name, rig.origin) is None
