"""Runs through the client: what goes out, what comes back, what happens when a gateway goes away."""

import asyncio
import json
import math
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_runs import PLACED, SOURCE, FakeRuns, ended, never, serving, started, told
from fake_service import ALICE
from test_client import FAST, collect

from gateway.client import ClientRun, NearloopClient, RunOutput, RunStarted
from gateway.clock import SystemClock
from gateway.errors import AlreadyExists, Expired, InvalidStep, NearloopError, NotFound, Rejected, StepFailed, Unavailable
from gateway.program.dump import dump_program
from gateway.program.parse import load_text
from gateway.run_types import RunOrder, StepEnded, StepStarted, StepToken, Summary
from gateway.types import Completed, JobState, Lane, StepEvent

Events = AsyncGenerator[StepEvent | Completed, None]
INPUT: dict[str, Any] = {"name": "x"}
PROGRAM = load_text(SOURCE, "x.yaml")


@asynccontextmanager
async def connected(*services: FakeRuns, **options: Any) -> AsyncIterator[NearloopClient]:
    """A client of one or two gateways; the first one is asked first."""
    async with serving(services[0]) as one, serving(services[-1]) as two:
        addresses = [f"127.0.0.1:{port}" for port in (one, two)[: len(services)]]
        async with NearloopClient(addresses, ALICE, retries=FAST, **options) as client:
            yield client


def failing(*errors: NearloopError) -> Any:
    left = list(errors)

    def act(order: RunOrder) -> None:
        if left:
            raise left.pop(0)

    return act


async def test_a_run_is_told_as_values() -> None:
    runs = FakeRuns()
    async with connected(runs, region="near") as client:
        options: dict[str, Any] = {"lane": "batch", "regions": ["iad"], "allow": ["tool.docs", "tool.echo"], "tokens": True, "speculate": 3}
        items = await collect(client.run(SOURCE, INPUT, timeout_s=9, **options))
    (order,) = runs.orders
    assert (order.tenant, order.client_region, order.lane, order.regions) == ("alice", "near", Lane.BATCH, ("iad",))
    assert (order.allow, order.tokens, order.speculate, order.input) == (("tool.docs", "tool.echo"), True, 3, INPUT)
    assert len(order.idempotency_key) == 32
    assert order.deadline_s <= SystemClock().wall_s() + 9
    accepted = items.pop(0)
    assert isinstance(accepted, ClientRun)
    assert (accepted.id, accepted.state, accepted.program, accepted.region) == (next(iter(runs.runs)), JobState.QUEUED, "greet", "iad")
    assert (accepted.placement, accepted.ended, accepted.created_s) == (PLACED, False, 1000.0)
    assert items == [
        RunStarted("iad", "run-1", 1),
        StepStarted("look", "look", "tool", "docs"),
        StepEnded("look", "look", output={"n": 1, "big": 2**60}, region="iad", worker="tool-1", took_us=2100),
        StepStarted("each/0/say", "say", "tool", "echo", attempt=2),
        StepEnded("each/0/say", "say", 2, code="UNAVAILABLE", reason="DOWN", message="is down", took_us=50),
        StepToken("think", "Hel"),
        StepToken("think", "lo"),
        StepEnded("large", "large", size_bytes=70_000, replayed=True, speculated=True),
        Summary("iad", "run-1", 3, 2.5, 40, 4_000, 156_000, 2, 1),
        RunOutput({"text": "hello", "big": 2**60}, "iad", "run-1"),
    ]


async def test_a_program_can_be_given_in_every_form(tmp_path: Path) -> None:
    runs = FakeRuns()
    yaml, document = tmp_path / "p.yaml", tmp_path / "p.json"
    yaml.write_text(SOURCE)
    document.write_text(json.dumps(dump_program(PROGRAM)))
    async with connected(runs) as client:
        for program in (PROGRAM, SOURCE, yaml, document, dump_program(PROGRAM)):
            assert await client.run_to_end(program, INPUT) == {"text": "hello", "big": 2**60}
        with pytest.raises(ValueError, match="the program is not JSON"):
            await client.run_to_end({"program": object()}, INPUT)
        with pytest.raises(ValueError, match="the input is not JSON"):
            await client.run_to_end(PROGRAM, object())  # type: ignore[arg-type]  # on purpose
        with pytest.raises(FileNotFoundError):
            await client.run_to_end(tmp_path / "none.yaml", INPUT)
    assert [order.program for order in runs.orders] == [PROGRAM] * 5
    assert len({order.idempotency_key for order in runs.orders}) == 5


