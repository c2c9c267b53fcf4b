"""Collections in shards: the executor asks itself, and each shard can be away in its own way."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from test_retrieve import FakeWork, embed

from gateway.config import parse
from gateway.errors import ConfigError, Denied, Expired, InvalidStep, NearloopError, Rejected, StepFailed, Unavailable
from gateway.types import Kind, Payload, Target
from workers.retrieve import RetrieveExecutor
from workers.scatter import Scatter
from workers.shards import shard_of

SHARDS = ["docs-0", "docs-1", "docs-2"]


class Rig:
    """An executor with the collection `docs` in three shards, which are its own too; `errors` says which of them do not answer."""

    def __init__(self, missing: str, dimensions: int = 4, max_input_bytes: int = 1024 * 1024) -> None:
        own = [{"name": name, "dimensions": 4} for name in SHARDS] if dimensions == 4 else []
        whole = {"name": "docs", "dimensions": dimensions, "shards": SHARDS, "missing": missing}
        config = parse({"retrieve": {"collections": [*own, whole]}, "gateway": {"max_input_bytes": max_input_bytes}})
        self.executor = RetrieveExecutor(config, self.embed, environ={}, calls=self)
        self.errors: dict[str, NearloopError] = {}
        self.answers: dict[str, bytes] = {}
        self.known: dict[str, Target] = {}
        self.hangs: set[str] = set()
        self.asked: list[tuple[str, Any, float]] = []
        self.texts: list[str] = []
        self.cancelled: list[str] = []

    async def embed(self, texts: list[str]) -> list[list[float]]:
        self.texts += texts
        return await embed(texts)

    async def retrieve(self, collection: str, payload: Payload, before_s: float) -> Payload:
        self.asked.append((collection, json.loads(payload.data), before_s))
        if collection in self.hangs:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled.append(collection)
                raise
        await asyncio.sleep(0)
        if collection in self.errors:
            raise self.errors[collection]
        if collection in self.answers:
            return Payload(self.answers[collection])
        return await self.executor.execute(FakeWork(payload.data, collection))

    def collection(self, name: str) -> Target | None:
        return self.known.get(name)

    async def call(self, data: object, target: str = "docs", left_s: float = 30.0) -> Any:
        work = FakeWork(data, target)
        work.remaining_s = lambda: left_s  # type: ignore[method-assign]
        return json.loads((await self.executor.execute(work)).data)


@asynccontextmanager
async def running(missing: str = "fail", **settings: Any) -> AsyncIterator[Rig]:
    rig = Rig(missing, **settings)
    await rig.executor.start()
    try:
        yield rig
    finally:
        await rig.executor.close()
        assert not rig.executor.ready("docs")


def points(count: int) -> list[dict[str, Any]]:
    """Each nearer to `apple` than the next."""
    return [{"id": f"p{n}", "vector": [10 * count - n, n, 0, 0], "payload": {"n": n}} for n in range(count)]


async def test_what_one_collection_does_three_shards_do() -> None:
    async with running() as rig:
        assert rig.executor.ready("docs")
        assert await rig.call({"op": "upsert", "points": points(40)}) == {"upserted": 40}
        counts = [(await rig.call({"op": "count"}, shard))["count"] for shard in SHARDS]
        assert sum(counts) == 40
        assert all(counts)
        assert await rig.call({"op": "count"}) == {"count": 40}
        hits = (await rig.call({"op": "query", "text": "apple", "limit": 7}))["hits"]
        assert [hit["id"] for hit in hits] == [f"p{n}" for n in range(7)]
        assert hits[3]["payload"] == {"n": 3}
        hits = (await rig.call({"op": "query", "vector": [1, 0, 0, 0], "filter": {"n": [5, 9]}}))["hits"]
        assert [hit["id"] for hit in hits] == ["p5", "p9"]
        assert await rig.call({"op": "delete", "ids": ["p0", "p1", "none"]}) == {"deleted": 3}
        hits = (await rig.call({"op": "query", "text": "apple", "limit": 2}))["hits"]
        assert [hit["id"] for hit in hits] == ["p2", "p3"]


async def test_a_text_is_embedded_once_and_a_points_text_by_its_shard() -> None:
    async with running() as rig:
        await rig.call({"op": "query", "text": "apple"})
        assert rig.texts == ["apple"]
        assert [(shard, body["vector"]) for shard, body, _ in rig.asked] == [(shard, [1, 0, 0, 0]) for shard in SHARDS]
        rig.texts.clear()
        await rig.call({"op": "upsert", "points": [{"id": n, "text": f"car {n}"} for n in range(9)]})
        assert sorted(rig.texts) == [f"car {n}" for n in range(9)]


async def test_a_point_in_two_shards_counts_once_and_a_delete_reaches_both() -> None:
    async with running() as rig:
        here = shard_of("p", SHARDS)
        there = next(shard for shard in SHARDS if shard != here)
        await rig.call({"op": "upsert", "points": [{"id": "p", "text": "apple"}]}, there)  # where it was with other shards
        await rig.call({"op": "upsert", "points": [{"id": "p", "text": "apple pear"}]})
        hits = (await rig.call({"op": "query", "text": "apple"}))["hits"]
        assert [(hit["id"], hit["score"]) for hit in hits] == [("p", pytest.approx(1.0, abs=1e-6))]
        await rig.call({"op": "delete", "ids": ["p"]})
        assert await rig.call({"op": "count"}) == {"count": 0}


AWAY = [
    Unavailable("no worker serves it"),
    Rejected("busy"),
    Denied("never"),
    Expired("too late"),
    StepFailed("given up", code="ABORTED"),
    StepFailed("store", reason="STORE_ERROR"),
]


@pytest.mark.parametrize("error", AWAY)
@pytest.mark.parametrize("op", ["query", "count"])
async def test_a_missing_shard_fails_the_step_or_marks_the_answer(op: str, error: NearloopError) -> None:
    asked = {"op": "count"} if op == "count" else {"op": "query", "text": "apple"}
    async with running("fail") as rig:
        rig.errors["docs-1"] = error
        with pytest.raises(StepFailed, match="shard 'docs-1' of collection 'docs'") as caught:
            await rig.call(asked)
        assert (caught.value.code, caught.value.reason) == (error.code, "SHARD_MISSING")
        assert error.message in caught.value.message
    async with running("partial") as rig:
        await rig.call({"op": "upsert", "points": points(20)})
        rig.errors["docs-1"] = error
        answer = await rig.call(asked)
        assert (answer["partial"], answer["missing"]) == (True, ["docs-1"])
        there = [n for n in range(20) if shard_of(f"p{n}", SHARDS) != "docs-1"]
        assert answer.get("count", len(there)) == len(there)
        assert [hit["id"] for hit in answer.get("hits", ())] == [f"p{n}" for n in there][:10] * (op == "query")
        rig.errors = dict.fromkeys(SHARDS, error)
        with pytest.raises(StepFailed, match="docs-0, docs-1, docs-2 are all missing"):
            await rig.call(asked)


async def test_shards_get_less_time_than_the_step_and_a_silent_one_is_missing() -> None:
    async with running("partial") as rig:
        rig.hangs = {"docs-0"}
        answer = await rig.call({"op": "count"}, left_s=0.5)
        assert (answer["missing"], rig.cancelled) == (["docs-0"], ["docs-0"])
        assert [before_s for _, _, before_s in rig.asked] == [pytest.approx(0.05)] * 3
        rig.asked.clear()
        rig.hangs = set()
        await rig.call({"op": "count"}, left_s=3600.0)  # its target's time-out is 30 s
        assert [before_s for _, _, before_s in rig.asked] == [pytest.approx(3570.5)] * 3


async def test_the_first_missing_shard_and_a_cancelled_step_stop_the_others() -> None:
    async with running("fail") as rig:
        rig.hangs, rig.errors = {"docs-0", "docs-2"}, {"docs-1": Unavailable("down")}
        with pytest.raises(StepFailed, match="docs-1"):
            await rig.call({"op": "count"})
        assert sorted(rig.cancelled) == ["docs-0", "docs-2"]
        rig.cancelled.clear()
        rig.errors, rig.hangs = {}, set(SHARDS)
        task = asyncio.create_task(rig.call({"op": "count"}))
        while len(rig.asked) < 6:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert sorted(rig.cancelled) == SHARDS


@pytest.mark.parametrize("missing", ["fail", "partial"])
async def test_a_refused_write_says_which_ids_were_not_stored(missing: str) -> None:
    async with running(missing) as rig:
        rig.errors["docs-2"] = Rejected("busy")
        with pytest.raises(StepFailed) as caught:
            await rig.call({"op": "upsert", "points": points(30)})
        refused = [f"p{n}" for n in range(30) if shard_of(f"p{n}", SHARDS) == "docs-2"]
        assert (caught.value.code, caught.value.reason) == ("RESOURCE_EXHAUSTED", "SHARD_MISSING")
        assert f"{len(refused)} points are not stored, as far as is known: {', '.join(map(repr, refused))}" in caught.value.message
        assert sum([(await rig.call({"op": "count"}, shard))["count"] for shard in SHARDS]) == 30 - len(refused)
        with pytest.raises(StepFailed, match=r"2 points are not deleted everywhere, as far as is known: 'p1', 7$"):
            await rig.call({"op": "delete", "ids": ["p1", 7]})
        with pytest.raises(StepFailed, match=r"and \d+ more$") as caught:
            await rig.call({"op": "delete", "ids": ["x" * 400 + str(n) for n in range(1000)]})
        assert len(caught.value.message) < 4000


async def test_a_large_write_goes_in_batches_that_steps_may_have() -> None:
    async with running(max_input_bytes=2048) as rig:
        new = [{"id": n, "text": "car " * 50} for n in range(40)]
        await rig.call({"op": "upsert", "points": new})
        bodies = [(shard, body) for shard, body, _ in rig.asked]
        assert len(bodies) > 3
        assert all(len(json.dumps(body, separators=(",", ":"))) <= 2048 for _, body in bodies)
        assert sorted(point["id"] for _, body in bodies for point in body["points"]) == list(range(40))
        assert await rig.call({"op": "count"}) == {"count": 40}
        rig.asked.clear()
        rig.errors["docs-0"] = Unavailable("down")
        with pytest.raises(StepFailed) as caught:
            await rig.call({"op": "upsert", "points": new})
        lost = [n for n in range(40) if shard_of(n, SHARDS) == "docs-0"]
        assert [shard for shard, _, _ in rig.asked].count("docs-0") == 1, "what follows a refused batch is not sent"
        assert caught.value.message.endswith(", ".join(map(str, lost)))


@pytest.mark.parametrize(("answer", "op"), [(b"{}", "query"), (b'{"hits": [1]}', "query"), (b"no", "count"), (b"[]", "count")])
async def test_what_is_no_collections_answer_is_no_missing_shard(answer: bytes, op: str) -> None:
    async with running("partial") as rig:
        rig.answers["docs-2"] = answer
        with pytest.raises(StepFailed, match="'docs-2'") as caught:
            await rig.call({"op": "query", "text": "a"} if op == "query" else {"op": "count"})
        assert caught.value.reason == "SHARD_INVALID"


async def test_what_another_worker_announces_must_fit() -> None:
    async with running("partial") as rig:
        targets = {target.name: target for target in rig.executor.targets()}
        for name in SHARDS:
            rig.known[name] = targets[name]
        await rig.call({"op": "count"})
        rig.known["docs-0"] = replace(targets["docs"], name="docs-0")
        with pytest.raises(StepFailed, match="has shards itself") as caught:
            await rig.call({"op": "count"})
        assert caught.value.reason == "SHARD_INVALID"
        schema = targets["docs-0"].input_schema
        assert schema is not None
        for changed in ({"dimensions": 5, "embed_target": "embed"}, {"dimensions": 4, "embed_target": "other"}):
            rig.known["docs-0"] = replace(targets["docs-0"], input_schema={**schema, "x-collection": changed})
            with pytest.raises(StepFailed, match="has another"):
                await rig.call({"op": "count"})
        rig.known["docs-0"] = Target(Kind.RETRIEVE, "docs-0")  # a plugin's, of which nothing more is known
        await rig.call({"op": "count"})


async def test_input_is_checked_before_a_shard_hears_of_it() -> None:
    async with running() as rig:
        for body in ({"op": "query", "text": "a", "limit": 101}, {"op": "query", "vector": [1]}, {"op": "delete", "ids": []}, {"op": "x"}):
            with pytest.raises(InvalidStep):
                await rig.call(body)
        assert rig.asked == []


async def test_without_points_of_its_own_a_worker_opens_no_store() -> None:
    async with running(dimensions=3) as rig:
        assert rig.executor._store is None
        assert rig.executor.ready("docs")
        rig.answers = dict.fromkeys(SHARDS, b'{"count": 2}')
        assert await rig.call({"op": "count"}) == {"count": 6}


@pytest.mark.parametrize(
    ("collections", "said"),
    [
        ([{"name": "a", "shards": ["b", "b"]}], "named more than once"),
        ([{"name": "a", "shards": ["a", "b"]}], "among its own shards"),
        ([{"name": "a", "shards": ["b"]}, {"name": "b", "shards": ["c"]}], "has shards itself"),
        ([{"name": "a", "shards": ["b"]}, {"name": "b", "dimensions": 5}], "another dimensions"),
        ([{"name": "a", "shards": ["b"]}, {"name": "b", "embed_target": "c"}], "another embed_target"),
        ([{"name": "a", "missing": "partial"}], "has none"),
        ([{"name": "a", "shards": ["b c"]}], "is not an id"),
        ([{"name": "a", "shards": [f"b{n}" for n in range(65)]}], "shards"),
        ([{"name": "a", "shards": ["b"], "missing": "maybe"}], "missing"),
    ],
)
def test_nonsense_is_refused(collections: list[object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse({"retrieve": {"collections": collections}})


async def test_a_worker_that_cannot_call_others_refuses_shards() -> None:
    executor = RetrieveExecutor(parse({"retrieve": {"collections": [{"name": "a", "shards": ["b"]}]}}), embed, environ={})
    with pytest.raises(ConfigError, match="can call other targets"):
        await executor.start()


def test_time_that_is_over_is_none() -> None:
    section = parse({"retrieve": {"collections": [{"name": "a", "shards": ["b"]}]}}).retrieve.collections[0]
    work = FakeWork({})
    work.remaining_s = lambda: 10.0  # type: ignore[method-assign]
    left_s = Scatter(section, Rig("fail"), timeout_s=4.0, most_bytes=1).left_s(work)
    assert left_s() == 4.0
    work.remaining_s = lambda: 7.0  # type: ignore[method-assign]
    assert left_s() == 1.0
