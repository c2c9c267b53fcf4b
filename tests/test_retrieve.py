"""The retrieve executor on an embedded store, and the adapter against a server that answers like a cluster."""

import json
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from aiohttp import web

from gateway.config import parse
from gateway.errors import ConfigError, InvalidStep, NotFound, Rejected, StepFailed, Unavailable
from gateway.types import TENSORS, Kind, Payload, Step
from nearloop.v1 import gateway_pb2 as pb
from workers.embedding import TensorEmbedder
from workers.retrieve import RetrieveExecutor
from workers.vector_store import VectorStore

WORDS = ("apple", "pear", "car", "bus")


class FakeWork:
    def __init__(self, data: object, target: str = "docs") -> None:
        body = Payload(data if isinstance(data, bytes) else json.dumps(data).encode())
        self.step = Step("s", "acme", Kind.RETRIEVE, target, body, 0.0)
        self.attempt = 1
        self.queue_region = "home"
        self.leaving = False

    def remaining_s(self) -> float:
        return 30.0

    def emit(self, token: Payload) -> None: ...

    def progress(self, fraction: float, message: str) -> None: ...


async def embed(texts: list[str]) -> list[list[float]]:
    """Counts words of WORDS."""
    return [[float(text.split().count(word)) for word in WORDS] for text in texts]


@asynccontextmanager
async def running(embedder: Any = embed, dimensions: int = 4, **section: object) -> AsyncIterator[Callable[[object], Awaitable[Any]]]:
    config = parse({"retrieve": {"collections": [{"name": "docs", "dimensions": dimensions}], **section}})
    executor = RetrieveExecutor(config, embedder, environ={})
    await executor.start()
    assert executor.ready("docs")

    async def call(data: object) -> Any:
        output = await executor.execute(FakeWork(data))
        assert output.content_type == "application/json"
        return json.loads(output.data)

    try:
        yield call
    finally:
        await executor.close()
        assert not executor.ready("docs")


FRUIT = {
    "op": "upsert",
    "points": [
        {"id": "f/1", "text": "apple apple pear", "payload": {"kind": "fruit", "n": 1, "ok": True}},
        {"id": 7, "vector": [0, 3, 0, 0], "payload": {"kind": "fruit", "n": 2, "deep": {"x": [1]}}},
        {"id": "v-1", "text": "car bus", "payload": {"kind": "vehicle", "n": 2}},
    ],
}


async def test_upsert_query_count() -> None:
    async with running() as call:
        assert await call({"op": "count"}) == {"count": 0}
        assert await call({"op": "query", "text": "apple"}) == {"hits": []}
        assert await call(FRUIT) == {"upserted": 3}
        assert await call({"op": "count"}) == {"count": 3}
        hits = (await call({"op": "query", "text": "apple pear", "limit": 2}))["hits"]
        assert [hit["id"] for hit in hits] == ["f/1", 7]
        assert hits[0]["score"] == pytest.approx(3 / math.sqrt(10), abs=1e-6)
        assert hits[0]["payload"] == {"kind": "fruit", "n": 1, "ok": True}
        hits = (await call({"op": "query", "vector": [0, 5, 0, 0], "limit": 1}))["hits"]
        assert (hits[0]["id"], hits[0]["payload"]["deep"]) == (7, {"x": [1]})
        assert hits[0]["score"] == pytest.approx(1.0, abs=1e-6)


async def test_the_same_id_replaces() -> None:
    async with running() as call:
        await call(FRUIT)
        await call(FRUIT)
        await call({"op": "upsert", "points": [{"id": "f/1", "text": "bus", "payload": {"new": 1}}]})
        assert await call({"op": "count"}) == {"count": 3}
        hits = (await call({"op": "query", "text": "bus", "limit": 1}))["hits"]
        assert (hits[0]["id"], hits[0]["payload"]) == ("f/1", {"new": 1})


async def test_delete_takes_numbers_and_texts_that_are_there_or_not() -> None:
    async with running() as call:
        await call(FRUIT)
        assert await call({"op": "delete", "ids": ["f/1", 7, "7", 8]}) == {"deleted": 4}
        assert [hit["id"] for hit in (await call({"op": "query", "text": "apple"}))["hits"]] == ["v-1"]
        assert await call({"op": "delete", "ids": ["f/1"]}) == {"deleted": 1}
        assert await call({"op": "count"}) == {"count": 1}


