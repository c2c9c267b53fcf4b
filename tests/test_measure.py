"""Round trips as workers measure them: the estimates, when they are told, and HTTP tools against a real server with an injected clock."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from gateway.clock import Clock
from gateway.config import parse
from gateway.errors import StepFailed, Unavailable
from gateway.run_types import RoundTrip
from gateway.testing_clock import ManualClock
from gateway.types import Kind
from tests.test_tool_http import FakeWork, serving
from workers import measure, tools
from workers.measure import BUCKET_S, BUCKETS, LeastOfLate, Measured, Measurement, Measuring, Told, start_measuring
from workers.tool_http import HttpClient
from workers.tools import ToolsExecutor

# ---- estimates -----------------------------------------------------------------------------------------------------------------


def test_the_least_of_late_forgets_and_counts() -> None:
    least = LeastOfLate()
    assert least.measurement("x", 0.0) is None
    for now_s, value in [(0.0, 3.0), (1.0, 2.0), (2.0, 5.0), (100.0, 4.0)]:
        least.add(value, now_s)
    assert least.measurement("x", 149.9) == Measurement("x", 2.0, 4)
    assert least.measurement("x", 150.0) == Measurement("x", 4.0, 1)
    assert least.measurement("x", 250.0) is None


@given(st.lists(st.tuples(st.floats(0, 60), st.floats(0, 10)), max_size=50), st.floats(0, 60))
def test_it_is_the_least_of_the_window_to_ten_seconds(steps: list[tuple[float, float]], last_s: float) -> None:
    least, now_s, seen = LeastOfLate(), 0.0, []
    for pause_s, value in steps:
        now_s += pause_s
        least.add(value, now_s)
        seen.append((now_s, value))
    now_s += last_s
    found = least.measurement("x", now_s)
    surely = [value for at_s, value in seen if at_s > now_s - BUCKET_S * (BUCKETS - 1)]
    perhaps = [value for at_s, value in seen if at_s > now_s - BUCKET_S * BUCKETS - 1e-6]
    if found is None:
        assert not surely
    else:
        assert perhaps
        assert min(perhaps) <= found.seconds <= min(surely, default=10.0)
        assert len(surely) <= found.samples <= len(perhaps)


def test_what_is_new_changed_or_a_minute_old_is_told() -> None:
    told = Told()
    one = Measurement("iad", 0.080, 1)
    assert told.is_due(one, 0.0)
    told.told(one, 0.0)
    assert not told.is_due(one._replace(seconds=0.087), 59.0)
    assert told.is_due(one._replace(seconds=0.089), 1.0)
    assert told.is_due(one._replace(seconds=0.071), 1.0)
    assert told.is_due(one, 60.0)
    assert told.is_due(one._replace(to="sfo"), 1.0)


# ---- regions -------------------------------------------------------------------------------------------------------------------


class Bus:
    """Answers pings with the given seconds, one after the other; an exception is raised."""

    def __init__(self, **answers: Sequence[float | Exception]) -> None:
        self.answers = {region: list(given) for region, given in answers.items()}
        self.told: list[RoundTrip] = []
        self.answering = 0
        self.down = False
        self.heard = asyncio.Event()

    async def ping(self, region: str) -> float:
        answer = self.answers[region].pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def serve_ping(self) -> "Bus":
        if self.down:
            raise Unavailable("down")
        self.answering += 1
        return self

    async def close(self) -> None:
        self.answering -= 1

    async def publish_round_trip(self, trip: RoundTrip) -> None:
        if self.down:
            raise Unavailable("down")
        self.told.append(trip)
        self.heard.set()


async def test_the_median_of_the_last_looks_and_the_least_of_each_is_told() -> None:
    clock = ManualClock()
    bus = Bus(iad=[0.08, 0.3, 0.4, 0.5, 0.2, 0.3, 0.09, 0.1, 0.1])
    measuring = Measuring("home", bus, clock, pinged=["iad"])
    for _ in range(3):
        await measuring.look_at_regions()
    assert bus.told == [
        RoundTrip("home", "iad", 0.08, 1),
        RoundTrip("home", "iad", 0.14, 2),  # of 0.08 and 0.2
        RoundTrip("home", "iad", 0.09, 3),
    ]
    bus.answers["iad"] = [0.09] * 3
    await measuring.look_at_regions()
    assert len(bus.told) == 3, "it has not changed"
    clock.advance(60)
    bus.answers["iad"] = [0.09] * 3
    await measuring.look_at_regions()
    assert bus.told[-1] == RoundTrip("home", "iad", 0.09, 5)


async def test_a_new_route_counts_after_half_of_the_window() -> None:
    bus = Bus(iad=[0.08] * 3 * 8 + [0.02] * 3 * 5)
    measuring = Measuring("home", bus, ManualClock(), pinged=["iad"])
    for _ in range(8 + 3):
        await measuring.look_at_regions()
    assert bus.told == [RoundTrip("home", "iad", 0.08, 1)]
    for _ in range(2):
        await measuring.look_at_regions()
    assert bus.told[-1] == RoundTrip("home", "iad", 0.02, 8)


async def test_a_region_that_does_not_answer_says_nothing_and_hinders_nobody() -> None:
    bus = Bus(iad=[0.08, Unavailable("x")] + [0.08] * 3, sfo=[0.15] * 6)
    measuring = Measuring("home", bus, ManualClock(), pinged=["iad", "sfo"])
    await measuring.look_at_regions()
    assert bus.told == [RoundTrip("home", "sfo", 0.15, 1)]
    await measuring.look_at_regions()
    assert RoundTrip("home", "iad", 0.08, 1) in bus.told


async def test_what_could_not_be_told_is_told_the_next_time() -> None:
    bus = Bus(iad=[0.08] * 6)
    measuring = Measuring("home", bus, ManualClock(), pinged=["iad"])
    bus.down = True
    await measuring.look_at_regions()
    bus.down = False
    await measuring.look_at_regions()
    assert bus.told == [RoundTrip("home", "iad", 0.08, 2)]


# ---- the tasks of a worker -----------------------------------------------------------------------------------------------------


class Knows:
    """An executor that can tell; its probe fails in a way that nobody foresaw."""

    def __init__(self) -> None:
        self.probed = asyncio.Event()

    async def probe(self) -> None:
        self.probed.set()
        raise RuntimeError("https://secret.example")

    def answered(self) -> Sequence[Measurement]:
        return [Measurement("tool.api", 0.002, 7)]


async def test_a_worker_measures_at_once_and_leaves_nothing_behind(caplog: pytest.LogCaptureFixture) -> None:
    bus, knows = Bus(), Knows()
    measuring = await start_measuring(Kind.TOOL, "iad", ["home", "iad"], bus, knows, ManualClock())
    assert measuring is not None
    async with asyncio.timeout(10):
        await knows.probed.wait()
        await bus.heard.wait()
    assert (bus.told, bus.answering) == ([RoundTrip("iad", "tool.api", 0.002, 7)], 1)
    await measuring.close()
    assert bus.answering == 0
    assert not [task for task in asyncio.all_tasks() if task.get_name() in ("measure regions", "probe targets", "measure targets")]
    assert "RuntimeError" in caplog.text
    assert "secret" not in caplog.text


async def test_only_runners_ping_and_only_other_regions() -> None:
    bus = Bus(home=[0.08] * 3)
    measuring = await start_measuring(Kind.RUN, "iad", ["home", "iad"], bus, object(), ManualClock())
    async with asyncio.timeout(10):
        await bus.heard.wait()
    assert bus.told == [RoundTrip("iad", "home", 0.08, 1)]
    assert measuring is not None
    await measuring.close()


async def test_a_worker_without_a_transport_goes_on_without_measuring() -> None:
    bus = Bus()
    bus.down = True
    assert await start_measuring(Kind.RUN, "iad", ["home", "iad"], bus, object(), ManualClock()) is None


# ---- HTTP tools ----------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def calling(monkeypatch: pytest.MonkeyPatch, clock: Clock, *http: dict[str, object]) -> AsyncIterator[ToolsExecutor]:
    monkeypatch.setattr(tools, "HttpClient", lambda egress, slots: HttpClient(egress, slots, clock))
    executor = ToolsExecutor(parse({"tools": {"http": list(http), "egress_allow": ["127.0.0.0/8"]}}), environ={"KEY": "s3cret"})
    await executor.start()
    try:
        yield executor
    finally:
        await executor.close()


def taking(clock: ManualClock, *seconds: float) -> Callable[[web.BaseRequest], web.Response]:
    """A server that takes so long for one request after the other, by the clock that the worker reads."""
    left = list(seconds)

    def answer(request: web.BaseRequest) -> web.Response:
        clock.advance(left.pop(0))
        return web.json_response({"ok": True})

    return answer


def known(executor: ToolsExecutor) -> dict[str, tuple[float, int]]:
    return {one.to: (round(one.seconds, 6), one.samples) for one in executor.answered()}


async def test_a_tools_own_requests_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    async with serving() as server:
        tool: dict[str, object] = {"name": "api", "url": server.url + "/docs", "method": "POST"}
        async with calling(monkeypatch, clock, tool, tool | {"name": "other"}) as executor:
            assert isinstance(executor, Measured)
            assert known(executor) == {}
            server.answer = taking(clock, 0.5, 0.25, 0.75)
            for body in ({"a": 1}, {"a": "x" * 200_000}, {}):
                await executor.execute(FakeWork(body))
            assert known(executor) == {"tool.api": (0.25, 3)}
            clock.advance(measure.BUCKET_S * measure.BUCKETS)
            assert known(executor) == {}


async def test_errors_are_answers_and_lost_connections_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()

    def refuse(request: web.BaseRequest) -> web.Response:
        clock.advance(0.125)
        return web.Response(status=404)

    def hang_up(request: web.BaseRequest) -> web.Response:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    async with serving() as server, calling(monkeypatch, clock, {"name": "api", "url": server.url, "method": "POST"}) as executor:
        server.answer = hang_up
        with pytest.raises(StepFailed):
            await executor.execute(FakeWork({}))
        assert known(executor) == {}
        server.answer = refuse
        with pytest.raises(StepFailed):
            await executor.execute(FakeWork({}))
        assert known(executor) == {"tool.api": (0.125, 1)}


async def test_where_a_redirect_leads_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    async with serving() as near, serving() as far:

        def away(request: web.BaseRequest) -> web.Response:
            clock.advance(0.5)
            return web.Response(status=307, headers={"Location": far.url})

        near.answer, far.answer = away, taking(clock, 0.125)
        async with calling(monkeypatch, clock, {"name": "api", "url": near.url}) as executor:
            await executor.execute(FakeWork({}))
            assert known(executor) == {"tool.api": (0.5, 1)}


async def test_each_server_is_probed_once_for_all_its_tools_without_their_headers(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    async with serving() as server, serving() as spared:
        server.answer = taking(clock, 0.125)
        headers = {"Authorization": "Bearer ${KEY}", "X-Key": "${KEY}"}
        async with calling(
            monkeypatch,
            clock,
            {"name": "one", "url": server.url + "/v1/{id}?token=t0ken", "headers": headers},
            {"name": "two", "url": server.url, "method": "DELETE", "headers": headers},
            {"name": "quiet", "url": spared.url, "probe": False},
        ) as executor:
            await executor.probe()
            assert known(executor) == {"tool.one": (0.125, 1), "tool.two": (0.125, 1)}
        (request,) = server.seen
        assert (request.method, request.raw_path) == ("HEAD", "/")
        sent = json.dumps(list(request.headers.items()))
        assert "s3cret" not in sent
        assert "t0ken" not in sent
        assert "Authorization" not in sent
        assert not spared.seen


async def test_a_probe_that_fails_says_nothing_and_the_next_server_is_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ManualClock()
    async with serving() as gone:
        lost = gone.url
    async with serving() as server:
        server.answer = taking(clock, 0.125)
        async with calling(
            monkeypatch,
            clock,
            {"name": "lost", "url": lost},
            {"name": "inside", "url": "http://10.0.0.1/"},
            {"name": "api", "url": server.url},
        ) as executor:
            await executor.probe()
            assert known(executor) == {"tool.api": (0.125, 1)}


async def test_a_probe_takes_no_connection_from_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that holds the probe does not hold a step, though the worker has one slot."""
    probing = asyncio.Event()

    async def hold(request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "HEAD":
            probing.set()
            await asyncio.Event().wait()
        return web.json_response({})

    monkeypatch.setattr(tools, "HttpClient", lambda egress, slots: HttpClient(egress, 1))
    async with serving() as server:
        server.answer = hold
        executor = ToolsExecutor(parse({"tools": {"http": [{"name": "api", "url": server.url}], "egress_allow": ["127.0.0.0/8"]}}))
        await executor.start()
        probe = asyncio.create_task(executor.probe())
        async with asyncio.timeout(10):
            await probing.wait()
            await executor.execute(FakeWork({}))
        assert not probe.done()
        probe.cancel()
        await asyncio.gather(probe, return_exceptions=True)
        await executor.close()
