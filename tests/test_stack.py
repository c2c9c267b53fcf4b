"""End to end: a client, a gateway, nats-server, Triton and workers, each a process of its own."""

import os
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from stack_support import eventually
from stack_world import World, at_rest, key, start_world, tokens, wait_started

from gateway.client import ClientResult, NearloopClient, RetryPolicy
from gateway.errors import AlreadyExists, Cancelled, Expired, InvalidStep, NearloopError, NotFound, StepFailed, Unauthenticated, Unavailable
from gateway.types import EventKind, JobState, Kind, Payload, StepEvent, Target
from workers.lexical import DIMENSIONS, embed

pytestmark = [pytest.mark.stack, pytest.mark.asyncio(loop_scope="module")]

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
MAX_DELIVER = Target(Kind.TOOL, "note").max_deliver


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world() -> AsyncIterator[World]:
    async with start_world() as started:
        yield started


class TestExecute:
    async def test_a_tool(self, world: World) -> None:
        value = {"text": "grüße", "number": 12345678901234567, "nested": [1, {"a": None}]}
        result = await world.client.execute("tool", "echo", value, timeout_s=10)
        assert result.json == value
        assert (result.region, result.attempt) == ("home", 1)
        assert result.worker.startswith("tool-")
        assert result.timing.service_us > 0
        assert result.timing.network_us > 0

    async def test_models_with_json(self, world: World) -> None:
        assert (await world.client.execute("infer", "echo", {"a": [1, 2]}, timeout_s=10)).json == {"a": [1, 2]}
        asked = {"question": "how do I copy a directory tree?", "observations": [], "max_iterations": 6}
        plan: Any = (await world.client.execute("infer", "plan", asked, timeout_s=10)).json
        assert plan["query"] == "copy directory tree"
        inputs = [{"name": "text", "datatype": "BYTES", "shape": [2, 1], "data": ["open a socket", "sort a list"]}]
        answer: Any = (await world.client.execute("infer", "embed", {"inputs": inputs}, timeout_s=10)).json
        (output,) = answer["outputs"]
        assert (output["name"], output["shape"]) == ("embedding", [2, DIMENSIONS])
        found = np.array(output["data"], dtype=np.float32).reshape(2, DIMENSIONS)
        np.testing.assert_allclose(found, embed(["open a socket", "sort a list"]), atol=1e-6)

    async def test_models_with_raw_tensors(self, world: World) -> None:
        texts = np.array([[b"open a socket"], [b"sort a list"]], dtype=np.object_)
        result = await world.client.execute("infer", "embed", {"text": texts}, timeout_s=10)
        np.testing.assert_allclose(result.tensors["embedding"], embed(["open a socket", "sort a list"]), atol=1e-6)
        body = np.array([[b'{"a":1}']], dtype=np.object_)
        echoed = await world.client.execute("infer", "echo", {"json": body}, timeout_s=10)
        assert echoed.tensors["json"].tolist() == [[b'{"a":1}']]

    async def test_what_a_model_refuses_is_told(self, world: World) -> None:
        with pytest.raises(StepFailed, match="observations: missing") as caught:
            await world.client.execute("infer", "plan", {"question": "?"}, timeout_s=10)
        assert (caught.value.code, caught.value.reason) == ("INVALID_ARGUMENT", "MODEL_REFUSED_INPUT")

    async def test_a_decoupled_model_streams(self, world: World) -> None:
        words = "one two three four five six"
        async with aclosing(world.client.stream("infer", "tokens", {"text": words, "delay_ms": 5}, timeout_s=10)) as items:
            *events, last = [item async for item in items]
        assert isinstance(last, ClientResult)
        assert all(isinstance(event, StepEvent) for event in events)
        assert [event.sequence for event in events if isinstance(event, StepEvent)] == list(range(1, len(events) + 1))
        assert [event.kind for event in events if isinstance(event, StepEvent)] == [EventKind.STARTED] + [EventKind.TOKEN] * 6
        assert tokens(events) == words.split()

    async def test_retrieval(self, world: World) -> None:
        points = [{"id": text, "text": text, "payload": {"about": text}} for text in ("copy a directory tree", "open a socket")]
        await world.client.execute("retrieve", "notes", {"op": "upsert", "points": points}, timeout_s=20)
        found: Any = (await world.client.execute("retrieve", "notes", {"op": "query", "text": "copying directory trees", "limit": 1})).json
        assert [hit["payload"]["about"] for hit in found["hits"]] == ["copy a directory tree"]

    async def test_trace_context_arrives_at_the_tool(self, world: World) -> None:
        parent = f"00-{TRACE}-00f067aa0ba902b7-01"
        world.service.headers.clear()
        metadata = [("traceparent", parent), ("tracestate", "vendor=1")]
        result = await world.client.execute("tool", "note", {"text": "hi"}, metadata=metadata, idempotency_key=key(), timeout_s=10)
        assert result.json == {"noted": "hi"}
        (seen,) = world.service.headers
        assert seen["traceparent"].split("-")[1] == TRACE
        assert seen["tracestate"] == "vendor=1"
        assert seen["idempotency-key"]

    async def test_nobody_serves_it(self, world: World) -> None:
        async with NearloopClient(world.stack.gateway_address, retries=RetryPolicy(attempts=1)) as client:
            with pytest.raises(Unavailable) as caught:
                await client.execute("tool", "absent", {}, timeout_s=5)
        assert caught.value.reason == "NO_WORKERS"
        assert caught.value.retry_after_s


