"""Executes retrieve steps: each collection of a vector store is a target.

    {"op": "query", "text": "..." or "vector": [...], "limit": 10, "filter": {"field": value or [values]}}
        -> {"hits": [{"id": ..., "score": ..., "payload": {...}}]}
    {"op": "upsert", "points": [{"id": 1 or "any text", "text": "..." or "vector": [...], "payload": {...}}]} -> {"upserted": 1}
    {"op": "delete", "ids": [1, "any text"]} -> {"deleted": 2}, whether or not they were there
    {"op": "count"} -> {"count": 1}

A point's text is embedded and not kept; what a query should give back belongs in its payload. Every operation can be repeated.
A collection with shards takes the same operations; see `scatter`.
"""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence

from pydantic_core import to_json

from gateway.config import CollectionSection, Config
from gateway.errors import ConfigError, NearloopError, Rejected, StepFailed, Unavailable
from gateway.ports import Work
from gateway.types import Kind, Payload, Target
from workers.catalogue import merge_target
from workers.embedding import Embed
from workers.retrieve_input import NewPoint, Operation, Query, input_schema, parse
from workers.scatter import Scatter, ShardCalls
from workers.tool_input import need_json
from workers.vector_store import Point, VectorStore

log = logging.getLogger("nearloop.worker")

_LIMIT = 10
_LARGE_BYTES = 64 * 1024  # parsing more than this takes longer than the event loop should wait


class _Collection:
    def __init__(self, section: CollectionSection, config: Config, calls: ShardCalls | None) -> None:
        self.section = section
        facts: dict[str, object] = {"embed_target": section.embed_target}
        if section.shards:
            facts["shards"] = list(section.shards)
        self.target = Target(
            kind=Kind.RETRIEVE,
            name=section.name,
            description=_description(section),
            home_region=config.region_names[0],
            slots=config.retrieve.slots,
            idempotent=True,
            input_schema=input_schema(section.dimensions, **facts),
        )
        self.scatter: Scatter | None = None
        if section.shards and calls is not None:
            timeout_s = merge_target(config.target_section(Kind.RETRIEVE, section.name), self.target).timeout_s
            self.scatter = Scatter(section, calls, timeout_s, config.gateway.max_input_bytes)


def _description(section: CollectionSection) -> str:
    shards = f", in shards {', '.join(section.shards)}" if section.shards else ""
    return f"Vector collection, {section.dimensions} dimensions, cosine similarity{shards}: query, upsert, delete, count"