@pytest.mark.parametrize(
    ("equal", "ids"),
    [
        ({"kind": "fruit"}, {"f/1", 7}),
        ({"kind": "fruit", "n": 2}, {7}),
        ({"n": [1, 2]}, {"f/1", 7, "v-1"}),
        ({"kind": ["vehicle", "ship"]}, {"v-1"}),
        ({"ok": True}, {"f/1"}),
        ({"deep.x": 1}, {7}),
        ({"kind": "ship"}, set()),
    ],
)
async def test_filter(equal: dict[str, object], ids: set[object]) -> None:
    async with running() as call:
        await call(FRUIT)
        hits = (await call({"op": "query", "text": "apple", "filter": equal}))["hits"]
        assert {hit["id"] for hit in hits} == ids


BAD = [
    {},
    {"op": "drop"},
    {"op": "query"},
    {"op": "query", "text": "a", "vector": [1, 2, 3, 4]},
    {"op": "query", "text": ""},
    {"op": "query", "text": "a", "limit": 101},
    {"op": "query", "text": "a", "limit": 0},
    {"op": "query", "text": "a", "more": 1},
    {"op": "query", "vector": [1, 2, 3]},
    {"op": "query", "vector": ["x", 2, 3, 4]},
    {"op": "query", "text": "a", "filter": {"f": None}},
    {"op": "query", "text": "a", "filter": {"f": []}},
    {"op": "upsert", "points": []},
    {"op": "upsert", "points": [{"id": -1, "text": "a"}]},
    {"op": "upsert", "points": [{"id": "", "text": "a"}]},
    {"op": "upsert", "points": [{"id": 1.5, "text": "a"}]},
    {"op": "upsert", "points": [{"text": "a"}]},
    {"op": "upsert", "points": [{"id": 1}]},
    {"op": "upsert", "points": [{"id": 1, "text": "a"}] * 1001},
    {"op": "count", "text": "a"},
    {"op": "delete"},
    {"op": "delete", "ids": []},
    {"op": "delete", "ids": [-1]},
    {"op": "delete", "ids": [""]},
    {"op": "delete", "ids": [1] * 1001},
    [],
]


@pytest.mark.parametrize("data", BAD)
async def test_schema_and_executor_refuse_the_same(data: object) -> None:
    executor = RetrieveExecutor(parse({"retrieve": {"collections": [{"name": "docs", "dimensions": 4}]}}), embed)
    await executor.start()
    schema = jsonschema_rs.validator_for(executor.targets()[0].input_schema)
    assert not schema.is_valid(data)
    with pytest.raises(InvalidStep):
        await executor.execute(FakeWork(data))
    await executor.close()


async def test_target_and_schema_of_good_input() -> None:
    executor = RetrieveExecutor(parse({"retrieve": {"collections": [{"name": "docs", "dimensions": 4}], "slots": 3}}), embed)
    (target,) = executor.targets()
    assert (target.kind, target.name, target.slots, target.idempotent, target.read_only) == (Kind.RETRIEVE, "docs", 3, True, False)
    schema = jsonschema_rs.validator_for(target.input_schema)
    for data in (
        FRUIT,
        {"op": "count"},
        {"op": "delete", "ids": [7, "f/1"]},
        {"op": "query", "text": "a", "filter": {"a": 1, "b": ["x"]}},
        {"op": "query", "vector": [1, 2, 3, 4.5]},
    ):
        schema.validate(data)


async def test_what_is_refused_beyond_the_schema() -> None:
    async with running() as call:
        for data in (
            b"{",
            b'{"op":"query","vector":[1,2,3,NaN]}',
            {"op": "upsert", "points": [{"id": 1, "text": "a", "payload": {"_id": 1}}]},
        ):
            with pytest.raises(InvalidStep):
                await call(data)
        points = [{"id": 1, "text": "x" * 100_000}, {"id": 2, "vector": [1, 2, 3]}]
        with pytest.raises(InvalidStep) as caught:
            await call({"op": "upsert", "points": points})
        assert caught.value.fields[0][0] == "input.points.1.vector"
        assert await call({"op": "count"}) == {"count": 0}


async def test_a_path_keeps_the_points(tmp_path: Path) -> None:
    path = str(tmp_path / "store")
    async with running(path=path) as call:
        await call(FRUIT)
        with pytest.raises(Unavailable, match="cannot be opened"):
            async with running(path=path):
                pass
    async with running(path=path) as call:
        assert await call({"op": "count"}) == {"count": 3}
        assert (await call({"op": "query", "text": "car bus", "limit": 1}))["hits"][0]["id"] == "v-1"
    with pytest.raises(ConfigError, match="has 4 dimensions, the configuration says 5"):
        async with running(path=path, dimensions=5):
            pass