class TestDeadlines:
    async def test_execute_ends_at_its_deadline_and_so_does_triton(self, world: World) -> None:
        async with at_rest(world, "busy"):
            with pytest.raises(Expired):
                await world.client.execute("infer", "busy", {"ms": 60_000}, timeout_s=0.5)

    async def test_a_job_that_nobody_takes_expires(self, world: World) -> None:
        job = await world.client.submit("tool", "absent", {}, timeout_s=0.2)
        ended = await eventually(lambda: world.client.get_job(job.id), lambda job: job.ended, 20, "an expired job")
        assert ended.state is JobState.EXPIRED
        assert isinstance(ended.failure, Expired)
        with pytest.raises(Expired):
            [_ async for _ in world.client.watch(job.id, timeout_s=10)]
        assert await world.broker.subjects("NL_STEPS_HOME", f"nl.step.*.*.*.*.{job.id}") == {}

    async def test_a_running_job_expires(self, world: World) -> None:
        async with at_rest(world, "busy"):
            job = await world.client.submit("infer", "busy", {"ms": 60_000}, timeout_s=1)
            with pytest.raises(Expired):
                [_ async for _ in world.client.watch(job.id, timeout_s=15)]
            assert (await world.client.get_job(job.id)).state is JobState.EXPIRED