class RetrieveExecutor:
    """The executor for steps of kind retrieve. `embed` serves all collections, so they must name one embed_target; `calls` asks shards.

    Without a collection that has points of its own it needs no vector store, and opens none.
    """

    def __init__(self, config: Config, embed: Embed, environ: Mapping[str, str] = os.environ, *, calls: ShardCalls | None = None) -> None:
        self._config = config
        self._embed = embed
        self._environ = environ
        self._collections = {section.name: _Collection(section, config, calls) for section in config.retrieve.collections}
        self._store: VectorStore | None = None
        self._is_open = False

    async def start(self) -> None:
        """Opens the store and makes missing collections. Raises ConfigError with everything wrong, Unavailable."""
        section = self._config.retrieve
        problems = []
        if section.api_key_env and section.api_key_env not in self._environ:
            problems.append(f"retrieve.api_key_env: the environment variable {section.api_key_env} is not set")
        names = [collection.name for collection in section.collections]
        problems += [f"retrieve.collections: {name!r} is there more than once" for name in sorted(set(names)) if names.count(name) > 1]
        if len({collection.embed_target for collection in section.collections}) > 1:
            problems.append("retrieve.collections: all collections of a worker must have the same embed_target")
        if any(collection.section.shards and collection.scatter is None for collection in self._collections.values()):
            problems.append("retrieve.collections: shards need a worker that can call other targets")
        if problems:
            raise ConfigError("retrieve", problems)
        own = [collection for collection in section.collections if not collection.shards]
        for shard in sorted({shard for collection in section.collections for shard in collection.shards} - set(names)):
            log.info("shard %r is not of this worker: another one must serve it", shard)
        if own:
            self._store = await self._open(own)
        self._is_open = True

    async def _open(self, own: Sequence[CollectionSection]) -> VectorStore:
        section = self._config.retrieve
        store = VectorStore(section.url, section.path, self._environ.get(section.api_key_env, ""))
        await store.open()
        try:
            found = [await store.ensure(collection.name, collection.dimensions) for collection in own]
            problems = [f"retrieve.collections: {problem}" for problem in found if problem]
            if problems:
                raise ConfigError("retrieve", problems)
        except BaseException:
            await store.close()
            raise
        return store

    async def close(self) -> None:
        self._is_open = False
        if self._store is not None:
            await self._store.close()
            self._store = None

    def targets(self) -> Sequence[Target]:
        return [collection.target for collection in self._collections.values()]

    def ready(self, target: str) -> bool:
        return self._is_open and target in self._collections

    async def execute(self, work: Work) -> Payload:
        """Raises InvalidStep, StepFailed, Unavailable."""
        collection = self._collections.get(work.step.target)
        if collection is None:
            raise StepFailed(f"this worker has no collection {work.step.target!r}", code="NOT_FOUND", reason="UNKNOWN_TARGET")
        if not self._is_open:
            raise Unavailable("the vector store is closed")
        if collection.scatter is not None:
            answer = await self._in_shards(work, collection, collection.scatter)
        else:
            answer = await self._here(await _parse(work.step.input, collection.section.dimensions), collection)
        return Payload(to_json(answer, inf_nan_mode="null"))

    async def _here(self, operation: Operation, collection: _Collection) -> dict[str, object]:
        assert self._store is not None
        store, name = self._store, collection.section.name
        if operation["op"] == "query":
            vector = (await self._vectors([operation], collection))[0]
            return {"hits": await store.query(name, vector, operation.get("limit", _LIMIT), operation.get("filter", {}))}
        if operation["op"] == "upsert":
            new = operation["points"]
            vectors = await self._vectors(new, collection)
            points = [Point(point["id"], vector, point.get("payload", {})) for point, vector in zip(new, vectors, strict=True)]
            await store.upsert(name, points)
            return {"upserted": len(points)}
        if operation["op"] == "delete":
            await store.delete(name, operation["ids"])
            return {"deleted": len(operation["ids"])}
        return {"count": await store.count(name)}

    async def _in_shards(self, work: Work, collection: _Collection, scatter: Scatter) -> dict[str, object]:
        left_s = scatter.left_s(work)
        operation = await _parse(work.step.input, collection.section.dimensions)
        if operation["op"] == "query":
            vector = (await self._vectors([operation], collection))[0]
            return await scatter.query(work, left_s(), vector, operation.get("limit", _LIMIT), operation.get("filter", {}))
        if operation["op"] == "upsert":
            return await scatter.upsert(work, left_s(), operation["points"])
        if operation["op"] == "delete":
            return await scatter.delete(work, left_s(), operation["ids"])
        return await scatter.count(work, left_s())

    async def _vectors(self, items: Sequence[Query | NewPoint], collection: _Collection) -> list[list[float]]:
        """The vector of each item: its own, or that of its text."""
        texts = [item["text"] for item in items if "text" in item]
        embedded = iter(await self._embedded(texts, collection.section.dimensions) if texts else ())
        return [next(embedded) if "text" in item else item["vector"] for item in items]

    async def _embedded(self, texts: list[str], dimensions: int) -> list[list[float]]:
        try:
            vectors = await self._embed(texts)
        except Rejected as error:
            # The embedding model is busy: this step can wait in its queue.
            raise Unavailable(error.message, reason=error.reason, retry_after_s=error.retry_after_s) from None
        except (Unavailable, StepFailed):
            raise
        except NearloopError as error:
            raise StepFailed(f"embedding: {error.message}", code=error.code, reason=error.reason) from None
        if len(vectors) != len(texts) or any(len(vector) != dimensions for vector in vectors):
            message = f"the embedding model does not give {dimensions} numbers for each text, as the collection needs"
            raise StepFailed(message, code="FAILED_PRECONDITION", reason="EMBEDDING_INVALID")
        return vectors


async def _parse(payload: Payload, dimensions: int) -> Operation:
    need_json(payload)
    if len(payload.data) > _LARGE_BYTES:
        return await asyncio.to_thread(parse, payload.data, dimensions)
    return parse(payload.data, dimensions)