async def test_numbers_stay_what_they_are() -> None:
    runs = FakeRuns()
    program = {"program": "nearloop/v1", "name": "p", "steps": [{"id": "a", "tool": "echo", "input": {"n": 2**60 + 1}}]}
    async with connected(runs) as client:
        await client.run_to_end(program, 2**60 + 1)
    assert runs.orders[0].input == 2**60 + 1
    assert json.loads(runs.orders[0].document)["steps"][0]["input"] == {"n": 2**60 + 1}


async def test_what_is_wrong_is_said_with_fields_and_not_sent_again() -> None:
    runs = FakeRuns()
    async with connected(runs) as client:
        with pytest.raises(InvalidStep) as caught:
            await client.run_to_end(SOURCE.replace("echo", "ecko"), {"name": 1})
        with pytest.raises(InvalidStep):
            await client.place_run("", {})
    assert [name for name, _ in caught.value.fields] == ["run.source.steps[1].tool"]
    assert runs.orders == []


async def test_before_it_is_accepted_the_same_run_is_asked_for_again() -> None:
    one, two = FakeRuns(), FakeRuns()
    one.on_order = failing(Rejected("full", retry_after_s=0.001), Unavailable("the connection broke"))
    async with connected(one, two) as client:
        items = await collect(client.run(SOURCE, INPUT))
    assert isinstance(items[-1], RunOutput)
    assert (len(one.orders), len(two.orders)) == (2, 1)
    assert len({order.idempotency_key for order in one.orders + two.orders}) == 1


async def test_a_key_is_kept_and_its_misuse_is_told() -> None:
    runs = FakeRuns()
    runs.on_order = failing(AlreadyExists("another program"))
    async with connected(runs) as client:
        with pytest.raises(AlreadyExists):
            await client.run_to_end(SOURCE, INPUT, idempotency_key="mine")
    assert [order.idempotency_key for order in runs.orders] == ["mine"]


async def test_an_accepted_run_goes_on_at_the_next_gateway_where_it_was() -> None:
    one, two = FakeRuns(), FakeRuns()

    async def first(order: RunOrder) -> Events:
        yield started(1)
        yield told(2, StepToken("a", "one"))
        raise Unavailable("the gateway goes")

    async def second(attempt: int, after: int) -> Events:
        yield told(2, StepToken("a", "one"))  # once more: the client has it already
        yield told(3, StepToken("a", "two"))
        yield started(1, attempt=2)  # on another runner
        yield told(2, StepEnded("a", "a", output="one two", replayed=True), attempt=2)
        yield ended(b'"end"', attempt=2)

    one.on_run, two.on_watch = first, second
    async with connected(one, two) as client:
        items = await collect(client.run(SOURCE, INPUT))
    (run_id,) = one.runs
    assert two.calls == [("watch", "alice", run_id, 1, 2)]
    assert two.orders == []
    assert items[1:] == [
        RunStarted("iad", "run-1", 1),
        StepToken("a", "one"),
        StepToken("a", "two"),
        RunStarted("iad", "run-1", 2),
        StepEnded("a", "a", output="one two", replayed=True),
        RunOutput("end", "iad", "run-1"),
    ]


async def test_a_run_survives_that_its_only_gateway_restarts() -> None:
    runs, streaming = FakeRuns(), asyncio.Event()

    async def first(order: RunOrder) -> Events:
        yield started(1)
        streaming.set()
        await asyncio.Event().wait()

    async def second(attempt: int, after: int) -> Events:
        yield ended(b"1")

    runs.on_run, runs.on_watch = first, second
    async with serving(runs) as port:
        client = NearloopClient(f"127.0.0.1:{port}", ALICE, retries=FAST)
        output = asyncio.create_task(client.run_to_end(SOURCE, INPUT))
        await streaming.wait()
    async with client, serving(runs, listen=f"127.0.0.1:{port}"):
        assert await output == 1
    assert len(runs.orders) == 1
    assert {call[0] for call in runs.calls} == {"watch"}