class TestJobs:
    async def test_a_watch_is_resumed(self, world: World) -> None:
        words = " ".join(f"w{number}" for number in range(12))
        job = await world.client.submit("infer", "tokens", {"text": words, "delay_ms": 50}, timeout_s=20)
        assert job.created
        first: list[StepEvent | ClientResult] = []
        async with aclosing(world.client.watch(job.id, timeout_s=20)) as items:
            async for item in items:
                first.append(item)
                if len(first) == 4:
                    break
        last = first[-1]
        assert isinstance(last, StepEvent)
        async with aclosing(world.client.watch(job.id, attempt=last.attempt, after_sequence=last.sequence, timeout_s=20)) as items:
            rest = [item async for item in items]
        assert isinstance(rest[-1], ClientResult)
        events = [item for item in first + rest if isinstance(item, StepEvent)]
        assert [event.sequence for event in events] == list(range(1, 14))
        assert tokens(first + rest) == words.split()
        ended = await world.client.get_job(job.id)
        assert ended.state is JobState.DONE
        assert ended.result is not None
        assert ended.result.payload == rest[-1].payload

    async def test_the_same_key_is_the_same_job(self, world: World) -> None:
        name = key()
        one = await world.client.submit("tool", "echo", {"n": 1}, idempotency_key=name)
        other = await world.client.submit("tool", "echo", {"n": 1}, idempotency_key=name)
        assert (one.created, other.created, other.id) == (True, False, one.id)
        executed = await world.client.execute("tool", "echo", {"n": 1}, idempotency_key=name, timeout_s=10)
        assert (executed.step_id, executed.json) == (one.id, {"n": 1})
        before = await world.broker.state("NL_STEPS_HOME", "NL_RESULTS")
        for call in (world.client.submit, world.client.execute):
            with pytest.raises(AlreadyExists) as caught:
                await call("tool", "echo", {"n": 2}, idempotency_key=name)
            assert "step.idempotency_key" in caught.value.message
        assert await world.broker.state("NL_STEPS_HOME", "NL_RESULTS") == before
        elsewhere = await world.client.submit("infer", "echo", {"n": 2}, idempotency_key=name)
        assert elsewhere.id != one.id

    async def test_a_queued_job_is_cancelled(self, world: World) -> None:
        job = await world.client.submit("tool", "absent", {"n": 1})
        assert (await world.client.get_job(job.id)).state is JobState.QUEUED
        step = f"nl.step.home.tool.absent.standard.{job.id}"
        assert await world.broker.subjects("NL_STEPS_HOME", step) == {step: 1}
        cancelled = await world.client.cancel(job.id)
        assert cancelled.state is JobState.CANCELLED
        assert isinstance(cancelled.failure, Cancelled)
        await eventually(lambda: world.broker.subjects("NL_STEPS_HOME", step), lambda left: not left, 10, "the step has left its queue")
        assert (await world.client.cancel(job.id)).state is JobState.CANCELLED

    async def test_a_running_job_is_cancelled_and_triton_stops(self, world: World) -> None:
        async with at_rest(world, "busy"):
            job = await world.client.submit("infer", "busy", {"ms": 60_000})
            await wait_started(world.client, job.id)
            assert (await world.client.get_job(job.id)).state is JobState.RUNNING
            assert (await world.client.cancel(job.id)).state is JobState.CANCELLED
        with pytest.raises(Cancelled):
            [_ async for _ in world.client.watch(job.id, timeout_s=10)]
        results = await world.broker.subjects("NL_RESULTS", f"nl.result.*.local.{job.id}")
        assert list(results.values()) == [1]

    async def test_a_job_that_has_ended_is_not_cancelled(self, world: World) -> None:
        job = await world.client.submit("tool", "echo", {"n": 1})
        [_ async for _ in world.client.watch(job.id, timeout_s=10)]
        assert (await world.client.cancel(job.id)).state is JobState.DONE

    async def test_an_unknown_job(self, world: World) -> None:
        with pytest.raises(NotFound):
            await world.client.get_job("home-" + "0" * 32)
        with pytest.raises(InvalidStep, match="job_id"):
            await world.client.get_job("a b")

    async def test_a_worker_that_is_told_to_stop_loses_nothing(self, world: World) -> None:
        world.service.headers.clear()
        world.service.may_answer.clear()
        names = [key() for _ in range(20)]
        jobs = [await world.client.submit("tool", "note", {"text": name}, idempotency_key=name) for name in names]

        async def calls() -> int:
            return len(world.service.headers)

        await eventually(calls, lambda count: count >= 4, 15, "every slot is busy")
        part = world.stack.part("tool-home")
        restarts = part.restarts
        os.kill(part.pid, signal.SIGTERM)

        async def drains() -> bool:
            return "drains" in part.log.tail()

        await eventually(drains, bool, 10, "the worker drains")
        world.service.may_answer.set()
        results = [[item async for item in world.client.watch(job.id, timeout_s=30)][-1] for job in jobs]
        assert [result.json for result in results if isinstance(result, ClientResult)] == [{"noted": name} for name in names]
        assert part.restarts == restarts + 1
        # What ran was finished and what waited was handed back: nothing had to be executed again.
        assert Counter(headers["idempotency-key"] for headers in world.service.headers) == dict.fromkeys(names, 1)

    async def test_a_job_waits_until_the_api_is_back(self, world: World) -> None:
        world.service.headers.clear()
        world.service.is_down = True
        try:
            job = await world.client.submit("tool", "note", {"text": "hi"}, idempotency_key=key(), timeout_s=300)

            async def calls() -> int:
                return len(world.service.headers)

            await eventually(calls, lambda count: count > MAX_DELIVER, 60, "more calls than deliveries may fail")
            assert (await world.client.get_job(job.id)).ended is False
        finally:
            world.service.is_down = False
        *_, last = [item async for item in world.client.watch(job.id, timeout_s=30)]
        assert isinstance(last, ClientResult)
        assert (last.json, last.attempt) == ({"noted": "hi"}, len(world.service.headers))
        assert await world.broker.subjects("NL_DEAD", f"nl.dead.*.*.*.{job.id}") == {}