async def test_configuration_mistakes() -> None:
    collections = [{"name": "a"}, {"name": "a"}, {"name": "b", "embed_target": "other"}]
    executor = RetrieveExecutor(parse({"retrieve": {"collections": collections, "api_key_env": "NO_SUCH"}}), embed, environ={})
    with pytest.raises(ConfigError) as caught:
        await executor.start()
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("raised", "expected", "reason"),
    [
        (Unavailable("down"), Unavailable, "UNAVAILABLE"),
        (Rejected("busy", retry_after_s=2.0), Unavailable, "OVERLOADED"),
        (NotFound("no embed"), StepFailed, "NOT_FOUND"),
        (StepFailed("bad", code="INVALID_ARGUMENT"), StepFailed, "STEP_FAILED"),
    ],
)
async def test_errors_of_the_embedding(raised: Exception, expected: type[Exception], reason: str) -> None:
    async def failing(texts: list[str]) -> list[list[float]]:
        raise raised

    async with running(failing) as call:
        with pytest.raises(expected) as caught:
            await call({"op": "query", "text": "a"})
        assert caught.value.reason == reason  # type: ignore[attr-defined]


async def test_embedding_of_another_dimension() -> None:
    async with running(dimensions=5) as call:
        with pytest.raises(StepFailed, match="5 numbers"):
            await call({"op": "query", "text": "a"})


# ---- embedding through tensors -------------------------------------------------------------------------------------------------


def read_texts(payload: Payload) -> list[str]:
    (tensor,) = pb.Tensors.FromString(payload.data).tensors
    assert (payload.content_type, tensor.name, tensor.datatype) == (TENSORS, "text", "BYTES")
    texts, at = [], 0
    while at < len(tensor.contents):
        size = int.from_bytes(tensor.contents[at : at + 4], "little")
        texts.append(tensor.contents[at + 4 : at + 4 + size].decode())
        at += 4 + size
    assert list(tensor.shape) == [len(texts), 1]
    return texts


def embedding(matrix: Any, **changes: Any) -> Payload:
    array = np.asarray(matrix, dtype="<f4")
    tensor = {"name": "embedding", "datatype": "FP32", "shape": array.shape, "contents": array.tobytes(), **changes}
    return Payload(pb.Tensors(tensors=[pb.Tensor(**tensor)]).SerializeToString(), TENSORS)


async def test_tensor_embedder_batches() -> None:
    sizes = []

    async def execute(payload: Payload) -> Payload:
        texts = read_texts(payload)
        sizes.append(len(texts))
        return embedding([[len(text.encode()), 0.5] for text in texts])

    texts = ["é" * number for number in range(150)]
    assert await TensorEmbedder(execute)(texts) == [[2.0 * number, 0.5] for number in range(150)]
    assert sizes == [64, 64, 22]


@pytest.mark.parametrize(
    "answer",
    [
        Payload(b"{}"),
        Payload(b"\xff\xff", TENSORS),
        Payload(b"", TENSORS),
        embedding([[1.0], [2.0]]),
        embedding([1.0]),
        embedding([[1.0]], datatype="FP64"),
        embedding([[1.0]], contents=b"123"),
        embedding([[1.0]], shape=[1, 2]),
    ],
)
async def test_tensor_embedder_refuses_other_answers(answer: Payload) -> None:
    async def execute(payload: Payload) -> Payload:
        return answer

    with pytest.raises(StepFailed) as caught:
        await TensorEmbedder(execute)(["a"])
    assert caught.value.reason == "EMBEDDING_INVALID"


# ---- a cluster -----------------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def answering(status: int, body: object) -> AsyncIterator[tuple[str, list[web.BaseRequest]]]:
    seen = []

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        seen.append(request)
        return web.json_response(body, status=status)

    runner = web.ServerRunner(web.Server(handle), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", seen
    finally:
        await runner.cleanup()


async def test_cluster_gets_the_key() -> None:
    async with answering(200, {"result": {"count": 3}, "status": "ok", "time": 0.1}) as (url, seen):
        store = VectorStore(url, api_key="k-1")
        await store.open()
        assert await store.count("docs") == 3
        await store.close()
    assert (seen[0].path, seen[0].headers["api-key"]) == ("/collections/docs/points/count", "k-1")


@pytest.mark.parametrize(("status", "expected"), [(503, Unavailable), (429, Unavailable), (403, StepFailed), (400, StepFailed)])
async def test_cluster_errors(status: int, expected: type[Exception]) -> None:
    async with answering(status, {"status": {"error": "private"}}) as (url, _):
        store = VectorStore(url)
        await store.open()
        with pytest.raises(expected) as caught:
            await store.count("docs")
        assert "private" not in str(caught.value)
        await store.close()


async def test_cluster_that_is_down() -> None:
    async with answering(200, {}) as (url, _):
        pass
    with pytest.raises(Unavailable):
        async with running(url=url):
            pass