async def test_a_watch_that_the_gateway_ends_for_its_age_goes_on() -> None:
    runs, watches = FakeRuns(), 0

    async def act(attempt: int, after: int) -> Events:
        nonlocal watches
        watches += 1
        if watches == 7:  # more than RetryPolicy.attempts
            yield ended(b"1")
        yield told(watches, StepToken("a", str(watches)))
        await asyncio.Event().wait()

    runs.on_watch = act
    async with serving(runs, max_timeout_s=0.05) as port, NearloopClient(f"127.0.0.1:{port}", ALICE, retries=FAST) as client:
        items = await collect(client.watch_run("home-1"))
    assert [item.text for item in items[:-1]] == list("123456")
    assert items[-1] == RunOutput(1, "iad", "run-1")
    assert [call[4] for call in runs.calls] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("error", [StepFailed("x", code="UNAVAILABLE"), NotFound("x"), Expired("x"), StepFailed("y", code="ABORTED")])
@pytest.mark.parametrize("watching", [True, False])
async def test_a_run_ends_with_its_error(error: NearloopError, watching: bool) -> None:
    runs = FakeRuns()

    async def act(*asked: Any) -> Events:
        yield started()
        raise error

    runs.on_run = runs.on_watch = act
    async with connected(runs) as client:
        items = client.watch_run("home-1") if watching else client.run(SOURCE, INPUT)
        with pytest.raises(type(error)) as caught:
            await collect(items)
    assert caught.value.code == error.code
    assert len(runs.calls) == watching
    assert len(runs.orders) == (not watching)


async def test_leaving_closes_the_stream_and_the_run_goes_on() -> None:
    runs = FakeRuns()
    runs.on_run = never
    async with connected(runs) as client:
        async with aclosing(client.run(SOURCE, INPUT)) as items:
            accepted = await anext(items)
            assert isinstance(accepted, ClientRun)
        await runs.closed.wait()
        assert (await client.get_run(accepted.id)).state is JobState.QUEUED
    assert runs.calls == [("get", "alice", accepted.id)]


async def test_the_time_of_a_run_is_the_callers() -> None:
    runs = FakeRuns()
    runs.on_run = never

    async def silent(attempt: int, after: int) -> Events:
        await asyncio.Event().wait()
        yield started()

    runs.on_watch = silent
    async with connected(runs) as client:
        with pytest.raises(Expired):
            await client.run_to_end(SOURCE, INPUT, timeout_s=0.1)
        with pytest.raises(Expired):
            await collect(client.watch_run("home-1", timeout_s=0.1))


async def test_runs_are_submitted_found_and_cancelled() -> None:
    runs = FakeRuns()
    async with connected(runs) as client:
        first = await client.submit_run(PROGRAM, INPUT, idempotency_key="k", timeout_s=600)
        again = await client.submit_run(PROGRAM, INPUT, idempotency_key="k")
        other = await client.submit_run(PROGRAM, INPUT)
        assert (first.created, again.created, other.created) == (True, False, True)
        assert first.id == again.id != other.id
        assert 590 < first.expires_s - SystemClock().wall_s() <= 600
        runs.end(first.id, b"[1]")
        found = await client.get_run(first.id)
        assert (found.state, found.ended, found.result) == (JobState.DONE, True, RunOutput([1], "iad", "run-1"))
        assert [(step.key, step.output, step.size_bytes) for step in found.steps] == [
            ("look", {"n": 2**60}, 0),
            ("each/0/say", None, 70_000),
        ]
        gone = await client.cancel_run(other.id)
        assert gone.state is JobState.CANCELLED
        assert gone.failure is not None
        assert (gone.failure.code, gone.failure.reason) == ("CANCELLED", "CANCELLED")
        with pytest.raises(NotFound):
            await client.get_run("home-nothing")


async def test_placement() -> None:
    runs = FakeRuns()
    async with connected(runs) as client:
        placement = await client.place_run(SOURCE, INPUT, regions=["iad"])
    assert placement == PLACED
    assert math.isinf(placement.estimates[2].dead_s)
    assert runs.orders[0].regions == ("iad",)


async def test_a_gateway_without_runs_says_so() -> None:
    async with serving(None) as port, NearloopClient(f"127.0.0.1:{port}", ALICE) as client:
        with pytest.raises(NearloopError) as caught:
            await client.run_to_end(SOURCE, INPUT)
    assert (caught.value.code, caught.value.reason) == ("UNIMPLEMENTED", "RUNS_NOT_OFFERED")