def big() -> Payload:
    return Payload(b'"' + b"x" * (1024 * 1024) + b'"')


def array(*shape: int, dtype: Any = np.object_) -> Any:
    return np.full(shape, b"x" if dtype is np.object_ else 1, dtype=dtype)


# What is sent, the error, and what its text names.
BAD: dict[str, tuple[dict[str, Any], type[NearloopError], str]] = {
    "unknown target": ({"target": "ecko"}, NotFound, "ecko"),
    "a run": ({"kind": "run", "target": "loop"}, InvalidStep, "step.kind"),
    "wrong kind": ({"kind": "infer", "target": "note", "input": {"text": "x"}}, InvalidStep, "step.kind"),
    "bad target": ({"target": "a.b"}, InvalidStep, "step.target"),
    "bad run": ({"run": "a b"}, InvalidStep, "step.run"),
    "bad key": ({"idempotency_key": "x" * 65}, InvalidStep, "step.idempotency_key"),
    "negative timeout": ({"timeout_s": -1.0}, InvalidStep, "step.timeout"),
    "too long a timeout": ({"timeout_s": 1e6}, InvalidStep, "step.timeout"),
    "oversized": ({"input": big()}, InvalidStep, "step.input"),
    "no JSON": ({"input": Payload(b"{")}, InvalidStep, "step.input"),
    "JSON against the schema": ({"target": "note", "input": {"text": 5}}, InvalidStep, "step.input.text"),
    "unknown field": ({"target": "note", "input": {"text": "x", "more": 1}}, InvalidStep, "more"),
    "tensor shape": ({"kind": "infer", "target": "embed", "input": {"text": array(2)}}, InvalidStep, "shape"),
    "tensor type": ({"kind": "infer", "target": "embed", "input": {"text": array(1, 1, dtype=np.float32)}}, InvalidStep, "datatype"),
    "tensor name": ({"kind": "infer", "target": "embed", "input": {"words": array(1, 1)}}, InvalidStep, "text"),
    "too large a batch": ({"kind": "infer", "target": "embed", "input": {"text": array(65, 1)}}, InvalidStep, "batch"),
    "unknown tenant": ({"api_key": "nobody-has-it"}, Unauthenticated, "key"),
}


@pytest.mark.parametrize("name", BAD)
async def test_bad_input_is_refused_before_anything_is_stored(world: World, name: str) -> None:
    asked, kind, named = BAD[name]
    arguments = {"kind": "tool", "target": "echo", "input": {"a": 1}, **asked}
    arguments.pop("api_key", None)
    streams = ("NL_STEPS_HOME", "NL_RESULTS", "NL_DEAD")
    before = await world.broker.state(*streams)
    async with NearloopClient(world.stack.gateway_address, api_key=asked.get("api_key")) as client:
        if "timeout_s" not in asked or asked["timeout_s"] > 0:
            with pytest.raises(kind) as executed:
                await client.execute(**arguments)
            assert named in executed.value.message
        with pytest.raises(kind) as submitted:
            await client.submit(**arguments)
        assert named in submitted.value.message
        if isinstance(submitted.value, InvalidStep):
            assert any(named in f"{field} {text}" for field, text in submitted.value.fields)
    assert await world.broker.state(*streams) == before
